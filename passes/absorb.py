"""Absorb the elementwise producer of a quantised tensor into its quantisation: no pass over memory between the two.

    %silu = ... silu(%gate) ...
    %h    = mul(%silu, %up)
    fake_quantize(%h, 'hif4', 1)
    ->
    fake_quantize(%gate, 'hif4', 1, p1=%up, producer='full full: t0 = cast.float32(a0); ...')

It happens where quantisations are the only readers of the tensor, so that the tensor itself is never written, and
where one op per half of the step quantises it, so that it is not computed twice in one. The backward computes it again
from tensors that it has anyway: of an activation in front of a projection neither the result is kept nor a quantised
form. Tensors that one kernel makes from one read, as the gradients of both inputs of a SwiGLU, are left to it: `bundle`
takes those that it can. Norms are absorbed behind their statistics, which stay reductions of their own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch.fx import Graph, GraphModule, Node

from fp4compile.elementwise import ABSORBING, Produced, Refused, Survey
from fp4compile.graph import below_views, is_backward, readers
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import refresh

_TENSOR_SCALES = tuple(OPS[name].overload for name in ("tensor_scale", "tensor_scale_both"))


def check_only_quantised(root: Node) -> None:
    """Refuse a tensor that others read than ops that could compute it."""
    for reader in readers(root):
        if reader.target not in ABSORBING or root in map(below_views, reader.all_input_nodes[1:]):
            raise Refused(f"{reader} reads {root} too")


def _check_cheap(root: Node, tensors: int) -> None:
    """Refuse a tensor that is cheaper to write than to compute for each of its readers."""
    for half in (False, True):  # forward, backward
        inside = [reader for reader in readers(root) if is_backward(reader) is half]
        quantisations = [reader for reader in inside if reader.target not in _TENSOR_SCALES]
        # Read by each, or read once, written, and that read by each.
        more = len(inside) * tensors >= tensors + 1 + len(inside)
        if len(quantisations) > 1 or (len(inside) > 1 and more):
            raise Refused(f"{len(inside)} ops would compute {root} from {tensors} tensors")


def _produced(x: Node, survey: Survey) -> Produced | None:
    """How a tensor is computed, None where it stays as it is."""
    root = below_views(x)
    try:
        produced = survey.produced(x)
        check_only_quantised(root)
        _check_cheap(root, len(produced.tensors))
    except Refused:
        return None
    moved = not is_backward(root) and any(map(is_backward, readers(root)))
    return None if moved and survey.kept_longer(produced) else produced


def absorbed(consumers: Sequence[Node], survey: Survey) -> dict[Node, Produced]:
    """Those consumers that will compute what they quantise, and how."""
    wanted = {node: produced for node in consumers if (produced := _produced(cast(Node, node.args[0]), survey))}
    return _alone(wanted)


def _alone(wanted: Mapping[Node, Produced]) -> dict[Node, Produced]:
    """Without producers that read a tensor which another one of the same half reads."""
    roots: defaultdict[tuple[bool, Node], set[Node]] = defaultdict(set)
    reads: dict[Node, list[tuple[bool, Node]]] = {}
    for consumer, produced in wanted.items():
        root = below_views(cast(Node, consumer.args[0]))
        reads[consumer] = [(is_backward(root), operand) for operand in produced.tensors]
        for read in reads[consumer]:
            roots[read].add(root)
    return {c: produced for c, produced in wanted.items() if all(len(roots[read]) == 1 for read in reads[c])}


def consumers_of(graph: Graph) -> list[Node]:
    """Ops that could compute what they quantise, and do not yet."""
    return [node for node in graph.nodes if node.target in ABSORBING and "producer" not in node.kwargs]


def _absorb(graph: Graph, consumer: Node, produced: Produced, context: Context) -> bool:
    x = cast(Node, consumer.args[0])
    before = consumer.args, dict(consumer.kwargs)
    try:
        with graph.inserting_before(consumer):
            given = produced.arguments(graph, x, consumer)
    except Refused:
        return False
    matrix = given.pop("x")
    consumer.update_arg(0, matrix)
    for name, argument in given.items():
        consumer.update_kwarg(name, argument)
    if context.has_kernel(consumer):
        refresh(consumer)
        return True
    consumer.args, consumer.kwargs = before
    if matrix is not produced.operands[0]:
        graph.erase_node(matrix)
    return False


@dataclass(frozen=True)
class Absorb:
    """Let quantisations compute what they quantise."""

    name: ClassVar[str] = "absorb"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("absorbed",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        consumers = consumers_of(graph)
        # All are decided before the first is absorbed: from then on its readers no longer show.
        wanted = absorbed(consumers, Survey.of(graph)) if consumers else {}
        return sum(_absorb(graph, consumer, produced, context) for consumer, produced in wanted.items())
