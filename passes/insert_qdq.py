"""Each FP4 operand becomes the dequantised form of its quantised self, blocked along its contraction axis.

    mm(%x, permute(%w, [1, 0]))
    ->
    %codes, %scales = quantize(%x, 'hif4', 1)
    %wc, %ws        = quantize(%w, 'hif4', 1)          # seen through the permute: W itself, blocked along K
    mm(dequantize(%codes, %scales, ...), permute(dequantize(%wc, %ws, ...), [1, 0]))

A per-tensor scale stays out of the operands, so that these are exact in bf16; it multiplies the fp32 accumulator:

    mm(a, b)                 ->  fp4compile.mm(a, b, a_tensor_scale=..., b_tensor_scale=...)
    _grouped_mm(a, b, ends)  ->  fp4compile.grouped_mm(a, b, ends, a_tensor_scale=..., b_tensor_scale=...)

The tokens of all experts have one scale, and so has a stack of weights.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.graph import GEMM_OPS, Site
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.recipe import Operand
from fp4compile.rewrite import call, size_of

aten = torch.ops.aten


def _through_permute(operand: Node, axis: int) -> tuple[Node, int, list[int] | None]:
    """The tensor below one permute, the axis counted there, and the permute's order."""
    ndim = operand.meta["val"].dim()
    axis %= ndim
    if operand.target is not aten.permute.default:
        return operand, axis, None
    base, dims = cast(tuple[Node, list[int]], operand.args)
    order = [d % ndim for d in dims]
    return base, order[axis], order


def _qdq(graph: Graph, site: Site, name: str, spec: Operand) -> tuple[Node, Node | None]:
    """The operand's dequantised form and its tensor scale, inserted before the GEMM."""
    base, axis, order = _through_permute(site.operand(name), site.axes[name])
    like = site.node
    scale = None
    options: dict[str, Any] = {}
    if spec.scale_rule is not None:
        options["scale_rule"] = spec.scale_rule
    if spec.scaled_per_tensor:
        scale = call(graph, OPS["tensor_scale"].overload, (base, spec.format), like)
        options["tensor_scale"] = scale
    quantized = call(graph, OPS["quantize"].overload, (base, spec.format, axis), like, **options)
    quantized.meta["fp4_spec"] = spec
    codes, scales = (call(graph, operator.getitem, (quantized, i), like) for i in (0, 1))
    size, dtype = size_of(graph, base, axis), base.meta["val"].dtype
    values = call(graph, OPS["dequantize"].overload, (codes, scales, None, spec.format, axis, size, False, dtype), like)
    if order is not None:
        values = call(graph, aten.permute.default, (values, order), like)
    return values, scale


def _scaled_gemm(graph: Graph, site: Site, scales: dict[str, Node | None]) -> None:
    """Replace the GEMM by the op of ours that applies tensor scales to the accumulator."""
    node, op = site.node, GEMM_OPS[site.node.target]
    by_position = {site.arguments[name]: scale for name, scale in scales.items()}
    options: dict[str, Any] = {"a_tensor_scale": by_position.get(op.a), "b_tensor_scale": by_position.get(op.b)}
    if op.bias is not None:
        options["bias"] = node.args[op.bias]
    options = {k: v for k, v in options.items() if v is not None}
    operands = tuple(node.args[i] for i in (op.a, op.b, op.ends) if i is not None)
    site.replace(call(graph, OPS[op.scaled].overload, operands, node, **options))


def _is_quantised(operand: Node) -> bool:
    base = _through_permute(operand, 0)[0]
    return base.target is OPS["dequantize"].overload


def _rewrite(graph: Graph, site: Site) -> int:
    done, scales = 0, {}
    with graph.inserting_before(site.node):
        for name, spec in site.specs.items():
            if spec is not None and not _is_quantised(site.operand(name)):
                values, scales[name] = _qdq(graph, site, name, spec)
                site.node.update_arg(site.arguments[name], values)
                done += 1
        if any(scale is not None for scale in scales.values()):
            _scaled_gemm(graph, site, scales)
    return done


@dataclass(frozen=True)
class InsertQDQ:
    """Quantise and dequantise every operand that the recipe wants in FP4."""

    name: ClassVar[str] = "insert_qdq"
    needs: ClassVar[tuple[str, ...]] = ("padded",)
    gives: ClassVar[tuple[str, ...]] = ("qdq",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        return sum(_rewrite(graph_module.graph, site) for site in context.sites if site.status == "fp4")
