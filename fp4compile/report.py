"""The ledger that travels with a compiled graph: what each GEMM became, on which kernel, and why not."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["fp4", "kept", "refused"]


@dataclass(frozen=True)
class SiteRecord:
    """What became of one GEMM.

    Attributes:
        path: module path, "" for the root module.
        role: "forward", "dgrad" or "wgrad".
        kind: "linear", or "grouped": a weight per expert.
        status: "fp4", "kept" (the recipe keeps it) or "refused" (asked for and not possible: see `reason`).
        formats: format of each operand (`input`, `weight`, `grad`), None for one in high precision.
        kernel: what runs it.
        reason: why it was kept or refused; empty for "fp4".
        parameter: name of the weight.
        flops: 2 M N K; symbolic sizes count with the values they were traced with. 0 where unknown.
    """

    path: str
    role: str
    kind: str
    status: Status
    formats: dict[str, str | None]
    kernel: str = ""
    reason: str = ""
    parameter: str = ""
    flops: int = 0


@dataclass
class Report:
    """Every GEMM of a compiled model.

    Attributes:
        recipe, backend, device: what was asked for.
        sites: one record per GEMM and role.
        notes: things a user should know that belong to no single GEMM (graph breaks, capped depths, ...).
        graphs: number of graphs that were compiled.
        pass_seconds: time spent in each pass, summed over graphs.
        weights: parameter of each FP4 forward GEMM -> its bytes as the GEMM would read it, and packed.
        cached: parameter whose quantised forms are kept between calls -> bytes of each of them.
    """

    recipe: str
    backend: str
    device: str
    sites: list[SiteRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    graphs: int = 0
    pass_seconds: dict[str, float] = field(default_factory=dict)
    weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    cached: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, status: Status) -> int:
        """Number of GEMMs with that status."""
        return sum(site.status == status for site in self.sites)

    @property
    def weight_bytes(self) -> tuple[int, int]:
        """Bytes of the weights of FP4 forward GEMMs, in the GEMM's dtype and packed; each weight counts once."""
        return sum(w[0] for w in self.weights.values()), sum(w[1] for w in self.weights.values())

    @property
    def fp4_share(self) -> float:
        """Share of the FLOPs of all linear and expert GEMMs, output heads included, that read FP4 operands."""
        total = sum(site.flops for site in self.sites)
        return sum(site.flops for site in self.sites if site.status == "fp4") / total if total else 0.0

    def within(self, prefix: str) -> Report:
        """The report of a graph that starts at the module with that path, with paths as the whole model knows them."""
        if not prefix:
            return self
        return replace(
            self,
            sites=[
                replace(s, path=f"{prefix}.{s.path}" if s.path else prefix, parameter=f"{prefix}.{s.parameter}")
                for s in self.sites
            ],
            weights={f"{prefix}.{name}": size for name, size in self.weights.items()},
            cached={f"{prefix}.{name}": sizes for name, sizes in self.cached.items()},
        )

    def merge(self, other: Report) -> None:
        """Take in the report of another graph of the same model; its records replace those of the same GEMM."""
        keys = {(s.path, s.role, s.parameter) for s in other.sites}
        self.sites = [s for s in self.sites if (s.path, s.role, s.parameter) not in keys] + other.sites
        self.notes += [note for note in other.notes if note not in self.notes]
        self.graphs += other.graphs
        self.pass_seconds = dict(Counter(self.pass_seconds) + Counter(other.pass_seconds))
        self.weights |= other.weights
        for parameter, sizes in other.cached.items():
            self.cached[parameter] = self.cached.get(parameter, {}) | sizes

    def cache_notes(self) -> list[str]:
        """How many weights are cached, and what that takes."""
        if not self.cached:
            return []
        size = _bytes(sum(sum(sizes.values()) for sizes in self.cached.values()))
        return [f"{len(self.cached)} weights are quantised when they change; their forms take {size}"]

    def to_json(self) -> str:
        """The whole report as a JSON object."""
        data = asdict(self)
        data |= {"fp4_share": self.fp4_share, "weight_bytes": self.weight_bytes}
        return json.dumps(data, indent=2)

    def to_text(self, width: int = 140) -> str:
        """A table of the GEMMs, the notes and a summary line."""
        console = Console(width=width, record=True, file=io.StringIO(), emoji=False)
        console.print(self.table())
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        console.print(self.summary(), markup=False)
        return console.export_text()

    def __str__(self) -> str:
        """What `print` shows: `to_text`."""
        return self.to_text().rstrip()

    def summary(self) -> str:
        """One line: counts, FLOP share, weight bytes."""
        before, after = self.weight_bytes
        packed = f"; weights of FP4 GEMMs {_bytes(before)}, {_bytes(after)} packed" if before else ""
        return (
            f"{self.count('fp4')} GEMMs in FP4, {self.count('kept')} kept, {self.count('refused')} refused; "
            f"{self.fp4_share:.1%} of the linear GEMM FLOPs in FP4{packed}; "
            f"recipe {self.recipe}, backend {self.backend} on {self.device}, {self.graphs} graph(s)"
        )

    def table(self) -> Table:
        """A rich table, one row per GEMM."""
        table = Table(title=escape(f"fp4compile: {self.recipe}"), title_justify="left")
        for column in ("module", "role", "kind", "status", "operands", "kernel", "reason"):
            table.add_column(column, overflow="fold")
        colours = {"fp4": "green", "kept": "", "refused": "red"}
        for s in self.sites:
            operands = " ".join(f"{name}:{fmt or '-'}" for name, fmt in s.formats.items())
            colour = colours[s.status]
            status = f"[{colour}]{s.status}[/]" if colour else s.status
            path, kernel, reason = map(escape, (s.path or s.parameter or "(root)", s.kernel, s.reason))
            table.add_row(path, s.role, s.kind, status, operands, kernel, reason)
        return table


def _bytes(count: int) -> str:
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def merged(reports: Iterable[Report]) -> Report | None:
    """One report of several graphs, or None."""
    result: Report | None = None
    for report in reports:
        if result is None:
            result = Report(report.recipe, report.backend, report.device)
        result.merge(report)
    return result
