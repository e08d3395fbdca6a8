"""Hoist the quantisation of weights out of the graph: they are quantised when they change, not at every call.

    %wq = fake_quantize(%w, 'hif4', 1)
    mm(%x, permute(%wq, [1, 0]))
    ->
    %wq = cached_weight(%w, 0, 0, ...)                       # weight 0, its form 0
    mm(%x, permute(%wq, [1, 0]))

    program of weight 0:  %w -> (fake_quantize(%w, 'hif4', 1), ...)      # in one op with the backward's form

Only where the user asks for it, as the forms of all weights then stay in memory between calls. A form depends on one
parameter and on nothing else: what is drawn in each step stays in the graph. Forward and backward have nodes of their
own, so that neither saves for the other what both are handed.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from fp4compile.graph import MOVES, Site, is_backward, origin
from fp4compile.ops import OPS
from fp4compile.passes.pair import Pair
from fp4compile.passes.rescale import join
from fp4compile.pipeline import Context
from fp4compile.rewrite import call
from fp4compile.weight_cache import CACHED, Program

aten = torch.ops.aten

# Ops that quantise, and the transform in front. None draws: random bits come from a seed, which is no parameter.
_CODECS = {op.overload for op in OPS.values() if "format" in op.signature.parameters or op.name == "hadamard"}
# What may stand between a parameter and its quantisation, with the same bits wherever it is computed.
_MOVES = MOVES | {torch.ops.prims.convert_element_type.default, aten._to_copy.default, operator.getitem}


def _owners(graph: Graph, parameters: Mapping[Node, str]) -> dict[Node, Node]:
    """Node that is made from one parameter alone, by moving and quantising it -> that parameter."""
    owners: dict[Node, Node] = {}
    for node in graph.nodes:  # in topological order
        if node in parameters:
            owners[node] = node
        elif node.op == "call_function" and node.target in _CODECS | _MOVES:
            of = {owners.get(source) for source in node.all_input_nodes}
            owner = of.pop() if len(of) == 1 else None
            if owner is not None:
                owners[node] = owner
    return owners


def _is_form(node: Node) -> bool:
    """Whether a node is a tensor that a codec gives, of a size known now."""
    maker = node.all_input_nodes[0] if node.target is operator.getitem else node
    value = node.meta.get("val")
    known = isinstance(value, torch.Tensor) and all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    return maker.target in _CODECS and known


def _closure(form: Node) -> set[Node]:
    found, pending = set(), [form]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _program(parameter: Node, forms: Mapping[str, Node], context: Context) -> Program:
    """What makes forms of a parameter: those of both halves at once, so that one read may do for two."""
    graph, copies = Graph(), {}
    wanted = set().union(*map(_closure, forms.values()))
    for node in parameter.graph.nodes:
        if node is parameter:
            copies[node] = graph.placeholder("weight")
            copies[node].meta = {"val": node.meta["val"]}
        elif node in wanted:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta.pop("partitioner_tag", None)
    graph.output(tuple(copies[form] for form in forms.values()))
    module = GraphModule(torch.nn.Module(), graph)
    if join(graph, context) + Pair().run(module, context):
        graph.eliminate_dead_code()
        module.recompile()
    return Program(context.parameters[parameter], module, {key: _bytes(form) for key, form in forms.items()})


def _bytes(form: Node) -> int:
    value: torch.Tensor = form.meta["val"]
    return math.prod(value.shape) * value.element_size()


@dataclass
class _Hoister:
    """The rewrite of one graph.

    Attributes:
        owners: see `_owners`.
        forms: parameter -> its forms that are read, by their keys; the order numbers both.
        keys: node -> what it is, whatever the names of nodes, as a short text.
        made: (node, half) -> what its readers of that half read instead.
    """

    graph: Graph
    owners: Mapping[Node, Node]
    forms: dict[Node, dict[str, Node]] = field(default_factory=dict)
    keys: dict[Node, str] = field(default_factory=dict)
    made: dict[tuple[Node, bool], Node] = field(default_factory=dict)

    def read(self, operand: Node, reader: Node) -> Node | None:
        """What a reader reads in the place of an operand, or None: a parameter that nothing quantises."""
        key = operand, is_backward(reader)
        if key not in self.made:
            made = self._cached(operand, reader) if _is_form(operand) else self._moved(operand, reader)
            if made is None:
                return None
            self.made[key] = made
        return self.made[key]

    def _cached(self, form: Node, reader: Node) -> Node:
        parameter, value = self.owners[form], form.meta["val"]
        forms, key = self.forms.setdefault(parameter, {}), self._key(form)
        forms.setdefault(key, form)
        where = list(self.forms).index(parameter), list(forms).index(key), is_backward(reader)
        like = list(value.shape), list(value.stride()), value.dtype
        return self._call(CACHED, (parameter, *where, *like), reader)

    def _key(self, node: Node) -> str:
        if node not in self.keys:
            described = str(node.target), map_arg(node.args, self._key), map_arg(node.kwargs, self._key)
            is_parameter = node.op == "placeholder"
            self.keys[node] = "" if is_parameter else hashlib.sha256(repr(described).encode()).hexdigest()[:16]
        return self.keys[node]

    def _moved(self, node: Node, reader: Node) -> Node | None:
        if node.op != "call_function" or node.target not in _MOVES:
            return None
        below = self.read(node.all_input_nodes[0], reader)
        return self._call(node.target, (below, *node.args[1:]), reader, **node.kwargs) if below else None

    def _call(self, target: object, args: tuple[object, ...], reader: Node, **kwargs: object) -> Node:
        with self.graph.inserting_before(reader):
            node = call(self.graph, target, args, reader, **kwargs)
        if is_backward(reader):
            node.meta["partitioner_tag"] = "must_be_in_backward"
        return node


@dataclass(frozen=True)
class Hoist:
    """Let GEMMs read forms of weights that are made outside of the graph."""

    name: ClassVar[str] = "hoist"
    needs: ClassVar[tuple[str, ...]] = ("legal",)
    gives: ClassVar[tuple[str, ...]] = ("hoisted",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        if context.weight_cache is None:
            return 0
        graph = graph_module.graph
        hoister = _Hoister(graph, _owners(graph, context.parameters))
        done = 0
        for node in list(graph.nodes):
            if node.op == "call_function" and node not in hoister.owners:
                for operand in node.all_input_nodes:
                    found = hoister.read(operand, node) if operand in hoister.owners else None
                    if found is not None:
                        node.replace_input_with(operand, found)
                        done += 1
        context.programs += [_program(p, forms, context) for p, forms in hoister.forms.items()]
        left = sum(1 for site in context.sites if _is_quantised_in_each_call(site))
        if left:
            context.notes.append(
                f"{left} GEMMs quantise their weight in each call: it is drawn anew, or computed in the graph"
            )
        return done


def _is_quantised_in_each_call(site: Site) -> bool:
    """Whether the weight of a GEMM is FP4 and not cached."""
    quantised = site.status == "fp4" and site.specs.get("weight") is not None
    return quantised and origin(site.operand("weight")).target is not CACHED
