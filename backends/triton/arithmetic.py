# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Triton functions that the kernels of several ops call.

    fp32 and its bits    to_bits, from_bits, pow2, rounded, maximum
    rounding to a grid   nearest_multiple, next_multiple
    random numbers       philox, in_turn
    a transform          hadamard
    the scale of E8M0    e8m0_exponent

Bit for bit the arithmetic of `fp4compile.codec`, `.philox` and `.hadamard`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUNDS = tl.constexpr(7)  # of Philox; fp4compile.philox says why
INF = tl.constexpr(0x7F800000)
SIGN = tl.constexpr(-0x80000000)


@triton.jit
def to_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def from_bits(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def pow2(k):
    """2**k for integer k in [-127, 127]; the least is subnormal."""
    return from_bits(tl.where(k < -126, 0x00400000, (k + 127) << 23))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 rounded to a narrower dtype and back, ties to even: Triton's interpreter cuts bf16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = to_bits(x)
        return tl.where(x == x, from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000), x)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(magnitudes, AXIS: tl.constexpr):
    """The largest of magnitudes along an axis, NaN where one of them is."""
    if INTERPRETED:  # takes a Python call for each pair; as integers, NaN is larger than every number
        return from_bits(tl.max(to_bits(magnitudes), axis=AXIS))
    else:
        return tl.reduce(magnitudes, AXIS, _larger)


# --- rounding to nearest ---------------------------------------------------------------------------------------------

# Added in multiples of a power of two it leaves a sum rounded to half of that power, ties to even.
_MAGIC = tl.constexpr(1.5 * 2.0**22)


@triton.jit
def nearest_multiple(t, power):
    """The multiple of power / 2 nearest to t, ties to even, for a power of two and t in [0, 4 power]."""
    return tl.fma(power, -_MAGIC, tl.fma(power, _MAGIC, t))


# --- stochastic rounding ---------------------------------------------------------------------------------------------

# 2**-25 makes u / 2 of a random number. Two sums rounded up are the ceiling of the exact one; behind 1.5 * 2**22 power
# come the multiples of power / 2 only.
_NEXT_MULTIPLE = tl.constexpr("""
{
    .reg .f32 s, n, m;
    neg.f32 n, $2;
    mul.rn.f32 m, $3, 0f33000000;
    fma.rp.f32 s, n, m, $1;
    fma.rp.f32 s, $3, 0f4AC00000, s;
    fma.rn.f32 $0, $3, 0fCAC00000, s;
}
""")


@triton.jit
def next_multiple(t, random, power):
    """The least multiple of power / 2 that is not below t - u * power / 2, for a power of two and t in [0, 4 power].

    It is the upper neighbour of t on that grid where u < (t - lower) / gap, else the lower one.

    Args:
        random: 2**24 u, a whole number below 2**24.
    """
    if INTERPRETED:
        half = power.to(tl.float64) * 0.5
        # t / half - u is exact, but for a t so small that the result is zero, which is positive.
        return (tl.ceil(t.to(tl.float64) / half - random.to(tl.float64) * 2.0**-24) * half + 0.0).to(tl.float32)
    else:
        given = [t, random, power]
        return tl.inline_asm_elementwise(_NEXT_MULTIPLE, "=f,f,f,f", given, tl.float32, is_pure=True, pack=1)


# --- random numbers --------------------------------------------------------------------------------------------------


# `counter_stream`, because `stream` is a word of Triton's launch.


@triton.jit
def philox(counter, seed, counter_stream, WIDE: tl.constexpr):
    """Four 32-bit words of Philox4x32-7 for each counter, key (seed, stream)."""
    c0 = counter.to(tl.uint32)
    c1 = tl.zeros_like(c0)
    if WIDE:
        c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + (seed >> 32).to(tl.uint32)
    c3 = tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), counter_stream.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        # A 64-bit product of 32-bit factors is one instruction.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def in_turn(w0, w1, w2, w3):
    """[..., n] four times -> [..., n, 2, 2]: w0, w1, w2, w3 of the first, then of the second, …"""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


# --- the Hadamard transform ------------------------------------------------------------------------------------------


@triton.jit
def _signs(seed_ptr, counter_stream, SIZE: tl.constexpr):
    """The sign bits of the transform, int32 [SIZE]."""
    seed = tl.full([], 0, tl.int64) if seed_ptr is None else tl.load(seed_ptr)
    w0, w1, w2, w3 = philox(tl.arange(0, SIZE // 4), seed, counter_stream, False)
    return in_turn(w0, w1, w2, w3).reshape([SIZE]).to(tl.int32, bitcast=True) & SIGN


@triton.jit
def hadamard(
    x,
    k,
    padded,
    seed_ptr,
    counter_stream,
    L: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LOG2: tl.constexpr,
    FACTOR: tl.constexpr,
    EVEN: tl.constexpr = False,
):
    """Signs, butterflies with strides 1, 2, 4, …, one multiply, on runs of SIZE of [L, K]."""
    bits = to_bits(x).reshape([L, K // SIZE, SIZE]) ^ _signs(seed_ptr, counter_stream, SIZE)[None, None, :]
    for step in tl.static_range(LOG2):
        bits = bits.reshape([L, K >> (step + 1), 2, 1 << step])
        # The other of a pair without a copy through memory: xor of both, xor this one.
        other = from_bits(tl.xor_sum(bits, axis=2)[:, :, None, :] ^ bits)
        # The second of a pair is the first minus itself: one sum of an exact product.
        sign = tl.where(tl.arange(0, 2) == 0, 1.0, -1.0)[None, None, :, None]
        bits = to_bits(tl.fma(from_bits(bits), tl.broadcast_to(sign, bits.shape), other))
    y = from_bits(bits).reshape([L, K]) * FACTOR
    if not EVEN:
        # Past the last run there are sums of signed zeros; a block is filled up with positive ones.
        y = tl.where(k + tl.arange(0, K)[None, :] < padded, y, 0.0)
    return y


# --- scales ----------------------------------------------------------------------------------------------------------


@triton.jit
def e8m0_exponent(amax, up_from, k_max, EMAX: tl.constexpr):
    """The exponent of blocks from the bits of their maxima, before its bias of 127.

    `up_from`: the fraction of the maximum, as 23 bits, from which the exponent moves up.
    """
    subnormal = amax < 0x00800000
    bits = tl.where(subnormal, to_bits(from_bits(amax) * 16777216.0), amax)
    k = (bits >> 23) - tl.where(subnormal, 127 + 24 + EMAX, 127 + EMAX)
    k += ((bits & 0x7FFFFF) >= up_from).to(tl.int32)
    k = tl.minimum(tl.maximum(k, -127), k_max)
    return tl.where(amax == 0, -127, k)
