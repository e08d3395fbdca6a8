"""pad_groups: what it multiplies is the same, blocks stay within a group, and what needs no padding is left."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp4compile.recipe import RECIPES, Operand, Recipe, Rule
from tests.helpers import Captured, capture, randn

ENDS = torch.tensor([3, 3, 37], dtype=torch.int32)


class Experts(nn.Module):
    """Experts on tokens; with `first` the weights are the first operand."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.weight = nn.Parameter(randn(3, 64, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if self.first:
            return torch._grouped_mm(self.weight, x.T, offs=ends).T
        return torch._grouped_mm(x, self.weight.mT, offs=ends)


def _captured(recipe: str | Recipe, first: bool = False) -> Captured:
    x = randn(40, 64, dtype=torch.bfloat16).requires_grad_()
    return capture(Experts(first), (x, ENDS), recipe).until("annotate")


def _inputs(captured: Captured) -> list[Tensor]:
    return [ENDS if not t.is_floating_point() else t for t in captured.inputs()]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("recipe", ["hif4-plain", "mxfp4", "nvfp4"])
def test_the_products_are_the_same(recipe: str, first: bool) -> None:
    captured = _captured(recipe, first)
    inputs = _inputs(captured)
    before = captured.execute(*inputs)
    assert captured.run("pad_groups") == 1
    after = captured.execute(*inputs)
    assert all(torch.equal(a[:37], b[:37]) for a, b in zip(after, before, strict=True) if a.shape[0] == 40)
    (dw, expected) = ([t for t in result if t.dim() == 3] for result in (after, before))
    torch.testing.assert_close(dw[0], expected[0])  # zeros change the order of the sums


@pytest.mark.parametrize(
    ("grad", "input", "multiple"),
    [
        (Operand("nvfp4"), Operand("nvfp4"), 16),
        (Operand("nvfp4"), Operand("mxfp4"), 32),
        (Operand("mxfp4", hadamard=128), Operand("mxfp4", hadamard=128), 128),
        (None, Operand("hif4"), 64),
    ],
)
def test_the_multiple_holds_every_block_and_transform(grad: Operand | None, input: Operand, multiple: int) -> None:
    captured = _captured(Recipe("wgrad", (Rule("wgrad", grad=grad, input=input),)))
    captured.run("pad_groups")
    assert [node.args[2] for node in captured.calls("pad_groups")] == [multiple] * 2


def test_blocks_do_not_cross_groups() -> None:
    """A group's gradient is that of the group alone, bit for bit."""
    captured = _captured("hif4-plain").after("annotate")
    inputs = _inputs(captured)
    others = [t.clone() for t in inputs]
    for tensor in others:
        if len(tensor) == 40:
            tensor[:3] = 1e4  # the tokens of another group
    before, after = (next(t for t in captured.execute(*given) if t.dim() == 3) for given in (inputs, others))
    assert torch.equal(after[2], before[2])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("recipe", ["hif4-w4a4", replace(RECIPES.get("hif4"), name="kept", keep=("*",))], ids=str)
def test_only_fp4_wgrads_are_padded(recipe: str | Recipe) -> None:
    assert _captured(recipe).run("pad_groups") == 0


def test_a_second_run_changes_nothing() -> None:
    captured = _captured("hif4-plain")
    captured.run("pad_groups")
    text = captured.text
    assert captured.run("pad_groups") == 0
    assert captured.text == text


def test_experts_that_share_tokens_share_their_padding() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.gate = Experts(), Experts()

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return self.up(x, ends) * self.gate(x, ends)

    captured = capture(Two(), (randn(40, 64, dtype=torch.bfloat16), ENDS), "hif4-plain").until("share")
    assert len(captured.calls("pad_groups")) == 3  # one of the tokens, one of each gradient
