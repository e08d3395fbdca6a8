"""Equal quantisations become one; those that differ in anything stay apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp4compile.passes import Share
from fp4compile.recipe import Operand, Recipe, Rule
from tests.helpers import capture, randn, same_bits, trace


class Projections(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(count)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [project(x) for project in self.projections]


@pytest.mark.parametrize("recipe", ["hif4-plain", "mxfp4-plain", "nvfp4-plain", "hif4", "mxfp4"])
def test_one_quantisation_per_tensor_and_axis(recipe: str) -> None:
    captured = capture(Projections(), [randn(8, 64).requires_grad_()], recipe).until("stabilise")
    assert len(captured.calls("quantize")) == 3 * 6
    captured.run("share")
    # x along both axes; three weights and three gradients along both.
    assert len(captured.calls("quantize")) == 2 + 3 * 2 + 3 * 2
    assert len(captured.calls("dequantize")) == 14


@pytest.mark.parametrize("recipe", ["hif4", "mxfp4", "nvfp4", "nvfp4-w4a4"])
def test_changes_no_bit_and_a_second_run_changes_nothing(recipe: str) -> None:
    captured = capture(Projections(), [randn(8, 64).requires_grad_()], recipe).until("stabilise")
    before = captured.execute()
    assert captured.run("share") > 0
    assert same_bits(captured.execute(), before)
    text = captured.text
    assert captured.run("share") == 0
    assert captured.text == text


def test_a_tensor_scale_is_computed_once_for_both_axes() -> None:
    captured = capture(Projections(1), [randn(8, 64).requires_grad_()], "nvfp4-plain").until("share")
    assert len(captured.calls("tensor_scale")) == 3  # x, W, dY


VARIANTS = {
    "plain": Operand("mxfp4"),
    "format": Operand("nvfp4"),
    "scale rule": Operand("mxfp4", scale_rule="ceil"),
    "SR": Operand("mxfp4", scale_rule="truncation-free", rounding="stochastic"),
    "2-D": Operand("mxfp4", block_2d=True),
    "no tensor scale": Operand("nvfp4", tensor_scale=False),
}


def test_other_specs_of_one_tensor_stay_apart() -> None:
    specs = [*VARIANTS.values(), *VARIANTS.values()]
    rules = [Rule("forward", f"projections.{index}", input=spec) for index, spec in enumerate(specs)]
    captured = capture(Projections(len(specs)), [randn(8, 64)], Recipe("test", tuple(rules))).until("stabilise")
    assert len(captured.calls("quantize")) == 2 * len(VARIANTS)
    before = captured.execute()
    captured.run("share")
    assert len(captured.calls("quantize")) == len(VARIANTS)
    assert same_bits(captured.execute(), before)


def test_a_transformed_tensor_is_not_the_plain_one() -> None:
    spec = Operand("mxfp4", hadamard=32)
    rules = (Rule("forward", "projections.0", input=Operand("mxfp4")), Rule("forward", input=spec, weight=spec))
    captured = capture(Projections(), [randn(8, 64)], Recipe("test", rules)).until("share")
    assert len(captured.calls("hadamard")) == 3  # x once, two weights
    assert len(captured.calls("quantize")) == 4


class Sum(nn.Module):
    """The weight gradients of both layers are the same product."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


def test_equal_gemms_of_two_sites_stay_two() -> None:
    # A tensor scale makes them GEMMs of ours.
    captured = capture(Sum(), [randn(8, 64).requires_grad_()], "nvfp4-plain").until("legalise")
    nodes = set(captured.module.graph.nodes)
    assert len(captured.sites) == 6
    assert len({site.node for site in captured.sites} & nodes) == 6


def test_other_tensors_with_equal_values_stay_apart() -> None:
    captured = trace(lambda x, y, w: (x @ w, y @ w), randn(4, 64), randn(4, 64, seed=1), randn(64, 8), parameters="w")
    captured.until("share")
    assert len(captured.calls("quantize")) == 3


def test_two_draws_stay_two() -> None:
    def draws(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fp4compile.draw_seed(x.device), torch.ops.fp4compile.draw_seed(x.device)

    captured = trace(draws, randn(4))
    for node in captured.calls("draw_seed"):
        node.meta["fp4compile"] = True
    assert captured.run("share") == 0
    assert len(captured.calls("draw_seed")) == 2


def test_equal_ops_of_the_model_are_not_its_business() -> None:
    captured = trace(lambda x: (x.sin(), x.sin()), randn(4))
    assert captured.run(Share()) == 0
    assert len(captured.calls(torch.ops.aten.sin.default)) == 2


def test_pins_what_only_the_backward_reads() -> None:
    captured = capture(Projections(1), [randn(8, 64).requires_grad_()], "hif4-plain").until("share")
    tags = {(node.args[0].name, node.args[2]): node.meta["partitioner_tag"] for node in captured.calls("quantize")}
    assert tags == {
        ("primals_2", 1): "is_forward",
        ("primals_1", 1): "is_forward",
        ("primals_2", 0): "must_be_in_backward",
        ("primals_1", 0): "must_be_in_backward",
        ("tangents_1", 0): "must_be_in_backward",
        ("tangents_1", 1): "must_be_in_backward",
    }
