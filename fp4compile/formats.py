"""The table of FP4 formats. A format is a row: data that codecs, passes and backends read and never branch on.

| format | block | element | scale levels | bits per value |
|---|---|---|---|---|
| `hif4`  | 64 | S1P2 | E6M2 per 64, one exponent bit per 8, one per 4 | 4.5 |
| `mxfp4` | 32 | E2M1 | E8M0 per 32 | 4.25 |
| `nvfp4` | 16 | E2M1 | E4M3 per 16, fp32 per tensor | 4.5 |

Sources: OCP Microscaling Formats v1.0 (MXFP4), the NVFP4 description in NVIDIA's cuBLAS documentation, and the
HiFloat4 paper with its authors' published kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import torch

from fp4compile.errors import FP4TypeError, FP4ValueError, unknown

Tie = Literal["even", "away"]

E4M3_MAX = 448.0
# Elements that share a correction under rounding "eden": those that one Hadamard transform has mixed (Quartet II).
EDEN_GROUP = 128


@dataclass(frozen=True)
class Element:
    """A signed 4-bit number: bit 3 is the sign, bits 2:0 index `magnitudes` (eight values, rising from 0)."""

    name: str
    magnitudes: tuple[float, ...]
    tie: Tie

    def __post_init__(self) -> None:
        m = self.magnitudes
        if len(m) != 8 or m[0] != 0.0 or any(a >= b for a, b in pairwise(m)):
            raise FP4ValueError(f"element {self.name!r} needs eight magnitudes rising from 0, got {m}")
        if self.tie not in ("even", "away"):
            raise unknown("tie rule", self.tie, ("even", "away"))

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return self.magnitudes[-1]

    @property
    def values(self) -> tuple[float, ...]:
        """The sixteen values in the order of their codes; code 8 is -0."""
        return self.magnitudes + tuple(-m for m in self.magnitudes)


@dataclass(frozen=True)
class ScaleLevel:
    """One level of scaling: `dtype` names its encoding, `block` how many elements share it (None: the tensor)."""

    dtype: Literal["e6m2", "e8m0", "e4m3", "u1", "fp32"]
    block: int | None

    @property
    def size(self) -> int:
        """`block` of a level below the tensor's."""
        assert self.block is not None
        return self.block


@dataclass(frozen=True)
class ScaleRule:
    """How the values of a block decide its scale. The codec of the scale's dtype reads the columns that concern it.

    Attributes:
        truncation_free: whether no value exceeds the element's largest: what unbiased stochastic rounding needs.
        peaks: what the largest magnitude of a block becomes, as multiples of the element's largest one. Of several,
            each block takes the one with the least sum of squared errors, rounded to nearest.
        most: the largest block scale that the scale of a whole tensor leaves room for.
        upward: whether the scale is rounded up.
        shrink: factor on values that are scaled already, before they are rounded.
        gaussian: the block's scale follows from its root mean square and not from its maximum; zeros that fill up the
            last block count.
    """

    truncation_free: bool
    peaks: tuple[float, ...] = (1.0,)
    most: float = E4M3_MAX
    upward: bool = False
    shrink: float = 1.0
    gaussian: bool = False


# dtype of the first scale level -> its rules by name.
SCALE_RULES: Mapping[str, Mapping[str, ScaleRule]] = MappingProxyType(
    {
        "e6m2": MappingProxyType({"authors": ScaleRule(False), "truncation-free": ScaleRule(True)}),
        "e8m0": MappingProxyType(
            {
                # OCP Microscaling Formats v1.0; `codec.e8m0_up_from` tells the four apart.
                "floor": ScaleRule(False),
                "ceil": ScaleRule(True),
                "even": ScaleRule(False),
                "rceil": ScaleRule(True),
                # Tseng et al., "Training LLMs with MXFP4", arXiv:2502.20586: `floor` leaves magnitudes below 8, 3/4 of
                # which fit; 4/3 is left for the accumulator.
                "floor-3/4": ScaleRule(True, shrink=0.75),
                # Castro et al., "Quartet", arXiv:2505.14669: least squared error on a normal distribution (QuEST).
                "gaussian": ScaleRule(False, gaussian=True),
            }
        ),
        "e4m3": MappingProxyType(
            {
                "nearest": ScaleRule(False),
                "truncation-free": ScaleRule(True, upward=True),
                # Cook et al., "Four Over Six", arXiv:2512.02010: 6 or 4; a block scale for 4 is 1.5 times as large.
                "4over6": ScaleRule(False, peaks=(1.0, 4 / 6), most=256.0),
                # Chen et al., "TetraJet-v2", arXiv:2510.27527: a scale is rounded down to 16/17 of itself at worst.
                "17/16": ScaleRule(True, peaks=(16 / 17,)),
                # Panferov et al., "Quartet II", arXiv:2601.22813: least error; room for corrections of the scales.
                "eden": ScaleRule(False, peaks=(16 / 17 / 0.93,), most=255.99),
            }
        ),
    }
)


