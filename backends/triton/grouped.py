"""GEMMs of groups of tokens: torch's own grouped GEMM, then the tensor scales.

    grouped_mm(a bf16, b bf16, ends, a_tensor_scale, b_tensor_scale)
        ->  torch._grouped_mm(a, b, offs=ends), then `finish`: * (a_tensor_scale * b_tensor_scale)

It reads the ends of the groups on the device from compute capability 9.0 on; on older devices torch reads them on the
host. Its result is bf16, so that a tensor scale costs a second rounding: up to 2^-8 of a value beside the 2^-8 of the
one that the op has. What lies behind the last group torch leaves unwritten; it is filled with zeros, as the op has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4compile.backends.triton.launch import Launch, ceil_div, run
from fp4compile.grouped import token_axes

_ALIGNED = 8  # elements of bf16 in the 16 bytes at multiples of which rows must start
_TILE = {"ROWS": 4, "COLUMNS": 1024}  # of a program of `finish`


def operands(arguments: Mapping[str, Any]) -> str | None:
    """Two bf16 operands whose rows, or columns, start at multiples of 16 bytes."""
    for name in ("a", "b"):
        x = arguments[name]
        if x.dtype != torch.bfloat16:
            return f"{name} is {x.dtype}, not bf16"
        reason = _misaligned(x)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _misaligned(x: Tensor) -> str | None:
    for inner, outer in ((-1, -2), (-2, -1)):
        if x.stride(inner) == 1 and x.stride(outer) >= max(1, x.shape[inner]):
            return None if x.stride(outer) % _ALIGNED == 0 else f"has rows {x.stride(outer)} elements apart, not 8 n"
    return f"has strides {tuple(x.stride())}: neither its rows nor its columns are contiguous"


def grouped_mm(
    a: Tensor,
    b: Tensor,
    ends: Tensor,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
) -> Tensor:
    """As `fp4compile.grouped.grouped_mm`, of bf16 operands."""
    ends = ends.to(torch.int32)
    out = torch._grouped_mm(a, b, offs=ends)
    axis = token_axes(a, b)[2]
    if axis is not None or a_tensor_scale is not None or b_tensor_scale is not None:
        finish(out, ends, axis, a_tensor_scale, b_tensor_scale)
    return out


@lru_cache(maxsize=4096)
def _plan(rows: int, columns: int, row_stride: int, groups: int, axis: int | None) -> Launch:
    across = ceil_div(columns, _TILE["COLUMNS"])
    sizes = {"rows": rows, "columns": columns, "row_stride": row_stride, "groups": groups, "across": across}
    programs = ceil_div(rows, _TILE["ROWS"]) * across
    return Launch("grouped_kernels", "finish", programs, sizes, {"TOKENS": axis, **_TILE}, 4)


def finish(
    out: Tensor, ends: Tensor, axis: int | None, a_tensor_scale: Tensor | None, b_tensor_scale: Tensor | None
) -> None:
    """Multiply what torch wrote by the tensor scales, and clear it behind the groups along its axis of tokens."""
    rows, columns = math.prod(out.shape[:-1]), out.shape[-1]
    if rows and columns:  # the rows of all matrices of a stack are equally far apart
        launch = _plan(rows, columns, out.stride(-2), len(ends), axis)
        scales = {"a_ts_ptr": a_tensor_scale, "b_ts_ptr": b_tensor_scale}
        run(launch, {"out_ptr": out, "ends_ptr": ends, **scales}, out.device)
