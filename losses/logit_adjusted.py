from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.numerics import in_float32
from losses.cross_entropy import CrossEntropyLoss


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy on ``logits + tau * log(prior)``: the logits themselves learn to do without the class prior.

    Menon et al., "Long-Tail Learning via Logit Adjustment", 2021, eq. 10; with ``tau`` 1 it is the balanced softmax of
    Ren et al., 2020, with 0 cross-entropy. The prior is each class's share of the training images; predictions are
    made with the logits as they are. The mean is weighted by ``weight`` [C]. A row of ``row_weights`` r [B] counts as r
    rows.
    """

    mean_over = "weights"

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor,
        tau: float = 1.0,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        self.register_buffer("adjustments", (tau * (counts / counts.sum()).log()).float(), persistent=False)
        self.cross_entropy = CrossEntropyLoss(weight, label_smoothing)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        return self.cross_entropy(logits + self.adjustments.to(logits), targets, row_weights)
