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
        cesc_factor: float = 0.0,
        mv_factor: float = 0.0,
    ):
        super().__init__()
        self.head_terms = head_terms
        self.loss_fns = nn.ModuleList(term.loss_fn for term in head_terms)  # so that .to() moves their buffers
        self.supcon, self.supcon_factor = supcon, supcon_factor
        self.supcon_generated, self.supcon_sees = supcon_generated, supcon_sees
        self.cesc_factor, self.mv_factor = cesc_factor, mv_factor

    def forward(
        self, output: Output, num_real: int, row_weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its parts by name (detached, before their factors). ``num_real`` rows come from images.

        An image of ``row_weights`` r [num_real] counts as r images in the losses of heads and features, and so does a
        row that was generated from it. The generator's own losses do not train the model; they count images as one.
        """
        weighted, parts, rows = [], {}, {}
        if row_weights is not None:
            if "tail_rows" in output.auxiliary:
                row_weights = torch.cat([row_weights, row_weights[output.auxiliary["tail_rows"]]])
            rows = {"row_weights": row_weights}
        for part, _, factor, head, loss_fn in self.head_terms:
            scale = (output.scales[head],) if isinstance(loss_fn, LDAMLoss) else ()
            parts[part] = loss_fn(output.logits[head], output.targets, *scale, **rows)
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
        if self.supcon_generated == "none":
            weights = None if row_weights is None else row_weights[:num_real]
            return self.supcon(rows[:num_real], targets[:num_real], row_weights=weights)
        if self.supcon_generated == "all" or "maps" not in output.auxiliary:
            return self.supcon(rows, targets, row_weights=row_weights)
        # also without generated rows in this process: the backward pass meets those of the others
        loss = self.supcon(rows, targets, num_anchors=num_real, row_weights=row_weights)
        maps = output.auxiliary["maps"]
        (gradient,) = torch.autograd.grad(loss, maps, retain_graph=True)
        # its gradient is the one to take away, its value is not; float32, or a loss scale of 65536 is inf in float16
        through_generator = (maps[num_real:].float() * gradient[num_real:].float()).sum()
        return loss - through_generator + through_generator.detach()

    def trains(self) -> tuple[bool, bool]:
        """Whether a loss reaches the heads, and whether one reaches the projections."""
        return bool(self.head_terms), self.supcon is not None

    def __str__(self) -> str:
        terms = [f"{term.factor:g} {term.text}" for term in self.head_terms]
        if self.supcon is not None:
            without = {"all": "", "keys": "; generated rows as keys", "none": "; real rows"}[self.supcon_generated]
            terms.append(f"{self.supcon_factor:g} SupCon({self.supcon_sees}{without})")
        if self.cesc_factor:
            terms.append(f"{self.cesc_factor:g} CESC")
        if self.mv_factor:
            terms.append(f"{self.mv_factor:g} MV")
        return " + ".join(terms)
