from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses.ldam import LDAMLoss
from losses.supcon import SupConLoss
from models.classifier import Output


class HeadTerm(NamedTuple):
    """One classification loss on one head."""

    part: str  # its name in the log, "ldam_main"
    text: str  # its name for people, "LDAM(normed; ICF weights)"
    factor: float
    head: str
    loss_fn: nn.Module


class Objective(nn.Module):
    """What training minimises: the one place that adds losses. `str()` of it is the formula."""

    def __init__(
        self,
        head_terms: list[HeadTerm],
        supcon: SupConLoss | None = None,
        supcon_factor: float = 0.0,
        supcon_generated: str = "all",
        supcon_sees: str = "features",
        supcon_title: str = "SupCon",
        cesc_factor: float = 0.0,
        mv_factor: float = 0.0,
    ):
        super().__init__()
        self.head_terms = head_terms
        self.loss_fns = nn.ModuleList(term.loss_fn for term in head_terms)  # so that .to() moves their buffers
        self.supcon, self.supcon_factor = supcon, supcon_factor
        self.supcon_generated, self.supcon_sees, self.supcon_title = supcon_generated, supcon_sees, supcon_title
        self.cesc_factor, self.mv_factor = cesc_factor, mv_factor

    def forward(
        self,
        output: Output,
        num_real: int,
        share: float = 1.0,
        row_weights: Tensor | None = None,
        mixed_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name (detached, before their factors). ``num_real`` rows come from images.

        Where images are mixed with others, a classification loss is ``share`` of that of their own targets and the
        rest of that of the others'.

        An image of ``row_weights`` r [num_real] counts as r images in the losses of heads and features, and so does a
        row that was generated from it; ``mixed_weights`` are those of the images mixed into these. The generator's own
        losses do not train the model: they count every image as one.
        """
        weighted, parts = [], {}
        if row_weights is not None and "tail_rows" in output.auxiliary:
            row_weights = torch.cat([row_weights, row_weights[output.auxiliary["tail_rows"]]])
        for part, _, factor, head, loss_fn in self.head_terms:
            scale = (output.scales[head],) if isinstance(loss_fn, LDAMLoss) else ()
            parts[part] = loss_fn(output.logits[head], output.targets, *scale, row_weights)
            if "mixed_targets" in output.auxiliary:
                others, mixed_targets = output.auxiliary[f"mixed_{head}"], output.auxiliary["mixed_targets"]
                mixed_in = loss_fn(others, mixed_targets, *scale, mixed_weights)
                parts[part] = share * parts[part] + (1 - share) * mixed_in
            weighted.append(factor * parts[part])
        if self.supcon is not None:
            parts["supcon"] = self.supcon_loss(output, num_real, row_weights)
            weighted.append(self.supcon_factor * parts["supcon"])
        for part, factor in (("centre", self.cesc_factor), ("contrast", self.cesc_factor), ("mv", self.mv_factor)):
            if part in output.auxiliary:
                parts[part] = output.auxiliary[part]
                weighted.append(factor * parts[part])
        return torch.stack(weighted).sum(), {part: value.detach() for part, value in parts.items()}

    def supcon_loss(self, output: Output, num_real: int, row_weights: Tensor | None = None) -> Tensor:
        """SupCon on the projections where the model has them, else on the features; `supcon_generated` says what
        generated rows are: anchors and keys ("all"), keys that do not train the generator ("keys"), or left out."""
        rows, targets = output.auxiliary.get("projections", output.features), output.targets
        prototypes = output.auxiliary.get("prototypes")
        if self.supcon_generated == "none":
            real_weights = None if row_weights is None else row_weights[:num_real]
            return self.supcon(rows[:num_real], targets[:num_real], None, real_weights, prototypes)
        if self.supcon_generated == "all" or "maps" not in output.auxiliary:
            return self.supcon(rows, targets, None, row_weights, prototypes)
        # also without generated rows in this process: the backward pass meets those of the others
        loss = self.supcon(rows, targets, num_real, row_weights, prototypes)
        maps = output.auxiliary["maps"]
        scale = 2.0**8  # float16 would round small gradients to 0; a power of two costs no digit
        (gradient,) = torch.autograd.grad(scale * loss, maps, retain_graph=True)
        gradient = gradient.nan_to_num(0, 0, 0)  # what overflows is not taken away; the loss keeps its value
        # its gradient is the one to take away, its value is not; float32, or a loss scale of 65536 is inf in float16
        through_generator = (maps[num_real:].float() * gradient[num_real:].float() / scale).sum()
        return loss - through_generator + through_generator.detach()

    def __str__(self) -> str:
        terms = [f"{term.factor:g} {term.text}" for term in self.head_terms]
        if self.supcon is not None:
            without = {"all": "", "keys": "; generated rows as keys", "none": "; real rows"}[self.supcon_generated]
            terms.append(f"{self.supcon_factor:g} {self.supcon_title}({self.supcon_sees}{without})")
        if self.cesc_factor:
            terms.append(f"{self.cesc_factor:g} CESC")
        if self.mv_factor:
            terms.append(f"{self.mv_factor:g} MV")
        return " + ".join(terms)
