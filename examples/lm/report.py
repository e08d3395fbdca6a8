"""The report of a study: tables in Markdown, figures as PNG, and one HTML page that holds both."""

from __future__ import annotations

import base64
import html
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fp4compile.files import write_atomically
from lm.arms import LABELS, label
from lm.claims import (
    SEEDS,
    TAIL,
    TIMES,
    Claim,
    Errors,
    Result,
    Study,
    claims,
    final_loss,
    held_out_loss,
    mean_and_spread,
    percent,
    probe_batches,
    verdict,
)
from lm.plot import COLOURS, STYLE, Curve, loss_and_gap, png

Table = list[list[str]]  # the first row is the head
RULE = (
    "Gap: (L − L_bf16) / L_bf16, pairs of one seed (same initial weights, same batches), training loss as the mean of "
    f"the last {TAIL:.0%} of the steps; ± is the sample standard deviation over seeds. An order is claimed only from "
    f"{SEEDS} seeds on and where the mean paired difference exceeds {TIMES:g} times its spread; everything else is "
    "unresolved at this scale. The values are those of the formats bit for bit; on hardware without FP4 units they are "
    "multiplied in wider types, so tokens/s say nothing of hardware that has them."
)


def with_spread(errors: Errors) -> str:
    """Mean ± spread of relative loss errors, as text."""
    if not errors:
        return "–"
    if not all(map(math.isfinite, errors.values())):
        return "diverged"
    mean, deviation = mean_and_spread(errors.values())
    return percent(mean) + (f" ± {percent(deviation, sign=False)}" if math.isfinite(deviation) else "")


def loss_table(study: Study, model: str) -> Table:
    """A row per arm: losses, their gaps to BF16, what is in FP4, how fast it went."""
    head = ["precision", "seeds", "train loss", "gap", "held-out loss", "held-out gap", "FLOPs in FP4", "tokens/s"]
    rows = [head]
    for arm in study.arms(model):
        runs = list(study.runs[model, arm].values())
        report = runs[0]["report"]
        base = arm == "bf16"
        rows.append(
            [
                label(arm),
                str(len(runs)),
                _loss(map(final_loss, runs)),
                "–" if base else with_spread(study.errors(model, arm)),
                _loss(map(held_out_loss, runs)),
                "–" if base else with_spread(study.errors(model, arm, held_out_loss)),
                f"{report['fp4_share'] * (runs[0]['switch'] or 1):.1%}" if report else "–",
                f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}",
            ]
        )
    return rows


def _loss(losses: Iterable[float]) -> str:
    mean, _ = mean_and_spread(losses)
    return f"{mean:.4f}" if math.isfinite(mean) else "diverged"


# What an ablation asks -> suffixes of the two arms that it compares: without, with.
ABLATIONS = {
    "Hadamard transform": ("-plain", "-plain+rht"),
    "stochastic rounding": ("-plain", "-plain+sr"),
    "both": ("-plain", "-plain+rht+sr"),
    "truncation-free scales, nearest": ("-plain", "-plain+tf"),
    "truncation-free scales, under both": ("-plain+rht+sr", "-plain+rht+sr+tf"),
    "2-D blocks of the weights": ("-plain", "-plain+2d"),
    "BF16 for the last 10% of the steps": ("", "@0.9"),
}


def ablation_table(study: Study, model: str) -> Table:
    """A row per format and ingredient: the gap without and with it, and whether the difference is resolved."""
    rows = [["format", "ingredient", "gap without", "gap with", "with − without", "verdict"]]
    for format in LABELS:
        for name, suffixes in ABLATIONS.items():
            without, given = (study.errors(model, format + suffix) for suffix in suffixes)
            pairs = [given[seed] - without[seed] for seed in sorted(given.keys() & without.keys())]
            if pairs:
                difference = with_spread(dict(enumerate(pairs)))
                words = {"below": "helps", "above": "hurts", "unresolved": "unresolved at this scale"}
                cells = [with_spread(without), with_spread(given), difference, words[verdict(pairs)]]
                rows.append([label(format), name, *cells])
    return rows


def probe_table(study: Study, model: str) -> Table:
    """A row per recipe: loss gap and cosine of the weight gradient at the same weights."""
    results = study.probes[model]
    rows = [["precision", "checkpoints", "gap", "spread over batches", "cosine of the weight gradient", "lowest place"]]
    for arm in _probed(results):
        errors = study.probe_errors(model, arm)
        batches = [mean_and_spread(probe_batches(results[seed], arm))[1] for seed in errors]
        cosines = place_means(results, arm)
        places = {name: value for name, value in cosines.items() if name != "weights"}
        worst = min(places, key=lambda name: places[name])
        rows.append(
            [
                label(arm),
                str(len(errors)),
                with_spread(errors),
                percent(statistics.fmean(batches), sign=False),
                f"{cosines['weights']:.4f}" + spread_of(results, arm),
                f"{worst} {places[worst]:.4f}",
            ]
        )
    return rows


