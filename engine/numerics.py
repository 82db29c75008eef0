"""Floating-point care: backbones may use half precision, heads and losses never do; a zero has no direction."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def in_float32(forward: Callable) -> Callable:
    """Wrap ``forward(self, x, ...)`` to leave autocast and to lift a half-precision ``x`` to float32.

    bfloat16 cosines are 0.004 apart just below 1, so a margin or a logsumexp computed in them is blurred. A float64
    ``x`` stays float64.
    """

    @functools.wraps(forward)
    def wrapped(self, x: Tensor, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return forward(self, x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, *args, **kwargs)

    return wrapped


def inverse_norm(rows: Tensor) -> Tensor:
    """``1 / |row|`` over dimension 1, which is kept; 0 with gradient 0 for a zero row, which has no direction."""
    return _InverseNorm.apply(rows)


class _InverseNorm(torch.autograd.Function):
    """`inverse_norm`, whose gradient ``-row / |row|^3`` takes one product; PyTorch's norm goes over the rows thrice."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        inverse = safe_reciprocal(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
        ctx.save_for_backward(rows, inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        rows, inverse = ctx.saved_tensors
        return rows * (-gradient * inverse**3)


def safe_reciprocal(norms: Tensor) -> Tensor:
    """``1 / norm``, and 0 with gradient 0 for a norm that is nothing but rounding."""
    return torch.where(norms > 1e-12, norms, math.inf).reciprocal()
