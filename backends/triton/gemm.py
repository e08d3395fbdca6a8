"""GEMMs under tensor scales: cuBLAS with the scales' product as its alpha, read from the device.

    mm(a bf16 [M, K], b bf16 [K, N], a_tensor_scale, b_tensor_scale)
        ->  cublasGemmEx(alpha = &scale, A = b, B = a, beta = &zero, C = y), all in the current stream

The scale multiplies the fp32 accumulator before the one rounding of the result, where torch's own GEMMs would take a
host number (a synchronisation) or round twice. cuBLAS is the one that torch has loaded, with torch's handle, stream
and workspace, so that a call can be captured in a CUDA graph. The product of both scales must be an fp32 number.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4compile.backend import No
from fp4compile.backends.triton.launch import current, kept_zeros

# Of cublas_api.h and library_types.h.
_TRANSPOSED = {False: 0, True: 1}
_DTYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_HOST, _DEVICE = 0, 1
_NO_REDUCED_PRECISION = 16  # split sums are added in fp32
_COMPUTE_32F, _DEFAULT_ALGORITHM = 68, -1
_OPERANDS = (torch.bfloat16, torch.float16)

_int, _pointer = ctypes.c_int, ctypes.c_void_p
_MATRIX = (_pointer, _int, _int)  # address, dtype, leading dimension
_SIGNATURES = {
    "cublasSetPointerMode_v2": (_pointer, _int),
    "cublasGetMathMode": (_pointer, ctypes.POINTER(_int)),
    "cublasSetMathMode": (_pointer, _int),
    "cublasGemmEx": (_pointer, *(_int,) * 5, _pointer, *_MATRIX * 2, _pointer, *_MATRIX, _int, _int),
}


@cache
def library() -> ctypes.CDLL | No:
    """torch's cuBLAS, or why there is none."""
    try:
        # Looks the names up in libtorch_cuda and what it depends on, whatever the library's file is called.
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        for name, arguments in _SIGNATURES.items():
            function = getattr(found, name)
            function.argtypes, function.restype = arguments, _int
    except (OSError, AttributeError) as error:
        return No(f"torch's cuBLAS cannot be called: {error}")
    return found


def available(arguments: Mapping[str, Any]) -> str | None:
    """Whether cuBLAS can be called."""
    found = library()
    return found.reason if isinstance(found, No) else None


def dense_operands(arguments: Mapping[str, Any]) -> str | None:
    """Two matrices of one 16-bit dtype."""
    a, b = arguments["a"], arguments["b"]
    if arguments["a_format"] or arguments["b_format"]:
        return "an operand is packed"
    if a.dim() != 2 or b.dim() != 2:
        return f"operands have {a.dim()} and {b.dim()} dimensions, not 2"
    if a.dtype != b.dtype or a.dtype not in _OPERANDS:
        return f"operands are {a.dtype} and {b.dtype}, not both bf16 or fp16"
    for name in ("a_tensor_scale", "b_tensor_scale"):
        scale = arguments[name]
        if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
            return f"{name} is not one fp32 number"
    return None


def _matrix(x: Tensor) -> tuple[Tensor, bool, int]:
    """x, copied where cuBLAS cannot read its strides; whether it lies transposed; its leading dimension."""
    (rows, columns), (down, along) = x.shape, x.stride()
    if along == 1 and down >= columns:
        return x, False, down
    if down == 1 and along >= rows:
        return x, True, along
    return x.contiguous(), False, columns


def _checked(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} returned status {status}")


# device -> 0.0 in fp32, the beta of every call.
_ZEROS: dict[torch.device, Tensor] = {}


def _gemm(a: Tensor, b: Tensor, alpha: Tensor, y: Tensor) -> None:
    """y = alpha * (a @ b), y row-major; for cuBLAS, which counts by columns, y.T = alpha * (b.T @ a.T)."""
    (a, a_transposed, a_stride), (b, b_transposed, b_stride) = _matrix(a), _matrix(b)
    beta = kept_zeros(_ZEROS, 1, torch.float32, a.device)
    dtype, handle, mode = _DTYPES[a.dtype], torch.cuda.current_blas_handle(), _int()
    _checked("cublasGetMathMode", handle, mode)
    try:
        _checked("cublasSetMathMode", handle, _NO_REDUCED_PRECISION)
        _checked("cublasSetPointerMode_v2", handle, _DEVICE)
        _checked(
            "cublasGemmEx", handle, _TRANSPOSED[b_transposed], _TRANSPOSED[a_transposed],
            b.shape[1], a.shape[0], a.shape[1], alpha.data_ptr(), b.data_ptr(), dtype, b_stride,
            a.data_ptr(), dtype, a_stride, beta.data_ptr(), y.data_ptr(), _DTYPES[y.dtype], y.shape[1],
            _COMPUTE_32F, _DEFAULT_ALGORITHM,
        )  # fmt: skip
    finally:
        _checked("cublasSetPointerMode_v2", handle, _HOST)
        _checked("cublasSetMathMode", handle, mode.value)


def _alpha(a: Tensor, scales: tuple[Tensor | None, Tensor | None]) -> Tensor:
    first, second = scales
    if first is None or second is None:
        one = first if second is None else second
        return torch.ones((), dtype=torch.float32, device=a.device) if one is None else one
    return first * second


def mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    a_scales: None,
    b_scales: None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    a_format: str,
    b_format: str,
    b_block_2d: bool,
    k: int,
    dtype: torch.dtype | None,
    activation: str,
    factor: None,
    a_holds: str,
) -> Tensor:
    """The op `mm` on dense operands: fp32 accumulation, the scale, the bias, one rounding."""
    dtype = dtype or a.dtype
    # cuBLAS writes the operands' dtype or fp32.
    direct = bias is None and dtype in (a.dtype, torch.float32)
    y = a.new_empty([a.shape[0], b.shape[1]], dtype=dtype if direct else torch.float32)
    with current(a.device):
        if a.shape[1] == 0:
            y.zero_()
        elif y.numel():
            _gemm(a, b, _alpha(a, (a_tensor_scale, b_tensor_scale)), y)
    if bias is not None:
        y += bias
    return y.to(dtype)
