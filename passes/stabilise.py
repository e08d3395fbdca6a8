"""Write the recipe's stabilisers into the QDQ form: Hadamard transforms, stochastic rounding, 2-D blocks.

    quantize(%x, 'mxfp4', 0)
    ->
    %seed = draw_seed(device)                            # once per graph and step
    %h    = hadamard(%x, 0, 32)
    quantize(%h, 'mxfp4', 0, rounding='stochastic', seed=%seed, stream=3)

Random bits are a function of (seed, stream, element), so recomputing a quantisation under activation checkpointing
gives the same bits. Quantisations of one tensor along one axis under one spec share a stream, and so can be shared.
Fresh signs of a transform belong to a GEMM, so nothing is shared between two GEMMs that have them:

    %signs = aten.add(%seed, 3 << 32)                    # the third GEMM; a high word is a counter of its own
    %h     = hadamard(%x, 0, 32, %signs)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

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


@dataclass
class _Draws:
    """The random numbers of one graph: its seed, drawn when it is first wanted, and what follows from it."""

    graph: Graph
    drawn: Node | None = None
    of_signs: dict[int, Node] = field(default_factory=dict)
    streams: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def seed(self, quantize: Node) -> Node:
        """The seed of the step."""
        if self.drawn is None:
            x = cast(Node, quantize.args[0])
            self.drawn = _draw_seed(self.graph, x.meta["val"].device)
        return self.drawn

    def sign_seed(self, quantize: Node) -> Node:
        """The seed of a GEMM's signs, made before the first quantisation (or tensor scale) of its operands."""
        gemm = quantize.meta["fp4_gemm"]
        if gemm not in self.of_signs:
            with self.graph.inserting_before(_first(quantize)):
                args = (self.seed(quantize), (gemm + 1) << 32)
                self.of_signs[gemm] = call(self.graph, torch.ops.aten.add.Tensor, args, quantize)
        return self.of_signs[gemm]

    def stream(self, quantize: Node, spec: Operand) -> int:
        """A number per tensor, axis and spec, and per GEMM where signs are its own."""
        gemm = quantize.meta["fp4_gemm"] if spec.signs == "fresh" else None
        return self.streams.setdefault((quantize.args[0], quantize.args[2], spec, gemm), len(self.streams))


def _first(quantize: Node) -> Node:
    """The first op that reads what is quantised: its tensor scale, if it has one."""
    scale = quantize.kwargs.get("tensor_scale")
    return scale if isinstance(scale, Node) else quantize


def _dequantize_of(quantize: Node) -> Node:
    return next(user for item in quantize.users for user in item.users if user.target is DEQUANTIZE)


def _transform(graph: Graph, quantize: Node, size: int, *signs: Node) -> None:
    """Put a Hadamard transform before the quantisation (and before its tensor scale)."""
    x, _, axis = quantize.args
    assert isinstance(x, Node) and isinstance(axis, int)
    first = _first(quantize)
    with graph.inserting_before(first):
        transformed = call(graph, OPS["hadamard"].overload, (x, axis, size, *signs), quantize)
    first.update_arg(0, transformed)
    quantize.update_arg(0, transformed)
    quantize.update_kwarg("dtype", x.meta["val"].dtype)  # what the values must fit, now that the input is fp32
    dequantize = _dequantize_of(quantize)
    with graph.inserting_before(dequantize):
        dequantize.update_arg(5, size_of(graph, transformed, axis))


def _stabilise(graph: Graph, quantize: Node, spec: Operand, stream: int, draws: _Draws) -> None:
    if spec.hadamard:
        signs = [draws.sign_seed(quantize)] if spec.signs == "fresh" else []
        _transform(graph, quantize, spec.hadamard, *signs)
    if spec.block_2d:
        quantize.update_kwarg("block_2d", True)
        _dequantize_of(quantize).update_arg(6, True)
    if spec.draws:
        options: dict[str, Any] = {"rounding": spec.rounding, "seed": draws.seed(quantize), "stream": stream}
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
        draws, done = _Draws(graph), 0
        for node in graph.find_nodes(op="call_function", target=QUANTIZE, sort=True):
            spec = node.meta.get("fp4_spec")
            if spec is None or node.meta.get("fp4_stable"):
                continue
            stream = draws.stream(node, spec)
            if spec.hadamard or spec.block_2d or spec.draws:
                _stabilise(graph, node, spec, stream, draws)
                done += 1
            node.meta["fp4_stable"] = True
        return done
