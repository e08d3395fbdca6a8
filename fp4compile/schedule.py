"""Precision that changes with the step: FP4 for most of a training run, BF16 for its end.

    schedule = Schedule(model, {0.0: "hif4", 0.9: None}, steps=10_000)
    loss = schedule.at(step)(batch)

Every distinct precision is one `torch.compile` of the same module, so all of them train the same parameters. A switch
picks the other callable: each is compiled once, at its first call, and no step recompiles.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fp4compile import recipe as recipes
from fp4compile.backend import get_backend
from fp4compile.dynamo import Options, fp4compile_backend
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.recipe import Recipe

Precision = str | Path | Recipe | None


class Schedule:
    """A model whose GEMMs change their precision at given fractions of a training run.

    Attributes:
        precisions: first step of each stretch -> its recipe, None without FP4; in order.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        precisions: Mapping[float, Precision],
        steps: int,
        *,
        options: Mapping[str, Any] | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
    ) -> None:
        """Check everything; nothing is compiled before the first call.

        Args:
            model: a module or a function, as `torch.compile` takes it.
            precisions: fraction of the run in [0, 1) -> what begins there: a recipe as `options={"recipe": ...}` takes
                it, or None or "bf16" for `torch.compile` without FP4. 0.0 must be among them. A fraction begins at the
                step nearest to it.
            steps: length of the run. Steps behind its end keep the last precision.
            options: of `torch.compile(backend="fp4compile")`, without "recipe"; "mode" holds without FP4 too.
            fullgraph, dynamic: of `torch.compile`.

        Raises:
            FP4ValueError, FP4TypeError: an unknown recipe or option; fractions or steps that make no schedule.
        """
        chosen = dict(options or {})
        if "recipe" in chosen:
            raise FP4ValueError("options of a Schedule hold no 'recipe': its precisions name the recipes")
        parsed = Options.parse(chosen)
        self.precisions = {step: _resolved(precision) for step, precision in _first_steps(precisions, steps).items()}
        plain = get_backend(parsed.backend).without_fp4(parsed.mode)
        compiled: dict[Recipe | None, Callable[..., Any]] = {}
        for recipe in self.precisions.values():
            if recipe not in compiled:
                fp4 = {"backend": fp4compile_backend, "options": {**chosen, "recipe": recipe}}
                how = plain if recipe is None else fp4
                compiled[recipe] = torch.compile(model, fullgraph=fullgraph, dynamic=dynamic, **how)
        self._firsts = list(self.precisions)
        self._compiled = [compiled[recipe] for recipe in self.precisions.values()]

    def at(self, step: int) -> Callable[..., Any]:
        """The compiled model of a step, counted from 0; the same object for all steps of one precision."""
        return self._compiled[self._stretch(step)]

    def recipe_at(self, step: int) -> Recipe | None:
        """The recipe of a step; None without FP4."""
        return self.precisions[self._firsts[self._stretch(step)]]

    def _stretch(self, step: int) -> int:
        if step < 0:
            raise FP4ValueError(f"steps are counted from 0, got {step}")
        return bisect.bisect_right(self._firsts, step) - 1


def _resolved(precision: Precision) -> Recipe | None:
    return None if precision is None or precision == "bf16" else recipes.resolve(precision)


def _first_steps(precisions: Mapping[float, Precision], steps: int) -> dict[int, Precision]:
    """First step of each stretch -> its precision, in order."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise FP4ValueError(f"steps must be a positive int, got {steps!r}")
    if not isinstance(precisions, Mapping):
        raise FP4TypeError(f"precisions must map fractions of the run to recipes, got {type(precisions).__name__}")
    for fraction in precisions:
        if not isinstance(fraction, float | int) or isinstance(fraction, bool):
            raise FP4TypeError(f"a fraction of the run must be a number, got {fraction!r}")
        if not (math.isfinite(fraction) and 0 <= fraction < 1):
            raise FP4ValueError(f"a fraction of the run must be in [0, 1), got {fraction!r}")
    if 0 not in precisions:
        raise FP4ValueError("precisions must say what the run begins with: there is no fraction 0.0")
    found: dict[int, Precision] = {}
    for fraction in sorted(precisions):
        first = round(fraction * steps)
        if first in found or first == steps:
            raise FP4ValueError(
                f"fraction {fraction!r} begins at step {first} of {steps}, "
                f"{'where another one begins' if first in found else 'behind the last one'}; "
                "use more steps or other fractions"
            )
        found[first] = precisions[fraction]
    return found
