"""Read a tensor once for both of its quantisations, and once for the tensor scales of both.

    %g0 = fake_quantize(%dy, 'hif4', 0)          # wgrad
    %g1 = fake_quantize(%dy, 'hif4', 1)          # dgrad
    ->
    %both = fake_quantize_both(%dy, 'hif4', ...)
    %g0, %g1 = getitem(%both, 0), getitem(%both, 1)

    %s0 = tensor_scale(%dy, 'nvfp4', 0, hadamard=16)
    %s1 = tensor_scale(%dy, 'nvfp4')
    ->
    %scales = tensor_scale_both(%dy, 'nvfp4', 0, 16)
    %s1, %s0 = getitem(%scales, 0), getitem(%scales, 1)

Only where the backend has a kernel for it, and within one half of the joint graph: across both, what the backward
reads would have to be kept from the forward on.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Graph, GraphModule, Node

from fp4compile.graph import is_backward
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import arguments, call, producer_of

_ONE, _BOTH = OPS["fake_quantize"].overload, OPS["fake_quantize_both"].overload
_TENSOR_SCALE, _BOTH_SCALES = OPS["tensor_scale"].overload, OPS["tensor_scale_both"].overload
_PER_AXIS = ("rounding", "stream", "hadamard", "block_2d")
_Make = Callable[[Graph, tuple[Node, Node], Node], Node]
_SHARED = ("format", "scale_rule", "sign_seed", "fold")


def _pairs(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Fake quantisations of one matrix along axis 0 and axis 1 that one op can do."""
    found: dict[Any, dict[int, Node]] = defaultdict(dict)
    for node in graph.find_nodes(op="call_function", target=_ONE, sort=True):
        given = arguments(node)
        if given["x"].meta["val"].dim() == 2:
            key = given["x"], is_backward(node), *producer_of(node).items(), *(given[name] for name in _SHARED)
            found[key].setdefault(given["axis"] % 2, node)
    for by_axis in found.values():
        seeds = {seed for node in by_axis.values() if (seed := arguments(node)["seed"]) is not None}
        if len(by_axis) == 2 and len(seeds) < 2:
            yield by_axis[0], by_axis[1]


def _scales(graph: Graph) -> Iterator[tuple[Node, Node]]:
    """Tensor scales of one tensor as it is, and transformed."""
    found: dict[Any, dict[bool, Node]] = defaultdict(dict)
    for node in graph.find_nodes(op="call_function", target=_TENSOR_SCALE, sort=True):
        given = arguments(node)
        key = given["x"], is_backward(node), *producer_of(node).items(), given["format"], given["scale_rule"]
        found[key].setdefault(given["hadamard"] > 0, node)
    return ((alike[False], alike[True]) for alike in found.values() if len(alike) == 2)


def _late_inputs(earlier: Node, later: Node) -> list[Node] | None:
    """What must move before `earlier` for `later` to run there: tensor scales; None where more would have to."""
    late = [node for node in later.all_input_nodes if node > earlier]  # nodes are ordered as they lie in the graph
    for node in late:
        if node.target is not _TENSOR_SCALE or any(n > earlier for n in node.all_input_nodes):
            return None
    return late


def _both(graph: Graph, nodes: tuple[Node, Node], like: Node) -> Node:
    given = [arguments(node) for node in nodes]
    lists = [[each[name] for each in given] for name in _PER_AXIS]
    options = {f"tensor_scale_{axis}": each["tensor_scale"] for axis, each in enumerate(given)}
    options["seed"] = next((each["seed"] for each in given if each["seed"] is not None), None)
    options["sign_seed"] = given[0]["sign_seed"]
    options = {name: value for name, value in options.items() if value is not None}
    if not given[0]["fold"]:
        options["fold"] = False
    options |= producer_of(nodes[0])
    x, format, scale_rule = (given[0][name] for name in ("x", "format", "scale_rule"))
    return call(graph, _BOTH, (x, format, scale_rule, *lists), like, **options)


def _both_scales(graph: Graph, nodes: tuple[Node, Node], like: Node) -> Node:
    given = arguments(nodes[1])
    options = {name: given[name] for name in ("sign_seed", "scale_rule") if given[name] is not None}
    options |= producer_of(nodes[1])
    return call(graph, _BOTH_SCALES, tuple(given[n] for n in ("x", "format", "axis", "hadamard")), like, **options)


def _rewrite(graph: Graph, nodes: tuple[Node, Node], make: _Make, context: Context) -> bool:
    """Replace two nodes by the results of the one that `make` inserts."""
    earlier, later = sorted(nodes)
    late = _late_inputs(earlier, later)
    if late is None:
        return False
    with graph.inserting_before(later):
        both = make(graph, nodes, earlier)
    if not context.has_kernel(both):
        graph.erase_node(both)
        return False
    for node in (*late, both):
        earlier.prepend(node)
        if "partitioner_tag" in earlier.meta:  # else it is no joint graph
            node.meta["partitioner_tag"] = earlier.meta["partitioner_tag"]
    for number, node in enumerate(nodes):
        with graph.inserting_after(both):
            node.replace_all_uses_with(call(graph, operator.getitem, (both, number), earlier))
    for node in nodes:
        graph.erase_node(node)
    return True


@dataclass(frozen=True)
class Pair:
    """Read a tensor once for both of its quantisations, and once for both of its scales."""

    name: ClassVar[str] = "pair"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("paired",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        # Scales first: a quantisation moves to the earlier one of its pair, and they have to be there.
        return sum(
            _rewrite(graph, nodes, make, context)
            for pairs, make in ((_scales, _both_scales), (_pairs, _both))
            for nodes in list(pairs(graph))
        )
