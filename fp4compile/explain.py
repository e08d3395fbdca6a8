"""What a recipe would do to a model, found by capturing its graphs; the model itself runs unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import default_partition, make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule

from fp4compile.aot import decompositions
from fp4compile.capture import Frame, frame, graph_parameters
from fp4compile.coverage import Coverage
from fp4compile.dynamo import Options, device_type, graph_break_notes, graph_breaks, make_context
from fp4compile.errors import FP4TypeError
from fp4compile.pipeline import Context, Pass, Pipeline, default_pipeline
from fp4compile.recipe import Recipe
from fp4compile.report import Report, merged

# Calls with a copy of each captured graph, before and after each pass: (pass or None, graph, context).
Observer = Callable[[Pass | None, Graph, Context], None]


@dataclass
class _Explainer:
    """A Dynamo backend that rewrites a copy of each graph, reports, and runs the original."""

    options: Options
    pipeline: Pipeline
    observe: Observer | None
    reports: list[Report] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        where = frame(graph_module, example_inputs)
        context = make_context(self.options, where, device_type(example_inputs))
        self.coverage.add(where)

        def rewrite(captured: GraphModule) -> None:
            copied = copy_graph(captured)
            context.parameters = graph_parameters(copied.graph, where.parameters)
            context.buffers = set(graph_parameters(copied.graph, where.buffers))
            if self.observe:
                self.observe(None, copied.graph, context)
            self.pipeline.run(copied, context, self.observe)
            self.reports.append(context.report())

        def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            rewrite(joint)
            return default_partition(joint, joint_inputs, **kwargs)

        def infer(inference: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            rewrite(inference)
            return make_boxed_func(inference.forward)

        def run(half: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return make_boxed_func(half.forward)

        compiler = aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=decompositions(),
        )
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compiler(graph_module, example_inputs)


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A graph module that shares the tensors of another one and has a graph of its own."""
    copied = Graph()
    result = copied.graph_copy(graph_module.graph, {})
    copied.output(result)
    return GraphModule(graph_module, copied)


def explain(
    model: nn.Module | Callable[..., Any],
    example_inputs: Any,
    recipe: str | Recipe = "hif4",
    *,
    train: bool = False,
    backend: str = "auto",
    keep: Sequence[str] = (),
    passes: Sequence[str] | None = None,
    observe: Observer | None = None,
) -> Report:
    """Report what each GEMM of a model would become, without changing the model.

    The model is run once on the example inputs, as `torch.compile` would capture it.

    Args:
        model: a module (or a function of tensors).
        example_inputs: a tuple (positional), a mapping (keywords) or one tensor.
        recipe, backend, keep: as for `torch.compile`; GEMMs that cannot be done are reported as "refused".
        train: capture the joint forward + backward graph, of the mean of all floating-point outputs.
        passes: run only these passes of the pipeline.
        observe: called with each graph before the first and after every pass.

    Raises:
        FP4ValueError: an unknown recipe, backend or pass.
        FP4TypeError: the model cannot be called, or example inputs of another type.
    """
    if not callable(model):
        raise FP4TypeError(f"explain needs a module or a function, got {type(model).__name__}")
    options = Options(recipe=recipe, backend=backend, strict=False, keep=keep)
    make_context(options, Frame(), "cpu")  # wrong names are errors before any work
    pipeline = default_pipeline() if passes is None else default_pipeline().select(passes)
    explainer = _Explainer(options, pipeline, observe)
    args, kwargs = split_inputs(example_inputs)
    breaks_before = graph_breaks()
    limits = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20}
    compiled = torch.compile(model, backend=explainer)
    with torch._dynamo.config.patch(limits), torch.random.fork_rng(), torch.set_grad_enabled(train):
        compiled(*args, **kwargs)
    report = merged(explainer.reports)
    if report is None:
        context = make_context(options, Frame(), "cpu")
        report = context.report()
        report.graphs = 0
    breaks = graph_breaks() - breaks_before
    report.notes += graph_break_notes(breaks)
    if isinstance(model, nn.Module):
        # Dynamo counts no break when it meets a function again that it has left to Python once.
        explainer.coverage.complete(report, model, bool(breaks) or not report.graphs)
    return report


def failure(error: Exception) -> str:
    """What a model's own code raised while it was captured, on one line, with its place where Dynamo knows it."""
    text = str(error).strip() or type(error).__name__
    found = re.search(r": got (\w+\(.*\))$", text, re.MULTILINE)  # within what Dynamo says of a call on shapes alone
    stack = getattr(error, "real_stack", None) or []
    own = [f for f in stack if not f.filename.startswith(torch.__path__[0])]
    place = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return (found[1] if found else f"{type(error).__name__}: {text.splitlines()[0]}") + place


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of example inputs."""
    if isinstance(example_inputs, Mapping):
        return (), deepcopy(dict(example_inputs))
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise FP4TypeError(f"example_inputs must be a tuple, a mapping or a tensor, got {type(example_inputs).__name__}")
