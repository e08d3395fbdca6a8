# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Triton kernels of the codec ops: one tile of a tensor per program, the arithmetic of `fp4compile.codec` bit for bit.

    x [batch, lanes, size] or, in columns, [batch, size, lanes]  ->  tiles [L, K]  ->  blocks [L, NB, BLOCK]

A lane is one run of elements along the blocked axis. Rows are read along the lane. Columns are read across lanes, in
place: a thread holds LOW consecutive elements of a lane, so that the inner scale levels need no other thread, and
what looks like a transposition below only renames the dimensions of registers.

fp32 throughout. Maxima of magnitudes keep NaN, whose bits, as those of Inf, are as an integer above every number's.
Divisions are rounded correctly (`/` would not be); the launch forbids contraction to fused multiply-adds, and those
that are written have an exact product or correct a division. Nothing reads a format's name.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.backends.triton.arithmetic import (
    INF,
    INTERPRETED,
    SIGN,
    columns,
    columns_to_lanes,
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

_NAN = tl.constexpr(0x7FC00000)
_E6M2_MIN = tl.constexpr(2.0**-48)


# --- where a tile stands ---------------------------------------------------------------------------------------------


@triton.jit
def _place(
    lanes, size, L: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr, BATCHED: tl.constexpr
):
    """Batch, first lane and first element of this program's tile; neighbours in memory come one after the other."""
    inside = tl.program_id(0)
    if WIDE:
        inside = inside.to(tl.int64)
    across, along = tl.cdiv(lanes, L), tl.cdiv(size, K)
    batch = 0
    if BATCHED:  # a division takes as long as the quantisation of an element or two
        batch = inside // (across * along)
        inside = inside % (across * along)
    if COLUMNS:
        return batch, inside % across * L, inside // across * K
    else:
        return batch, inside // along * L, inside % along * K


