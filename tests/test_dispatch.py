"""How a call of an op finds its kernel: once for calls that are alike, in the order of the table."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.backend import Answer, Kernel, No, Yes, register_backend
from fp4compile.backends.reference import ReferenceBackend
from fp4compile.dispatch import _INSTALLED, Dispatch, Place, installed
from fp4compile.errors import FP4TypeError
from tests.helpers import randn


class Recorded:
    """A kernel that counts what it is asked and bound for, and multiplies by a number."""

    def __init__(self, factor: float, takes: Callable[[Mapping[str, Any]], bool] = lambda arguments: True) -> None:
        self.factor, self.takes = factor, takes
        self.asked, self.bound = 0, 0
        self.seen: list[tuple[Any, ...]] = []

    def kernel(self) -> Kernel:
        def supports(arguments: Mapping[str, Any]) -> Answer:
            self.asked += 1
            return Yes() if self.takes(arguments) else No("not mine")

        def bind(arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
            self.bound += 1

            def run(x: Tensor, *others: Any) -> Tensor:
                self.seen.append(others)
                return x * self.factor

            return run

        def never(**arguments: Any) -> Any:
            raise AssertionError("a kernel that binds is not run by names")

        return Kernel("recorded", "quantize_backward", "cpu", never, supports, bind=bind)


def dispatch(*kernels: Kernel) -> Dispatch:
    made = Dispatch("quantize_backward")
    made.put_first(kernels)
    return made


def test_like_calls_are_bound_once() -> None:
    recorded = Recorded(2.0)
    op = dispatch(recorded.kernel())
    for seed in range(3):
        x = randn(4, 64, seed=seed)
        assert torch.equal(op(x, None, "hif4", 1), 2.0 * x)
    assert (recorded.asked, recorded.bound) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x[:2], None, "hif4", 1),
        lambda x: (x.t().contiguous().t(), None, "hif4", 1),
        lambda x: (x.bfloat16(), None, "hif4", 1),
        lambda x: (x.to("meta"), None, "hif4", 1),
        lambda x: (x, x, "hif4", 1),
        lambda x: (x, None, "mxfp4", 1),
        lambda x: (x, None, "hif4", 0),
    ],
    ids=["shape", "strides", "dtype", "device", "operand", "format", "axis"],
)
def test_what_a_kernel_may_depend_on_is_bound_apart(other: Callable[[Tensor], tuple[Any, ...]]) -> None:
    recorded = Recorded(1.0)
    op, x = dispatch(recorded.kernel()), randn(4, 64)
    op(x, None, "hif4", 1)
    op(*other(x))
    assert recorded.bound == 2


def test_arguments_arrive_in_order_however_they_are_given() -> None:
    recorded = Recorded(1.0)
    op, x, seed = dispatch(recorded.kernel()), randn(4, 64), torch.tensor(3)
    op(x, None, "hif4", 1, hadamard=16, sign_seed=seed)
    op(x, None, "hif4", 1, None, False, None, 16, seed)
    op(grad=x, original=None, format="hif4", axis=1, sign_seed=seed, hadamard=16)
    assert recorded.seen == [(None, "hif4", 1, None, False, None, 16, seed, False)] * 3
    assert recorded.bound == 1


def test_kernels_are_asked_in_turn_and_then_the_reference_runs() -> None:
    small = Recorded(2.0, lambda arguments: arguments["grad"].shape[0] == 1)
    op = dispatch(small.kernel(), Recorded(3.0, lambda arguments: arguments["grad"].shape[0] == 2).kernel())
    x = randn(3, 64)
    assert torch.equal(op(x[:1], None, "hif4", 1), 2.0 * x[:1])
    assert torch.equal(op(x[:2], None, "hif4", 1), 3.0 * x[:2])
    assert torch.equal(op(x, None, "hif4", 1), x)


def test_a_kernel_that_does_not_bind_is_run_by_names() -> None:
    def run(**arguments: Any) -> Tensor:
        assert list(arguments)[:4] == ["grad", "original", "format", "axis"]
        return arguments["grad"] + arguments["axis"]

    op, x = dispatch(Kernel("named", "quantize_backward", "cpu", run, lambda arguments: Yes())), randn(2, 64)
    assert torch.equal(op(x, None, "hif4", 1), x + 1)


def test_kernels_that_come_later_come_first() -> None:
    op, x = dispatch(Recorded(2.0).kernel()), randn(2, 64)
    op(x, None, "hif4", 1)
    op.put_first([Recorded(5.0).kernel()])
    assert torch.equal(op(x, None, "hif4", 1), 5.0 * x)


def test_shapes_without_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp4compile.dispatch._MOST_BOUND", 3)
    recorded = Recorded(2.0)
    op = dispatch(recorded.kernel())
    for rows in range(1, 9):
        x = randn(rows, 64)
        assert torch.equal(op(x, None, "hif4", 1), 2.0 * x)
        assert len(op._bound) <= 3


def test_a_place_finds_its_kernel_with_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, x = Recorded(2.0), randn(2, 64)
    monkeypatch.setitem(_INSTALLED, ("quantize_backward", "cpu"), dispatch(recorded.kernel()))
    place, full = Place("quantize_backward", "cpu"), (None, "hif4", 1, None, False, None, 0, None, False)
    for _ in range(3):
        assert torch.equal(place.run(x, *full), 2.0 * x)
    assert (recorded.asked, recorded.bound) == (1, 1)


def test_without_kernels_the_op_is_called() -> None:
    draw = torch.ops.fp4compile.draw_seed.default
    assert installed("draw_seed", "cpu") is draw
    place = Place("draw_seed", "cpu")
    assert place.run(torch.device("cpu")).dtype == torch.int64
    assert place.run is draw


@pytest.mark.parametrize("thing", [ReferenceBackend, "reference", None])
def test_only_backends_can_be_registered(thing: Any) -> None:
    with pytest.raises(FP4TypeError, match="register_backend needs a Backend, got"):
        register_backend(thing)


@pytest.mark.slow
def test_the_first_call_of_a_process_installs_kernels(tmp_path: Path) -> None:
    """A program that torch.export.load has read may be all that a process runs."""

    class Fake(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fp4compile.fake_quantize(x, "hif4", -1)

    torch.export.save(torch.export.export(Fake(), (randn(4, 64),)), tmp_path / "a.pt2")
    lines = [
        "import torch, fp4compile",
        "from fp4compile import dispatch, ops",
        f"program = torch.export.load({str(tmp_path / 'a.pt2')!r}).module()",
        "assert not dispatch._INSTALLED",
        "program(torch.ones(4, 64))",
        "assert ('fake_quantize', 'cpu') in dispatch._INSTALLED",
        "assert dispatch._INSTALLED['fake_quantize', 'cpu']._bound",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
