"""Find what elementwise ops of a graph compute a tensor that is quantised, as a producer, and what that would read.

    %silu = ... silu(%gate) ...
    %h    = mul(%silu, %up)            ->  [%gate, %up], Producer("full full: t0 = cast.float32(a0); …")

A value on the way that others read too is written in any case: it is read, not computed again, unless a single tensor
and statistics of its rows make it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp4compile.graph import below_views, is_backward, readers
from fp4compile.ops import OPS
from fp4compile.producer import DTYPES, MOST_OPERANDS, Function, Producer, Step, function_of
from fp4compile.rewrite import call

aten = torch.ops.aten

# Reading more tensors than these costs more than one pass over memory.
_MOST_TENSORS = 4
# Beyond these steps arithmetic bounds a kernel, and not memory; GELU's backward takes 25.
_MOST_STEPS = 64
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Ops that can compute the one tensor that they quantise.
ABSORBING = {op.overload: op for op in OPS.values() if "producer" in op.signature.parameters and "_each" not in op.name}


class Refused(Exception):
    """A tensor stays as it is, and why."""


def _full_size_below(graph: Graph) -> dict[Node, frozenset[Node]]:
    """Elementwise node -> the tensors of its size in memory that it is a function of; itself, where it is one of them.

    It is when others read it too and it takes more than one tensor to compute it again.
    """
    found: dict[Node, frozenset[Node]] = {}
    for node in graph.nodes:  # in topological order
        function = function_of(node)
        if function is not None:
            sources = {below_views(v) for v in node.args[: function.arity] if isinstance(v, Node)}
            alike = [source for source in sources if _same_size(source, node)]
            below = frozenset().union(*(found.get(source, {source}) for source in alike))
            shared = sum(1 for _ in readers(node)) > 1
            found[node] = frozenset({node}) if shared and len(below) > 1 else below
    return found


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def _same_size(a: Node, b: Node) -> bool:
    return statically_known_true(a.meta["val"].numel() == b.meta["val"].numel())


def _kept_for_backward(graph: Graph) -> set[Node]:
    """Tensors of the forward that the backward has, whatever a pass does: it reads them in another op than a
    quantisation, or what elementwise ops make of them."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        others = (reader for reader in readers(node) if reader.target not in ABSORBING)
        if node.op == "placeholder" or any(is_backward(r) or (r in found and function_of(r)) for r in others):
            found.add(node)
    return found


@dataclass(frozen=True)
class Survey:
    """What is known of a graph before any quantisation in it computes what it quantises.

    Attributes:
        below: elementwise node -> the tensors of its size in memory that it is a function of.
        kept: tensors of the forward that the backward has in any case.
    """

    below: Mapping[Node, frozenset[Node]]
    kept: Set[Node]

    @classmethod
    def of(cls, graph: Graph) -> Survey:
        """Look at a graph."""
        return cls(_full_size_below(graph), _kept_for_backward(graph))

    def produced(self, *xs: Node) -> Produced:
        """How the tensors below some matrices of one shape are computed.

        Raises:
            Refused: there is no producer that a kernel could compute, or it would read what the backward has not.
        """
        shapes = [x.meta["val"].shape for x in xs]
        if any(len(shape) != 2 or not _equal(shape, shapes[0]) for shape in shapes):
            raise Refused("no matrices of one shape")
        rows, columns = shapes[0]
        builder = _Builder(rows, columns, self.below)
        return builder.build([builder.result(below_views(x)) for x in xs])

    def kept_longer(self, produced: Produced) -> list[Node]:
        """Tensors that the backward would have to keep to compute it there."""
        return [node for node in produced.tensors if not is_backward(node) and node not in self.kept]


@dataclass(frozen=True)
class Produced:
    """Tensors as a function of others.

    Attributes:
        operands: what the producer reads, the first of full size.
        computed: the nodes that its steps stand for.
    """

    operands: list[Node]
    producer: Producer
    computed: Set[Node]

    @property
    def tensors(self) -> list[Node]:
        """The operands of full size."""
        return [o for o, layout in zip(self.operands, self.producer.layouts, strict=True) if layout == "full"]

    def arguments(self, graph: Graph, x: Node, like: Node) -> dict[str, Any]:
        """What an op takes instead of x: the first operand in its shape, made in the half of `like`, and the others.

        Raises:
            Refused: the shape cannot be given.
        """
        first, *others = self.operands
        matrix = _as_matrix(graph, first, x, like)
        if matrix is not first and "partitioner_tag" in like.meta:  # else it is no joint graph
            matrix.meta["partitioner_tag"] = like.meta["partitioner_tag"]  # where it stands, not where x was made
        named = {f"p{i}": operand for i, operand in enumerate(others, 1)}
        return {"x": matrix, **named, "producer": str(self.producer)}


