"""The `torch.compile` backend: `torch.compile(model, backend="fp4compile", options={"recipe": "hif4"})`."""

from __future__ import annotations

import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

from fp4compile import recipe as recipes
from fp4compile.backend import Backend, No, get_backend
from fp4compile.capture import Frame, frame, graph_parameters
from fp4compile.coverage import Coverage
from fp4compile.errors import FP4TypeError, FP4ValueError, FP4Warning, unknown
from fp4compile.pipeline import Context, Pipeline, default_pipeline
from fp4compile.recipe import Recipe
from fp4compile.report import Report, merged
from fp4compile.weight_cache import cache_of

MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Options:
    """`options` of `torch.compile`.

    Attributes:
        recipe: a preset's name, a registered one, a TOML file or a `Recipe`.
        backend: "auto" or a backend's name.
        mode: an Inductor mode (torch refuses `mode=` beside `options=`).
        strict: a GEMM that the recipe asks for and that cannot be done is an error; else a reported fallback.
        keep: globs of modules that stay in high precision.
        cache_weights: keep quantised weights between calls, and quantise them anew when they have changed.
    """

    recipe: Any = "hif4"
    backend: str = "auto"
    mode: str | None = None
    strict: bool = True
    keep: Sequence[str] = ()
    cache_weights: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Check names and types of a user's options."""
        allowed = [f.name for f in fields(cls)]
        for name in options or {}:
            if name not in allowed:
                raise unknown("option", name, allowed)
        parsed = cls(**(options or {}))
        if parsed.mode not in MODES:
            raise unknown("mode", parsed.mode, [str(m) for m in MODES])
        for name in ("strict", "cache_weights"):
            if not isinstance(getattr(parsed, name), bool):
                raise FP4TypeError(f"option {name!r} must be a bool, got {getattr(parsed, name)!r}")
        if not isinstance(parsed.backend, str):
            raise FP4TypeError(f"option 'backend' must be a name, got {parsed.backend!r}")
        return parsed


class Ledger:
    """The reports of the graphs of the latest `torch.compile` call."""

    def __init__(self) -> None:
        self._session: object = None
        self._reports: list[Report] = []
        self._backend: Backend | None = None
        self._model: Callable[[], nn.Module | None] = _nothing
        self._coverage = Coverage()
        # What Dynamo had counted at the last graph of the session before.
        self._breaks: Breaks = Breaks()
        self._latest: Breaks = Breaks()

    def add(self, where: Frame, report: Report, backend: Backend) -> None:
        """Take in a graph's report; another session starts anew."""
        if where.session is None or where.session is not self._session:
            self._session, self._reports, self._breaks = where.session, [], self._latest
            self._coverage = Coverage()
        self._reports.append(report)
        self._coverage.add(where)
        self._model = _nothing if where.model is None else weakref.ref(where.model)
        self._backend = backend
        # The function that is being compiled now counts as left to Python until it is done.
        self._latest = graph_breaks(under_way=1)

    def last(self) -> Report | None:
        """The merged report of the latest session, with what no graph holds, graph breaks and notes of kernels; None
        before the first."""
        report = merged(self._reports)
        if report and self._backend:
            report.notes += report.cache_notes()
            breaks = graph_breaks() - self._breaks
            report.notes += graph_break_notes(breaks)
            if (graph_breaks() - self._latest).left:
                report.notes.append("not in this report: what was compiled after its last graph, which gave no graph")
            model = self._model()
            if breaks and model is not None:
                self._coverage.complete(report, model, True)
            report.notes += self._backend.runtime_notes(report)
        return report


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Breaks:
    """What Dynamo has counted.

    Attributes:
        graph: how many times it ended a graph and went on with another, by reason.
        failures: how many times it gave up for other reasons; it may then have gone on in another way.
        functions: how many functions it left to Python as a whole.
        total: how many functions it has tried.
    """

    graph: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    functions: int = 0
    total: int = 0

    def __sub__(self, other: Breaks) -> Breaks:
        """What was counted since `other`."""
        if self.total < other.total:  # the counts were reset in between
            return self
        return Breaks(self.graph - other.graph, self.failures - other.failures, self.functions - other.functions)

    def __bool__(self) -> bool:
        return bool(self.graph or self.left)

    @property
    def left(self) -> Counter[str]:
        """Why functions were left to Python."""
        return self.failures if self.functions > 0 else Counter()


def graph_breaks(under_way: int = 0) -> Breaks:
    """What Dynamo has counted; `under_way` functions are being compiled."""
    total, done = (counters["frames"][name] for name in ("total", "ok"))
    failures = Counter(counters["unimplemented"])
    return Breaks(Counter(counters["graph_break"]), failures, total - done - under_way, total)


