"""Encode, decode and fake-quantise any format: plain torch, fp32 arithmetic, the bit-exact oracle of every kernel.

A tensor becomes blocks `[..., blocks, n]` along the contraction axis (n = b*b for 2-D weight blocks, b by b tiles).
The row of `SCALINGS` named by the format's first scale level chooses the scales and gives t = |x| / scale, which is
rounded on the element's grid. Nothing here depends on a format's name, only on its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fp4compile import philox
from fp4compile.formats import E4M3_MAX, EDEN_GROUP, Element, Format

_E4M3_MIN_NORMAL = 2.0**-6
_E6M2_MIN, _E6M2_MAX = 2.0**-48, 1.5 * 2.0**15
_E6M2_NAN = 0xFF  # as a whole word: level-2 and level-3 bits zero
_E8M0_NAN = 0xFF
_E4M3_NAN = 0x7F
# The least tensor scale: with the least E4M3 scale, 2**-6, its reciprocal is the largest power of two in fp32.
TENSOR_SCALE_MIN = 2.0**-121
# Scale words of HiF4 are unsigned; torch holds them in int32.
_WORD_MASK = 0xFFFFFFFF
# The scale that rounds a normal distribution of variance 1 to E2M1 with the least squared error puts 6 here (QuEST,
# arXiv:2502.05003; the constant is that of the authors of Quartet, arXiv:2505.14669).
_GAUSSIAN_PEAK = 2.92247856


def _f32_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _bits(x: Tensor) -> Tensor:
    """The bit patterns of non-negative fp32 values as int64."""
    return x.contiguous().view(torch.int32).to(torch.int64)


def _pow2(k: Tensor) -> Tensor:
    """2**k exactly, for integer k in [-126, 127]."""
    return _f32_from_bits((k + 127) << 23)


def _scale_pow2(x: Tensor, k: Tensor) -> Tensor:
    """x * 2**k for integer k in [-252, 254], in two exact steps, so that no factor leaves fp32's normal range."""
    half = k >> 1
    return x * _pow2(half) * _pow2(k - half)


def _tree_sum(x: Tensor) -> Tensor:
    """The sum along the last axis, kept: halves added to each other, so that every backend rounds alike."""
    while x.shape[-1] > 1:
        x = torch.nn.functional.pad(x, (0, x.shape[-1] % 2))
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x


def _divisor(value: float, like: Tensor) -> Tensor:
    """A number to divide by: CUDA multiplies by the reciprocal of a Python number, which gives other bits."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


# --- scales ----------------------------------------------------------------------------------------------------------
# encode(magnitudes [..., n], format, rule, tensor_scale, largest) -> (t [..., n], stored scale [...])
# decode(stored scale [...], format) -> multiplier, broadcastable to [..., n]
# `largest` is the largest finite value of the dtype that the decoded values must fit.

Encode = Callable[[Tensor, Format, str, Tensor | None, float], tuple[Tensor, Tensor]]
Decode = Callable[[Tensor, Format], Tensor]
# round(scale [...], u [...], element, tensor_scale, largest) -> stored scale
Round = Callable[[Tensor, Tensor, Element, Tensor | None, float], Tensor]


@dataclass(frozen=True)
class Scaling:
    """How block scales of one dtype are found and read.

    Attributes:
        nan: what is stored for a block that is not finite.
        round: stochastic rounding of a scale, for the dtypes whose formats have rounding "eden".
    """

    encode: Encode
    decode: Decode
    nan: int
    round: Round | None = None


def e8m0_up_from(element: Element, rule: str) -> int:
    """The fraction of a block's maximum, as 23 bits, from which its E8M0 exponent moves up by one."""
    top = element.max
    emax = math.floor(math.log2(top))

    def fraction(m: float) -> int:
        return int((m / 2.0**emax - 1) * 2**23)

    return {
        "floor": 1 << 23,  # which no fraction reaches
        "floor-3/4": 1 << 23,
        "ceil": 1,
        "even": fraction((top + 2.0 ** (emax + 1)) / 2),  # halfway between the largest element and the next power of 2
        "rceil": fraction(top) + 1,
    }[rule]


