# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Gluon kernel of `mm` on a packed weight for Hopper: the next codes are decoded while wgmma works on the last ones.

    y[m, n] = sum over k of x[m, k] * w[n, k]      codes [N, K/2] as 32-bit words of eight, scales [N, K/block]

`packed_kernels` says how two elements are decoded at once. Here they are elements j and j + 4 of a word, so that a
factor holds the scales of its two halves. A thread takes four neighbouring words of 128 columns, decodes two of them
into the left operand of an asynchronous wgmma, and goes on to the next two while the tensor cores run. x comes by TMA
in the order of `packed_kernels.arrange`, codes and scales by cp.async, all of them ahead of their use.

Programs share all tiles evenly, in units of 256 columns, wherever these lie. A tile of several programs is added by the
last of them, in the order of K.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp4compile.backends.triton import activation_kernels
from fp4compile.backends.triton.packed_kernels import _E2M1, _E4M3, _EVEN, _ONE, _TWO, row_at

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its names of Triton 3.7 and 3.6
_COLUMNS = gl.constexpr(256)  # of a unit: two steps of 128
_row_at = gluon.jit(row_at.fn)
FUNCTIONS = {name: gluon.jit(function.fn) for name, function in activation_kernels.FUNCTIONS.items()}


def described(x, tokens):
    """x [M, K] as `overlapped` reads it: so many tokens of a unit at once."""
    return TensorDescriptor.from_tensor(x, [tokens, _COLUMNS.value], gl.NVMMASharedLayout(128, 16, 2))


@gluon.constexpr_function
def _warps(warps, *rest):
    """Bases of warps: 16 rows each."""
    return [[16 << i, *rest] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _of_words(rows, warps):
    """Layout of a unit's codes [rows, 32 words]: of either step a thread holds four neighbouring words of two rows."""
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 16], [8, 0]], lanes, _warps(warps, 0), [], [rows, 32])


@gluon.constexpr_function
def _of_scales(rows, warps, each):
    """Layout of a unit's scales [rows, 2 * each]: those of the words that a thread holds.

    Where two threads share a scale, the layout is that of [rows, scale, thread] without its last axis.
    """
    if each == 2:
        lanes = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
        shape = [rows, 4, 2]
        return gl.SliceLayout(
            2, gl.DistributedLinearLayout([[0, 2, 0], [8, 0, 0]], lanes, _warps(warps, 0, 0), [], shape)
        )
    own = [*([[0, 1]] if each == 8 else []), [0, each], [8, 0]]
    lanes = [[0, each // 4], [0, each // 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(own, lanes, _warps(warps, 0), [], [rows, 2 * each])


@gluon.constexpr_function
def _copied(words, warps):
    """Layout that copies words [rows, words], 16 bytes a thread where there are as many."""
    each = min(words, 4)
    return gl.BlockedLayout([1, each], [32 * each // words, words // each], [warps, 1], [1, 0])


@gluon.constexpr_function
def _of_threads(rows, warps):
    """Layout of one value [rows, thread of a row]."""
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0]], lanes, _warps(warps, 0), [], [rows, 4])


@gluon.constexpr_function
def _sums(tokens, warps):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, tokens, 16])


