from typing import NamedTuple

from torch import Tensor, nn

from models.backbones import Backbone
from rsg import RareSampleGenerator


class Output(NamedTuple):
    """What a forward pass gives; rows 0..B-1 are the images', in order, the others were generated."""

    features: Tensor  # [B', D], pooled, behind the neck if there is one
    logits: dict[str, Tensor]  # head name -> [B', C], ready for cross-entropy
    scales: dict[str, float | Tensor]  # head name -> what it has multiplied its cosines by
    targets: Tensor | None  # [B']
    # the generator's losses, "center_distance" and, where it generates, "maps" and "tail_rows" [B' - B], the row that
    # each generated one stems from; "projections" [B', P]; "prototypes" [C, P], or [C, D] without a projection; of
    # mixed images "mixed_targets" [B], those of the other image, and "mixed_<head>" [B, C], logits with margins on them
    auxiliary: dict[str, Tensor]


class LongTailClassifier(nn.Module):
    """Backbone, generator and heads. The generator works between ``backbone.lower`` and ``backbone.upper``, in
    training only; the model without it predicts the same. ``prototypes`` makes SupCon's of the main head's weights.

    With `freeze_backbone` the backbone learns nothing, its running statistics included."""

    def __init__(
        self,
        backbone: Backbone,
        heads: nn.ModuleDict,
        projection: nn.Module | None = None,
        generator: RareSampleGenerator | None = None,
        prototypes: nn.Module | None = None,
        freeze_backbone: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.projection = projection
        self.generator = generator
        self.prototypes = prototypes
        self.freeze_backbone = freeze_backbone

    def train(self, mode: bool = True) -> "LongTailClassifier":
        super().train(mode)
        self.backbone.train(mode and not self.freeze_backbone)
        return self

    def forward(self, images: Tensor, targets: Tensor | None = None, mixed_targets: Tensor | None = None) -> Output:
        """Images [B, 3, H, W] to an `Output`. With targets [B] margin heads apply their margin; ``mixed_targets`` are
        those of the images mixed into them."""
        has_generator = self.generator is not None and self.training and targets is not None
        is_head = self.generator.send_kinds(targets) if has_generator else None
        maps, auxiliary = self.backbone.lower(images), {}
        if has_generator:
            maps, targets, auxiliary = self.generator(maps, targets, is_head)
            auxiliary["center_distance"] = self.generator.center_distance
            if self.generator.generating:
                auxiliary["maps"] = maps
                auxiliary["tail_rows"] = self.generator.tail_rows
        features = self.backbone.upper(maps)
        if self.projection is not None and self.training:
            auxiliary["projections"] = self.projection(features)
        if self.prototypes is not None and self.training:
            auxiliary["prototypes"] = self.prototypes(self.heads["main"].weight)
        if mixed_targets is None:
            logits = {name: head(features, targets) for name, head in self.heads.items()}
        else:
            pairs = {name: head.for_mixed(features, targets, mixed_targets) for name, head in self.heads.items()}
            logits = {name: own for name, (own, _) in pairs.items()}
            auxiliary |= {f"mixed_{name}": other for name, (_, other) in pairs.items()}
            auxiliary["mixed_targets"] = mixed_targets
        scales = {name: head.scale_of(features) for name, head in self.heads.items()}
        return Output(features, logits, scales, targets, auxiliary)

    def start_phase(self, generating: bool, heads_trained: bool) -> None:
        """Prepare an epoch. Parameters that no loss reaches are marked so: they keep no gradient, the optimiser leaves
        them alone, and several processes need not search for them."""
        self.requires_grad_(True)
        self.backbone.requires_grad_(not self.freeze_backbone)
        self.heads.requires_grad_(heads_trained)
        if self.generator is not None:
            self.generator.generating = generating
            self.generator.idle_module().requires_grad_(False)
