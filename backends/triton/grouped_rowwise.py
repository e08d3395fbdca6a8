"""Grouped FP8 GEMMs of tokens and a stack of weights on Hopper: torch's own, then what FP8 does not hold.

    grouped_mm_rowwise(a, b, ends)  ->  torch._scaled_grouped_mm, then `exact` over all that read a flagged row

torch multiplies E4M3 alone here, with a scale per token and per expert and column, accumulates in fp32 and writes bf16
(`_scaled_grouped_mm` of aten/src/ATen/native/cuda/GroupedBlas.cpp; ScaledGroupMM.cu has the kernel, which reads the
ends of the groups on the device; K and N are multiples of 16, groups start anywhere).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4compile.backends.triton import rowwise
from fp4compile.backends.triton.launch import Launch, ceil_div, power_of_two, run
from fp4compile.rowwise import FLAGGED, stacked

LEAST_CAPABILITY = (9, 0)
_MOST_GROUPS = 1023  # torch's kernel has a thread per group
_ALIGNED = 16  # elements of FP8 at which the rows of operands start


def on_hopper(arguments: Mapping[str, Any]) -> str | None:
    """Why the device has no grouped GEMM of rows in FP8, or None."""
    major = torch.cuda.get_device_capability(arguments["a"].device)[0]
    return None if major == 9 else f"torch multiplies groups of FP8 rows on compute capability 9 only, not {major}"


def operands(arguments: Mapping[str, Any]) -> str | None:
    """Why `torch._scaled_grouped_mm` does not take the operands of `grouped_mm_rowwise`, or None."""
    a, b, groups = arguments["a"], arguments["b"], arguments["ends"].shape[0]
    if arguments["dtype"] is not torch.bfloat16:
        return f"grouped FP8 GEMMs write bf16, not {arguments['dtype']}"
    if a.dtype is not torch.float8_e4m3fn or b.dtype is not torch.float8_e4m3fn:
        return "an operand is not E4M3"
    if not 0 < groups <= _MOST_GROUPS:
        return f"{groups} groups, not 1 to {_MOST_GROUPS}"
    if a.shape[0] == 0 or a.shape[1] == 0:
        return "an operand is empty"
    columns = stacked(b, a.shape[1], groups).shape[2]
    if not isinstance(columns, int) or columns % _ALIGNED or not columns:
        return f"{columns} output columns are no multiple of {_ALIGNED}"
    return None


# As in `rowwise`: few rows are flagged, and most GEMMs have no flag.
_EXACT = {"TILE": 32, "SPLIT": 4}
_MOST_PROGRAMS = 528
_MOST_STEP = 4  # blocks at a time
_MOST_PIECE = 4096  # flags


@lru_cache(maxsize=4096)
def plan_exact(tokens: int, columns: int, blocks: int, block: int, groups: int, b_rows: int) -> Launch:
    """The launch that computes again what a flagged row had a part in."""
    chunks = ceil_div(columns, _EXACT["TILE"])
    flags = {"A": ceil_div(tokens, FLAGGED), "B": ceil_div(b_rows, FLAGGED)}
    constants = {f"PIECE_{side}": min(power_of_two(count), _MOST_PIECE) for side, count in flags.items()}
    constants |= {"GROUPS": power_of_two(groups), "STACKED": b_rows != columns or groups == 1, "BLOCK": block, **_EXACT}
    sizes = {"tokens": tokens, "columns": columns, "blocks": blocks, "groups": groups, "chunks": chunks}
    programs = min(chunks * _EXACT["SPLIT"], _MOST_PROGRAMS)
    constants["STEP"] = math.gcd(blocks, _MOST_STEP)
    return Launch("grouped_rowwise_kernels", "exact", programs, sizes, constants, 4)


def compute_again(out: Tensor, operands: Mapping[str, Tensor]) -> None:
    """Make what `torch._scaled_grouped_mm` wrote exact where an operand has flags, and clear it behind the groups."""
    blocks, tokens = operands["a_exponents"].shape
    block = operands["a"].shape[1] // blocks
    launch = plan_exact(tokens, out.shape[1], blocks, block, len(operands["ends"]), operands["b"].shape[0])
    pointers = {f"{name}_ptr": tensor.contiguous() for name, tensor in operands.items()}
    run(launch, {**pointers, "out_ptr": out, "counts_ptr": rowwise.counts(out.device)}, out.device)


def grouped_mm_rowwise(dtype: torch.dtype, **operands: Tensor) -> Tensor:
    """The op `grouped_mm_rowwise`."""
    a, ends = operands["a"], operands["ends"].to(torch.int32)
    b = stacked(operands["b"], a.shape[1], len(ends))
    scale = operands["b_scale"]
    # Rows that all experts share have one scale for all.
    b_scale = scale.view(len(ends), -1) if scale.numel() != b.shape[2] else scale.expand(len(ends), -1)
    # Fast accumulation keeps too few bits (`rowwise.mm_rowwise`).
    out: Tensor = torch._scaled_grouped_mm(
        a, b, operands["a_scale"], b_scale, offs=ends, out_dtype=dtype, use_fast_accum=False
    )
    compute_again(out, {**operands, "ends": ends})
    return out
