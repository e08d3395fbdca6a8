"""Shapes, modes and control flow that change between calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fp4compile
from tests.compile.common import (
    LlamaBlock,
    Mlp,
    Stack,
    Step,
    build,
    by_hand,
    compiled,
    plain,
    randn,
    relative,
    statuses,
    step,
)


def _graphs(model: Callable[..., Any], inputs: list[Tensor], train: bool = True) -> int:
    """Number of graphs that the calls compile."""
    torch._dynamo.reset()
    counters.clear()
    for x in inputs:
        out = model(x)
        if train:
            out.sum().backward()
    return counters["stats"]["unique_graphs"]


SHAPES = ([13, 9, 21, 1, 0, 9, 2], [4, 5, 6, 7], [1, 0, 1, 0])


# aot_eager traces what Inductor traces, and compiles in a fraction of the time.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("reference", "aot_eager"), pytest.param("inductor", "inductor", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", SHAPES, ids=str)
def test_no_more_graphs_than_bf16(tokens: list[int], dynamic: bool | None, ours: str, theirs: str) -> None:
    model = build(lambda: Mlp(32, 16, 16, 8))
    inputs = [randn(n, 32) for n in tokens]
    usual = _graphs(torch.compile(model, backend=theirs, dynamic=dynamic), inputs)
    options = {"recipe": "mxfp4-plain", "backend": ours}
    fp4 = torch.compile(model, backend="fp4compile", dynamic=dynamic, options=options)
    assert 1 <= _graphs(fp4, inputs) <= usual


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ours", "theirs"),
    [
        ("hif4", "inductor", "inductor"),
        ("mxfp4", "reference", "aot_eager"),
        ("nvfp4", "reference", "aot_eager"),
    ],
)
@pytest.mark.parametrize("dynamic", [None, True])
def test_no_more_graphs_than_bf16_in_a_llama_block(dynamic: bool | None, recipe: str, ours: str, theirs: str) -> None:
    model = build(lambda: LlamaBlock(128))
    inputs = [randn(batch, length, 128) for batch, length in ((2, 13), (3, 13), (2, 40), (1, 7), (5, 64))]
    usual = _graphs(torch.compile(model, backend=theirs, dynamic=dynamic), inputs)
    options = {"recipe": recipe, "backend": ours}
    fp4 = torch.compile(model, backend="fp4compile", dynamic=dynamic, options=options)
    assert 1 <= _graphs(fp4, inputs) <= usual


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [
        ("reference", "hif4-plain"),
        pytest.param("reference", "nvfp4", marks=pytest.mark.slow),
        pytest.param("inductor", "hif4-plain", marks=pytest.mark.slow),
        pytest.param("inductor", "nvfp4-plain", marks=pytest.mark.slow),
    ],
)
def test_results_at_every_number_of_tokens(backend: str, recipe: str) -> None:
    """One model through static, then dynamic shapes; each result is that of a model compiled for its shape alone."""
    model = build(lambda: Mlp(64, 64, 32, 64))
    changing = compiled(model, recipe, backend)
    for tokens in (13, 1, 40, 0, 2, 64, 13):
        x = randn(tokens, 64)
        got = step(changing, x)
        torch._dynamo.reset()
        wanted = step(compiled(model, recipe, "reference"), x)
        if tokens:
            assert got.worst(wanted) < 2e-3, tokens
        else:
            assert not any(value.any() for value in got.tensors.values())
            assert {k: v.shape for k, v in got.tensors.items()} == {k: v.shape for k, v in wanted.tensors.items()}


# --- inference, train and eval ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("inductor", marks=pytest.mark.slow)])
def test_inference_is_the_forward_of_training(backend: str) -> None:
    model, x = build(Mlp), randn(13, 70)
    trained = step(by_hand(model, plain("mxfp4")), x).tensors["output"]
    fp4 = compiled(model, "mxfp4-plain", backend)
    with torch.no_grad():
        assert relative(fp4(x), trained) < 2e-3
    assert set(statuses()) == {(path, "forward") for path in ("first", "second", "third")}
    step(fp4, x)
    assert len(statuses()) == 9


class _Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.a(x)))


def test_train_and_eval_switch() -> None:
    model, x = build(_Dropped), randn(13, 64)
    fp4, hand = compiled(model), by_hand(model, plain("hif4"))
    train = step(fp4, x).check()
    fp4.eval(), hand.eval()
    evaluated = step(fp4, x)
    assert evaluated.worst(step(hand, x)) < 2e-6
    assert train.worst(evaluated) > 0.1
    assert len(statuses()) == 6
    fp4.train()
    assert step(fp4, x).worst(train) == 0.0


# --- accumulation, checkpointing, tied weights -----------------------------------------------------------------------


def test_gradients_of_microbatches_add_up() -> None:
    model = build(Mlp)
    fp4 = compiled(model)
    parts = [randn(13, 70, seed=seed) for seed in (1, 2)]
    single = []
    for x in parts:
        model.zero_grad()
        fp4(x).sum().backward()
        single.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    for x in parts:
        fp4(x).sum().backward()
    for parameter, one, two in zip(model.parameters(), *single, strict=True):
        assert torch.equal(parameter.grad, one + two)


class _Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("backend", ["reference", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", ["mxfp4", *(pytest.param(r, marks=pytest.mark.slow) for r in ("hif4", "nvfp4"))])
def test_checkpointing_recomputes_the_same_bits(recipe: str, backend: str) -> None:
    """Stochastic rounding too: its seed is a value of the graph, and streams belong to tensors."""
    x = randn(13, 64)
    wanted = step(compiled(build(Stack), recipe, backend), x, 3).check()
    roles = statuses()
    torch._dynamo.reset()
    got = step(compiled(build(_Checkpointed), recipe, backend), x, 3)
    assert got.worst(wanted) < (1e-6 if backend == "reference" else 2e-3)
    assert statuses() == roles


@pytest.mark.parametrize("recipe", ["mxfp4", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_checkpointing_of_the_forward_with_stochastic_rounding(recipe: str) -> None:
    """A recipe that rounds the recomputed operands themselves: input and weight of the forward."""
    from fp4compile.recipe import Operand, Recipe, Rule

    spec = Operand(recipe, rounding="stochastic", scale_rule="truncation-free")
    rules = (
        Rule("forward", input=spec, weight=spec),
        Rule("dgrad", grad=spec, weight=spec),
        Rule("wgrad", grad=spec, input=spec),
    )
    mine, x = Recipe("stochastic", rules), randn(13, 64)
    wanted = step(compiled(build(Stack), mine), x, 3).check()
    torch._dynamo.reset()
    assert step(compiled(build(_Checkpointed), mine), x, 3).worst(wanted) < 1e-6
    torch._dynamo.reset()
    assert step(compiled(build(_Checkpointed), mine), x, 4).worst(wanted) > 0.02


class _Tied(nn.Module):
    """One weight in two layers; and, with `embed`, an output head that is an embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).relu())


