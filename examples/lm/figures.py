"""The figures of a study's report: loss curves with their gap to BF16, and the cosines of the frozen probe."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lm.arms import LABELS, MAIN, label
from lm.claims import TIMES, mean_and_spread
from lm.plot import COLOURS, STYLE, Curve, gap, panel, png, smooth
from lm.results import Study
from lm.tables import ABLATIONS, ablated, effect, kind, paired, place_means, probed, whole

_ROLES = {"": "all three GEMMs", ":forward": "forward alone", ":dgrad": "dgrad alone", ":wgrad": "wgrad alone"}


def coloured(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Arms with their colours: BF16 and the three recipes have theirs in every figure."""
    others = cycle(COLOURS[len(LABELS) :])
    own = dict(zip(LABELS, COLOURS, strict=False))
    return [(arm, own[arm] if arm in own else next(others)) for arm in arms]


def with_panels(study: Study, model: str) -> list[str]:
    """Probed arms that have panels in the heat map: the recipes."""
    known = set(probed(study.probes.get(model, {})))
    return [arm for arm in MAIN[1:] if arm in known]


def curves_figure(study: Study, model: str) -> bytes:
    """Loss curves left, their gap to BF16 right, with a band of its spread over the seeds; means over 5% of the steps.

    Both begin where the arms part, and are of all arms but the ablations, of the seeds that every one has, if there are
    any.
    """
    arms = whole(study.arms(model))
    runs = {arm: study.runs[model, arm] for arm in arms}
    seeds = set.intersection(*map(set, runs.values())) or set.union(*map(set, runs.values()))
    settings = next(iter(runs[arms[0]].values()))["settings"]
    window, branch = max(1, settings["steps"] // 20), round(settings["branch"] * settings["steps"])
    chosen = {arm: {seed: _finite(run["losses"]) for seed, run in runs[arm].items() if seed in seeds} for arm in arms}
    losses, gaps, bands = [], [], []
    for arm, colour in coloured(arms):
        means = [statistics.fmean(row) for row in zip(*chosen[arm].values(), strict=False)]
        if means:
            losses.append(Curve(label(arm), colour, smooth(means, window)))
        pairs = [(chosen[arm][seed], chosen["bf16"][seed]) for seed in chosen[arm] if seed in runs.get("bf16", {})]
        # What was shared says nothing of the gap, so the means begin behind it.
        both = [[smooth(values[branch:], window) for values in pair] for pair in pairs]
        rows = list(zip(*([100 * gap(*losses) for losses in zip(*pair, strict=False)] for pair in both), strict=False))
        if rows and arm != "bf16":
            shown = [mean_and_spread(row) for row in [(0.0,) * len(both)] * branch + rows]
            gaps.append(Curve(label(arm), colour, [mean for mean, _ in shown]))
            bands.append((colour, shown))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        start = branch + window // 2
        panel(left, f"Training loss (nats per token; means over {window} steps)", losses, start, ".3f")
        for colour, band in bands:
            low, high = ([mean + sign * spread for mean, spread in band[start:]] for sign in (-1, 1))
            right.fill_between(range(start + 1, len(band) + 1), low, high, color=colour, alpha=0.15, lw=0)
        if gaps:
            about = f"mean of {len(seeds)} seeds, band: their spread" if len(seeds) > 1 else "one seed"
            right.axhline(0, color=COLOURS[0], lw=1)
            panel(right, f"Gap to BF16 (%; {about})", gaps, start, "+.2f")
    return png(figure)


def _finite(losses: list[float | None]) -> list[float]:
    """The losses until the run diverged."""
    until = next((step for step, loss in enumerate(losses) if loss is None or not math.isfinite(loss)), len(losses))
    return [loss for loss in losses[:until] if loss is not None]


def effects(study: Study, model: str) -> dict[str, dict[str, list[float]]]:
    """Format -> ingredient -> what it adds to the gap of each seed, in percent; without arms that diverged."""
    found: dict[str, dict[str, list[float]]] = {}
    for format, name, without, given in ablated(lambda arm: study.errors(model, arm)):
        pairs = [100 * value for value in paired(given, without)]
        if all(map(math.isfinite, pairs)):
            found.setdefault(format, {})[name] = pairs
    return found


def effects_figure(study: Study, model: str) -> bytes:
    """What each ingredient does to the gap in training loss: a panel per format, a row per ingredient.

    A dot per seed, and a bar of `TIMES` spreads around their mean: by the rule, what does not reach zero is resolved.
    """
    found = effects(study, model)
    names = [name for name in ABLATIONS if any(name in rows for rows in found.values())]
    reach = sorted(max(map(abs, pairs)) for rows in found.values() for pairs in rows.values())
    limit = 1.5 * max(value for value in reach if value <= 4 * statistics.median(reach)) or 1.0  # others are written
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(2.6 + 3.2 * len(found), 1.1 + 0.3 * len(names)), layout="constrained")
        grids = figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (format, rows) in zip(grids, found.items(), strict=True):
            axes.axvline(0, color=COLOURS[0], lw=1)
            for name, pairs in rows.items():
                _write_effect(axes, names.index(name), pairs, limit)
            axes.set_title(label(format), loc="left", fontsize=10)
            axes.set_xlabel("with − without, in % of BF16's loss")
            axes.set_yticks(range(len(names)), names)
            axes.set_xlim(-limit, limit)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(axis="x", color="#E5E5E5", lw=0.8)
    return png(figure)


