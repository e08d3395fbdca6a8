"""Find the GEMMs that read a weight, with their roles. The graph stays as it is; `context.sites` is filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule

from fp4compile.graph import GEMM_OPS, find_sites, flops, is_backward, runs_on_data
from fp4compile.pipeline import Context
from fp4compile.routers import find_routers

CONVOLUTION = torch.ops.aten.convolution.default


@dataclass(frozen=True)
class FindSites:
    """Fill `context.sites`, `context.embeddings` and `context.routers`."""

    name: ClassVar[str] = "find_sites"
    needs: ClassVar[tuple[str, ...]] = ("canonical",)
    gives: ClassVar[tuple[str, ...]] = ("sites",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        context.sites = find_sites(graph, context.parameters, context.buffers)
        for site in context.sites:
            site.flops = flops(site)
        if not context.parameters and not context.sites and any(node.target in GEMM_OPS for node in graph.nodes):
            context.notes.append(
                "a graph multiplies matrices and reads no nn.Parameter, by which weights are known: none is in FP4"
            )
        forward = [n for n in graph.find_nodes(op="call_function", target=CONVOLUTION) if not is_backward(n)]
        if forward:
            context.notes.append(
                f"{len(forward)} convolutions stay in high precision: recipes are for linear layers and experts"
            )
        unknown = sum(runs_on_data(site) for site in context.sites)
        if unknown:
            context.notes.append(
                f"{unknown} GEMMs have sizes that depend on data: their FLOPs are not known and count 0"
            )
        context.routers |= find_routers(context.sites)
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
            if node.args[0] in context.parameters:
                context.embeddings.add(context.parameters[node.args[0]])
        return 0
