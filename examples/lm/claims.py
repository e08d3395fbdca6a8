"""What may be claimed of relative loss errors: their spread over the seeds, the rule, and the statements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lm.arms import label
from lm.results import Errors

SEEDS = 4  # fewer carry no claim
TIMES = 3.0  # spreads that a difference must exceed
BAR = 0.01  # the relative loss error that HiF4 is to stay below


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values, or one is NaN."""
    numbers = list(values)
    if not numbers or not all(map(math.isfinite, numbers)):
        return math.nan, math.nan
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def verdict(differences: Sequence[float]) -> str:
    """ "below" or "above" zero, or "unresolved".

    An order needs `SEEDS` seeds and a mean that exceeds `TIMES` times the seed-to-seed spread of the paired difference.
    """
    mean, deviation = mean_and_spread(differences)
    if len(differences) < SEEDS or not abs(mean) > TIMES * deviation:
        return "unresolved"
    return "below" if mean < 0 else "above"


@dataclass(frozen=True)
class Claim:
    """A statement and what the data say of it.

    Attributes:
        measure: what the differences were measured by.
        text: what is claimed: that the differences are below zero.
        differences: one for each pair.
        unit: what the pairs are of.
    """

    measure: str
    text: str
    differences: tuple[float, ...]
    unit: str = "seeds"

    @property
    def pairs(self) -> str:
        """How many pairs there are of what."""
        return f"{len(self.differences)} {self.unit}"

    @property
    def word(self) -> str:
        """The verdict in words."""
        if not all(map(math.isfinite, self.differences)):
            return "no: an arm diverged"
        words = {"below": "**yes**", "above": "**no, the data say the opposite**"}
        return words.get(verdict(self.differences), "unresolved at this scale")

    @property
    def answer(self) -> str:
        """The verdict with its numbers."""
        if not all(map(math.isfinite, self.differences)):
            return self.word
        mean, deviation = mean_and_spread(self.differences)
        numbers = f"paired difference {percent(mean)} ± {percent(deviation, sign=False)}, {self.pairs}"
        return f"{self.word} ({numbers})"


def claims(
    measure: str,
    errors: Mapping[str, Errors],
    shares: Mapping[str, float | None] | None = None,
    unit: str = "seeds",
) -> list[Claim]:
    """The study's statements on HiF4, with and without stabilisers; only those that there are pairs for.

    Args:
        measure: what `errors` were measured by.
        errors: arm -> errors.
        shares: arm -> share of the FLOPs in FP4; said where two arms do not have the same.
        unit: what the keys of errors are.
    """
    found = []
    for suffix in ("", "-plain"):
        name = f"hif4{suffix}"
        ours = errors.get(name, {})
        below = tuple(error - BAR for error in ours.values())
        found.append(Claim(measure, f"{label(name)}'s gap is below {BAR:.0%}", below, unit))
        for other in (f"mxfp4{suffix}", f"nvfp4{suffix}"):
            theirs = errors.get(other, {})
            pairs = tuple(ours[key] - theirs[key] for key in sorted(ours.keys() & theirs.keys()))
            text = f"{label(name)}'s gap is below {label(other)}'s" + _unequal(shares or {}, name, other)
            found.append(Claim(measure, text, pairs, unit))
    return [claim for claim in found if claim.differences]


def _unequal(shares: Mapping[str, float | None], ours: str, theirs: str) -> str:
    """What two arms do in FP4, where it is not the same."""
    one, other = shares.get(ours), shares.get(theirs)
    return "" if one is None or other is None or one == other else f" ({one:.1%} and {other:.1%} of the FLOPs in FP4)"


def percent(value: float, sign: bool = True) -> str:
    """A share as text; a dash where there is none."""
    rounded = round(100 * value, 2) + 0.0 if math.isfinite(value) else math.nan  # no minus before a zero
    return f"{rounded:{'+' if sign and rounded else ''}.2f}%" if math.isfinite(rounded) else "–"
