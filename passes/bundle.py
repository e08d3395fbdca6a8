"""Bundle quantisations of tensors that are computed from the same ones: per axis one op, which reads those once.

    %dgate, %dup, %h = ... of %gate, %up and %dh          # the backward of a SwiGLU, and its output
    fake_quantize_both(%dgate, 'hif4', ...), fake_quantize_both(%dup, 'hif4', ...), fake_quantize(%h, 'hif4', 0)
    ->
    fake_quantize_each(%gate, 'hif4', 0, p1=%up, p2=%dh, producer='full full full: ... -> t15 t6 t16')
    fake_quantize_each(%gate, 'hif4', 1, p1=%up, p2=%dh, producer='full full full: ... -> t15 t6')

None of the tensors is written then. It happens within one half of the step, where all readers of a tensor there can
join and fewer bytes move than by writing the tensors, or computing each for itself as `absorb` would. Users of a result
that stand in front of what the others are computed from move behind it.

To nearest and without a transform only: arithmetic bounds the others.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, cast

import networkx as nx
import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.elementwise import Produced, Refused, Survey
from fp4compile.formats import FORMATS
from fp4compile.graph import MOVES, below_views, digraph, is_backward, readers
from fp4compile.ops import BY_OVERLOAD, OPS
from fp4compile.passes.absorb import absorbed, check_only_quantised, consumers_of
from fp4compile.pipeline import Context
from fp4compile.producer import MOST_RESULTS
from fp4compile.rewrite import arguments, call

# What has to be the same of those that one op does, by the op for one tensor; `<name>_both` does two of them along both
# axes, `<name>_each` those of a group.
_SHARED: Mapping[str, tuple[str, ...]] = {
    "fake_quantize": ("format", "axis", "scale_rule", "fold"),
    "tensor_scale": ("format", "scale_rule"),
}


@dataclass(frozen=True, eq=False)
class _Read:
    """One quantisation along one axis, or one tensor scale.

    Attributes:
        kind: the name of the op that does it alone.
        given: its arguments.
        number: that of its result among those of the node; None where the node is the result.
    """

    node: Node
    kind: str
    given: Mapping[str, Any]
    number: int | None

    @property
    def x(self) -> Node:
        """What is quantised."""
        return cast(Node, self.given["x"])

    @property
    def group(self) -> tuple[Any, ...]:
        """What has to be the same of those that one op does."""
        return self.kind, self.x.meta["val"].dtype, *(self.given[name] for name in _SHARED[self.kind])

    def replace(self, result: Node) -> None:
        """Have others read this result."""
        if self.number is None:
            self.node.replace_all_uses_with(result)
            return
        for item in list(self.node.users):
            if item.args[1] == self.number:
                item.replace_all_uses_with(result)
                self.node.graph.erase_node(item)


def _reads(node: Node) -> list[_Read]:
    """The quantisations that a node does, along one axis or both.

    Raises:
        Refused: no op does them for several tensors.
    """
    kind, both, _ = BY_OVERLOAD[node.target].name.partition("_both")
    if kind not in _SHARED:
        raise Refused(f"{node} stands alone")
    given = arguments(node)
    if not both:
        return [_read(node, kind, {**given, "axis": given["axis"] % 2}, None)]
    pairs = {name for name, value in given.items() if isinstance(value, list | tuple)}
    ones = [{**given, **{name: given[name][axis] for name in pairs}, "axis": axis} for axis in (0, 1)]
    return [
        _read(node, kind, {**one, "tensor_scale": given.get(f"tensor_scale_{axis}")}, axis)
        for axis, one in enumerate(ones)
    ]


def _read(node: Node, kind: str, given: dict[str, Any], number: int | None) -> _Read:
    if given.get("rounding", "nearest") != "nearest":
        raise Refused(f"{node} rounds at random, which arithmetic bounds")
    if given["hadamard"]:
        raise Refused(f"{node} is behind a transform, which arithmetic bounds")
    if given.get("block_2d"):
        raise Refused(f"{node} has 2-D blocks")
    given["scale_rule"] = FORMATS[given["format"]].rule(given["scale_rule"])
    return _Read(node, kind, given, number)


# --- what to bundle --------------------------------------------------------------------------------------------------


# Reads that one op does, and how their tensors are computed.
_Groups = list[tuple[list[_Read], Produced]]


def _width(nodes: Iterable[Node]) -> int:
    """Bytes of one element of each of some tensors."""
    return sum(node.meta["val"].itemsize for node in nodes)


def _members(consumers: Iterable[Node], survey: Survey) -> Iterator[tuple[Node, list[_Read], Produced]]:
    """Tensors that a bundle may compute: each with all its readers in this half."""
    found: defaultdict[Node, list[Node]] = defaultdict(list)
    for node in consumers:
        found[below_views(cast(Node, node.args[0]))].append(node)
    for root, nodes in found.items():
        try:
            check_only_quantised(root)
            reads = [read for node in nodes for read in _reads(node)]
            produced = survey.produced(reads[0].x)
        except Refused:
            continue
        # The forward writes what the backward could not compute again.
        moved = not is_backward(root) and any(map(is_backward, readers(root)))
        if not (moved and survey.kept_longer(produced)):
            yield root, reads, produced


def _bundles(members: Iterable[tuple[Node, list[_Read], Produced]]) -> Iterator[dict[Node, list[_Read]]]:
    """Members that are tied by tensors that they are computed from."""
    ties, reads_of = nx.Graph(), {}
    for root, reads, produced in members:
        reads_of[root] = reads
        ties.add_edges_from((("made", root), ("read", tensor)) for tensor in produced.tensors)
    for tied in nx.connected_components(ties):
        yield {root: reads for root, reads in reads_of.items() if ("made", root) in tied}


def _plan(bundle: Mapping[Node, list[_Read]], alone: Set[Node], survey: Survey) -> _Groups:
    """The ops of a bundle.

    Args:
        alone: ops that `absorb` would have compute what they quantise.

    Raises:
        Refused: a producer cannot be, or nothing is gained.
    """
    by_group: defaultdict[tuple[Any, ...], list[_Read]] = defaultdict(list)
    for reads in bundle.values():
        for read in reads:
            by_group[read.group].append(read)
    groups = [(reads, survey.produced(*(read.x for read in reads))) for reads in by_group.values()]
    if len(groups) == sum(map(len, bundle.values())):
        raise Refused("no two tensors share an op")
    most = max(map(len, by_group.values()))
    if most > MOST_RESULTS:
        raise Refused(f"{most} tensors of one op, which takes {MOST_RESULTS}")
    now, written = 0, []
    for root, reads in bundle.items():
        nodes = {read.node for read in reads}
        if nodes <= alone:
            now += len(nodes) * _width(survey.produced(reads[0].x).tensors)
        else:
            now += _width([root]) * (1 + len(nodes))
            written.append(reads[0].x)
    if written:
        now += _width({tensor for x in written for tensor in survey.produced(x).tensors})
    then = sum(_width(produced.tensors) for _, produced in groups)
    if then >= now:
        raise Refused(f"{then} bytes an element are no less than {now}")
    _check_written(groups)
    _check_order(groups)
    return groups


def _check_written(groups: _Groups) -> None:
    """Refuse a bundle that reads what would be written for it alone: what makes it is no function of a producer."""
    computed = set().union(*(produced.computed for _, produced in groups))
    for tensor in {tensor for _, produced in groups for tensor in produced.tensors}:
        pointwise = torch.Tag.pointwise in getattr(tensor.target, "tags", ())
        if pointwise and computed.issuperset(readers(tensor)):
            raise Refused(f"{tensor} would have to be written")


def _check_order(groups: _Groups) -> None:
    """Refuse a bundle of which one tensor is computed from what another one's quantisation leads to."""
    replaced = {read.node for reads, _ in groups for read in reads}
    stack = [node for _, produced in groups for node in produced.operands]
    # Tensor scales among them are replaced in front.
    results = replaced | {item for node in replaced for item in node.users if item.target is operator.getitem}
    stack += [n for node in replaced for n in node.all_input_nodes if n not in results]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in replaced:
            raise Refused(f"{node} comes before what it would be bundled with")
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes


