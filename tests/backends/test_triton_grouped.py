"""torch's grouped GEMM under tensor scales: it has a CPU form, so its values are tested here too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp4compile.backends.triton import grouped
from fp4compile.ops import OPS
from tests.gpu import needs_gpu
from tests.helpers import randn

SAMPLES = [s for s in OPS["grouped_mm"].samples() if s["a"].dtype == torch.bfloat16]
# bf16 before the tensor scales and after them.
ROUNDINGS = 2 * 2.0**-8


def assert_close(got: Tensor, sample: Mapping[str, Any]) -> None:
    wide = {name: x.float() if name in ("a", "b") else x for name, x in sample.items()}
    exact = OPS["grouped_mm"].reference(**wide)
    torch.testing.assert_close(got.float().cpu(), exact, rtol=1.01 * ROUNDINGS, atol=1e-5)


def test_values_are_the_ops_to_two_roundings() -> None:
    for sample in SAMPLES:
        assert grouped.operands(sample) is None
        assert_close(grouped.grouped_mm(**sample), sample)


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
