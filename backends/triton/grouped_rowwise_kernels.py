# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""The Triton kernel that makes grouped FP8 GEMMs exact: what read a flagged row is computed again from exponents.

    exact    tokens, weights, ends, out  ->  out, in BF16 products of the FP4 values; zeros behind the last group

Sixteen tokens that share a flag may belong to several experts. Sixteen rows of weights belong to one where the rows of
one expert lie behind those of another (STACKED), else each row has a part for every expert.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fp4compile.backends.triton.arithmetic import INTERPRETED
from fp4compile.backends.triton.rowwise_kernels import _decoded
from fp4compile.rowwise import FLAGGED

_FLAGGED = tl.constexpr(FLAGGED)
# Holds two significant bits under any power of two; the interpreter multiplies bf16 as the integers of its bits.
_OPERAND = tl.constexpr(tl.float32 if INTERPRETED else tl.bfloat16)


@triton.jit
def _end(ends_ptr, group):
    """Where the tokens of a group end; of the group before the first, 0."""
    return tl.load(ends_ptr + group, group >= 0, 0).to(tl.int32)


@triton.jit
def _flags(flags_ptr, first, count, PIECE: tl.constexpr):
    """A piece of the flags, as int32; zeros behind the last."""
    at = first + tl.arange(0, PIECE)
    return tl.load(flags_ptr + at, at < count, 0).to(tl.int32)