def _probed(results: Mapping[int, Result]) -> list[str]:
    return list(dict.fromkeys(arm for result in results.values() for arm in result["arms"]))


def place_means(results: Mapping[int, Result], arm: str) -> dict[str, float]:
    """Place -> cosine, as a mean over batches and checkpoints."""
    found: dict[str, list[float]] = {}
    for result in results.values():
        for name, values in result["arms"].get(arm, {"cosines": {}})["cosines"].items():
            found.setdefault(name, []).extend(values)
    return {name: statistics.fmean(values) for name, values in found.items()}


def spread_of(results: Mapping[int, Result], arm: str) -> str:
    """Spread over batches of the cosine of all weight gradients, as a mean over checkpoints; "" for one batch."""
    found = [result["arms"][arm]["cosines"]["weights"] for result in results.values() if arm in result["arms"]]
    mean = statistics.fmean(mean_and_spread(values)[1] for values in found)
    return f" ± {mean:.4f}" if math.isfinite(mean) else ""


def _kind(place: str) -> str:
    """Kind of layer: `attention.q_proj`."""
    return re.sub(r"^layers\.\d+\.?", "", place) or "block input"


def _block(place: str) -> str:
    """Block and whether it is a gradient of weights or of the block's input."""
    match = re.fullmatch(r"(layers\.\d+)(\..*)?", place)
    return f"{match[1]}, {'weights' if match[2] else 'input'}" if match else place


def cosine_table(study: Study, model: str, group: Callable[[str], str]) -> Table:
    """A row per group of places: the mean cosine of their gradients in each recipe."""
    results = study.probes[model]
    arms = _probed(results)
    rows = [["gradient of", *map(label, arms)]]
    groups: dict[str, list[list[float]]] = {}
    for column, arm in enumerate(arms):
        for name, value in place_means(results, arm).items():
            groups.setdefault(group(name), [[] for _ in arms])[column].append(value)
    for name, columns in groups.items():
        rows.append([name, *(f"{statistics.fmean(values):.4f}" if values else "–" for values in columns)])
    return rows