def graph_break_notes(breaks: Breaks) -> list[str]:
    """What a report says of graph breaks."""
    kinds = {"graph break": breaks.graph, "function left to Python as a whole": breaks.left}
    effect = "linear layers and experts outside the graphs run as they are"
    found: Counter[tuple[str, str]] = Counter()
    for kind, counts in kinds.items():
        for reason, count in counts.items():  # some differ in the place alone
            found[kind, f"{reason.splitlines()[0]}; {effect}{_hint(reason)}"] += count
    return [f"{kind} ({count}x): {what}" for (kind, what), count in found.items()]


def _hint(reason: str) -> str:
    """What Dynamo advises, or nothing."""
    found = re.search(r"^ *Hint: (.*)$", reason, re.MULTILINE)
    return f" (hint: {found[1]})" if found else ""


_LEDGER = Ledger()


def last_report() -> Report | None:
    """The report of the model that `torch.compile(backend="fp4compile")` compiled last; None before the first graph.

    Graphs of one `torch.compile` call (graph breaks, DDP buckets, recompilations) are merged.
    """
    return _LEDGER.last()


def device_type(example_inputs: Sequence[Any]) -> str:
    """The device of a graph's tensors; "cpu" for a graph without any."""
    kinds = {x.device.type for x in example_inputs if isinstance(x, torch.Tensor)} - {"meta"}
    return "cuda" if "cuda" in kinds else next(iter(sorted(kinds)), "cpu")


def warn_unmatched(recipe: Recipe, root: nn.Module | None) -> None:
    """Warn about globs that match no module of the model, naming the nearest one."""
    if root is None:
        return
    names = [name for name, _ in root.named_modules() if name] + [name for name, _ in root.named_parameters()]
    for glob in recipe.globs:
        if glob != "*" and not any(fnmatchcase(name, glob) for name in ("", *names)):  # "" is the root itself
            near = get_close_matches(glob, names, n=1, cutoff=0.0)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            warnings.warn(f"{glob!r} of recipe {recipe.name!r} matches no module{hint}", FP4Warning, stacklevel=2)


def check_cacheable(backend: Backend, where: Frame) -> None:
    """Refuse to cache weights where a change of one would not be seen, or by a backend that cannot."""
    if not backend.caches_weights:
        raise FP4ValueError(f"backend {backend.name!r} cannot cache weights: leave out cache_weights=True")
    if where.untracked:
        raise FP4ValueError(f"weights cannot be cached here: {where.untracked}. Leave out cache_weights=True")


def check_gradients(where: Frame, strict: bool) -> list[str]:
    """Refuse gradients that are taken within the graph, or note that their GEMMs are not the recipe's."""
    if not where.differentiates:
        return []
    found = (
        f"the compiled code takes gradients itself, by {where.differentiates}: their GEMMs cannot be told from "
        "forward ones"
    )
    if strict:
        raise FP4ValueError(
            f"{found}. Compile the model or the loss alone and take gradients outside, or pass strict=False to have "
            "wgrads in high precision and dgrads as forward GEMMs."
        )
    return [f"{found}: wgrads are in high precision, dgrads are treated as forward GEMMs"]


def make_context(options: Options, where: Frame, device: str) -> Context:
    """The context of one graph."""
    recipe = recipes.resolve(options.recipe, options.keep)
    backend = get_backend(options.backend)
    answer = backend.available()
    if isinstance(answer, No):
        raise FP4ValueError(f"backend {backend.name!r} is not available here: {answer.reason}")
    notes = check_gradients(where, options.strict)
    if options.cache_weights:
        check_cacheable(backend, where)
    warn_unmatched(recipe, where.root if where.model is None else where.model)
    return Context(
        recipe,
        backend,
        device,
        options.strict,
        embeddings=set(where.embeddings),
        depths=where.depths,
        places=where.places,
        inner=recipe.keeps_by_depth and where.is_inner(),
        notes=notes,
        weight_cache=cache_of(where.session) if options.cache_weights else None,
    )


def rewriter(
    context: Context, where: Frame, pipeline: Pipeline, done: Callable[[Context], None]
) -> Callable[[Graph], None]:
    """What a backend calls on the joint graph: runs the pipeline, then reports."""

    def rewrite(graph: Graph) -> None:
        owner = graph.owning_module
        if owner is None:
            owner = GraphModule(torch.nn.Module(), graph)
        context.parameters = graph_parameters(graph, where.parameters)
        context.buffers = set(graph_parameters(graph, where.buffers))
        pipeline.run(owner, context)
        done(context)

    return rewrite


def fp4compile_backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with the GEMMs that the recipe names in FP4. Found by entry point as "fp4compile".

    Raises:
        FP4ValueError, FP4TypeError: an unknown recipe, backend or option; a GEMM that cannot be FP4 (when strict).
    """
    parsed = Options.parse({"mode": mode, **(options or {})} if mode else options)
    where = frame(graph_module, example_inputs)
    context = make_context(parsed, where, device_type(example_inputs))
    rewrite = rewriter(context, where, default_pipeline(), lambda c: _LEDGER.add(where, c.report(), c.backend))
    return context.backend.compile(graph_module, example_inputs, rewrite, context, parsed.mode)
