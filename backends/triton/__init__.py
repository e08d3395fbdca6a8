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
from fp4compile.backends.triton import launch

_LEAST_CAPABILITY = (8, 0)  # bf16 arithmetic


@cache
def available() -> Answer:
    """Whether this machine can run the kernels."""
    if importlib.util.find_spec("triton") is None:
        return No("Triton is not installed: pip install 'fp4compile[triton]'")
    if torch.version.cuda is None or not torch.cuda.is_available():
        return No("torch sees no CUDA device")
    found = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if found < _LEAST_CAPABILITY:
        least, has = (".".join(map(str, c)) for c in (_LEAST_CAPABILITY, found))
        return No(f"needs CUDA compute capability {least}, a device here has {has}")
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


def _transform_size(arguments: Mapping[str, Any]) -> str | None:
    size = arguments["hadamard"]
    good = ", ".join(map(str, launch.HADAMARD_SIZES[1:]))
    return None if size in launch.HADAMARD_SIZES else f"Hadamard size {size} is not one of {good}"


def _supports(*required: checks.Check) -> Callable[[Mapping[str, Any]], Answer]:
    """The answer of the first check that objects; a machine without Triton or a GPU objects to everything."""

    def answer(arguments: Mapping[str, Any]) -> Answer:
        here = available()
        if isinstance(here, No):
            return here
        reasons = (check(arguments) for check in required)
        return next((No(reason) for reason in reasons if reason is not None), Yes())

    return answer


_QUANTIZING = (
    _on_one_gpu,
    checks.input,
    _format_known,
    checks.scalars,
    _transform_size,
    checks.rounding,
    checks.square,
)

KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(f"triton/{op}", op, "cuda", run, _supports(*required))
    for op, run, required in (
        ("fake_quantize", launch.fake_quantize, _QUANTIZING),
        ("quantize", launch.quantize, _QUANTIZING),
        ("dequantize", launch.dequantize, (_on_one_gpu, _format_known, checks.scalars, checks.square, checks.packed)),
        ("tensor_scale", launch.tensor_scale, (_on_one_gpu, checks.input, checks.scalars, _transform_size)),
    )
)
