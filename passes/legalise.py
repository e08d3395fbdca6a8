"""Ask the backend's kernels who will run each op, and write the answer on the sites. The graph stays as it is.

GEMMs of a loaded model, whose weights no pass has packed, are no sites: a note says what runs them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fp4compile.graph import MOVES
from fp4compile.ops import BY_OVERLOAD, OPS
from fp4compile.pipeline import Context

_PACKED = tuple(OPS[name].overload for name in ("mm", "grouped_mm_packed"))


def _ops_of(node: Node) -> Iterator[Node]:
    """The op that makes an operand, below views, and what it reads from other ops of ours."""
    while node.op == "call_function" and (node.target in MOVES or node.target is operator.getitem):
        node = node.all_input_nodes[0]
    if node.op == "call_function" and node.meta.get("fp4compile"):
        yield node
        if node.target not in BY_OVERLOAD:
            for source in node.all_input_nodes:
                yield from _ops_of(source)


@dataclass(frozen=True)
class Legalise:
    """Record the kernels of every FP4 site."""

    name: ClassVar[str] = "legalise"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("legal",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        chosen: dict[Node, str] = {}
        for site in context.sites:
            if site.status != "fp4":
                site.kernels = [f"{context.backend.name}/{_short(site.node)}"]
                continue
            ops = [op for name in site.arguments for op in _ops_of(site.operand(name))]
            for node in [*ops, site.node]:
                if node not in chosen:
                    chosen[node] = self._kernel(node, context)
                if chosen[node] not in site.kernels:
                    site.kernels.append(chosen[node])
        found = (node for op in _PACKED for node in graph_module.graph.find_nodes(op="call_function", target=op))
        held = Counter(self._kernel(node, context) for node in found if node not in chosen)
        context.notes += [f"{count} GEMMs with weights that the model holds packed: {k}" for k, count in held.items()]
        return 0

    def _kernel(self, node: Node, context: Context) -> str:
        if node.target not in BY_OVERLOAD:
            return f"{context.backend.name}/{_short(node)}"
        name, declined = context.kernel(node)
        context.notes += [note for note in declined if note not in context.notes]
        return name


def _short(node: Node) -> str:
    return str(node.target).removesuffix(".default")
