"""When a cache makes forms, where it puts them, and how long it holds them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fp4compile import weight_cache
from fp4compile.errors import RewriteError
from fp4compile.weight_cache import Program, WeightCache, cache_of
from tests.helpers import randn


class Forms(nn.Module):
    """Two forms of a weight."""

    def forward(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight * 2, weight.t().contiguous()


class Runs:
    """A program that counts its runs."""

    def __init__(self) -> None:
        self.count, self.module = 0, symbolic_trace(Forms())

    def __call__(self, weight: Tensor) -> Any:
        self.count += 1
        return self.module(weight)


@pytest.fixture
def runs() -> Runs:
    return Runs()


@pytest.fixture
def program(runs: Runs) -> Program:
    return Program("weight", runs, {"twice": 128, "transposed": 128})  # type: ignore[arg-type]


@pytest.fixture
def cache() -> WeightCache:
    return WeightCache()


def parameter() -> nn.Parameter:
    return nn.Parameter(randn(4, 8))


def made_of(weight: Tensor, forms: tuple[Tensor, ...]) -> bool:
    return torch.equal(forms[0], weight * 2) and torch.equal(forms[1], weight.t())


def test_made_once_and_anew_when_the_weight_changes(cache: WeightCache, program: Program, runs: Runs) -> None:
    weight = parameter()
    first, again = cache.forms(program, weight), cache.forms(program, weight)
    assert runs.count == 1 and all(a is b for a, b in zip(first, again, strict=True))
    assert not any(form.requires_grad for form in first) and made_of(weight, first)
    assert cache.forms(program, weight.detach())[0] is first[0]  # a view counts with its base
    with torch.no_grad():
        weight.add_(1)
    assert made_of(weight, cache.forms(program, weight)) and runs.count == 2
    weight.data = randn(4, 8, seed=1)
    assert made_of(weight, cache.forms(program, weight)) and runs.count == 3
    weight.data.add_(1)  # nothing counts this one
    assert not made_of(weight, cache.forms(program, weight))
    torch.autograd.graph.increment_version(weight)
    assert made_of(weight, cache.forms(program, weight)) and runs.count == 4


@pytest.mark.parametrize("fixed", [False, True])
def test_where_new_forms_lie(cache: WeightCache, program: Program, fixed: bool) -> None:
    cache.fixed, weight = fixed, parameter()
    first = cache.forms(program, weight)
    with torch.no_grad():
        weight.add_(1)
    second = cache.forms(program, weight)
    assert made_of(weight, second)
    assert all((a is b) is fixed for a, b in zip(first, second, strict=True))


def test_parameters_tied_by_a_transpose(cache: WeightCache, program: Program, runs: Runs) -> None:
    square = randn(8, 8)
    for weight in (square, square.t(), square.view(4, 16)):
        assert made_of(weight, cache.forms(program, weight))
    assert made_of(square, cache.forms(program, square)) and runs.count == 3


def test_old_forms_are_freed_before_new_ones_are_made(cache: WeightCache, program: Program, runs: Runs) -> None:
    old: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    module, weight = runs.module, parameter()

    def watching(weight: Tensor) -> Any:
        alive.extend(form() is not None for form in old)
        return module(weight)

    runs.module = watching  # type: ignore[assignment]
    old += map(weakref.ref, cache.forms(program, weight))
    torch.autograd.graph.increment_version(weight)
    cache.forms(program, weight)
    assert alive == [False, False]


def test_weights_of_several_modules_and_in_one_buffer(cache: WeightCache, program: Program, runs: Runs) -> None:
    flat = randn(2, 4, 8)
    weights = [parameter(), parameter(), flat[0], flat[1]]
    for _ in range(2):
        assert all(made_of(weight, cache.forms(program, weight)) for weight in weights)
    assert runs.count == 4


def only(key: str, of: int) -> Program:
    """A program that makes one of the two forms."""

    made = symbolic_trace(lambda weight: (Forms().forward(weight)[of],))
    return Program("weight", made, {key: 128})


def test_the_same_form_is_held_once(cache: WeightCache, program: Program, runs: Runs) -> None:
    weight, twice = parameter(), only("twice", 0)
    (alone,) = cache.forms(twice, weight)
    gone = weakref.ref(alone)
    del alone
    both = cache.forms(program, weight)  # makes this form and another one
    assert gone() is None and runs.count == 1
    assert cache.forms(twice, weight)[0] is both[0]
    assert cache.forms(only("transposed", 1), weight)[0] is both[1]
    torch.autograd.graph.increment_version(weight)
    assert torch.equal(cache.forms(twice, weight)[0], weight * 2) and runs.count == 2


def test_different_forms_are_held_apart(cache: WeightCache) -> None:
    weight = parameter()
    for _ in range(2):
        assert torch.equal(cache.forms(only("twice", 0), weight)[0], weight * 2)
        assert torch.equal(cache.forms(only("transposed", 1), weight)[0], weight.t())


def test_graphs_of_a_call_share_a_cache_that_goes_with_them() -> None:
    session, other = nn.Identity(), nn.Identity()
    cache = cache_of(session)
    assert cache_of(session) is cache
    assert cache_of(other) is not cache and cache_of(None) is not cache_of(None)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None and cache_of(session).fixed is False


def test_forms_go_with_the_memory_of_their_weight(cache: WeightCache, program: Program) -> None:
    weight = parameter()
    cache.forms(program, weight)
    gc.collect()
    assert len(cache._entries) == 1
    del weight
    gc.collect()
    assert len(cache._entries) == 0


def test_memory_that_moves_counts_as_a_write(cache: WeightCache, program: Program, runs: Runs) -> None:
    weight = parameter()
    cache.forms(program, weight)
    weight.share_memory_()
    assert made_of(weight, cache.forms(program, weight)) and runs.count == 2


def test_a_cuda_graph_around_the_call_makes_its_own(
    cache: WeightCache, program: Program, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = parameter()
    cache.forms(program, weight)
    monkeypatch.setattr(weight_cache, "_is_captured", lambda tensor: True)
    for _ in range(2):
        cache.forms(program, weight)
    assert runs.count == 3
    monkeypatch.undo()
    for _ in range(2):  # the graph was recorded, not run
        cache.forms(program, weight)
    assert runs.count == 4


def test_what_failed_is_tried_again(
    cache: WeightCache, program: Program, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, module = parameter(), runs.module
    cache.forms(program, weight)
    monkeypatch.setattr(weight_cache, "_stream", lambda tensor: 1)

    def fails(weight: Tensor) -> Any:
        raise MemoryError

    runs.module = fails  # type: ignore[assignment]
    with pytest.raises(MemoryError):
        cache.forms(program, weight)
    runs.module = module
    monkeypatch.undo()  # all is as it was when there were forms
    assert made_of(weight, cache.forms(program, weight)) and runs.count == 3


def test_forms_made_in_inference_mode_serve_training(cache: WeightCache, program: Program) -> None:
    weight = parameter()
    with torch.inference_mode():
        forms = cache.forms(program, weight)
    assert not any(form.is_inference() for form in forms)


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_a_step_of_an_optimizer_counts_as_a_write(cache: WeightCache, program: Program, how: dict[str, bool]) -> None:
    weight = parameter()
    cache.forms(program, weight)
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, **how).step()
    assert made_of(weight, cache.forms(program, weight))


def test_a_cached_weight_that_no_backend_took_is_an_error() -> None:
    with pytest.raises(RewriteError, match="whoever runs this graph has put none there"):
        torch.ops.fp4compile.cached_weight(randn(4, 8), 0, 0, False, [4, 8], [8, 1], torch.float32)
