from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.numerics import in_float32
from losses.cross_entropy import CrossEntropyLoss


class LDAMLoss(nn.Module):
    """Cross-entropy with a margin on the target's cosine that grows as the class gets rarer.

    Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", 2019, eq. 13: the margin of
    class j is ``max_margin * (n_min / n_j) ** (1/4)``. ``scale`` (a number or [B, 1]) is what the head has multiplied
    its cosines by; the margin is multiplied by it too. The mean is weighted by ``weight`` [C]. A row of
    ``row_weights`` r [B] counts as r rows.
    """

    mean_over = "weights"

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        max_margin: float = 0.3,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        self.register_buffer("margins", (max_margin * (counts.min() / counts) ** 0.25).float(), persistent=False)
        self.cross_entropy = CrossEntropyLoss(weight, label_smoothing)

    @in_float32
    def forward(
        self, logits: Tensor, targets: Tensor, scale: float | Tensor = 30.0, row_weights: Tensor | None = None
    ) -> Tensor:
        margins = self.margins[targets, None].to(logits)
        logits = logits.scatter_add(1, targets[:, None], -scale * margins)
        return self.cross_entropy(logits, targets, row_weights)
