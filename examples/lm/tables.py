"""The tables of a study's report: rows of text, the first one the head."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from fp4compile.recipe import RECIPES
from lm.arms import MAIN, PLAIN, TWINS, label, stabilisers
from lm.claims import Claim, claims, mean_and_spread, percent, verdict
from lm.results import Errors, Result, Study, final_loss, held_out_loss, probe_batches, tenth_loss

Table = list[list[str]]
SHOWN = 5e-5  # what tables round to zero: two graphs of one arithmetic differ by fp32's rounding
WORDS = {"below": "helps", "above": "hurts", "unresolved": "unresolved"}

# What an ablation asks -> suffixes of the two arms that it compares: without, with.
WHOLE = "all of the recipe"
ABLATIONS = {
    WHOLE: ("-plain", ""),
    "Hadamard transform": ("-plain", "-plain+rht"),
    "stochastic rounding": ("-plain", "-plain+sr"),
    "both of these": ("-plain", "-plain+rht+sr"),
    "truncation-free scales": ("-plain", "-plain+tf"),
    "truncation-free scales, added to both": ("-plain+rht+sr", "-plain+rht+sr+tf"),
    "2-D blocks of the weights": ("-plain", "-plain+2d"),
    "no tensor scale": ("-plain", "-plain+nopts"),
    "BF16 for the last 10% of the steps": ("", "@0.9"),
}


def whole(arms: Iterable[str]) -> list[str]:
    """Arms without the ablations, which have tables of their own."""
    return [arm for arm in arms if "+" not in arm and "@" not in arm]


def with_spread(errors: Errors) -> str:
    """Mean ± spread of relative loss errors, as text."""
    if not errors:
        return "–"
    if not all(map(math.isfinite, errors.values())):
        return "diverged"
    mean, deviation = mean_and_spread(errors.values())
    return percent(mean) + (f" ± {percent(deviation, sign=False)}" if math.isfinite(deviation) else "")


def _loss(losses: Iterable[float]) -> str:
    mean, _ = mean_and_spread(losses)
    return f"{mean:.4f}" if math.isfinite(mean) else "diverged"


# --- training --------------------------------------------------------------------------------------------------------


def all_claims(study: Study, model: str) -> list[Claim]:
    """The statements on one model, from each of its measurements."""
    arms = (*MAIN[1:], *PLAIN)
    shares = {arm: study.share(model, arm) for arm in arms}
    return [
        *claims("training loss", {arm: study.errors(model, arm) for arm in arms}, shares),
        *claims("held-out loss", {arm: study.errors(model, arm, held_out_loss) for arm in arms}, shares),
        *claims("frozen probe", {arm: study.probe_errors(model, arm) for arm in arms}, shares),
        *claims("frozen probe", {arm: study.batch_errors(model, arm) for arm in arms}, shares, "batches"),
    ]


def claims_table(study: Study, model: str) -> Table:
    """A row per statement: what it is read from, the paired difference, what the rule says."""
    rows = [["measured by", "statement", "paired difference", "pairs", "answer"]]
    for claim in all_claims(study, model):
        difference = with_spread(dict(enumerate(claim.differences)))
        rows.append([claim.measure, claim.text, difference, claim.pairs, claim.word])
    return rows


def loss_table(study: Study, model: str) -> Table:
    """A row per arm but the ablations: losses, their gaps to BF16, what is in FP4, how fast it went."""
    head = [
        "precision",
        "seeds",
        "train loss",
        "gap",
        "a tenth of the steps before",
        "held-out loss",
        "held-out gap",
        "FLOPs in FP4",
        "tokens/s",
    ]
    rows = [head]
    for arm in whole(study.arms(model)):
        runs = list(study.runs[model, arm].values())
        report = runs[0]["report"]
        base = arm == "bf16"
        rows.append(
            [
                label(arm),
                str(len(runs)),
                _loss(map(final_loss, runs)),
                "–" if base else with_spread(study.errors(model, arm)),
                "–" if base else with_spread(study.errors(model, arm, partial(tenth_loss, last=2))),
                _loss(map(held_out_loss, runs)),
                "–" if base else with_spread(study.errors(model, arm, held_out_loss)),
                f"{report['fp4_share']:.1%}" if report else "–",
                f"{statistics.fmean(run['tokens_per_second'] for run in runs):,.0f}",
            ]
        )
    return rows


def seed_table(study: Study, model: str) -> Table:
    """A row per arm: the gap in training loss of each seed; BF16's loss in the first row."""
    arms = whole(study.arms(model))
    seeds = sorted({seed for arm in arms for seed in study.runs[model, arm]})
    rows = [["gap in training loss", *(f"seed {seed}" for seed in seeds)]]
    for arm in arms:
        runs, errors = study.runs[model, arm], study.errors(model, arm)
        if arm == "bf16":
            cells = [f"{final_loss(runs[seed]):.4f}" if seed in runs else "–" for seed in seeds]
        else:
            cells = [percent(errors.get(seed, math.nan)) for seed in seeds]
        rows.append([f"{label(arm)}, loss" if arm == "bf16" else label(arm), *cells])
    return rows


