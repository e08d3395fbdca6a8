"""Absorb the elementwise producer of a quantised tensor into its quantisation: no pass over memory between the two.

    %silu = ... silu(%gate) ...
    %h    = mul(%silu, %up)
    fake_quantize(%h, 'hif4', 1)
    ->
    fake_quantize(%gate, 'hif4', 1, p1=%up, producer='full full: t0 = cast.float32(a0); ...')

It happens where quantisations are the only readers of the tensor, so that the tensor itself is never written, and
where one op per half of the step quantises it, so that it is not computed twice in one. The backward computes it again
from tensors that it has anyway: of an activation in front of a projection neither the result is kept nor a quantised
form. Tensors that one kernel makes from one read, as the gradients of both inputs of a SwiGLU, are left to it. A value
on the way that others read too is written in any case: it is read, not computed again, unless a single tensor and
statistics of its rows make it. Norms are absorbed behind their statistics, which stay reductions of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fp4compile.graph import below_views, is_backward, readers
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.producer import DTYPES, MOST_OPERANDS, Function, Producer, Step, function_of
from fp4compile.rewrite import call, refresh

aten = torch.ops.aten

# Reading more tensors than these costs more than one pass over memory.
_MOST_TENSORS = 4
# Beyond these steps arithmetic bounds a kernel, and not memory; GELU's backward takes 25.
_MOST_STEPS = 64
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TENSOR_SCALES = tuple(OPS[name].overload for name in ("tensor_scale", "tensor_scale_both"))
_ABSORBING = {op.overload: op for op in OPS.values() if "producer" in op.signature.parameters}


class _Refused(Exception):
    """No producer that a kernel could compute."""


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


def _same_size(a: Node, b: Node) -> bool:
    return statically_known_true(a.meta["val"].numel() == b.meta["val"].numel())


def _kept(graph: Graph) -> set[Node]:
    """Tensors of the forward that the backward has, whatever this pass does: it reads them in another op than a
    quantisation, or what elementwise ops make of them."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        others = (reader for reader in readers(node) if reader.target not in _ABSORBING)
        if node.op == "placeholder" or any(is_backward(r) or (r in found and function_of(r)) for r in others):
            found.add(node)
    return found


@dataclass
class _Builder:
    """Collects the operands and steps of one producer, whose result is [rows, columns].

    Attributes:
        below: what `_full_size_below` found in the graph.
        names: (value below its views, layout) -> its name.
        entered: number of steps begun.
    """

    rows: Any
    columns: Any
    below: Mapping[Node, frozenset[Node]]
    operands: list[Node] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    names: dict[tuple[Node, str], str] = field(default_factory=dict)
    entered: int = 0

    def step(self, node: Node, function: Function) -> str:
        """The name of the step that computes a node of full size."""
        self.entered += 1
        if self.entered > _MOST_STEPS:
            raise _Refused(f"it takes more than {_MOST_STEPS} steps")
        given = cast(tuple[Node | float, ...], node.args[: function.arity])
        values = tuple(self._value(v, node) if isinstance(v, Node) else float(v) for v in given)
        self.steps.append(Step(function.name, _DTYPE_NAMES[node.meta["val"].dtype], values))
        return f"t{len(self.steps) - 1}"

    def _value(self, value: Node, reader: Node) -> str:
        """The name of what a step reads: that of an operand, or of the step that computes it."""
        key = node, layout = below_views(value), self._layout(value, reader)
        if key not in self.names:
            # Statistics of rows, and all else that is not of full size, are in memory whatever this pass does.
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
        raise _Refused(f"{value} has shape {tuple(shape)}")

    def _operand(self, node: Node, layout: str) -> str:
        fake = node.meta["val"]
        if fake.dtype not in _DTYPE_NAMES or (layout == "full" and not fake.is_contiguous()):
            raise _Refused(f"{node} is {fake.dtype} with strides {fake.stride()}")
        self.operands.append(node)
        self.layouts.append(layout)
        return f"a{len(self.operands) - 1}"

    def build(self) -> tuple[list[Node], Producer]:
        """Operands, one of full size first, and the producer of them."""
        if "full" not in self.layouts or self.layouts.count("full") > _MOST_TENSORS:
            raise _Refused(f"it reads {self.layouts.count('full')} tensors")
        if len(self.operands) > MOST_OPERANDS:
            raise _Refused(f"it has {len(self.operands)} operands")
        first = self.layouts.index("full")
        order = [first, *(i for i in range(len(self.operands)) if i != first)]
        names = {f"a{old}": f"a{new}" for new, old in enumerate(order)}
        steps = tuple(
            Step(s.function, s.dtype, tuple(names.get(v, v) if isinstance(v, str) else v for v in s.values))
            for s in self.steps
        )
        return [self.operands[i] for i in order], Producer(tuple(self.layouts[i] for i in order), steps)


