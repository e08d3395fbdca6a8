"""Transforms, stochastic rounding and 2-D blocks are written where the recipe says, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp4compile.ops import OPS
from fp4compile.recipe import Operand, Recipe, Rule
from tests.helpers import capture, forward_recipe, randn, same_bits, trace

BIAS_FREE = "truncation-free"
NEAREST = Operand("mxfp4", scale_rule=BIAS_FREE)
SR = Operand("mxfp4", scale_rule=BIAS_FREE, rounding="stochastic")
RHT = Operand("mxfp4", scale_rule=BIAS_FREE, hadamard=32)
SR_RHT = Operand("mxfp4", scale_rule=BIAS_FREE, hadamard=32, rounding="stochastic")
TILES = Operand("mxfp4", scale_rule=BIAS_FREE, block_2d=True)


class Two(nn.Module):
    """Two projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 32, bias=False)
        self.b = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("recipe", ["hif4-plain", "mxfp4-plain", "nvfp4-plain", "hif4-w4a4"])
def test_leaves_recipes_without_stabilisers(recipe: str) -> None:
    captured = capture(Two(), [randn(8, 64)], recipe).until("insert_qdq")
    text = captured.text
    assert captured.run("stabilise") == 0
    assert captured.text == text


def test_leaves_quantisations_of_the_model_itself() -> None:
    captured = trace(lambda x: torch.ops.fp4compile.quantize(x, "mxfp4", 1), randn(4, 64), recipe="mxfp4")
    text = captured.text
    captured.until("stabilise")
    assert captured.text == text


