"""Grouped FP8 GEMMs of rows: torch's own behind a stand-in for it, the kernel that makes them exact, and the GPU's."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile import rowwise as oracle
from fp4compile.backends.triton import grouped_rowwise, rowwise
from fp4compile.grouped import grouped_mm
from fp4compile.ops import OPS
from tests.backends.test_rowwise import PARTS, quantized
from tests.backends.test_triton_kernels import meta, moved
from tests.gpu import compiled, interpret_apart, needs_gpu, needs_triton
from tests.helpers import randn

OP = OPS["grouped_mm_rowwise"]
# Gradients and inputs by the weights' axis: [G, N, K] along K, and [G, K, N] along K.
AXES = (1, 0)


def given(tokens: Tensor, stack: Tensor, ends: Tensor, axis: int) -> dict[str, Tensor]:
    """Tensor arguments of the op for tokens [T, K] and a stack [G, N, K], which is held so that K is `axis`."""
    flat = stack.flatten(0, 1) if axis == 1 else stack.mT.flatten(0, 1)
    sides = (("a", quantized(tokens)), ("b", quantized(flat.contiguous(), axis)))
    parts = {f"{side}{part}": t for side, tensors in sides for part, t in zip(PARTS, tensors, strict=True)}
    return {**parts, "ends": ends}


def flagged(arguments: Mapping[str, Tensor], groups: int, tokens: int, columns: int) -> Tensor:
    """[tokens, columns], where the result read a flagged row; by hand, token by token."""
    a, b = (arguments[f"{side}_flags"].bool().repeat_interleave(oracle.FLAGGED) for side in "ab")
    stacked = len(arguments["b"]) == groups * columns
    found = torch.zeros(tokens, columns, dtype=torch.bool)
    start = 0
    for group, end in enumerate(arguments["ends"].tolist()):
        of_group = b[group * columns :][:columns] if stacked else b[:columns]
        found[start:end] = a[start:end, None] | of_group
        start = end
    return found


# --- what torch's GEMM is given --------------------------------------------------------------------------------------


def _scaled_grouped_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, offs: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """What torch documents of its op, whose shape rule checks layouts; garbage behind the last group."""
    assert not use_fast_accum
    operands = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b)]
    scales = a_scale.to("meta"), b_scale.to("meta")
    torch.ops.aten._scaled_grouped_mm(*operands, *scales, offs.to("meta"), None, None, out_dtype, use_fast_accum)
    assert b_scale.shape == (b.shape[0], b.shape[2])
    out = grouped_mm(a.float() * a_scale[:, None], b.float() * b_scale[:, None, :], offs)
    out[offs[-1] :] = float("nan")
    return out.to(out_dtype)


def _without_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_scaled_grouped_mm", _scaled_grouped_mm)

    def clear(out: Tensor, operands: Mapping[str, Tensor]) -> None:
        out[operands["ends"][-1] :] = 0

    monkeypatch.setattr(grouped_rowwise, "compute_again", clear)


def test_where_no_flag_stands_torchs_gemm_is_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_flags(monkeypatch)
    seen = 0
    for sample in OP.samples():
        if sample["a_flags"].any() or sample["b_flags"].any() or sample["dtype"] is not torch.bfloat16:
            continue
        got, expected = grouped_rowwise.grouped_mm_rowwise(**sample), OP.reference(**sample)
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-5, equal_nan=True)
        seen += 1
    assert seen >= 4


def test_operands_that_torchs_gemm_takes() -> None:
    ends = torch.tensor([10, 40], dtype=torch.int32)
    base = {**given(randn(40, 64), randn(2, 32, 64), ends, 1), "dtype": torch.bfloat16}
    assert grouped_rowwise.operands(base) is None
    for change, why in (
        ({"dtype": torch.float32}, "write bf16"),
        ({"a": base["a"].to(torch.float8_e5m2)}, "not E4M3"),
        (given(randn(40, 64), randn(2, 24, 64), ends, 1), "24 output columns are no multiple of 16"),
        (given(randn(40, 64), randn(2, 24, 64), ends, 0), "24 output columns are no multiple of 16"),
        (given(randn(0, 64), randn(2, 32, 64), ends, 1), "empty"),
        ({"ends": torch.zeros(1024, dtype=torch.int32)}, "1024 groups"),
    ):
        assert why in (grouped_rowwise.operands({**base, **change}) or "")


@pytest.mark.parametrize(("capability", "good"), [((9, 0), True), ((8, 9), False), ((10, 0), False)])
def test_devices(capability: tuple[int, int], good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (grouped_rowwise.on_hopper({"a": randn(1)}) is None) == good


# --- without a GPU: Triton's interpreter -----------------------------------------------------------------------------


def interpret(every: int) -> None:
    """What read a flagged row is computed again, what lies behind the groups is cleared, all else stays."""
    grouped_rowwise._MOST_PROGRAMS = 3  # of a process of its own: fewer than the parts, so that they take turns
    grouped_rowwise._MOST_PIECE = 2
    count = taken = 0
    ends_of = (torch.tensor(e, dtype=torch.int32) for e in ((3, 3, 20, 70), (0, 33, 33), (70,)))
    for ends, axis, where in islice(product(ends_of, AXES, ("ab", "", "b", "a")), 0, None, every):
        groups = len(ends)
        tokens, stack = randn(70, 96), randn(groups, 48, 96, seed=1)
        for row in (19, 68) if "a" in where else ():
            tokens[row, 32:64] *= 2.0**12
        if "b" in where:
            stack[groups - 1, 17, :32] *= 2.0**-20
        arguments = given(tokens, stack, ends, axis)
        expected = OP.reference(**arguments, dtype=torch.float32)
        out = torch.full_like(expected, 99.0)
        grouped_rowwise.compute_again(out, arguments)
        again = flagged(arguments, groups, *out.shape)
        kept = torch.where(again, expected, 99.0)
        kept[ends[-1] :] = 0
        torch.testing.assert_close(out, kept, rtol=1e-5, atol=1e-3)
        count, taken = count + 1, taken + bool(where)
        assert rowwise.COUNTS[out.device].tolist() == [taken, count]


@needs_triton
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_the_interpreter_computes_again_what_read_a_flagged_row(every: int) -> None:
    interpret_apart(__name__, every)


@needs_triton
@pytest.mark.parametrize(("groups", "axis", "blocks"), [(128, 1, 64), (1, 1, 3), (8, 0, 64)])
def test_the_exact_path_compiles_for_sm_90(groups: int, axis: int, blocks: int) -> None:
    columns = 2048
    rows, length = (groups * columns, blocks) if axis else (columns, groups * blocks)
    launch = grouped_rowwise.plan_exact(8192, columns, blocks, 32, groups, rows)
    parts = {}
    for side, (count, size) in {"a": (8192, blocks), "b": (rows, length)}.items():
        types = (torch.float8_e4m3fn, torch.float32, torch.uint8, torch.uint8)
        shapes = ((count, size * 32), (count,), (size, count), (count // 16,))
        parts |= {
            f"{side}{part}_ptr": meta(*shape, dtype=dtype)
            for part, shape, dtype in zip(PARTS, shapes, types, strict=True)
        }
    more = {"ends_ptr": meta(groups, dtype=torch.int32), "counts_ptr": meta(2, dtype=torch.int64)}
    ptx = compiled(launch, {**parts, **more, "out_ptr": meta(8192, columns)})
    assert "bf16.bf16.f32" in ptx


# --- on a GPU --------------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = needs_gpu

    def test_every_sample(self) -> None:
        for sample in OP.samples():
            wanted: dict[str, Any] = {**sample, "dtype": torch.bfloat16}
            got = OP.overload(**moved(wanted, "cuda")).cpu()
            expected = OP.reference(**wanted)
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-3, equal_nan=True)