# --- the rewrite -----------------------------------------------------------------------------------------------------


def _op(graph: Graph, reads: Sequence[_Read], produced: Produced) -> Node:
    """The op of one group, in front of what it replaces."""
    first, like = reads[0], min(read.node for read in reads)
    several = len(reads) > 1
    op = OPS[f"{first.kind}_each" if several else first.kind]
    given = {name: first.given[name] for name in _SHARED[first.kind]}
    for i, read in enumerate(reads):
        scale = read.given.get("tensor_scale")
        if scale is not None:
            given[f"tensor_scale_{i}" if several else "tensor_scale"] = scale
    with graph.inserting_before(like):
        given |= produced.arguments(graph, first.x, like)
        required = [p.name for p in op.signature.parameters.values() if p.default is p.empty]
        defaults = {p.name: p.default for p in op.signature.parameters.values()}
        options = {n: v for n, v in given.items() if n not in required and (isinstance(v, Node) or v != defaults[n])}
        return call(graph, op.overload, tuple(given[name] for name in required), like, **options)


def _rewrite(graph: Graph, groups: _Groups, context: Context) -> dict[Node, list[Node]]:
    """Put the ops of all groups in place, if there is a kernel for each: the ops and their results."""
    made: list[Node] = []
    results: dict[Node, list[Node]] = {}
    try:
        for reads, produced in groups:
            made.append(_op(graph, reads, produced))
            if not context.has_kernel(made[-1]):
                raise Refused("no kernel")
    except Refused:
        for node, (_, produced) in zip(made, groups, strict=False):
            matrix = cast(Node, node.args[0])
            graph.erase_node(node)
            if matrix is not produced.operands[0] and not matrix.users:
                graph.erase_node(matrix)
        return results
    for (reads, _), node in zip(groups, made, strict=True):
        items = [node]
        if len(reads) > 1:
            with graph.inserting_before(node.next):
                items = [call(graph, operator.getitem, (node, n), node) for n in range(len(reads))]
        for read, item in zip(reads, items, strict=True):
            read.replace(item)
        results[node] = items
    for node in {read.node for reads, _ in groups for read in reads}:
        graph.erase_node(node)
    return results