@pytest.mark.parametrize("recipe", ["hif4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("tokens", [8, 40])
def test_a_second_run_changes_nothing(recipe: str, tokens: int) -> None:
    captured = capture(Two(), [randn(tokens, 64)], recipe).until("stabilise")
    text = captured.text
    assert captured.calls("hadamard")
    assert captured.run("stabilise") == 0
    assert captured.text == text


SPECS = {"SR": (NEAREST, SR), "RHT": (RHT, RHT), "SR + RHT": (RHT, SR_RHT), "2-D": (SR, TILES)}


@pytest.mark.parametrize(("x_spec", "w_spec"), SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_gemm_by_hand(x_spec: Operand, w_spec: Operand, dtype: torch.dtype) -> None:
    recipe = forward_recipe(input=x_spec, weight=w_spec)
    x, w = randn(5, 64, dtype=dtype), randn(64, 96, dtype=dtype)  # several tiles along both axes
    captured = trace(lambda x, w: x @ w, x, w, recipe=recipe, parameters="w").until("stabilise")
    inputs = captured.inputs()
    operands = []
    for stream, (tensor, spec, axis) in enumerate(zip(inputs, (x_spec, w_spec), (1, 0), strict=True)):
        random = {"seed": torch.tensor(7), "stream": stream} if spec.rounding == "stochastic" else {}
        options = {"scale_rule": BIAS_FREE, "rounding": spec.rounding, "hadamard": spec.hadamard, **random}
        operands.append(OPS["fake_quantize"].reference(tensor, "mxfp4", axis, block_2d=spec.block_2d, **options))
    assert same_bits(captured.execute(*inputs, seed=7), [operands[0] @ operands[1]])


def test_a_transform_on_both_operands_cancels() -> None:
    recipe = Recipe("w", (Rule("wgrad", grad=RHT, input=RHT),))
    plain = Recipe("w", (Rule("wgrad", grad=NEAREST, input=NEAREST),))
    results = {}
    for r in (recipe, plain):
        captured = capture(nn.Linear(64, 32, bias=False), [randn(40, 64)], r).until("stabilise")
        inputs = captured.inputs()
        results[r] = captured.execute(*inputs)[1]
    exact = inputs[2].T @ inputs[1]
    for result in results.values():
        assert (result - exact).norm() < 0.25 * exact.norm()
    assert not torch.equal(*results.values())


def streams(recipe: str | Recipe) -> dict[tuple[str, int, str], set[int]]:
    """(tensor, axis, Hadamard) -> streams of its stochastic quantisations, in the training graph of `Two`."""
    captured = capture(Two(), [randn(8, 64).requires_grad_()], recipe).until("stabilise")
    found: dict[tuple[str, int, str], set[int]] = {}
    for node in captured.calls("quantize"):
        if node.kwargs.get("rounding") == "stochastic":
            source = node.args[0]
            transformed = source.target is OPS["hadamard"].overload
            key = (source.args[0].name if transformed else source.name, node.args[2], "RHT" if transformed else "")
            found.setdefault(key, set()).add(node.kwargs["stream"])
    return found


@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4"])
def test_each_tensor_axis_and_spec_has_its_own_stream(recipe: str) -> None:
    found = streams(recipe)
    assert len(found) == 4  # dY of a and of b, for dgrad and for wgrad
    assert all(len(numbers) == 1 for numbers in found.values())
    assert len(set.union(*found.values())) == 4


def test_one_tensor_along_one_axis_shares_its_stream() -> None:
    recipe = forward_recipe(input=SR)
    captured = capture(Two(), [randn(8, 64)], recipe).until("stabilise")
    quantised = captured.calls("quantize")
    assert len(quantised) == 2
    assert len({node.kwargs["stream"] for node in quantised}) == 1


def test_other_specs_of_one_tensor_have_other_streams() -> None:
    ceil = Operand("nvfp4", scale_rule=BIAS_FREE, rounding="stochastic")
    recipe = Recipe("test", (Rule("forward", "a", input=SR), Rule("forward", "b", input=ceil)))
    captured = capture(Two(), [randn(8, 64)], recipe).until("stabilise")
    assert len({node.kwargs["stream"] for node in captured.calls("quantize")}) == 2


def fresh(*roles: str) -> Recipe:
    spec = Operand("hif4", hadamard=32, signs="fresh")
    rules = {
        "forward": Rule("forward", input=spec, weight=spec),
        "dgrad": Rule("dgrad", grad=spec, weight=spec),
        "wgrad": Rule("wgrad", grad=spec, input=spec),
    }
    return Recipe("fresh", tuple(rules[role] for role in roles))


def test_fresh_signs_belong_to_a_gemm_and_a_step() -> None:
    captured = capture(Two(), [randn(8, 64).requires_grad_()], fresh("forward", "dgrad", "wgrad")).until("stabilise")
    assert len(captured.calls("draw_seed")) == 1
    seeds = [node.args[3] for node in captured.calls("hadamard")]
    assert len(seeds) == 12
    by_gemm = [set(seeds[i : i + 2]) for i in range(0, 12, 2)]  # operands stand before their GEMM
    assert all(len(pair) == 1 for pair in by_gemm) and len(set.union(*by_gemm)) == 6
    first, again, other = (captured.execute(seed=seed) for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert not same_bits(first, other)
    captured.run("pull_back", "share")
    assert len(captured.calls("quantize")) == 12  # x is read by two GEMMs with signs of their own


def test_fresh_signs_cancel_in_their_gemm() -> None:
    captured = capture(nn.Linear(64, 32, bias=False), [randn(40, 64)], fresh("wgrad")).until("stabilise")
    _, x, grad = captured.inputs()
    for seed in (1, 2):
        assert (captured.execute(seed=seed)[1] - grad.T @ x).norm() < 0.15 * (grad.T @ x).norm()


def test_fresh_signs_survive_fusion() -> None:
    recipe = Recipe("w", tuple(Rule("wgrad", grad=s, input=s) for s in [Operand("nvfp4", hadamard=32, signs="fresh")]))
    captured = capture(nn.Linear(64, 32, bias=False), [randn(40, 64)], recipe).until("stabilise")
    before = captured.execute(seed=5)
    captured.run("pull_back", "share", "fuse")
    assert not captured.calls("hadamard")
    assert {"sign_seed"} <= set(captured.calls("tensor_scale")[0].kwargs)
    assert same_bits(captured.execute(seed=5), before)


@pytest.mark.parametrize(("recipe", "draws"), [("mxfp4", 1), ("nvfp4", 1), ("hif4", 0)])
def test_draws_one_seed_per_graph_and_only_if_needed(recipe: str, draws: int) -> None:
    captured = capture(Two(), [randn(8, 64)], recipe).until("stabilise")
    found = captured.calls("draw_seed")
    assert len(found) == draws
    for node in found:
        assert node.meta["partitioner_tag"] == "is_forward"


def test_another_seed_rounds_otherwise() -> None:
    captured = capture(Two(), [randn(8, 64)], "mxfp4").until("stabilise")
    first, again, other = (captured.execute(seed=seed) for seed in (1, 1, 2))
    assert same_bits(first, again)
    assert not same_bits(first, other)


def test_a_token_axis_is_padded() -> None:
    captured = capture(nn.Linear(64, 32, bias=False), [randn(40, 64)], "hif4").until("stabilise")
    assert [tuple(node.meta["val"].shape) for node in captured.calls("hadamard")] == [(64, 32), (64, 64)]
    padded = [node for node in captured.calls("dequantize") if node.args[4] == 0]
    assert [node.args[5] for node in padded] == [64, 64]
    assert [tuple(node.meta["val"].shape) for node in padded] == [(64, 32), (64, 64)]
