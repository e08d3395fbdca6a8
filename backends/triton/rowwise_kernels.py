# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Triton kernels of E2M1 operands as FP8 in rows, bit for bit the arithmetic of `fp4compile.rowwise`.

    window      x  ->  the scale of every row, from a sample of it; the flags are cleared
    quantize    x  ->  FP8 in rows along one axis or both, from one read of each tile; exponents of blocks; flags
    exact       operands, out  ->  out, rows and columns of flagged rows computed again from exponents, in TF32

A thread holds whole blocks, or halves of them: maxima, transforms and rounding stay in its registers, and a block's
scale is computed once or twice. Rounding happens in units of the row's scale, whose result is the FP8 number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp4compile.backends.triton.arithmetic import (
    INF,
    INTERPRETED,
    SIGN,
    e8m0_exponent,
    from_bits,
    hadamard,
    in_turn,
    maximum,
    nearest_multiple,
    next_multiple,
    philox,
    pow2,
    to_bits,
)
from fp4compile.rowwise import FLAGGED, GROUP, MOST, SAMPLES, WINDOWS

_ABOVE, _BELOW = (tl.constexpr(getattr(WINDOWS[torch.float8_e4m3fn], side)) for side in ("above", "below"))
_ABOVE_E5M2, _BELOW_E5M2 = (tl.constexpr(getattr(WINDOWS[torch.float8_e5m2], side)) for side in ("above", "below"))
_MOST = tl.constexpr(MOST)
_GROUP, _FLAGGED, _SAMPLES = tl.constexpr(GROUP), tl.constexpr(FLAGGED), tl.constexpr(SAMPLES)


@triton.jit
def _read(x_ptr, p1, p2, p3, p4, index, row, column, rows, columns, EVEN: tl.constexpr, PRODUCE: tl.constexpr):
    """Elements of x [rows, columns], or of what PRODUCE makes of it and the operands, in fp32; zeros past the edges."""
    if PRODUCE is None:
        x = tl.load(x_ptr + index) if EVEN else tl.load(x_ptr + index, (row < rows) & (column < columns), 0.0)
        return x.to(tl.float32)
    else:
        (x,) = PRODUCE(x_ptr, p1, p2, p3, p4, index, row, column, row < rows, column < columns, EVEN)
        return x


# --- bf16 two by two -------------------------------------------------------------------------------------------------

# Logic, minima and maxima issue at half the rate of products: quantising both axes in fp32 takes 19 of them per
# element, as long as the bytes. Of bf16 one instruction does two elements, and the result is that of fp32: a magnitude
# times a power of two is exact, and the sum with 96 e, e the power of two below it, is rounded once, to e / 2, ties to
# even. 2**-112 moves bf16's exponents to fp16's, which is converted two by two.
_ROUND_PAIR = tl.constexpr("""
{
    .reg .b32 t, e, s, m;
    abs.bf16x2 t, $1;
    mul.rn.bf16x2 t, t, $2;
    min.bf16x2 t, t, $4;
    max.bf16x2 e, t, $3;
    and.b32 e, e, 0x7F807F80;
    mov.b32 m, 0x42C042C0;
    fma.rn.bf16x2 s, e, m, t;
    mov.b32 m, 0xC2C0C2C0;
    fma.rn.bf16x2 s, e, m, s;
    mov.b32 m, 0x07800780;
    mul.rn.bf16x2 s, s, m;
    shl.b32 s, s, 3;
    lop3.b32 $0, s, $1, 0x80008000, 0xF8;
}
""")


@triton.jit
def _larger_pair(a, b):
    return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)


