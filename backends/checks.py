"""What codec kernels of every device ask of a call before they take it: why not, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fp4compile.formats import FORMATS

Check = Callable[[Mapping[str, Any]], "str | None"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The scale rules that the kernels have, by the dtype of the scale.
SCALE_RULES = {
    "e6m2": ("authors", "truncation-free"),
    "e8m0": ("floor", "ceil", "even", "rceil"),
    "e4m3": ("nearest", "truncation-free"),
}


def input(arguments: Mapping[str, Any]) -> str | None:
    """A tensor that can be quantised."""
    x = arguments["x"]
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernels read fp32, bf16 and fp16"
    return None if x.dim() else "x is 0-d"


def unproduced(arguments: Mapping[str, Any]) -> str | None:
    """A tensor that is read as it is."""
    return "it does not compute what it quantises" if arguments["producer"] else None


def scalars(arguments: Mapping[str, Any]) -> str | None:
    """Scale and seeds are single numbers of their dtype."""
    for name, dtype in (("tensor_scale", torch.float32), ("seed", torch.int64), ("sign_seed", torch.int64)):
        value = arguments.get(name)
        if value is not None and (value.dtype != dtype or value.numel() != 1):
            return f"{name} is not one {dtype} number"
    return None


def unactivated(arguments: Mapping[str, Any]) -> str | None:
    """A GEMM whose sums are the result."""
    if arguments["activation"]:
        return f"it applies no activation, as {arguments['activation']!r}"
    return None if arguments["factor"] is None else "it multiplies its sums with no factor"


def tensor_scales(arguments: Mapping[str, Any]) -> str | None:
    """Tensor scales of a GEMM's operands are single numbers in fp32."""
    for name in ("a_tensor_scale", "b_tensor_scale"):
        scale = arguments[name]
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return f"{name} is not one fp32 number"
    return None


def scale_rule(arguments: Mapping[str, Any]) -> str | None:
    """A scale rule that the kernels have."""
    fmt = FORMATS[arguments["format"]]
    rule = fmt.rule(arguments["scale_rule"])
    return None if rule in SCALE_RULES[fmt.levels[0].dtype] else f"scale rule {rule!r}"


def rounding(arguments: Mapping[str, Any]) -> str | None:
    """A rounding with all that it needs."""
    if arguments["rounding"] == "stochastic":
        return None if arguments["seed"] is not None else "stochastic rounding without a seed"
    return None if arguments["rounding"] == "nearest" else f"rounding {arguments['rounding']!r}"


def square(arguments: Mapping[str, Any]) -> str | None:
    """2-D blocks where the format has them, over the last two axes."""
    if not arguments["block_2d"]:
        return None
    x = arguments["codes"] if "codes" in arguments else arguments["x"]
    if FORMATS[arguments["format"]].block_2d is None:
        return f"format {arguments['format']} has no 2-D blocks"
    inside = x.dim() > 1 and arguments["axis"] % x.dim() >= x.dim() - 2
    return None if inside else "2-D blocks tile the last two axes"


def packed(arguments: Mapping[str, Any]) -> str | None:
    """Codes and scales that belong together."""
    fmt, codes, scales = FORMATS[arguments["format"]], arguments["codes"], arguments["scales"]
    if codes.dtype != torch.uint8 or scales.dtype != fmt.scale_dtype or arguments["dtype"] not in DTYPES:
        return f"cannot decode {codes.dtype} codes and {scales.dtype} scales to {arguments['dtype']}"
    whole = scales.shape[-1] * fmt.block == codes.shape[-1] * 2 and arguments["size"] <= codes.shape[-1] * 2
    return None if whole else "codes and scales do not hold the same whole blocks"
