"""What the numbers of a study show and what they do not, in sentences that are made from them alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import combinations

from lm.arms import MAIN, label
from lm.claims import SEEDS, TIMES, Errors, Study, final_loss, held_out_loss, mean_and_spread, percent, verdict
from lm.tables import ablated, effect, gradient_errors, paired

SHARE = 0.9  # of the FLOPs of all GEMMs: what "every linear and expert GEMM in FP4" is taken to mean


def findings(study: Study, model: str) -> list[str]:
    """The sentences on one model."""
    probes = study.probes.get(model, {})
    measures: dict[str, Callable[[str], Errors]] = {
        "Training loss": lambda arm: study.errors(model, arm),
        "Held-out loss": lambda arm: study.errors(model, arm, held_out_loss),
        "Frozen probe": lambda arm: study.probe_errors(model, arm),
    }
    found = [_order(name, errors) for name, errors in measures.items()]
    found += [_ingredients("Training", measures["Training loss"])]
    if probes:
        found += [
            _ingredients("Frozen probe, cosine of one batch's gradient", lambda arm: gradient_errors(probes, arm)),
            _ingredients(
                "Frozen probe, cosine of the mean gradient", lambda arm: gradient_errors(probes, arm, mean=True)
            ),
        ]
    return [
        sentence for sentence in (*found, _seeds(study, model), _share(study, model), _bounds(study, model)) if sentence
    ]


def _order(name: str, errors: Callable[[str], Errors]) -> str:
    """Which recipes' gaps are told apart."""
    known = {arm: errors(arm) for arm in MAIN[1:]}
    known = {arm: found for arm, found in known.items() if found}
    broken = [arm for arm, found in known.items() if not all(map(math.isfinite, found.values()))]
    known = {arm: found for arm, found in known.items() if arm not in broken}
    if not known and not broken:
        return ""
    order = sorted(known, key=lambda arm: statistics.fmean(known[arm].values()))
    gaps = ", ".join(f"{label(arm)} {percent(statistics.fmean(known[arm].values()))}" for arm in order)
    text = f"{name}: mean gap to BF16 {gaps}."
    told, open_ = [], []
    for low, high in combinations(order, 2):
        pairs = paired(known[low], known[high])
        sure = verdict(pairs) == "below"
        (told if sure else open_).append(f"{label(low)} < {label(high)}")
    if told:
        text += f" Resolved: {', '.join(told)}."
    if open_:
        text += f" Unresolved at this scale: {', '.join(open_)}."
    return text + (f" Diverged: {', '.join(map(label, broken))}." if broken else "")


def _ingredients(name: str, errors: Callable[[str], Errors]) -> str:
    """Which stabilisers help, hurt, or cannot be told."""
    answers: dict[str, list[str]] = {}
    for format, ingredient, without, given in ablated(errors):
        answers.setdefault(effect(paired(given, without)), []).append(f"{label(format)}: {ingredient}")
    parts = [f"{word} – {'; '.join(what)}" for word, what in sorted(answers.items())]
    return f"{name}, ingredients: {'. '.join(parts)}." if parts else ""


def _seeds(study: Study, model: str) -> str:
    """How far BF16 runs of other seeds lie apart, and what pairs can tell."""
    base = study.runs.get((model, "bf16"), {})
    losses = [final_loss(run) for run in base.values()]
    spreads = [mean_and_spread(study.errors(model, arm).values())[1] for arm in study.arms(model) if arm != "bf16"]
    spreads = [spread for spread in spreads if math.isfinite(spread)]
    if len(losses) < 2 or not spreads:
        return ""
    apart = (max(losses) - min(losses)) / min(losses)
    return (
        f"Noise: BF16's final losses of {len(losses)} seeds lie {percent(apart, sign=False)} apart, the gaps of an arm "
        f"spread by {percent(min(spreads), sign=False)} to {percent(max(spreads), sign=False)} over the seeds. With "
        f"{SEEDS} seeds, differences below about {percent(TIMES * statistics.median(spreads), sign=False)} stay open."
    )


def _share(study: Study, model: str) -> str:
    """How much of the arithmetic is in FP4."""
    shares = {
        arm: next(iter(study.runs[model, arm].values()))["report"]["fp4_share"]
        for arm in MAIN[1:]
        if study.runs.get((model, arm))
    }
    if not shares:
        return ""
    each = ", ".join(f"{label(arm)} {share:.1%}" for arm, share in shares.items())
    below = [label(arm) for arm, share in shares.items() if share < SHARE]
    answer = f"below {SHARE:.0%}: {', '.join(below)}" if below else f"all at or above {SHARE:.0%}"
    return f"FP4's share of the FLOPs of all GEMMs, forward and backward, output head included: {each} ({answer})."


def _bounds(study: Study, model: str) -> str:
    """What was not measured."""
    runs = [run for (found, _), seeds in study.runs.items() if found == model for run in seeds.values()]
    if not runs:
        return "Nothing was trained in FP4 here: the probe says what one step costs, not what many add up to."
    settings = runs[0]["settings"]
    branch = settings["branch"]
    per_step = settings["batch"] * settings["shape"]["sequence"]
    seen = settings["steps"] * per_step
    text = (
        f"Not shown: anything beyond {runs[0]['parameters'] / 1e6:.1f} M parameters and {seen / 1e6:.1f} M tokens; "
        "how a gap grows or closes with either; and other text than this."
    )
    if branch:
        text += (
            f" Every arm begins with {branch:.0%} of the steps in BF16 and sees FP4 for the last "
            f"{(1 - branch) * seen / 1e6:.1f} M tokens: stability in the first steps is not tested either."
        )
    return text
