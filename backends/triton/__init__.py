"""Kernels of the ops on CUDA, Triton's and cuBLAS's: a table for the default backend, not a backend of its own.

    torch.ops.fp4compile.fake_quantize(x.cuda(), "hif4", 0)  ->  supports? Yes  ->  codec.fake_quantize

Kernels that quantise or decode are equal bit for bit to the reference, GEMMs up to the order of
their fp32 sums, and grouped ones under tensor scales to one rounding more.

    X.py            from an op's arguments to launches of X_kernels.py: codec, packed, rowwise, packed_rowwise
    arithmetic.py   what the kernels share; launch.py: what the launches share; replay.py: calls that repeat
    gemm, native    GEMMs of cuBLAS; grouped, grouped_rowwise: torch's GEMMs of groups
    produce         producers as Triton functions
    tune            measured cuts

Importing this package needs neither Triton nor a GPU: where one is missing, every kernel says so and the reference
runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fp4compile.backend import Answer, Kernel, No, Yes
from fp4compile.backends import checks
from fp4compile.backends.triton import (
    codec,
    gemm,
    grouped,
    grouped_rowwise,
    native,
    packed,
    packed_rowwise,
    produce,
    rowwise,
)
from fp4compile.backends.triton.replay import Plan, Replay
from fp4compile.producer import MOST_RESULTS, parse

Bind = Callable[[Mapping[str, Any]], Callable[..., Any]]

_LEAST_CAPABILITY = (8, 0)  # bf16 arithmetic


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


# --- checks: why a kernel does not take a call, or None ---------------------------------------------------------------


def _on_one_gpu(arguments: Mapping[str, Any]) -> str | None:
    devices = {n: v.device for n, v in arguments.items() if isinstance(v, Tensor)}
    other = [n for n, device in devices.items() if device.type != "cuda"]
    if other:
        return f"{', '.join(other)} not on a CUDA device"
    return None if len(set(devices.values())) == 1 else "the tensors are on different devices"


def _format_known(arguments: Mapping[str, Any]) -> str | None:
    known = codec.known(arguments["format"])
    return known.reason if isinstance(known, No) else None


def _format_in_rows(arguments: Mapping[str, Any]) -> str | None:
    return rowwise.refusal(arguments["format"])


def _matrix(arguments: Mapping[str, Any]) -> str | None:
    x = arguments["x"]
    return None if x.dim() == 2 and 0 not in x.shape else f"x of shape {tuple(x.shape)} is no matrix with elements"


def _producer(arguments: Mapping[str, Any]) -> str | None:
    return produce.refusal(arguments["producer"])


def _several(arguments: Mapping[str, Any]) -> str | None:
    return produce.refusal(arguments["producer"], range(2, MOST_RESULTS + 1))


def _scale_of_each(arguments: Mapping[str, Any]) -> str | None:
    scales = [arguments[f"tensor_scale_{i}"] for i in range(len(parse(arguments["producer"]).results))]
    if len({scale is None for scale in scales}) > 1:
        return "some have a tensor scale and some have none"
    return _objection([checks.scalars], ({"tensor_scale": scale} for scale in scales))


def _transform_size(arguments: Mapping[str, Any]) -> str | None:
    size = arguments["hadamard"]
    good = ", ".join(map(str, codec.HADAMARD_SIZES[1:]))
    return None if size in codec.HADAMARD_SIZES else f"Hadamard size {size} is not one of {good}"


def _transformed(arguments: Mapping[str, Any]) -> str | None:
    return None if arguments["hadamard"] else "nothing is transformed"


def _one_launch_pays(arguments: Mapping[str, Any]) -> str | None:
    bound = codec.arithmetic_bounds(arguments["rounding"], arguments["hadamard"])
    return "arithmetic bounds it, so that two kernels are as fast" if bound else None


def _objection(required: Sequence[checks.Check], given: Iterable[Mapping[str, Any]]) -> str | None:
    """What the first of some calls is refused for."""
    reasons = (check(arguments) for arguments in given for check in required)
    return next((reason for reason in reasons if reason is not None), None)


def _along_both(*required: checks.Check) -> checks.Check:
    """A check of a matrix along either axis, by checks of one: options that come in pairs are taken apart."""

    def along(arguments: Mapping[str, Any], axis: int) -> dict[str, Any]:
        own = {name: value[axis] for name, value in arguments.items() if isinstance(value, list | tuple)}
        return {**arguments, **own, "axis": axis, "tensor_scale": arguments.get(f"tensor_scale_{axis}")}

    def along_both(arguments: Mapping[str, Any]) -> str | None:
        x = arguments["x"]
        if x.dim() != 2:
            return f"x has {x.dim()} axes, not two"
        return _objection(required, (along(arguments, axis) for axis in (0, 1)))

    return along_both


# --- answers ---------------------------------------------------------------------------------------------------------


def _kernel(
    name: str,
    op: str,
    run: Callable[..., Any],
    *required: checks.Check,
    least: tuple[int, int] = _LEAST_CAPABILITY,
    packed: bool = False,
    bind: Bind | None = None,
) -> Kernel:
    """A kernel that takes what no check objects to, on a machine with Triton and GPUs of a compute capability."""

    def here() -> Answer:
        return available(least)

    def supports(arguments: Mapping[str, Any]) -> Answer:
        answer = here()
        if isinstance(answer, No):
            return answer
        reason = _objection(required, [arguments])
        return answer if reason is None else No(reason)

    return Kernel(name, op, "cuda", run, supports, packed, here, bind)


def _bound(name: str, op: str, bind: Bind, *required: checks.Check, **options: Any) -> Kernel:
    """A kernel of which calls share what `bind` does."""

    def run(**arguments: Any) -> Any:
        return bind(arguments)(*arguments.values())

    return _kernel(name, op, run, *required, bind=bind, **options)


def _replayed(name: str, op: str, plan: Plan, *required: checks.Check, **options: Any) -> Kernel:
    """A kernel that does what a plan says."""
    return _bound(name, op, partial(Replay, plan), *required, **options)


# --- the table -------------------------------------------------------------------------------------------------------

_QUANTIZED = (_on_one_gpu, checks.input, _format_known)
_SCALED = (_on_one_gpu, checks.input, checks.scale_rule, checks.scalars, _transform_size, _producer)
_OPTIONS = (checks.scale_rule, checks.scalars, _transform_size, checks.rounding, checks.square)
_ROWS = (_on_one_gpu, checks.input, _matrix, _format_in_rows, checks.scalars, _producer)
_OPTIONS_OF_ROWS = (checks.scale_rule, _transform_size, checks.rounding)

# Of the kernels of one op the first that supports a call runs it: `mm` on FP4 tensor cores before one that decodes.
# In a row checks go from general to particular, as the first that objects is what a report prints.
KERNELS: tuple[Kernel, ...] = (
    _kernel(
        "cublas/fp4_mm", "mm", native.mm,
        _on_one_gpu, native.packed_operands, native.sizes, checks.scalars, checks.unactivated,
        least=native.LEAST_CAPABILITY, packed=True,
    ),
    _bound(
        "cublas/packed_mm_rowwise", "mm", packed_rowwise.bind_mm,
        _on_one_gpu, packed.operands, packed_rowwise.operands, packed_rowwise.tokens, least=rowwise.LEAST_CAPABILITY,
    ),
    _kernel("triton/packed_mm", "mm", packed.mm, _on_one_gpu, packed.operands),
    _kernel("cublas/mm", "mm", gemm.mm, _on_one_gpu, gemm.available, gemm.dense_operands, checks.unactivated),
    _kernel(
        "triton/grouped_mm_packed", "grouped_mm_packed", packed.grouped_mm, _on_one_gpu, packed.operands_of_groups
    ),
    _kernel("torch/grouped_mm", "grouped_mm", grouped.grouped_mm, _on_one_gpu, grouped.operands),
    _replayed("triton/fake_quantize", "fake_quantize", codec.plan_fake_quantize, *_QUANTIZED, *_OPTIONS, _producer),
    _replayed(
        "triton/fake_quantize_both", "fake_quantize_both", codec.plan_fake_quantize_both,
        *_QUANTIZED, _along_both(*_OPTIONS), _one_launch_pays, _producer,
    ),
    _replayed(
        "triton/fake_quantize_each", "fake_quantize_each", codec.plan_fake_quantize_each,
        *_QUANTIZED, _matrix, _several, checks.scale_rule, _scale_of_each,
    ),
    _replayed(
        "triton/tensor_scale_each", "tensor_scale_each", codec.plan_tensor_scale_each,
        _on_one_gpu, checks.input, _matrix, _several, checks.scale_rule,
    ),
    _replayed("triton/quantize", "quantize", codec.plan_quantize, *_QUANTIZED, *_OPTIONS),
    _replayed(
        "triton/dequantize", "dequantize", codec.plan_dequantize,
        _on_one_gpu, _format_known, checks.scalars, checks.square, checks.packed,
    ),
    _bound("triton/tensor_scale", "tensor_scale", codec.bind_tensor_scale, *_SCALED),
    _bound("triton/tensor_scale_both", "tensor_scale_both", codec.bind_tensor_scale_both, *_SCALED, _transformed),
    _replayed(
        "triton/quantize_rowwise", "quantize_rowwise", rowwise.plan_quantize_rowwise,
        *_ROWS, *_OPTIONS_OF_ROWS, least=rowwise.LEAST_CAPABILITY,
    ),
    _replayed(
        "triton/quantize_rowwise_both", "quantize_rowwise_both", rowwise.plan_quantize_rowwise_both,
        *_ROWS, _along_both(*_OPTIONS_OF_ROWS), least=rowwise.LEAST_CAPABILITY,
    ),
    _bound(
        "cublas/mm_rowwise", "mm_rowwise", rowwise.bind_mm_rowwise,
        _on_one_gpu, rowwise.sizes, least=rowwise.LEAST_CAPABILITY,
    ),
    _kernel(
        "torch/grouped_mm_rowwise", "grouped_mm_rowwise", grouped_rowwise.grouped_mm_rowwise,
        _on_one_gpu, grouped_rowwise.on_hopper, grouped_rowwise.operands, least=grouped_rowwise.LEAST_CAPABILITY,
    ),
)  # fmt: skip
