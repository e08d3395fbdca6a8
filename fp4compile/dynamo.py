"""The `torch.compile` backend: `torch.compile(model, backend="fp4compile", options={"recipe": "hif4"})`."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
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
        # Dynamo's count of graph breaks by reason, at the last graph of the session before.
        self._breaks: Counter[str] = Counter()
        self._latest: Counter[str] = Counter()

    def add(self, session: object, report: Report, backend: Backend) -> None:
        """Take in a graph's report; another session starts anew."""
        if session is None or session is not self._session:
            self._session, self._reports, self._breaks = session, [], self._latest
        self._reports.append(report)
        self._backend = backend
        self._latest = graph_breaks()

    def last(self) -> Report | None:
        """The merged report of the latest session, with graph breaks and notes of kernels; None before the first."""
        report = merged(self._reports)
        if report and self._backend:
            report.notes += report.cache_notes()
            report.notes += graph_break_notes(graph_breaks() - self._breaks)
            report.notes += self._backend.runtime_notes(report)
        return report


def graph_breaks() -> Counter[str]:
    """Dynamo's count of graph breaks by reason; with a break in a loop it leaves the function to Python as a whole."""
    skipped = {reason: count for reason, count in counters["unimplemented"].items() if "graph break in loop" in reason}
    return Counter(counters["graph_break"]) + Counter(skipped)


def graph_break_notes(breaks: Counter[str]) -> list[str]:
    """What a report says of graph breaks."""
    return [
        f"graph break ({count}x): {reason.splitlines()[0]}; linear layers and experts outside the graphs run as they "
        f"are{_hint(reason)}"
        for reason, count in breaks.items()
    ]


def _hint(reason: str) -> str:
    """What Dynamo advises, or nothing."""
    found = re.search(r"^ *Hint: (.*)$", reason, re.MULTILINE)
    return f" (hint: {found[1]})" if found else ""


_LEDGER = Ledger()


def last_report() -> Report | None:
    """The report of the model that `torch.compile(backend="fp4compile")` compiled last; None before the first call.

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
    warn_unmatched(recipe, where.root)
    return Context(
        recipe,
        backend,
        device,
        options.strict,
        embeddings=set(where.embeddings),
        depths=where.depths,
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
    rewrite = rewriter(context, where, default_pipeline(), lambda c: _LEDGER.add(where.session, c.report(), c.backend))
    return context.backend.compile(graph_module, example_inputs, rewrite, context, parsed.mode)
