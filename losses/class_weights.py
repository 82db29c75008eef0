"""Class weights from the training counts; both kinds sum to the number of classes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def class_balanced_weights(class_counts: Sequence[int] | Tensor, beta: float) -> Tensor:
    """``(1 - beta) / (1 - beta ** n_j)``, one over the effective number, scaled to sum to C.

    Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", 2019, eq. 2. ``beta`` 0 gives ones;
    towards 1 the weights become `inverse_frequency_weights`. float32 [C]; a count below 1 is a `ValueError`.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}; it must be at least 0 and below 1")
    counts = _checked(class_counts)
    if beta == 0:
        return torch.ones(len(counts))
    return _sum_to_classes(-1 / torch.expm1(counts * math.log(beta)))  # 1 - beta^n cancels when beta is near 1


def inverse_frequency_weights(class_counts: Sequence[int] | Tensor) -> Tensor:
    """``1 / n_j``, scaled to sum to C. float32 [C]; a count below 1 is a `ValueError`."""
    return _sum_to_classes(1 / _checked(class_counts))


def _checked(class_counts: Sequence[int] | Tensor) -> Tensor:
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if (counts < 1).any():
        raise ValueError(f"class counts must be at least 1; class {int(counts.argmin())} has {counts.min():g}")
    return counts


def _sum_to_classes(weights: Tensor) -> Tensor:
    return (weights * len(weights) / weights.sum()).float()