@gluon.constexpr_function
def _output(rows, warps):
    """Layout that writes eight neighbouring outputs of a token in a thread."""
    along = rows // 8
    return gl.BlockedLayout([8, 1], [along, 32 // along], [1, warps], [0, 1])


@gluon.constexpr_function
def _decoded(pair, element, scaling):
    """Assembly of elements `pair` and `pair` + 4 of a word $1, times the two halves of $2."""
    split = ".reg .b32 q, p, t, z; mov.b32 z, 0x80008000; "
    split += "mov.b32 q, $1; " if pair % 2 else "shl.b32 q, $1, 4; "
    split += f"prmt.b32 p, q, q, {('0x2200', '0x3311')[pair // 2]}"
    scaled = _TWO.value if scaling == "e8m0" else _ONE.value
    return "{" + split + (_E2M1.value + scaled if element == "e2m1" else _EVEN.value)


@gluon.jit
def _pair(words, factor, J: gl.constexpr, ELEMENT: gl.constexpr, SCALING: gl.constexpr):
    """Elements J and J + 4 of each word, times the two halves of the factor: [rows, 4] -> [rows, 4, 2]."""
    CODE: gl.constexpr = _decoded(J, ELEMENT, SCALING)
    pair = gl.inline_asm_elementwise(CODE, "=r,r,r", [words, factor], gl.int32, is_pure=True, pack=1)
    first = pair.to(gl.int16).to(gl.bfloat16, bitcast=True)
    second = (pair >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return gl.join(first, second)


@gluon.jit
def _words_factor(base, levels, AT: gl.constexpr, SCALING: gl.constexpr):
    """Factors of both halves of word AT of a thread, from `_scaled`."""
    if SCALING == "e6m2":
        return base + (levels & (0x00030003 << 2 * AT)) * (0x80 >> 2 * AT)
    elif SCALING == "e4m3":
        return base if AT < 2 else levels
    else:
        return base


@gluon.jit
def _of_steps(stored, ROWS: gl.constexpr, EACH: gl.constexpr):
    """A unit's scales as they are loaded -> those of either step: [rows, 4 threads] or, of eight, [rows, 4, 2]."""
    if EACH == 8:
        return gl.split(gl.permute(stored.reshape([ROWS, 2, 4, 2]), (0, 2, 3, 1)))
    else:
        if EACH == 2:
            stored = stored[:, :, None].broadcast_to([ROWS, 4, 2])
        return gl.split(gl.permute(stored.reshape([ROWS, 2, 4]), (0, 2, 1)))


@gluon.jit
def _scaled(stored, ROWS: gl.constexpr, WARPS: gl.constexpr, SCALING: gl.constexpr):
    """Scales of 128 columns -> the factor of a thread's words, and what is left to do for each of them.

    E6M2: how often each half of each word is doubled, two bits each, the left halves in the low 16 bits. E4M3: the
    factor of the last two words.
    """
    LAYOUT: gl.constexpr = _of_threads(ROWS, WARPS)
    if SCALING == "e6m2":
        stored = gl.convert_layout(stored, LAYOUT, assert_trivial=True)
        byte = stored & 0xFF
        base = gl.where(byte == 0xFF, 0x7FC07FC0, byte * 0x00200020 + 0x5E805E80)
        half = (gl.arange(0, 4, gl.SliceLayout(0, LAYOUT)) & 1)[None, :]
        second, third = stored >> (8 + 4 * half), stored >> (16 + 8 * half)
        second = ((second & 15) | (second << 2)) & 0x33
        second = (second | (second << 1)) & 0x55
        levels = second * 0x00010001 + ((third & 0x55) | ((third << 15) & 0x00550000))
        return base, gl.where(byte == 0xFF, 0, levels)
    elif SCALING == "e8m0":
        stored = gl.convert_layout(stored, LAYOUT, assert_trivial=True).to(gl.int32)
        factor = gl.where(stored == 0xFF, 0x7FC07FC0, gl.maximum(stored * 0x00800080, 0x00400040))
        return factor, factor
    else:
        first, second = gl.split(stored)
        return _e4m3(first, LAYOUT), _e4m3(second, LAYOUT)


@gluon.jit
def _e4m3(stored, LAYOUT: gl.constexpr):
    stored = gl.convert_layout(stored, LAYOUT, assert_trivial=True).to(gl.int32)
    bits = gl.inline_asm_elementwise(_E4M3.value, "=r,r", [stored], gl.int32, is_pure=True, pack=1)
    return gl.where((stored & 0x7F) == 0x7F, 0x7FC07FC0, bits)


@gluon.jit
def _word(words, base, levels, AT: gl.constexpr, ELEMENT: gl.constexpr, SCALING: gl.constexpr):
    """Word AT of each thread -> [rows, 4, 2 (half of the word), 2 (pair // 2), 2 (pair % 2)]."""
    factor = _words_factor(base, levels, AT, SCALING)
    even = gl.join(_pair(words, factor, 0, ELEMENT, SCALING), _pair(words, factor, 2, ELEMENT, SCALING))
    odd = gl.join(_pair(words, factor, 1, ELEMENT, SCALING), _pair(words, factor, 3, ELEMENT, SCALING))
    return gl.join(even, odd)


@gluon.jit
def _half(
    words,
    base,
    levels,
    HALF: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    BM: gl.constexpr,
    ELEMENT: gl.constexpr,
    SCALING: gl.constexpr,
):
    """Words 2 HALF and 2 HALF + 1 of each thread [rows, 4, 2] -> a left operand [rows, 64]."""
    LAYOUT: gl.constexpr = _of_threads(ROWS, WARPS)
    first, second = gl.split(words)
    first = _word(gl.convert_layout(first, LAYOUT, assert_trivial=True), base, levels, 2 * HALF, ELEMENT, SCALING)
    second = _word(gl.convert_layout(second, LAYOUT, assert_trivial=True), base, levels, 2 * HALF + 1, ELEMENT, SCALING)
    w = gl.permute(gl.join(first, second), (0, 3, 4, 5, 1, 2)).reshape([ROWS, 64])
    return gl.convert_layout(w, gl.DotOperandLayout(0, _sums(BM, WARPS), 2), assert_trivial=True)


@gluon.jit
def _copy(at, to, column, end, wanted, EVEN: gl.constexpr):
    """Start a copy of words from global to shared memory, without those past the end of a row."""
    if EVEN:
        async_copy.async_copy_global_to_shared(to, at, wanted)
    else:
        async_copy.async_copy_global_to_shared(to, at, (column < end) & wanted)


@gluon.jit
def _gated(acc, ROWS: gl.constexpr, BM: gl.constexpr, ACTIVATE: gl.constexpr):
    """Sums [n, m] in the order of `row_at` -> the outputs [n / 2, m]."""
    gate, up = gl.split(gl.permute(acc.reshape([ROWS // 16, 2, 8, BM]), (0, 2, 3, 1)))
    return (ACTIVATE(gate) * up).reshape([ROWS // 2, BM])


@gluon.jit
def _write(
    acc,
    m,
    n,
    M,
    N,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    ROWS: gl.constexpr,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    FACTOR: gl.constexpr,
    ACTIVATE: gl.constexpr,
    GATED: gl.constexpr,
):
    """Scale sums [n, m], add the bias, apply activation and factor and store them to y [M, N]."""
    SUMS: gl.constexpr = _sums(BM, WARPS)
    acc *= FACTOR
    if a_ts_ptr is not None:
        acc *= gl.load(a_ts_ptr)
    if b_ts_ptr is not None:
        acc *= gl.load(b_ts_ptr)
    if bias_ptr is not None:
        at = n + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
        acc += gl.load(bias_ptr + _row_at(at, N, GATED)).to(gl.float32)[:, None]
    if GATED:
        acc = _gated(acc, ROWS, BM, ACTIVATE)
        n, N = n // 2, N // 2
    elif ACTIVATE is not None:
        acc = ACTIVATE(acc)
    OUTPUTS: gl.constexpr = acc.shape[0]
    DIRECT: gl.constexpr = y_ptr.dtype.element_ty.primitive_bitwidth == 32 and not GATED
    OUT: gl.constexpr = SUMS if DIRECT else _output(OUTPUTS, WARPS)
    if factor_ptr is not None:
        row = n + gl.arange(0, OUTPUTS, gl.SliceLayout(1, OUT))[:, None]
        token = m + gl.arange(0, BM, gl.SliceLayout(0, OUT))[None, :]
        factor = gl.load(factor_ptr + token.to(gl.int64) * N + row, (row < N) & (token < M), 0.0)
        acc = gl.convert_layout(acc, OUT) * factor.to(gl.float32)
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), OUT)
    n = n + gl.arange(0, OUTPUTS, gl.SliceLayout(1, OUT))[:, None]
    m = m + gl.arange(0, BM, gl.SliceLayout(0, OUT))[None, :]
    gl.store(y_ptr + m.to(gl.int64) * N + n, y, (n < N) & (m < M))


@gluon.jit
def _finish(
    acc,
    tile,
    units,
    begins,
    ends,
    m,
    n,
    M,
    N,
    y_ptr,
    bias_ptr,
    a_ts_ptr,
    b_ts_ptr,
    factor_ptr,
    partial_ptr,
    counts_ptr,
    total,
    ROWS: gl.constexpr,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    FACTOR: gl.constexpr,
    ACTIVATE: gl.constexpr,
    GATED: gl.constexpr,
):
    """Write a tile. Of several programs of a tile, the one that is done last adds their sums, in the order of K.

    Counts are zero before and after: the last program leaves them so for the next launch.
    """
    if partial_ptr is None:  # noqa: SIM114 - known when it is compiled, unlike the next
        _write(
            acc, m, n, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, ROWS, BM, WARPS, FACTOR, ACTIVATE, GATED
        )
    elif begins & ends:
        _write(
            acc, m, n, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr, factor_ptr, ROWS, BM, WARPS, FACTOR, ACTIVATE, GATED
        )
    else:
        SUMS: gl.constexpr = _sums(BM, WARPS)
        programs = gl.num_programs(0)
        first = ((tile * units + 1) * programs - 1) // total
        last = ((tile + 1) * units * programs - 1) // total
        at = (
            gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None] * BM
            + gl.arange(0, BM, gl.SliceLayout(0, SUMS))[None, :]
        )
        mine = 2 * gl.program_id(0) + begins.to(gl.int32)
        gl.store(partial_ptr + mine.to(gl.int64) * (ROWS * BM) + at, acc)
        _barrier()  # every thread's part is stored before one thread counts it
        if gl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") == last - first:
            acc = gl.load(partial_ptr + (2 * first + 1).to(gl.int64) * (ROWS * BM) + at, cache_modifier=".cg")
            AHEAD: gl.constexpr = 4 if BM <= 32 else 2 if BM == 64 else 1  # parts on the way at once
            for other in range(first + 1, last + 1, AHEAD):
                for j in gl.static_range(AHEAD):
                    from_other = partial_ptr + (2 * (other + j)).to(gl.int64) * (ROWS * BM) + at
                    acc += gl.load(from_other, other + j <= last, 0.0, cache_modifier=".cg")
            _write(
                acc,
                m,
                n,
                M,
                N,
                y_ptr,
                bias_ptr,
                a_ts_ptr,
                b_ts_ptr,
                factor_ptr,
                ROWS,
                BM,
                WARPS,
                FACTOR,
                ACTIVATE,
                GATED,
            )
            gl.store(counts_ptr + tile, 0)


@gluon.jit
def _unit(codes, scales, slot, ROWS: gl.constexpr, WARPS: gl.constexpr, EACH: gl.constexpr, SCALING: gl.constexpr):
    """Codes and scales of both steps of a unit, from shared memory."""
    stored = scales.index(slot)
    if SCALING != "e6m2":
        stored = stored._reinterpret(gl.uint8, [ROWS, 2 * EACH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    first_s, second_s = _of_steps(stored.load(_of_scales(ROWS, WARPS, EACH)), ROWS, EACH)
    words = codes.index(slot).load(_of_words(ROWS, WARPS))
    first, second = gl.split(gl.permute(words.reshape([ROWS, 2, 4, 2, 2]), (0, 2, 4, 3, 1)))
    return first, first_s, second, second_s


@gluon.jit(do_not_specialize=["M", "units", "total"])
def overlapped(
    x_desc,
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
    words,
    scale_words,
    units,
    total,
    BN: gl.constexpr,
    BM: gl.constexpr,
    WARPS: gl.constexpr,
    STAGES: gl.constexpr,
    EVEN: gl.constexpr,
    BLOCK: gl.constexpr,
    EDGE: gl.constexpr,
    SCALING: gl.constexpr,
    ELEMENT: gl.constexpr,
    FACTOR: gl.constexpr,
    ACTIVATE: gl.constexpr,
    GATED: gl.constexpr,
):
    """A program's share of `total` units: tiles of BN outputs of BM tokens, `units` each.

    Args:
        words, scale_words: 32-bit words of a row of codes and of scales.
    """
    EACH: gl.constexpr = 128 // BLOCK  # scales of a row and step
    WORDS: gl.constexpr = _COLUMNS // 8  # of a row and unit; of scales, too
    SCALES: gl.constexpr = 2 * EACH if SCALING == "e6m2" else EACH // 2
    COPIED: gl.constexpr = _copied(WORDS, WARPS)
    COPIED_S: gl.constexpr = _copied(SCALES, WARPS)
    x = gl.allocate_shared_memory(gl.bfloat16, [2, BM, _COLUMNS], x_desc.layout)
    # Of rows of 128 bytes halves change places in every other: eight threads that read two rows use all banks.
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, BN, WORDS], gl.SwizzledSharedLayout(16, 1, 2, [1, 0]))
    scales = gl.allocate_shared_memory(gl.int32, [STAGES, BN, SCALES], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(ready.index(1), count=1)
    row = gl.arange(0, BN, gl.SliceLayout(1, COPIED))[:, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, COPIED))[None, :]
    row_s = gl.arange(0, BN, gl.SliceLayout(1, COPIED_S))[:, None]
    word_s = gl.arange(0, SCALES, gl.SliceLayout(0, COPIED_S))[None, :]
    tiles_m = (M + BM - 1) // BM
    at = gl.program_id(0) * total // gl.num_programs(0)
    stop = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    gdc_wait()
    done = 0
    while at < stop:
        tile = at // units
        begin = at % units
        end = gl.minimum(begin + stop - at, units)
        m = tile % tiles_m * BM
        n = tile // tiles_m * BN
        codes_at = codes_ptr + _row_at(n + row, N, GATED).to(gl.int64) * words + word
        scales_at = scales_ptr + _row_at(n + row_s, N, GATED).to(gl.int64) // EDGE * scale_words + word_s
        stage = done & 1
        mbarrier.expect(ready.index(stage), BM * _COLUMNS * 2)
        tma.async_copy_global_to_shared(x_desc, [m, begin * _COLUMNS], ready.index(stage), x.index(stage))
        for j in gl.static_range(STAGES):
            wanted = begin + j < end
            column, column_s = (begin + j) * WORDS, (begin + j) * SCALES
            _copy(codes_at + column, codes.index(j), column + word, words, wanted, EVEN)
            _copy(scales_at + column_s, scales.index(j), column_s + word_s, scale_words, wanted, EVEN)
            async_copy.commit_group()
        async_copy.wait_group(STAGES - 1)
        _barrier()
        first, first_s, second, second_s = _unit(codes, scales, 0, BN, WARPS, EACH, SCALING)
        base, levels = _scaled(first_s, BN, WARPS, SCALING)
        first_0, first_1 = gl.split(first)
        w = _half(first_0, base, levels, 0, BN, WARPS, BM, ELEMENT, SCALING)
        acc = gl.zeros([BN, BM], gl.float32, _sums(BM, WARPS))
        slot = 0
        for i in range(begin, end):
            async_copy.wait_group(STAGES - 2)
            _barrier()  # the next codes are there; the last ones and the last tokens are read
            stage = done & 1
            following = i + 1 < end
            mbarrier.expect(ready.index(1 - stage), BM * _COLUMNS * 2, following)
            tma.async_copy_global_to_shared(
                x_desc, [m, (i + 1) * _COLUMNS], ready.index(1 - stage), x.index(1 - stage), following
            )
            wanted = i + STAGES < end
            column, column_s = (i + STAGES) * WORDS, (i + STAGES) * SCALES
            _copy(codes_at + column, codes.index(slot), column + word, words, wanted, EVEN)
            _copy(scales_at + column_s, scales.index(slot), column_s + word_s, scale_words, wanted, EVEN)
            async_copy.commit_group()
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            mbarrier.wait(ready.index(stage), (done >> 1) & 1)
            tokens = x.index(stage)
            acc = warpgroup_mma(w, tokens.slice(0, 64, 1).permute((1, 0)), acc, is_async=True)
            v = _half(first_1, base, levels, 1, BN, WARPS, BM, ELEMENT, SCALING)
            acc = warpgroup_mma(v, tokens.slice(64, 64, 1).permute((1, 0)), acc, is_async=True)
            acc, w = warpgroup_mma_wait(1, deps=(acc, w))
            base, levels = _scaled(second_s, BN, WARPS, SCALING)
            second_0, second_1 = gl.split(second)
            w = _half(second_0, base, levels, 0, BN, WARPS, BM, ELEMENT, SCALING)
            acc = warpgroup_mma(w, tokens.slice(128, 64, 1).permute((1, 0)), acc, is_async=True)
            acc, v = warpgroup_mma_wait(1, deps=(acc, v))
            v = _half(second_1, base, levels, 1, BN, WARPS, BM, ELEMENT, SCALING)
            acc = warpgroup_mma(v, tokens.slice(192, 64, 1).permute((1, 0)), acc, is_async=True)
            acc, w = warpgroup_mma_wait(1, deps=(acc, w))
            # The first half of the next unit, while the last product runs.
            first, first_s, second, second_s = _unit(codes, scales, slot, BN, WARPS, EACH, SCALING)
            base, levels = _scaled(first_s, BN, WARPS, SCALING)
            first_0, first_1 = gl.split(first)
            w = _half(first_0, base, levels, 0, BN, WARPS, BM, ELEMENT, SCALING)
            acc, v = warpgroup_mma_wait(0, deps=(acc, v))
            done += 1
        if stop - at == end - begin:
            gdc_launch_dependents()
        _finish(
            acc, tile, units, begin == 0, end == units, m, n, M, N, y_ptr, bias_ptr, a_ts_ptr, b_ts_ptr,
            factor_ptr, partial_ptr, counts_ptr, total, BN, BM, WARPS, FACTOR, ACTIVATE, GATED,
        )  # fmt: skip
        async_copy.wait_group(0)  # zeros too: copies that are not wanted
        _barrier()  # no warp reads the codes of this tile any more
        at += end - begin
