"""One spelling per GEMM.

    linear(x, w, b)              ->  addmm(b, view(x), permute(w)), viewed back
    addmm(b, x, w, beta, alpha)  ->  b * beta + mm(x, w) * alpha
    baddbmm(b, x, w)             ->  b + bmm(x, w)
    addbmm(b, x, w)              ->  b + sum(bmm(x, w), 0)
    mv(w, x)                     ->  squeeze(mm(w, unsqueeze(x)))
    _grouped_mm(x, w), 3-D both  ->  bmm(x, w)
    transpose(w), w.mT           ->  permute(w)
    permute(permute(w))          ->  w, or one permute
    view(x), view(x)             ->  one view

Later passes know `mm`, `addmm`, `bmm` and `_grouped_mm`, and see through one permute to the tensor they quantise, so
that W and its transpose are one tensor with two axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.backend import Answer, No, Yes
from fp4compile.graph import MOVES, dims
from fp4compile.pipeline import Context
from fp4compile.rewrite import Rule, apply, call, merge_equal, size_of

aten = torch.ops.aten


def _always(node: Node) -> Answer:
    return Yes()


def _scaled(graph: Graph, node: Node, factor: Any, like: Node) -> Node:
    return node if factor == 1 else call(graph, aten.mul.Tensor, (node, factor), like)


def _has_factors(node: Node) -> Answer:
    plain = node.kwargs.get("beta", 1) == 1 and node.kwargs.get("alpha", 1) == 1
    return No("alpha and beta are 1") if plain else Yes()


def _split_bias(target: Any, graph: Graph, node: Node) -> Node:
    bias, a, b = cast(tuple[Node, Node, Node], node.args)
    product = call(graph, target, (a, b), node)
    if node.target is aten.addbmm.default:
        product = call(graph, aten.sum.dim_IntList, (product, [0]), node)
    product = _scaled(graph, product, node.kwargs.get("alpha", 1), node)
    beta = node.kwargs.get("beta", 1)
    if beta == 0:
        return product
    return call(graph, aten.add.Tensor, (product, _scaled(graph, bias, beta, node)), node)


def _linear(graph: Graph, node: Node) -> Node:
    x, weight, bias = (*node.args, None)[:3]
    assert isinstance(x, Node)
    sizes = [size_of(graph, x, axis) for axis in range(x.meta["val"].dim())]
    flat = x if len(sizes) == 2 else call(graph, aten.reshape.default, (x, [-1, sizes[-1]]), node)
    transposed = call(graph, aten.permute.default, (weight, [1, 0]), node)
    if bias is None:
        out = call(graph, aten.mm.default, (flat, transposed), node)
    else:
        out = call(graph, aten.addmm.default, (bias, flat, transposed), node)
    columns = size_of(graph, out, 1)
    return out if len(sizes) == 2 else call(graph, aten.reshape.default, (out, [*sizes[:-1], columns]), node)


def _mv(graph: Graph, node: Node) -> Node:
    matrix, vector = node.args
    column = call(graph, aten.unsqueeze.default, (vector, 1), node)
    return call(graph, aten.squeeze.dim, (call(graph, aten.mm.default, (matrix, column), node), 1), node)


def _of_stacks(node: Node) -> Answer:
    stacks = all(dims(operand) == 3 for operand in cast(tuple[Node, Node], node.args[:2]))
    return Yes() if stacks else No("the tokens of its groups lie in one matrix")


def _transposition(graph: Graph, node: Node) -> Node:
    x, *axes = cast(tuple[Any, ...], node.args)
    order = list(range(dims(x)))
    first, second = (axis % len(order) for axis in axes or (-2, -1))
    order[first], order[second] = order[second], order[first]
    return call(graph, aten.permute.default, (x, order), node)


def _of_permute(node: Node) -> Answer:
    inner = node.args[0]
    nested = isinstance(inner, Node) and inner.target is aten.permute.default
    return Yes() if nested else No("not a permute of a permute")


def _permute(graph: Graph, node: Node) -> Node:
    inner, outer_dims = node.args
    assert isinstance(inner, Node)
    base, inner_dims = cast(tuple[Node, list[int]], inner.args)
    dims = [inner_dims[d] for d in cast(list[int], outer_dims)]
    if [d % len(dims) for d in dims] == list(range(len(dims))):
        return base
    return call(graph, aten.permute.default, (base, dims), node)


GEMM_RULES = (
    Rule((aten.linear.default,), _always, _linear),
    Rule((aten.addmm.default,), _has_factors, lambda g, n: _split_bias(aten.mm.default, g, n)),
    Rule((aten.baddbmm.default,), _always, lambda g, n: _split_bias(aten.bmm.default, g, n)),
    Rule((aten.addbmm.default,), _always, lambda g, n: _split_bias(aten.bmm.default, g, n)),
    Rule((aten.mv.default,), _always, _mv),
    Rule((aten._grouped_mm.default,), _of_stacks, lambda g, n: call(g, aten.bmm.default, n.args[:2], n)),
)
TRANSPOSITIONS = (Rule((aten.transpose.int, aten.mT.default), _always, _transposition),)
MOVE_RULES = (Rule((aten.permute.default,), _of_permute, _permute),)


@dataclass(frozen=True)
class Canonicalise:
    """Bring every GEMM to one spelling."""

    name: ClassVar[str] = "canonicalise"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ("canonical",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        # In turn: a linear becomes a permute, and so does a transposition.
        done = sum(apply(graph, rules) for rules in (GEMM_RULES, TRANSPOSITIONS, MOVE_RULES))
        return done + merge_equal(graph, lambda node: node.target in MOVES)
