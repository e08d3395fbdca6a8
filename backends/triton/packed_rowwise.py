"""`mm` of FP4 values and a packed weight in FP8 with a scale per row: W4A4 inference of many tokens.

    mm(a [M, K] of MXFP4 values, codes [N, K/2], b_scales, a_holds="mxfp4", b_format="mxfp4")
        ->  quantize_rowwise(a), decode(codes, b_scales), mm_rowwise, activation and factor if there are any

No second copy of the weight is held: its rows are decoded at every call, 0.53 bytes read and 1.03 written per element.
`a` is quantised once more, which gives its values again: a block's exponent by the rule `floor` is that of its values
or, where none of them uses the upper binades of E2M1, one to three less, of a grid that holds them as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4compile import rowwise
from fp4compile.activations import columns
from fp4compile.backends.triton.launch import Launch, ceil_div, viewed
from fp4compile.backends.triton.packed import MOST_TOKENS, activate
from fp4compile.backends.triton.replay import Launches, Replay
from fp4compile.formats import FORMATS
from fp4compile.rowwise import FLAGGED

_KERNELS = "packed_rowwise_kernels"
# Tokens from which on this is taken, in the place of a weight decoded to bf16. On an H100 the GEMM that reads codes is
# as fast at about 450 tokens of a weight 28672 x 4096.
LEAST_TOKENS = MOST_TOKENS + 1
# Blocks of 16 rows at a time: 64 elements a thread.
_STEP, _WARPS = 16, 4


def operands(arguments: Mapping[str, Any]) -> str | None:
    """Values and codes of one format that FP8 rows hold, in sizes and dtypes of the GEMM."""
    a, b, bias, format = (arguments[name] for name in ("a", "b", "bias", "b_format"))
    if arguments["a_holds"] != format:
        return f"a is not known to hold values of {format}, the weight's format"
    reason = rowwise.refusal(FORMATS[format])
    if reason is not None:
        return reason
    if arguments["a_tensor_scale"] is not None or arguments["b_tensor_scale"] is not None:
        return "an operand has a tensor scale"
    if {a.dtype, arguments["dtype"] or a.dtype, a.dtype if bias is None else bias.dtype} != {torch.bfloat16}:
        return "row-wise scaled FP8 GEMMs read, add and write bf16 here"
    return f"{b.shape[0]} rows of the weight are no multiple of 16" if b.shape[0] % 16 else None


def tokens(arguments: Mapping[str, Any]) -> str | None:
    """As many tokens as make it faster than decoding codes in the GEMM."""
    count = math.prod(arguments["a"].shape[:-1])
    if not isinstance(count, int):
        return f"how many tokens there are is not known yet: calls of {LEAST_TOKENS} and more take it"
    return None if count >= LEAST_TOKENS else f"{count} tokens are fewer than {LEAST_TOKENS}"


@lru_cache(maxsize=4096)
def _launch(rows: int, blocks: int, block: int, edge: int) -> Launch:
    constants = {"BLOCKS": blocks, "STEP": _STEP, "BLOCK": block, "EDGE": edge}
    return Launch(_KERNELS, "decode", ceil_div(rows, FLAGGED), {"rows": rows}, constants, _WARPS)


def plan_decode(codes: Tensor, scales: Tensor, format: str, block_2d: bool) -> tuple[Launches, tuple[Tensor, ...]]:
    """The launch that makes contiguous codes rows of FP8, and its results: values, scale, exponents, flags."""
    block, (rows, width) = FORMATS[format].block, codes.shape
    blocks = 2 * width // block
    results = (
        codes.new_empty((rows, 2 * width), dtype=torch.float8_e4m3fn),
        codes.new_empty((rows,), dtype=torch.float32),
        codes.new_empty((blocks, rows), dtype=torch.uint8),
        codes.new_empty((ceil_div(rows, FLAGGED),), dtype=torch.uint8),
    )
    names = ("values_ptr", "scale_ptr", "exponents_ptr", "flags_ptr")
    given = {"words_ptr": viewed(codes, torch.int32), "scales_ptr": scales, **dict(zip(names, results, strict=True))}
    return [(_launch(rows, blocks, block, block if block_2d else 1), given)], results


def bind_mm(arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The op `mm` for calls like this one: fp32 accumulation, bias, one rounding; another behind an activation."""
    names, format, activation, k = tuple(arguments), arguments["b_format"], arguments["activation"], arguments["k"]
    shape = (*arguments["a"].shape[:-1], columns(activation, arguments["b"].shape[0]))
    outputs = shape[-1]
    weight = {"codes": arguments["b"], "scales": arguments["b_scales"]}
    decode = Replay(plan_decode, {**weight, "format": format, "block_2d": arguments["b_block_2d"]})

    def mm(*args: Any) -> Tensor:
        given = dict(zip(names, args, strict=True))
        ops = torch.ops.fp4compile
        left = ops.quantize_rowwise(given["a"].detach().reshape(-1, k), format, 1, scale_rule="floor")
        right = decode(given["b"], given["b_scales"], format, given["b_block_2d"])
        y = ops.mm_rowwise(*left, *right, torch.bfloat16, given["bias"])
        factor = given["factor"]
        factor = None if factor is None else factor.contiguous().view(-1, outputs)
        return activate(y, activation, factor).view(shape)

    return mm
