"""Sort tokens by expert where each of them multiplies a copy of its expert's weight.

    bmm(index(%w, [%expert]), unsqueeze(%x, 2))     # one matrix per token, tokens in any order
    ->
    %sorted, %order = sort(%expert)
    %ends = searchsorted(%sorted, iota(experts), right=True)
    grouped_mm(index(%x, [%order]), permute(%w, [0, 2, 1]), %ends)     # and its rows back in their order

    index_put(zeros, [%expert], bmm(unsqueeze(%dy, 2), unsqueeze(%x, 1)), accumulate)     # the gradient of %w
    ->
    grouped_mm(permute(index(%dy, [%order]), [1, 0]), index(%x, [%order]), %ends)

The experts that transformers calls `batched_mm` are written so. Grouped, a weight is quantised once and not once per
token, and the wgrad contracts over an expert's tokens, where a sum of outer products has one term to share a scale.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.graph import VIEWS, data_flow, dims
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import call

aten, prims = torch.ops.aten, torch.ops.prims
GROUPED_MM = OPS["grouped_mm"].overload
_MOVES = VIEWS | {aten.expand.default}
_PUTS = (aten.index_put.default, aten._unsafe_index_put.default)


def _is_transposed(x: Node) -> bool:
    return x.target is aten.permute.default and [d % dims(x) for d in cast(list[int], x.args[1])] == [0, 2, 1]


def _unmoved(x: Node) -> Node:
    """Below views and expansions to the same shape, as `matmul` makes them."""
    while x.target in _MOVES and x.all_input_nodes[0].meta["val"].shape == x.meta["val"].shape:
        x = x.all_input_nodes[0]
    return x


def _untransposed(x: Node) -> tuple[Node, bool]:
    """A stack below views and the transposition of its matrices, and whether there is one."""
    x = _unmoved(x)
    transposed = _is_transposed(x)
    return (_unmoved(cast(Node, x.args[0])) if transposed else x), transposed


def _expert(indices: Any) -> Node | None:
    """The expert of each token, if the first axis alone is indexed, by a vector of integers."""
    if not isinstance(indices, list | tuple) or len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    value = indices[0].meta["val"]
    integers = value.dim() == 1 and value.dtype in (torch.int32, torch.int64)
    return indices[0] if integers else None


@dataclass(frozen=True)
class _Order:
    """Tokens sorted by expert: where each sorted one comes from, where each one went, where each expert's end."""

    order: Node
    inverse: Node
    ends: Node


