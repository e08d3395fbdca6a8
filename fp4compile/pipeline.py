"""Passes, the pipeline that orders and drives them, and the context that travels along."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fp4compile.backend import Backend
from fp4compile.errors import FP4TypeError, FP4ValueError, RewriteError, unknown
from fp4compile.graph import Site, verify
from fp4compile.ops import BY_OVERLOAD
from fp4compile.recipe import Recipe, Role, Rule
from fp4compile.report import Report, SiteRecord
from fp4compile.rewrite import arguments, value
from fp4compile.weight_cache import Program, WeightCache

GROUP = "fp4compile.pipelines"


@dataclass
class Context:
    """Everything a pass may read or write besides the graph. One per graph.

    Attributes:
        recipe, backend, device, strict: what the user asked for.
        parameters: inputs of the graph that are parameters, with their names.
        buffers: inputs of the graph that are buffers of modules.
        embeddings: names of parameters that an embedding reads: GEMMs with them are output heads.
        routers: names of parameters that choose experts: GEMMs with them give router logits.
        depths: number of blocks of each repeated block list, by its path ("model.layers" -> 32).
        places: paths in the compiled module of the modules that the graph may serve, where it is a part of it.
        inner: whether the compiled module is a block of a larger model, so that paths do not start at the model.
        sites: GEMMs, from `find_sites` on.
        facts: what holds of the graph now.
        notes: for the report.
        seconds: time spent in each pass, by its name.
        weight_cache: where quantised weights are kept between calls; None where nobody asked for it.
        programs: what makes them.
    """

    recipe: Recipe
    backend: Backend
    device: str = "cpu"
    strict: bool = True
    parameters: dict[Node, str] = field(default_factory=dict)
    buffers: set[Node] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    routers: set[str] = field(default_factory=set)
    depths: dict[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = ("",)
    inner: bool = False
    sites: list[Site] = field(default_factory=list)
    facts: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    weight_cache: WeightCache | None = None
    programs: list[Program] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What comes before paths in the whole model: where the graph starts, a `*` for what differs between places."""
        parts = [place.split(".") for place in self.places]
        if len({len(part) for part in parts}) > 1:
            return "*"
        return ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))

    def glob(self, site: Site) -> str:
        """The entry of `keep` that stands for a site: its path in the whole model, of one in the root its parameter."""
        name = site.path or site.parameter
        return f"{self.prefix}.{name}" if self.prefix else name

    def rule_for(self, site: Site, role: Role) -> Rule | None:
        """The rule that decides for the GEMM of a site's layer in a role, or None; of a `divided` site that of one."""
        path, _ = next(self._names(site))
        return self.recipe.rule_for(path, role)

    def kept_by(self, site: Site) -> str | None:
        """The entry of `keep` that matches a site, in all modules that the graph may serve, or None."""
        kept = self._kept(site)
        return kept[0] if all(kept) else None

    def divided(self, site: Site) -> str | None:
        """Why no decision holds for a site in all modules that the graph may serve, or None."""
        rules = {id(self.recipe.rule_for(path, site.role)) for path, _ in self._names(site)}
        if len(rules) == 1 and len(set(map(bool, self._kept(site)))) == 1:
            return None
        return (
            f"{len(self.places)} modules of one class, {self.places[0]!r} to {self.places[-1]!r}, share one graph, "
            "because the model breaks the graph between them, and the recipe treats them differently"
        )

    def _kept(self, site: Site) -> list[str | None]:
        """The entry of `keep` that matches a site, in each module that the graph may serve."""
        keeps, role = self.recipe.kept_by, site.role
        return [keeps(path, role) or keeps(parameter, role) for path, parameter in self._names(site)]

    def _names(self, site: Site) -> Iterator[tuple[str, str]]:
        """Path and parameter of a site, in each module that the graph may serve."""
        for place in self.places:
            prefix = f"{place}." if place else ""
            yield f"{prefix}{site.path}".removesuffix("."), f"{prefix}{site.parameter}"

    def refuse(self, site: Site, reason: str) -> None:
        """A GEMM that the recipe asked for cannot be done: an error when strict, else it stays as it is."""
        if self.strict:
            raise RewriteError(
                f"recipe {self.recipe.name!r}: the {site.where} cannot be FP4: {reason}. "
                f"Keep it (keep=[{self.glob(site)!r}]), or pass strict=False to leave such GEMMs in high precision."
            )
        site.status, site.reason = "refused", reason
        site.specs = dict.fromkeys(site.arguments)

    def kernel(self, node: Node) -> tuple[str, list[str]]:
        """The kernel that will run a node of ours, and why each earlier one declined."""
        op = BY_OVERLOAD[node.target]
        given = {name: _placed(value(argument), self.device) for name, argument in arguments(node).items()}
        return self.backend.kernel_for(op.name, given, self.device)

    def has_kernel(self, node: Node) -> bool:
        """Whether the backend runs a node of ours on a kernel, not on the reference."""
        return self.kernel(node)[0] != f"reference/{BY_OVERLOAD[node.target].name}"

    def report(self) -> Report:
        """The ledger of this graph, with paths as the whole model knows them."""
        weights: dict[str, tuple[int, int]] = {}
        records = []
        for site in self.sites:
            formats = {n: spec.format if spec else None for n, spec in site.specs.items()}
            records.append(
                SiteRecord(
                    site.path,
                    site.role,
                    site.kind,
                    site.status,
                    formats or dict.fromkeys(site.arguments),
                    " + ".join(dict.fromkeys(site.kernels)),
                    site.reason,
                    site.parameter,
                    site.flops,
                )
            )
            if site.role == "forward" and formats.get("weight"):
                weights[site.parameter] = site.weight_bytes
        return Report(
            self.recipe.name,
            self.backend.name,
            self.device,
            records,
            list(self.notes),
            graphs=1,
            pass_seconds=dict(self.seconds),
            weights=weights,
            cached={program.parameter: dict(program.sizes) for program in self.programs},
        ).within(self.prefix)


