"""GEMMs of tokens and experts become row-wise scaled FP8 GEMMs where a kernel runs them, and keep their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4compile import rowwise
from fp4compile.backend import get_backend
from fp4compile.ops import OPS
from fp4compile.passes import RescaleGroups
from fp4compile.recipe import Operand, Recipe, Rule
from tests.claims import Claims, everything
from tests.helpers import Captured, capture, randn
from tests.passes.test_rescale import nothing

CLAIMED = ("quantize_rowwise", "grouped_mm_rowwise")
BACKEND = Claims(**dict.fromkeys(CLAIMED, everything))
PASS = RescaleGroups(roles=("forward", "dgrad"), least_tokens=13)
ENDS = torch.tensor([10, 10, 40], dtype=torch.int32)


class Experts(nn.Module):
    """Stacks held [experts, out, in], as most models do, or [experts, in, out]."""

    def __init__(self, transposed: bool, hidden: int = 64) -> None:
        super().__init__()
        shapes = ((3, hidden, 96), (3, 96, hidden))
        self.transposed = transposed
        self.up, self.down = (
            nn.Parameter(randn(*shape, seed=seed).bfloat16().transpose(1, 1 + (not transposed)).contiguous())
            for seed, shape in enumerate(shapes)
        )

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        up, down = (w.mT if self.transposed else w for w in (self.up, self.down))
        h = torch._grouped_mm(x, up, offs=ends)
        return torch._grouped_mm(torch.relu(h), down, offs=ends)


def captured(
    recipe: str | Recipe = "mxfp4", transposed: bool = True, hidden: int = 64, backend: Any = BACKEND
) -> Captured:
    x = randn(40, 96, seed=5).bfloat16().requires_grad_()
    found = capture(Experts(transposed, hidden), (x, ENDS), recipe)
    found.context.backend = backend
    return found.until("pack")


def inputs(found: Captured) -> list[Tensor]:
    """Random tensors, but for the ends of the groups."""
    return [ENDS if x.dtype == torch.int32 else x for x in found.inputs()]


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "mxfp4"])
@pytest.mark.parametrize("transposed", [True, False])
def test_forward_and_dgrad_read_fp8_and_keep_their_values(recipe: str, transposed: bool) -> None:
    found = captured(recipe, transposed)
    given = inputs(found)
    expected = found.execute(*given)
    assert found.run(PASS) == 4
    for site in found.sites:
        rewritten = site.node.target is OPS["grouped_mm_rowwise"].overload
        assert rewritten == (site.role != "wgrad")
        if rewritten:
            assert all(site.operand(n).meta["val"].dtype is torch.float8_e4m3fn for n in site.arguments)
    # Products of FP4 values span few binades here: every sum of them is exact in fp32, in any order.
    assert all(torch.equal(*pair) for pair in zip(found.execute(*given), expected, strict=True))
    text = found.text
    assert found.run(PASS) == 0
    assert found.text == text
    assert not found.context.notes
    found.run("legalise")
    assert {k for s in found.sites if s.role != "wgrad" for k in s.kernels} == {f"claimed/{op}" for op in CLAIMED}


@pytest.mark.parametrize(
    ("spec", "axis"), [(Operand("mxfp4", "stochastic"), 2), (Operand("mxfp4", "stochastic", hadamard=32), 1)]
)
def test_a_stack_as_a_matrix_has_the_same_bits(spec: Operand, axis: int) -> None:
    stack, seed = randn(3, 64, 96), torch.tensor(5)
    options = {"rounding": spec.rounding, "seed": seed, "stream": 3, "hadamard": spec.hadamard or 0}
    expected = torch.ops.fp4compile.fake_quantize(stack, "mxfp4", axis, **options)
    parts = torch.ops.fp4compile.quantize_rowwise(stack.flatten(0, 1), "mxfp4", axis - 1, **options)
    got = rowwise.stacked(rowwise.dequantize(*parts[:3]), stack.shape[axis], 3)
    assert torch.equal(got if axis == 1 else got.mT, expected)


@pytest.mark.parametrize("declined", CLAIMED)
def test_what_a_kernel_declines_stays(declined: str) -> None:
    found = captured(backend=Claims(**{op: nothing if op == declined else everything for op in CLAIMED}))
    text = found.text
    assert found.run(PASS) == 0
    assert found.text == text
    assert found.context.notes == [f"4 FP4 GEMMs of experts stay off FP8: claimed/{declined}: not today"]


def test_no_block_holds_values_of_two_experts() -> None:
    found = captured("mxfp4-plain", hidden=48)
    assert found.run(PASS) == 3
    reason = "the 48 rows of each matrix are no whole blocks of 32"  # of the up projection, along its outputs
    assert found.context.notes == [f"1 FP4 GEMMs of experts stay off FP8: {reason}"]


def test_2d_blocks_stay_and_the_report_says_so() -> None:
    square = Operand("mxfp4", block_2d=True)
    found = captured(Recipe("squares", (Rule("forward", input=Operand("mxfp4"), weight=square),)))
    assert found.run(PASS) == 0
    assert found.context.notes == ["2 FP4 GEMMs of experts stay off FP8: 2-D blocks"]


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "mxfp4-w4a16"])
def test_other_formats_and_operands_stay(recipe: str) -> None:
    found = captured(recipe)
    text = found.text
    assert found.run(PASS) == 0
    assert found.text == text
    assert not found.context.notes


def test_without_a_kernel_nothing_is_said() -> None:
    found = captured(backend=get_backend("reference"))
    assert found.run(PASS) == 0
    assert not found.context.notes


def test_by_default_it_is_the_forward_of_many_tokens() -> None:
    found = captured("mxfp4-plain")
    assert found.run("rescale_groups") == 0
    assert found.context.notes == ["2 FP4 GEMMs of experts stay off FP8: fewer than 1024 tokens an expert"]
    found = captured("mxfp4-plain")
    assert found.run(RescaleGroups(least_tokens=14)) == 0
    assert found.run(RescaleGroups(least_tokens=13)) == 2
    assert {site.role for site in found.sites if site.node in found.calls("grouped_mm_rowwise")} == {"forward"}