def effect_table(study: Study, model: str) -> Table:
    """A row per ingredient, a column per format: what it does to the gap in training loss."""
    cells: dict[str, dict[str, str]] = {}
    for format, name, without, given in ablated(lambda arm: study.errors(model, arm)):
        pairs = paired(given, without)
        word, (mean, _) = effect(pairs), mean_and_spread(pairs)
        cells.setdefault(name, {})[format] = f"{word}, {percent(mean)}" if math.isfinite(mean) else word
    rows = [["ingredient", *map(label, MAIN[1:])]]
    for name in ABLATIONS:
        if name in cells:
            rows.append([name, *(cells[name].get(format, "–") for format in MAIN[1:])])
    return rows


def ablation_table(study: Study, model: str) -> Table:
    """A row per format and ingredient: the gap without and with it, and whether the difference is resolved."""
    rows = [["format", "ingredient", "gap without", "gap with", "with − without", "verdict", "held out", "verdict"]]
    held_out = {
        (format, name): paired(given, without)
        for format, name, without, given in ablated(lambda arm: study.errors(model, arm, held_out_loss))
    }
    for format, name, without, given in ablated(lambda arm: study.errors(model, arm)):
        cells = [with_spread(without), with_spread(given)]
        for pairs in (paired(given, without), held_out[format, name]):
            cells += [with_spread(dict(enumerate(pairs))), effect(pairs)]
        rows.append([label(format), in_words(format, name), *cells])
    return rows


def in_words(format: str, ingredient: str) -> str:
    """An ingredient, or what the format's own recipe consists of."""
    return f"all of the recipe: {stabilisers(RECIPES.get(format))}" if ingredient == WHOLE else ingredient


def ablated(errors: Callable[[str], Errors]) -> list[tuple[str, str, Errors, Errors]]:
    """Format, ingredient, and the errors without and with it, of what both were measured of for some seed."""
    found = []
    for format in MAIN[1:]:
        for name, suffixes in ABLATIONS.items():
            arms = [format + suffix for suffix in suffixes]
            without, given = (errors(arm) or errors(TWINS.get(arm, arm)) for arm in arms)
            both = sorted(without.keys() & given.keys())
            if both:
                pairs = ({seed: errors[seed] for seed in both} for errors in (without, given))
                found.append((format, name, *pairs))
    return found