def _placed(argument: Any, device: str) -> Any:
    """A meta tensor (a model without weights) stands for one on the device that will run the graph."""
    if not isinstance(argument, FakeTensor) or argument.device.type != "meta":
        return argument
    with argument.fake_mode:
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)


class Pass(Protocol):
    """One verb. A frozen dataclass whose fields are its options.

    `needs` are facts that must hold before, `gives` facts that hold after. `run` rewrites the graph in place and
    returns how many rewrites it made; the driver cleans up and verifies.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    gives: ClassVar[tuple[str, ...]]

    def run(self, graph_module: GraphModule, context: Context) -> int:
        """Rewrite `graph_module.graph`."""
        ...


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; the order is checked against the facts that they need and give."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        facts: set[str] = set()
        for step in self.passes:
            missing = [fact for fact in step.needs if fact not in facts]
            if missing:
                raise FP4ValueError(f"pass {step.name!r} needs {missing}, which no pass before it gives")
            facts.update(step.gives)

    def run(
        self,
        graph_module: GraphModule,
        context: Context,
        observe: Callable[[Pass, Graph, Context], None] | None = None,
    ) -> None:
        """Run every pass; `observe` sees the graph after each."""
        for step in self.passes:
            self._run_one(step, graph_module, context)
            if observe:
                observe(step, graph_module.graph, context)

    def _run_one(self, step: Pass, graph_module: GraphModule, context: Context) -> None:
        start = time.perf_counter()
        graph = graph_module.graph
        if step.run(graph_module, context):
            verify(graph, step.name)  # first: cleaning up a malformed graph fails without naming the pass
            graph.eliminate_dead_code()
        context.facts.update(step.gives)
        context.seconds[step.name] = context.seconds.get(step.name, 0.0) + time.perf_counter() - start

    def select(self, names: Sequence[str]) -> Pipeline:
        """The pipeline of the named passes only, in the order given."""
        table = {step.name: step for step in self.passes}
        for name in names:
            if name not in table:
                raise unknown("pass", name, table)
        return Pipeline(tuple(table[name] for name in names))


_EXTRA: list[tuple[Pass, str]] = []


def register_pass(step: Pass, after: str) -> Pass:
    """Add a pass to the default pipeline, behind the one named `after`; it replaces one of its name that was added.

    Returns:
        The pass, so that the call can stand in an assignment.

    Raises:
        FP4TypeError: not a pass.
        FP4ValueError: the name of one of our own passes, no pass named `after`, or facts that do not hold there.
    """
    parts = ("name", "needs", "gives", "run", "__dataclass_fields__")
    if isinstance(step, type) or not all(hasattr(step, part) for part in parts):
        raise FP4TypeError(f"register_pass needs a frozen dataclass with name, needs, gives and run, got {step!r}")
    if step.name in (own.name for own in _own_passes()):
        raise FP4ValueError(f"{step.name!r} is a pass of the default pipeline; give yours another name")
    before = list(_EXTRA)
    _EXTRA[:] = [*(row for row in before if row[0].name != step.name), (step, after)]
    try:
        default_pipeline()
    except FP4ValueError:
        _EXTRA[:] = before
        raise
    return step


@cache
def _own_passes() -> tuple[Pass, ...]:
    found = {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}
    # A bare checkout on PYTHONPATH has no entry points.
    own = importlib.metadata.EntryPoint("default", "fp4compile.passes:PIPELINE", GROUP)
    passes: tuple[Pass, ...] = found.get("default", own).load()
    return passes


def default_pipeline() -> Pipeline:
    """The passes of `fp4compile.passes.PIPELINE` with those that were registered."""
    passes = list(_own_passes())
    for step, after in _EXTRA:
        names = [p.name for p in passes]
        if after not in names:
            raise unknown("pass", after, names)
        passes.insert(names.index(after) + 1, step)
    return Pipeline(tuple(passes))


@cache
def _sources() -> str:
    """A hash of this package's own sources: a change of a pass must not find graphs of the old one in a cache."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root / "passes", root / "backends"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def fingerprint(context: Context, pipeline: Pipeline) -> bytes:
    """What compile caches must key on: recipe, options, passes with their options, our sources and torch's version."""
    steps = [(type(p).__qualname__, [(f.name, getattr(p, f.name)) for f in fields(p)]) for p in pipeline.passes]  # type: ignore[arg-type]
    asked = context.recipe, context.backend.name, context.strict, context.weight_cache is not None
    key: tuple[Any, ...] = (*asked, steps, _sources(), torch.__version__)
    return hashlib.sha256(repr(key).encode()).digest()