def _write_effect(axes: Any, row: int, pairs: list[float], limit: float) -> None:
    """Dots, the bar, and at the edge the mean: red where an ingredient hurts, green where it helps, else grey."""
    mean, deviation = mean_and_spread(pairs)
    colour = {"hurts": COLOURS[1], "helps": COLOURS[3]}.get(effect([value / 100 for value in pairs]), "#999999")
    if abs(mean) < limit:
        if math.isfinite(deviation):
            axes.plot([mean - TIMES * deviation, mean + TIMES * deviation], [row, row], color=colour, lw=4, alpha=0.35)
        axes.plot(pairs, [row] * len(pairs), "o", color=colour, ms=3)
    else:
        axes.plot([limit * math.copysign(0.6, mean)], [row], ">" if mean > 0 else "<", color=colour, ms=5)
    axes.text(limit, row, f"{round(mean, 2) + 0.0:+.2f}", color=colour, va="center", ha="right", fontsize=8)


def heat_map(study: Study, model: str) -> bytes:
    """Cosines of the gradients by kind of layer, block and GEMM: a row of panels per recipe, a column per GEMM."""
    results, formats = study.probes[model], with_panels(study, model)
    known = set(probed(results))
    roles = [role for role in _ROLES if any(arm + role in known for arm in formats)]
    cells = {arm + role: _grid(place_means(results, arm + role)) for arm in formats for role in roles}
    kinds = list(dict.fromkeys(row for grid in cells.values() for row, _ in grid))
    blocks = sorted({block for grid in cells.values() for _, block in grid})
    lowest = min((value for grid in cells.values() for value in grid.values()), default=0.0)
    with matplotlib.rc_context(STYLE | {"font.size": 8}):
        size = (2.4 + max(0.4 * len(blocks), 1.1) * len(roles), 0.8 + (0.22 * len(kinds) + 0.2) * len(formats))
        figure = Figure(figsize=size, layout="constrained")
        grids = figure.subplots(len(formats), len(roles), squeeze=False, sharex=True, sharey=True)
        image = None
        for arm, line in zip(formats, grids, strict=True):
            for role, axes in zip(roles, line, strict=True):
                grid = cells[arm + role]
                values = [[grid.get((row, block), math.nan) for block in blocks] for row in kinds]
                image = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=1.0, aspect="auto")
                _write_cells(axes, values, (lowest + 1) / 2)
                axes.set_title(_ROLES[role] if arm == formats[0] else "", loc="left", fontsize=9)
                axes.set_yticks(range(len(kinds)), kinds)
                axes.set_xticks(range(len(blocks)), blocks)
                axes.tick_params(length=0)
                axes.spines[:].set_visible(False)
        for axes in grids[-1]:
            axes.set_xlabel("block")
        for arm, axes in zip(formats, grids[:, 0], strict=True):
            axes.set_ylabel(label(arm), fontsize=10)
        if image is not None:
            figure.colorbar(image, ax=grids, shrink=0.6, aspect=30, label="cosine to BF16's gradient")
    return png(figure)


def _write_cells(axes: Any, values: list[list[float]], middle: float) -> None:
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if math.isfinite(value):
                text = f"{value:.3f}".removeprefix("0").replace("1.000", "1")
                axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color="k" if value > middle else "w")


def _grid(places: dict[str, float]) -> dict[tuple[str, int], float]:
    """(Kind of layer, block) -> cosine."""
    found = {}
    for place, value in places.items():
        match = re.match(r"layers\.(\d+)", place)
        if match:
            found[kind(place), int(match[1])] = value
    return found
