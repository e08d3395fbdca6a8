"""Capturing small graphs, running passes on them one by one, and running the graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

import fp4compile
from fp4compile import recipe as recipes
from fp4compile.aot import decompositions
from fp4compile.backend import get_backend
from fp4compile.backends import checks
from fp4compile.explain import copy_graph
from fp4compile.graph import Site, text, verify
from fp4compile.ops import OPS
from fp4compile.passes import PIPELINE
from fp4compile.pipeline import Context, Pass
from fp4compile.recipe import Operand, Recipe, Rule

PASSES = {step.name: step for step in PIPELINE}
NAMES = tuple(PASSES)
_REFERENCES = {op.overload: op.reference for op in OPS.values()}


@dataclass
class Captured:
    """A graph with the context that its passes share."""

    module: GraphModule
    context: Context

    def run(self, *passes: str | Pass) -> int:
        """Run passes as the driver does; the number of rewrites."""
        done = 0
        for named in passes:
            step = PASSES[named] if isinstance(named, str) else named
            rewrites = step.run(self.module, self.context)
            verify(self.module.graph, step.name)
            if rewrites:
                self.module.graph.eliminate_dead_code()
            self.context.facts.update(step.gives)
            done += rewrites
        return done

    def until(self, name: str) -> Captured:
        """Run the default passes up to and including the named one."""
        self.run(*NAMES[: NAMES.index(name) + 1])
        return self

    def after(self, name: str) -> Captured:
        """Run the default passes behind the named one."""
        self.run(*NAMES[NAMES.index(name) + 1 :])
        return self

    @property
    def text(self) -> str:
        return text(self.module.graph, self.context.sites)

    @property
    def sites(self) -> list[Site]:
        return self.context.sites

    def calls(self, target: Any) -> list[Node]:
        """Calls of an op, in graph order; ours can be named."""
        target = OPS[target].overload if isinstance(target, str) else target
        return list(self.module.graph.find_nodes(op="call_function", target=target))

    def execute(self, *inputs: Tensor, seed: int = 1) -> list[Tensor]:
        """Run the graph by the reference of every op; the tensors that it returns."""
        copy = copy_graph(self.module)
        with torch.no_grad():
            result = _Interpreter(copy, seed).run(*(inputs or self.inputs()))
        result = result if isinstance(result, tuple | list) else [result]
        return [r for r in result if r is not None]

    def inputs(self) -> list[Tensor]:
        """Random tensors for the placeholders, the same on each call."""
        generator = torch.Generator().manual_seed(0)
        values = [node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder")]
        return [torch.randn(tuple(v.shape), generator=generator).to(v.dtype) for v in values]


class _Interpreter(Interpreter):
    def __init__(self, module: GraphModule, seed: int) -> None:
        super().__init__(module)
        self._seed = torch.tensor(seed)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is OPS["draw_seed"].overload:
            return self._seed
        return super().call_function(_REFERENCES.get(target, target), args, kwargs)


def context(recipe: str | Recipe, **options: Any) -> Context:
    return Context(recipes.resolve(recipe), get_backend("reference"), **options)


def capture(
    model: nn.Module, inputs: Sequence[Tensor], recipe: str | Recipe = "hif4-plain", train: bool = True
) -> Captured:
    """The joint (or inference) graph of a model that makes one graph, before the first pass."""
    graphs: list[Captured] = []
    fp4compile.explain(
        model,
        tuple(inputs),
        recipe,
        train=train,
        backend="reference",
        passes=(),
        observe=lambda step, graph, context: graphs.append(Captured(graph.owning_module, context)),
    )
    (found,) = graphs
    return found


def export(
    model: nn.Module, inputs: Sequence[Tensor], recipe: str | Recipe = "hif4-plain", decompose: bool = True
) -> Captured:
    """The inference graph of a model, its parameters as attributes."""
    program = torch.export.export(model, tuple(inputs))
    if decompose:
        program = program.run_decompositions(decompositions())
    module = program.module(check_guards=False)
    found = Captured(module, context(recipe))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in parameters:
            found.context.parameters[node] = node.target
    return found


def trace(
    function: Callable[..., Any],
    *inputs: Tensor,
    recipe: str | Recipe = "hif4-plain",
    parameters: str = "",
    decompose: bool = True,
    mode: str = "fake",
) -> Captured:
    """The graph of the ops that a function calls; `parameters` names the arguments that are parameters."""
    table = decompositions() if decompose else {}
    module = make_fx(function, decomposition_table=table, tracing_mode=mode, pre_dispatch=not decompose)(*inputs)
    module.graph.eliminate_dead_code()
    for op in (OPS["quantize"], OPS["fake_quantize"]):
        for node in module.graph.find_nodes(op="call_function", target=op.overload):
            names = list(op.signature.parameters)
            node.kwargs = {**dict(zip(names[3:], node.args[3:], strict=False)), **node.kwargs}  # as passes write them
            node.args = node.args[:3]
    found = Captured(module, context(recipe))
    names = inspect.signature(function).parameters
    for name, node in zip(names, module.graph.find_nodes(op="placeholder"), strict=True):
        if name in parameters.split():
            found.context.parameters[node] = name
    return found


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors agree in dtype, shape and value, NaNs being equal."""
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward_recipe(name: str = "test", keep_heads: bool = True, **operands: Operand) -> Recipe:
    """A recipe of one rule, for forward GEMMs."""
    return Recipe(name, (Rule("forward", **operands),), keep_heads=keep_heads)


def left_to_the_reference(given: Mapping[str, Any]) -> bool:
    """Whether a call asks for a scale rule or a rounding that no codec kernel has."""
    return given.get("rounding") == "eden" or ("scale_rule" in given and checks.scale_rule(given) is not None)