def test_tied_weights_get_the_sum_of_both_gradients() -> None:
    model, x = build(_Tied), randn(13, 64)
    hand = by_hand(model, plain("hif4"))
    assert hand.one.weight is hand.two.weight
    got = step(compiled(model), x)
    assert got.worst(step(hand, x)) < 2e-6
    assert statuses() == {(path, role): "fp4" for path in ("one", "two") for role in ("forward", "dgrad", "wgrad")}


class _TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.project = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.project.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.body(self.table(ids)))


def test_a_head_tied_to_an_embedding_is_kept() -> None:
    step(compiled(build(_TiedHead)), torch.arange(13)).check()
    assert {path: status for (path, _), status in statuses().items()} == {"body": "fp4", "project": "kept"}


# --- graph breaks, custom functions, plain functions -----------------------------------------------------------------


class _Double(torch.autograd.Function):
    """Calls that Dynamo cannot trace in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Branching(nn.Module):
    def __init__(self, custom: bool) -> None:
        super().__init__()
        self.one, self.two, self.custom = nn.Linear(64, 64), nn.Linear(64, 64), custom

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if self.custom:
            x = _Double.apply(x)
        elif x.sum() > 1e9:  # depends on data: a graph break
            x = -x
        return self.two(x)


# Dynamo's own, as it traces the function.
@pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated")
@pytest.mark.parametrize("custom", [False, True], ids=["data-dependent branch", "autograd.Function"])
def test_what_breaks_the_graph_still_trains_and_is_reported(custom: bool) -> None:
    model, x = build(lambda: _Branching(custom)), randn(13, 64)
    assert step(compiled(model), x).worst(step(by_hand(model, plain("hif4")), x)) < 2e-6
    assert statuses() == {(path, role): "fp4" for path in ("one", "two") for role in ("forward", "dgrad", "wgrad")}
    assert fp4compile.last_report().graphs == (1 if custom else 2)


@pytest.mark.parametrize("recipe", ["nvfp4", pytest.param("hif4-plain", marks=pytest.mark.slow)])
def test_a_compiled_function_that_calls_a_model(recipe: str) -> None:
    model, x = build(lambda: Stack(depth=4)), randn(13, 64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    fp4 = torch.compile(loss, backend="fp4compile", options={"recipe": recipe, "backend": "reference"})
    torch.manual_seed(0)
    fp4(model, x).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    found = statuses()
    model.zero_grad()
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled(model, recipe)(x).square().mean().backward()
    assert statuses() == found
    assert all(relative(p.grad, grad) < 2e-6 for p, grad in zip(model.parameters(), grads, strict=True))


def test_an_optimiser_step_is_seen_by_the_next_forward() -> None:
    """Weights are quantised anew in every step."""
    model, x = build(Mlp), randn(13, 70)
    fp4 = compiled(model)
    before = step(fp4, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    after: Step = step(fp4, x)
    assert after.worst(before) > 0.1
    assert after.worst(step(by_hand(model, plain("hif4")), x)) < 2e-6
