"""The report of a study: tables in Markdown, figures as PNG, and one HTML page that holds both."""

from __future__ import annotations

import base64
import html
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp4compile.files import write_atomically
from lm.claims import SEEDS, TIMES
from lm.figures import curves_figure, effects, effects_figure, heat_map, with_panels
from lm.findings import findings, order_table
from lm.results import TAIL, Study
from lm.tables import (
    Table,
    ablation_table,
    claims_table,
    effect_table,
    kind_table,
    loss_table,
    probe_ablation_table,
    probe_table,
    seed_table,
    whole,
)

RULE = (
    "Gap: (L − L_bf16) / L_bf16, pairs of one seed (same weights at first, same batches), training loss as the mean of "
    f"the last {TAIL:.0%} of the steps; ± is the sample standard deviation over seeds. An order is claimed only from "
    f"{SEEDS} seeds on and where the mean paired difference exceeds {TIMES:g} times its spread; the rest is unresolved "
    "at this scale. By chance 1 comparison in 108 of equal arms passes that bar, if four differences are normal (t = 6 "
    "with three degrees of freedom). The values are those of the formats bit for bit; on hardware without FP4 units "
    "they are multiplied in wider types, so tokens/s say nothing of hardware that has them, and arms that ran side by "
    "side shared the device. This page is made from the results by `examples/study.py report`, its sentences too."
)
PROBE = (
    "A trained BF16 checkpoint of each seed; forward and gradients in FP4 at the same weights and batches, without a "
    "step. The cosine is that between the gradients in FP4 and in BF16, of all weights of the layers as one vector: of "
    "one batch, where noise and bias count alike, and of the mean over all batches, where noise averages out and bias "
    "stays; it counts as 0 where a gradient vanished. Seeds are checkpoints here; where batches are the pairs, formats "
    "are told apart at these checkpoints alone."
)
EFFECTS = (
    f"A dot per seed; the bar reaches {TIMES:g} spreads to both sides of their mean, so that by the rule an ingredient "
    "whose bar does not touch zero is resolved, if it has four seeds: green helps, red hurts."
)


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
    start = (
        f"the first {s['branch']:.0%} of the steps in BF16, made once per seed; there all arms branch off, with its "
        "weights, optimiser and batches"
        if s["branch"]
        else "every arm from the seed's initial weights"
    )
    return [
        f"Model: Llama, {sizes}, vocabulary {shape['vocabulary']}, {s['dtype']} arithmetic over fp32 weights",
        f"Run: {s['steps']} steps of {s['batch']} × {shape['sequence']} tokens ({seen / 1e6:.1f} M), "
        f"AdamW(0.9, 0.95), peak learning rate {s['lr']:g}, cosine to 5%, gradients clipped to 1",
        f"Start: {start}",
        f"Text: {text['source']}, {text['train_tokens'] / 1e6:.1f} M training tokens "
        f"({seen / text['train_tokens']:.2f} epochs), {text['bytes_per_token']:.2f} bytes per token",
        f"Device: {devices(study, model)}",
    ]


def devices(study: Study, model: str) -> str:
    """What the results were made on; of several machines, what was made on which."""
    machines = study.machines[model]
    if len(machines) == 1:
        return next(iter(machines))
    parts = []
    for name, kinds in sorted(machines.items()):
        what = [f"{kind} of seeds {', '.join(map(str, sorted(seeds)))}" for kind, seeds in kinds.items()]
        parts.append(f"{name} ({'; '.join(what)})")
    return " and ".join(parts)


# --- Markdown and HTML -----------------------------------------------------------------------------------------------


def markdown_table(rows: Table) -> str:
    """A table as Markdown."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body))


def commands(study: Study) -> list[str]:
    """What made the results: commands that differ in their arms, and in the time that they had, as one."""
    groups: dict[str, list[str]] = {}
    for command in sorted(study.commands):
        words, kept, arms = iter(shlex.split(command)), [], ""
        option = ""
        for word in words:
            option = word if word.startswith("--") else option
            if option == "--minutes":
                continue
            if option in ("--arm", "--arms") and word != option:
                arms = f"{arms} {word}".strip()
            else:
                kept += [word, "ARM"] if word in ("--arm", "--arms") else [word]
        groups.setdefault(shlex.join(kept), []).append(arms)
    return [
        f"`{command}`" + (f" with ARM = {', '.join(f'`{arm}`' for arm in sorted(set(arms)))}" if any(arms) else "")
        for command, arms in groups.items()
    ]


def sections(study: Study) -> list[tuple[str, Any]]:
    """The report as (kind, content): "h1", "h2", "p", "list", "table" or "figure" (file stem, PNG)."""
    found: list[tuple[str, Any]] = [("h1", "FP4 pre-training against BF16"), ("p", RULE)]
    for model in study.models:
        summary = [order_table(study, model), effect_table(study, model)]
        found += [("h2", f"Model: {model}"), ("list", conditions(study, model))]
        found += [("table", table) for table in summary if len(table) > 1] + [("list", findings(study, model))]
        if whole(study.arms(model)):
            found += [("h2", f"Training: {model}"), ("table", loss_table(study, model))]
            found += [("table", seed_table(study, model)), ("figure", (f"curves-{model}", curves_figure(study, model)))]
        if len(claimed := claims_table(study, model)) > 1:
            found += [("h2", f"Claims: {model}"), ("table", claimed)]
        if len(ablations := ablation_table(study, model)) > 1:
            found += [("h2", f"Ingredients: {model}"), ("table", ablations)]
        if effects(study, model):
            found += [("p", EFFECTS), ("figure", (f"effects-{model}", effects_figure(study, model)))]
        if study.probes.get(model):
            found += [("h2", f"Frozen probe: {model}"), ("p", PROBE)]
            tables = [make(study, model) for make in (probe_table, probe_ablation_table, kind_table)]
            found += [("table", table) for table in tables if len(table) > 1]
            if with_panels(study, model):
                found += [("figure", (f"probe-{model}", heat_map(study, model)))]
    return [*found, ("h2", "Commands"), ("list", commands(study))]


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
    """A table with columns of numbers to the right."""
    number = re.compile(r"[+-]?\d[\d.,]*%?( ± [\d.]+%?)?")
    numbers = [any(map(number.fullmatch, column)) for column in zip(*rows[1:], strict=True)]

    def line(row: Sequence[str], tag: str) -> str:
        cells = (
            f"<{tag}{' class=n' * right}>{_inline(cell)}</{tag}>" for cell, right in zip(row, numbers, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f"<table><thead>{line(rows[0], 'th')}</thead><tbody>{body}</tbody></table>"


def _html_figure(figure: tuple[str, bytes]) -> str:
    name, data = figure
    return f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
.n{text-align:right;white-space:nowrap}
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
