"""Inserting nodes with the metadata that partitioners and Inductor need, and rewrite rules: pattern, check, build."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node, map_arg
from torch.utils._pytree import tree_leaves

from fp4compile.backend import Answer, Yes
from fp4compile.ops import BY_OVERLOAD, OPS
from fp4compile.producer import MOST_OPERANDS

# What a new node takes over from the node it is made for: its half of the joint graph, its module, its line.
_INHERITED = (
    "partitioner_tag",
    "seq_nr",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "recompute",
    "ac_graph_id",
    "autograd_backward",
)

_PRODUCER_ARGUMENTS = {"producer", *(f"p{i}" for i in range(1, MOST_OPERANDS))}
_FAKES = {op.overload: op.fake for op in OPS.values()}


def value(argument: Any) -> Any:
    """The example value of an argument: fake tensors and symbolic sizes in the place of nodes."""
    return map_arg(argument, lambda node: node.meta["val"])


def call(graph: Graph, target: Any, args: tuple[Any, ...], like: Node, **kwargs: Any) -> Node:
    """Insert a call at the insertion point, with a value computed by shape rules and the metadata of `like`."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {k: like.meta[k] for k in _INHERITED if k in like.meta}
    node.meta["fp4compile"] = True
    node.meta["val"] = like.meta.get("val")
    refresh(node)
    return node


def refresh(node: Node) -> None:
    """Compute the example value of a node anew from those of its arguments."""
    args, kwargs = value(node.args), value(node.kwargs)
    rule: Any = _FAKES.get(node.target, node.target)
    modes = (getattr(v, "fake_mode", None) for v in tree_leaves((args, kwargs, node.meta.get("val"))))
    fake_mode = next((mode for mode in modes if mode is not None), nullcontext())
    with fake_mode:
        node.meta["val"] = rule(*args, **kwargs)


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call of ours by name, defaults included."""
    bound = BY_OVERLOAD[node.target].signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def producer_of(node: Node) -> dict[str, Any]:
    """What a call of ours says of the producer of its x; nothing where x is what it quantises."""
    return {name: argument for name, argument in node.kwargs.items() if name in _PRODUCER_ARGUMENTS}


def fake_quantized(operand: Node, contraction: int) -> Node | None:
    """The fake quantisation along the contraction axis that makes an operand, below one transposition."""
    transposed = operand.target is torch.ops.aten.permute.default and list(cast(list[int], operand.args[1])) == [1, 0]
    inner = operand.all_input_nodes[0] if transposed else operand
    if inner.target is not OPS["fake_quantize"].overload or inner.meta["val"].dim() != 2:
        return None
    axis = cast(int, inner.args[2]) % 2
    along = axis == (1 - contraction if transposed else contraction)
    given = arguments(inner)
    return inner if along and (given["tensor_scale"] is None or not given["fold"]) else None


def through_permute(operand: Node, axis: int) -> tuple[Node, int, list[int] | None]:
    """The tensor below one permute, the axis counted there, and the permute's order."""
    ndim = operand.meta["val"].dim()
    axis %= ndim
    if operand.target is not torch.ops.aten.permute.default:
        return operand, axis, None
    base, dims = cast(tuple[Node, list[int]], operand.args)
    order = [d % ndim for d in dims]
    return base, order[axis], order


def _hashable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return tuple(sorted((k, _hashable(v)) for k, v in value.items()))
    return value


def merge_equal(graph: Graph, eligible: Callable[[Node], bool]) -> int:
    """Replace each eligible node by the first one with the same target and arguments; the number of replaced ones."""
    seen: dict[Any, Node] = {}
    done = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not eligible(node):
            continue
        first = seen.setdefault((node.target, _hashable(node.args), _hashable(dict(node.kwargs))), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            done += 1
    return done


def size_of(graph: Graph, source: Node, axis: int) -> Any:
    """The size of `source` along `axis` as a graph can hold it: an int, or a node for a symbolic one."""
    size = source.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    return call(graph, torch.ops.aten.sym_size.int, (source, axis % source.meta["val"].dim()), source)


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        targets: ops that the rule looks at.
        check: whether this node may be rewritten; `No` says why not, to a reader or a debugger.
        build: makes the replacement before the node and returns it.
    """

    targets: tuple[Any, ...]
    check: Callable[[Node], Answer]
    build: Callable[[Graph, Node], Node]


def apply(graph: Graph, rules: Iterable[Rule], replaced: Callable[[Node, Node], None] | None = None) -> int:
    """Rewrite every node that a rule matches, in graph order; the number of rewrites.

    Args:
        replaced: told of each (old, new) pair.
    """
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.targets:
            by_target.setdefault(target, []).append(rule)
    done = 0
    for node in list(graph.nodes):
        for rule in by_target.get(node.target, ()) if node.op == "call_function" else ():
            if isinstance(rule.check(node), Yes):
                with graph.inserting_before(node):
                    replacement = rule.build(graph, node)
                node.replace_all_uses_with(replacement)
                if replaced:
                    replaced(node, replacement)
                graph.erase_node(node)
                done += 1
                break
    return done
