"""Gradients behind a transformed or clipping forward come back to the tensors of the model, and no others do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fp4compile.errors import RewriteError
from fp4compile.ops import OPS
from fp4compile.recipe import Operand, Recipe, Rule
from tests.helpers import Captured, capture, randn, same_bits

FORWARD = Operand("mxfp4", scale_rule="gaussian", hadamard=32)
MASKED = Operand("mxfp4", scale_rule="gaussian", hadamard=32, clip_mask=True)
FLAT_MASKED = Operand("mxfp4", scale_rule="gaussian", clip_mask=True)
GRAD = Operand("mxfp4", scale_rule="truncation-free")
AGAIN = Operand("mxfp4", scale_rule="truncation-free", requantise=True)


def recipe(forward: Operand, again: Operand | None, weight: Operand | None = None) -> Recipe:
    rules = [Rule("forward", input=forward, weight=weight or forward)]
    if again:
        rules += [Rule("dgrad", grad=GRAD, weight=again), Rule("wgrad", grad=GRAD, input=again)]
    return Recipe("test", tuple(rules))


def linear(given: Recipe) -> Captured:
    model = nn.Linear(64, 32, bias=False)
    return capture(model, [randn(40, 64).requires_grad_()], given).until("stabilise")


@pytest.mark.parametrize("given", ["hif4", "tetrajet", "quartet2"])
def test_leaves_recipes_that_neither_transform_the_forward_nor_clip(given: str) -> None:
    captured = capture(nn.Linear(128, 128), [randn(40, 128).requires_grad_()], given).until("stabilise")
    text = captured.text
    assert captured.run("pull_back") == 0
    assert captured.text == text


def test_a_transform_of_the_forward_alone_leaves_gradients_of_the_tensors_themselves() -> None:
    """dX = dY W needs no transform back where W is the model's own."""
    captured = linear(recipe(FORWARD, GRAD))
    assert captured.run("pull_back") == 0


@pytest.mark.parametrize("again", [AGAIN, GRAD, None], ids=["requantised", "original", "high precision"])
@pytest.mark.parametrize("forward", [MASKED, FLAT_MASKED, FORWARD], ids=["masked", "not transformed", "no mask"])
def test_gradients_by_hand(forward: Operand, again: Operand | None) -> None:
    captured = linear(recipe(forward, again))
    weight, x, _ = captured.inputs()
    before = captured.execute()
    requantised = again is AGAIN and forward.hadamard > 0
    assert captured.run("pull_back") == (2 if forward.clip_mask or requantised else 0)
    options = {"scale_rule": "gaussian", "hadamard": forward.hadamard, "transformed": requantised}
    expected = [before[0]]
    for gradient, tensor in zip(before[1:], (weight, x), strict=True):
        original = tensor if forward.clip_mask else None
        back = OPS["quantize_backward"].reference(gradient, original, "mxfp4", 1, **options)
        expected.append(back if forward.clip_mask or requantised else gradient)
    assert same_bits(captured.execute(), expected)
    text = captured.text
    assert captured.run("pull_back") == 0
    assert captured.text == text


class Columns(nn.Module):
    """A layer on some columns of a weight, as a shard of a row-parallel one: its wgrad comes out as [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(48, 128))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight[:, :64])


def test_a_gradient_in_the_other_layout_by_hand() -> None:
    captured = capture(Columns(), [randn(40, 64).requires_grad_()], recipe(MASKED, AGAIN)).until("stabilise")
    weight, _, _ = captured.inputs()
    before = captured.execute()[1][:, :64]
    assert captured.run("pull_back") == 2
    options = {"scale_rule": "gaussian", "hadamard": 32, "transformed": True}
    expected = OPS["quantize_backward"].reference(before, weight[:, :64], "mxfp4", 1, **options)
    assert same_bits([captured.execute()[1][:, :64]], [expected])


def test_only_the_operand_with_a_mask_is_clipped() -> None:
    captured = linear(recipe(FORWARD, AGAIN, weight=MASKED))
    captured.run("pull_back")
    of_weight, of_input = captured.calls("quantize_backward")
    assert of_weight.args[1] is not None and of_input.args[1] is None
    assert "scale_rule" in of_weight.kwargs and "scale_rule" not in of_input.kwargs


class Transposed(nn.Module):
    """A weight [in, out], whose gradient is blocked along rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_weight_stored_the_other_way_round() -> None:
    """Its gradient comes back along its rows."""
    results = []
    for model in (Transposed(), nn.Linear(64, 32, bias=False)):
        captured = capture(model, [randn(40, 64).requires_grad_()], recipe(MASKED, AGAIN)).until("pull_back")
        x, grad = randn(40, 64, seed=3), randn(40, 32, seed=4)
        given = {(64, 32): randn(64, 32), (32, 64): randn(64, 32).T.contiguous(), (40, 64): x, (40, 32): grad}
        inputs = [given[tuple(n.meta["val"].shape)] for n in captured.module.graph.find_nodes(op="placeholder")]
        results.append(captured.execute(*inputs))
    (y, dw, dx), (y_t, dw_t, dx_t) = results
    for a, b in ((y, y_t), (dw, dw_t.T), (dx, dx_t)):
        torch.testing.assert_close(a, b)


def test_a_clip_mask_whose_forward_is_not_certain_is_an_error() -> None:
    captured = linear(recipe(MASKED, GRAD))
    captured.sites[0].parameter = "another"
    with pytest.raises(RewriteError, match=r"asks for a clip mask, but it is not certain .* wgrad GEMM"):
        captured.run("pull_back")


def test_a_forward_in_high_precision_clips_nothing() -> None:
    captured = capture(nn.Linear(64, 32), [randn(8, 64)], recipe(MASKED, None)).until("find_sites")
    captured.context.recipe = Recipe("kept", recipe(MASKED, None).rules, keep=("*",))
    captured.run("annotate", "insert_qdq", "stabilise")
    assert captured.run("pull_back") == 0
