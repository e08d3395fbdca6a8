"""One quantisation per tensor, axis and spec, however many GEMMs read it; and what is kept for the backward.

    q_proj, k_proj and v_proj read one quantised input; the tensor scale of a weight serves fprop and dgrad.

A quantisation that only backward GEMMs read is pinned to the backward, so that the partitioner saves the tensor that
the model saves anyway (or recomputes) and not a second copy of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import merge_equal

_DRAW = OPS["draw_seed"].overload


def _is_ours(node: Node) -> bool:
    return bool(node.meta.get("fp4compile"))


@dataclass(frozen=True)
class Share:
    """Merge equal nodes of ours but GEMMs, then pin backward-only ones to the backward."""

    name: ClassVar[str] = "share"
    needs: ClassVar[tuple[str, ...]] = ("stabilised",)
    gives: ClassVar[tuple[str, ...]] = ("shared",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        # Two layers whose outputs are added have equal weight gradients, and yet a site each.
        kept = {site.node for site in context.sites}
        done = merge_equal(graph, lambda node: _is_ours(node) and node.target is not _DRAW and node not in kept)
        for node in graph.nodes:
            if _is_ours(node) and node.meta.get("partitioner_tag") == "is_backward":
                node.meta["partitioner_tag"] = "must_be_in_backward"
        return done