@triton.jit
def _magnitudes(x):
    """bf16 [..., 2 n] -> magnitudes two to a word, [..., n]."""
    halves: tl.constexpr = x.shape[:-1] + [x.shape[-1] // 2, 2]  # noqa: RUF005, Triton unpacks no list
    low, high = tl.split(x.to(tl.int16, bitcast=True).reshape(halves))
    return ((low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)) & 0x7FFF7FFF


@triton.jit
def _round_pairs(x, inverse, one):
    """`_round` of bf16, to nearest; the result in fp16."""
    inverse, six, one = inverse.to(tl.bfloat16), (6.0 * one).to(tl.bfloat16), one.to(tl.bfloat16)
    x, inverse = tl.broadcast(x, inverse)
    _, one = tl.broadcast(x, one)
    _, six = tl.broadcast(x, six)
    return tl.inline_asm_elementwise(
        _ROUND_PAIR, "=r,r,r,r,r", [x, inverse, one, six], tl.float16, is_pure=True, pack=2
    )


# --- where windows lie -----------------------------------------------------------------------------------------------


@triton.jit
def _inside(shift, values_ptr):
    """Whether values behind the pointer hold blocks whose exponents are `shift` above that of their row's scale."""
    if values_ptr.dtype.element_ty == tl.float8e5:
        return (shift >= -_BELOW_E5M2) & (shift <= _ABOVE_E5M2)
    else:
        return (shift >= -_BELOW) & (shift <= _ABOVE)


@triton.jit
def _sampled(size, RUN: tl.constexpr):
    """`rowwise.sampled`: 64 positions along an axis of `size`."""
    at = tl.arange(0, _SAMPLES)
    PARTS: tl.constexpr = 2 * (_SAMPLES // RUN)
    part = (2 * (at // RUN) + 1).to(tl.int64)
    return part * size // PARTS // RUN * RUN + at % RUN


@triton.jit
def _place_window(x, scale_ptr, flags_ptr, lane, lanes, EMAX: tl.constexpr, HEADROOM: tl.constexpr, AXIS: tl.constexpr):
    """Scales of a group of rows from samples x, [GROUP, SAMPLES] or in columns [SAMPLES, GROUP]; its flag cleared."""
    bits = to_bits(x.to(tl.float32)) & 0x7FFFFFFF
    most = tl.max(tl.where(bits < INF, bits, 0), axis=AXIS)
    most = tl.where(most == 0, tl.max(most, axis=0), most)
    most = tl.where(most == 0, 0x3F800000, most)
    # The exponent of a subnormal number is far below the least that is left here.
    window = (most >> 23) - (127 + EMAX + HEADROOM)
    window = tl.minimum(tl.maximum(window, -_MOST), _MOST)
    at = lane + tl.arange(0, _GROUP)
    tl.store(scale_ptr + at, pow2(window), at < lanes)
    flag = lane // _FLAGGED + tl.arange(0, _GROUP // _FLAGGED)
    tl.store(flags_ptr + flag, tl.zeros([_GROUP // _FLAGGED], tl.uint8), flag * _FLAGGED < lanes)


@triton.jit
def window(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    scale0_ptr,
    flags0_ptr,
    scale1_ptr,
    flags1_ptr,
    rows,
    columns,
    groups0,
    EMAX: tl.constexpr,
    HEADROOM: tl.constexpr,
    RUN0: tl.constexpr,
    RUN1: tl.constexpr,
    PRODUCE: tl.constexpr,
):
    """Programs [0, groups0) take groups of columns of x [rows, columns], the others groups of its rows."""
    pid = tl.program_id(0)
    # Whether an axis is wanted is known when this is compiled, the other condition is not: two statements.
    if scale0_ptr is not None:  # noqa: SIM102
        if pid < groups0:
            first = pid * _GROUP
            looked, lane = _sampled(rows, RUN0)[:, None], first + tl.arange(0, _GROUP)[None, :]
            index = looked * columns + lane
            x = _read(x_ptr, p1, p2, p3, p4, index, looked, lane, rows, columns, False, PRODUCE)
            _place_window(x, scale0_ptr, flags0_ptr, first, columns, EMAX, HEADROOM, 0)
    if scale1_ptr is not None:  # noqa: SIM102
        if pid >= groups0:
            start = (pid - groups0) * _GROUP
            row, at = start + tl.arange(0, _GROUP)[:, None], _sampled(columns, RUN1)[None, :]
            index = row.to(tl.int64) * columns + at
            y = _read(x_ptr, p1, p2, p3, p4, index, row, at, rows, columns, False, PRODUCE)
            _place_window(y, scale1_ptr, flags1_ptr, start, rows, EMAX, HEADROOM, 1)


# --- quantisation ----------------------------------------------------------------------------------------------------


@triton.jit
def _positions(
    lane, k, L: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr
):
    """(lane, k) of every VECTOR-th element of a tile: [L // V, NB, BLOCK, 1], in rows [L * NB, BLOCK // V, 1].

    Vectors run along memory. Triton hands the last dimension to a thread, then the first ones to other threads: what
    is in between, the rest of a block, is left to the thread's registers.
    """
    NB: tl.constexpr = K // BLOCK
    if COLUMNS:
        lane += VECTOR * tl.arange(0, L // VECTOR)[:, None, None, None]
        k += BLOCK * tl.arange(0, NB)[None, :, None, None] + tl.arange(0, BLOCK)[None, None, :, None]
    else:
        at = tl.arange(0, L * NB)[:, None, None]
        lane += at // NB
        k += BLOCK * (at % NB) + VECTOR * tl.arange(0, BLOCK // VECTOR)[None, :, None]
    return lane, k


@triton.jit
def _in_vectors(lane, k, VECTOR: tl.constexpr, COLUMNS: tl.constexpr):
    """`_positions` of all elements of the vectors."""
    if COLUMNS:
        lane += tl.arange(0, VECTOR)[None, None, None, :]
    else:
        k += tl.arange(0, VECTOR)[None, None, :]
    return lane, k


@triton.jit
def _to_blocks(x, L: tl.constexpr, NB: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as it is loaded -> [L, NB, BLOCK]."""
    if COLUMNS:
        x = tl.permute(x, (0, 3, 1, 2))
    return x.reshape([L, NB, BLOCK])


@triton.jit
def _of_blocks(x, VECTOR: tl.constexpr, COLUMNS: tl.constexpr):
    """Numbers of blocks [L, NB] against a tile as it is loaded."""
    L: tl.constexpr = x.shape[0]
    NB: tl.constexpr = x.shape[1]
    if COLUMNS:
        return tl.permute(x.reshape([L // VECTOR, VECTOR, NB]), (0, 2, 1))[:, :, None, :]
    else:
        return x.reshape([L * NB])[:, None, None]


@triton.jit
def _amax_of_pairs(x, L: tl.constexpr, NB: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits, as fp32, of the largest magnitudes of blocks [L, NB] of a bf16 tile as it is loaded."""
    if COLUMNS:
        pair = tl.reduce(_magnitudes(x), 2, _larger_pair)  # [L // V, NB, V // 2]
        bits = tl.permute(tl.join(pair << 16, pair & -0x10000), (0, 2, 3, 1))
    else:
        pair = tl.reduce(tl.reduce(_magnitudes(x), 2, _larger_pair), 1, _larger_pair)
        bits = tl.maximum(pair << 16, pair & -0x10000)
    return bits.reshape([L, NB])


@triton.jit
def _offset(lane, k, row_stride, COLUMNS: tl.constexpr):
    """Of element k of a lane, in a contiguous matrix."""
    return k * row_stride + lane if COLUMNS else lane * row_stride + k


@triton.jit
def _random(
    lane,
    k,
    row_stride,
    seed_ptr,
    counter_stream,
    L: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """2**24 u for u in [0, 1) and a tile, [L, NB, BLOCK]. ALIGNED: four elements in a row share a counter."""
    if ALIGNED:
        lane, k = _positions(lane, k, L, K, BLOCK, 4, COLUMNS)
    else:
        lane, k = _positions(lane, k, L, K, BLOCK, VECTOR, COLUMNS)
        lane, k = _in_vectors(lane, k, VECTOR, COLUMNS)
    index = _offset(lane, k, row_stride, COLUMNS)
    w0, w1, w2, w3 = philox(index >> 2, tl.load(seed_ptr), counter_stream, WIDE)
    if ALIGNED:
        words = in_turn(w0, w1, w2, w3)
        words = words.reshape([L // 4, K // BLOCK, BLOCK, 4]) if COLUMNS else words.reshape([L, K // BLOCK, BLOCK])
    else:
        words = tl.where(index & 2 == 0, tl.where(index & 1 == 0, w0, w1), tl.where(index & 1 == 0, w2, w3))
    return _to_blocks((words >> 8).to(tl.int32).to(tl.float32), L, K // BLOCK, BLOCK, COLUMNS)


@triton.jit
def _transform(
    x,
    k,
    padded,
    L: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
    SIGNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`arithmetic.hadamard` of a tile [L, K] where a thread holds whole runs and all signs, the bits of a word, are
    known: nothing is left of it but one sum or difference per element and step."""
    sign = (((SIGNS >> tl.arange(0, SIZE)) & 1) << 31)[None, None, :]
    y = from_bits(to_bits(x).reshape([L, K // SIZE, SIZE]) ^ sign)
    for step in tl.static_range(LOG2):
        pairs = tl.permute(y.reshape([L, K >> (step + 1), 2, 1 << step]), (0, 1, 3, 2))
        a, b = tl.split(pairs)
        y = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
    y = y.reshape([L, K]) * FACTOR
    if not EVEN:
        # Past the last run there are sums of signed zeros; a block is filled up with positive ones.
        y = tl.where(k + tl.arange(0, K)[None, :] < padded, y, 0.0)
    return y


@triton.jit
def _round(x, random, inverse, one, STOCHASTIC: tl.constexpr):
    """|x| * inverse on the grid of E2M1 times `one`, a power of two, with the sign of x; `random` is 2**24 u."""
    t = tl.minimum(tl.abs(x) * inverse, 6.0 * one)
    power = from_bits(to_bits(tl.maximum(t, one)) & INF)
    q = next_multiple(t, random, power) if STOCHASTIC else nearest_multiple(t, power)
    return from_bits(to_bits(q) | (to_bits(x) & SIGN))


@triton.jit
def _quantize_axis(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    values_ptr,
    scale_ptr,
    exponents_ptr,
    flags_ptr,
    seed_ptr,
    sign_seed_ptr,
    lane0,
    k0,
    lanes,
    size,
    padded,
    length,
    counter_stream,
    sign_stream,
    up_from,
    k_max,
    L: tl.constexpr,
    K: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMAX: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
    SIGNS: tl.constexpr,
    PRODUCE: tl.constexpr,
    BF16: tl.constexpr,
):
    """A tile of L lanes of x in blocks along them, K elements each, of lanes of `size`, `padded` by the transform and
    stored as rows of `length`."""
    NB: tl.constexpr = K // BLOCK
    PAIRS: tl.constexpr = BF16 and not (STOCHASTIC or HADAMARD or INTERPRETED)  # which has no assembly
    lane, k = _positions(lane0, k0, L, K, BLOCK, VECTOR, COLUMNS)
    lane, k = _in_vectors(lane, k, VECTOR, COLUMNS)
    index = _offset(lane, k, lanes if COLUMNS else size, COLUMNS)
    if COLUMNS:
        x = _read(x_ptr, p1, p2, p3, p4, index, k, lane, size, lanes, EVEN, PRODUCE)
    else:
        x = _read(x_ptr, p1, p2, p3, p4, index, lane, k, lanes, size, EVEN, PRODUCE)
    loaded = x.to(tl.bfloat16)
    x = _to_blocks(x, L, NB, BLOCK, COLUMNS)
    if HADAMARD:
        x = x.reshape([L, K])
        if SIGNS is None:
            x = hadamard(x, k0, padded, sign_seed_ptr, sign_stream, L, K, HADAMARD, LOG2, FACTOR, EVEN)
        else:
            x = _transform(x, k0, padded, L, K, HADAMARD, LOG2, FACTOR, SIGNS, EVEN)
        x = x.reshape([L, NB, BLOCK])
    amax = _amax_of_pairs(loaded, L, NB, COLUMNS) if PAIRS else to_bits(maximum(tl.abs(x), 2))
    bad = amax >= INF
    exponent = e8m0_exponent(amax, up_from, k_max, EMAX)
    lane = lane0 + tl.arange(0, L)
    window = (to_bits(tl.load(scale_ptr + lane, lane < lanes, 1.0)) >> 23)[:, None] - 127
    shift = exponent - window
    inside = _inside(shift, values_ptr)
    inverse = pow2(tl.where(inside, -window, -exponent))
    one = pow2(tl.where(inside, shift, 0))
    # A NaN takes the same way as every number.
    inverse, one = tl.where(bad, float("nan"), inverse), tl.where(bad, float("nan"), one)
    if PAIRS:
        inverse, one = _of_blocks(inverse, VECTOR, COLUMNS), _of_blocks(one, VECTOR, COLUMNS)
        q = _to_blocks(_round_pairs(loaded, inverse, one), L, NB, BLOCK, COLUMNS)
    else:
        u = x
        if STOCHASTIC:
            stride = lanes if COLUMNS else padded
            u = _random(
                lane0, k0, stride, seed_ptr, counter_stream, L, K, BLOCK, VECTOR, COLUMNS, ALIGNED, WIDE
            )  # fmt: skip
        q = _round(x, u, inverse[:, :, None], one[:, :, None], STOCHASTIC)

    row, column = lane[:, None], k0 + tl.arange(0, K)[None, :]
    stored = q.reshape([L, K]).to(values_ptr.dtype.element_ty)
    if WIDE:
        row = row.to(tl.int64)
    if EVEN:
        tl.store(values_ptr + row * length + column, stored)
    else:
        tl.store(values_ptr + row * length + column, stored, (row < lanes) & (column < length))
    block = k0 // BLOCK + tl.arange(0, NB)[None, :]
    there = (row < lanes) & (block < length // BLOCK)
    byte = tl.where(bad, 255, exponent + 127).to(tl.uint8)
    tl.store(exponents_ptr + block * lanes + row, byte, there)
    outside = tl.where(inside | bad | (amax == 0), 0, 1)
    if tl.max(tl.max(outside, axis=1), axis=0) != 0:
        # Every program that finds one stores the same.
        group = tl.broadcast_to(row // _FLAGGED, [L, NB])
        tl.store(flags_ptr + group, tl.full([L, NB], 1, tl.uint8), there & (outside == 1))


@triton.jit(do_not_specialize=["stream0", "stream1", "sign_stream", "up_from0", "up_from1", "k_max"])
def quantize(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    values0_ptr,
    scale0_ptr,
    exponents0_ptr,
    flags0_ptr,
    values1_ptr,
    scale1_ptr,
    exponents1_ptr,
    flags1_ptr,
    seed_ptr,
    sign_seed_ptr,
    rows,
    columns,
    padded0,
    length0,
    padded1,
    length1,
    stream0,
    stream1,
    sign_stream,
    up_from0,
    up_from1,
    k_max,
    across,
    TILE0: tl.constexpr,
    TILE1: tl.constexpr,
    VECTOR0: tl.constexpr,
    VECTOR1: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED0: tl.constexpr,
    ALIGNED1: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    EMAX: tl.constexpr,
    STOCHASTIC0: tl.constexpr,
    HADAMARD0: tl.constexpr,
    LOG20: tl.constexpr,
    FACTOR0: tl.constexpr,
    SIGNS0: tl.constexpr,
    STOCHASTIC1: tl.constexpr,
    HADAMARD1: tl.constexpr,
    LOG21: tl.constexpr,
    FACTOR1: tl.constexpr,
    SIGNS1: tl.constexpr,
    PRODUCE: tl.constexpr,
    BF16: tl.constexpr,
):
    """x [rows, columns] in blocks along axis 0, along axis 1, or both; results of an axis that is not wanted are None.

    `BF16`: whether that is the dtype of what is quantised. `across`: tiles side by side. Either axis reads the tile in
    its own order; the second time it comes from the cache.
    """
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    row, column = pid // across * TILE0, pid % across * TILE1
    if values1_ptr is not None:
        _quantize_axis(
            x_ptr, p1, p2, p3, p4, values1_ptr, scale1_ptr, exponents1_ptr, flags1_ptr, seed_ptr, sign_seed_ptr,
            row, column, rows, columns, padded1, length1, stream1, sign_stream, up_from1, k_max,
            TILE0, TILE1, VECTOR1, False, EVEN, ALIGNED1, WIDE, BLOCK, EMAX,
            STOCHASTIC1, HADAMARD1, LOG21, FACTOR1, SIGNS1, PRODUCE, BF16,
        )  # fmt: skip
    if values0_ptr is not None:
        _quantize_axis(
            x_ptr, p1, p2, p3, p4, values0_ptr, scale0_ptr, exponents0_ptr, flags0_ptr, seed_ptr, sign_seed_ptr,
            column, row, columns, rows, padded0, length0, stream0, sign_stream, up_from0, k_max,
            TILE1, TILE0, VECTOR0, True, EVEN, ALIGNED0, WIDE, BLOCK, EMAX,
            STOCHASTIC0, HADAMARD0, LOG20, FACTOR0, SIGNS0, PRODUCE, BF16,
        )  # fmt: skip


# --- the exact GEMM of flagged rows ----------------------------------------------------------------------------------


@triton.jit
def _decoded(
    values_ptr,
    scale_ptr,
    exponents_ptr,
    row,
    block,
    rows,
    blocks,
    R: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """STEP blocks of R rows, decoded: fp32 [R, STEP * BLOCK] of two significant bits; zeros past the edges."""
    there = row < rows
    window = (to_bits(tl.load(scale_ptr + row, there, 1.0)) >> 23)[:, None] - 127
    row, there = row.to(tl.int64)[:, None], there[:, None]
    k = block * BLOCK + tl.arange(0, STEP * BLOCK)[None, :]
    values = tl.load(values_ptr + row * (blocks * BLOCK) + k, there & (k < blocks * BLOCK), 0.0)
    at = block + tl.arange(0, STEP)[None, :]
    exponent = tl.load(exponents_ptr + at.to(tl.int64) * rows + row, there & (at < blocks), 0).to(tl.int32) - 127
    shift = exponent - window
    inside = _inside(shift, values_ptr)
    # A block of NaN has no exponent of its own, and needs none.
    scale = pow2(tl.where(inside | (exponent > 127), window, exponent))
    return (values.to(tl.float32).reshape([R, STEP, BLOCK]) * scale[:, :, None]).reshape([R, STEP * BLOCK])


@triton.jit
def _again(
    p_ptr,
    p_scale_ptr,
    p_exponents_ptr,
    p_flags,
    q_ptr,
    q_scale_ptr,
    q_exponents_ptr,
    q_flags_ptr,
    bias_ptr,
    out_ptr,
    p_rows,
    q_rows,
    blocks,
    p_stride,
    q_stride,
    chunk,
    part,
    FLAGS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Of the product of flagged rows of p and all rows of q a part: a chunk of TILE rows of q against every SPLIT-th
    flagged group of p. SECOND: p holds the columns, and rows that the first time wrote are left out."""
    at = tl.arange(0, FLAGS)
    mine = (p_flags != 0) & (tl.cumsum(p_flags, 0) % SPLIT == part)
    group = tl.min(tl.where(mine, at, FLAGS), axis=0)
    q = chunk * TILE + tl.arange(0, TILE)
    while (group < FLAGS) & (chunk * TILE < q_rows):
        p = group * _FLAGGED + tl.arange(0, _FLAGGED)
        total = tl.zeros([_FLAGGED, TILE], tl.float32)
        block = tl.zeros([], tl.int32)
        while block < blocks:  # not range(): Triton's interpreter cannot count to a tensor
            left = _decoded(p_ptr, p_scale_ptr, p_exponents_ptr, p, block, p_rows, blocks, _FLAGGED, STEP, BLOCK)
            right = _decoded(q_ptr, q_scale_ptr, q_exponents_ptr, q, block, q_rows, blocks, TILE, STEP, BLOCK)
            total = tl.dot(left, tl.trans(right), total, input_precision="tf32")  # which holds them
            block += STEP
        wanted = (p < p_rows)[:, None] & (q < q_rows)[None, :]
        if SECOND:
            wanted = wanted & (tl.load(q_flags_ptr + q // _FLAGGED, q < q_rows, 1) == 0)[None, :]
        if bias_ptr is not None:
            column, columns = (p[:, None], p_rows) if SECOND else (q[None, :], q_rows)
            total += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
        pointers = out_ptr + p.to(tl.int64)[:, None] * p_stride + q.to(tl.int64)[None, :] * q_stride
        tl.store(pointers, total.to(out_ptr.dtype.element_ty), wanted)
        group = tl.min(tl.where(mine & (at > group), at, FLAGS), axis=0)


@triton.jit
def exact(
    a_ptr,
    a_scale_ptr,
    a_exponents_ptr,
    a_flags_ptr,
    b_ptr,
    b_scale_ptr,
    b_exponents_ptr,
    b_flags_ptr,
    bias_ptr,
    out_ptr,
    counts_ptr,
    rows,
    columns,
    blocks,
    chunks,
    FLAGS_A: tl.constexpr,
    FLAGS_B: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [rows, columns] = a b^T + bias again where a group of rows of a or b is flagged; at once done where none is.

    `chunks`: of the longer side; the programs take chunks and parts in turn. `counts`: GEMMs that had a flag, and all
    GEMMs.
    """
    at_a, at_b = tl.arange(0, FLAGS_A), tl.arange(0, FLAGS_B)
    a_flags = tl.load(a_flags_ptr + at_a, at_a * _FLAGGED < rows, 0).to(tl.int32)
    b_flags = tl.load(b_flags_ptr + at_b, at_b * _FLAGGED < columns, 0).to(tl.int32)
    of_a, of_b = tl.max(a_flags, axis=0), tl.max(b_flags, axis=0)
    if tl.program_id(0) == 0:
        tl.atomic_add(counts_ptr, (of_a | of_b).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.full([], 1, tl.int64))
    if (of_a | of_b) != 0:
        item = tl.program_id(0)
        while item < chunks * SPLIT:
            chunk, part = item % chunks, item // chunks  # of one flagged group all chunks are taken at once
            if of_a != 0:
                _again(
                    a_ptr, a_scale_ptr, a_exponents_ptr, a_flags, b_ptr, b_scale_ptr, b_exponents_ptr, b_flags_ptr,
                    bias_ptr, out_ptr, rows, columns, blocks, columns, 1, chunk, part,
                    FLAGS_A, TILE, SPLIT, STEP, BLOCK, False,
                )  # fmt: skip
            if of_b != 0:
                _again(
                    b_ptr, b_scale_ptr, b_exponents_ptr, b_flags, a_ptr, a_scale_ptr, a_exponents_ptr, a_flags_ptr,
                    bias_ptr, out_ptr, columns, rows, blocks, 1, columns, chunk, part,
                    FLAGS_B, TILE, SPLIT, STEP, BLOCK, True,
                )  # fmt: skip
            item += tl.num_programs(0)
