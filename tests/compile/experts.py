"""Experts: small modules that run them in every way a model may, and FP4 experts written by hand as a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp4compile
from fp4compile.hadamard import hadamard
from fp4compile.recipe import OPERANDS, RECIPES, Operand, Recipe
from tests.compile.common import Hand, Treatment, hand_linear, randn


def nearest(name: str) -> Recipe:
    """A preset whose gradients are rounded to nearest, so that what it computes can be rebuilt."""
    recipe = RECIPES.get(name)
    rules = [
        replace(rule, **{n: replace(spec, rounding="nearest") for n, spec in rule.operands.items() if spec})
        for rule in recipe.rules
    ]
    return replace(recipe, name=f"{name}-nearest", rules=tuple(rules))


def _hand(spec: Operand) -> Hand:
    options: dict[str, Any] = {"block_2d": True} if spec.block_2d else {}
    if spec.scale_rule:
        options["scale_rule"] = spec.scale_rule
    return Hand(spec.format, spec.hadamard, spec.rounding == "nearest", options)


def treatment(recipe: Recipe) -> Treatment:
    """What a recipe of one rule per role does to each operand; gradients rounded stochastically stay unrounded."""
    made = {}
    for rule in recipe.rules:
        first, second = (_hand(rule.operands[name]) for name in OPERANDS[rule.role])  # type: ignore[arg-type]
        made[rule.role] = (first, second)
    return made


def _values(hand: Hand, parts: Sequence[Tensor], axis: int) -> tuple[list[Tensor], Tensor | None]:
    """Each part quantised alone under one tensor scale, without that scale, and the scale."""
    dtype = parts[0].dtype
    parts = [hadamard(part, axis, hand.hadamard) if hand.hadamard else part for part in parts]
    if not hand.quantize:
        return [part.to(dtype) for part in parts], None
    together = torch.cat([part.flatten() for part in parts])
    scale = fp4compile.quantize(together, hand.format).tensor_scale
    given = {} if scale is None else {"tensor_scale": scale}
    made = [fp4compile.quantize(part, hand.format, axis, **hand.options, **given) for part in parts]
    return [fp4compile.dequantize(replace(q, tensor_scale=None), dtype) for q in made], scale


def _products(a: Sequence[Tensor], b: Sequence[Tensor], pair: tuple[Hand, Hand]) -> list[Tensor]:
    """a_e b_e^T of every expert, for [M, K] and [N, K], in FP4 along K; tensor scales multiply the fp32 sums."""
    (left, a_scale), (right, b_scale) = _values(pair[0], a, 1), _values(pair[1], b, 1)
    products = [x.float() @ y.float().T for x, y in zip(left, right, strict=False)]
    for scale in (a_scale, b_scale):
        products = [p if scale is None else p * scale for p in products]
    return [p.to(a[0].dtype) for p in products]


def _split(x: Tensor, ends: Tensor) -> list[Tensor]:
    """The rows of each expert, and those of none."""
    bounds = [0, *ends.tolist(), len(x)]
    return [x[start:end] for start, end in pairwise(bounds)]


class _HandGrouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, how: Treatment) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.how = how
        parts = _split(x, ends)
        products = _products(parts[:-1], list(weight.mT), how["forward"])
        return torch.cat([*products, x.new_zeros(len(parts[-1]), weight.shape[2])])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        parts = _split(grad, ends)
        products = _products(parts[:-1], list(weight), ctx.how["dgrad"])
        dx = torch.cat([*products, x.new_zeros(len(parts[-1]), weight.shape[1])])
        rows, columns = (([part.T for part in _split(t, ends)[:-1]]) for t in (grad, x))
        dw = torch.stack(_products(rows, columns, ctx.how["wgrad"])).mT
        return dx, dw, None, None


def hand_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, how: Treatment) -> Tensor:
    """x [T, K], sorted by expert, times weight [E, K, N]: a loop over experts, each in FP4 alone."""
    out: Tensor = _HandGrouped.apply(x, weight, ends, how)
    return out


# --- modules ---------------------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A gated MLP per expert on tokens that are sorted by expert, as torchtitan writes it: w2(silu(w1 x) * w3 x)."""

    def __init__(self, experts: int = 4, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Parameter(randn(experts, hidden, width, seed=s) / width**0.5) for s in (1, 3))
        self.w2 = nn.Parameter(randn(experts, width, hidden, seed=2) / hidden**0.5)

    def mm(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, weight.mT, offs=ends)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        h = F.silu(self.mm(x, self.w1, ends)) * self.mm(x, self.w3, ends)
        return self.mm(h, self.w2, ends)


class HandGrouped(Grouped):
    """The same with FP4 experts written by hand."""

    how: Treatment

    def mm(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return hand_grouped_mm(x, weight.mT, ends, self.how)


class Loop(nn.Module):
    """A router, and a loop over experts that each compute on the tokens they were given; the first gets none."""

    def __init__(self, experts: int = 4, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(randn(experts, hidden, width, seed=1) / width**0.5)
        self.down = nn.Parameter(randn(experts, width, hidden, seed=2) / hidden**0.5)
        with torch.no_grad():
            self.gate.bias[0] = -100.0

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for expert in range(self.up.shape[0]):
            token, position = torch.where(chosen == expert)
            h = self.linear(F.silu(self.linear(x[token], self.up[expert])), self.down[expert])
            out = out.index_add(0, token, h * scores[token, position, None])
        return out


class HandLoop(Loop):
    """The same with FP4 linear layers written by hand."""

    how: Treatment

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return hand_linear(x, weight, self.how)


class Batched(nn.Module):
    """Every expert on all tokens, as batches of GEMMs, weighted by its score."""

    def __init__(self, experts: int = 4, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.up = nn.Parameter(randn(experts, width, hidden, seed=1) / width**0.5)
        self.down = nn.Parameter(randn(experts, hidden, width, seed=2) / hidden**0.5)

    def mm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.repeat(len(self.up), 1, 1)
        return self.mm(F.silu(self.mm(tokens, self.up)), self.down).sum(0)


class HandBatched(Batched):
    """The same with FP4 experts written by hand."""

    how: Treatment

    def mm(self, x: Tensor, weight: Tensor) -> Tensor:
        ends = torch.arange(1, len(x) + 1) * x.shape[1]
        return hand_grouped_mm(x.flatten(0, 1), weight, ends, self.how).view(*x.shape[:2], -1)
