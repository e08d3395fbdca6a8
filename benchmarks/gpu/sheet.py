"""The results of a section: rows with a ratio and its bar, printed as a table and written as CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fp4compile.files import write_atomically

_VERDICTS = {None: "", True: "[green]holds[/]", False: "[red]MISSED[/]"}
_RESULT = ("value", "unit", "spread", "ratio", "bar", "holds", "error")


@dataclass(frozen=True)
class Bar:
    """The least ("≥") or the largest ("≤") ratio that is good enough."""

    sense: str
    limit: float

    def holds(self, ratio: float) -> bool:
        """Whether a ratio reaches the bar."""
        return ratio >= self.limit if self.sense == "≥" else ratio <= self.limit

    def __str__(self) -> str:
        return f"{self.sense} {self.limit:.3g}"


@dataclass(frozen=True)
class Row:
    """A measured case.

    Attributes:
        case: its name.
        value: the median, in `unit`; None where it could not be measured.
        spread: distance of the quartiles over the median.
        ratio: what the section's `ratio` says.
        bar: what the ratio is held against.
        details: more columns of the same section.
        error: why it could not be measured.
        is_peer: whether it is another project's, whose failure is not ours.
    """

    case: str
    value: float | None = None
    unit: str = "ms"
    spread: float | None = None
    ratio: float | None = None
    bar: Bar | None = None
    details: Mapping[str, float | int | str] = field(default_factory=dict)
    error: str = ""
    is_peer: bool = False

    @property
    def holds(self) -> bool | None:
        """Whether the bar holds; None without one, or without a ratio."""
        return None if self.bar is None or self.ratio is None else self.bar.holds(self.ratio)


@dataclass
class Sheet:
    """The results of a section.

    Attributes:
        section: the name that its file begins with.
        title: what was measured.
        ratio: what the ratios are to.
        rows: the cases.
        notes: lines below the table.
    """

    section: str
    title: str
    ratio: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a case of ours could not be measured."""
        return any(row.error and not row.is_peer for row in self.rows)


def versions() -> dict[str, str]:
    """Device, torch and Triton: what a result depends on besides this package."""
    import triton

    device = torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__}


def absent(package: str) -> str | None:
    """What a note says of a peer's package that is not installed, else None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed: not measured"


def middle(times: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance of the quartiles over it."""
    median = statistics.median(times)
    if len(times) < 2:
        return median, 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return median, (high - low) / median


def reason(error: Exception) -> str:
    """An exception as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _detail_names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.details))


def _short(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    value = "" if row.value is None else f"{row.value:.4g} {row.unit}"
    spread = "" if row.spread is None else f"{row.spread:.1%}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    bar = "" if row.bar is None else str(row.bar)
    verdict = "[red]not measured[/]" if row.error else _VERDICTS[row.holds]
    return [row.case, value, spread, ratio, bar, verdict, *(_short(row.details.get(name, "")) for name in names)]


def show(sheet: Sheet, of: Mapping[str, str], console: Console) -> None:
    """Print the table, then what could not be measured and the notes."""
    names = _detail_names(sheet.rows)
    about = f"{of['device']}, torch {of['torch']}, Triton {of['triton']}"
    table = Table(title=f"{sheet.title}\n{about}", caption=f"ratio: {sheet.ratio}; spread: quartiles over the median")
    for column in ("case", "median", "spread", "ratio", "bar", "", *names):
        table.add_column(column, justify="left" if column in ("case", "") else "right")
    for row in sheet.rows:
        table.add_row(*_cells(row, names))
    console.print(table)
    for line in [*(f"{row.case}: {row.error}" for row in sheet.rows if row.error), *sheet.notes]:
        console.print(line, markup=False)


def path_of(sheet: Sheet, of: Mapping[str, str], folder: Path) -> Path:
    """`<section>-<device>.csv`."""
    device = re.sub(r"\W+", "-", of["device"].lower()).strip("-")
    return folder / f"{sheet.section}-{device}.csv"


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows, under a temporary name first; missing values are left empty."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, file.getvalue().encode())


def _rounded(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def write(sheet: Sheet, of: Mapping[str, str], folder: Path) -> Path:
    """Write the rows with the versions beside each, and return the file's path."""
    path = path_of(sheet, of, folder)
    rows = [{"case": row.case, **{name: getattr(row, name) for name in _RESULT}, **row.details} for row in sheet.rows]
    rows = [{**of, **{name: _rounded(value) for name, value in row.items()}} for row in rows]
    write_csv(path, [*of, "case", *_RESULT, *_detail_names(sheet.rows)], rows)
    return path
