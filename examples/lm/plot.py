"""Figures of loss curves, each line labelled where it ends."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by all common kinds of colour blindness; the reference is the first.
COLOURS = ("#333333", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing means; the first ones run over what there is."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def spread(wanted: Sequence[float], distance: float) -> list[float]:
    """Heights at least `distance` apart and near the wanted ones, so that labels do not overlap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for _ in range(200):
        for low, high in pairwise(order):
            push = (distance - (placed[high] - placed[low])) / 2
            if push > 0:
                placed[low], placed[high] = placed[low] - push, placed[high] + push
    return placed


@dataclass(frozen=True)
class Curve:
    """A line of a figure; `values[i]` belongs to step i + 1."""

    label: str
    colour: str
    values: Sequence[float]


def _label_ends(axes: Any, curves: Sequence[Curve], form: str) -> None:
    """Write each curve's name and last value right of its end, tied to it by a thin line."""
    low, high = axes.get_ylim()
    heights = spread([curve.values[-1] for curve in curves], 0.06 * (high - low))
    for curve, height in zip(curves, heights, strict=True):
        axes.annotate(
            f"{curve.label}  {curve.values[-1]:{form}}",
            (len(curve.values), curve.values[-1]),
            (1.04, height),
            textcoords=axes.get_yaxis_transform(),
            color=curve.colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": curve.colour, "lw": 0.7, "relpos": (0, 0.5), "shrinkB": 0},
        )


def panel(axes: Any, title: str, curves: Sequence[Curve], skip: int, form: str) -> None:
    """Curves from step `skip` on, each labelled at its end."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.grid(axis="y", color="#E5E5E5", lw=0.8)
    axes.margins(x=0)
    shown = [curve for curve in curves if len(curve.values) > skip]
    for curve in shown:
        axes.plot(range(skip + 1, len(curve.values) + 1), curve.values[skip:], color=curve.colour, lw=1.6)
    _label_ends(axes, shown, form)


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def gap(loss: float, reference: float) -> float:
    """The relative loss error (L - L_bf16) / L_bf16."""
    return (loss - reference) / reference


def loss_and_gap(curves: Sequence[Curve], unit: str, steps: int) -> bytes:
    """A figure: loss curves left, their gap to the first of them right, as means over a tenth of the steps."""
    window = max(1, steps // 10)
    means = [Curve(c.label, c.colour, smooth(list(filter(math.isfinite, c.values)), window)) for c in curves]
    first = means[0]
    gaps = [
        Curve(c.label, c.colour, [100 * gap(*pair) for pair in zip(c.values, first.values, strict=False)])
        for c in means
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        panel(left, f"Training loss ({unit}; means over {window} steps)", means, window // 4, ".3f")
        title = f"Gap to {first.label} (%; of the same means)"
        panel(right, title, gaps, min(window, steps - 1), "+.2f")
    return png(figure)
