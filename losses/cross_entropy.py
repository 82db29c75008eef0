import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import mean_over_processes
from engine.numerics import in_float32


class CrossEntropyLoss(nn.Module):
    """``sum_i w_{y_i} l_i / sum_i w_{y_i}`` over the rows of all processes: `torch.nn.CrossEntropyLoss`, which divides
    by the weights of its own rows, when there is one. With ``label_smoothing`` e a target counts 1 - e, and all
    classes, each with its weight, share e. A row of ``row_weights`` r [B] counts as r rows."""

    mean_over = "weights"  # of classes and rows, not "rows" alone; without it --test_prior knows no prior of the loss

    def __init__(self, weight: Tensor | None = None, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("weight", weight, persistent=False)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        weight = torch.ones_like(logits[0]) if self.weight is None else self.weight.to(logits)
        losses = F.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=self.label_smoothing)
        weights = weight[targets]
        if row_weights is not None:
            losses, weights = row_weights * losses, row_weights * weights
        return mean_over_processes(losses.sum(), weights.sum())