@dataclass
class _Rewriter:
    """The rewrite of one graph.

    Attributes:
        weights: nodes that are computed from parameters alone, see `graph.Flow`.
        orders: (expert of each token, number of experts) -> the tokens sorted by it.
        sorted_rows: (rows, order of tokens) -> the rows in that order.
    """

    graph: Graph
    weights: dict[Node, str]
    orders: dict[tuple[Node, int], _Order] = field(default_factory=dict)
    sorted_rows: dict[tuple[Node, Node], Node] = field(default_factory=dict)

    def product(self, node: Node) -> Node | None:
        """The grouped form of a batch of matrix-vector products with gathered weights."""
        a, b = cast(tuple[Node, Node], node.args)
        for gathered, other, axis in ((a, b, 2), (b, a, 1)):
            inner, transposed = _untransposed(gathered)
            if inner.target is not aten.index.Tensor or inner.args[0] not in self.weights:
                continue
            weight, expert = cast(Node, inner.args[0]), _expert(inner.args[1])
            experts = weight.meta["val"].shape[0]
            fits = dims(weight) == 3 and other.meta["val"].shape[axis] == 1 and isinstance(experts, int)
            if expert is None or not fits:
                continue
            order = self._order(expert, experts, node)
            rows = self._sorted(self._rows(other, axis, node), order, node)
            if transposed != (axis == 2):  # [experts, K, N] is wanted, and a matrix on the left is [N, K]
                weight = call(self.graph, aten.permute.default, (weight, [0, 2, 1]), node)
            out = call(self.graph, GROUPED_MM, (rows, weight, order.ends), node)
            out = call(self.graph, aten.index.Tensor, (out, [order.inverse]), node)
            return call(self.graph, aten.unsqueeze.default, (out, axis), node)
        return None

    def gradient(self, node: Node) -> Node | None:
        """The grouped form of outer products that are summed by expert."""
        zeros, indices, values, *accumulate = cast(tuple[Any, ...], node.args)
        product, transposed = _untransposed(values)
        if product.target is not aten.bmm.default or accumulate != [True]:
            return None
        a, b = cast(tuple[Node, Node], product.args)
        empty = zeros.target is aten.full.default and zeros.args[1] == 0
        if not empty or a.meta["val"].shape[2] != 1 or node.meta["val"].dtype != product.meta["val"].dtype:
            return None
        expert, experts = _expert(indices), node.meta["val"].shape[0]
        order = self.orders.get((expert, experts)) if expert and isinstance(experts, int) else None
        if order is None:  # no products of these experts were grouped
            return None
        left, right = (self._sorted(self._rows(x, axis, product), order, product) for x, axis in ((a, 2), (b, 1)))
        left = call(self.graph, aten.permute.default, (left, [1, 0]), product)
        out = call(self.graph, GROUPED_MM, (left, right, order.ends), product)
        return call(self.graph, aten.permute.default, (out, [0, 2, 1]), product) if transposed else out

    def _rows(self, x: Node, axis: int, like: Node) -> Node:
        """[tokens, features] of a batch of vectors whose axis `axis` has one element."""
        inner, transposed = _untransposed(x)
        if transposed:
            return self._rows(inner, 3 - axis, like)
        if inner.target is aten.unsqueeze.default and cast(int, inner.args[1]) % 3 == axis:
            return cast(Node, inner.args[0])
        return call(self.graph, aten.squeeze.dim, (x, axis), like)

    def _sorted(self, rows: Node, order: _Order, like: Node) -> Node:
        key = (rows, order.order)
        if key not in self.sorted_rows:
            self.sorted_rows[key] = call(self.graph, aten.index.Tensor, (rows, [order.order]), like)
        return self.sorted_rows[key]

    def _order(self, expert: Node, experts: int, like: Node) -> _Order:
        key = (expert, experts)
        if key not in self.orders:
            value = expert.meta["val"]
            # An index may count from the end.
            counted = call(self.graph, aten.remainder.Scalar, (expert, experts), like)
            both = call(self.graph, aten.sort.stable, (counted,), like, stable=True)
            sorted_, order = (call(self.graph, operator.getitem, (both, i), like) for i in (0, 1))
            options = {"start": 0, "step": 1, "dtype": value.dtype, "device": value.device, "requires_grad": False}
            each = call(self.graph, prims.iota.default, (experts,), like, **options)
            ends = call(self.graph, aten.searchsorted.Tensor, (sorted_, each), like, out_int32=True, right=True)
            back = call(self.graph, aten.sort.default, (order,), like)
            inverse = call(self.graph, operator.getitem, (back, 1), like)
            self.orders[key] = _Order(order, inverse, ends)
        return self.orders[key]


@dataclass(frozen=True)
class Regroup:
    """Replace products of tokens and gathered weights by grouped GEMMs."""

    name: ClassVar[str] = "regroup"
    needs: ClassVar[tuple[str, ...]] = ("canonical",)
    gives: ClassVar[tuple[str, ...]] = ("regrouped",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph, done = graph_module.graph, 0
        rewriter = _Rewriter(graph, data_flow(graph, context.parameters, context.buffers).weights)
        builds = {aten.bmm.default: rewriter.product, **dict.fromkeys(_PUTS, rewriter.gradient)}
        for node in list(graph.nodes):
            build = builds.get(node.target) if node.op == "call_function" else None
            if build is None:
                continue
            with graph.inserting_before(node):
                grouped = build(node)
            if grouped is not None:
                node.replace_all_uses_with(grouped)
                done += 1
        return done