def _check_readers(root: Node, tensors: int) -> None:
    """Refuse a tensor that is written anyway, or is cheaper to write than to compute for each of its readers."""
    reading = list(readers(root))
    for reader in reading:
        if reader.target not in _ABSORBING or root in map(below_views, reader.all_input_nodes[1:]):
            raise _Refused(f"{reader} reads {root} too")
    for half in (False, True):  # forward, backward
        inside = [reader for reader in reading if is_backward(reader) is half]
        quantisations = [reader for reader in inside if reader.target not in _TENSOR_SCALES]
        # Read by each, or read once, written, and that read by each.
        more = len(inside) * tensors >= tensors + 1 + len(inside)
        if len(quantisations) > 1 or (len(inside) > 1 and more):
            raise _Refused(f"{len(inside)} ops would compute {root} from {tensors} tensors")


def _producer(x: Node, below: Mapping[Node, frozenset[Node]], kept: Set[Node]) -> tuple[list[Node], Producer]:
    """Operands and producer of a tensor that only quantisations read."""
    root = below_views(x)
    function = function_of(root)
    if function is None or x.meta["val"].dim() != 2:
        raise _Refused(f"{root} is not elementwise")
    rows, columns = x.meta["val"].shape
    builder = _Builder(rows, columns, below)
    builder.step(root, function)
    full = [node for node, layout in zip(builder.operands, builder.layouts, strict=True) if layout == "full"]
    _check_readers(root, len(full))
    if not is_backward(root) and any(map(is_backward, readers(root))):
        dropped = [str(node) for node in full if node not in kept]
        if dropped:
            raise _Refused(f"the backward would have to keep {', '.join(dropped)} for it")
    return builder.build()


def _as_matrix(graph: Graph, operand: Node, x: Node, consumer: Node) -> Node:
    """The operand in the shape of x, in the consumer's half of the step."""
    shape = x.meta["val"].shape
    if operand.meta["val"].shape == shape:
        return operand
    if x.target is aten.view.default:
        return call(graph, aten.view.default, (operand, x.args[1]), consumer)
    if all(isinstance(size, int) for size in shape):
        return call(graph, aten.view.default, (operand, list(shape)), consumer)
    raise _Refused(f"the shape of {x} is symbolic")


def _absorb(graph: Graph, consumer: Node, made: tuple[list[Node], Producer], context: Context) -> bool:
    x = cast(Node, consumer.args[0])
    (first, *others), producer = made
    before = consumer.args, dict(consumer.kwargs)
    try:
        with graph.inserting_before(consumer):
            matrix = _as_matrix(graph, first, x, consumer)
    except _Refused:
        return False
    if matrix is not first and "partitioner_tag" in consumer.meta:  # else it is no joint graph
        matrix.meta["partitioner_tag"] = consumer.meta["partitioner_tag"]  # where it stands, not where x was made
    consumer.update_arg(0, matrix)
    for i, operand in enumerate(others, 1):
        consumer.update_kwarg(f"p{i}", operand)
    consumer.update_kwarg("producer", str(producer))
    if context.has_kernel(consumer):
        refresh(consumer)
        return True
    consumer.args, consumer.kwargs = before
    if matrix is not first:
        graph.erase_node(matrix)
    return False


def _made(consumer: Node, below: Mapping[Node, frozenset[Node]], kept: Set[Node]) -> tuple[list[Node], Producer] | None:
    try:
        return _producer(cast(Node, consumer.args[0]), below, kept)
    except _Refused:
        return None


def _alone(made: dict[Node, tuple[list[Node], Producer]]) -> dict[Node, tuple[list[Node], Producer]]:
    """Without producers that read a tensor which another one of the same half reads: one kernel makes both from one
    read, as the gradients of both inputs of a SwiGLU."""
    roots: defaultdict[tuple[bool, Node], set[Node]] = defaultdict(set)
    reads: dict[Node, list[tuple[bool, Node]]] = {}
    for consumer, (operands, producer) in made.items():
        root = below_views(cast(Node, consumer.args[0]))
        full = (o for o, layout in zip(operands, producer.layouts, strict=True) if layout == "full")
        reads[consumer] = [(is_backward(root), operand) for operand in full]
        for read in reads[consumer]:
            roots[read].add(root)
    return {c: found for c, found in made.items() if all(len(roots[read]) == 1 for read in reads[c])}


@dataclass(frozen=True)
class Absorb:
    """Let quantisations compute what they quantise."""

    name: ClassVar[str] = "absorb"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("absorbed",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        consumers = [n for n in graph.nodes if n.target in _ABSORBING and "producer" not in n.kwargs]
        # All are decided before the first is absorbed: from then on its readers no longer show.
        below, kept = (_full_size_below(graph), _kept(graph)) if consumers else ({}, set())
        made = _alone({consumer: found for consumer in consumers if (found := _made(consumer, below, kept))})
        return sum(_absorb(graph, consumer, found, context) for consumer, found in made.items())