@dataclass
class _Builder:
    """Collects the operands and steps of one producer, whose results are [rows, columns].

    Attributes:
        below: of a `Survey`.
        names: (value below its views, layout) -> its name.
        entered: nodes whose step has begun.
    """

    rows: Any
    columns: Any
    below: Mapping[Node, frozenset[Node]]
    operands: list[Node] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: dict[tuple[Node, str], str] = field(default_factory=dict)
    entered: set[Node] = field(default_factory=set)

    def step(self, node: Node, function: Function) -> str:
        """The name of the step that computes a node of full size."""
        self.entered.add(node)
        if len(self.entered) > _MOST_STEPS:
            raise Refused(f"it takes more than {_MOST_STEPS} steps")
        given = cast(tuple[Node | float, ...], node.args[: function.arity])
        values = tuple(self._value(v, node) if isinstance(v, Node) else float(v) for v in given)
        self.steps.append(Step(function.name, _DTYPE_NAMES[node.meta["val"].dtype], values))
        return f"t{len(self.steps) - 1}"

    def _value(self, value: Node, reader: Node) -> str:
        """The name of what a step reads: that of an operand, or of the step that computes it."""
        key = node, layout = below_views(value), self._layout(value, reader)
        if key not in self.names:
            # Statistics of rows, and all else that is not of full size, are in memory whatever a pass does.
            written = layout != "full" or self.below.get(node, {node}) == {node}
            function = None if written else function_of(node)
            self.names[key] = self._operand(node, layout) if function is None else self.step(node, function)
        return self.names[key]

    def _layout(self, value: Node, reader: Node) -> str:
        """How a value, in the shape in which it is read, lies against the result."""
        shape, width = value.meta["val"].shape, reader.meta["val"].shape[-1]
        size, last = value.meta["val"].numel(), shape[-1] if shape else 1
        rows, columns = self.rows, self.columns
        if statically_known_true(size == rows * columns):
            return "full"
        if statically_known_true(size == 1):
            return "scalar"
        # It is broadcast against the rows of its reader: these must be the rows of the result.
        if statically_known_true(width == columns):
            for layout, found in {"column": (columns, columns), "row": (rows, 1)}.items():
                if statically_known_true(size == found[0]) and statically_known_true(last == found[1]):
                    return layout
        raise Refused(f"{value} has shape {tuple(shape)}")

    def _operand(self, node: Node, layout: str) -> str:
        fake = node.meta["val"]
        if fake.dtype not in _DTYPE_NAMES or (layout == "full" and not fake.is_contiguous()):
            raise Refused(f"{node} is {fake.dtype} with strides {fake.stride()}")
        self.operands.append(node)
        self.layouts.append(layout)
        return f"a{len(self.operands) - 1}"

    def result(self, node: Node) -> int:
        """The number of the step that computes a result; it is computed here, whoever reads it beside."""
        key = node, "full"
        function = function_of(node)
        if function is None:
            raise Refused(f"{node} is not elementwise")
        if not self.names.get(key, "a").startswith("t"):
            self.names[key] = self.step(node, function)
        return int(self.names[key][1:])

    def build(self, results: Sequence[int]) -> Produced:
        """What makes the results, one operand of full size first."""
        if "full" not in self.layouts or self.layouts.count("full") > _MOST_TENSORS:
            raise Refused(f"it reads {self.layouts.count('full')} tensors")
        if len(self.operands) > MOST_OPERANDS:
            raise Refused(f"it has {len(self.operands)} operands")
        first = self.layouts.index("full")
        order = [first, *(i for i in range(len(self.operands)) if i != first)]
        names = {f"a{old}": f"a{new}" for new, old in enumerate(order)}
        steps = tuple(
            Step(s.function, s.dtype, tuple(names.get(v, v) if isinstance(v, str) else v for v in s.values))
            for s in self.steps
        )
        chosen = () if list(results) == [len(steps) - 1] else tuple(results)
        layouts = tuple(self.layouts[i] for i in order)
        return Produced([self.operands[i] for i in order], Producer(layouts, steps, chosen), self.entered)


def _as_matrix(graph: Graph, operand: Node, x: Node, consumer: Node) -> Node:
    """The operand in the shape of x, in the consumer's half of the step."""
    shape = x.meta["val"].shape
    if operand.meta["val"].shape == shape:
        return operand
    if x.target is aten.view.default:
        return call(graph, aten.view.default, (operand, x.args[1]), consumer)
    if all(isinstance(size, int) for size in shape):
        return call(graph, aten.view.default, (operand, list(shape)), consumer)
    raise Refused(f"the shape of {x} is symbolic")
