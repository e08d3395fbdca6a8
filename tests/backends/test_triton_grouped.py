"""torch's grouped GEMM under tensor scales: it has a CPU form, so its values are tested here too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp4compile.backends.triton import grouped
from fp4compile.ops import OPS
from tests.backends.test_triton_kernels import meta
from tests.gpu import compiled, interpret_apart, needs_gpu, needs_triton
from tests.helpers import randn

SAMPLES = [s for s in OPS["grouped_mm"].samples() if s["a"].dtype == torch.bfloat16]
# bf16 before the tensor scales and after them.
ROUNDINGS = 2 * 2.0**-8


def assert_close(got: Tensor, sample: Mapping[str, Any]) -> None:
    wide = {name: x.float() if name in ("a", "b") else x for name, x in sample.items()}
    exact = OPS["grouped_mm"].reference(**wide)
    torch.testing.assert_close(got.float().cpu(), exact, rtol=1.01 * ROUNDINGS, atol=1e-5)


def finish(
    out: Tensor, ends: Tensor, axis: int | None, a_tensor_scale: Tensor | None, b_tensor_scale: Tensor | None
) -> None:
    """What the kernel does, in torch."""
    scales = [scale for scale in (a_tensor_scale, b_tensor_scale) if scale is not None]
    out.copy_(out.float() * math.prod(scales))
    if axis is not None:
        out.narrow(axis, int(ends[-1]), out.shape[axis] - int(ends[-1])).zero_()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "finish", finish)


def interpret(every: int) -> None:
    """The kernel in Triton's interpreter, in fp32, as it cuts bf16; on matrices and stacks whose rows lie apart."""
    ends, scale = torch.tensor([3, 30], dtype=torch.int32), torch.tensor(0.37)
    for shape, axis in (((40, 20), 0), ((6, 1040), 1), ((2, 5, 40), None)):
        for scales in ((None, None), (scale, None), (scale, scale * 3), (None, scale)):
            padded = randn(*shape[:-1], shape[-1] + 4)
            got, expected = padded.clone()[..., :-4], padded.clone()[..., :-4]
            for x in (got, expected):
                if axis is not None:
                    x.narrow(axis, 30, shape[axis] - 30).fill_(float("nan"))
            grouped.finish(got, ends, axis, *scales)
            finish(expected, ends, axis, *scales)
            assert torch.equal(got, expected)


@needs_triton
def test_the_interpreter_finishes_as_torch_does() -> None:
    interpret_apart(__name__, 1)


@needs_triton
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("scaled", [False, True])
def test_what_finishes_compiles_for_sm_90(axis: int | None, scaled: bool) -> None:
    scales = dict.fromkeys(("a_ts_ptr", "b_ts_ptr"), meta(dtype=torch.float32) if scaled else None)
    given = {"out_ptr": meta(4096, 2048), "ends_ptr": meta(8, dtype=torch.int32), **scales}
    ptx = compiled(grouped._plan(4096, 2048, 2048, 8, axis), given)
    assert ("ld.global.v4" in ptx) == scaled  # 16 bytes a thread


@pytest.mark.usefixtures("on_cpu")
def test_values_are_the_ops_to_two_roundings() -> None:
    for sample in SAMPLES:
        assert grouped.operands(sample) is None
        assert_close(grouped.grouped_mm(**sample), sample)


@pytest.mark.usefixtures("on_cpu")
def test_what_torch_leaves_unwritten_is_zero() -> None:
    a, b, ends = randn(40, 24).bfloat16(), randn(2, 24, 16).bfloat16(), torch.tensor([3, 30], dtype=torch.int32)
    written = torch._grouped_mm
    try:
        torch._grouped_mm = lambda *args, **kwargs: written(*args, **kwargs).index_fill_(  # type: ignore[assignment]
            0, torch.arange(30, 40), float("nan")
        )
        out = grouped.grouped_mm(a, b, ends, torch.tensor(2.0))
    finally:
        torch._grouped_mm = written
    assert not out[30:].any() and out[:30].isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": randn(40, 24)}, "a is torch.float32, not bf16"),
        ({"a": randn(40, 20).bfloat16()}, "a has rows 20 elements apart"),
        ({"b": randn(2, 20, 24).bfloat16().mT}, None),
        ({"b": randn(2, 24, 16, 2).bfloat16()[..., 0]}, "neither its rows nor its columns are contiguous"),
    ],
)
def test_operands(change: Mapping[str, Any], reason: str | None) -> None:
    given = {"a": randn(40, 24).bfloat16(), "b": randn(2, 24, 16).bfloat16(), **change}
    found = grouped.operands(given)
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("op", ["pad_groups", "grouped_mm"])
def test_shapes_on_a_gpu_are_known_without_one(op: str) -> None:
    for sample in OPS[op].samples():
        expected = OPS[op].reference(**sample)
        with FakeTensorMode():
            given = {
                name: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
                if isinstance(x, Tensor)
                else x
                for name, x in sample.items()
            }
            found = OPS[op].overload(**given)
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        assert all((f.shape, f.dtype, f.device.type) == (e.shape, e.dtype, "cuda") for f, e in pairs)


class TestOnGpu:
    pytestmark = needs_gpu

    def test_every_sample(self) -> None:
        for sample in SAMPLES:
            moved = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in sample.items()}
            assert_close(OPS["grouped_mm"].overload(**moved), sample)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
    def test_padding_is_that_of_the_cpu_and_waits_for_nothing(self) -> None:
        given = [(s["tokens"].cuda(), s["ends"].cuda(), s["multiple"]) for s in OPS["pad_groups"].samples()]
        try:
            torch.cuda.set_sync_debug_mode("error")
            made = [OPS["pad_groups"].overload(*arguments) for arguments in given]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for sample, (padded, ends) in zip(OPS["pad_groups"].samples(), made, strict=True):
            expected = OPS["pad_groups"].reference(**sample)
            assert torch.equal(padded.cpu(), expected[0])
            assert torch.equal(ends.cpu(), expected[1])
