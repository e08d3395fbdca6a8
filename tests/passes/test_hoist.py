"""What leaves the graph is what depends on one parameter alone; with the forms handed in, no bit changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from fp4compile.backend import get_backend
from fp4compile.backends.inductor.halves import take_cached
from fp4compile.graph import is_backward
from fp4compile.ops import OPS
from fp4compile.recipe import Operand, Recipe
from fp4compile.weight_cache import CACHED, WeightCache
from tests.claims import Claims, everything, registered
from tests.helpers import Captured, capture, forward_recipe, randn, same_bits, trace

DRAWN = forward_recipe(weight=Operand("hif4", rounding="stochastic", scale_rule="truncation-free"))
FRESH = forward_recipe(
    input=Operand("mxfp4", hadamard=32, signs="fresh"), weight=Operand("mxfp4", hadamard=32, signs="fresh")
)
RECIPES = ("hif4-plain", "mxfp4-plain", "nvfp4-plain", "hif4", "nvfp4", "nvfp4-w4a16")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y


def captured(recipe: str | Recipe, train: bool = True, model: nn.Module | None = None) -> Captured:
    x = randn(128, 64).requires_grad_(train)
    found = capture(model or Mlp(), [x], recipe, train).until("legalise")
    found.context.weight_cache = WeightCache()
    return found


def cached(found: Captured, backward: bool) -> list[Node]:
    return [node for node in found.calls(CACHED) if node.args[3] is backward]


def with_forms(found: Captured) -> list[Tensor]:
    """Run the graph on random inputs, with forms handed in as a backend does."""
    inputs = found.inputs()
    slots = [slot for slot, _ in take_cached(found.module.graph)]
    found.module.recompile()
    programs = [program.module for program in found.context.programs]
    forms = [programs[slot.weight](inputs[slot.parameter])[slot.form] for slot in slots]
    return found.execute(*inputs, *forms)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_changes_no_bit_and_a_second_run_changes_nothing(recipe: str, train: bool) -> None:
    found = captured(recipe, train)
    before = found.execute()
    assert found.run("hoist") > 0
    text, programs = found.text, list(found.context.programs)
    assert found.run("hoist") == 0
    assert found.text == text and found.context.programs == programs
    assert same_bits(with_forms(found), before)


@pytest.mark.parametrize("recipe", RECIPES[:-1])  # the last one leaves dgrad in high precision
def test_no_quantisation_of_a_weight_is_left(recipe: str) -> None:
    found = captured(recipe)
    found.run("hoist")
    for node in found.context.parameters:
        assert all(user.target is CACHED for user in node.users), node.name
    assert [p.parameter for p in found.context.programs] == ["up.weight", "down.weight"]
    assert not any("in each call" in note for note in found.context.notes)


@pytest.mark.parametrize(("recipe", "count"), [("hif4-plain", 2), ("nvfp4-plain", 4)])  # two weights; tensor scales
def test_each_half_has_nodes_of_its_own(recipe: str, count: int) -> None:
    found = captured(recipe)
    found.run("hoist")
    for backward in (False, True):
        nodes = cached(found, backward)
        assert len(nodes) == count
        assert all(is_backward(user) is backward for node in nodes for user in node.users)
    assert {node.meta["partitioner_tag"] for node in cached(found, True)} == {"must_be_in_backward"}


def test_forms_are_counted() -> None:
    found = captured("hif4-plain")
    found.run("hoist")
    size = 2 * 4 * 64 * 128  # along two axes, in fp32
    report = found.context.report()
    assert [sum(sizes.values()) for sizes in report.cached.values()] == [size, size]
    report.merge(found.context.report())  # a graph that is compiled again has the same forms
    assert report.cache_notes() == ["2 weights are quantised when they change; their forms take 128.0 KiB"]


def test_equal_forms_are_one() -> None:
    """Graphs name their nodes by chance; what is the same has the same key in all of them."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        first, again = (torch.ops.fp4compile.fake_quantize(w, "hif4", 1) for _ in range(2))
        return x @ first.t() + x @ again.t() + x @ torch.ops.fp4compile.fake_quantize(w, "hif4", 0).t()

    keys = []
    for _ in range(2):
        found = trace(function, randn(4, 64), randn(8, 64), parameters="w")
        found.context.weight_cache = WeightCache()
        assert found.run("hoist") == 3
        (program,) = found.context.programs
        keys.append(list(program.sizes))
        assert len(program.module(randn(8, 64))) == len(program.sizes) == 2
    assert keys[0] == keys[1] and len(set(keys[0])) == 2


