import torch
from torch import Tensor, nn

from engine.distributed import gather_rows, mean_over_processes
from engine.numerics import in_float32, inverse_norm


class SupConLoss(nn.Module):
    """Supervised contrastive loss: pulls a row to the rows of its class, away from all others.

    Khosla et al., "Supervised Contrastive Learning", 2020, L_out of eq. 2, averaged over the anchors that have a
    positive; 0 with gradient 0 when none has. Rows are normalised here. ``features`` is [B, D], or [B, V, D] with V
    views of each image. With ``num_anchors`` only the first so many rows are anchors; all rows are keys.
    Keys come from all processes. A row of ``row_weights`` r [B] counts as r anchors, and as one key.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature

    @in_float32
    def forward(
        self,
        features: Tensor,
        targets: Tensor,
        num_anchors: int | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        features, targets, row_weights = view_by_view(features, targets, row_weights)
        rows = features * inverse_norm(features)
        anchors, anchor_targets = rows[:num_anchors], targets[:num_anchors]
        rows, targets = gather_rows(rows), gather_rows(targets)  # this process's rows stay the first
        itself = torch.eye(len(anchors), len(rows), dtype=torch.bool, device=rows.device)
        similarities = anchors @ rows.T / self.temperature
        # the lowest finite number, not -inf: a row alone in its batch would give inf - inf
        similarities = similarities.masked_fill(itself, torch.finfo(rows.dtype).min)
        positives = (anchor_targets[:, None] == targets) & ~itself
        num_positives = positives.sum(dim=1)
        mean_positive = torch.where(positives, similarities, 0).sum(dim=1) / num_positives.clamp_min(1)
        weights = num_positives > 0
        loss = torch.where(weights, similarities.logsumexp(dim=1) - mean_positive, 0)
        if row_weights is not None:
            weights = weights * row_weights[:num_anchors]
        return mean_over_processes((weights * loss).sum(), weights.sum())


def view_by_view(features: Tensor, targets: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features [B, V, D] to [V * B, D], with targets and weights to match; features [B, D] stay as they are."""
    if features.dim() == 2:
        return features, targets, row_weights
    views = features.shape[1]
    row_weights = None if row_weights is None else row_weights.repeat(views)
    return features.transpose(0, 1).flatten(0, 1), targets.repeat(views), row_weights
