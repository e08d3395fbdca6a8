"""What a call of an op costs the host: through torch's dispatcher, and as the code that Inductor writes calls it.

    OMP_NUM_THREADS=1 python benchmarks/op_calls.py

Microseconds per call, the least of several rounds, nothing waited for, next to a `torch.mm` of the same run. On a CUDA
device the kernels run, on matrices so small that the device keeps up. Without one the same kernels are called on CPU
tensors and what starts them is a function that does nothing: all of a call is timed but the launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from fp4compile.backend import Backend, Yes, register_backend
from fp4compile.backends import triton
from fp4compile.backends.triton import launch
from fp4compile.dispatch import Place, install_kernels, installed
from fp4compile.ops import OPS

EDGE = 128
ROUNDS, CALLS = 9, 300
NEAREST, ROWS = ["nearest"] * 2, ["rceil"] * 2


@dataclass(frozen=True)
class Case:
    """A call by its arguments; `on_cpu` where nothing but a launch computes."""

    name: str
    op: str
    arguments: Mapping[str, Any]
    on_cpu: bool = True


def cases(device: str) -> list[Case]:
    """The calls that training steps are made of."""
    x = torch.randn(EDGE, EDGE, device=device).bfloat16()
    scale, seed = torch.tensor(0.01, device=device), torch.tensor(7, device=device)
    one = {"x": x, "format": "hif4", "axis": 1}
    random = {"rounding": "stochastic", "seed": seed, "stream": 3, "hadamard": 16}
    pair = {"rounding": NEAREST, "stream": [1, 2], "hadamard": [0, 0]}
    rows = torch.ops.fp4compile.quantize_rowwise(x, "mxfp4", 1)
    names = ("", "_scale", "_exponents", "_flags")
    operands = {f"{side}{name}": part for side in "ab" for name, part in zip(names, rows, strict=True)}
    return [
        Case("HiF4", "fake_quantize", one),
        Case("NVFP4, SR, RHT", "fake_quantize", {**one, "format": "nvfp4", "tensor_scale": scale, **random}),
        Case(
            "HiF4",
            "fake_quantize_both",
            {"x": x, "format": "hif4", "scale_rule": None, "block_2d": [False] * 2, **pair},
        ),
        Case("NVFP4", "tensor_scale", {"x": x, "format": "nvfp4"}),
        Case("NVFP4", "quantize", {**one, "format": "nvfp4", "tensor_scale": scale}),
        Case("MXFP4", "quantize_rowwise", {"x": x, "format": "mxfp4", "axis": 1}),
        Case("MXFP4", "quantize_rowwise_both", {"x": x, "format": "mxfp4", "scale_rule": ROWS, **pair}),
        Case("MXFP4", "mm_rowwise", {**operands, "dtype": torch.bfloat16}, on_cpu=False),
        Case("NVFP4", "mm", {"a": x, "b": x.t(), "a_tensor_scale": scale, "b_tensor_scale": scale}, on_cpu=False),
    ]


class _Stub:
    """A Triton kernel that is compiled to nothing."""

    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def compile_and_run(num_warps: int, enable_fp_fusion: bool, **arguments: Any) -> dict[Any, Any]:
            self.arg_names = list(arguments)
            return {grid: lambda *values: None}

        return compile_and_run


class _OnCpu(Backend):
    """The kernels of CUDA on CPU tensors."""

    name = "triton on the CPU"
    doc = "launches nothing"
    kernels = tuple(replace(kernel, device="cpu", supports=lambda arguments: Yes()) for kernel in triton.KERNELS)

    def compile(self, graph_module: GraphModule, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """The graph as it is."""
        return graph_module


@contextmanager
def stubbed() -> Iterator[None]:
    """Calls on CPU tensors start what would be launched on CUDA's."""
    names = ("fake_quantize", "fake_quantize_both", "quantize", "amax", "tensor_scale", "window", "exact")
    register_backend(_OnCpu())
    install_kernels(_OnCpu.name)
    with mock.patch.object(launch, "kernels", lambda module: SimpleNamespace(**{name: _Stub() for name in names})):
        yield


def microseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    times = []
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(times[1:])  # the first compiles


def ways(case: Case, device: str) -> tuple[float, float, float]:
    """Through torch's dispatcher, and in Inductor's code for dynamic and for static sizes."""
    signature = OPS[case.op].signature.bind(**case.arguments)
    signature.apply_defaults()
    arguments = list(signature.arguments.values())
    overload, place = OPS[case.op].overload, Place(case.op, device)
    return (
        microseconds(lambda: overload(*arguments)),
        microseconds(lambda: installed(case.op, device)(*arguments)),
        microseconds(lambda: place.run(*arguments)),
    )


def main() -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    install_kernels()
    prepared = [case for case in cases(device) if case.on_cpu or device == "cuda"]
    x = torch.randn(EDGE, EDGE, device=device).bfloat16()[: EDGE if device == "cuda" else 1]
    allocation, mm = microseconds(lambda: x.new_empty(x.shape)), microseconds(lambda: x @ x.t())
    table = Table(title=f"µs per call on the host; an allocation {allocation:.1f}, torch.mm {mm:.1f}")
    for column in ("op", "call", "dispatcher", "dynamic sizes", "static sizes"):
        table.add_column(column)
    with nullcontext() if device == "cuda" else stubbed():
        for case in prepared:
            table.add_row(case.op, case.name, *(f"{us:.1f}" for us in ways(case, device)))
    Console().print(table)


if __name__ == "__main__":
    main()