def _use_up(results: Mapping[Node, Sequence[Node]], flow: nx.DiGraph) -> None:
    """Have the results of one op read before the next op makes its own, those of the op with most results first.

    All of them would be alive at once otherwise, and what they are computed from: the largest tensors of a step.
    """
    for first, then in combinations(sorted(results, key=lambda op: -len(results[op])), 2):
        last = [reader for result in results[first] for reader in readers(result, MOVES)]
        if not any(nx.has_path(flow, then, reader) for reader in last):
            flow.add_edges_from((reader, then) for reader in last)


def _sort(graph: Graph, flow: nx.DiGraph) -> None:
    """Move every node behind all that it follows in the flow, and nothing else."""
    waiting: defaultdict[Node, list[Node]] = defaultdict(list)
    placed: set[Node] = set()
    last: Node | None = None
    for first in list(graph.nodes):
        ready = [first]
        while ready:
            node = ready.pop()
            missing = next((n for n in flow.predecessors(node) if n not in placed), None)
            if missing is not None:
                waiting[missing].append(node)
                continue
            if last is not None and last.next is not node:
                last.append(node)
            placed.add(node)
            last = node
            ready += reversed(waiting.pop(node, []))


@dataclass(frozen=True)
class Bundle:
    """Let one op per axis quantise all tensors that are computed from the same ones."""

    name: ClassVar[str] = "bundle"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("bundled",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        consumers = consumers_of(graph)
        if not consumers:
            return 0
        survey = Survey.of(graph)
        alone = set(absorbed(consumers, survey))
        made: list[dict[Node, list[Node]]] = []
        for half in (False, True):
            inside = [node for node in consumers if is_backward(node) is half]
            for bundle in list(_bundles(_members(inside, survey))):
                try:
                    groups = _plan(bundle, alone, survey)
                except Refused:
                    continue
                made.append(_rewrite(graph, groups, context))
        done = sum(map(len, made))
        if done:
            flow = digraph(graph)
            for results in made:
                _use_up(results, flow)
            _sort(graph, flow)
        return done
