"""Routers are found by what becomes of their output, and stay in high precision in all three roles."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp4compile
from fp4compile.recipe import RECIPES
from tests.helpers import randn


class Routed(nn.Module):
    """A router, `choose` that makes a choice of its logits, and a linear layer of what was chosen."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.choose = choose
        self.gate, self.proj = nn.Linear(64, 8), nn.Linear(64, 64)
        self.register_buffer("bias", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.choose(self.gate(x), x))


def _top(scores: Tensor, x: Tensor) -> Tensor:
    values, indices = scores.topk(2, dim=-1)
    return x * values.sum(-1, keepdim=True) + indices.sum(-1, keepdim=True)


def _groups(scores: Tensor, x: Tensor) -> Tensor:
    """DeepSeek-V3's: the best experts of the best groups of experts."""
    best = scores.view(-1, 4, 2).topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1)[1]
    mask = torch.zeros(len(x), 4).scatter(1, best, 1.0).repeat_interleave(2, dim=1).bool()
    return _top(scores.masked_fill(~mask, 0.0), x)


ROUTERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "topk": _top,
    "softmax, topk": lambda y, x: _top(y.softmax(-1), x),
    "softmax in fp32": lambda y, x: _top(F.softmax(y, -1, dtype=torch.float32).to(x.dtype), x),
    "sigmoid, bias, topk": lambda y, x: _top(y.sigmoid() + 0.5, x),
    "groups of experts": lambda y, x: _groups(y.sigmoid(), x),
    "argmax": lambda y, x: x + y.argmax(-1, keepdim=True),
    "max": lambda y, x: x * y.softmax(-1).max(-1, keepdim=True)[0] + y.max(-1, keepdim=True)[1],
    "sort": lambda y, x: x + y.sort(-1, descending=True)[1][:, :1],
    "noise": lambda y, x: _top(y + torch.randn_like(y), x),
}
OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate": lambda y, x: x * y.sigmoid().sum(-1, keepdim=True),
    "max pooling": lambda y, x: x * y.max(0)[0].sum(),
    "values of topk": lambda y, x: x * y.topk(2, -1)[0].sum(-1, keepdim=True),
    "another linear layer between": lambda y, x: _top(F.linear(y, torch.eye(8)), x),
}


def _gate(choose: Callable[[Tensor, Tensor], Tensor], recipe: object = "hif4-plain") -> set[tuple[str, str, str]]:
    report = fp4compile.explain(Routed(choose), randn(8, 64).requires_grad_(), recipe, train=True, backend="reference")
    assert {s.status for s in report.sites if s.path == "proj"} == {"fp4"}
    return {(s.role, s.status, s.reason) for s in report.sites if s.path == "gate"}


@pytest.mark.parametrize("choose", ROUTERS.values(), ids=ROUTERS)
def test_a_router_is_kept_in_every_role(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = _gate(choose)
    assert {(status, reason) for _, status, reason in found} == {("kept", "router logits")}
    assert {"forward"} < {role for role, *_ in found} or choose is ROUTERS["argmax"] or choose is ROUTERS["sort"]


@pytest.mark.parametrize("choose", OTHERS.values(), ids=OTHERS)
def test_what_chooses_nothing_is_no_router(choose: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert {status for _, status, _ in _gate(choose)} == {"fp4"}


def test_a_recipe_may_take_routers_too() -> None:
    recipe = replace(RECIPES.get("hif4-plain"), name="all", keep_routers=False)
    assert {status for _, status, _ in _gate(_top, recipe)} == {"fp4"}
