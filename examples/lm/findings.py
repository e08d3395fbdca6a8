"""What the numbers of a study show and what they do not, in sentences that are made from them alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

from lm.arms import MAIN, PLAIN, label
from lm.claims import (
    BAR,
    SEEDS,
    TIMES,
    Errors,
    Study,
    final_loss,
    held_out_loss,
    mean_and_spread,
    percent,
    tenth_loss,
    verdict,
)
from lm.tables import ablated, effect, gradient_errors, paired

OPEN = "Unresolved at this scale"
SHARE = 0.9  # of the FLOPs of all GEMMs: what "every linear and expert GEMM in FP4" is taken to mean


def findings(study: Study, model: str) -> list[str]:
    """The sentences on one model."""
    probes = study.probes.get(model, {})
    measures: dict[str, Callable[[str], Errors]] = {
        "Training loss": lambda arm: study.errors(model, arm),
        "Held-out loss": lambda arm: study.errors(model, arm, held_out_loss),
        "Frozen probe": lambda arm: study.probe_errors(model, arm),
        "Frozen probe, batches as pairs": lambda arm: study.batch_errors(model, arm),
    }
    shares = {arm: study.share(model, arm) for arm in (*MAIN, *PLAIN)}
    groups = {"": MAIN[1:], ", without stabilisers": PLAIN}
    found = [
        _order(name + which, errors, shares, arms)
        for name, errors in measures.items()
        for which, arms in groups.items()
    ]
    found.append(_ingredients("Training loss, what stabilisers do to the gap", measures["Training loss"], percent))
    if probes:
        cosine = "Frozen probe, what stabilisers do to the cosine of"
        found += [
            _ingredients(f"{cosine} one batch's gradient", lambda arm: gradient_errors(probes, arm), _cosine),
            _ingredients(f"{cosine} the mean gradient", lambda arm: gradient_errors(probes, arm, mean=True), _cosine),
        ]
    found += [_trend(study, model), _seeds(study, model), _share(shares)]
    found += [_devices(study, model), _bounds(study, model)]
    return [sentence for sentence in found if sentence]


def _order(name: str, errors: Callable[[str], Errors], shares: Mapping[str, float | None], arms: Sequence[str]) -> str:
    """Which gaps are told apart, from each other and from the bar: of the seeds that all arms have, if any."""
    known = {arm: found for arm in arms if (found := errors(arm))}
    broken = [arm for arm, found in known.items() if not all(map(math.isfinite, found.values()))]
    known = {arm: found for arm, found in known.items() if arm not in broken}
    if not known:
        return f"{name}: diverged: {', '.join(map(label, broken))}." if broken else ""
    common = set.intersection(*map(set, known.values()))
    if common:
        known = {arm: {key: found[key] for key in sorted(common)} for arm, found in known.items()}
    order = sorted(known, key=lambda arm: statistics.fmean(known[arm].values()))
    most = max(shares.get(arm) or 0.0 for arm in order)
    gaps = []
    for arm in order:
        share = shares.get(arm)
        less = f" (with {share:.1%} of the FLOPs in FP4)" if share and share < most else ""
        gaps.append(f"{label(arm)} {percent(statistics.fmean(known[arm].values()))}{less}")
    sides = {"below": f"Below {BAR:.0%}", "above": f"Above {BAR:.0%}"}
    answers: dict[str, list[str]] = {word: [] for word in (*sides.values(), "Resolved", OPEN, "Diverged")}
    for arm in order:
        side = verdict([error - BAR for error in known[arm].values()])
        if side in sides:
            answers[sides[side]].append(label(arm))
    for low, high in combinations(order, 2):
        sure = verdict(paired(known[low], known[high])) == "below"
        answers["Resolved" if sure else OPEN].append(f"{label(low)} < {label(high)}")
    answers["Diverged"] = list(map(label, broken))
    parts = "".join(f" {word}: {', '.join(what)}." for word, what in answers.items() if what)
    few = min(len(found) for found in known.values())
    note = f" Fewer than {SEEDS} pairs carry no claim." if few < SEEDS else ""
    return f"{name}: mean gap to BF16 {', '.join(gaps)}.{parts}{note}"


def _ingredients(name: str, errors: Callable[[str], Errors], text: Callable[[float], str]) -> str:
    """Which stabilisers help or hurt, with the mean difference as `text` puts it, and how many cannot be told."""
    answers: dict[str, list[str]] = {}
    for format, ingredient, without, given in ablated(errors):
        pairs = paired(given, without)
        what = f"{label(format)}, {ingredient} ({text(mean_and_spread(pairs)[0])})"
        answers.setdefault(effect(pairs), []).append(what)
    parts = [f"{word} – {'; '.join(answers[word])}" for word in ("helps", "hurts") if word in answers]
    parts += [f"{word} – {len(answers[word])}" for word in ("no effect", "unresolved") if word in answers]
    return f"{name} (all in the table): {'. '.join(parts)}." if parts else ""


def _cosine(error: float) -> str:
    """A difference of 1 - cosine as one of the cosine."""
    return f"{round(-error, 4) + 0.0:+.4f}"


def _trend(study: Study, model: str) -> str:
    """Whether the gaps have settled."""
    parts = []
    for arm in (*MAIN[1:], *PLAIN):
        earlier, last = (study.errors(model, arm, partial(tenth_loss, last=last)) for last in (2, 1))
        if last and all(map(math.isfinite, (*earlier.values(), *last.values()))):
            text = " → ".join(percent(statistics.fmean(errors.values())) for errors in (earlier, last))
            parts.append(f"{label(arm)} {text}")
    return f"Gap in the last tenth of the steps but one and in the last: {', '.join(parts)}." if parts else ""


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


def _share(shares: Mapping[str, float | None]) -> str:
    """How much of the arithmetic is in FP4."""
    known = {arm: share for arm, share in shares.items() if share is not None}
    if not known:
        return ""
    each = ", ".join(f"{label(arm)} {share:.1%}" for arm, share in known.items())
    below = [label(arm) for arm, share in known.items() if share < SHARE]
    answer = f"below {SHARE:.0%}: {', '.join(below)}" if below else f"all at or above {SHARE:.0%}"
    return f"FP4's share of the FLOPs of all GEMMs, forward and backward, output head included: {each} ({answer})."


def _devices(study: Study, model: str) -> str:
    """Which gaps hold a difference between machines too."""
    mixed: dict[str, list[str]] = {}
    for arm, seed in study.mixed_pairs(model):
        mixed.setdefault(arm, []).append(str(seed))
    parts = "; ".join(f"{label(arm)} seed {', '.join(seeds)}" for arm, seeds in mixed.items())
    return (
        f"Made on another machine than the BF16 run of their pair, which their gaps hold too: {parts}." if parts else ""
    )


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
