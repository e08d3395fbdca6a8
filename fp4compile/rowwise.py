"""FP4 operands as FP8 with one scale per row, which a row-wise scaled FP8 GEMM reads: the bit-exact oracle.

    x [rows, K]  ->  values FP8 [rows, K], scale fp32 [rows], exponents uint8 [blocks, rows], flags uint8 [groups]
    x = values * scale    a block whose exponent lies in a window about that of its row's scale
    x = values * 2**k     any other block, k its exponent; the flag of its group of 16 rows is set

E2M1 * 2**k has two significant bits. Over the fifteen exponents k from -8 to 6 it is an E4M3 number: the largest is
6 * 2**6 = 384, the least, subnormal, 0.5 * 2**-8. Over the 29 from -15 to 13 it is an E5M2 number. So
(values_a @ values_b^T) * scale_a * scale_b is the exact GEMM of the FP4 operands at the rate of FP8, but for rows that
are flagged: those need the exponents of their blocks.

Gradients are E5M2: along the tokens of a language model they span more than E4M3 has above a sample of them. FP8 GEMMs
take one such operand, and no GEMM of a step reads two gradients.

A sample of each row places its window, so that nobody reads the tensor twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fp4compile import codec
from fp4compile.formats import E2M1, Format


@dataclass(frozen=True)
class Window:
    """Block exponents that a dtype of FP8 holds, and where they lie.

    Attributes:
        below, above: how many it holds on either side of the exponent of the row's scale.
        headroom: the scale's exponent against the one that the sample's maximum would have in a block.
    """

    below: int
    above: int
    headroom: int


WINDOWS: Mapping[torch.dtype, Window] = MappingProxyType(
    {
        torch.float8_e4m3fn: Window(8, 6, 1),  # 5 binades are left above the sample, 9 below it
        torch.float8_e5m2: Window(15, 13, 3),  # 10 and 18
    }
)
# Bound on the scale's exponent: scales are normal numbers, and an accumulator times one of them fits fp32.
MOST = 96
SAMPLES = 64
# Elements of a sample that lie side by side: a 32-byte sector of bf16 along the contiguous axis, one across it.
RUNS = (1, 16)
# Rows that share a sample where their own is all zero, and rows that share a flag.
GROUP, FLAGGED = 128, 16


def refusal(fmt: Format) -> str | None:
    """Why E4M3 with a scale per row does not hold values of the format; None where it does."""
    first, *others = fmt.levels
    if others or first.dtype != "e8m0" or fmt.element.magnitudes != E2M1.magnitudes:
        return f"format {fmt.name} is not E2M1 under one power-of-two scale"
    return f"FP8 GEMMs read rows of whole sixteens, not blocks of {fmt.block}" if fmt.block % 16 else None


def sampled(size: int, axis: int) -> list[int]:
    """Positions along an axis of the given size that are looked at: 64, in runs that lie evenly."""
    run = RUNS[axis]
    parts = 2 * (SAMPLES // run)
    starts = (part * size // parts // run * run for part in range(1, parts, 2))
    return [start + i for start in starts for i in range(run) if start + i < size]


def values_dtype(e5m2: bool) -> torch.dtype:
    """The dtype of values in rows."""
    return torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn


def windows(x: Tensor, fmt: Format, axis: int, dtype: torch.dtype) -> Tensor:
    """Exponents of the scales of the rows along `axis` of x [M, K] in `dtype`, int64 [rows].

    Values that are not finite are passed over. A sample of zeros takes the largest one of its group, 1 where the
    group has none.
    """
    lanes = x.detach().to(torch.float32).movedim(axis, -1)
    sample = lanes[:, sampled(lanes.shape[1], axis)].abs()
    most = torch.where(sample.isfinite(), sample, 0.0).amax(-1)
    groups = torch.nn.functional.pad(most, (0, -len(most) % GROUP)).unflatten(0, (-1, GROUP))
    of_group = groups.amax(-1, keepdim=True).expand_as(groups).flatten()[: len(most)]
    most = torch.where(most == 0, of_group, most)
    most = torch.where(most == 0, 1.0, most)
    exponent = torch.frexp(most).exponent.to(torch.int64) - 1
    block = exponent - math.floor(math.log2(fmt.element.max))
    return (block - WINDOWS[dtype].headroom).clamp(-MOST, MOST)


def _pow2(k: Tensor) -> Tensor:
    """2**k in fp32, exact also where it is subnormal."""
    return torch.exp2(k.to(torch.float64)).to(torch.float32)


def _inside(k: Tensor, window: Tensor, dtype: torch.dtype) -> Tensor:
    held = WINDOWS[dtype]
    return (k - window >= -held.below) & (k - window <= held.above)


def quantize(
    x: Tensor,
    transformed: Tensor,
    fmt: Format,
    axis: int,
    rounding: str,
    scale_rule: str,
    seed: Tensor | None,
    stream: int,
    dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K] quantised along `axis`, as FP8 in rows; the arguments are those of `codec.quantize`.

    Args:
        x: what windows are placed by.
        transformed: what is quantised: x or its Hadamard transform.
        dtype: of the values, a key of `WINDOWS`.

    Returns:
        values [rows, blocks * block], zero where the last block is filled up and NaN in blocks that are
        not finite; scale fp32 [rows]; exponents uint8 [blocks, rows]; flags uint8 [ceil(rows / 16)].
    """
    codes, stored = codec.quantize(transformed, fmt, axis, rounding, scale_rule, False, None, seed, stream, x.dtype)
    rows, blocks = stored.shape
    window = windows(x, fmt, axis, dtype)[:, None]
    k = stored.to(torch.int64) - 127
    inside, nan = _inside(k, window, dtype), stored == codec.SCALINGS["e8m0"].nan
    grid = codec.numbers(fmt.element.values, x.device)
    elements = grid[codec.unpack(codes).to(torch.int64)].unflatten(-1, (blocks, fmt.block))
    shifted = elements * _pow2(torch.where(inside, k - window, 0))[..., None]
    values = torch.where(nan[..., None], math.nan, shifted)
    # A block of zeros has the least exponent, and is in nobody's way.
    lanes = transformed.movedim(axis, -1)
    filled = torch.nn.functional.pad(lanes, (0, blocks * fmt.block - lanes.shape[1]))
    empty = (filled == 0).unflatten(-1, (blocks, fmt.block)).all(-1)
    outside = (~inside & ~nan & ~empty).any(-1)
    flags = torch.nn.functional.pad(outside, (0, -rows % FLAGGED)).unflatten(0, (-1, FLAGGED)).any(-1)
    return (
        values.flatten(1).to(dtype),
        _pow2(window).flatten(),
        stored.t().clone(memory_format=torch.contiguous_format),
        flags.to(torch.uint8),
    )


def dequantize(values: Tensor, scale: Tensor, exponents: Tensor) -> Tensor:
    """The FP4 values of rows in FP8, fp32 [rows, K]."""
    blocks = exponents.shape[0]
    k = exponents.t().to(torch.int64) - 127
    window = torch.frexp(scale).exponent.to(torch.int64)[:, None] - 1
    # A block of NaN has no exponent of its own, and needs none.
    k = torch.where(_inside(k, window, values.dtype) | (k > 127), window, k)
    scaled = values.to(torch.float32).unflatten(-1, (blocks, -1))
    return (scaled * _pow2(k)[..., None]).flatten(1)


def stacked(rows: Tensor, size: int, groups: int) -> Tensor:
    """The rows of a stack of matrices as the stack [groups, size, N]: a view.

    Args:
        rows: [groups N, size], rows of one matrix behind those of another; or [N, groups size], of which each matrix
            has its part of every row. One matrix is both.
    """
    if rows.shape[1] == size:
        return rows.unflatten(0, (groups, -1)).permute(0, 2, 1)
    return rows.unflatten(1, (groups, size)).permute(1, 2, 0)