def unchanged(found: Captured) -> bool:
    text = found.text
    return found.run("hoist") == 0 and found.text == text and not found.context.programs


def test_nobody_asked() -> None:
    found = captured("hif4-plain")
    found.context.weight_cache = None
    assert unchanged(found)


@pytest.mark.parametrize("recipe", [DRAWN, FRESH], ids=["rounding", "signs"])
def test_leaves_what_is_drawn_in_each_step(recipe: Recipe) -> None:
    found = captured(recipe)
    assert unchanged(found)
    assert "2 GEMMs quantise their weight in each call" in found.context.notes[-1]


class Scaled(nn.Module):
    """A weight that the graph computes: outside of it the bits might be others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(randn(64, 128)), nn.Parameter(randn(128))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale)


def test_leaves_weights_that_the_graph_computes() -> None:
    found = captured("hif4-w4a16", train=False, model=Scaled())
    assert unchanged(found)
    assert "1 GEMMs quantise their weight in each call" in found.context.notes[-1]


def test_leaves_activations_and_what_reads_a_parameter_as_it_is() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.ops.fp4compile.fake_quantize(x, "hif4", 1) @ w.t().contiguous()

    found = trace(function, randn(4, 64), randn(8, 64), parameters="w")
    found.context.weight_cache = WeightCache()
    assert unchanged(found)


def test_what_a_half_returns_is_a_copy() -> None:
    """A tensor that the forward keeps for the backward may be overwritten there."""

    def function(w: Tensor) -> list[Tensor]:
        form = torch.ops.fp4compile.cached_weight(w, 0, 0, False, [8, 64], [64, 1], torch.float32)
        return [form.t(), form.sum(), form * 2]

    found = trace(function, randn(8, 64))
    ((slot, _),) = take_cached(found.module.graph)
    first, *others = found.module.graph.output_node().all_input_nodes
    assert (slot.parameter, slot.weight, slot.form) == (0, 0, 0)
    assert first.target is torch.ops.aten.clone.default
    assert [node.target for node in others] == [torch.ops.aten.sum.default, torch.ops.aten.mul.Tensor]


class Cast(Mlp):
    """Weights in fp32, GEMMs in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


# Recipe -> ops that the backend claims, and the one that reads a weight for both halves.
READ_ONCE = {
    "hif4-plain": (("fake_quantize", "fake_quantize_both"), "fake_quantize_both"),
    "mxfp4-plain": (("quantize_rowwise", "quantize_rowwise_both", "mm_rowwise"), "quantize_rowwise_both"),
    "nvfp4": (("tensor_scale", "tensor_scale_both", "fake_quantize", "fake_quantize_both"), "fake_quantize_both"),
}


@pytest.mark.parametrize("model", [Mlp, Cast])
@pytest.mark.parametrize("recipe", READ_ONCE)
def test_forms_of_both_halves_come_from_one_read(recipe: str, model: type[Mlp]) -> None:
    claims, op = READ_ONCE[recipe]
    with registered(Claims(**dict.fromkeys(claims, everything))) as backend:
        found = capture(model(), [randn(128, 64).requires_grad_()], recipe)
        found.context.backend, found.context.weight_cache = get_backend(backend), WeightCache()
        before = found.until("legalise").execute()
        found.run("hoist")
        for program in found.context.programs:
            (node,) = program.module.graph.find_nodes(op="call_function", target=OPS[op].overload)
            assert ("producer" in node.kwargs) is (model is Cast)
        assert same_bits(with_forms(found), before)
