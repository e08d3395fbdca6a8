"""FP4 tensor cores (compute capability 10.0 and later): a GEMM of packed operands through cuBLAS.

    mm(codes [M, K/2], codes [N, K/2], a_scales, b_scales)  ->  scaled_mm of float4_e2m1fn_x2 with swizzled scales

The scales of E2M1 blocks, E8M0 over 32 (MXFP4) or E4M3 over 16 (NVFP4), are stored in the hardware's own dtypes; what
is left is their order: tiles of 128 rows and 4 blocks, 32 rows of 4 x 4 each (cuBLAS, "1D Block Scaling Factors
Layout"). A tensor scale multiplies the fp32 accumulator. Not run on hardware: checked under fake tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, pad, scaled_mm

from fp4compile.backends.triton.launch import ceil_div
from fp4compile.formats import E2M1, FORMATS, Format

LEAST_CAPABILITY = (10, 0)
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
# By the dtype of a block's scale: torch's name for it, and the block that the tensor cores know.
_SCALES = {
    "e8m0": (torch.float8_e8m0fnu, 32),
    "e4m3": (torch.float8_e4m3fn, 16),
}
_TILE = (128, 4)


def _known(fmt: Format) -> bool:
    level = fmt.levels[0]
    return fmt.element is E2M1 and _SCALES.get(level.dtype, (None, None))[1] == level.block


def packed_operands(arguments: Mapping[str, Any]) -> str | None:
    """Two matrices of one format that the tensor cores multiply."""
    a, b, name = arguments["a"], arguments["b"], arguments["a_format"]
    if not name or name != arguments["b_format"]:
        return "its operands are not both packed in one format"
    if not _known(FORMATS[name]):
        return f"FP4 tensor cores do not know {name}"
    if a.dim() != 2 or b.dim() != 2:
        return f"operands have {a.dim()} and {b.dim()} dimensions, not 2"
    return None


def sizes(arguments: Mapping[str, Any]) -> str | None:
    """Sizes and dtype that cuBLAS takes."""
    a, b = arguments["a"], arguments["b"]
    if a.shape[1] % 16 or b.shape[0] % 16:
        return f"K = {2 * a.shape[1]} is not a multiple of 32, or N = {b.shape[0]} not of 16"
    scaled = arguments["a_tensor_scale"] is not None or arguments["b_tensor_scale"] is not None
    if scaled and FORMATS[arguments["a_format"]].levels[0].dtype != "e4m3":
        return "only E4M3 block scales take a tensor scale"
    return None if arguments["dtype"] in _OUTPUTS else f"no result in {arguments['dtype']}"


def swizzled(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] of one byte, zero-padded to whole tiles, in the order that the tensor cores read."""
    rows, blocks = (ceil_div(size, tile) for size, tile in zip(scales.shape, _TILE, strict=True))
    whole = pad(scales, (0, blocks * _TILE[1] - scales.shape[1], 0, rows * _TILE[0] - scales.shape[0]))
    return whole.view(rows, 4, 32, blocks, 4).permute(0, 3, 2, 1, 4).reshape(-1)


def mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    a_scales: Tensor,
    b_scales: Tensor,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    a_format: str,
    b_format: str,
    b_block_2d: bool,
    k: int,
    dtype: torch.dtype,
    activation: str,
    factor: None,
    a_holds: str,
) -> Tensor:
    """The op `mm` on packed operands."""
    level = FORMATS[a_format].levels[0]
    scale_dtype, block = _SCALES[level.dtype]
    if b_block_2d:
        b_scales = b_scales.unsqueeze(1).expand(-1, block, -1).flatten(0, 1).narrow(0, 0, b.shape[0])
    left, right = a.view(torch.float4_e2m1fn_x2), b.view(torch.float4_e2m1fn_x2).t()
    of_a, of_b = (swizzled(scales).view(scale_dtype) for scales in (a_scales, b_scales))
    if a_tensor_scale is None and b_tensor_scale is None:
        y: Tensor = torch._scaled_mm(left, right, of_a, of_b, out_dtype=dtype)
    else:
        one = torch.ones((), dtype=torch.float32, device=a.device)
        recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        order = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
        y = scaled_mm(
            left,
            right,
            [of_a, one if a_tensor_scale is None else a_tensor_scale],
            recipe,
            [of_b, one if b_tensor_scale is None else b_tensor_scale],
            recipe,
            order,
            order,
            output_dtype=dtype,
        )
    return y if bias is None else y + bias.to(dtype)
