"""What the numbers of a study show and what they do not: a table of orders, and sentences, from them alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

from lm.arms import MAIN, PLAIN, label
from lm.claims import BAR, SEEDS, TIMES, mean_and_spread, percent, verdict
from lm.results import Errors, Study, final_loss, held_out_loss, tenth_loss
from lm.tables import Table, paired, whole

SHARE = 0.9  # of the FLOPs of all GEMMs: what "every linear and expert GEMM in FP4" is taken to mean


def findings(study: Study, model: str) -> list[str]:
    """The sentences on one model."""
    shares = {arm: study.share(model, arm) for arm in (*MAIN, *PLAIN)}
    found = [_trend(study, model), _seeds(study, model), _share(shares), _devices(study, model), _bounds(study, model)]
    return [sentence for sentence in found if sentence]


def order_table(study: Study, model: str) -> Table:
    """A row per measurement, of the recipes and of the plain formats: which gaps are told apart, and from the bar."""
    measures: dict[str, Callable[[str], Errors]] = {
        "training loss": lambda arm: study.errors(model, arm),
        "held-out loss": lambda arm: study.errors(model, arm, held_out_loss),
        "frozen probe": lambda arm: study.probe_errors(model, arm),
        "frozen probe, batches as pairs": lambda arm: study.batch_errors(model, arm),
    }
    shares = {arm: study.share(model, arm) for arm in (*MAIN, *PLAIN)}
    head = ["measured by", "arms", "mean gap to BF16", f"against {BAR:.0%}", "resolved", "unresolved at this scale"]
    rows = [head]
    for which, arms in {"recipes": MAIN[1:], "plain formats": PLAIN}.items():
        rows += [[name, which, *cells] for name, errors in measures.items() if (cells := _order(errors, shares, arms))]
    return rows


def _order(errors: Callable[[str], Errors], shares: Mapping[str, float | None], arms: Sequence[str]) -> list[str]:
    """Gaps, side of the bar, pairs of formats that are resolved and that are not: of the seeds that all arms have."""
    known = {arm: found for arm in arms if (found := errors(arm))}
    broken = [arm for arm, found in known.items() if not all(map(math.isfinite, found.values()))]
    known = {arm: found for arm, found in known.items() if arm not in broken}
    common = set.intersection(*map(set, known.values())) if known else set()
    if common:
        known = {arm: {key: found[key] for key in sorted(common)} for arm, found in known.items()}
    order = sorted(known, key=lambda arm: statistics.fmean(known[arm].values()))
    most = max((shares.get(arm) or 0.0 for arm in order), default=0.0)
    format = {arm: label(arm.removesuffix("-plain")) for arm in arms}
    gaps, sides = [], []
    for arm in order:
        share = shares.get(arm)
        less = f" ({share:.1%} of the FLOPs in FP4)" if share and share < most else ""
        gaps.append(f"{format[arm]} {percent(statistics.fmean(known[arm].values()))}{less}")
        side = verdict([error - BAR for error in known[arm].values()])
        sides += [f"{format[arm]} {side}"] if side != "unresolved" else []
    gaps += [f"{format[arm]} diverged" for arm in broken]
    pairs: dict[bool, list[str]] = {True: [], False: []}
    for low, high in combinations(order, 2):
        pairs[verdict(paired(known[low], known[high])) == "below"].append(f"{format[low]} < {format[high]}")
    few = known and min(len(found) for found in known.values()) < SEEDS
    resolved = [f"fewer than {SEEDS} pairs carry no claim"] if few else pairs[True]
    return [", ".join(cell) or "–" for cell in (gaps, sides, resolved, pairs[False])] if gaps else []


def _trend(study: Study, model: str) -> str:
    """Which gaps have not settled, by the rule."""
    changes: dict[str, list[str]] = {"above": [], "below": []}
    for arm in (*MAIN[1:], *PLAIN):
        earlier, last = (study.errors(model, arm, partial(tenth_loss, last=number)) for number in (2, 1))
        changes.setdefault(verdict(paired(last, earlier)), []).append(label(arm))
    parts = {"still growing": changes["above"], "still shrinking": changes["below"]}
    said = "; ".join(f"{word}: {', '.join(arms)}" for word, arms in parts.items() if arms)
    return f"Gaps in the last tenth of the steps against the tenth before, by the same rule: {said}." if said else ""


def _seeds(study: Study, model: str) -> str:
    """How far BF16 runs of other seeds lie apart, and what pairs can tell."""
    base = study.runs.get((model, "bf16"), {})
    losses = [final_loss(run) for run in base.values()]
    spreads = [
        mean_and_spread(study.errors(model, arm).values())[1] for arm in whole(study.arms(model)) if arm != "bf16"
    ]
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
