# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""Triton kernel of packed E2M1 codes as FP8 in rows, exact: what `fp4compile.rowwise` says of values, scales and flags.

    decode    codes [N, K/2], scales [N, K/block]  ->  values E4M3 [N, K], scale [N], exponents [K/block, N], flags

A row's window ends at its largest exponent, which all its scales are read for: fifteen binades below it are held, where
a sample of a tensor that is quantised has to leave some above it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fp4compile.backends.triton.arithmetic import from_bits, pow2
from fp4compile.rowwise import FLAGGED, MOST, WINDOWS

_HELD = WINDOWS[torch.float8_e4m3fn]
_ABOVE, _BELOW = tl.constexpr(_HELD.above), tl.constexpr(_HELD.below)
_MOST, _FLAGGED = tl.constexpr(MOST), tl.constexpr(FLAGGED)
_NAN = tl.constexpr(255)  # of E8M0


@triton.jit
def _elements(words):
    """E2M1 codes, eight to a word, as fp32 numbers of the same fields, 2**126 times as small: [..., 8]."""
    code = words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]
    return from_bits(((code & 7) << 22) | ((code & 8) << 28))


@triton.jit
def decode(
    words_ptr,
    scales_ptr,
    values_ptr,
    scale_ptr,
    exponents_ptr,
    flags_ptr,
    rows,
    BLOCKS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """The rows of one flag: BLOCKS blocks each, STEP of them at a time. EDGE rows share a scale."""
    WORDS: tl.constexpr = BLOCK // 8
    row = tl.program_id(0) * _FLAGGED + tl.arange(0, _FLAGGED)
    scales_at = scales_ptr + (row // EDGE).to(tl.int64)[:, None] * BLOCKS
    words_at = words_ptr + row.to(tl.int64)[:, None] * (BLOCKS * WORDS)
    values_at = values_ptr + row.to(tl.int64)[:, None] * (BLOCKS * BLOCK)
    inside_rows = (row < rows)[:, None]
    most = tl.zeros([_FLAGGED], tl.int32)
    for start in range(0, BLOCKS, STEP):
        block = start + tl.arange(0, STEP)[None, :]
        stored = tl.load(scales_at + block, inside_rows & (block < BLOCKS), 0).to(tl.int32)
        most = tl.maximum(most, tl.max(tl.where(stored == _NAN, 0, stored), axis=1))
    window = tl.minimum(tl.maximum(most - 127 - _ABOVE, -_MOST), _MOST)
    tl.store(scale_ptr + row, pow2(window), row < rows)
    flagged = tl.zeros([_FLAGGED], tl.int32)
    for start in range(0, BLOCKS, STEP):
        block = start + tl.arange(0, STEP)[None, :]
        there = inside_rows & (block < BLOCKS)
        stored = tl.load(scales_at + block, there, 0).to(tl.int32)
        tl.store(exponents_ptr + block.to(tl.int64) * rows + row[:, None], stored.to(tl.uint8), there)
        word = start * WORDS + tl.arange(0, STEP * WORDS)[None, :]
        words = tl.load(words_at + word, inside_rows & (word < BLOCKS * WORDS), 0)
        shift = stored - 127 - window[:, None]
        inside = (shift >= -_BELOW) & (shift <= _ABOVE)
        bad = stored == _NAN
        factor = tl.where(bad, float("nan"), pow2(63 + tl.where(inside, shift, 0)))
        elements = _elements(words).reshape([_FLAGGED, STEP, BLOCK]) * 2.0**63 * factor[:, :, None]
        values = elements.reshape([_FLAGGED, STEP * BLOCK]).to(values_ptr.dtype.element_ty)
        column = start * BLOCK + tl.arange(0, STEP * BLOCK)[None, :]
        tl.store(values_at + column, values, inside_rows & (column < BLOCKS * BLOCK))
        # A block of zeros is in nobody's way, wherever its exponent lies.
        full = tl.max((words & 0x77777777 != 0).to(tl.int32).reshape([_FLAGGED, STEP, WORDS]), axis=2)
        flagged = tl.maximum(flagged, tl.max(tl.where(inside | bad, 0, full), axis=1))
    tl.store(flags_ptr + tl.program_id(0), tl.max(flagged, axis=0).to(tl.uint8))
