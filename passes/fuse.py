"""Fuse the QDQ form into the ops that run.

    dequantize(packed weight) in mm         ->  fp4compile.mm on packed codes
    quantize(hadamard(x))                   ->  quantize(x, hadamard=n)
    dequantize(quantize(x))                 ->  fake_quantize(x)

A GEMM on dequantised operands with fp32 accumulation is the exact FP4 GEMM (their products fit), so a fake-quantised
operand in front of an ordinary GEMM is the fused form wherever no FP4 tensor core exists.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.backend import Answer, No, Yes
from fp4compile.graph import GEMM_OPS
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import Rule, apply, call

aten = torch.ops.aten
QUANTIZE, DEQUANTIZE = OPS["quantize"].overload, OPS["dequantize"].overload
HADAMARD, TENSOR_SCALE, MM = OPS["hadamard"].overload, OPS["tensor_scale"].overload, OPS["mm"].overload


def _after_hadamard(node: Node) -> Answer:
    x = node.args[0]
    return Yes() if isinstance(x, Node) and x.target is HADAMARD else No("its input is no Hadamard transform")


def _absorb_hadamard(graph: Graph, node: Node) -> Node:
    transform = node.args[0]
    assert isinstance(transform, Node)
    x, axis, size, *signs = transform.args
    options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    options["hadamard"] = size
    if signs:
        options["sign_seed"] = signs[0]
    args = (x, node.args[1], axis)
    return call(graph, node.target, args, node, **options)


def _pair(node: Node) -> Node | None:
    """The quantize whose codes and scales a dequantize reads, or None."""
    codes, scales = node.args[:2]
    items = [n for n in (codes, scales) if isinstance(n, Node) and n.target is operator.getitem]
    if len(items) != 2 or items[0].args[0] is not items[1].args[0]:
        return None
    source = items[0].args[0]
    return source if isinstance(source, Node) and source.target is QUANTIZE else None


def _of_quantize(node: Node) -> Answer:
    source = _pair(node)
    if source is None:
        return No("its codes do not come from a quantize of this graph")
    x = source.args[0]
    assert isinstance(x, Node)
    if node.args[7] != x.meta["val"].dtype or "dtype" in source.kwargs:
        return No("it decodes to another dtype than it was made from")
    made = (*source.args[1:], source.kwargs.get("block_2d", False))
    if made != (*node.args[3:5], node.args[6]) or node.args[2] not in (None, source.kwargs.get("tensor_scale")):
        return No("it decodes with another format, axis or scale than its codes were made with")
    return Yes()


def _fake_quantize(graph: Graph, node: Node) -> Node:
    source = _pair(node)
    assert source is not None
    options = dict(source.kwargs)
    if "tensor_scale" in options and node.args[2] is None:
        options["fold"] = False
    return call(graph, OPS["fake_quantize"].overload, source.args, node, **options)


def _packed_weight(node: Node) -> tuple[Node, Node] | None:
    """(operand, dequantize) when operand B is a constant, dequantised along K and without its tensor scale."""
    b = node.args[1 if node.target is MM else GEMM_OPS[node.target].b]
    assert isinstance(b, Node)
    transposed = b.target is aten.permute.default and list(b.args[1]) == [1, 0]  # type: ignore[arg-type]
    inner = b.args[0] if transposed else b
    if not isinstance(inner, Node) or inner.target is not DEQUANTIZE:
        return None
    constant = all(isinstance(n, Node) and n.op in ("get_attr", "placeholder") for n in inner.args[:2])
    unscaled = inner.args[2] is None
    blocked_along_k = inner.args[4] == (1 if transposed else 0)
    return (b, inner) if constant and unscaled and blocked_along_k and inner.meta["val"].dim() == 2 else None


def _reads_packed_weight(node: Node) -> Answer:
    if node.kwargs.get("b_format"):
        return No("already packed")
    return Yes() if _packed_weight(node) else No("operand B is no packed constant")


def _packed_gemm(graph: Graph, node: Node) -> Node:
    found = _packed_weight(node)
    assert found is not None
    codes, scales, _, format, _, size, block_2d, _ = found[1].args
    if node.target is MM:
        a, options = node.args[0], dict(node.kwargs)
    else:
        op = GEMM_OPS[node.target]
        a, options = node.args[op.a], {"bias": node.args[0]} if node.target is aten.addmm.default else {}
    options |= {"b_scales": scales, "b_format": format, "k": size}
    if block_2d:
        options["b_block_2d"] = True
    return call(graph, MM, (a, codes), node, **options)


# Rules run in groups: a weight that stays packed must not become fake quantisation first.
GROUPS = (
    (Rule((aten.mm.default, aten.addmm.default, MM), _reads_packed_weight, _packed_gemm),),
    (Rule((QUANTIZE, TENSOR_SCALE), _after_hadamard, _absorb_hadamard),),
    (Rule((DEQUANTIZE,), _of_quantize, _fake_quantize),),
)


@dataclass(frozen=True)
class Fuse:
    """Fuse quantise-dequantise pairs, transforms and packed weights."""

    name: ClassVar[str] = "fuse"
    needs: ClassVar[tuple[str, ...]] = ("qdq",)
    gives: ClassVar[tuple[str, ...]] = ("fused",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph, done = graph_module.graph, 0
        sites = {site.node: site for site in context.sites}

        def follow(old: Node, new: Node) -> None:
            if old in sites:
                sites[old].follow(new)

        for rules in GROUPS:
            done += apply(graph, rules, follow)
            graph.eliminate_dead_code()
        return done
