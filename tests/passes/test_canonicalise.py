"""One spelling per GEMM, one permute, one view; nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import randn, trace

aten = torch.ops.aten
X, W, BIAS = randn(4, 64), randn(64, 32, seed=1), randn(32, seed=2)
BATCH, STACK = randn(3, 4, 64), randn(3, 64, 32, seed=1)
HALVES = BATCH.bfloat16()

REWRITES = {
    "addmm, alpha": (lambda x, w, b: torch.addmm(b, x, w, alpha=0.5), (X, W, BIAS), aten.addmm, aten.mm),
    "addmm, beta": (lambda x, w, b: torch.addmm(b, x, w, beta=2), (X, W, BIAS), aten.addmm, aten.mm),
    "addmm, no bias": (lambda x, w, b: torch.addmm(b, x, w, beta=0), (X, W, BIAS), aten.addmm, aten.mm),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w, alpha=3), (BATCH, STACK, BIAS), aten.baddbmm, aten.bmm),
    "mv": (lambda x, w: torch.mv(w, x), (X[0], W.T), aten.mv, aten.mm),
    "linear, 1-D": (lambda x, w: F.linear(x, w), (X[0], W.T), aten.linear, aten.mm),
    "linear, 2-D": (lambda x, w: F.linear(x, w), (X, W.T), aten.linear, aten.mm),
    "linear, 4-D": (lambda x, w, b: F.linear(x[None], w, b), (BATCH, W.T, BIAS), aten.linear, aten.addmm),
    "linear, no tokens": (lambda x, w, b: F.linear(x, w, b), (X[:0], W.T, BIAS), aten.linear, aten.addmm),
    "mT": (lambda x, w: torch.bmm(x, w.mT), (BATCH, STACK.mT.contiguous()), aten.mT, aten.permute),
    "grouped, of stacks": (
        lambda x, w: torch._grouped_mm(x, w),
        (HALVES, STACK.bfloat16()),
        aten._grouped_mm,
        aten.bmm,
    ),
    "linear of a permute": (lambda x, w: F.linear(x, w.permute(1, 0)), (X, W), aten.linear, aten.mm),
}


@pytest.mark.parametrize(("function", "inputs", "old", "new"), REWRITES.values(), ids=REWRITES)
def test_rewrites_to_one_spelling(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], old, new) -> None:
    captured = trace(function, *inputs, decompose=False)
    assert captured.calls(old.default)
    assert captured.run("canonicalise") > 0
    assert not captured.calls(old.default)
    assert captured.calls(new.default)
    torch.testing.assert_close(captured.execute(*inputs), [function(*inputs)], rtol=1e-4, atol=1e-4)
    text = captured.text
    assert captured.run("canonicalise") == 0
    assert captured.text == text


LOOKALIKES = {
    "addmm without factors": (lambda x, w, b: torch.addmm(b, x, w), (X, W, BIAS)),
    "mm of two activations": (lambda x: torch.mm(x, x.permute(1, 0)), (X,)),
    "bmm": (lambda x, y: torch.bmm(x, y), (BATCH, STACK)),
    "one permute": (lambda x: x.permute(1, 0), (X,)),
    "a permute of a view of a permute": (lambda x: x.permute(1, 0).view(1, 64, 4).permute(0, 2, 1), (X,)),
    "views of other sizes": (lambda x: (x.view(2, 128), x.view(128, 2)), (X,)),
    "views of other tensors": (lambda x, y: (x.view(2, 128), y.view(2, 128)), (X, X + 1)),
    "equal ops that move nothing": (lambda x: (x.sin(), x.sin()), (X,)),
    "an elementwise product": (lambda x: x * x, (X,)),
}


@pytest.mark.parametrize(("function", "inputs"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_leaves_lookalikes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    captured = trace(function, *inputs, decompose=False)
    text = captured.text
    assert captured.run("canonicalise") == 0
    assert captured.text == text


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ((1, 0, 2), (1, 0, 2), None),
        ((1, 2, 0), (2, 0, 1), None),
        ((-1, 0, 1), (1, 2, 0), None),
        ((1, 2, 0), (1, 2, 0), [2, 0, 1]),
        ((0, 2, 1), (1, 0, 2), [2, 0, 1]),
    ],
)
def test_permutes_of_permutes(first: tuple[int, ...], second: tuple[int, ...], left: list[int] | None) -> None:
    captured = trace(lambda x: x.permute(first).permute(second) + 0, BATCH)
    captured.run("canonicalise")
    assert [node.args[1] for node in captured.calls(aten.permute.default)] == ([left] if left else [])
    assert torch.equal(captured.execute(BATCH)[0], BATCH.permute(first).permute(second))


def test_three_permutes_are_one() -> None:
    captured = trace(lambda x: x.permute(1, 2, 0).permute(1, 2, 0).permute(0, 2, 1) + 0, BATCH)
    captured.run("canonicalise")
    assert len(captured.calls(aten.permute.default)) == 1
    assert torch.equal(captured.execute(BATCH)[0], BATCH.permute(2, 1, 0))


def test_a_transposition_is_a_permute() -> None:
    captured = trace(lambda x: x.transpose(-1, 0).transpose(1, 2), BATCH, decompose=False)
    assert captured.run("canonicalise") == 3
    (permute,) = captured.calls(aten.permute.default)
    assert permute.args[1] == [2, 0, 1]
    assert torch.equal(captured.execute(BATCH)[0], BATCH.permute(2, 0, 1))


def test_equal_views_are_one() -> None:
    captured = trace(lambda x: x.view(2, 128) @ x.view(2, 128).permute(1, 0), X)
    assert captured.run("canonicalise") == 1
    assert len(captured.calls(aten.view.default)) == 1


def test_a_bias_that_counts_nothing_may_hold_nan() -> None:
    captured = trace(lambda x, w, b: torch.addmm(b, x, w, beta=0), X, W, BIAS)
    captured.run("canonicalise")
    assert captured.execute(X, W, torch.full_like(BIAS, torch.nan))[0].isfinite().all()


def test_linear_with_symbolic_sizes() -> None:
    captured = trace(lambda x, w: F.linear(x, w), BATCH, W.T, decompose=False, mode="symbolic")
    captured.run("canonicalise")
    other = randn(5, 2, 64)
    torch.testing.assert_close(captured.execute(other, W.T), [other @ W])
