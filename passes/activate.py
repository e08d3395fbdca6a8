"""Put the activation behind a GEMM with a packed weight into the GEMM, where a kernel applies it.

    %y = fp4compile.mm(%x, %codes, ...)             # rows of gate, then of up
    %gate, %up = split(%y, F, -1)
    %h = mul(silu(%gate), %up)
    ->
    %h = fp4compile.mm(%x, %codes, ..., activation='swiglu')

Where gate and up are GEMMs of their own, as in transformers, the one takes the other's result:

    %h = mul(silu(fp4compile.mm(%x, %codes, ...)), %up)
    ->
    %h = fp4compile.mm(%x, %codes, ..., activation='silu', factor=%up)

The activation then is of the fp32 sums. The roundings to the model's dtype in front of it, and between a gate and its
product, are left out: the result is nearer to the exact one than the graph's by as much.

What an activation looks like in a graph is found by tracing it as the graph was traced.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fp4compile.activations import ACTIVATIONS, FUNCTIONS
from fp4compile.aot import decompositions
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import arguments, call

aten = torch.ops.aten
MM = OPS["mm"].overload
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)
_DEFAULTS = {p.name: p.default for p in OPS["mm"].signature.parameters.values()}
_GATED = {row.function: name for name, row in ACTIVATIONS.items() if row.gated}


@cache
def _pattern(function: str, dtype: torch.dtype) -> Node:
    """The last node of a function of one tensor, traced."""
    with unset_fake_temporarily():
        traced = make_fx(lambda x: FUNCTIONS[function](x), decompositions())(torch.empty(2, dtype=dtype, device="meta"))
    (result,) = traced.graph.output_node().all_input_nodes
    return result


@dataclass
class _Match:
    """Nodes of a graph that compute a pattern, by the pattern's nodes."""

    nodes: dict[Node, Node] = field(default_factory=dict)

    def of(self, node: Any, pattern: Any) -> bool:
        """Whether `node` computes what `pattern` does."""
        if isinstance(pattern, list | tuple):
            return isinstance(node, list | tuple) and len(node) == len(pattern) and all(map(self.of, node, pattern))
        if not isinstance(pattern, Node):
            return bool(node == pattern)
        if not isinstance(node, Node):
            return False
        if pattern in self.nodes or pattern.op == "placeholder":
            return self.nodes.setdefault(pattern, node) is node
        self.nodes[pattern] = node
        return node.target == pattern.target and not node.kwargs and self.of(node.args, pattern.args)


def _functions(root: Node) -> Iterator[tuple[str, Node, set[Node]]]:
    """Functions that a node computes: name, what of, and the nodes that do."""
    value = root.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return
    for name in FUNCTIONS:
        match = _Match()
        if match.of(root, _pattern(name, value.dtype)):
            (x,) = (node for pattern, node in match.nodes.items() if pattern.op == "placeholder")
            yield name, x, set(match.nodes.values()) - {x}


def _half(node: Node) -> tuple[Node, int, set[Node]] | None:
    """A node that is a half of a tensor's last axis: the tensor, which half, and the nodes that take it."""
    if node.target is operator.getitem:
        split, number = cast(tuple[Node, int], node.args)
        if split.target not in _SPLITS:
            return None
        whole, taken, halves = cast(Node, split.args[0]), {node, split}, len(split.meta["val"]) == 2
    elif node.target is aten.slice.Tensor and len(node.args) in (3, 4):
        whole, _, start = cast(tuple[Node, int, int], node.args[:3])
        number, taken, halves = int(start != 0), {node}, start in (0, node.meta["val"].shape[-1])
    else:
        return None
    # A part of another axis has a whole last one.
    halves = halves and node.meta["val"].shape[-1] * 2 == whole.meta["val"].shape[-1]
    return (whole, number, taken) if halves else None


@dataclass(frozen=True)
class _Found:
    """An activation: its name, what it is of, the nodes that compute it, the last one included, and a factor."""

    activation: str
    source: Node
    inner: set[Node]
    factor: Node | None = None


def _found(root: Node) -> Iterator[_Found]:
    """Activations that a node may compute."""
    for name, x, inner in _functions(root):
        yield _Found(name, x, inner)
    operands = [value for value in root.args if isinstance(value, Node)]
    if root.target is not aten.mul.Tensor or len(operands) != 2:
        return
    for function, factor in (operands, operands[::-1]):
        up = _half(factor)
        for name, x, inner in _functions(function):
            gate = _half(x)
            if gate and up and (gate[0], gate[1], up[1]) == (up[0], 0, 1):
                yield _Found(_GATED[name], gate[0], inner | gate[2] | up[2] | {root})
            elif statically_known_true(sym_eq(factor.meta["val"].shape, x.meta["val"].shape)):
                yield _Found(name, x, inner | {root}, factor)


def _reads_packed(found: _Found, root: Node) -> bool:
    """Whether a GEMM with a packed weight makes the tensor, and nothing else reads what would not be written."""
    gemm = found.source
    if gemm.target is not MM or root.meta["val"].dtype != gemm.meta["val"].dtype:
        return False
    given = arguments(gemm)
    hidden = {gemm, *found.inner} - {root}
    alone = found.factor not in hidden and all(user in found.inner for node in hidden for user in node.users)
    plain = not given["a_format"] and not given["activation"] and given["factor"] is None
    return bool(given["b_format"]) and plain and alone


@dataclass(frozen=True)
class Activate:
    """Let GEMMs with packed weights apply the activations behind them."""

    name: ClassVar[str] = "activate"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("activated",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        if not graph.find_nodes(op="call_function", target=MM):
            return 0
        sites = {site.node: site for site in context.sites}
        refused: Counter[str] = Counter()
        done, hidden = 0, set[Node]()
        for root in reversed(list(graph.nodes)):  # a product with a factor before the function in it
            found = next((each for each in _found(root) if _reads_packed(each, root)), None)
            if found is None or root in hidden:
                continue
            old = found.source
            given = {**arguments(old), "activation": found.activation, "factor": found.factor}
            operands = given.pop("a"), given.pop("b")
            named = {name: value for name, value in given.items() if value != _DEFAULTS[name]}
            with graph.inserting_before(root):
                gemm = call(graph, MM, operands, old, **named)
            if not context.has_kernel(gemm):
                refused["; ".join(context.kernel(gemm)[1])] += 1
                graph.erase_node(gemm)
                continue
            root.replace_all_uses_with(gemm)
            hidden |= found.inner
            if old in sites:
                sites[old].follow(gemm)
            done += 1
        context.notes += [f"{count} activations stay behind their GEMMs: {why}" for why, count in refused.items()]
        return done
