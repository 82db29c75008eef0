"""Which images an epoch sees, in which order, with which random draws: functions of (seed, epoch, step) alone."""

import torch
from scipy.special import betaincinv
from torch import Tensor

from data.transforms import DRAWS, POLICY_DRAWS, Mixing, cutmix_box

SAMPLERS = {"uniform": None, "balanced": 0.0, "sqrt": 0.5}  # a class is drawn with probability ~ n ** power


def epoch_order(targets: Tensor, sampler: str, seed: int, epoch: int, class_counts: Tensor | None = None) -> Tensor:
    """len(targets) indices: a permutation (``uniform``), or draws with replacement, class first, image second.

    ``class_counts`` decides the chance of a class where it is not that of ``targets``.
    """
    generator = torch.Generator().manual_seed(_mixed(seed, epoch, 0))
    power = SAMPLERS[sampler]
    if power is None:
        return torch.randperm(len(targets), generator=generator)
    members = targets.bincount().double()
    weights = members ** (power - 1)  # n^power for the class, 1/n for an image within it
    if class_counts is not None:
        weights = weights * (class_counts / members) ** power
    return torch.multinomial(weights[targets], len(targets), replacement=True, generator=generator)


def epoch_draws(num_draws: int, seed: int, epoch: int) -> Tensor:
    """Uniform numbers [num_draws, len(DRAWS)] in [0, 1): row i belongs to the i-th image that the epoch shows."""
    return torch.rand(num_draws, len(DRAWS), generator=torch.Generator().manual_seed(_mixed(seed, epoch, 1)))


def policy_draws(num_draws: int, seed: int, epoch: int) -> Tensor:
    """Uniform numbers [num_draws, len(POLICY_DRAWS)], apart from `epoch_draws`, which they leave as they are."""
    return torch.rand(num_draws, len(POLICY_DRAWS), generator=torch.Generator().manual_seed(_mixed(seed, epoch, 2)))


def epoch_mixings(
    num_batches: int, seed: int, epoch: int, mixup: float | None, cutmix: float | None, size: int
) -> list[Mixing]:
    """How each batch of ``epoch`` is mixed: its share is drawn from Beta(A, A) with A = ``mixup`` or ``cutmix``, and
    with both each batch is of either kind with probability 1/2."""
    draws = torch.rand(
        num_batches, 4, generator=torch.Generator().manual_seed(_mixed(seed, epoch, 3)), dtype=torch.float64
    )
    mixings = []
    for kind, quantile, *center in draws.tolist():
        blends = not cutmix or (mixup and kind < 0.5)
        share = float(betaincinv(mixup, mixup, quantile) if blends else betaincinv(cutmix, cutmix, quantile))
        mixings.append(Mixing(share) if blends else cutmix_box(share, size, center))
    return mixings


def step_seed(seed: int, epoch: int, number: int) -> int:
    """For what layers draw, as dropout does, in forward pass ``number`` of an epoch, counted over all processes."""
    return _mixed(seed, epoch, 4 + number)


def batch_bounds(num_images: int, batch_size: int, smallest: int = 2) -> list[tuple[int, int]]:
    """[start, stop) of each batch. A last one of fewer than ``smallest`` images joins the one before it, because batch
    normalisation of 1x1 maps refuses a single row."""
    starts = list(range(0, num_images, batch_size))
    if len(starts) > 1 and num_images - starts[-1] < smallest:
        starts.pop()
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def _mixed(seed: int, epoch: int, stream: int) -> int:
    """One seed from three numbers. Multiples of odd constants, so that neighbours are far apart, also in the low 32
    bits, all that a generator on the CPU takes."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) % 2**63
