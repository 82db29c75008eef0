import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import mean_over_processes
from engine.numerics import in_float32

WEIGHT_REDUCTIONS = ("weighted_mean", "batch_mean")


class CrossEntropyLoss(nn.Module):
    """``sum_i w_{y_i} l_i / sum_i w_{y_i}`` over the rows of all processes: `torch.nn.CrossEntropyLoss`, which divides
    by the weights of its own rows, when there is one. With ``weight_reduction`` "batch_mean" it is
    ``sum_i w_{y_i} l_i / B``: weights that are small on average make a small loss. With ``label_smoothing`` e a target
    counts 1 - e, and all classes, each with its weight, share e. A row of ``row_weights`` r [B] counts as r rows."""

    def __init__(
        self, weight: Tensor | None = None, label_smoothing: float = 0.0, weight_reduction: str = WEIGHT_REDUCTIONS[0]
    ):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.divides_by_weights = weight_reduction == "weighted_mean"
        self.register_buffer("weight", weight, persistent=False)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(logits[0]) if self.weight is None else self.weight.to(logits)
        losses = F.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=self.label_smoothing)
        weights = weight[targets] if self.divides_by_weights else torch.ones_like(losses)
        if row_weights is not None:
            losses, weights = row_weights * losses, row_weights * weights
        return mean_over_processes(losses.sum(), weights.sum())
