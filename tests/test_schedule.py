"""fp4compile.Schedule: what it refuses, which precision a step gets, and how often it compiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile import Schedule
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.recipe import RECIPES

SWITCH = {0.0: "hif4-plain", 0.9: None}
EAGER = {"backend": "reference"}


@pytest.mark.parametrize(
    ("precisions", "steps", "message"),
    [
        ({0.0: "hif5"}, 10, "unknown recipe 'hif5'"),
        ({0.0: "hif4", 1.0: None}, 10, r"must be in \[0, 1\), got 1.0"),
        ({0.0: "hif4", -0.1: None}, 10, r"must be in \[0, 1\)"),
        ({0.0: "hif4", float("nan"): None}, 10, r"must be in \[0, 1\)"),
        ({0.0: "hif4", "0.9": None}, 10, "must be a number, got '0.9'"),
        ({0.5: "hif4"}, 10, "no fraction 0.0"),
        ({}, 10, "no fraction 0.0"),
        (["hif4"], 10, "must map fractions"),
        ({0.0: "hif4", 0.01: None}, 10, "fraction 0.01 begins at step 0 of 10, where another one begins"),
        ({0.0: "hif4", 0.99: None}, 10, "fraction 0.99 begins at step 10 of 10, behind the last one"),
        (SWITCH, 0, "steps must be a positive int, got 0"),
        (SWITCH, 1.5, "steps must be a positive int"),
        (SWITCH, True, "steps must be a positive int"),
    ],
)
def test_what_makes_no_schedule_is_refused_when_it_is_made(precisions: Any, steps: Any, message: str) -> None:
    with pytest.raises((FP4ValueError, FP4TypeError), match=message):
        Schedule(nn.Linear(8, 8), precisions, steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "hif4"}, "hold no 'recipe'"),
        ({"strickt": True}, "unknown option 'strickt'; .* Did you mean 'strict'"),
        ({"backend": "referense"}, "unknown backend 'referense'"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
    ],
)
def test_options_are_checked_when_it_is_made(options: Any, message: str) -> None:
    with pytest.raises(FP4ValueError, match=message):
        Schedule(nn.Linear(8, 8), SWITCH, 10, options=options)


def test_steps_negative() -> None:
    with pytest.raises(FP4ValueError, match="counted from 0, got -1"):
        Schedule(nn.Linear(8, 8), SWITCH, 10).at(-1)


def test_each_step_gets_the_precision_of_its_stretch() -> None:
    own = replace(RECIPES.get("mxfp4"), name="own")
    schedule = Schedule(nn.Linear(8, 8), {0.9: "bf16", 0.0: "hif4", 0.07: own}, steps=100)
    names = [recipe.name if recipe else None for recipe in map(schedule.recipe_at, range(100))]
    assert names == ["hif4"] * 7 + ["own"] * 83 + [None] * 10
    assert schedule.recipe_at(1000) is None  # behind the end the last one goes on


def test_one_recipe_in_two_stretches_is_one_callable() -> None:
    schedule = Schedule(nn.Linear(8, 8), {0.0: None, 0.1: "hif4", 0.9: "bf16"}, steps=10)
    assert schedule.at(0) is schedule.at(9)
    assert schedule.at(0) is not schedule.at(1)


def test_each_precision_compiles_once_over_one_set_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(4, 64)
    compiled: list[str] = []
    backend = fp4compile.schedule.fp4compile_backend

    def counted(*args: Any, **kwargs: Any) -> Any:
        compiled.append(kwargs["options"]["recipe"].name)
        return backend(*args, **kwargs)

    monkeypatch.setattr(fp4compile.schedule, "fp4compile_backend", counted)
    schedule = Schedule(model, {0.0: "hif4-plain", 0.3: "nvfp4-plain", 0.6: "hif4-plain", 0.8: None}, 10, options=EAGER)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    torch._dynamo.utils.counters.clear()
    graphs, eager, losses = [], [], []
    for step in range(10):
        eager.append(model(x).detach())
        out = schedule.at(step)(x)
        losses.append(out.detach())
        out.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # A graph at the first step of each precision and none after it.
    assert [after - before for before, after in zip([0, *graphs], graphs, strict=False)] == [
        1,
        0,
        0,
        1,
        0,
        0,
        0,
        0,
        1,
        0,
    ]
    assert compiled == ["hif4-plain", "nvfp4-plain"]
    # Every precision sees the parameters as the optimiser left them.
    exact = [torch.equal(a, b) for a, b in zip(eager, losses, strict=True)]
    assert exact == [False] * 8 + [True] * 2
    assert len({loss.sum().item() for loss in losses}) == 10
