"""Write the recipe's stabilisers into the QDQ form: Hadamard transforms, stochastic rounding, 2-D blocks.

    quantize(%x, 'mxfp4', 0)
    ->
    %seed = draw_seed(device)                            # once per graph and step
    %h    = hadamard(%x, 0, 32)
    quantize(%h, 'mxfp4', 0, rounding='stochastic', seed=%seed, stream=3)

Random bits are a function of (seed, stream, element), so recomputing a quantisation under activation checkpointing
gives the same bits. Quantisations of one tensor along one axis under one spec share a stream, and so can be shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.recipe import Operand
from fp4compile.rewrite import call, refresh, size_of

QUANTIZE = OPS["quantize"].overload
DEQUANTIZE = OPS["dequantize"].overload


def _draw_seed(graph: Graph, device: torch.device) -> Node:
    last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(last_input):
        seed = call(graph, OPS["draw_seed"].overload, (device,), last_input)
    seed.meta["partitioner_tag"] = "is_forward"
    return seed


def _dequantize_of(quantize: Node) -> Node:
    return next(user for item in quantize.users for user in item.users if user.target is DEQUANTIZE)


def _transform(graph: Graph, quantize: Node, size: int) -> None:
    """Put a Hadamard transform before the quantisation (and before its tensor scale)."""
    x, _, axis = quantize.args
    assert isinstance(x, Node) and isinstance(axis, int)
    scale = quantize.kwargs.get("tensor_scale")
    first = scale if isinstance(scale, Node) else quantize
    with graph.inserting_before(first):
        transformed = call(graph, OPS["hadamard"].overload, (x, axis, size), quantize)
    first.update_arg(0, transformed)
    quantize.update_arg(0, transformed)
    quantize.update_kwarg("dtype", x.meta["val"].dtype)  # what the values must fit, now that the input is fp32
    dequantize = _dequantize_of(quantize)
    with graph.inserting_before(dequantize):
        dequantize.update_arg(5, size_of(graph, transformed, axis))


def _stabilise(graph: Graph, quantize: Node, spec: Operand, seed: Node | None, stream: int) -> None:
    if spec.hadamard:
        _transform(graph, quantize, spec.hadamard)
    if spec.block_2d:
        quantize.update_kwarg("block_2d", True)
        _dequantize_of(quantize).update_arg(6, True)
    if spec.rounding == "stochastic":
        options: dict[str, Any] = {"rounding": "stochastic", "seed": seed, "stream": stream}
        for name, option in options.items():
            quantize.update_kwarg(name, option)
    for changed in (quantize, *quantize.users, _dequantize_of(quantize), *_dequantize_of(quantize).users):
        if changed.target in (torch.ops.aten.permute.default, QUANTIZE, DEQUANTIZE) or changed in quantize.users:
            refresh(changed)


@dataclass(frozen=True)
class Stabilise:
    """Apply the stabilisers of each operand's spec."""

    name: ClassVar[str] = "stabilise"
    needs: ClassVar[tuple[str, ...]] = ("qdq",)
    gives: ClassVar[tuple[str, ...]] = ("stabilised",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        seed: Node | None = None
        streams: dict[tuple[Any, ...], int] = {}
        done = 0
        for node in graph.find_nodes(op="call_function", target=QUANTIZE, sort=True):
            spec = node.meta.get("fp4_spec")
            if spec is None or node.meta.get("fp4_stable"):
                continue
            if spec.rounding == "stochastic":
                seed = seed or _draw_seed(graph, node.args[0].meta["val"].device)
            stream = streams.setdefault((node.args[0], node.args[2], spec), len(streams))
            if spec.hadamard or spec.block_2d or spec.rounding == "stochastic":
                _stabilise(graph, node, spec, seed, stream)
                done += 1
            node.meta["fp4_stable"] = True
        return done
