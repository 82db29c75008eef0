from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engine.distributed import mean_over_processes
from engine.numerics import inverse_norm
from engine.transfer import SentToCpu, to_device


class RareSampleGenerator(nn.Module):
    """Adds feature maps of tail classes to a training batch: a tail row plus the transformed variation of a head row.

    Wang et al., "RSG: A Simple but Effective Module for Learning Imbalanced Datasets", 2021, section 3. Each class has
    ``num_centers`` centres; a head row's variation is its difference from the one it is assigned to most. The
    ``head_tail_ratio`` largest classes are head classes. `generating` is False while the centres are learnt and set to
    True, once an epoch, from the epoch on in which rows are generated. Its own losses never train the stages before it.

    The contrastive module's last layer begins like any `torch.nn.Linear`. With weights from N(0, 1) its first losses
    are in the thousands at the usual learning rate and throw its weights far off.
    """

    def __init__(
        self,
        channels: int,
        class_counts: Sequence[int] | Tensor,
        head_tail_ratio: float = 0.2,
        num_centers: int = 15,
        contrast_dim: int = 256,
        strength: float = 1.0,
    ):
        super().__init__()
        num_classes = len(class_counts)
        self.register_buffer("is_head", head_classes(class_counts, head_tail_ratio), persistent=False)
        self.centers = nn.Parameter(torch.zeros(num_classes, num_centers, channels))
        self.assignment_weight = nn.Parameter(torch.randn(num_classes, channels, num_centers))
        self.assignment_bias = nn.Parameter(torch.ones(num_classes, num_centers))
        self.transform = nn.Conv2d(channels, channels, 3, padding=1)
        self.contrast = nn.Sequential(
            nn.Conv2d(2 * channels, contrast_dim, 1),
            nn.ReLU(),
            MeanOfConv2d(contrast_dim, contrast_dim),
            nn.Linear(contrast_dim, 2),
        )
        for layer in (self.transform, self.contrast[0], self.contrast[2]):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.strength = strength
        self.generating = False
        self.pair_shift = 0  # rows by which the second half is moved before pairing, see contrast_loss
        self.center_distance = torch.tensor(float("nan"))  # mean |F - mu| / |F| of the last batch
        self.tail_rows = torch.empty(0, dtype=torch.long)  # which row of the last batch each generated one stems from

    def forward(
        self, maps: Tensor, targets: Tensor, is_head: SentToCpu | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Maps [B, C, H, W] and targets [B] to those with generated rows appended, and the losses by name.

        "centre" and "contrast" make CESC; "contrast" is 0 while generating and "mv" is 0 before. ``is_head``
        is what `send_kinds` gave for the targets; sent before the maps are computed, it is there when they are.
        """
        fixed = maps.detach()
        center_loss, nearest_centers = self.estimate_centers(fixed, targets)
        off = center_loss.new_zeros(())
        if not self.generating:
            return maps, targets, {"centre": center_loss, "contrast": self.contrast_loss(fixed, targets), "mv": off}
        is_head = (is_head or self.send_kinds(targets)).arrived()
        pairs = sample_pairs(is_head.nonzero().flatten(), (~is_head).nonzero().flatten(), self.strength)
        heads, tails = (to_device(rows, maps.device) for rows in pairs)
        head_maps, tail_maps = fixed[heads], fixed[tails]
        centers = nearest_centers[:, :, None, None].to(fixed.dtype)
        variations = head_maps - centers[heads]
        transformed = self.transform(variations)
        mv_loss = self.maximized_vector_loss(head_maps, variations, tail_maps - centers[tails], transformed)
        self.tail_rows = tails
        maps = torch.cat([maps, (tail_maps + transformed).to(maps.dtype)])
        targets = torch.cat([targets, targets[tails]])
        return maps, targets, {"centre": center_loss, "contrast": off, "mv": mv_loss}

    def send_kinds(self, targets: Tensor) -> SentToCpu | None:
        """Where rows are generated: which are of head classes. The CPU must know, because it asks for the memory."""
        return SentToCpu(self.is_head[targets]) if self.generating else None

    def idle_module(self) -> nn.Module:
        """What gets no gradient in this phase."""
        return self.contrast if self.generating else self.transform

    def estimate_centers(self, maps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The centre loss (eq. 2), and each row's nearest centre [B, C], detached.

        ``sum_hw |F - mu|^2 = sum_hw |F - m|^2 + HW |m - mu|^2`` with m the mean over positions: no tensor with centres
        and positions is built, and nothing cancels when the centres are close.
        """
        with torch.autocast(maps.device.type, enabled=False):
            positions = maps.shape[2] * maps.shape[3]
            variance, means = torch.var_mean(maps.float(), dim=(2, 3), correction=0)  # [B, C]
            # index_select: its backward is deterministic on a CPU with several threads, that of centers[targets] is not
            centers = self.centers.index_select(0, targets)  # [B, K, C]
            scores = means[:, None] @ self.assignment_weight.index_select(0, targets)  # [B, 1, K]
            assignments = (scores.squeeze(1) + self.assignment_bias.index_select(0, targets)).softmax(dim=1)
            distances = (means[:, None] - centers).square().sum(dim=2)  # [B, K]
            spread = positions * variance.sum(dim=1)
            losses = spread + positions * (assignments * distances).sum(dim=1)
            loss = mean_over_processes(losses.sum(), len(losses))
            with torch.no_grad():
                nearest = assignments.argmax(dim=1, keepdim=True)
                norms = spread + positions * means.square().sum(dim=1)
                from_center = spread + positions * distances.gather(1, nearest).squeeze(1)
                self.center_distance = (from_center / norms.clamp_min(1e-12)).sqrt().mean()
                nearest_centers = centers.gather(1, nearest[:, :, None].expand(-1, -1, maps.shape[1])).squeeze(1)
        return loss, nearest_centers

    def contrast_loss(self, maps: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of "same class?" for row i of the first half of the batch and row i of the second (eq. 3).

        With two views of every image `pair_shift` moves the second half, or each pair would be the same image twice.
        """
        half = len(maps) // 2  # an odd row is left out
        first, second = maps[:half], maps[half : 2 * half].roll(self.pair_shift, dims=0)
        answers = self.contrast(torch.cat([first, second], dim=1)).float()
        same = targets[:half] == targets[half : 2 * half].roll(self.pair_shift)
        return mean_over_processes(F.cross_entropy(answers, same.long(), reduction="sum"), half)

    def maximized_vector_loss(
        self, head_maps: Tensor, variations: Tensor, tail_variations: Tensor, transformed: Tensor
    ):
        """L_MV (eq. 5): the transformed variation is as long as the head's, points where the tail's does, and is not
        taken for the head's class. Norms and cosines are over channels; positions are summed, pairs averaged."""
        frozen = {name: parameter.detach() for name, parameter in self.contrast.named_parameters()}
        answers = functional_call(self.contrast, frozen, torch.cat([head_maps, transformed], dim=1)).float()
        loss = F.cross_entropy(answers, torch.zeros_like(answers[:, 0], dtype=torch.long), reduction="sum")
        with torch.autocast(transformed.device.type, enabled=False):
            transformed = transformed.float()
            lengths = torch.linalg.vector_norm(transformed, dim=1) - torch.linalg.vector_norm(variations.float(), dim=1)
            cosines = (tail_variations.float() * transformed).sum(dim=1, keepdim=True)
            cosines = cosines * inverse_norm(tail_variations.float()) * inverse_norm(transformed)
            total = loss + lengths.abs().sum() + (cosines - 1).abs().sum()
            return mean_over_processes(total, len(transformed))


class MeanOfConv2d(nn.Conv2d):
    """The mean over positions of what a 3 x 3 convolution with padding 1 gives: maps [N, C, H, W] to [N, D].

    Both are linear, so a tap is applied once, to the mean of what it sees, instead of at every position: C D
    multiplications for an image and tap instead of C D H W.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        height, width = maps.shape[2:]
        like = self.weight  # its dtype and device
        seen = torch.kron(seen_by_tap(height, like), seen_by_tap(width, like)) / (height * width)  # [H W, 9]
        with torch.autocast(maps.device.type, enabled=False):  # in float16 the sums could be infinite
            means = maps.flatten(2).to(seen.dtype) @ seen  # [N, C, 9]
        return F.linear(means.flatten(1), self.weight.flatten(1), self.bias)


def seen_by_tap(size: int, like: Tensor) -> Tensor:
    """[size, 3] of 0 and 1: over a line with padding 1, the first tap never sees the last entry, nor the last tap the
    first."""
    seen = like.new_ones(size, 3)
    seen[-1, 0] = seen[0, 2] = 0
    return seen


def head_classes(class_counts: Sequence[int] | Tensor, head_tail_ratio: float) -> Tensor:
    """Bool [C]: the ``head_tail_ratio`` share of classes with most images (at least 1, at most C - 1; ties: lower
    index)."""
    counts = torch.as_tensor(class_counts)
    number = min(max(1, int(head_tail_ratio * len(counts) + 1e-9)), len(counts) - 1)
    largest = counts.sort(descending=True, stable=True).indices[:number]
    return torch.zeros(len(counts), dtype=torch.bool).index_fill(0, largest, True)


def sample_pairs(heads: Tensor, tails: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Rows to pair: the larger kind of rows is gone through in blocks as long as the smaller kind, each block with all
    rows of the smaller; as many blocks as fit, times ``strength``, at least one. Rows wrap around. No pairs when the
    batch lacks one kind."""
    if not len(heads) or not len(tails):
        return heads[:0], tails[:0]
    fewer, more = (tails, heads) if len(heads) >= len(tails) else (heads, tails)
    blocks = max(1, int(strength * len(more) / len(fewer) + 1e-9))
    fewer_rows = fewer.repeat(blocks)
    more_rows = more[torch.arange(len(fewer_rows), device=more.device) % len(more)]
    return (more_rows, fewer_rows) if fewer is tails else (fewer_rows, more_rows)
