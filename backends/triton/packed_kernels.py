# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Triton kernels of `mm` on a packed weight: 4-bit codes become bf16 operands of the tensor cores in registers.

    y[m, n] = sum over k of x[m, k] * w[n, k]      codes [N, K/2] as 32-bit words of eight, scales [N, K/block]

The weight is the left operand and x the right one, so that a few tokens fill the narrow side of the instruction. The
order of a contraction is free. A thread holds whole words, and each step takes the same pairs of elements from the
words of four neighbouring threads: codes go from memory to the tensor cores without being exchanged, and x is taken
in the same order. A pair costs one permutation of bytes, one mask and one product:

    bytes of a word  [.. b1 b0]  ->  [b0 b0 | b0 << 4 twice]  ->  sign and magnitude of two bf16 numbers  ->  * scale

S1P2 magnitudes are read as bf16 subnormals, E2M1 codes as bf16 numbers of the same fields; the factor that is missing
goes into the scale or, where a scale would overflow, into the accumulator. Every operand is exact in bf16 and sums
are fp32. Nothing reads a format's name.

Layouts of registers are moved through a load and no further back: what is computed per word reads its own index from
a load, too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Two elements of a word at a time, $1 the word, $2 the factor twice as bf16. bf16x2 products exist from sm_90 on, the
# fused form with -0 everywhere.
_SPLIT = tl.constexpr("{.reg .b32 q, p, t, z; mov.b32 z, 0x80008000; shl.b32 q, $1, 4; prmt.b32 p, q, $1, ")
_EVEN = tl.constexpr("; and.b32 p, p, 0x80708070; fma.rn.bf16x2 $0, p, $2, z;}")
_E2M1 = tl.constexpr("; shl.b32 t, p, 2; and.b32 t, t, 0x01C001C0; and.b32 p, p, z; or.b32 p, p, t; ")
_ONE = tl.constexpr("fma.rn.bf16x2 $0, p, $2, z;}")
_TWO = tl.constexpr("mov.b32 t, 0x7E807E80; fma.rn.bf16x2 p, p, t, z; fma.rn.bf16x2 $0, p, $2, z;}")


@triton.jit
def _float(bf16):
    """The number whose bf16 bits are the low half."""
    return (bf16 << 16).to(tl.float32, bitcast=True)


@triton.jit
def _element(words, factor, AT: tl.constexpr, ELEMENT: tl.constexpr, SCALING: tl.constexpr):
    """Element AT of each word in plain arithmetic: what `_pair` computes."""
    code = words >> (4 * AT)
    if ELEMENT == "e2m1":
        value = _float(((code & 8) << 12) | ((code & 7) << 6))
        if SCALING == "e8m0":
            value *= 2.0**126
    else:
        value = _float(((code & 8) << 12) | ((code & 7) << 4))
    return value * _float(factor)


