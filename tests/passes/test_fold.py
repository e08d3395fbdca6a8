"""Weights of inference graphs become packed buffers, bit for bit the ones that the graph would compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fp4compile
from fp4compile.formats import FORMATS
from fp4compile.recipe import Operand, Recipe
from tests.helpers import Captured, capture, export, forward_recipe, randn, same_bits, trace

BIAS_FREE = "truncation-free"
TILES = Operand("nvfp4", block_2d=True)
RHT = Operand("nvfp4", hadamard=16)
SR = Operand("mxfp4", scale_rule=BIAS_FREE, rounding="stochastic")
RECIPES: dict[str, str | Recipe] = {
    **{f"{format}-w4a{bits}": f"{format}-w4a{bits}" for format in FORMATS for bits in (4, 16)},
    "2-D": forward_recipe(weight=TILES),
    "hadamard": forward_recipe(input=RHT, weight=RHT),
}


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Linear(64, 48, bias=bias)
        self.down = nn.Linear(48, 64, bias=bias)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def buffers(captured: Captured) -> dict[str, Tensor]:
    read = [node.target for node in captured.module.graph.find_nodes(op="get_attr")]
    return {name: getattr(captured.module, name) for name in read if "." not in name}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_changes_no_bit_and_a_second_run_changes_nothing(recipe: str | Recipe) -> None:
    captured = export(Mlp(), [randn(5, 64)], recipe).until("share")
    before = captured.execute()
    assert captured.run("fold") > 0
    assert same_bits(captured.execute(), before)
    text = captured.text
    assert captured.run("fold") == 0
    assert captured.text == text


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_gemms_read_the_packed_buffers(recipe: str | Recipe) -> None:
    captured = export(Mlp(), [randn(5, 64)], recipe).until("share")
    before = captured.execute()
    captured.run("fold", "fuse")
    gemms = captured.calls("mm")
    assert [node.args[1].target for node in gemms] == ["up_weight_codes", "down_weight_codes"]
    assert [node.kwargs["b_scales"].target for node in gemms] == ["up_weight_scales", "down_weight_scales"]
    assert not captured.calls("dequantize")
    assert not captured.calls(torch.ops.aten.mm.default)
    assert {node.target for node in captured.module.graph.find_nodes(op="get_attr")} == set(buffers(captured))
    assert same_bits(captured.execute(), before)


@pytest.mark.parametrize("format", FORMATS)
def test_buffers_are_those_of_quantize(format: str) -> None:
    model = Mlp()
    captured = export(model, [randn(5, 64)], f"{format}-w4a16").until("fold")
    found = buffers(captured)
    for name in ("up", "down"):
        expected = fp4compile.quantize(getattr(model, name).weight.detach(), format, axis=1)
        assert torch.equal(found[f"{name}_weight_codes"], expected.codes)
        assert torch.equal(found[f"{name}_weight_scales"], expected.scales)
        if expected.tensor_scale is not None:
            assert torch.equal(found[f"{name}_weight_tensor_scale"], expected.tensor_scale)
    stored = [name for name, _ in captured.module.named_buffers()]
    assert set(found) <= set(stored)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_bias_is_added_after_the_gemm() -> None:
    captured = export(Mlp(bias=True), [randn(5, 64)], "hif4-w4a16").until("share")
    before = captured.execute()
    captured.run("fold", "fuse")
    assert [node.kwargs["bias"].target for node in captured.calls("mm")] == ["up.bias", "down.bias"]
    # addmm may fuse the bias into the accumulator; the order of two fp32 additions is all that differs.
    torch.testing.assert_close(captured.execute(), before, rtol=1e-6, atol=1e-6)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x))


def test_a_weight_that_is_read_twice_is_stored_once() -> None:
    captured = export(Shared(), [randn(5, 64)], "hif4-w4a16").until("fuse")
    assert set(buffers(captured)) == {"linear_weight_codes", "linear_weight_scales"}
    assert len(captured.calls("mm")) == 2


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight, x @ self.weight.T


def test_a_weight_along_two_axes_is_stored_twice() -> None:
    captured = export(Both(), [randn(5, 64)], "mxfp4-w4a16").until("share")
    before = captured.execute()
    captured.run("fold", "fuse")
    names = ("codes", "scales", "codes_1", "scales_1")
    assert set(buffers(captured)) == {f"weight_{name}" for name in names}
    pairs = [(node.args[1].target, node.kwargs["b_scales"].target) for node in captured.calls("mm")]
    assert pairs == [("weight_codes", "weight_scales"), ("weight_codes_1", "weight_scales_1")]
    # Along axis 0 the packed weight lies the other way round in memory, which reorders fp32 sums.
    torch.testing.assert_close(captured.execute(), before, rtol=1e-5, atol=1e-5)


def unfoldable(captured: Captured) -> bool:
    text = captured.text
    return captured.run("fold") == 0 and captured.text == text


def test_leaves_weights_that_are_inputs() -> None:
    assert unfoldable(capture(Mlp(), [randn(5, 64)], "hif4-w4a16", train=False).until("share"))
    assert unfoldable(trace(lambda x, w: x @ w, randn(4, 64), randn(64, 8), parameters="w").until("share"))


def test_leaves_what_is_drawn_at_run_time() -> None:
    assert unfoldable(export(Mlp(), [randn(5, 64)], forward_recipe(weight=SR)).until("share"))


def test_leaves_activations() -> None:
    assert unfoldable(export(Mlp(), [randn(5, 64)], forward_recipe(input=Operand("nvfp4"))).until("share"))
