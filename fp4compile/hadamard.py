"""The random Hadamard transform (RHT) along one axis.

y = H diag(s) x / sqrt(n) on every run of n elements, s a vector of signs. The two operands of a GEMM transformed along
the contraction axis with the same signs give the same product, and outliers are spread over n elements before they
are rounded. Signs first, then fp32 butterflies with strides 1, 2, 4, ..., then one multiply by fp32(1/sqrt(n)): the
order is part of the definition, because every backend must give the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp4compile import philox
from fp4compile.errors import FP4ValueError

# The stream of the sign bits, apart from the streams of stochastic rounding, which count up from 0.
SIGN_STREAM = 0x51674E53


def check_size(size: int) -> None:
    """Raise unless `size` is a power of two of at least 2."""
    if size < 2 or size & (size - 1):
        raise FP4ValueError(f"Hadamard size must be a power of two of at least 2, got {size}")


def signs(size: int, seed: Tensor | None, device: torch.device) -> Tensor:
    """The sign vector, fp32 of shape [size], +1 or -1: the top bit of each Philox word (no seed: seed 0)."""
    if seed is None:
        seed = torch.zeros((), dtype=torch.int64, device=device)
    words = philox.philox_words(size, seed, SIGN_STREAM, device)
    return 1.0 - 2.0 * (words >> 31).to(torch.float32)


def hadamard(x: Tensor, axis: int, size: int, seed: Tensor | None = None) -> Tensor:
    """Transform `x` along `axis` in runs of `size`; a last, shorter run is padded with zeros.

    Args:
        x: floating-point tensor of any shape.
        axis: the contraction axis.
        size: a power of two.
        seed: 0-d int64 tensor that chooses the signs; None for the fixed sign vector.

    Returns:
        fp32 tensor of x's shape, `axis` rounded up to a multiple of `size`.
    """
    t = _runs(x, axis, size) * signs(size, seed, x.device)
    return _butterflies(t).flatten(-2).movedim(-1, axis).contiguous()


def inverse_hadamard(x: Tensor, axis: int, size: int, seed: Tensor | None = None) -> Tensor:
    """Undo `hadamard` with the same arguments: H is its own inverse, and the signs come last."""
    t = _butterflies(_runs(x, axis, size)) * signs(size, seed, x.device)
    return t.flatten(-2).movedim(-1, axis).contiguous()


def _runs(x: Tensor, axis: int, size: int) -> Tensor:
    """`[..., K, ...]` -> fp32 `[..., runs, size]`, the axis last and padded with zeros."""
    check_size(size)
    t = x.movedim(axis, -1).to(torch.float32)
    t = torch.nn.functional.pad(t, (0, -t.shape[-1] % size))
    return t.unflatten(-1, (t.shape[-1] // size, size))


def _butterflies(t: Tensor) -> Tensor:
    """H along the last axis, divided by the square root of its size."""
    size, stride = t.shape[-1], 1
    while stride < size:
        pairs = t.unflatten(-1, (size // (2 * stride), 2, stride))
        a, b = pairs.unbind(-2)
        t = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        stride *= 2
    return t * torch.full((), 1.0 / math.sqrt(size), dtype=torch.float32, device=t.device)
