"""A plan's allocations and launches done again: the same work on the tensors of each call, by their addresses."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.backends.triton import launch
from fp4compile.backends.triton.launch import Launch
from fp4compile.backends.triton.replay import Launches, Replay

FIRST = Launch("some_kernels", "first", 1, {"size": 8}, {}, 1)
SECOND = Launch("some_kernels", "second", 1, {}, {}, 1)


def plan(x: Tensor, axis: int, other: Tensor | None, stream: int) -> tuple[Launches, tuple[Tensor, Tensor]]:
    """Two launches that share a buffer, and a result that the second sees as words."""
    y, codes = x.new_empty(x.shape), x.new_empty((x.numel() // 2,), dtype=torch.uint8)
    partial = x.new_empty((3,), dtype=torch.int32)
    first = {"x_ptr": x, "other_ptr": other, "partial_ptr": partial, "stream": stream}
    return [(FIRST, first), (SECOND, {"partial_ptr": partial, "words_ptr": codes.view(torch.int32), "y_ptr": y})], (
        y,
        codes,
    )


class Kernel:
    """A kernel as Triton makes one; keeps what it is compiled for and started with."""

    def __init__(self, *names: str) -> None:
        self.arg_names = names
        self.compiled: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        def compile_and_run(**arguments: Any) -> dict[Any, Any]:
            self.compiled.append(arguments)
            return {grid: lambda *values: self.started.append(dict(zip(self.arg_names, values, strict=True)))}

        return compile_and_run


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, Kernel]:
    first = Kernel("size", "x_ptr", "partial_ptr", "other_ptr", "stream")
    second = Kernel("y_ptr", "words_ptr", "partial_ptr")
    monkeypatch.setattr(launch, "kernels", lambda module: SimpleNamespace(first=first, second=second))
    for each in (FIRST, SECOND):
        each._ready.clear()
    return first, second


def replay(x: Tensor, other: Tensor | None = None) -> Replay:
    return Replay(plan, {"x": x, "axis": 1, "other": other, "stream": 7})


def test_a_call_launches_what_the_plan_does_on_its_own_tensors(kernels: tuple[Kernel, Kernel]) -> None:
    first, second = kernels
    run, seen = replay(torch.zeros(8, 16), torch.zeros(4)), []
    for _ in range(3):
        x, other = torch.zeros(8, 16), torch.zeros(4)
        y, codes = run(x, 1, other, 7)
        assert (y.shape, y.dtype, codes.shape, codes.dtype) == (x.shape, x.dtype, (64,), torch.uint8)
        seen.append((x, other, y, codes))
    assert len(first.compiled) == len(second.compiled) == 1
    assert first.compiled[0]["x_ptr"] is seen[0][0]
    assert second.compiled[0]["words_ptr"].dtype == torch.int32
    for (x, other, y, codes), one, two in zip(seen[1:], first.started, second.started, strict=True):
        assert one["partial_ptr"] == two["partial_ptr"] != 0
        addresses = {"x_ptr": x.data_ptr(), "other_ptr": other.data_ptr()}
        assert one == {"size": 8, "stream": 7, "partial_ptr": one["partial_ptr"], **addresses}
        assert (two["y_ptr"], two["words_ptr"]) == (y.data_ptr(), codes.data_ptr())


def test_one_tensor_in_two_places_is_two_arguments(kernels: tuple[Kernel, Kernel]) -> None:
    """The first call's operand is x itself; another call's is not."""
    first, _ = kernels
    same, x, other = torch.zeros(8, 16), torch.zeros(8, 16), torch.zeros(8, 16)
    run = replay(same, same)
    run(same, 1, same, 7)
    run(x, 1, other, 7)
    assert (first.started[-1]["x_ptr"], first.started[-1]["other_ptr"]) == (x.data_ptr(), other.data_ptr())


def test_absent_operands_stay_absent(kernels: tuple[Kernel, Kernel]) -> None:
    run = replay(torch.zeros(8, 16))
    for _ in range(2):
        run(torch.zeros(8, 16), 1, None, 7)
    assert kernels[0].started[-1]["other_ptr"] is None


def test_strided_tensors_are_copied_first(kernels: tuple[Kernel, Kernel]) -> None:
    x = torch.arange(128.0).view(16, 8).t()
    y, _ = replay(x)(x, 1, None, 7)
    given = kernels[0].compiled[0]["x_ptr"]
    assert given.is_contiguous() and y.is_contiguous()
    assert torch.equal(given, x)


def test_other_alignments_are_compiled_apart(kernels: tuple[Kernel, Kernel]) -> None:
    first, second = kernels
    memory = torch.zeros(160)
    start = -memory.data_ptr() // 4 % 4  # of an aligned element
    aligned, shifted = memory[start : start + 128].view(8, 16), memory[start + 1 : start + 129].view(8, 16)
    run = replay(shifted)
    for x in (shifted, aligned, shifted, aligned):
        run(x, 1, None, 7)
    assert (len(first.compiled), len(second.compiled)) == (2, 1)
    assert [each["x_ptr"] for each in first.started] == [shifted.data_ptr(), aligned.data_ptr()]
    assert len(second.started) == 3


def test_words_of_what_begins_between_two_words_are_copied(kernels: tuple[Kernel, Kernel]) -> None:
    """A slice of bytes may begin anywhere; a kernel that reads words of it may not."""

    def of_words(codes: Tensor) -> tuple[Launches, Tensor]:
        y = codes.new_empty(codes.shape)
        return [(SECOND, {"partial_ptr": None, "words_ptr": codes.view(torch.int32), "y_ptr": y})], y

    codes = torch.arange(65, dtype=torch.uint8)[1:]
    Replay(of_words, {"codes": codes})(codes)
    assert torch.equal(kernels[1].compiled[0]["words_ptr"].view(torch.uint8), codes)


def test_another_current_device_is_changed_for_the_launch(
    kernels: tuple[Kernel, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run`, which does that, takes over."""
    from fp4compile.backends.triton import replay as module

    x, runs = torch.zeros(8, 16), []
    run = replay(x)
    run(x, 1, None, 7)
    monkeypatch.setattr(module, "is_current", lambda device: False)
    monkeypatch.setattr(module, "run", lambda *arguments: runs.append(arguments))
    run(x, 1, None, 7)
    assert [each[0] for each in runs] == [FIRST, SECOND]
    assert not kernels[0].started


def test_empty_results_launch_nothing(kernels: tuple[Kernel, Kernel]) -> None:
    x = torch.zeros(0, 16)
    y, codes = replay(x)(x, 1, None, 7)
    assert (y.shape, codes.shape) == ((0, 16), (0,))
    assert not kernels[0].compiled
    assert not kernels[1].compiled


def test_a_plan_without_results_writes_into_its_arguments(kernels: tuple[Kernel, Kernel]) -> None:
    def into(x: Tensor) -> tuple[Launches, tuple[Tensor, ...]]:
        return [(FIRST, {"x_ptr": x, "partial_ptr": x, "other_ptr": None, "stream": 0})], ()

    x = torch.zeros(8)
    assert Replay(into, {"x": x})(x) == ()
    assert kernels[0].compiled[0]["x_ptr"] is x
