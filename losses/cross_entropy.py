import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import mean_over_processes
from engine.numerics import in_float32


class CrossEntropyLoss(nn.Module):
    """``sum_i w_{y_i} l_i / sum_i w_{y_i}`` over the rows of all processes: `torch.nn.CrossEntropyLoss`, which divides
    by the weights of its own rows, when there is one."""

    def __init__(self, weight: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.weight is None:
            return mean_over_processes(F.cross_entropy(logits, targets, reduction="sum"), len(targets))
        weight = self.weight.to(logits)
        total = F.cross_entropy(logits, targets, weight, reduction="sum")
        return mean_over_processes(total, weight[targets].sum())