@triton.jit
def _elements(
    lane,
    k,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVERY: tl.constexpr,
):
    """(lane, k) of the elements of a tile, every EVERY-th in memory order: of [L, K], or as `columns` has them."""
    if COLUMNS:
        return columns(lane, k, L, K, LOW, VECTOR, EVERY)
    else:
        return lane + tl.arange(0, L)[:, None], k + EVERY * tl.arange(0, K // EVERY)[None, :]


@triton.jit
def _index(batch, lane, k, lanes, size, COLUMNS: tl.constexpr):
    """The linear index of element k of a lane."""
    if COLUMNS:
        return (batch * size + k) * lanes + lane
    else:
        return (batch * lanes + lane) * size + k


@triton.jit
def _to_lanes(x, L: tl.constexpr, K: tl.constexpr, LOW: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile as `_elements` orders it -> [L, K]."""
    if COLUMNS:
        x = columns_to_lanes(x, L, K, LOW).reshape([L, K])
    return x


@triton.jit
def _to_memory(x, L: tl.constexpr, K: tl.constexpr, LOW: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `_to_lanes`."""
    if COLUMNS:
        x = tl.permute(x.reshape([L, K // LOW, LOW]), (2, 1, 0)).reshape([1, K, L])
    return x


@triton.jit
def _load(
    x_ptr,
    batch,
    lane,
    k,
    lanes,
    size,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile [L, K] in fp32; zeros past the edges."""
    lane, k = _elements(lane, k, L, K, LOW, VECTOR, COLUMNS, 1)
    pointers = x_ptr + _index(batch, lane, k, lanes, size, COLUMNS)
    x = tl.load(pointers) if EVEN else tl.load(pointers, mask=(lane < lanes) & (k < size), other=0.0)
    return _to_lanes(x.to(tl.float32), L, K, LOW, COLUMNS)


@triton.jit
def _produced(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    width,
    batch,
    lane,
    k,
    lanes,
    size,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PRODUCE: tl.constexpr,
):
    """The tiles of all tensors that PRODUCE makes of x [M, width] and the operands, in the order of memory."""
    lane, k = _elements(lane, k, L, K, LOW, VECTOR, COLUMNS, 1)
    index = _index(batch, lane, k, lanes, size, COLUMNS)
    if COLUMNS:
        return PRODUCE(x_ptr, p1, p2, p3, p4, index, k, lane, k < size, lane < lanes, EVEN)
    else:
        start = lane * size  # a lane may be a run that was cut from a row
        column = start % width + k
        return PRODUCE(x_ptr, p1, p2, p3, p4, index, start // width, column, lane < lanes, k < size, EVEN)


@triton.jit
def _read(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    width,
    batch,
    lane,
    k,
    lanes,
    size,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PRODUCE: tl.constexpr,
):
    """A tile [L, K] in fp32: of x, or of the one tensor that PRODUCE makes; zeros past the edges."""
    if PRODUCE is None:
        return _load(x_ptr, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN)
    else:
        (x,) = _produced(
            x_ptr, p1, p2, p3, p4, width, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN, PRODUCE
        )  # fmt: skip
        return _to_lanes(x, L, K, LOW, COLUMNS)


@triton.jit
def _store(
    y_ptr,
    y,
    batch,
    lane,
    k,
    lanes,
    size,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):
    y = _to_memory(y.to(y_ptr.dtype.element_ty), L, K, LOW, COLUMNS)
    lane, k = _elements(lane, k, L, K, LOW, VECTOR, COLUMNS, 1)
    pointers = y_ptr + _index(batch, lane, k, lanes, size, COLUMNS)
    if EVEN:
        tl.store(pointers, y)
    else:
        tl.store(pointers, y, mask=(lane < lanes) & (k < size))


# --- random numbers --------------------------------------------------------------------------------------------------


@triton.jit
def _uniform(
    batch,
    lane,
    k,
    lanes,
    size,
    seed_ptr,
    counter_stream,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """2**24 u for a tile, [L, K], with u in [0, 1). ALIGNED: four elements in a row share a counter."""
    lane, k = _elements(lane, k, L, K, LOW, VECTOR, COLUMNS, 4 if ALIGNED else 1)
    index = _index(batch, lane, k, lanes, size, COLUMNS)
    w0, w1, w2, w3 = philox(index >> 2, tl.load(seed_ptr), counter_stream, WIDE)
    if ALIGNED:
        words = in_turn(w0, w1, w2, w3)
        words = words.reshape([1, K, L] if COLUMNS else [L, K])
    else:
        words = tl.where(index & 2 == 0, tl.where(index & 1 == 0, w0, w1), tl.where(index & 1 == 0, w2, w3))
    # 24 bits: the conversion from a signed integer is exact, and the one that the hardware has.
    return _to_lanes((words >> 8).to(tl.int32).to(tl.float32), L, K, LOW, COLUMNS)


# --- scales ----------------------------------------------------------------------------------------------------------
# Encoders take magnitudes [L, NB, BLOCK] and their maxima [L, NB], and return t = |x| / scale, the scale and the stored
# integer [L, NB].


@triton.jit
def _not_finite(largest):
    return to_bits(largest) >= INF


@triton.jit
def _multiplier(scale, bad, STEP: tl.constexpr):
    """What the magnitudes of a block are multiplied by, which are in steps."""
    return tl.where(bad, float("nan"), scale * STEP)


@triton.jit
def _encode_e8m0(mag, amax, up_from, k_max, EMAX: tl.constexpr, STOCHASTIC: tl.constexpr):
    k = e8m0_exponent(amax, up_from, k_max, EMAX)
    if STOCHASTIC:
        # Values near the least subnormal may round up: through the same two products as the reference.
        half = -k >> 1
        t = (mag * pow2(half)[:, :, None]) * pow2(-k - half)[:, :, None]
    else:
        t = mag * pow2(-k)[:, :, None]
    return t, pow2(k), k + 127


@triton.jit
def _quotient(a, b, reciprocal, STEPS: tl.constexpr):
    """a / b rounded correctly, for nothing near the ends of the range.

    Each step adds the remainder's quotient; the remainder is exact (Markstein, IBM J. Res. Dev. 34, 1990). Two are
    enough with a reciprocal of b to within an ulp or two, and one with that of `_reciprocal` for b of up to four
    significant bits: a test tries them all.
    """
    if INTERPRETED:  # which rounds the product in `fma`
        return tl.div_rn(a, b)
    else:
        q = a * reciprocal
        for _ in tl.static_range(STEPS):
            q = tl.fma(tl.fma(-q, b, a), reciprocal, q)
        return q


@triton.jit
def _reciprocal(x):
    """1 / x to within 2**-17 for x of up to four significant bits, far from the ends of the range."""
    y = from_bits(0x7EF311C7 - to_bits(x))  # to 12%; each Newton step squares the error
    for _ in tl.static_range(2):
        y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return y


@triton.jit
def _round_e4m3(scale, TRUNCATION_FREE: tl.constexpr):
    """A normal E4M3 number near each scale, and its fields with fp32's exponent bias."""
    bits = to_bits(tl.minimum(tl.maximum(scale, 0.015625), 448.0))
    up = 0xFFFFF if TRUNCATION_FREE else 0x7FFFF + ((bits >> 20) & 1)
    rounded = (bits + up) >> 20
    return from_bits(rounded << 20), rounded


@triton.jit
def _encode_e4m3(mag, largest, ts_ptr, TOP: tl.constexpr, TRUNCATION_FREE: tl.constexpr):
    ts, one = 1.0, 1.0
    if ts_ptr is not None:
        ts = tl.load(ts_ptr)
        one = tl.div_rn(1.0, ts)
    # Three divisions per block, the ends of the range left out: a maximum that small gives the least scale.
    if (ts_ptr is None) or ((ts > 8.673617379884035e-19) & (ts < 1.152921504606847e18)):  # 2**-60, 2**60
        scale = _quotient(largest, TOP, 1.0 / TOP, 1)
        if ts_ptr is not None:
            scale = _quotient(tl.minimum(scale, 1024.0 * ts), ts, one, 2)
        scale, rounded = _round_e4m3(scale, TRUNCATION_FREE)
        inverse = _quotient(one, scale, _reciprocal(scale), 1)
    else:
        scale, rounded = _round_e4m3(tl.div_rn(tl.div_rn(largest, TOP), ts), TRUNCATION_FREE)
        inverse = tl.div_rn(one, scale)
    return mag * inverse[:, :, None], scale, rounded - 960


@triton.jit
def _to_bf16(x):
    """Rounded to bf16, ties to even, for x >= 0."""
    bits = to_bits(x)
    return from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)


@triton.jit
def _spread(fours, L: tl.constexpr, NB: tl.constexpr):
    """One value per 4 elements, [L, NB, 8, 2] -> one per element, [L, NB, 64]."""
    return tl.broadcast_to(fours[:, :, :, :, None], [L, NB, 8, 2, 4]).reshape([L, NB, 64])


@triton.jit
def _times(value, power: tl.constexpr, e2, e3):
    """value [L, NB] times power**(e2 + e3), [L, NB, 8, 2]: selected, because a product takes as long as a choice."""
    eights = tl.where(e2, (value * power)[:, :, None], value[:, :, None])
    return tl.where(e3, (eights * power)[:, :, :, None], eights[:, :, :, None])


@triton.jit
def _scaled(
    mag,
    factor,
    e2,
    e3,
    L: tl.constexpr,
    NB: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """t = mag / factor (truncation-free) or mag * factor, times 2**-(e2 + e3)."""
    if STOCHASTIC:
        # In two roundings as in the reference: values near the least subnormal may round up.
        if TRUNCATION_FREE:
            t = tl.div_rn(mag, tl.broadcast_to(factor[:, :, None], mag.shape))
        else:
            t = mag * factor[:, :, None]
        t = t * _spread(_times(tl.full([L, NB], 1.0, tl.float32), 0.5, e2, e3), L, NB)
    elif TRUNCATION_FREE:
        # Magnitudes too small for a right quotient are rounded to zero all the same.
        inverse = _spread(_times(_reciprocal(factor), 0.5, e2, e3), L, NB)
        t = _quotient(mag, _spread(_times(factor, 2.0, e2, e3), L, NB), inverse, 1)
    else:
        t = mag * _spread(_times(factor, 0.5, e2, e3), L, NB)
    return t


@triton.jit
def _encode_e6m2(
    mag,
    s_max,
    L: tl.constexpr,
    NB: tl.constexpr,
    STEP: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """E6M2 per 64, one exponent bit per 8 and one per 4: t, what `_quantise` returns beside q.

    All maxima lie within a thread but for the last.
    """
    v3 = maximum(mag.reshape([L, NB, 8, 2, 4]), 4)
    v2 = maximum(v3, 3)
    v = maximum(v2, 2)
    if TRUNCATION_FREE:
        s = tl.minimum(tl.maximum(tl.div_rn(v, 7.0), _E6M2_MIN), s_max)
        fields = (to_bits(s) + 0x1FFFFF) >> 21
        scale = from_bits(fields << 21)
        # v / scale > 3.5 in fp32 exactly where v > 3.5 * scale: of a scale of three bits both sides are exact.
        factor = scale
        e2 = v2 > 3.5 * scale[:, :, None]
        e3 = v3 > tl.where(e2, 3.5 * scale[:, :, None], 1.75 * scale[:, :, None])[:, :, :, None]
    else:
        # bf16(1/7); the scale and its reciprocal are bf16, the products fp32.
        s = tl.minimum(tl.maximum(_to_bf16(v * 0.142578125), _E6M2_MIN), s_max)
        bits = to_bits(s)
        fields = (bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21
        scale = from_bits(fields << 21)
        # In bf16 as well: the reciprocals of 1, 1.25, 1.5 and 1.75 are far from ties.
        factor = from_bits((to_bits(_reciprocal(scale)) + 0x8000) & -0x10000)
        e2 = v2 * factor[:, :, None] >= 4.0
        e3 = v3 * factor[:, :, None, None] >= tl.where(e2, 4.0, 2.0)[:, :, :, None]
    t = _scaled(mag, factor, e2, e3, L, NB, TRUNCATION_FREE, STOCHASTIC)
    at = tl.arange(0, 8)
    second = tl.sum(e2.to(tl.int32) << (8 + at)[None, None, :], axis=2)
    third = e3.to(tl.int32) << (16 + 2 * at[:, None] + tl.arange(0, 2)[None, :])[None, None, :, :]
    word = fields - 316 + second + tl.sum(tl.sum(third, axis=3), axis=2)
    bad = _not_finite(v)
    return t, _spread(_times(_multiplier(scale, bad, STEP), 2.0, e2, e3), L, NB), word, bad


@triton.jit
def _decode_e6m2(word, L: tl.constexpr, NB: tl.constexpr):
    """[L, NB] -> the scale of every element, [L, NB, 64]."""
    byte = word & 0xFF
    at = tl.arange(0, 8)
    second = (word[:, :, None] >> (8 + at)[None, None, :]) & 1
    shifts = 16 + 2 * at[:, None] + tl.arange(0, 2)[None, :]
    third = (word[:, :, None, None] >> shifts[None, None, :, :]) & 1
    bits = (byte << 21) + 0x27800000
    bits = bits[:, :, None, None] + ((second[:, :, :, None] + third) << 23)
    bits = tl.where((byte == 0xFF)[:, :, None, None], _NAN, bits)
    return from_bits(_spread(bits, L, NB))


@triton.jit
def _decode(stored, L: tl.constexpr, NB: tl.constexpr, SCALING: tl.constexpr):
    """Stored scales [L, NB] -> multipliers, broadcastable to [L, NB, BLOCK]."""
    if SCALING == "e6m2":
        scale = _decode_e6m2(stored, L, NB)
    elif SCALING == "e8m0":
        scale = from_bits(tl.where(stored == 0xFF, _NAN, to_bits(pow2(stored - 127))))[:, :, None]
    else:
        # E4M3: its fields moved into fp32's, and the difference of the biases; subnormal numbers come out right too.
        value = from_bits(((stored & 0x7F) << 20) | ((stored & 0x80) << 24)) * 1.329227995784916e36
        scale = tl.where((stored & 0x7F) == 0x7F, float("nan"), value)[:, :, None]
    return scale


# --- elements --------------------------------------------------------------------------------------------------------
# Magnitudes are in steps: those of E2M1 itself, else the index on an evenly spaced grid. STEP turns them into values.


@triton.jit
def _round_nearest(t, ELEMENT: tl.constexpr, STEP: tl.constexpr):
    if ELEMENT == "e2m1":
        t = tl.minimum(t, 6.0)
        return nearest_multiple(t, from_bits(to_bits(tl.maximum(t, 1.0)) & INF))
    else:
        return tl.minimum(tl.floor(tl.fma(t, 1.0 / STEP, 0.5)), 7.0)  # the product is exact: STEP is a power of two


@triton.jit
def _round_stochastic(t, random, ELEMENT: tl.constexpr, STEP: tl.constexpr):
    """The upper neighbour where u < (t - lower) / gap, gap the distance of both; `random` is 2**24 u."""
    if ELEMENT == "e2m1":
        t = tl.minimum(t, 6.0)
        return next_multiple(t, random, from_bits(to_bits(tl.maximum(t, 1.0)) & INF))
    else:
        return next_multiple(tl.minimum(t * (1.0 / STEP), 7.0), random, tl.full(t.shape, 2.0, tl.float32))


@triton.jit
def _code(q, ELEMENT: tl.constexpr):
    """The three bits of a magnitude."""
    if ELEMENT == "e2m1":
        return tl.where(q == 0.0, 0, tl.maximum((to_bits(q) >> 22) - 252, 1))
    else:
        return q.to(tl.int32)


@triton.jit
def _magnitude(code, ELEMENT: tl.constexpr):
    """The inverse of `_code`."""
    if ELEMENT == "e2m1":
        return from_bits(code << 22) * 8.507059173023462e37  # as a number with exponent bias 1
    else:
        return code.to(tl.float32)


@triton.jit
def _quantise(
    x,
    random,
    ts_ptr,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    NB: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """x [L, NB * BLOCK] -> magnitudes in steps and their multipliers, stored scales, blocks that are not finite.

    Multipliers are broadcastable to the elements; in blocks that are not finite they are NaN.
    """
    mag = tl.abs(x).reshape([L, NB, BLOCK])
    if SCALING == "e6m2":
        t, multiplier, stored, bad = _encode_e6m2(mag, s_max, L, NB, STEP, TRUNCATION_FREE, STOCHASTIC)
    else:
        largest = maximum(mag, 2)
        if EDGE:
            square = maximum(largest.reshape([L // EDGE, EDGE, NB]), 1)
            largest = tl.broadcast_to(square[:, None, :], [L // EDGE, EDGE, NB]).reshape([L, NB])
        if SCALING == "e8m0":
            t, scale, stored = _encode_e8m0(mag, to_bits(largest), up_from, k_max, EMAX, STOCHASTIC)
        else:
            t, scale, stored = _encode_e4m3(mag, largest, ts_ptr, TOP, TRUNCATION_FREE)
        bad = _not_finite(largest)
        multiplier = _multiplier(scale, bad, STEP)[:, :, None]
    if STOCHASTIC:
        q = _round_stochastic(t, random.reshape([L, NB, BLOCK]), ELEMENT, STEP)
    else:
        q = _round_nearest(t, ELEMENT, STEP)
    return q, multiplier, stored, bad


# --- from a tile to its values ---------------------------------------------------------------------------------------


@triton.jit
def _encode(
    x,
    ts_ptr,
    seed_ptr,
    sign_seed_ptr,
    batch,
    lane,
    k,
    lanes,
    padded,
    counter_stream,
    sign_stream,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Transform and quantise a tile [L, K]: the values before rounding, and what `_quantise` returns."""
    if HADAMARD:
        x = hadamard(x, k, padded, sign_seed_ptr, sign_stream, L, K, HADAMARD, LOG2, FACTOR, EVEN)
    random = x
    if STOCHASTIC:
        random = _uniform(
            batch, lane, k, lanes, padded, seed_ptr, counter_stream, L, K, LOW, VECTOR, COLUMNS, ALIGNED, WIDE
        )  # fmt: skip
    q, multiplier, stored, bad = _quantise(
        x, random, ts_ptr, up_from, k_max, s_max, L, K // BLOCK, BLOCK, EDGE,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, STOCHASTIC,
    )  # fmt: skip
    return x, q, multiplier, stored, bad


@triton.jit
def _fake_quantise(
    x,
    y_ptr,
    ts_ptr,
    seed_ptr,
    sign_seed_ptr,
    batch,
    lane,
    k,
    lanes,
    padded,
    counter_stream,
    sign_stream,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FOLD: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """A tile of y = dequantised(quantised(x)) in y's dtype, from a tile x [L, K]."""
    x, q, multiplier, _, _ = _encode(
        x, ts_ptr, seed_ptr, sign_seed_ptr, batch, lane, k, lanes, padded, counter_stream, sign_stream,
        up_from, k_max, s_max, L, K, LOW, VECTOR, COLUMNS, EVEN, WIDE, ALIGNED, BLOCK, EDGE,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, STOCHASTIC, HADAMARD, LOG2, FACTOR,
    )  # fmt: skip
    y = q * multiplier
    if FOLD:
        y = y * tl.load(ts_ptr)
    y = from_bits(to_bits(y).reshape([L, K]) ^ (to_bits(x) & SIGN))
    _store(y_ptr, y, batch, lane, k, lanes, padded, L, K, LOW, VECTOR, COLUMNS, EVEN)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["up_from", "k_max", "counter_stream", "sign_stream"])
def fake_quantize(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    y_ptr,
    ts_ptr,
    seed_ptr,
    sign_seed_ptr,
    lanes,
    size,
    padded,
    counter_stream,
    sign_stream,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FOLD: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
    PRODUCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y = dequantised(quantised(x)) in y's dtype."""
    batch, lane, k = _place(lanes, padded, L, K, COLUMNS, WIDE, BATCHED)
    x = _read(x_ptr, p1, p2, p3, p4, WIDTH, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN, PRODUCE)
    _fake_quantise(
        x, y_ptr, ts_ptr, seed_ptr, sign_seed_ptr, batch, lane, k, lanes, padded, counter_stream, sign_stream,
        up_from, k_max, s_max, L, K, LOW, VECTOR, COLUMNS, EVEN, WIDE, ALIGNED, BLOCK, EDGE,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, STOCHASTIC, FOLD, HADAMARD, LOG2, FACTOR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["up_from", "k_max"])
def fake_quantize_each(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    y_0_ptr,
    y_1_ptr,
    y_2_ptr,
    ts_0_ptr,
    ts_1_ptr,
    ts_2_ptr,
    lanes,
    size,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    FOLD: tl.constexpr,
    PRODUCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """y_i = dequantised(quantised(i-th result of PRODUCE)), to nearest; of two results y_2_ptr is None."""
    batch, lane, k = _place(lanes, size, L, K, COLUMNS, WIDE, BATCHED)
    made = _produced(
        x_ptr, p1, p2, p3, p4, WIDTH, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN, PRODUCE
    )  # fmt: skip
    for i in tl.static_range(len(made)):
        x = _to_lanes(made[i], L, K, LOW, COLUMNS)
        _fake_quantise(
            x, (y_0_ptr, y_1_ptr, y_2_ptr)[i], (ts_0_ptr, ts_1_ptr, ts_2_ptr)[i], None, None,
            batch, lane, k, lanes, size, 0, 0, up_from, k_max, s_max,
            L, K, LOW, VECTOR, COLUMNS, EVEN, WIDE, True, BLOCK, 0, SCALING, ELEMENT, STEP, TOP, EMAX,
            TRUNCATION_FREE, False, FOLD, 0, 0, 1.0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["up_from", "k_max", "sign_stream"])
def fake_quantize_both(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    y_0_ptr,
    y_1_ptr,
    ts_0_ptr,
    ts_1_ptr,
    sign_seed_ptr,
    rows,
    columns,
    sign_stream,
    up_from,
    k_max,
    s_max,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    FOLD: tl.constexpr,
    EDGE_0: tl.constexpr,
    HADAMARD_0: tl.constexpr,
    LOG2_0: tl.constexpr,
    FACTOR_0: tl.constexpr,
    EDGE_1: tl.constexpr,
    HADAMARD_1: tl.constexpr,
    LOG2_1: tl.constexpr,
    FACTOR_1: tl.constexpr,
    PRODUCE: tl.constexpr,
):
    """y_0, y_1 = x [rows, columns] fake-quantised along axis 0 and 1, to nearest, in whole tiles [ROWS, COLUMNS].

    A program reads its tile once for each, the second time from a cache.
    """
    _, row, column = _place(rows, columns, ROWS, COLUMNS, False, WIDE, False)
    x = _read(
        x_ptr, p1, p2, p3, p4, columns, 0, row, column, rows, columns, ROWS, COLUMNS, 1, 1, False, True, PRODUCE
    )  # fmt: skip
    _fake_quantise(
        x, y_1_ptr, ts_1_ptr, None, sign_seed_ptr, 0, row, column, rows, columns,
        0, sign_stream, up_from, k_max, s_max, ROWS, COLUMNS, 1, 1, False, True, WIDE, True, BLOCK, EDGE_1,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, False, FOLD, HADAMARD_1, LOG2_1, FACTOR_1,
    )  # fmt: skip
    x = _read(
        x_ptr, p1, p2, p3, p4, columns, 0, column, row, columns, rows, COLUMNS, ROWS, LOW, VECTOR, True, True, PRODUCE
    )  # fmt: skip
    _fake_quantise(
        x, y_0_ptr, ts_0_ptr, None, sign_seed_ptr, 0, column, row, columns, rows,
        0, sign_stream, up_from, k_max, s_max, COLUMNS, ROWS, LOW, VECTOR, True, True, WIDE, True, BLOCK, EDGE_0,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, False, FOLD, HADAMARD_0, LOG2_0, FACTOR_0,
    )  # fmt: skip


@triton.jit(do_not_specialize=["up_from", "k_max", "counter_stream", "sign_stream"])
def quantize(
    x_ptr,
    codes_ptr,
    scales_ptr,
    ts_ptr,
    seed_ptr,
    sign_seed_ptr,
    lanes,
    size,
    padded,
    counter_stream,
    sign_stream,
    up_from,
    k_max,
    s_max,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
    TOP: tl.constexpr,
    EMAX: tl.constexpr,
    TRUNCATION_FREE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    NAN: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Codes, as 32-bit words of eight, and scales."""
    batch, lane, k = _place(lanes, padded, L, K, COLUMNS, WIDE, BATCHED)
    x = _load(x_ptr, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN)
    x, q, _, stored, bad = _encode(
        x, ts_ptr, seed_ptr, sign_seed_ptr, batch, lane, k, lanes, padded, counter_stream, sign_stream,
        up_from, k_max, s_max, L, K, LOW, VECTOR, COLUMNS, EVEN, WIDE, ALIGNED, BLOCK, EDGE,
        SCALING, ELEMENT, STEP, TOP, EMAX, TRUNCATION_FREE, STOCHASTIC, HADAMARD, LOG2, FACTOR,
    )  # fmt: skip
    NB: tl.constexpr = K // BLOCK
    blocks = tl.cdiv(padded, BLOCK)  # of a lane, or of the run that was cut from one
    code = _code(q, ELEMENT) | ((to_bits(x) >> 28) & 8).reshape([L, NB, BLOCK])
    code = tl.where(bad[:, :, None], 0, code).reshape([L, K // 8, 8])
    words = tl.sum(code << (4 * tl.arange(0, 8))[None, None, :], axis=2)
    stored = tl.where(bad, NAN, stored)

    lane += tl.arange(0, L)[:, None]
    row = batch * lanes + lane
    word = k // 8 + tl.arange(0, K // 8)[None, :]
    tl.store(codes_ptr + row * (blocks * (BLOCK // 8)) + word, words, (lane < lanes) & (word < blocks * (BLOCK // 8)))
    block = k // BLOCK + tl.arange(0, NB)[None, :]
    inside = (lane < lanes) & (block < blocks)
    if EDGE:
        row = batch * tl.cdiv(lanes, EDGE) + lane // EDGE
        inside = inside & (lane % EDGE == 0)
    tl.store(scales_ptr + row * blocks + block, stored.to(scales_ptr.dtype.element_ty), inside)


@triton.jit
def dequantize(
    codes_ptr,
    scales_ptr,
    y_ptr,
    ts_ptr,
    lanes,
    size,
    blocks,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    STEP: tl.constexpr,
):
    """(magnitude * scale) * tensor scale in fp32, rounded once to y's dtype."""
    batch, lane0, k = _place(lanes, size, L, K, COLUMNS, WIDE, BATCHED)
    NB: tl.constexpr = K // BLOCK
    lane = lane0 + tl.arange(0, L)[:, None]
    row = batch * lanes + lane
    word = k // 8 + tl.arange(0, K // 8)[None, :]
    inside = (lane < lanes) & (word < blocks * (BLOCK // 8))
    words = tl.load(codes_ptr + row * (blocks * (BLOCK // 8)) + word, inside, 0)
    if EDGE:
        row = batch * tl.cdiv(lanes, EDGE) + lane // EDGE
    block = k // BLOCK + tl.arange(0, NB)[None, :]
    stored = tl.load(scales_ptr + row * blocks + block, (lane < lanes) & (block < blocks), 0).to(tl.int32)

    code = ((words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15).reshape([L, NB, BLOCK])
    y = _magnitude(code & 7, ELEMENT) * (_decode(stored, L, NB, SCALING) * STEP)
    y = from_bits(to_bits(y) ^ ((code & 8) << 28))
    if ts_ptr is not None:
        y = y * tl.load(ts_ptr)
    _store(y_ptr, y.reshape([L, K]), batch, lane0, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN)


@triton.jit
def _largest_finite(x):
    """The bits of the largest finite magnitude of a tile."""
    bits = to_bits(x) & 0x7FFFFFFF
    bits = tl.where(bits < INF, bits, 0)
    return tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit(do_not_specialize=["sign_stream"])
def amax(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    partial_ptr,
    sign_seed_ptr,
    lanes,
    size,
    padded,
    sign_stream,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    HADAMARD: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
    BOTH: tl.constexpr,
    PRODUCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The bits of the largest finite magnitude of each tile; BOTH: of x before its transform, then of that."""
    batch, lane, k = _place(lanes, padded, L, K, COLUMNS, WIDE, BATCHED)
    x = _read(x_ptr, p1, p2, p3, p4, WIDTH, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN, PRODUCE)
    if BOTH:
        tl.store(partial_ptr + tl.program_id(0), _largest_finite(x))
        partial_ptr += tl.num_programs(0)
    if HADAMARD:
        x = hadamard(x, k, padded, sign_seed_ptr, sign_stream, L, K, HADAMARD, LOG2, FACTOR, EVEN)
    tl.store(partial_ptr + tl.program_id(0), _largest_finite(x))


@triton.jit
def _scale_of(partial_ptr, y_ptr, count, TOP: tl.constexpr, LEAST: tl.constexpr, CHUNK: tl.constexpr):
    at = tl.arange(0, CHUNK)
    most = tl.zeros([CHUNK], tl.int32)
    start = 0
    while start < count:  # not range(): Triton's interpreter cannot count to a tensor under numpy 2.4
        most = tl.maximum(most, tl.load(partial_ptr + start + at, start + at < count, 0))
        start += CHUNK
    amax = from_bits(tl.max(most, axis=0))
    scale = tl.maximum(tl.div_rn(amax, TOP), LEAST)
    tl.store(y_ptr, tl.where(amax == 0.0, 1.0, scale))


@triton.jit
def amax_each(
    x_ptr,
    p1,
    p2,
    p3,
    p4,
    partial_ptr,
    lanes,
    size,
    L: tl.constexpr,
    K: tl.constexpr,
    LOW: tl.constexpr,
    VECTOR: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BATCHED: tl.constexpr,
    PRODUCE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`amax` of every result of PRODUCE, one behind the other."""
    batch, lane, k = _place(lanes, size, L, K, COLUMNS, WIDE, BATCHED)
    made = _produced(
        x_ptr, p1, p2, p3, p4, WIDTH, batch, lane, k, lanes, size, L, K, LOW, VECTOR, COLUMNS, EVEN, PRODUCE
    )  # fmt: skip
    for i in tl.static_range(len(made)):
        x = _to_lanes(made[i], L, K, LOW, COLUMNS)
        tl.store(partial_ptr + i * tl.num_programs(0) + tl.program_id(0), _largest_finite(x))


@triton.jit(do_not_specialize=["count"])
def tensor_scale(
    partial_ptr,
    y_0_ptr,
    y_1_ptr,
    y_2_ptr,
    count,
    TOP: tl.constexpr,
    LEAST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Tensor scales from the maxima of all tiles, those of one behind those of the other: a program for each."""
    pointers = (y_0_ptr, y_1_ptr, y_2_ptr)
    for i in tl.static_range(3):
        if pointers[i] is not None:  # noqa: SIM102, known when this is compiled
            if tl.program_id(0) == i:
                _scale_of(partial_ptr + i * count, pointers[i], count, TOP, LEAST, CHUNK)