def _encode_e8m0(
    mag: Tensor, fmt: Format, rule: str, tensor_scale: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    row, top = fmt.scaling(rule), fmt.element.max
    amax = mag.amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa * 2**exponent, mantissa in [0.5, 1)
    fraction, f = ((mantissa * 2.0 - 1.0) * 2.0**23).to(torch.int64), exponent.to(torch.int64) - 1
    if row.gaussian:
        k = f + _gaussian_exponent(_scale_pow2(mag, -f), top)
    else:
        k = f - math.floor(math.log2(top)) + (fraction >= e8m0_up_from(fmt.element, rule))
    # The largest element times its scale must be finite in the output dtype.
    k_max = math.floor(math.log2(largest * row.shrink / top))
    k = torch.where(amax == 0, -127, k.clamp(-127, min(k_max, 127)))
    return _scale_pow2(mag, -k) * row.shrink, (k + 127).squeeze(-1)


def _gaussian_exponent(mag: Tensor, top: float) -> Tensor:
    """floor(log2) of the least-error scale of normally distributed blocks with the root mean square of these."""
    rms = (_tree_sum(mag * mag) / _divisor(mag.shape[-1], mag)).sqrt()
    return torch.frexp(rms * (_GAUSSIAN_PEAK / top)).exponent.to(torch.int64) - 1


def _decode_e8m0(stored: Tensor, fmt: Format) -> Tensor:
    # 2**-127 is subnormal: halves multiply exactly, and only the product with the element is ever rounded.
    k = stored.to(torch.int64) - 127
    scale = _pow2(k.clamp(-126, 127)) * torch.where(k < -126, 0.5, 1.0)
    return torch.where(stored == _E8M0_NAN, math.nan, scale).unsqueeze(-1)


def _encode_e4m3(
    mag: Tensor, fmt: Format, rule: str, tensor_scale: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    row = fmt.scaling(rule)
    # A block's maximum that becomes the element's largest stays finite without a limit.
    limit = E4M3_MAX if row.peaks == (1.0,) else _e4m3_limit(mag, fmt.element, tensor_scale, largest)
    first, *others = (_e4m3(mag, fmt.element.max * peak, row.upward, tensor_scale, limit) for peak in row.peaks)
    for other in others:
        better = _squared_error(*other, fmt.element) < _squared_error(*first, fmt.element)
        first = (torch.where(better, other[0], first[0]), torch.where(better, other[1], first[1]))
    t, scale = first
    return t, _stored_e4m3(_bits(scale) >> 20).squeeze(-1)


def _e4m3_limit(like: Tensor, element: Element, tensor_scale: Tensor | None, largest: float) -> Tensor:
    """The largest E4M3 number that, times the largest element and the tensor scale, is finite in the output dtype."""
    limit = _divisor(largest * (1 - 2.0**-20) / element.max, like)
    limit = (limit if tensor_scale is None else limit / tensor_scale).clamp(_E4M3_MIN_NORMAL, E4M3_MAX)
    return _f32_from_bits(_bits(limit) >> 20 << 20)


def _e4m3(
    mag: Tensor, peak: float, upward: bool, tensor_scale: Tensor | None, limit: Tensor | float
) -> tuple[Tensor, Tensor]:
    """t and the E4M3 scale that brings the largest magnitude of each block to `peak`, in fp32."""
    scale = mag.amax(-1, keepdim=True) / _divisor(peak, mag)
    if tensor_scale is not None:
        scale = scale / tensor_scale
    # Always a normal E4M3 number: only the mantissa is rounded.
    scale = scale.clamp(max=limit).clamp(min=_E4M3_MIN_NORMAL)
    bits = _bits(scale)
    up = 0xFFFFF if upward else 0x7FFFF + ((bits >> 20) & 1)
    scale = _f32_from_bits((bits + up) >> 20 << 20)
    one = torch.ones((), device=mag.device) if tensor_scale is None else 1.0 / tensor_scale
    return mag * (one / scale), scale


def _squared_error(t: Tensor, scale: Tensor, element: Element) -> Tensor:
    """The sum of squared errors of each block when t is rounded to nearest, in units of the tensor scale."""
    error = (numbers(element.magnitudes, t.device)[round_nearest(t, element)] - t) * scale
    return _tree_sum(error * error)


def _stored_e4m3(top_bits: Tensor) -> Tensor:
    """The byte of a normal E4M3 number from the sign, exponent and three mantissa bits of its fp32 form."""
    return top_bits - ((127 - 7) << 3)


def _round_e4m3(scale: Tensor, u: Tensor, element: Element, tensor_scale: Tensor | None, largest: float) -> Tensor:
    limit = _e4m3_limit(scale, element, tensor_scale, largest)
    bits = _bits(scale.clamp(max=limit).clamp(min=_E4M3_MIN_NORMAL))
    return _stored_e4m3((bits >> 20) + (u < (bits & 0xFFFFF).to(torch.float32) * 2.0**-20))


def _decode_e4m3(stored: Tensor, fmt: Format) -> Tensor:
    return stored.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32).unsqueeze(-1)


def _per_element(levels: Tensor, n: int) -> Tensor:
    """Spread `[..., groups]` over the elements of each group: `[..., n]`."""
    return levels.repeat_interleave(n // levels.shape[-1], dim=-1)


def e6m2_max(largest: float) -> float:
    """The largest E6M2 number of which seven times is at most `largest`."""
    mantissa, exponent = math.frexp(min(_E6M2_MAX, largest / 7.0))
    return math.ldexp(math.floor(mantissa * 8) / 8, exponent)


def _encode_e6m2(
    mag: Tensor, fmt: Format, rule: str, tensor_scale: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    n = mag.shape[-1]
    v3, v2 = (mag.unflatten(-1, (n // level.size, level.size)).amax(-1) for level in (fmt.levels[2], fmt.levels[1]))
    v, s_max = mag.amax(-1, keepdim=True), e6m2_max(largest)
    if rule == "authors":
        # The authors' kernel works on bf16 scales: 1/7, the scale and its reciprocal are bf16, the products fp32.
        seventh = torch.full((), 1 / 7, dtype=torch.bfloat16, device=mag.device).to(torch.float32)
        s = (v * seventh).to(torch.bfloat16).to(torch.float32).clamp(_E6M2_MIN, s_max)
        bits = _bits(s)
        rounded = (bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21
        scale = _f32_from_bits(rounded << 21)
        reciprocal = (1.0 / scale).to(torch.bfloat16).to(torch.float32)
        t, t2, t3 = mag * reciprocal, v2 * reciprocal, v3 * reciprocal
        e2, half = t2 >= 4.0, 2.0
    else:
        s = (v / 7.0).clamp(_E6M2_MIN, s_max)
        rounded = (_bits(s) + 0x1FFFFF) >> 21
        scale = _f32_from_bits(rounded << 21)
        t, t2, t3 = (mag / scale).clamp(max=7.0), v2 / scale, v3 / scale
        e2, half = t2 > 3.5, 1.75
    e2_of_3 = _per_element(e2.to(torch.int64), v3.shape[-1])
    t3 = t3 * _pow2(-e2_of_3)
    e3 = t3 >= half if rule == "authors" else t3 > half
    t = t * _pow2(-_per_element(e2_of_3 + e3, n))
    word = rounded - ((127 - 48) << 2)
    for level, at in ((e2, 8), (e3, 8 + e2.shape[-1])):
        shifts = torch.arange(at, at + level.shape[-1], device=mag.device)
        word = word + (level.to(torch.int64) << shifts).sum(-1, keepdim=True)
    return t, word.squeeze(-1)


def _decode_e6m2(stored: Tensor, fmt: Format) -> Tensor:
    word = (stored.to(torch.int64) & _WORD_MASK).unsqueeze(-1)
    byte = word & 0xFF
    scale = _f32_from_bits((byte << 21) + ((127 - 48) << 23))
    scale = torch.where(byte == _E6M2_NAN, math.nan, scale)
    exponent, at, n = torch.zeros_like(word), 8, fmt.block
    for level in fmt.levels[1:]:
        groups = n // level.size
        bits = (word >> torch.arange(at, at + groups, device=word.device)) & 1
        exponent = exponent + _per_element(bits, n)
        at += groups
    return scale * _pow2(exponent)


SCALINGS = {
    "e8m0": Scaling(_encode_e8m0, _decode_e8m0, _E8M0_NAN),
    "e4m3": Scaling(_encode_e4m3, _decode_e4m3, _E4M3_NAN, _round_e4m3),
    "e6m2": Scaling(_encode_e6m2, _decode_e6m2, _E6M2_NAN),
}


# --- elements --------------------------------------------------------------------------------------------------------


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """fp32 [n], written on the device: a CUDA graph holds no copy from the host.

    Made in every call: what a call leaves behind may lie in the memory of such a graph, which others get after it.
    """
    return torch.stack([torch.full((), value, dtype=torch.float32, device=device) for value in values])


def round_nearest(t: Tensor, element: Element) -> Tensor:
    """Codes 0..7 (int64) of the grid value nearest to each t >= 0; beyond the grid the last one."""
    grid = element.magnitudes
    if element.tie == "away":
        # The published arithmetic on an evenly spaced grid; fp32 rounds the sum, so midpoints are not compared.
        return (t * (1.0 / grid[1]) + 0.5).floor().clamp(max=7.0).to(torch.int64)
    code = torch.zeros_like(t, dtype=torch.int64)
    for low, (a, b) in enumerate(pairwise(grid)):
        middle = (a + b) / 2
        code += t >= middle if low % 2 else t > middle  # at a midpoint the even code wins
    return code


def round_stochastic(t: Tensor, element: Element, u: Tensor) -> Tensor:
    """Codes 0..7 of one of the two grid neighbours of each t, the upper one where u < (t - lower) / gap."""
    grid = numbers(element.magnitudes, t.device)
    t = t.clamp(max=element.max).contiguous()
    lower = torch.bucketize(t, grid, right=True) - 1
    upper = (lower + 1).clamp(max=7)
    gap = (grid[upper] - grid[lower]).clamp(min=grid[1])
    return lower + (u < (t - grid[lower]) / gap)


def corrected_scales(t: Tensor, code: Tensor, scale: Tensor, element: Element) -> Tensor:
    """Block scales times S = <x, x> / <x, Q(x)> of their group: what makes nearest rounding of rotated x unbiased.

    EDEN (Vargaftik et al., arXiv:2108.08842) for blocks with scales of their own (MS-EDEN, arXiv:2601.22813).

    Args:
        t, code: scaled magnitudes and their codes [..., blocks, n].
        scale: block scales [..., blocks, 1].
    """
    blocks, n = t.shape[-2:]
    per_group = EDEN_GROUP // n
    exact, rounded = t * scale, numbers(element.magnitudes, t.device)[code] * scale

    def of_groups(products: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(products, (0, 0, 0, -blocks % per_group))
        return _tree_sum(padded.unflatten(-2, (-1, per_group)).flatten(-2))

    over, under = of_groups(exact * exact), of_groups(exact * rounded)
    correction = torch.where(under > 0, over / under, 1.0)
    return scale * correction.repeat_interleave(per_group, dim=-2)[..., :blocks, :]


# --- layout ----------------------------------------------------------------------------------------------------------


def _to_blocks(x: Tensor, block: int, block_2d: int | None) -> Tensor:
    """`[..., K]` -> `[..., blocks, block]`, or `[..., R, K]` -> `[..., R/b, K/b, b*b]`; zero-padded."""
    if block_2d is None:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % block))
        return x.unflatten(-1, (x.shape[-1] // block, block))
    b = block_2d
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % b, 0, -x.shape[-2] % b))
    tiles = x.unflatten(-1, (x.shape[-1] // b, b)).unflatten(-3, (x.shape[-2] // b, b))
    return tiles.movedim(-3, -2).flatten(-2)


def _from_blocks(blocks: Tensor, rows: int, block_2d: int | None) -> Tensor:
    """The inverse of `_to_blocks`, rows cut to their number, the blocked axis left padded."""
    if block_2d is None:
        return blocks.flatten(-2)
    tiles = blocks.unflatten(-1, (block_2d, block_2d)).movedim(-2, -3)
    return tiles.flatten(-2).flatten(-3, -2)[..., :rows, :]


def pack(codes: Tensor) -> Tensor:
    """4-bit codes `[..., K]` (K even) -> bytes `[..., K/2]`, even element in the low nibble."""
    pairs = codes.to(torch.uint8).unflatten(-1, (codes.shape[-1] // 2, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes `[..., K/2]` -> 4-bit codes `[..., K]`, uint8."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


# --- the four verbs --------------------------------------------------------------------------------------------------


def tensor_scale(x: Tensor, fmt: Format, scale_rule: str | None = None) -> Tensor:
    """The number that multiplies what codes and block scales say. 0-d fp32.

    A format with a scale per tensor: amax of the finite values / (the rule's largest block scale * its peak), 1 for an
    all-zero tensor. Values that are not finite poison their own block only, so they do not enter the maximum. The
    scale is at least 2**-121: the reciprocal of a smaller one times a block scale can be infinite. A rule that shrinks
    values: what undoes it.
    """
    row = fmt.scaling(scale_rule)
    if row.shrink != 1.0:
        return torch.full((), 1.0 / row.shrink, dtype=torch.float32, device=x.device)
    mag = x.detach().abs().to(torch.float32)
    mag = torch.where(mag.isfinite(), mag, 0.0)
    amax = mag.amax() if mag.numel() else mag.new_zeros(())
    scale = (amax / _divisor(row.most * fmt.element.max * row.peaks[0], mag)).clamp(min=TENSOR_SCALE_MIN)
    return torch.where(amax == 0, 1.0, scale)


def _scaled(
    x: Tensor,
    fmt: Format,
    axis: int,
    scale_rule: str,
    block_2d: bool,
    tensor_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of x along `axis`, t = |x| / scale, stored scales, and which blocks [..., 1] are not finite (t is 0)."""
    moved = x.detach().movedim(axis, -1)
    values = _to_blocks(moved.to(torch.float32), fmt.block, fmt.block_2d if block_2d else None)
    bad = ~values.isfinite().all(-1, keepdim=True)
    values = torch.where(bad, 0.0, values)
    scaling, largest = SCALINGS[fmt.levels[0].dtype], torch.finfo(dtype).max
    t, stored = scaling.encode(values.abs(), fmt, fmt.rule(scale_rule), tensor_scale, largest)
    return values, t, stored, bad


def _rows(x: Tensor, axis: int) -> int:
    """The length of the axis before the blocked one, once that is last."""
    return x.movedim(axis, -1).shape[-2] if x.dim() > 1 else 1


def quantize(
    x: Tensor,
    fmt: Format,
    axis: int,
    rounding: str,
    scale_rule: str,
    block_2d: bool,
    tensor_scale: Tensor | None,
    seed: Tensor | None,
    stream: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Codes and scales of `x` in blocks along `axis`, such that the decoded values are finite in `dtype`.

    `rounding` "eden" rounds to nearest, then corrects block scales and rounds those stochastically.

    Returns:
        Packed codes, uint8 `[..., K/2]` with the blocked axis last and padded to whole blocks; stored scales of dtype
        `fmt.scale_dtype`, `[..., blocks]`, or `[..., R/b, K/b]` for 2-D blocks.
    """
    edge = fmt.block_2d if block_2d else None
    scaling = SCALINGS[fmt.levels[0].dtype]
    values, t, stored, bad = _scaled(x, fmt, axis, scale_rule, block_2d, tensor_scale, dtype)

    def uniform() -> Tensor:
        assert seed is not None
        u = philox.uniform(tuple(x.shape), seed, stream, x.device).movedim(axis, -1)
        return _to_blocks(u, fmt.block, edge)

    code = round_stochastic(t, fmt.element, uniform()) if rounding == "stochastic" else round_nearest(t, fmt.element)
    if rounding == "eden":
        assert scaling.round is not None
        scales = corrected_scales(t, code, scaling.decode(stored, fmt), fmt.element)
        largest = torch.finfo(dtype).max
        stored = scaling.round(scales.squeeze(-1), uniform()[..., 0], fmt.element, tensor_scale, largest)
    code = code + 8 * values.signbit()
    codes = pack(_from_blocks(code, _rows(x, axis), edge))
    stored = torch.where(bad.squeeze(-1), scaling.nan, stored)
    return codes.contiguous(), stored.to(fmt.scale_dtype).contiguous()


def unclipped(
    x: Tensor,
    fmt: Format,
    axis: int,
    scale_rule: str,
    block_2d: bool,
    tensor_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Whether the grid reaches each element of x under its block's scale: bool of x's shape."""
    _, t, _, _ = _scaled(x, fmt, axis, scale_rule, block_2d, tensor_scale, dtype)
    inside = _from_blocks(t <= fmt.element.max, _rows(x, axis), fmt.block_2d if block_2d else None)
    return inside[..., : x.shape[axis]].movedim(-1, axis)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    fmt: Format,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The values of packed codes: (element * scale) * tensor_scale in fp32, rounded once to `dtype`.

    Args:
        codes, scales: as `quantize` returns them.
        axis: where the blocked axis stands in the result; `size` its logical length.
    """
    edge = fmt.block_2d if block_2d else None
    element = numbers(fmt.element.values, codes.device)
    values = _to_blocks(element[unpack(codes).to(torch.int64)], fmt.block, edge)
    values = values * SCALINGS[fmt.levels[0].dtype].decode(scales, fmt)
    if tensor_scale is not None:
        values = values * tensor_scale
    rows = codes.shape[-2] if codes.dim() > 1 else 1
    flat = _from_blocks(values, rows, edge)[..., :size].to(dtype).movedim(-1, axis)
    return flat.clone(memory_format=torch.contiguous_format)  # the strides of its shape, also of sizes 0 and 1


def fake_quantize(
    x: Tensor,
    fmt: Format,
    axis: int,
    rounding: str,
    scale_rule: str,
    block_2d: bool,
    tensor_scale: Tensor | None,
    seed: Tensor | None,
    stream: int,
    dtype: torch.dtype,
    fold: bool,
) -> Tensor:
    """dequantize(quantize(x)); `fold=False` leaves the tensor scale out of the result, for a GEMM to apply."""
    codes, scales = quantize(x, fmt, axis, rounding, scale_rule, block_2d, tensor_scale, seed, stream, dtype)
    applied = tensor_scale if fold else None
    return dequantize(codes, scales, applied, fmt, axis, x.shape[axis], block_2d, dtype)
