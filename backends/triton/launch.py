"""Launches of Triton kernels: what calls of one shape share, compiled once, run with the tensors of a call.

    Launch("codec_kernels", "fake_quantize", 1024 programs, {lanes: 4096, size: 512, …}, {L: 64, K: 64, …}, 2 warps)
        -> run(launch, {x_ptr: x, y_ptr: y, …}, device)

A launch is compiled once per device and alignment of pointers. Triton is imported with the first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ready:
    """A compiled kernel: how to start it, all its arguments in order, and where those of a call go among them."""

    start: Callable[..., Any]
    arguments: list[Any]
    given: list[int]

    def filled(self, given: Mapping[str, Any]) -> list[Any]:
        """The arguments of a call: of a tensor its address, which Triton would ask the driver for."""
        arguments = self.arguments.copy()
        for position, value in zip(self.given, given.values(), strict=True):
            arguments[position] = value.data_ptr() if isinstance(value, Tensor) else value
        return arguments


@dataclass(frozen=True, eq=False)
class Launch:
    """What calls of one shape share.

    Attributes:
        module: where the kernel is, beside this file.
        kernel: its name there.
        grid: the number of programs.
        arguments: those that no call changes.
        constants: compile-time arguments.
        num_warps: warps per program.
    """

    module: str
    kernel: str
    grid: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    _ready: dict[Any, Ready] = field(default_factory=dict, init=False, repr=False)

    def ready(self, given: Mapping[str, Any], device: torch.device) -> Ready | None:
        """The kernel compiled for arguments like these, None before the first run."""
        return self._ready.get(_specialised(given, device))


def _specialised(given: Mapping[str, Any], device: torch.device) -> tuple[Any, ...]:
    """All that Triton specialises on beyond the launch itself; its own binding of arguments takes ten times as long."""
    key: list[Any] = [device.index]
    for value in given.values():
        if isinstance(value, Tensor):
            key += value.dtype, value.data_ptr() & 15
        else:
            key.append(value is None)
    return tuple(key)


@cache
def kernels(module: str) -> ModuleType:
    """A module of kernels beside this file, which imports Triton."""
    return importlib.import_module(f"fp4compile.backends.triton.{module}")


def is_current(device: torch.device) -> bool:
    """Whether Triton launches on the device: it is the current one, or none of CUDA's."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """The device made the current one, where it is not."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)


def run(launch: Launch, given: Mapping[str, Any], device: torch.device) -> None:
    """Launch on the current stream of the device.

    Args:
        given: the arguments of this call: tensors, None, and integers on which kernels do not specialise.
    """
    with current(device):
        ready = launch.ready(given, device)
        if ready is None:
            _first_run(launch, given, device)
        else:
            ready.start(*ready.filled(given))


def _first_run(launch: Launch, given: Mapping[str, Any], device: torch.device) -> None:
    kernel, grid = getattr(kernels(launch.module), launch.kernel), (launch.grid, 1, 1)
    fixed = {**launch.arguments, **launch.constants}
    compiled = kernel[grid](**fixed, **given, num_warps=launch.num_warps, enable_fp_fusion=False)
    if hasattr(compiled, "__getitem__"):  # Triton's interpreter compiles nothing
        names = kernel.arg_names
        ready = Ready(compiled[grid], list(map(fixed.get, names)), list(map(names.index, given)))
        launch._ready[_specialised(given, device)] = ready


# --- memory ----------------------------------------------------------------------------------------------------------


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def lasting_zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in memory of no CUDA graph, for a buffer that outlives the call; not while a graph is captured.

    While Inductor warms a graph up, what the thread allocates comes from that graph's pool, which is given to others
    once the call is over: another thread allocates. All streams can read the zeros when this returns.
    """

    def allocate() -> Tensor:
        zeros = torch.zeros(size, dtype=dtype, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        return zeros

    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(allocate).result()


def kept_zeros(kept: dict[torch.device, Tensor], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The zeros of a device, made with the first call and kept; a graph captured before that has its own."""
    found = kept.get(device)
    if found is None:
        if capturing(device):
            return torch.zeros(size, dtype=dtype, device=device)
        found = kept.setdefault(device, lasting_zeros(size, dtype, device))
    return found


def viewed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same memory seen as another dtype; a copy where x begins at no whole element of it."""
    if x.dtype == dtype:
        return x
    begins_whole = x.storage_offset() * x.itemsize % dtype.itemsize == 0
    return (x if begins_whole else x.clone()).view(dtype)


# --- integers --------------------------------------------------------------------------------------------------------


def ceil_div(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def round_up(n: int, to: int) -> int:
    """The least multiple of `to` that is not below n."""
    return ceil_div(n, to) * to


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def signed(word: int) -> int:
    """A 32-bit word as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31
