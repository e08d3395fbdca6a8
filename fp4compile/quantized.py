"""`quantize`, `dequantize` and `fake_quantize` for tensors, and the packed tensor they speak of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4compile import dispatch
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.formats import FORMATS, Format

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantized:
    """A tensor in a 4-bit format.

    Attributes:
        codes: uint8, two codes per byte (even element in the low nibble), the blocked axis last and padded with
            zeros to whole blocks.
        scales: one stored scale per block, `FORMATS[format].scale_dtype`; one per b x b tile for 2-D blocks.
        tensor_scale: 0-d fp32, or None.
        format: name of the format.
        shape: logical shape of the tensor.
        axis: the blocked axis, counted from 0.
        block_2d: whether scales belong to square tiles.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    format: str
    shape: tuple[int, ...]
    axis: int
    block_2d: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.tensor_scale is None else 4)


def _check_tensor(x: Tensor, axis: int) -> int:
    """The axis counted from 0, once the tensor's type, dtype and rank are known to be usable."""
    if not isinstance(x, Tensor):
        raise FP4TypeError(f"expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise FP4TypeError(f"cannot quantise a {str(x.dtype).removeprefix('torch.')} tensor; allowed: {allowed}")
    if x.dim() == 0:
        raise FP4ValueError("cannot quantise a 0-d tensor: there is no axis to block")
    if not isinstance(axis, int) or not -x.dim() <= axis < x.dim():
        allowed = f"{-x.dim()}..{x.dim() - 1}"
        raise FP4ValueError(f"axis {axis!r} is out of range for shape {tuple(x.shape)}: allowed {allowed}")
    return axis % x.dim()


def _check_options(x: Tensor, axis: int, fmt: Format, rounding: str, seed: int | Tensor | None, block_2d: bool) -> None:
    fmt.check_rounding(rounding)
    if rounding != "nearest" and seed is None:
        raise FP4ValueError(f"rounding={rounding!r} needs a seed (an int or a 0-d int64 tensor)")
    if not isinstance(seed, int | Tensor | None):
        raise FP4TypeError(f"a seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise FP4ValueError(f"seed must be in [0, 2**63), got {seed}")
    if isinstance(seed, Tensor) and (seed.dim() or seed.dtype != torch.int64):
        raise FP4TypeError(f"a seed tensor must be 0-d int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    if block_2d:
        if fmt.block_2d is None:
            having = ", ".join(f.name for f in FORMATS.values() if f.block_2d)
            raise FP4ValueError(f"format {fmt.name} has no 2-D blocks; formats that have: {having}")
        if x.dim() < 2 or axis < x.dim() - 2:
            raise FP4ValueError(f"2-D blocks tile the last two axes: axis {axis} of shape {tuple(x.shape)} is not one")


def _tensor_scale(x: Tensor, fmt: Format, scale_rule: str | None, given: Tensor | float | bool | None) -> Tensor | None:
    if not fmt.has_tensor_scale and fmt.is_scaled_per_tensor(scale_rule):
        if given not in (None, True):
            raise FP4ValueError(f"scale rule {scale_rule!r} of format {fmt.name} has a fixed tensor scale")
    elif not fmt.has_tensor_scale:
        if given is None or given is False:
            return None
        having = ", ".join(f.name for f in FORMATS.values() if f.has_tensor_scale)
        raise FP4ValueError(f"format {fmt.name} has no tensor scale; formats that have: {having}")
    if given is False:
        return None
    if given is None or given is True:
        return torch.ops.fp4compile.tensor_scale(x.detach(), fmt.name, scale_rule=scale_rule)
    if isinstance(given, Tensor):
        if given.numel() != 1 or not given.is_floating_point():
            found = f"{given.dtype} of shape {tuple(given.shape)}"
            raise FP4TypeError(f"tensor_scale must hold one floating-point number, got {found}")
        return given.detach().to(device=x.device, dtype=torch.float32).reshape(())
    limits = torch.finfo(torch.float32)
    if not (isinstance(given, int | float) and limits.tiny <= given <= limits.max):
        raise FP4ValueError(f"tensor_scale must be a positive, normal fp32 number, got {given!r}")
    return torch.tensor(float(given), dtype=torch.float32, device=x.device)


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor | None:
    return torch.tensor(seed, dtype=torch.int64, device=x.device) if isinstance(seed, int) else seed


@torch.compiler.assume_constant_result  # Dynamo runs it while it traces; it cannot trace a registration
def _install_kernels() -> None:
    dispatch.install_kernels()


def quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    *,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    scale_rule: str | None = None,
    tensor_scale: Tensor | float | bool | None = None,
    block_2d: bool = False,
) -> Quantized:
    """Quantise `x` to packed 4-bit codes in blocks along `axis`.

    Args:
        x: fp32, bf16 or fp16 tensor of any shape and strides; arithmetic is fp32.
        format: a name in `FORMATS`.
        axis: the blocked axis (the contraction axis of the GEMM that will read it).
        rounding: one of the format's `roundings`. With a `seed`: "stochastic", and "eden", which rounds to nearest
            and corrects the block scales. The same seed gives the same bits on every device.
        seed: int or 0-d int64 tensor.
        scale_rule: one of the format's `scale_rules`; None for the default.
        tensor_scale: formats with a per-tensor scale only. None computes it, a number or tensor gives it, False
            leaves it out.
        block_2d: share scales over square tiles of the last two axes.

    Raises:
        FP4ValueError: an unknown name, an axis out of range, an option the format does not have.
        FP4TypeError: not a floating-point tensor of an allowed dtype.
    """
    fmt = FORMATS[format]
    axis = _check_tensor(x, axis)
    _check_options(x, axis, fmt, rounding, seed, block_2d)
    fmt.rule(scale_rule)
    _install_kernels()
    scale = _tensor_scale(x, fmt, scale_rule, tensor_scale)
    codes, scales = torch.ops.fp4compile.quantize(
        x, fmt.name, axis, rounding, scale_rule, block_2d, scale, _seed(seed, x)
    )
    return Quantized(codes, scales, scale, fmt.name, tuple(x.shape), axis, block_2d)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of a packed tensor, computed in fp32 and rounded once to `dtype` (fp32, bf16 or fp16)."""
    if not isinstance(q, Quantized):
        raise FP4TypeError(f"dequantize expects a Quantized, got {type(q).__name__}")
    if dtype not in _DTYPES:
        raise FP4TypeError(f"cannot dequantise to {dtype}; allowed: fp32, bf16, fp16")
    _install_kernels()
    return torch.ops.fp4compile.dequantize(
        q.codes, q.scales, q.tensor_scale, q.format, q.axis, q.shape[q.axis], q.block_2d, dtype
    )


def fake_quantize(
    x: Tensor,
    format: str,
    axis: int = -1,
    *,
    rounding: str = "nearest",
    seed: int | Tensor | None = None,
    scale_rule: str | None = None,
    tensor_scale: Tensor | float | bool | None = None,
    block_2d: bool = False,
) -> Tensor:
    """`dequantize(quantize(x))` in x's dtype and shape, without packing; the gradient is straight-through.

    Arguments and errors as for `quantize`.
    """
    fmt = FORMATS[format]
    axis = _check_tensor(x, axis)
    _check_options(x, axis, fmt, rounding, seed, block_2d)
    fmt.rule(scale_rule)
    _install_kernels()
    scale = _tensor_scale(x, fmt, scale_rule, tensor_scale)
    return torch.ops.fp4compile.fake_quantize(x, fmt.name, axis, rounding, scale_rule, block_2d, scale, _seed(seed, x))
