"""Keep the blocks of a grouped wgrad within one expert: start each group of tokens at a multiple of the block.

    grouped_mm(permute(%dy, [1, 0]), %x, %ends)
    ->
    %dy_padded, %padded_ends = pad_groups(%dy, %ends, 32)
    %x_padded, _             = pad_groups(%x, %ends, 32)
    grouped_mm(permute(%dy_padded, [1, 0]), %x_padded, %padded_ends)

From here on the tokens are an ordinary axis: blocks and Hadamard transforms along it start at each expert's first
token, every kernel that quantises serves, and the result is the same, as the rows between the groups are zeros. The
multiple is the least that every block and transform of both operands divides.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.formats import FORMATS
from fp4compile.graph import GEMM_OPS, Site
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import call

aten = torch.ops.aten
PAD = OPS["pad_groups"].overload


def _multiple(site: Site) -> int:
    sizes = ((FORMATS[spec.format].block, spec.hadamard or 1) for spec in site.specs.values() if spec)
    return math.lcm(*(size for pair in sizes for size in pair))


def _padded(graph: Graph, operand: Node, tokens: int, ends: Node, multiple: int, like: Node) -> tuple[Node, Node]:
    """The operand and the ends of its groups, once the groups along its axis `tokens` are padded."""
    rows = operand
    if tokens == 1:
        known = operand.target is aten.permute.default
        rows = cast(Node, operand.args[0]) if known else call(graph, aten.permute.default, (operand, [1, 0]), like)
    both = call(graph, PAD, (rows, ends, multiple), like)
    padded, padded_ends = (call(graph, operator.getitem, (both, i), like) for i in (0, 1))
    return (call(graph, aten.permute.default, (padded, [1, 0]), like) if tokens == 1 else padded), padded_ends


def _rewrite(graph: Graph, site: Site) -> None:
    node, op = site.node, GEMM_OPS[site.node.target]
    assert op.ends is not None
    ends, multiple = cast(Node, node.args[op.ends]), _multiple(site)
    with graph.inserting_before(node):
        for position, axis in ((op.a, op.a_axis), (op.b, op.b_axis)):
            operand, padded_ends = _padded(graph, cast(Node, node.args[position]), axis % 2, ends, multiple, node)
            node.update_arg(position, operand)
    node.update_arg(op.ends, padded_ends)


def _is_padded(site: Site) -> bool:
    """Whether the GEMM reads ends that this pass has made."""
    ends = cast(Node, site.node.args[cast(int, GEMM_OPS[site.node.target].ends)])
    return ends.target is operator.getitem and cast(Node, ends.args[0]).target is PAD


@dataclass(frozen=True)
class PadGroups:
    """Pad the groups of every FP4 GEMM that contracts over them."""

    name: ClassVar[str] = "pad_groups"
    needs: ClassVar[tuple[str, ...]] = ("annotated",)
    gives: ClassVar[tuple[str, ...]] = ("padded",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        wanted = [
            site
            for site in context.sites
            if site.status == "fp4" and site.contracts_tokens_of_groups and not _is_padded(site)
        ]
        for site in wanted:
            _rewrite(graph_module.graph, site)
        return len(wanted)
