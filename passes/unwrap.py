"""Unwrap the GEMMs that ops of other libraries hide.

    %out = transformers.grouped_mm_fallback(%x, %w, %ends)                  ->  grouped_mm(%x, %w, %ends)
    %dx, %dw = transformers.grouped_mm_fallback_backward(%x, %w, %ends, %dy)
        ->  %dx = grouped_mm(%dy, permute(%w, [0, 2, 1]), %ends)            # dgrad
            %dw = grouped_mm(permute(%x, [1, 0]), %dy, %ends)               # wgrad

transformers runs its experts through these ops where torch's own grouped GEMM does not serve (compiled fp32 or fp16).
They are loops over `mm` in the operands' dtype (transformers/integrations/moe.py), as `grouped_mm` is. An op that is
not in the table and by its name hides a GEMM is reported by `find_sites`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import call

aten = torch.ops.aten
GROUPED_MM = OPS["grouped_mm"].overload

Build = Callable[[Graph, Node, Mapping[str, Any]], Node]


def _transposed(graph: Graph, x: Node, like: Node) -> Node:
    dims = [1, 0] if x.meta["val"].dim() == 2 else [0, 2, 1]
    return call(graph, aten.permute.default, (x, dims), like)


def _forward(graph: Graph, node: Node, given: Mapping[str, Any]) -> Node:
    return call(graph, GROUPED_MM, (given["input"], given["weight"], given["offs"]), node)


def _dgrad(graph: Graph, node: Node, given: Mapping[str, Any]) -> Node:
    weight = _transposed(graph, given["weight"], node)
    return call(graph, GROUPED_MM, (given["grad_output"], weight, given["offs"]), node)


def _wgrad(graph: Graph, node: Node, given: Mapping[str, Any]) -> Node:
    """The gradient in the layout of the weight, as the op gives it: transposed where the weight is."""
    first, second = given["input"], given["grad_output"]
    transposed = given["weight"].target is aten.permute.default
    if transposed:
        first, second = second, first
    product = call(graph, GROUPED_MM, (_transposed(graph, first, node), second, given["offs"]), node)
    return _transposed(graph, product, node) if transposed else product


# Name -> what makes each result; an op with one result returns the result itself.
HIDDEN: Mapping[str, tuple[Build, ...]] = {
    "transformers::grouped_mm_fallback": (_forward,),
    "transformers::grouped_mm_fallback_backward": (_dgrad, _wgrad),
}


def _arguments(node: Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _unwrap(graph: Graph, node: Node, builds: tuple[Build, ...]) -> None:
    """Put the results that something reads in the place of the op's."""
    read = {node: 0} if len(builds) == 1 else {item: cast(int, item.args[1]) for item in node.users}
    for result, index in read.items():
        assert result is node or result.target is operator.getitem
        with graph.inserting_before(node):
            result.replace_all_uses_with(builds[index](graph, node, _arguments(node)))
        graph.erase_node(result)
    if node not in read:
        graph.erase_node(node)


@dataclass(frozen=True)
class Unwrap:
    """Replace ops that hide GEMMs by these."""

    name: ClassVar[str] = "unwrap"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ("unwrapped",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph, done = graph_module.graph, 0
        for node in list(graph.nodes):
            builds = HIDDEN.get(getattr(node.target, "_name", "")) if node.op == "call_function" else None
            if builds:
                _unwrap(graph, node, builds)
                done += 1
        return done