def coloured(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Arms with their colours: BF16 and the three recipes have theirs in every figure."""
    others = cycle(COLOURS[len(LABELS) :])
    own = dict(zip(LABELS, COLOURS, strict=False))
    return [(arm, own[arm] if arm in own else next(others)) for arm in arms]


def depth_figure(study: Study, model: str) -> bytes:
    """Cosine over the depth of the model: weight gradients left, gradients of the blocks' inputs right."""
    results = study.probes[model]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for arm, colour in coloured(_probed(results)):
            weights: dict[int, list[float]] = {}
            inputs: dict[int, list[float]] = {}
            for name, value in place_means(results, arm).items():
                match = re.fullmatch(r"layers\.(\d+)(\..*)?", name)
                if match:
                    (weights if match[2] else inputs).setdefault(int(match[1]), []).append(value)
            for axes, found in zip(panels, (weights, inputs), strict=True):
                means = [statistics.fmean(values) for _, values in sorted(found.items())]
                axes.plot(range(len(means)), means, "o-", color=colour, lw=1.4, ms=4, label=label(arm))
        for axes, title in zip(panels, ("weights, mean over a block", "block input"), strict=True):
            axes.set_title(f"Cosine of the gradient to BF16's: {title}", loc="left", fontsize=11)
            axes.set_xlabel("block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y", color="#E5E5E5", lw=0.8)
        panels[0].legend(frameon=False)
    return png(figure)


def curves_figure(study: Study, model: str) -> bytes:
    """Loss curves of BF16 and the recipes, as means over the seeds that all of them have."""
    arms = [arm for arm in study.arms(model) if "+" not in arm and "@" not in arm]
    seeds = set.intersection(*(set(study.runs[model, arm]) for arm in arms))
    if not seeds:  # each on its own
        seeds = set.union(*(set(study.runs[model, arm]) for arm in arms))
    curves = []
    for arm, colour in coloured(arms):
        runs = [run["losses"] for seed, run in study.runs[model, arm].items() if seed in seeds]
        rows = zip(*runs, strict=False)  # until the first seed diverged
        means = [statistics.fmean(row) for row in rows if None not in row]
        if means:
            curves.append(Curve(label(arm), colour, means))
    steps = study.runs[model, arms[0]]
    return loss_and_gap(curves, "nats per token", max(len(run["losses"]) for run in steps.values()))


def all_claims(study: Study, model: str) -> list[Claim]:
    """The statements on one model, from each of its measurements."""
    main = ("hif4", "mxfp4", "nvfp4")
    return [
        *claims(f"{model}, training loss", {arm: study.errors(model, arm) for arm in main}),
        *claims(f"{model}, held-out loss", {arm: study.errors(model, arm, held_out_loss) for arm in main}),
        *claims(f"{model}, frozen probe", {arm: study.probe_errors(model, arm) for arm in main}),
    ]


def conditions(study: Study, model: str) -> list[str]:
    """What was run, on what."""
    runs = [run for (found, _), seeds in study.runs.items() if found == model for run in seeds.values()]
    runs += study.probes.get(model, {}).values()
    first = runs[0]
    s, text = first["settings"], first["text"]
    shape = s["shape"]
    experts = f", {shape['experts']} experts of which a token takes {shape['chosen']}" if shape["experts"] else ""
    sizes = f"{shape['layers']} layers, width {shape['dim']}, SwiGLU {shape['ff']}{experts}"
    seen = s["steps"] * s["batch"] * shape["sequence"]
    return [
        f"Model: Llama, {sizes}, vocabulary {shape['vocabulary']}, {s['dtype']} arithmetic over fp32 weights",
        f"Run: {s['steps']} steps of {s['batch']} × {shape['sequence']} tokens ({seen / 1e6:.1f} M), "
        f"AdamW(0.9, 0.95), peak learning rate {s['lr']:g}, cosine to 5%, gradients clipped to 1",
        f"Text: {text['source']}, {text['train_tokens'] / 1e6:.1f} M training tokens "
        f"({seen / text['train_tokens']:.2f} epochs), {text['bytes_per_token']:.2f} bytes per token",
        "Device: " + "; ".join(sorted({f"{r['machine']['device']}, torch {r['machine']['torch']}" for r in runs})),
    ]


# --- Markdown and HTML -----------------------------------------------------------------------------------------------


def markdown_table(rows: Table) -> str:
    """A table as Markdown."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def sections(study: Study) -> list[tuple[str, Any]]:
    """The report as (kind, content): "h1", "h2", "p", "list", "table" or "figure" (file stem, PNG)."""
    found: list[tuple[str, Any]] = [("h1", "FP4 pre-training against BF16"), ("p", RULE)]
    for model in study.models:
        found += [("h2", f"Model: {model}"), ("list", conditions(study, model))]
        stated = all_claims(study, model)
        if stated:
            found.append(("list", [f"{claim.text}: {claim.answer}" for claim in stated]))
        if study.arms(model):
            found += [
                ("table", loss_table(study, model)),
                ("figure", (f"curves-{model}", curves_figure(study, model))),
            ]
        ablations = ablation_table(study, model)
        if len(ablations) > 1:
            found += [("h2", f"Ablations: {model}"), ("table", ablations)]
        if study.probes.get(model):
            found += [
                ("h2", f"Frozen probe: {model}"),
                ("p", "A trained BF16 checkpoint; forward and gradients in FP4 at the same weights and batches."),
                ("table", probe_table(study, model)),
                ("table", cosine_table(study, model, _kind)),
                ("table", cosine_table(study, model, _block)),
                ("figure", (f"probe-{model}", depth_figure(study, model))),
            ]
    found += [("h2", "Commands"), ("list", [f"`{command}`" for command in sorted(study.commands)])]
    return found


def to_markdown(parts: Sequence[tuple[str, Any]]) -> str:
    """The report as Markdown, figures beside it."""
    made = {
        "h1": lambda text: f"# {text}",
        "h2": lambda text: f"## {text}",
        "p": str,
        "list": lambda items: "\n".join(f"- {item}" for item in items),
        "table": markdown_table,
        "figure": lambda figure: f"![{figure[0]}]({figure[0]}.png)",
    }
    return "\n\n".join(made[kind](content) for kind, content in parts) + "\n"


def _inline(text: str) -> str:
    """Escaped, with Markdown's bold and code."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(rows: Table) -> str:
    head, *body = ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{lines}</tbody></table>"


def _html_figure(figure: tuple[str, bytes]) -> str:
    name, data = figure
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}
img{max-width:100%}code{font-size:85%;overflow-wrap:anywhere}"""


def to_html(parts: Sequence[tuple[str, Any]]) -> str:
    """The report as one HTML page that needs no other file."""
    made = {
        "h1": lambda text: f"<h1>{_inline(text)}</h1>",
        "h2": lambda text: f"<h2>{_inline(text)}</h2>",
        "p": lambda text: f"<p>{_inline(text)}</p>",
        "list": lambda items: "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>",
        "table": _html_table,
        "figure": _html_figure,
    }
    body = "\n".join(made[kind](content) for kind, content in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(parts[0][1])}</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def write_report(study: Study, out: Path) -> list[Path]:
    """Write report.md, report.html and the figures; the files' paths."""
    parts = sections(study)
    files = {"report.md": to_markdown(parts).encode(), "report.html": to_html(parts).encode()}
    files |= {f"{name}.png": data for kind, content in parts if kind == "figure" for name, data in [content]}
    for name, data in files.items():
        write_atomically(out / name, data)
    return [out / name for name in files]