def paired(ours: Errors, theirs: Errors) -> list[float]:
    """Differences of the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def effect(differences: Sequence[float]) -> str:
    """Whether an ingredient that changes errors so helps, by the rule for claims."""
    if not all(map(math.isfinite, differences)):
        return "diverged"
    return "no effect" if all(abs(value) < SHOWN for value in differences) else WORDS[verdict(differences)]


# --- the frozen probe ------------------------------------------------------------------------------------------------


def probed(results: Mapping[int, Result]) -> list[str]:
    """The arms that were measured: the recipes, the plain formats, then the others by name."""
    names = {arm for result in results.values() for arm in result["arms"]}
    first = [*MAIN[1:], *PLAIN]
    return sorted(names, key=lambda arm: (first.index(arm) if arm in first else len(first), arm))


def place_means(results: Mapping[int, Result], arm: str) -> dict[str, float]:
    """Place -> cosine, as a mean over batches and checkpoints."""
    found: dict[str, list[float]] = {}
    for result in results.values():
        for name, values in result["arms"].get(arm, {"cosines": {}})["cosines"].items():
            found.setdefault(name, []).extend(values)
    return {name: statistics.fmean(values) for name, values in found.items()}


def gradient_errors(results: Mapping[int, Result], arm: str, mean: bool = False) -> Errors:
    """1 - cosine of all weights' gradients, per checkpoint: of one batch, or of the mean gradients of all batches."""
    rows = {seed: result["arms"][arm] for seed, result in sorted(results.items()) if arm in result["arms"]}
    if mean:
        return {seed: 1 - row["mean_cosines"]["weights"] for seed, row in rows.items()}
    return {seed: 1 - statistics.fmean(row["cosines"]["weights"]) for seed, row in rows.items()}


def _cosine(errors: Errors) -> str:
    mean, deviation = mean_and_spread(errors.values())
    return f"{1 - mean:.4f}" + (f" ± {deviation:.4f}" if math.isfinite(deviation) else "")


def probe_table(study: Study, model: str) -> Table:
    """A row per recipe: loss gap and cosines of the weight gradient at the same weights."""
    results = study.probes[model]
    head = ["precision", "checkpoints", "gap", "spread over batches", "gradient cosine", "of the mean gradient"]
    rows = [[*head, "lowest place"]]
    for arm in whole(probed(results)):
        errors = study.probe_errors(model, arm)
        batches = [mean_and_spread(probe_batches(results[seed], arm))[1] for seed in errors]
        places = {name: value for name, value in place_means(results, arm).items() if name != "weights"}
        worst = min(places, key=lambda name: places[name])
        rows.append(
            [
                label(arm),
                str(len(errors)),
                with_spread(errors),
                percent(statistics.fmean(batches), sign=False),
                _cosine(gradient_errors(results, arm)),
                _cosine(gradient_errors(results, arm, mean=True)),
                f"{worst} {places[worst]:.4f}",
            ]
        )
    return rows


def probe_ablation_table(study: Study, model: str) -> Table:
    """A row per format and ingredient: what it does to the loss and to the gradients of the same weights."""
    results = study.probes[model]
    rows = [["format", "ingredient", "loss gap", "gradient cosine", "cosine of the mean gradient"]]

    def cosine(errors: Errors) -> str:
        return f"{1 - statistics.fmean(errors.values()):.4f}"

    measures: list[tuple[Callable[[str], Errors], Callable[[Errors], str]]] = [
        (lambda arm: study.probe_errors(model, arm), lambda errors: percent(mean_and_spread(errors.values())[0])),
        (lambda arm: gradient_errors(results, arm), cosine),
        (lambda arm: gradient_errors(results, arm, mean=True), cosine),
    ]
    columns = [
        [
            (
                label(format),
                in_words(format, name),
                f"{text(without)} → {text(given)}: {effect(paired(given, without))}",
            )
            for format, name, without, given in ablated(errors)
        ]
        for errors, text in measures
    ]
    for cells in zip(*columns, strict=True):
        rows.append([*cells[0][:2], *(cell[2] for cell in cells)])
    return rows


def kind(place: str) -> str:
    """Kind of layer: `attention.q_proj`."""
    return re.sub(r"^layers\.\d+\.?", "", place) or "block input"


def kind_table(study: Study, model: str) -> Table:
    """A row per kind of layer: the mean cosine of its gradients in the recipes and the plain formats."""
    results = study.probes[model]
    arms = [arm for arm in probed(results) if arm in (*MAIN, *PLAIN)]
    rows = [["gradient of", *map(label, arms)]]
    groups: dict[str, list[list[float]]] = {}
    for column, arm in enumerate(arms):
        for name, value in place_means(results, arm).items():
            where = "all weights" if name == "weights" else kind(name)
            groups.setdefault(where, [[] for _ in arms])[column].append(value)
    for name, columns in groups.items():
        rows.append([name, *(f"{statistics.fmean(values):.4f}" if values else "–" for values in columns)])
    return rows if arms else []
