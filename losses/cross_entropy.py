import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import mean_over_processes
from engine.numerics import in_float32


class CrossEntropyLoss(nn.Module):
    """``sum_i w_{y_i} l_i / sum_i w_{y_i}`` over the rows of all processes: `torch.nn.CrossEntropyLoss`, which divides
    by the weights of its own rows, when there is one. A row of ``row_weights`` r [B] counts as r rows."""

    def __init__(self, weight: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        if row_weights is not None:
            weights = row_weights.to(logits) if self.weight is None else row_weights * self.weight.to(logits)[targets]
            losses = F.cross_entropy(logits, targets, reduction="none")
            return mean_over_processes((weights * losses).sum(), weights.sum())
        if self.weight is None:
            return mean_over_processes(F.cross_entropy(logits, targets, reduction="sum"), len(targets))
        weight = self.weight.to(logits)
        total = F.cross_entropy(logits, targets, weight, reduction="sum")
        return mean_over_processes(total, weight[targets].sum())