@dataclass(frozen=True)
class Format:
    """A 4-bit block format.

    Attributes:
        name: the name users write.
        element: the 4-bit element.
        levels: scale levels, the one that names the stored block scale first.
        scale_dtype: dtype of one stored scale (`Quantized.scales`).
        scale_rules: allowed `scale_rule` names, the default first. `truncation-free` is always among them.
        aliases: names of scale rules that stand for another one.
        block_2d: edge of a square weight block, or None where the format has none.
        doc: one line for `fp4compile formats`.
        roundings: allowed `rounding` names, the default first.
    """

    name: str
    element: Element
    levels: tuple[ScaleLevel, ...]
    scale_dtype: torch.dtype
    scale_rules: tuple[str, ...]
    aliases: Mapping[str, str]
    block_2d: int | None
    doc: str
    roundings: tuple[str, ...] = ("nearest", "stochastic")

    @property
    def block(self) -> int:
        """Elements that share one stored scale along the contraction axis."""
        return self.levels[0].size

    @property
    def has_tensor_scale(self) -> bool:
        """Whether the format has one fp32 scale per tensor on top of its block scales."""
        return any(level.block is None for level in self.levels)

    @property
    def bits_per_value(self) -> float:
        """Stored bits per value, the per-tensor scale not counted."""
        return 4 + 8 * self.scale_dtype.itemsize / self.block

    def packed_bytes(self, rows: int, size: int) -> int:
        """Bytes of the codes and block scales of `rows` rows of `size` values, each padded to whole blocks."""
        blocks = rows * -(-size // self.block)
        return int(blocks * self.block * self.bits_per_value / 8)

    def rule(self, scale_rule: str | None) -> str:
        """The scale rule that `scale_rule` (None: the default) stands for; raises for an unknown one."""
        if scale_rule is None:
            return self.scale_rules[0]
        if scale_rule not in self.scale_rules:
            raise self._lacks("scale rule", scale_rule, lambda fmt: fmt.scale_rules)
        return self.aliases.get(scale_rule, scale_rule)

    def scaling(self, scale_rule: str | None) -> ScaleRule:
        """The row of the rule that `scale_rule` stands for."""
        return SCALE_RULES[self.levels[0].dtype][self.rule(scale_rule)]

    def check_rounding(self, rounding: str) -> None:
        """Raise unless the format has the rounding."""
        if rounding not in self.roundings:
            raise self._lacks("rounding", rounding, lambda fmt: fmt.roundings)

    def _lacks(self, what: str, name: str, names: Callable[[Format], tuple[str, ...]]) -> FP4ValueError:
        error = unknown(f"{what} of format {self.name}:", name, names(self))
        having = [fmt.name for fmt in FORMATS.values() if name in names(fmt)]
        return FP4ValueError(f"{error} ({name!r} is a {what} of {', '.join(having)})") if having else error

    def is_truncation_free(self, scale_rule: str | None) -> bool:
        """Whether no value of a block can exceed the grid under `scale_rule`: what unbiased SR needs."""
        return self.scaling(scale_rule).truncation_free

    def is_scaled_per_tensor(self, scale_rule: str | None) -> bool:
        """Whether a number for the whole tensor multiplies what codes and block scales say, under `scale_rule`."""
        return self.has_tensor_scale or self.scaling(scale_rule).shrink != 1.0

    def is_scaled_by_amax(self, scale_rule: str | None) -> bool:
        """Whether that number follows from the largest value of the tensor, under `scale_rule`."""
        return self.has_tensor_scale and self.scaling(scale_rule).shrink == 1.0


E2M1 = Element("E2M1", (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), tie="even")
S1P2 = Element("S1P2", (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75), tie="away")

_BUILTIN = (
    Format(
        name="hif4",
        element=S1P2,
        levels=(ScaleLevel("e6m2", 64), ScaleLevel("u1", 8), ScaleLevel("u1", 4)),
        scale_dtype=torch.int32,
        scale_rules=("authors", "truncation-free"),
        aliases=MappingProxyType({}),
        block_2d=None,
        doc="HiFloat4: three scale levels over 64 values",
    ),
    Format(
        name="mxfp4",
        element=E2M1,
        levels=(ScaleLevel("e8m0", 32),),
        scale_dtype=torch.uint8,
        scale_rules=("floor", "ceil", "even", "rceil", "truncation-free", "floor-3/4", "gaussian"),
        aliases=MappingProxyType({"truncation-free": "rceil"}),
        block_2d=32,
        doc="OCP MXFP4: a power-of-two scale per 32 values",
    ),
    Format(
        name="nvfp4",
        element=E2M1,
        levels=(ScaleLevel("e4m3", 16), ScaleLevel("fp32", None)),
        scale_dtype=torch.uint8,
        scale_rules=("nearest", "truncation-free", "4over6", "17/16", "eden"),
        aliases=MappingProxyType({}),
        block_2d=16,
        doc="NVFP4: an E4M3 scale per 16 values and an fp32 scale per tensor",
        roundings=("nearest", "stochastic", "eden"),
    ),
)


class FormatTable(Mapping[str, Format]):
    """The registered formats by name; an unknown name raises an error that lists the known ones."""

    def __init__(self, formats: tuple[Format, ...]) -> None:
        self._rows = {f.name: f for f in formats}

    def __getitem__(self, name: str) -> Format:
        try:
            return self._rows[name]
        except (KeyError, TypeError):
            raise unknown("format", name, self._rows) from None

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, fmt: Format) -> None:
        """Add a row; a name that is taken by a different row is an error."""
        if self._rows.setdefault(fmt.name, fmt) != fmt:
            raise FP4ValueError(f"a different format named {fmt.name!r} is registered already")


