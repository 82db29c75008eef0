import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import mean_over_processes
from engine.numerics import in_float32


class FocalLoss(nn.Module):
    """Cross-entropy that fades for what is already learnt: mean of ``weight_y (1 - p_y) ** gamma * -log p_y``.

    Lin et al., "Focal Loss for Dense Object Detection", 2017, eq. 5, with softmax probabilities and ``weight`` [C] as
    alpha. The mean is over the batch, not over the weights. ``gamma`` 0 without weights is cross-entropy. A row of
    ``row_weights`` r [B] counts as r rows.
    """

    mean_over = "rows"

    def __init__(self, gamma: float = 2.0, weight: Tensor | None = None):
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weight", weight, persistent=False)

    @in_float32
    def forward(self, logits: Tensor, targets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        log_p = F.log_softmax(logits, dim=1).gather(1, targets[:, None]).squeeze(1)
        # 1 - p through expm1 keeps its digits near p = 1; bounded because a power below 1 has no derivative at 0
        one_minus_p = -torch.expm1(log_p)
        loss = one_minus_p.clamp_min(torch.finfo(log_p.dtype).tiny) ** self.gamma * -log_p
        if self.weight is not None:
            loss = loss * self.weight.to(loss)[targets]
        weights = torch.ones_like(loss) if row_weights is None else row_weights
        return mean_over_processes((weights * loss).sum(), weights.sum())
