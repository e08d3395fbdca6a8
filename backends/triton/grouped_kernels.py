# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""The Triton kernel behind torch's grouped GEMM: tensor scales and zeros where no group is, from one read.

finish    out, ends, tensor scales  ->  out
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def finish(
    out_ptr,
    ends_ptr,
    a_ts_ptr,
    b_ts_ptr,
    rows,
    columns,
    row_stride,
    groups,
    across,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [rows, columns] times both scales, rounded; zero behind the last end. Without scales only that is written.

    `TOKENS`: the axis that runs over tokens, None where there is none. `across`: tiles side by side.
    """
    pid = tl.program_id(0)
    row = pid // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = pid % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < columns)
    behind = there & False
    if TOKENS is not None:
        token = column if TOKENS == 1 else row
        behind = there & (token >= tl.load(ends_ptr + groups - 1))
    pointers = out_ptr + row.to(tl.int64) * row_stride + column
    if a_ts_ptr is None and b_ts_ptr is None:
        tl.store(pointers, tl.zeros([ROWS, COLUMNS], out_ptr.dtype.element_ty), behind)
    else:
        scale = 1.0
        if a_ts_ptr is not None:
            scale = tl.load(a_ts_ptr)
        if b_ts_ptr is not None:
            scale *= tl.load(b_ts_ptr)
        out = tl.load(pointers, there, 0.0).to(tl.float32) * scale
        tl.store(pointers, tl.where(behind, 0.0, out).to(out_ptr.dtype.element_ty), there)
