import torch
from torch import Tensor, nn

from engine.distributed import gather_rows, mean_over_processes
from engine.numerics import in_float32, inverse_norm
from losses.supcon import view_by_view


class BalancedSupConLoss(nn.Module):
    """SupCon in which every class weighs the same: each class enters the denominator with the mean of its keys, and
    one prototype of every class is among the keys, so that each class is there and each row has a positive.

    Zhu et al., "Balanced Contrastive Learning for Long-Tailed Visual Recognition", 2022, eq. 6 and 7: for anchor i
    ``-1/|P| sum_p [z_i z_p / T - log sum_j 1/|B_j| sum_{k in B_j} exp(z_i z_k / T)]``, where B_j are the keys of class
    j and P those of the anchor's class, both without the anchor itself. Rows and prototypes [C, D] are normalised
    here. ``features`` is [B, D], or [B, V, D] with V views of each image. With ``num_anchors`` only the first so many
    rows are anchors. Keys come from all processes, prototypes once. A row of ``row_weights`` r [B] counts as r anchors,
    and as one key.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature

    @in_float32
    def forward(
        self,
        features: Tensor,
        targets: Tensor,
        prototypes: Tensor,
        num_anchors: int | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        features, targets, row_weights = view_by_view(features, targets, row_weights)
        rows, prototypes = features * inverse_norm(features), prototypes.to(features.dtype)
        anchors, anchor_targets = rows[:num_anchors], targets[:num_anchors]
        classes = torch.arange(len(prototypes), device=targets.device)
        keys = torch.cat([gather_rows(rows), prototypes * inverse_norm(prototypes)])  # this process's rows come first
        key_targets = torch.cat([gather_rows(targets), classes])
        similarities = anchors @ keys.T / self.temperature  # [A, K]
        itself = torch.eye(len(anchors), len(keys), dtype=torch.bool, device=keys.device)
        same = anchor_targets[:, None] == key_targets
        members = (key_targets[:, None] == classes).sum(dim=0)[key_targets] - same.long()  # |B_j| without the anchor
        terms = (similarities - members.to(keys.dtype).log()).masked_fill(itself, torch.finfo(keys.dtype).min)
        positives = same & ~itself  # the prototype at least
        mean_positive = torch.where(positives, similarities, 0).sum(dim=1) / positives.sum(dim=1)
        loss = terms.logsumexp(dim=1) - mean_positive
        weights = torch.ones_like(loss) if row_weights is None else row_weights[:num_anchors]
        return mean_over_processes((weights * loss).sum(), weights.sum())
