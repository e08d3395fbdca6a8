"""What launches of Triton kernels share: a compilation per kind of arguments, memory that outlives CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.backends.triton import launch, packed
from fp4compile.backends.triton.launch import Launch

CPU = torch.device("cpu")


class Kernel:
    """A kernel as Triton makes one: `kernel[grid](…)` compiles and runs, `compiled[grid](…)` runs."""

    arg_names = ("x_ptr", "y_ptr", "size", "seed", "BLOCK")

    def __init__(self) -> None:
        self.compiled: list[dict[str, Any]] = []
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        assert grid == (3, 1, 1)

        def compile_and_run(**arguments: Any) -> dict[Any, Any]:
            self.compiled.append(arguments)
            return {grid: lambda *values: self.started.append(values)}

        return compile_and_run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(launch, "kernels", lambda module: SimpleNamespace(double=made))
    return made


def planned() -> Launch:
    return Launch("some_kernels", "double", 3, {"size": 48}, {"BLOCK": 16}, num_warps=2)


def test_a_second_call_hands_over_addresses_in_the_kernels_order(kernel: Kernel) -> None:
    x, y, each = torch.zeros(16), torch.zeros(16), planned()
    for seed in (7, 8):
        launch.run(each, {"y_ptr": y, "x_ptr": x, "seed": seed}, CPU)
    (first,) = kernel.compiled
    assert first["x_ptr"] is x
    assert (first["size"], first["BLOCK"], first["num_warps"], first["enable_fp_fusion"]) == (48, 16, 2, False)
    assert kernel.started == [(x.data_ptr(), y.data_ptr(), 48, 8, 16)]


def test_what_triton_specialises_on_is_compiled_apart(kernel: Kernel) -> None:
    memory, each = torch.zeros(64), planned()
    start = -memory.data_ptr() // 4 % 4  # of an aligned element
    other = torch.device("meta", 1)  # any device that is not the first
    calls: list[tuple[Tensor | None, torch.device]] = [
        (memory[start : start + 16], CPU),
        (memory[start + 1 : start + 17], CPU),
        (memory[start : start + 16].view(torch.int32), CPU),
        (None, CPU),
        (memory[start : start + 16], other),
    ]
    for _ in range(2):
        for x, device in calls:
            launch.run(each, {"x_ptr": x, "y_ptr": memory, "seed": 1}, device)
    assert len(kernel.compiled) == len(kernel.started) == len(calls)


def test_lasting_memory_comes_from_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that is warmed up takes what its own thread allocates."""
    zeros, threads = torch.zeros, []

    def recorded(*size: int, **options: Any) -> Tensor:
        threads.append(threading.get_ident())
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", recorded)
    with torch.inference_mode():
        found = launch.lasting_zeros(5, torch.int32, CPU)
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
    assert torch.equal(found, torch.tensor([0] * 5, dtype=torch.int32))
    assert not found.is_inference()


def test_zeros_are_kept_but_for_those_of_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[torch.device, Tensor] = {}
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    assert launch.kept_zeros(kept, 2, torch.int64, CPU).tolist() == [0, 0]
    assert not kept
    monkeypatch.setattr(launch, "capturing", lambda device: False)
    found = launch.kept_zeros(kept, 2, torch.int64, CPU)
    assert kept == {CPU: found}
    monkeypatch.setattr(launch, "capturing", lambda device: True)
    assert launch.kept_zeros(kept, 2, torch.int64, CPU) is found


def test_counts_of_parts_are_plain_zeros_off_the_gpu() -> None:
    assert packed.counts(CPU, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("n", "by", "quotient", "multiple", "power"), [(0, 4, 0, 0, 1), (1, 4, 1, 4, 1), (8, 4, 2, 8, 8), (9, 4, 3, 12, 16)]
)
def test_integers(n: int, by: int, quotient: int, multiple: int, power: int) -> None:
    assert launch.ceil_div(n, by) == quotient
    assert launch.round_up(n, by) == multiple
    assert launch.power_of_two(n) == power


@pytest.mark.parametrize(("word", "expected"), [(0, 0), (2**31 - 1, 2**31 - 1), (2**31, -(2**31)), (2**32 - 1, -1)])
def test_words_as_signed_integers(word: int, expected: int) -> None:
    assert launch.signed(word) == expected
