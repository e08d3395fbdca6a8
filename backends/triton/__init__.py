"""Triton kernels of the codec ops on CUDA: a table of kernels for the default backend, not a backend of its own.

    torch.ops.fp4compile.fake_quantize(x.cuda(), "hif4", 0)  ->  supports? Yes  ->  launch.fake_quantize

The kernels are equal bit for bit to the reference. Importing this package needs neither Triton nor a GPU: where one
is missing, every kernel says so and the reference runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp4compile.backend import Answer, Kernel, No, Yes
from fp4compile.backends import checks
from fp4compile.backends.triton import gemm, launch, native, packed_launch, produce, rowwise

_LEAST_CAPABILITY = (8, 0)  # bf16 arithmetic
_MOST_REMEMBERED = 4096


@cache
def available(least: tuple[int, int] = _LEAST_CAPABILITY) -> Answer:
    """Whether this machine can run kernels that need a compute capability."""
    if importlib.util.find_spec("triton") is None:
        return No("Triton is not installed: pip install 'fp4compile[triton]'")
    if torch.version.cuda is None or not torch.cuda.is_available():
        return No("torch sees no CUDA device")
    found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if found < least:
        wanted, has = (".".join(map(str, c)) for c in (least, found))
        return No(f"needs CUDA compute capability {wanted}, a device here has {has}")
    return Yes()


# --- what they support -----------------------------------------------------------------------------------------------


def _on_one_gpu(arguments: Mapping[str, Any]) -> str | None:
    devices = {n: v.device for n, v in arguments.items() if isinstance(v, Tensor)}
    other = [n for n, device in devices.items() if device.type != "cuda"]
    if other:
        return f"{', '.join(other)} not on a CUDA device"
    return None if len(set(devices.values())) == 1 else "the tensors are on different devices"


def _format_known(arguments: Mapping[str, Any]) -> str | None:
    known = launch.known(arguments["format"])
    return known.reason if isinstance(known, No) else None


def _producer(arguments: Mapping[str, Any]) -> str | None:
    return produce.refusal(arguments["producer"])


def _transform_size(arguments: Mapping[str, Any]) -> str | None:
    size = arguments["hadamard"]
    good = ", ".join(map(str, launch.HADAMARD_SIZES[1:]))
    return None if size in launch.HADAMARD_SIZES else f"Hadamard size {size} is not one of {good}"


def _along_both(arguments: Mapping[str, Any]) -> str | None:
    """The checks of `fake_quantize` along either axis of a matrix."""
    x = arguments["x"]
    if x.dim() != 2:
        return f"x has {x.dim()} axes, not two"
    for axis in (0, 1):
        one = {**arguments, "axis": axis, "tensor_scale": arguments[f"tensor_scale_{axis}"]}
        one |= {name: arguments[name][axis] for name in ("rounding", "hadamard", "block_2d")}
        for check in (checks.scalars, _transform_size, checks.rounding, checks.square):
            reason = check(one)
            if reason is not None:
                return reason
    bound = launch.arithmetic_bounds(arguments["rounding"], arguments["hadamard"])
    return "arithmetic bounds it, so that two kernels are as fast" if bound else None


def _supports(
    *required: checks.Check, capability: tuple[int, int] = _LEAST_CAPABILITY
) -> Callable[[Mapping[str, Any]], Answer]:
    """The answer of the first check that objects; a machine without Triton or such a GPU objects to everything."""

    def answer(arguments: Mapping[str, Any]) -> Answer:
        here = available(capability)
        return here if isinstance(here, No) else checked(arguments)

    @_remembered
    def checked(arguments: Mapping[str, Any]) -> Answer:
        reasons = (check(arguments) for check in required)
        return next((No(reason) for reason in reasons if reason is not None), Yes())

    return answer


def _kind(value: Tensor | list[Any]) -> Any:
    """What checks may read of a tensor or a list."""
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else tuple(value)


def _remembered(answer: Callable[[Mapping[str, Any]], Answer]) -> Callable[[Mapping[str, Any]], Answer]:
    """The same answers, found again by shapes, dtypes, devices and options; symbolic sizes are asked each time."""
    known: dict[Any, Answer] = {}

    def remembered(arguments: Mapping[str, Any]) -> Answer:
        key = tuple([_kind(v) if isinstance(v, Tensor | list) else v for v in arguments.values()])
        try:
            found = known.get(key)
        except TypeError:  # a symbolic size has no hash
            return answer(arguments)
        if found is None:
            if len(known) == _MOST_REMEMBERED:
                known.clear()
            found = known[key] = answer(arguments)
        return found

    return remembered


_QUANTIZING = (
    _on_one_gpu,
    checks.input,
    _format_known,
    checks.scalars,
    _transform_size,
    checks.rounding,
    checks.square,
)

_NATIVE = _supports(
    _on_one_gpu, native.packed_operands, native.sizes, checks.scalars, capability=native.LEAST_CAPABILITY
)

_PACKED_WEIGHT = _supports(_on_one_gpu, packed_launch.operands)

_DENSE = _supports(_on_one_gpu, gemm.available, gemm.dense_operands)

_CODECS: tuple[tuple[str, Callable[..., Any], tuple[checks.Check, ...]], ...] = (
    ("fake_quantize", launch.fake_quantize, (*_QUANTIZING, _producer)),
    (
        "fake_quantize_both",
        launch.fake_quantize_both,
        (_on_one_gpu, checks.input, _format_known, _along_both, _producer),
    ),
    ("quantize", launch.quantize, _QUANTIZING),
    ("dequantize", launch.dequantize, (_on_one_gpu, _format_known, checks.scalars, checks.square, checks.packed)),
    ("tensor_scale", launch.tensor_scale, (_on_one_gpu, checks.input, checks.scalars, _transform_size, _producer)),
)

KERNELS: tuple[Kernel, ...] = (
    Kernel("cublas/fp4_mm", "mm", "cuda", native.mm, _NATIVE, packed=True),
    Kernel("triton/packed_mm", "mm", "cuda", packed_launch.mm, _PACKED_WEIGHT),
    Kernel("cublas/mm", "mm", "cuda", gemm.mm, _DENSE),
    *(Kernel(f"triton/{op}", op, "cuda", run, _supports(*required)) for op, run, required in _CODECS),
)


# --- FP8 GEMMs with a scale per row ----------------------------------------------------------------------------------


def _rows_known(arguments: Mapping[str, Any]) -> str | None:
    return rowwise.refusal(arguments["format"])


def _matrix(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    return None if x.dim() == 2 and 0 not in x.shape else f"x of shape {tuple(x.shape)} is no matrix with elements"


def _rows_along_both(arguments: Mapping[str, Any]) -> str | None:
    """The checks of `quantize_rowwise` along either axis."""
    for axis in (0, 1):
        one = {**arguments, **{name: arguments[name][axis] for name in ("rounding", "hadamard")}}
        reason = _transform_size(one) or checks.rounding(one)
        if reason is not None:
            return reason
    return None


_ROWS = (_on_one_gpu, checks.input, _matrix, _rows_known, checks.scalars, _producer)

KERNELS += tuple(
    Kernel(name, op, "cuda", run, _supports(*required, capability=rowwise.LEAST_CAPABILITY))
    for name, op, run, required in (
        (
            "triton/quantize_rowwise",
            "quantize_rowwise",
            rowwise.quantize_rowwise,
            (*_ROWS, _transform_size, checks.rounding),
        ),
        (
            "triton/quantize_rowwise_both",
            "quantize_rowwise_both",
            rowwise.quantize_rowwise_both,
            (*_ROWS, _rows_along_both),
        ),
        ("cublas/mm_rowwise", "mm_rowwise", rowwise.mm_rowwise, (_on_one_gpu, rowwise.sizes)),
    )
)