@triton.jit
def _pair(words, factor, J: tl.constexpr, ELEMENT: tl.constexpr, SCALING: tl.constexpr, PLAIN: tl.constexpr):
    """Elements 2 J and 2 J + 1 of each word, times the factor."""
    if PLAIN:
        first = _element(words, factor, 2 * J, ELEMENT, SCALING)
        second = _element(words, factor, 2 * J + 1, ELEMENT, SCALING)
    else:
        SELECT: tl.constexpr = ("0x4400", "0x5511", "0x6622", "0x7733")[J]
        SCALED: tl.constexpr = _TWO if SCALING == "e8m0" else _ONE
        CODE: tl.constexpr = _SPLIT + SELECT + (_E2M1 + SCALED if ELEMENT == "e2m1" else _EVEN)
        pair = tl.inline_asm_elementwise(CODE, "=r,r,r", [words, factor], tl.int32, is_pure=True, pack=1)
        first = pair.to(tl.int16).to(tl.bfloat16, bitcast=True)
        second = (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, second


@triton.jit
def _quad(words, factor, C: tl.constexpr, ELEMENT: tl.constexpr, SCALING: tl.constexpr, PLAIN: tl.constexpr):
    """Elements 4 C … 4 C + 3 of each word: [...] -> [..., 2, 2]."""
    a, b = _pair(words, factor, 2 * C, ELEMENT, SCALING, PLAIN)
    c, d = _pair(words, factor, 2 * C + 1, ELEMENT, SCALING, PLAIN)
    return tl.join(tl.join(a, c), tl.join(b, d))


# --- scales ----------------------------------------------------------------------------------------------------------
# Factors are bf16 numbers, twice in 32 bits: the scale times a power of two, which `FACTOR` takes back from the sums.


# base + (bits & mask) * times, in two instructions: of a product with one bit the compiler would make a choice.
_ADD = tl.constexpr("{.reg .b32 t; and.b32 t, $2, ")
_ADD_1 = tl.constexpr(_ADD + "1; mad.lo.u32 $0, t, 0x00800080, $1;}")
_ADD_2 = tl.constexpr(_ADD + "2; mad.lo.u32 $0, t, 0x00400040, $1;}")
_ADD_16 = tl.constexpr(_ADD + "16; mad.lo.u32 $0, t, 0x00080008, $1;}")


@triton.jit
def _doubled(factor, bits, BIT: tl.constexpr, PLAIN: tl.constexpr):
    """The factor, times two where bit number BIT is set."""
    if PLAIN:
        return factor + ((bits >> BIT) & 1) * 0x00800080
    else:
        CODE: tl.constexpr = _ADD_1 if BIT == 0 else _ADD_2 if BIT == 1 else _ADD_16
        return tl.inline_asm_elementwise(CODE, "=r,r,r", [factor, bits], tl.int32, is_pure=True, pack=1)


@triton.jit
def _e6m2(stored, at, ROWS: tl.constexpr, NB: tl.constexpr, PLAIN: tl.constexpr):
    """Scale words [ROWS, NB] -> factors of the first and the second half of each code word, [ROWS, NB * 8].

    2**110 times the scale: a level-2 group is a word, a level-3 group half of one. Words i and i + 4 of a block, which
    one thread holds, share a shift by `at`, i = 0 … 3.
    """
    byte = stored & 0xFF
    base = tl.where(byte == 0xFF, 0x7FC07FC0, byte * 0x00200020 + 0x5E805E80)[:, :, None]
    stored = tl.where(byte == 0xFF, 0, stored)[:, :, None]  # twice NaN, by its bits, would be a number
    second, third, third_4 = stored >> (8 + at), stored >> (16 + 2 * at), stored >> (24 + 2 * at)
    low, high = _doubled(base, second, 0, PLAIN), _doubled(base, second, 4, PLAIN)
    left = tl.join(_doubled(low, third, 0, PLAIN), _doubled(high, third_4, 0, PLAIN))
    right = tl.join(_doubled(low, third, 1, PLAIN), _doubled(high, third_4, 1, PLAIN))
    left = tl.permute(left, (0, 1, 3, 2)).reshape([ROWS, NB * 8])
    return left, tl.permute(right, (0, 1, 3, 2)).reshape([ROWS, NB * 8])


@triton.jit
def _e8m0(stored):
    """2**k twice, subnormal at the least k."""
    return tl.where(stored == 0xFF, 0x7FC07FC0, tl.maximum(stored * 0x00800080, 0x00400040))


# The fields of E4M3 moved into those of bf16, then the difference of the biases: * 2**120 * 2**118.
_E4M3 = tl.constexpr(
    "{.reg .b32 t, s, z; mov.b32 z, 0x80008000; and.b32 t, $1, 0x7F; mul.lo.u32 t, t, 0x00100010; "
    "mul.lo.u32 s, $1, 0x01000100; and.b32 s, s, z; or.b32 t, t, s; mov.b32 s, 0x7B807B80; "
    "fma.rn.bf16x2 t, t, s, z; mov.b32 s, 0x7A807A80; fma.rn.bf16x2 $0, t, s, z;}"
)


@triton.jit
def _e4m3(stored, PLAIN: tl.constexpr):
    """2**118 times the scale, twice."""
    if PLAIN:
        value = _float(((stored & 0x80) << 8) | ((stored & 0x7F) << 4)) * 2.0**120 * 2.0**118
        bits = (value.to(tl.int32, bitcast=True) >> 16) & 0xFFFF
        bits = bits | (bits << 16)
    else:
        bits = tl.inline_asm_elementwise(_E4M3, "=r,r", [stored], tl.int32, is_pure=True, pack=1)
    return tl.where((stored & 0x7F) == 0x7F, 0x7FC07FC0, bits)


@triton.jit
def _factors(
    stored,
    at,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    SCALING: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Scales [ROWS, BK // UNIT] as they are loaded -> factors of both halves of each code word, [ROWS, BK // 8].

    UNIT: elements under what is loaded at once: one scale, or four bytes of them in a word.
    """
    if SCALING == "e6m2":
        return _e6m2(stored, at, ROWS, BK // UNIT, PLAIN)
    else:
        NB: tl.constexpr = BK // BLOCK
        if UNIT > BLOCK:
            stored = ((stored[:, :, None] >> (8 * at)) & 0xFF).reshape([ROWS, NB])
        stored = stored.to(tl.int32)
        factor = _e8m0(stored) if SCALING == "e8m0" else _e4m3(stored, PLAIN)
        factor = tl.broadcast_to(factor[:, :, None], [ROWS, NB, BLOCK // 8]).reshape([ROWS, BK // 8])
        return factor, factor


@triton.jit
def _loaded(pointer, never, SIZE: tl.constexpr):
    """0, 1, … from a load that reads no memory: the compiler moves a layout back to loads, not to a range."""
    at = tl.arange(0, SIZE)
    return tl.load(pointer + at, mask=at < never, other=at)


# --- results ---------------------------------------------------------------------------------------------------------
# The weight of a gated activation holds N / 2 rows of its gate, then as many of what the gate multiplies. Tiles take
# eight rows from the one and eight from the other in turn: both parts of an output are sums of one thread.


@triton.jit
def row_at(place, N, GATED: tl.constexpr):
    """The weight's row that stands at a place of the tiles; behind the last one, the last."""
    if GATED:
        output = place // 16 * 8 + place % 8
        return tl.minimum(output, N // 2 - 1) + place // 8 % 2 * (N // 2)
    else:
        return tl.minimum(place, N - 1)


@triton.jit
def _gated(acc, ACTIVATE: tl.constexpr):
    """Sums [n, m] in the order of `row_at` -> the outputs [n / 2, m]."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    gate, up = tl.split(tl.permute(acc.reshape([ROWS // 16, 2, 8, COLUMNS]), (0, 2, 3, 1)))
    return (ACTIVATE(gate) * up).reshape([ROWS // 2, COLUMNS])


@triton.jit
def _write(
    acc,
    m,
    start,
    M,
    N,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    FACTOR: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Scale sums [n, m] of the places from `start` on, add the bias, apply activation and factor, store them to y."""
    acc *= FACTOR
    if a_ts_ptr is not None:
        acc *= tl.load(a_ts_ptr)
    if b_ts_ptr is not None:
        acc *= tl.load(b_ts_ptr)
    n = start + tl.arange(0, acc.shape[0])
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row_at(n, N, GATED)).to(tl.float32)[:, None]
    if GATED:
        acc = _gated(acc, ACTIVATE)
        n = start // 2 + tl.arange(0, acc.shape[0])
        N = N // 2
    elif ACTIVATE is not None:
        acc = ACTIVATE(acc)
    inside = (n < N)[:, None] & (m < M)[None, :]
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + m.to(tl.int64)[None, :] * N + n[:, None], inside, 0.0).to(tl.float32)
    tl.store(y_ptr + m.to(tl.int64)[None, :] * N + n[:, None], acc.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def activate(
    x_ptr,
    factor_ptr,
    y_ptr,
    outputs,
    x_stride,
    BLOCK: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
):
    """The activation of rows of x, each of `outputs` or, gated, twice as many, times the factor: y [rows, outputs]."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < outputs
    x = tl.load(x_ptr + row * x_stride + at, inside, 0.0).to(tl.float32)
    if ACTIVATE is not None:
        x = ACTIVATE(x)
    if GATED:
        x *= tl.load(x_ptr + row * x_stride + outputs + at, inside, 0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + row * outputs + at, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + row * outputs + at, x.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _finish(
    acc,
    m,
    start,
    M,
    N,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    partial_ptr,
    counts_ptr,
    ROWS: tl.constexpr,
    BM: tl.constexpr,
    PARTS: tl.constexpr,
    FACTOR: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write a tile. Of several parts of K, the program that is done last adds all of them, always in the same order.

    Counts are zero before and after: the last program leaves them so for the next launch.
    """
    if PARTS == 1:
        _write(acc, m, start, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, FACTOR, ACTIVATE, GATED)
    else:
        tiles = tl.num_programs(0) * tl.num_programs(1)
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        at = (
            partial_ptr + tile.to(tl.int64) * (ROWS * BM) + tl.arange(0, ROWS)[:, None] * BM + tl.arange(0, BM)[None, :]
        )
        stride = tiles.to(tl.int64) * (ROWS * BM)
        tl.store(at + tl.program_id(2) * stride, acc)
        tl.debug_barrier()  # every thread's part is stored before one thread counts it
        if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") == PARTS - 1:
            acc = tl.load(at, cache_modifier=".cg")
            for part in tl.static_range(1, PARTS):
                acc += tl.load(at + part * stride, cache_modifier=".cg")
            _write(acc, m, start, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, FACTOR, ACTIVATE, GATED)
            tl.store(counts_ptr + tile, 0)


# --- kernels ---------------------------------------------------------------------------------------------------------


# The order of a contraction on registers: pairs of each of four neighbouring words, which lie in four threads, so that
# a thread's pairs lie where mma.sync reads them. How many elements of a thread Triton wants beside each other follows
# from the narrowest type that is loaded: four, and eight where that is 8 bits, of scales alone. From 3.8 on it is two.
_PAIRS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))


@triton.jit
def _ordered_left(w, ROWS: tl.constexpr, COLS: tl.constexpr, BK: tl.constexpr, BESIDE: tl.constexpr):
    """[ROWS, COLS, word, j % 2, element of a pair, j // 2] -> [ROWS, COLS, BK]."""
    if BESIDE == 2:
        w = tl.permute(w.reshape([ROWS, COLS, BK // 32, 4, 2, 2, 2]), (0, 1, 2, 4, 6, 3, 5))
    elif BESIDE == 8:
        w = tl.permute(w.reshape([ROWS, COLS, BK // 64, 2, 4, 2, 2, 2]), (0, 1, 2, 5, 4, 3, 7, 6))
    else:
        w = tl.permute(w.reshape([ROWS, COLS, BK // 32, 4, 2, 2, 2]), (0, 1, 2, 4, 3, 6, 5))
    return w.reshape([ROWS, COLS, BK])


@triton.jit
def _ordered_right(x, ROWS: tl.constexpr, TOKENS: tl.constexpr, BK: tl.constexpr, BESIDE: tl.constexpr):
    """[ROWS, run of 32, TOKENS, 32] -> [ROWS, BK, TOKENS]."""
    if BESIDE == 2:
        x = tl.permute(x.reshape([ROWS, BK // 32, TOKENS, 4, 2, 2, 2]), (0, 1, 5, 4, 3, 6, 2))
    elif BESIDE == 8:
        x = tl.permute(x.reshape([ROWS, BK // 64, 2, TOKENS, 4, 2, 2, 2]), (0, 1, 6, 4, 2, 5, 7, 3))
    else:
        x = tl.permute(x.reshape([ROWS, BK // 32, TOKENS, 4, 2, 2, 2]), (0, 1, 5, 3, 4, 6, 2))
    return x.reshape([ROWS, BK, TOKENS])


@triton.jit
def _group(tile, ends_ptr, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile of BM tokens, the tile's first token and the expert's end; the same if no expert has it."""
    SIZE: tl.constexpr = triton.next_power_of_2(EXPERTS)
    expert = tl.arange(0, SIZE)
    ends = tl.load(ends_ptr + expert, expert < EXPERTS, 0)
    starts = tl.load(ends_ptr + expert - 1, (expert > 0) & (expert < EXPERTS), 0)
    tiles = (ends - starts + BM - 1) // BM
    behind = tl.cumsum(tiles, 0)
    has = (tile < behind) & (tile >= behind - tiles)
    number = tl.sum(tl.where(has, expert, 0)).to(tl.int64)
    first = tl.sum(tl.where(has, starts + (tile - behind + tiles) * BM, 0))
    return number, first, tl.sum(tl.where(has, ends, 0))


@triton.jit(do_not_specialize=["M", "steps"])
def few_tokens(
    x_ptr,
    codes_ptr,
    scales_ptr,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    partial_ptr,
    counts_ptr,
    ends_ptr,
    M,
    N,
    K,
    x_stride,
    units,
    steps,
    GROUPS: tl.constexpr,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    TOKENS: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    FACTOR: tl.constexpr,
    PLAIN: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """GROUPS * BN outputs of BM tokens over one of PARTS parts of K; a warp contracts BN rows over one of SLICES of it.

    TOKENS are read and repeated up to BM: one token need not take the room of eight. Of EXPERTS (0: none) each has a
    weight, and tokens up to its end, which tiles do not cross.
    """
    KW: tl.constexpr = BK // 8
    UNITS: tl.constexpr = BK // UNIT
    WARPS: tl.constexpr = GROUPS * SLICES
    words = units * (UNIT // 8)
    warp = tl.arange(0, WARPS)[:, None, None]
    start = tl.program_id(0) * (GROUPS * BN)
    begin = tl.program_id(1) * BM
    if EXPERTS > 0:
        expert, begin, M = _group(tl.program_id(1), ends_ptr, BM, EXPERTS)
        codes_ptr += expert * N * words
        scales_ptr += expert * ((N + EDGE - 1) // EDGE) * units
        if not PLAIN:
            steps = tl.where(begin < M, steps, 0)  # there may be fewer tiles than programs
    m = begin + tl.arange(0, BM)
    token = begin + tl.arange(0, TOKENS)[None, None, :, None]
    row = start + warp // SLICES * BN + tl.arange(0, BN)[None, :, None]
    row = row_at(row, N, GATED).to(tl.int64)
    step = (tl.program_id(2) * SLICES + warp % SLICES) * steps
    word = step * KW + tl.arange(0, KW)[None, None, :]
    block = step * UNITS + tl.arange(0, UNITS)[None, None, :]
    # x as [slice, run of 32, token, element]: rows of 64 bytes, which neighbouring threads read from different banks.
    slice_of_k = (tl.program_id(2) * SLICES + tl.arange(0, SLICES))[:, None, None, None]
    run = tl.arange(0, BK // 32)[None, :, None, None]
    k = slice_of_k * steps * BK + 32 * run + tl.arange(0, 32)[None, None, None, :]
    codes_at = codes_ptr + row * words + word
    scales_at = scales_ptr + row // EDGE * units + block
    x_at = x_ptr + token.to(tl.int64) * x_stride + k
    tokens = token < M
    at = _loaded(codes_ptr, -units, 4)[None, None, :]
    BESIDE: tl.constexpr = 2 if _PAIRS else 8 if UNIT < 64 and BLOCK == UNIT else 4
    acc = tl.zeros([WARPS, BN, BM], tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        if EVEN:
            codes, stored, x = tl.load(codes_at), tl.load(scales_at), tl.load(x_at, tokens, 0.0)
        else:
            codes, stored = tl.load(codes_at, word < words, 0), tl.load(scales_at, block < units, 0)
            x = tl.load(x_at, tokens & (k < K), 0.0)
            word, block, k = word + KW, block + UNITS, k + BK
        left, right = _factors(stored.reshape([WARPS * BN, UNITS]), at, WARPS * BN, BK, BLOCK, UNIT, SCALING, PLAIN)
        first = _quad(codes, left.reshape([WARPS, BN, KW]), 0, ELEMENT, SCALING, PLAIN)
        second = _quad(codes, right.reshape([WARPS, BN, KW]), 1, ELEMENT, SCALING, PLAIN)
        w = _ordered_left(tl.join(first, second), WARPS, BN, BK, BESIDE)
        x = _ordered_right(x.to(w.dtype), SLICES, TOKENS, BK, BESIDE)[None, :, :, None, :]
        x = tl.broadcast_to(x, [GROUPS, SLICES, BK, BM // TOKENS, TOKENS]).reshape([WARPS, BK, BM])
        acc = tl.dot(w, x, acc, "ieee")
        codes_at += KW
        scales_at += UNITS
        x_at += BK
    acc = tl.sum(acc.reshape([GROUPS, SLICES, BN, BM]), axis=1).reshape([GROUPS * BN, BM])
    _finish(
        acc, m, start, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, partial_ptr, counts_ptr,
        GROUPS * BN, BM, PARTS, FACTOR, ACTIVATE, GATED,
    )  # fmt: skip


@triton.jit
def _arranged(x, ROWS: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr):
    """x [ROWS, BK] in the order of a contraction on registers, by the columns that it reorders together.

    64 (`many_tokens`): pair j of all words, j = 0 … 3. 128 (`overlapped`), where a thread holds four words: pair j of
    the first two words of four threads, j = 0 … 3, then of the other two.
    """
    if RUN == 64:
        x = tl.permute(x.reshape([ROWS, BK // 64, 8, 4, 2]), (0, 1, 3, 2, 4))
    else:
        x = tl.permute(x.reshape([ROWS, BK // 128, 4, 2, 2, 2, 4]), (0, 1, 3, 6, 4, 2, 5))
    return x.reshape([ROWS, BK])


@triton.jit(do_not_specialize=["M"])
def arrange(
    x_ptr,
    out_ptr,
    M,
    K,
    x_stride,
    padded,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    RUN: tl.constexpr,
    OVERLAP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x [M, K] -> out [M, padded] in the order of `_arranged`, zeros past K.

    What comes after may start early (OVERLAP), and this kernel, too (EARLY).
    """
    if OVERLAP:
        gdc_launch_dependents()
    if EARLY:
        gdc_wait()
    k = tl.program_id(0) * BK + tl.arange(0, BK)[None, :]
    m = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    x = tl.load(x_ptr + m.to(tl.int64) * x_stride + k, (m < M) & (k < K), 0.0)
    tl.store(out_ptr + m.to(tl.int64) * padded + k, _arranged(x, ROWS, BK, RUN), (m < M) & (k < padded))


@triton.jit(do_not_specialize=["M", "steps"])
def many_tokens(
    x_ptr,
    codes_ptr,
    scales_ptr,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    partial_ptr,
    counts_ptr,
    M,
    N,
    K,
    x_stride,
    units,
    steps,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    EDGE: tl.constexpr,
    SCALING: tl.constexpr,
    ELEMENT: tl.constexpr,
    FACTOR: tl.constexpr,
    PLAIN: tl.constexpr,
    ACTIVATE: tl.constexpr,
    GATED: tl.constexpr,
):
    """BN outputs of BM tokens over one of PARTS parts of K."""
    KW: tl.constexpr = BK // 8
    UNITS: tl.constexpr = BK // UNIT
    words = units * (UNIT // 8)
    part = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    start = tl.program_id(1) * BN
    row = row_at(start + tl.arange(0, BN), N, GATED).to(tl.int64)[:, None]
    word = part * steps * KW + tl.arange(0, KW)[None, :]
    block = part * steps * UNITS + tl.arange(0, UNITS)[None, :]
    k = part * steps * BK + tl.arange(0, BK)[None, :]
    codes_at = codes_ptr + row * words + word
    scales_at = scales_ptr + row // EDGE * units + block
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + k
    tokens = (m < M)[:, None]
    at = _loaded(codes_ptr, -units, 4)[None, None, :]
    if OVERLAP:
        gdc_wait()
    acc = tl.zeros([BN, BM], tl.float32)
    for _ in tl.range(0, steps, num_stages=STAGES):
        if EVEN:
            codes, stored, x = tl.load(codes_at), tl.load(scales_at), tl.load(x_at, tokens, 0.0)
        else:
            codes, stored = tl.load(codes_at, word < words, 0), tl.load(scales_at, block < units, 0)
            x = tl.load(x_at, tokens & (k < K), 0.0)
            word, block, k = word + KW, block + UNITS, k + BK
        left, right = _factors(stored, at, BN, BK, BLOCK, UNIT, SCALING, PLAIN)
        first = _quad(codes, left, 0, ELEMENT, SCALING, PLAIN)
        second = _quad(codes, right, 1, ELEMENT, SCALING, PLAIN)
        # [BN, word, j % 2, element of a pair, j // 2] -> [BN, run of 64, j, word, element]
        w = tl.permute(tl.join(first, second).reshape([BN, BK // 64, 8, 2, 2, 2]), (0, 1, 5, 3, 2, 4))
        w = w.reshape([BN, BK])
        acc = tl.dot(w, tl.permute(x.to(w.dtype), (1, 0)), acc, "ieee")
        if not PLAIN:
            # A use of the sums: products that are in flight from one iteration to the next would be made to wait for
            # one another, each for the last.
            acc = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], tl.float32, is_pure=True, pack=1)
        codes_at += KW
        scales_at += UNITS
        x_at += BK
    _finish(
        acc, m, start, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, partial_ptr, counts_ptr,
        BN, BM, PARTS, FACTOR, ACTIVATE, GATED,
    )  # fmt: skip