@triton.jit
def _any(flags_ptr, count, PIECE: tl.constexpr):
    """1 where a flag is set, else 0."""
    found = tl.zeros([PIECE], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < count:  # not range(): Triton's interpreter cannot count to a tensor
        found |= _flags(flags_ptr, first, count, PIECE)
        first += PIECE
    return tl.max(found, axis=0)


@triton.jit
def _clear_behind(out_ptr, last, tokens, columns, TILE: tl.constexpr):
    """Zeros in the rows of out behind the last group."""
    token = last + tl.program_id(0)
    while token < tokens:
        column = tl.zeros([], tl.int32)
        while column < columns:
            at = column + tl.arange(0, TILE)
            zeros = tl.zeros([TILE], out_ptr.dtype.element_ty)
            tl.store(out_ptr + token.to(tl.int64) * columns + at, zeros, at < columns)
            column += TILE
        token += tl.num_programs(0)


@triton.jit
def _product(
    a_ptr,
    a_scale_ptr,
    a_exponents_ptr,
    b_ptr,
    b_scale_ptr,
    b_exponents_ptr,
    token,
    column,
    group,
    tokens,
    columns,
    blocks,
    groups,
    A: tl.constexpr,
    B: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    STACKED: tl.constexpr,
):
    """A tokens times B columns of the matrix of one group, fp32 [A, B]; STEP divides the number of blocks."""
    if STACKED:
        rows, row, first, length = groups * columns, group * columns + column, group * 0, blocks
    else:
        rows, row, first, length = columns, column, group * blocks, groups * blocks
    total = tl.zeros([A, B], tl.float32)
    block = tl.zeros([], tl.int32)
    while block < blocks:
        left = _decoded(a_ptr, a_scale_ptr, a_exponents_ptr, token, block, tokens, blocks, A, STEP, BLOCK)
        right = _decoded(b_ptr, b_scale_ptr, b_exponents_ptr, row, first + block, rows, length, B, STEP, BLOCK)
        total = tl.dot(left.to(_OPERAND), tl.trans(right.to(_OPERAND)), total)
        block += STEP
    return total


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
    ends_ptr,
    out_ptr,
    counts_ptr,
    tokens,
    columns,
    blocks,
    groups,
    chunks,
    GROUPS: tl.constexpr,
    PIECE_A: tl.constexpr,
    PIECE_B: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    STACKED: tl.constexpr,
):
    """out [tokens, columns] again where a group of rows of a or b is flagged; else only cleared behind the last group.

    `chunks`: of the columns; the programs take chunks and parts in turn. A part is every SPLIT-th flagged group.
    `counts`: GEMMs that had a flag, and all GEMMs. `GROUPS`: a power of two not below `groups`.
    """
    flags_a = tl.cdiv(tokens, _FLAGGED)
    flags_b = tl.cdiv(groups * columns if STACKED else columns, _FLAGGED)
    of_a, of_b = _any(a_flags_ptr, flags_a, PIECE_A), _any(b_flags_ptr, flags_b, PIECE_B)
    if tl.program_id(0) == 0:
        tl.atomic_add(counts_ptr, (of_a | of_b).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.full([], 1, tl.int64))
    _clear_behind(out_ptr, _end(ends_ptr, groups - 1), tokens, columns, TILE)

    if of_a != 0:
        at = tl.arange(0, PIECE_A)
        all_groups = tl.arange(0, GROUPS)
        ends = tl.load(ends_ptr + all_groups, all_groups < groups, 2**31 - 1).to(tl.int32)
        item = tl.program_id(0)
        while item < chunks * SPLIT:
            column = item % chunks * TILE + tl.arange(0, TILE)
            piece = tl.zeros([], tl.int32)
            while piece < flags_a:
                flags = _flags(a_flags_ptr, piece, flags_a, PIECE_A)
                mine = (flags != 0) & (tl.cumsum(flags, 0) % SPLIT == item // chunks)
                flag = tl.min(tl.where(mine, at, PIECE_A), axis=0)
                while flag < PIECE_A:
                    first = (piece + flag) * _FLAGGED
                    token = first + tl.arange(0, _FLAGGED)
                    group = tl.sum((ends <= first).to(tl.int32), axis=0)  # of the first token
                    start = _end(ends_ptr, group - 1)
                    while (group < groups) & (start < first + _FLAGGED):
                        end = _end(ends_ptr, group)
                        if end > start:
                            total = _product(
                                a_ptr, a_scale_ptr, a_exponents_ptr, b_ptr, b_scale_ptr, b_exponents_ptr,
                                token, column, group, tokens, columns, blocks, groups,
                                _FLAGGED, TILE, STEP, BLOCK, STACKED,
                            )  # fmt: skip
                            wanted = ((token >= start) & (token < end))[:, None] & (column < columns)[None, :]
                            index = token.to(tl.int64)[:, None] * columns + column[None, :]
                            tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), wanted)
                        start = end
                        group += 1
                    flag = tl.min(tl.where(mine & (at > flag), at, PIECE_A), axis=0)
                piece += PIECE_A
            item += tl.num_programs(0)

    if of_b != 0:
        at = tl.arange(0, PIECE_B)
        item = tl.program_id(0)
        while item < chunks * SPLIT:
            piece = tl.zeros([], tl.int32)
            while piece < flags_b:
                flags = _flags(b_flags_ptr, piece, flags_b, PIECE_B)
                mine = (flags != 0) & (tl.cumsum(flags, 0) % SPLIT == item // chunks)
                flag = tl.min(tl.where(mine, at, PIECE_B), axis=0)
                while flag < PIECE_B:
                    row = (piece + flag) * _FLAGGED
                    group, stop = (row // columns, row // columns + 1) if STACKED else (row * 0, groups)
                    column = row % columns + tl.arange(0, _FLAGGED)
                    while group < stop:
                        end = _end(ends_ptr, group)
                        # Of the tokens of the group the chunks take tiles in turn.
                        first = _end(ends_ptr, group - 1) + item % chunks * TILE
                        while first < end:
                            token = first + tl.arange(0, TILE)
                            total = _product(
                                a_ptr, a_scale_ptr, a_exponents_ptr, b_ptr, b_scale_ptr, b_exponents_ptr,
                                token, column, group, tokens, columns, blocks, groups,
                                TILE, _FLAGGED, STEP, BLOCK, STACKED,
                            )  # fmt: skip
                            # Tokens that are flagged themselves are done.
                            wanted = (token < end) & (tl.load(a_flags_ptr + token // _FLAGGED, token < end, 1) == 0)
                            index = token.to(tl.int64)[:, None] * columns + column[None, :]
                            tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), wanted[:, None])
                            first += chunks * TILE
                        group += 1
                    flag = tl.min(tl.where(mine & (at > flag), at, PIECE_B), axis=0)
                piece += PIECE_B
            item += tl.num_programs(0)
