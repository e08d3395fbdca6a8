"""GEMMs of groups of tokens, one group per expert: rows sorted by expert, and the end of each group.

    tokens [7, C], ends (3, 3, 7), multiple 4   # three experts, the second without a token
    ->
    pad_groups: [16, C], ends (4, 4, 8)         # rows 0-2, a row of zeros, rows 3-6; zeros behind the last group

A wgrad contracts over the tokens of each group. Padded to a multiple of the block, no block of a quantisation along
the tokens holds tokens of two experts; rows of zeros add nothing to a sum of products. The size is an upper bound
that the shapes give, so that nothing waits for the device and no routing makes another graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4compile.errors import FP4ValueError


def _padded_rows(rows: Any, groups: Any, multiple: int) -> Any:
    """The most rows that groups can take up once each is padded; keeps symbolic sizes symbolic."""
    return (rows + groups * (multiple - 1)) // multiple * multiple


def _starts(ends: Tensor) -> Tensor:
    return torch.cat((ends.new_zeros(1), ends[:-1]))


def pad_groups(tokens: Tensor, ends: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Lay out each group of rows from a multiple of `multiple`, zeros between the groups and behind the last.

    Args:
        tokens: [T, C]; rows behind the last group belong to no expert, and are left out.
        ends: [G] int32 or int64, where each group ends, ascending.
        multiple: at least 1.

    Returns:
        [(T + G (multiple - 1)) rounded down to a multiple, C] and the groups' ends in it, whole multiples.
    """
    rows = _padded_rows(tokens.shape[0], ends.shape[0], multiple)
    starts = _starts(ends)
    padded = (ends - starts + multiple - 1) // multiple * multiple
    padded_ends = torch.cumsum(padded, 0, dtype=ends.dtype)
    index = torch.arange(tokens.shape[0], device=tokens.device, dtype=ends.dtype)
    group = torch.searchsorted(ends, index, right=True)  # the first that ends behind the row; none: G
    shift = torch.cat((padded_ends - padded - starts, ends.new_zeros(1)))[group]
    target = torch.where(group < ends.shape[0], index + shift, rows)  # one row more takes what belongs to no group
    out = tokens.new_zeros(rows + 1, tokens.shape[1]).index_copy_(0, target.long(), tokens)
    return out[:rows], padded_ends


def pad_groups_fake(tokens: Tensor, ends: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """The shape rule of `pad_groups`."""
    rows = _padded_rows(tokens.shape[0], ends.shape[0], multiple)
    return tokens.new_empty([rows, tokens.shape[1]]), torch.empty_like(ends)


# Dimensions of A and B -> the axis of A, of B and of the result that runs over the tokens of all groups; a tensor
# of three dimensions has a matrix per group instead.
_TOKEN_AXES = {(2, 3): (0, None, 0), (3, 2): (None, 1, 1), (2, 2): (1, 0, None)}


def token_axes(a: Tensor, b: Tensor) -> tuple[int | None, int | None, int | None]:
    """The axes of A, B and the result of `grouped_mm` that run over the tokens of all groups; None: a matrix each.

    Raises:
        FP4ValueError: two stacks, or what is neither a matrix nor a stack.
    """
    axes = _TOKEN_AXES.get((a.dim(), b.dim()))
    if axes is None:
        raise FP4ValueError(f"grouped_mm takes matrices and one stack of them, or two, not {a.dim()}-D and {b.dim()}-D")
    return axes


def _of_group(x: Tensor, axis: int | None, group: int, start: int, end: int) -> Tensor:
    return x[group] if axis is None else x.narrow(axis, start, end - start)


def _out_shape(a: Tensor, b: Tensor, ends: Tensor) -> list[Any]:
    shape = [a.shape[-2], b.shape[-1]]
    return shape if a.dim() + b.dim() > 4 else [ends.shape[0], *shape]


def grouped_mm(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
) -> Tensor:
    """One GEMM per group: products and sums in fp32 (fp64 of fp64), tensor scales on them, one rounding to a's dtype.

    Args:
        a, b: [T, K] and [G, K, N], of which rows `ends[g - 1]:ends[g]` make the rows of the result ([T, N]);
            [G, M, K] and [K, T] ([M, T]); or [M, T] and [T, N], contracted over each group's tokens ([G, M, N]).
        ends: [G], where each group ends. What lies behind the last group is zero in the result.
        a_tensor_scale, b_tensor_scale: 0-d, one for all groups.
    """
    a_axis, b_axis, out_axis = token_axes(a, b)
    dtype = torch.promote_types(a.dtype, torch.float32)
    left, right = a.to(dtype), b.to(dtype)
    out = left.new_zeros(_out_shape(a, b, ends))
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            span = (group, start, end)
            product = _of_group(left, a_axis, *span) @ _of_group(right, b_axis, *span)
            _of_group(out, out_axis, *span).copy_(product)
        start = end
    for scale in (a_tensor_scale, b_tensor_scale):
        out = out if scale is None else out * scale
    return out.to(a.dtype)


def grouped_mm_fake(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
) -> Tensor:
    """The shape rule of `grouped_mm`."""
    token_axes(a, b)
    return a.new_empty(_out_shape(a, b, ends))
