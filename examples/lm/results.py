"""From result files to numbers: what of a folder goes together, and relative loss errors in pairs of one seed."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lm.arms import LABELS
from lm.machine import BadInput
from lm.model import Shape
from lm.plot import gap

TAIL = 0.1  # of the steps: what the final training loss is a mean of

Result = Mapping[str, Any]
# What a report reads of every result, of each kind of result, and of an arm of a probe.
_NUMBER, _NONE = (int, float), type(None)
FIELDS: Mapping[str, Any] = {
    **dict.fromkeys(("model", "command", "settings.dtype", "text.source", "machine.device", "machine.torch"), str),
    **dict.fromkeys(("seed", "settings.steps", "settings.batch", "text.train_tokens"), int),
    **dict.fromkeys(("settings.lr", "settings.branch", "text.bytes_per_token"), _NUMBER),
    **{f"settings.shape.{size.name}": int for size in fields(Shape)},
}
FIELDS_OF: Mapping[str, Mapping[str, Any]] = {
    "train": {
        "arm": str,
        "diverged": bool,
        "losses": list,
        "parameters": int,
        "tokens_per_second": _NUMBER,
        "report": (dict, _NONE),
        "held_out_loss": (*_NUMBER, _NONE),
    },
    "probe": {"arms": dict},
}
FIELDS_OF_ARM: Mapping[str, Any] = {"losses": list, "bf16_losses": list, "cosines": dict, "mean_cosines": dict}
# Seed, or seed and batch -> relative loss error; NaN for an arm that diverged.
Errors = dict[Any, float]


def final_loss(result: Result) -> float:
    """Mean training loss of the last tenth of the steps; NaN if the arm diverged."""
    return tenth_loss(result, 1)


def tenth_loss(result: Result, last: int) -> float:
    """Mean training loss of a tenth of the steps, the `last` one from the end; NaN if the arm diverged."""
    losses, size = result["losses"], max(1, round(len(result["losses"]) * TAIL))
    part = losses[len(losses) - last * size : len(losses) - (last - 1) * size]
    return math.nan if result["diverged"] else statistics.fmean(part)


def machine(result: Result) -> str:
    """Where a result was made."""
    return f"{result['machine']['device']}, torch {result['machine']['torch']}"


def held_out_loss(result: Result) -> float:
    """Loss on the held-out text; NaN if the arm diverged."""
    return math.nan if result["diverged"] or result["held_out_loss"] is None else result["held_out_loss"]


@dataclass
class Study:
    """The results of one folder.

    Attributes:
        runs: (model, arm) -> seed -> result of training.
        probes: model -> seed -> result of the frozen probe, with all of its arms.
        commands: what made the results.
        machines: model -> device and torch -> "training" and "probe" -> the seeds that were measured there.
    """

    runs: dict[tuple[str, str], dict[int, Result]] = field(default_factory=lambda: defaultdict(dict))
    probes: dict[str, dict[int, Result]] = field(default_factory=lambda: defaultdict(dict))
    commands: set[str] = field(default_factory=set)
    machines: dict[str, dict[str, dict[str, set[int]]]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def models(self) -> list[str]:
        """Models that there is anything of."""
        return sorted({model for model, _ in self.runs} | set(self.probes))

    def arms(self, model: str) -> list[str]:
        """Arms of a model: BF16, the formats, then the others by name."""
        first = list(LABELS)
        names = [arm for found, arm in self.runs if found == model]
        return sorted(names, key=lambda arm: (first.index(arm) if arm in first else len(first), arm))

    def errors(self, model: str, arm: str, loss: Callable[[Result], float] = final_loss) -> Errors:
        """Relative loss error of each seed that BF16 was trained with too."""
        base = self.runs.get((model, "bf16"), {})
        runs = self.runs.get((model, arm), {})
        return {seed: gap(loss(runs[seed]), loss(base[seed])) for seed in sorted(runs.keys() & base.keys())}

    def mixed_pairs(self, model: str) -> list[tuple[str, int]]:
        """Arm and seed of each pair whose BF16 run was made on another machine."""
        base = self.runs.get((model, "bf16"), {})
        return [
            (arm, seed)
            for arm in self.arms(model)
            for seed, run in sorted(self.runs[model, arm].items())
            if seed in base and machine(base[seed]) != machine(run)
        ]

    def share(self, model: str, arm: str) -> float | None:
        """Share of the FLOPs of all GEMMs that a trained arm does in FP4; None if it was not trained."""
        reports = [run["report"] for run in self.runs.get((model, arm), {}).values()]
        return reports[0]["fp4_share"] if reports and reports[0] else None

    def batch_errors(self, model: str, arm: str) -> Errors:
        """Relative loss error of each batch of each probed checkpoint."""
        return {
            (seed, batch): error
            for seed, result in sorted(self.probes.get(model, {}).items())
            if arm in result["arms"]
            for batch, error in enumerate(probe_batches(result, arm))
        }

    def probe_errors(self, model: str, arm: str) -> Errors:
        """Relative loss error of each probed checkpoint, as a mean over its batches."""
        return {
            seed: statistics.fmean(probe_batches(result, arm))
            for seed, result in sorted(self.probes.get(model, {}).items())
            if arm in result["arms"]
        }


def probe_batches(result: Result, arm: str) -> list[float]:
    """Relative loss error of each batch of a probe."""
    rows = result["arms"][arm]
    return [gap(loss, base) for loss, base in zip(rows["losses"], rows["bf16_losses"], strict=True)]


def read_study(folder: Path) -> Study:
    """Every result below a folder.

    Raises:
        BadInput: a file is cut short or no result of this study, two files are of one arm and seed, or results of one
            model cannot be compared: their settings differ, or arms of a seed do not branch off one trunk.
    """
    study, firsts = Study(), {}
    for path in sorted(folder.rglob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise BadInput(f"{path} is no whole JSON file: {error}") from error
        if not isinstance(result, dict) or result.get("kind") not in FIELDS_OF:
            continue  # the tokenizer, for one
        _check(path, result)
        _compare(path, result, firsts)
        kind, model, seed = (result[key] for key in ("kind", "model", "seed"))
        study.commands.add(result["command"])
        made = study.machines[model].setdefault(machine(result), defaultdict(set))
        made["training" if kind == "train" else kind].add(seed)
        if kind == "train":
            study.runs[model, result["arm"]][seed] = result
        else:
            arms = study.probes[model].get(seed, {"arms": {}})["arms"] | result["arms"]
            study.probes[model][seed] = {**result, "arms": arms}
    if not study.models:
        raise BadInput(f"{folder}: no results of study.py there")
    return study


def _compare(path: Path, result: Result, firsts: dict[Any, tuple[Path, Any]]) -> None:
    """Refuse a result that does not go with those before it; `firsts` keeps what the others must agree with."""
    kind, model, seed, ours = (result[key] for key in ("kind", "model", "seed", "settings"))
    first, theirs = firsts.setdefault((kind, model), (path, ours))
    if theirs != ours:
        changed = [key for key in {**theirs, **ours} if key not in theirs or theirs[key] != ours.get(key)]
        raise BadInput(f"{path} and {first} cannot be compared: {', '.join(changed)} differ")
    for arm in [result["arm"]] if kind == "train" else result["arms"]:
        first, _ = firsts.setdefault((kind, model, seed, arm), (path, None))
        if first != path:
            raise BadInput(f"{path} and {first} are both of {arm}, seed {seed}: a report takes one of them")
    if kind == "train":
        shared = result["losses"][: round(ours["branch"] * ours["steps"])]
        first, losses = firsts.setdefault((model, seed), (path, shared))
        if losses != shared:
            raise BadInput(f"{path} and {first} cannot be compared: they do not branch off one trunk")


def _check(path: Path, result: Result) -> None:
    """Refuse a file that lacks what a report reads, or has something else in its place."""
    fields = {tuple(name.split(".")): kind for name, kind in (FIELDS | FIELDS_OF[result["kind"]]).items()}
    arms = result.get("arms")
    if isinstance(arms, dict):
        fields |= {("arms", arm, name): kind for arm in arms for name, kind in FIELDS_OF_ARM.items()}
    wrong = []
    for keys, kind in fields.items():
        value: Any = result
        for key in keys:
            value = value.get(key, ...) if isinstance(value, dict) else ...
        if not isinstance(value, kind):
            wrong.append(".".join(keys))
    if not wrong and result["kind"] == "train" and not result["diverged"]:
        wrong += ["losses"] * (len(result["losses"]) != result["settings"]["steps"])
    if wrong:
        raise BadInput(f"{path} is no result of study.py: {', '.join(wrong)} missing, or of another type")
