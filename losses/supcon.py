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

    With ``prototypes`` [C, D] every class weighs the same (Zhu et al., "Balanced Contrastive Learning for Long-Tailed
    Visual Recognition", 2022, eq. 6 and 7): for anchor i
    ``-1/|P| sum_p [z_i z_p / T - log sum_j 1/|B_j| sum_{k in B_j} exp(z_i z_k / T)]``, where B_j are the keys of class
    j, its prototype among them, and P those of the anchor's class, both without the anchor itself. Prototypes are
    normalised here, and enter once for all processes.
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
        prototypes: Tensor | None = None,
    ) -> Tensor:
        features, targets, row_weights = view_by_view(features, targets, row_weights)
        rows = features * inverse_norm(features)
        anchors, anchor_targets = rows[:num_anchors], targets[:num_anchors]
        keys, targets = gather_rows(rows), gather_rows(targets)  # this process's rows stay the first
        if prototypes is not None:
            prototypes = prototypes.to(keys.dtype)
            classes = torch.arange(len(prototypes), device=targets.device)
            keys, targets = torch.cat([keys, prototypes * inverse_norm(prototypes)]), torch.cat([targets, classes])
        similarities = anchors @ keys.T / self.temperature  # [A, K]
        same = anchor_targets[:, None] == targets
        itself = torch.eye(len(anchors), len(keys), dtype=torch.bool, device=keys.device)
        positives = same & ~itself
        terms = similarities
        if prototypes is not None:
            members = (targets[:, None] == classes).sum(dim=0)[targets] - same.long()  # |B_j| without the anchor
            terms = terms - members.to(keys.dtype).log()
        # the lowest finite number, not -inf: a row alone in its batch would give inf - inf
        terms = terms.masked_fill(itself, torch.finfo(keys.dtype).min)
        num_positives = positives.sum(dim=1)
        mean_positive = torch.where(positives, similarities, 0).sum(dim=1) / num_positives.clamp_min(1)
        weights = num_positives > 0
        loss = torch.where(weights, terms.logsumexp(dim=1) - mean_positive, 0)
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
