"""Operands of FP4 sites are quantised along their contraction axis; what the graph then computes is the arithmetic
of the recipe, done by hand here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp4compile.ops import OPS
from fp4compile.recipe import Operand, Recipe, Rule
from tests.helpers import Captured, capture, forward_recipe, randn, same_bits, trace

aten = torch.ops.aten
HIF4, MXFP4, NVFP4 = Operand("hif4"), Operand("mxfp4"), Operand("nvfp4")


def fake(x: Tensor, format: str, axis: int) -> Tensor:
    return OPS["fake_quantize"].reference(x, format, axis)


@pytest.mark.parametrize("format", ["hif4", "mxfp4"])
@pytest.mark.parametrize(
    ("tokens", "k", "n", "dtype"),
    [
        (8, 64, 32, torch.bfloat16),
        (5, 70, 33, torch.float32),
        (1, 64, 32, torch.float32),
        (8, 40, 1, torch.float16),
    ],
)
def test_a_linear_by_hand(format: str, tokens: int, k: int, n: int, dtype: torch.dtype) -> None:
    x = randn(tokens, k, dtype=dtype).requires_grad_()
    captured = capture(nn.Linear(k, n, bias=False).to(dtype), [x], f"{format}-plain").until("insert_qdq")
    inputs = captured.inputs()
    weight, data, tangent = inputs
    assert (weight.shape, data.shape, tangent.shape) == ((n, k), (tokens, k), (tokens, n))
    forward = fake(data, format, 1) @ fake(weight, format, 1).T
    wgrad = fake(tangent, format, 0).T @ fake(data, format, 0)
    dgrad = fake(tangent, format, 1) @ fake(weight, format, 0)
    assert same_bits(captured.execute(*inputs), [forward, wgrad, dgrad])


def test_a_tensor_scale_multiplies_the_accumulator() -> None:
    captured = capture(nn.Linear(64, 32).bfloat16(), [randn(8, 64, dtype=torch.bfloat16)], "nvfp4-w4a4", train=False)
    captured.until("insert_qdq")
    weight, bias, data = captured.inputs()
    operands, scale = [], torch.ones(())
    for tensor in (data, weight):
        tensor_scale = OPS["tensor_scale"].reference(tensor, "nvfp4")
        values = OPS["fake_quantize"].reference(tensor, "nvfp4", 1, tensor_scale=tensor_scale, fold=False)
        assert values.abs().max() > 6  # still in units of the tensor scale
        operands.append(values.float())
        scale = scale * tensor_scale
    expected = (operands[0] @ operands[1].T) * scale + bias.float()
    torch.testing.assert_close(captured.execute(weight, bias, data), [expected.bfloat16()])
    assert not captured.calls(aten.addmm.default)


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "mxfp4-w4a16"])
@pytest.mark.parametrize("train", [True, False])
def test_a_second_run_changes_nothing(recipe: str, train: bool) -> None:
    captured = capture(nn.Linear(64, 32), [randn(8, 64)], recipe, train).until("insert_qdq")
    text = captured.text
    assert captured.calls("quantize")
    assert captured.run("insert_qdq") == 0
    assert captured.text == text


def untouched(captured: Captured) -> bool:
    captured.until("annotate")
    text = captured.text
    return captured.run("insert_qdq") == 0 and captured.text == text


def test_leaves_products_of_activations() -> None:
    x = randn(2, 8, 64)
    assert untouched(trace(lambda q, k, v: torch.bmm(torch.bmm(q, k.mT), v), x, x + 1, x + 2))
    assert untouched(trace(lambda x, y: x @ y, randn(8, 64), randn(64, 8)))


def test_leaves_kept_sites() -> None:
    recipe = Recipe("keep", forward_recipe(input=HIF4, weight=HIF4).rules, keep=("*",))
    assert untouched(trace(lambda x, w: x @ w, randn(4, 64), randn(64, 8), recipe=recipe, parameters="w"))


def test_leaves_refused_sites() -> None:
    spec = Operand("hif4", hadamard=64)
    recipe = forward_recipe(input=spec, weight=spec)
    captured = trace(lambda x, w: x @ w, randn(4, 70), randn(70, 8), recipe=recipe, parameters="w")
    captured.context.strict = False
    assert untouched(captured)
    assert captured.sites[0].status == "refused"


@pytest.mark.parametrize("name", ["input", "weight"])
def test_leaves_operands_without_a_spec(name: str) -> None:
    recipe = forward_recipe(**{name: MXFP4})
    captured = trace(lambda x, w: x @ w, randn(4, 64), randn(64, 8), recipe=recipe, parameters="w")
    captured.until("insert_qdq")
    (site,) = captured.sites
    quantised = {n for n in ("input", "weight") if site.operand(n).target is OPS["dequantize"].overload}
    assert quantised == {name}


def test_the_weight_may_stand_on_the_left() -> None:
    recipe = forward_recipe(input=HIF4, weight=NVFP4)
    captured = trace(lambda x, w: w @ x, randn(64, 4), randn(32, 64), recipe=recipe, parameters="w")
    captured.until("insert_qdq")
    x, w = captured.inputs()
    (site,) = captured.sites
    assert site.arguments == {"weight": 0, "input": 1}
    assert "a_tensor_scale" in site.node.kwargs and "b_tensor_scale" not in site.node.kwargs
    assert [node.args[1:3] for node in captured.calls("quantize")] == [("nvfp4", 1), ("hif4", 0)]
    scale = OPS["tensor_scale"].reference(w, "nvfp4")
    left = OPS["fake_quantize"].reference(w, "nvfp4", 1, tensor_scale=scale, fold=False)
    torch.testing.assert_close(captured.execute(x, w), [(left @ fake(x, "hif4", 0)) * scale])


def test_sees_through_one_permute_to_the_tensor_itself() -> None:
    captured = trace(lambda x, w: x @ w.permute(1, 0), randn(4, 64), randn(8, 64), parameters="w")
    captured.until("insert_qdq")
    assert [node.args[2] for node in captured.calls("quantize")] == [1, 1]
    assert all(node.args[0].op == "placeholder" for node in captured.calls("quantize"))


def test_batches_of_weights_are_blocked_along_the_contraction() -> None:
    captured = trace(lambda x, w: torch.bmm(x, w), randn(3, 4, 64), randn(3, 64, 8), parameters="w")
    captured.until("insert_qdq")
    x, w = captured.inputs()
    assert same_bits(captured.execute(x, w), [torch.bmm(fake(x, "hif4", 2), fake(w, "hif4", 1))])


def test_new_nodes_know_their_half_and_their_module() -> None:
    recipe = Recipe("wgrad", (Rule("wgrad", grad=HIF4, input=HIF4),))
    captured = capture(nn.Sequential(nn.Linear(64, 32)), [randn(8, 64)], recipe).until("insert_qdq")
    (site,) = [s for s in captured.sites if s.status == "fp4"]
    for node in (*captured.calls("quantize"), *captured.calls("dequantize")):
        assert node.meta["partitioner_tag"] == "is_backward"
        assert node.meta["seq_nr"] == site.node.meta["seq_nr"]


@pytest.mark.parametrize("scaled", ["both", "forward", "backward", "neither"])
def test_a_requantised_operand_is_made_from_what_the_forward_read(scaled: str) -> None:
    """The tensor scales that both quantisations leave out are multiplied."""
    forward = NVFP4 if scaled in ("both", "forward") else MXFP4
    again = Operand("nvfp4" if scaled in ("both", "backward") else "mxfp4", requantise=True)
    grad = Operand("hif4")
    recipe = Recipe("test", (Rule("forward", input=forward, weight=forward), Rule("wgrad", grad=grad, input=again)))
    captured = capture(nn.Linear(64, 32, bias=False), [randn(40, 64)], recipe).until("insert_qdq")
    weight, x, tangent = captured.inputs()

    def quantised(t: Tensor, format: str, axis: int) -> tuple[Tensor, Tensor]:
        scale = OPS["tensor_scale"].reference(t, format) if format == "nvfp4" else None
        values = OPS["fake_quantize"].reference(t, format, axis, tensor_scale=scale, fold=False)
        return values, torch.ones(()) if scale is None else scale

    values, first = quantised(x, forward.format, 1)
    values, second = quantised(values, again.format, 0)
    expected = (fake(tangent, "hif4", 0).T @ values) * (first * second)
    assert same_bits(captured.execute(weight, x, tangent)[1:], [expected])
    text = captured.text
    assert captured.run("insert_qdq") == 0
    assert captured.text == text


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_each_call_of_a_layer_requantises_what_it_read() -> None:
    captured = capture(Twice(), [randn(8, 64).requires_grad_()], "tetrajet").until("insert_qdq")
    assert {site.status for site in captured.sites} == {"fp4"}
    sources = {}
    for site in captured.sites:
        if site.role != "dgrad":
            quantized = site.operand("input").args[0].args[0]
            sources.setdefault(site.role, []).append(quantized.args[0])
    read = [values.args[0].args[0].args[0] for values in sources["wgrad"]]  # what the forward quantised
    assert set(read) == set(sources["forward"]) and len(set(read)) == 2
