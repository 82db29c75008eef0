from typing import NamedTuple

from torch import Tensor, nn

from models.backbones import Backbone
from rsg import RareSampleGenerator


class Output(NamedTuple):
    """What a forward pass gives; rows 0..B-1 are the images', in order, the others were generated."""

    features: Tensor  # [B', D], pooled
    logits: dict[str, Tensor]  # head name -> [B', C], ready for cross-entropy
    scales: dict[str, float | Tensor]  # head name -> what it has multiplied its cosines by
    targets: Tensor | None  # [B']
    # the generator's losses, "center_distance" and, where it generates, "maps"; "projections" [B', P]
    auxiliary: dict[str, Tensor]


class LongTailClassifier(nn.Module):
    """Backbone, generator and heads. The generator works between ``backbone.lower`` and ``backbone.upper``, in
    training only; the model without it predicts the same."""

    def __init__(
        self,
        backbone: Backbone,
        heads: nn.ModuleDict,
        projection: nn.Module | None = None,
        generator: RareSampleGenerator | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.heads = heads
        self.projection = projection
        self.generator = generator

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Output:
        """Images [B, 3, H, W] to an `Output`. With targets [B] margin heads apply their margin."""
        has_generator = self.generator is not None and self.training and targets is not None
        is_head = self.generator.send_kinds(targets) if has_generator else None
        maps, auxiliary = self.backbone.lower(images), {}
        if has_generator:
            maps, targets, auxiliary = self.generator(maps, targets, is_head)
            auxiliary["center_distance"] = self.generator.center_distance
            if self.generator.generating:
                auxiliary["maps"] = maps
        features = self.backbone.upper(maps)
        if self.projection is not None and self.training:
            auxiliary["projections"] = self.projection(features)
        logits = {name: head(features, targets) for name, head in self.heads.items()}
        scales = {name: head.scale_of(features) for name, head in self.heads.items()}
        return Output(features, logits, scales, targets, auxiliary)

    def start_phase(self, generating: bool, heads_trained: bool, projection_trained: bool) -> tuple[bool, ...]:
        """Prepare an epoch. Parameters that no loss reaches are marked so: they keep no gradient, the optimiser leaves
        them alone, and several processes need not search for them. Returns the phase; equal phases are alike."""
        self.requires_grad_(True)
        self.zero_grad()
        self.heads.requires_grad_(heads_trained)
        if self.projection is not None:
            self.projection.requires_grad_(projection_trained)
        if self.generator is not None:
            self.generator.generating = generating
            self.generator.idle_module().requires_grad_(False)
        return generating, heads_trained, projection_trained
