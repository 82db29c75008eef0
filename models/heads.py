"""Heads: pooled features (and, in training, targets) to logits that are ready for cross-entropy.

A head owns its scale. Cosine heads return ``scale * cos``, SphereFace ``|x| * cos``, `Linear` plain logits; losses take
them as they are. With targets a margin head lowers the target's logit by its margin, without them it never does.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.flags import add_switch, number_in
from engine.numerics import in_float32, inverse_norm, safe_reciprocal


class Linear(nn.Linear):
    """Plain logits ``W x + b``; their scale is 1."""

    def scale_of(self, features: Tensor) -> float:
        return 1.0

    @in_float32
    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        return super().forward(features)

    def for_mixed(self, features: Tensor, targets: Tensor, mixed_targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self(features)
        return logits, logits


class CosineHead(nn.Module):
    """Logits are a scale times the cosines between the features and one direction per class; no bias.

    Subclasses say what a margin adds to the target's logit (`margin_shift`). A zero feature has no direction: its
    cosines are 0, and its gradient too, where the scale is a number.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, in_features)))  # unit rows: the start of LDAM
        self.scale = scale

    def scale_of(self, features: Tensor) -> float | Tensor:
        """What the cosines are multiplied by: a number, or [B, 1]."""
        return self.scale

    def margin_shift(self, target_logits: Tensor, scale: float | Tensor) -> Tensor | None:
        """What the margin adds to the target's logits [B, 1], given the scale; None without a margin."""
        return None

    def count_step(self) -> None:
        """Called once in each forward pass with targets, before `margin_shift`."""

    @in_float32
    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        logits, scale = self._scaled_cosines(features)
        if targets is None:
            return logits
        self.count_step()
        return self._with_margin(logits, targets, scale)

    @in_float32
    def for_mixed(self, features: Tensor, targets: Tensor, mixed_targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of mixed images: with the margin on the targets of the one image, and on those of the other."""
        logits, scale = self._scaled_cosines(features)
        self.count_step()
        return self._with_margin(logits.clone(), targets, scale), self._with_margin(logits, mixed_targets, scale)

    def _scaled_cosines(self, features: Tensor) -> tuple[Tensor, float | Tensor]:
        # dividing by the norms after the product keeps one [B, C] and no normalised copy of features or weights
        scale = self.scale_of(features)
        return F.linear(features, self.weight) * (scale * inverse_norm(features) * inverse_norm(self.weight).T), scale

    def _with_margin(self, logits: Tensor, targets: Tensor, scale: float | Tensor) -> Tensor:
        """``logits``, shifted in place."""
        # index_select, unlike gather, does not keep the logits for backward, so that they can be shifted in place
        index = torch.arange(len(targets), device=targets.device) * logits.shape[1] + targets
        shift = self.margin_shift(logits.flatten().index_select(0, index)[:, None], scale)
        return logits if shift is None else logits.scatter_add_(1, targets[:, None], shift)


class NormedLinear(CosineHead):
    """Scaled cosines without a margin (Cao et al., LDAM, 2019, section 3.2, where the scale is implicit)."""


class ArcFaceHead(CosineHead):
    """The target's angle grows by ``margin`` radians (Deng et al., ArcFace, 2019, eq. 3).

    Beyond ``pi - margin``, where cos(theta + margin) would rise again, the target's cosine is lowered by
    ``margin * sin(margin)`` instead, as in the authors' first implementation.
    """

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0, margin: float = 0.5):
        super().__init__(in_features, num_classes, scale)
        self.margin = margin

    def margin_shift(self, target_logits: Tensor, scale: float) -> Tensor:
        cosines = target_logits / scale
        # the derivative of sin is infinite at cos = +-1, where rounding also passes 1: bounded by sin = 0.001
        sines = (1 - cosines.square()).clamp_min(1e-6).sqrt()
        # what cos(theta + margin) has beyond cos(theta)
        shift = (math.cos(self.margin) - 1) * cosines - math.sin(self.margin) * sines
        beyond = cosines <= math.cos(math.pi - self.margin)
        return scale * shift.masked_fill(beyond, -self.margin * math.sin(self.margin))


class AMSoftmaxHead(CosineHead):
    """The target's cosine is lowered by ``margin`` (Wang et al., Additive Margin Softmax, 2018, eq. 6; CosFace)."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0, margin: float = 0.35):
        super().__init__(in_features, num_classes, scale)
        self.margin = margin

    def margin_shift(self, target_logits: Tensor, scale: float) -> Tensor:
        return torch.full_like(target_logits, -scale * self.margin)


class SphereFaceHead(CosineHead):
    """The target's angle is multiplied by ``margin``; the scale is the feature's norm (Liu et al., SphereFace, 2017).

    The target's cosine becomes ``(lambda cos + psi) / (1 + lambda)`` with psi of eq. 7 and
    ``lambda = max(lambda_min, lambda_base (1 + lambda_gamma step) ** -lambda_power)``: the margin grows from nothing
    over the training batches, which `step` counts (saved with the weights).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        margin: int = 4,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_power: float = 1.0,
        lambda_min: float = 5.0,
    ):
        super().__init__(in_features, num_classes, scale=1.0)
        self.margin = margin
        self.lambda_base, self.lambda_gamma = lambda_base, lambda_gamma
        self.lambda_power, self.lambda_min = lambda_power, lambda_min
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    @in_float32
    def scale_of(self, features: Tensor) -> Tensor:
        return torch.linalg.vector_norm(features, dim=1, keepdim=True)

    def _scaled_cosines(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # |x| cos = x . w / |w|: dividing by the feature's norm and multiplying by it again can be left out
        return F.linear(features, self.weight) * inverse_norm(self.weight).T, self.scale_of(features)

    def count_step(self) -> None:
        if self.training:
            self.step += 1

    def margin_shift(self, target_logits: Tensor, scale: Tensor) -> Tensor:
        weight = self.lambda_base * (1 + self.lambda_gamma * self.step) ** -self.lambda_power
        weight = weight.clamp_min(self.lambda_min)
        cosines = target_logits * safe_reciprocal(scale)
        return scale * (_psi(cosines, self.margin) - cosines) / (1 + weight)


def _psi(cosines: Tensor, margin: int) -> Tensor:
    """``(-1)^k cos(margin * theta) - 2 k`` with ``k = floor(margin * theta / pi)``: decreasing in theta."""
    previous, multiple = torch.ones_like(cosines), cosines  # Chebyshev: cos(m theta) is a polynomial in cos(theta)
    for _ in range(margin - 1):
        previous, multiple = multiple, 2 * cosines * multiple - previous
    with torch.no_grad():
        k = (margin * cosines.clamp(-1, 1).acos() / math.pi).floor().clamp_max(margin - 1)
    return (1 - 2 * (k % 2)) * multiple - 2 * k


MARGIN_HEADS = {  # name: (the flag that turns it on, built from flags and (in_features, num_classes))
    "arc": ("add_arc_margin_loss", lambda args, sizes: ArcFaceHead(*sizes, args.arc_scale, args.arc_margin)),
    "add": ("add_add_margin_loss", lambda args, sizes: AMSoftmaxHead(*sizes, args.am_scale, args.am_margin)),
    "sphere": (
        "add_sphere_loss",
        lambda args, sizes: SphereFaceHead(*sizes, args.sphere_margin, lambda_min=args.sphere_lambda_min),
    ),
}


def add_head_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("heads")
    add_switch(group, "--norm_out", True, "main head: NormedLinear (scaled cosines); False: Linear")
    positive, margin = number_in(0, open_low=True), number_in(0)
    group.add_argument("--norm_scale", type=positive, default=30.0, metavar="S", help="NormedLinear: cosine scale")
    add_switch(group, "--add_arc_margin_loss", False, "ArcFace head beside the main one")
    group.add_argument("--arc_scale", type=positive, default=30.0, metavar="S", help="ArcFace: cosine scale")
    group.add_argument("--arc_margin", type=number_in(0, 1.57), default=0.5, metavar="M", help="ArcFace: radians")
    add_switch(group, "--add_add_margin_loss", False, "AM-softmax head beside the main one")
    group.add_argument("--am_scale", type=positive, default=30.0, metavar="S", help="AM-softmax: cosine scale")
    group.add_argument("--am_margin", type=margin, default=0.35, metavar="M", help="AM-softmax: as a cosine")
    add_switch(group, "--add_sphere_loss", False, "SphereFace head beside the main one")
    group.add_argument("--sphere_margin", type=int, choices=(1, 2, 3, 4), default=4, help="SphereFace: angle factor")
    group.add_argument("--sphere_lambda_min", type=margin, default=5.0, metavar="L", help="SphereFace: floor of lambda")


def margin_heads_on(args: argparse.Namespace) -> list[str]:
    return [name for name, (flag, _) in MARGIN_HEADS.items() if getattr(args, flag)]


def build_heads(args: argparse.Namespace, in_features: int, num_classes: int) -> nn.ModuleDict:
    """The main head and the margin heads that are on, by name."""
    sizes = (in_features, num_classes)
    main = NormedLinear(*sizes, args.norm_scale) if args.norm_out else Linear(*sizes)
    return nn.ModuleDict({"main": main, **{name: MARGIN_HEADS[name][1](args, sizes) for name in margin_heads_on(args)}})