FORMATS = FormatTable(_BUILTIN)


def register_format(fmt: Format) -> Format:
    """Add a format to `FORMATS`. Its first scale level must be `e6m2`, `e8m0` or `e4m3`.

    Returns:
        The format, so that the call can stand in an assignment.

    Raises:
        FP4ValueError: the name is taken, the block is odd, or no scale codec reads the first level or a rule.
        FP4TypeError: not a `Format`.
    """
    if not isinstance(fmt, Format):
        raise FP4TypeError(f"register_format needs a Format, got {type(fmt).__name__}")
    first = fmt.levels[0] if fmt.levels else None
    if first is None or first.dtype not in SCALE_RULES or first.block is None or first.block % 2:
        raise FP4ValueError(
            f"format {fmt.name!r}: the first scale level must be e6m2, e8m0 or e4m3 over an even block, got {first}"
        )
    if "truncation-free" not in fmt.scale_rules:
        raise FP4ValueError(f"format {fmt.name!r}: scale_rules must name 'truncation-free'")
    for rule in map(fmt.rule, fmt.scale_rules):
        if rule not in SCALE_RULES[first.dtype]:
            raise unknown(f"scale rule for {first.dtype} scales (format {fmt.name!r}):", rule, SCALE_RULES[first.dtype])
    if "eden" in fmt.roundings and (first.dtype != "e4m3" or EDEN_GROUP % first.block):
        raise FP4ValueError(
            f"format {fmt.name!r}: rounding 'eden' needs E4M3 scales, whole blocks in {EDEN_GROUP} values"
        )
    FORMATS.add(fmt)
    return fmt
