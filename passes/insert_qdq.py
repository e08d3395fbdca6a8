"""Each FP4 operand becomes the dequantised form of its quantised self, blocked along its contraction axis.

    mm(%x, permute(%w, [1, 0]))
    ->
    %codes, %scales = quantize(%x, 'hif4', 1)
    %wc, %ws        = quantize(%w, 'hif4', 1)          # seen through the permute: W itself, blocked along K
    mm(dequantize(%codes, %scales, ...), permute(dequantize(%wc, %ws, ...), [1, 0]))

A per-tensor scale stays out of the operands, so that these are exact in bf16; it multiplies the fp32 accumulator:

    mm(a, b)                 ->  fp4compile.mm(a, b, a_tensor_scale=..., b_tensor_scale=...)
    _grouped_mm(a, b, ends)  ->  fp4compile.grouped_mm(a, b, ends, a_tensor_scale=..., b_tensor_scale=...)

The tokens of all experts have one scale, and so has a stack of weights. What lies behind the tokens of the last
expert may be anything, as grouped GEMMs leave it unwritten: it is zero where such a scale is taken.

    %inside = lt(iota(tokens), select(%ends, 0, -1))
    %x      = where(unsqueeze(%inside, 1), %x, 0)

A backward operand that the recipe requantises is made from the dequantised form that the forward GEMM reads; the tensor
scale which that leaves out goes to the accumulator as well.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.formats import FORMATS
from fp4compile.graph import GEMM_OPS, Site, forward_of
from fp4compile.grouped import token_axes
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.recipe import Operand
from fp4compile.rewrite import call, merge_equal, size_of, through_permute

aten, prims = torch.ops.aten, torch.ops.prims
PAD = OPS["pad_groups"].overload
# Merged at once: one tensor that several GEMMs read stays one, and its quantisations share random numbers.
_CLEARING = (
    aten.sym_size.int,
    aten.select.int,
    prims.iota.default,
    aten.lt.Tensor,
    aten.unsqueeze.default,
    aten.full.default,
    aten.where.self,
)


def _forward_values(site: Site, name: str, sites: Sequence[Site]) -> tuple[Node, Node | None]:
    """What the forward GEMM reads as the operand, below its permute, and the tensor scale that is left out of it."""
    owner = forward_of(site, sites)
    assert owner is not None  # annotate has refused the site otherwise
    values, _, _ = through_permute(owner.operand(name), owner.axes[name])
    codes = cast(Node, values.args[0])
    quantized = cast(Node, codes.args[0])
    return values, cast("Node | None", quantized.kwargs.get("tensor_scale"))


def _laid_out_as(graph: Graph, operand: Node, values: Node, like: Node) -> Node:
    """The values, their groups of tokens padded where those of the operand are."""
    pad = operand.args[0] if operand.target is operator.getitem else None
    if not isinstance(pad, Node) or pad.target is not PAD:
        return values
    padded = call(graph, PAD, (values, *pad.args[1:]), like)
    return call(graph, operator.getitem, (padded, 0), like)


def _axis_of_tokens(site: Site, name: str) -> int | None:
    """The axis of an operand, below its permute, that runs over groups of tokens and over what no group holds."""
    op = GEMM_OPS[site.node.target]
    if op.ends is None or site.contracts_tokens_of_groups:  # these are padded, without what no group holds
        return None
    a, b = (cast(Node, site.node.args[i]).meta["val"] for i in (op.a, op.b))
    axis = token_axes(a, b)[(op.a, op.b).index(site.arguments[name])]
    return None if axis is None else through_permute(site.operand(name), axis)[1]


def _cleared_behind_groups(graph: Graph, site: Site, base: Node, axis: int) -> Node:
    """The operand with zeros for what lies behind the last group."""
    like, value = site.node, base.meta["val"]
    ends = cast(Node, like.args[cast(int, GEMM_OPS[like.target].ends)])
    last = call(graph, aten.select.int, (ends, 0, -1), like)
    options = {"start": 0, "step": 1, "dtype": torch.int64, "device": value.device, "requires_grad": False}
    each = call(graph, prims.iota.default, (size_of(graph, base, axis),), like, **options)
    inside = call(graph, aten.lt.Tensor, (each, last), like)
    inside = call(graph, aten.unsqueeze.default, (inside, 1 - axis), like)
    zero = call(graph, aten.full.default, ([], 0), like, dtype=value.dtype, device=value.device)
    return call(graph, aten.where.self, (inside, base, zero), like)


def _product(graph: Graph, scales: Sequence[Node | None], like: Node) -> Node | None:
    first, second = scales
    if first is None or second is None:
        return first or second
    return call(graph, aten.mul.Tensor, (first, second), like)


def _qdq(graph: Graph, site: Site, name: str, spec: Operand, sites: Sequence[Site]) -> tuple[Node, Node | None]:
    """The operand's dequantised form and its tensor scale, inserted before the GEMM."""
    base, axis, order = through_permute(site.operand(name), site.axes[name])
    like = site.node
    scale = left_out = None
    options: dict[str, Any] = {}
    if spec.requantise:
        values, left_out = _forward_values(site, name, sites)
        base = _laid_out_as(graph, base, values, like)
    if spec.scale_rule is not None:
        options["scale_rule"] = spec.scale_rule
    if spec.scaled_per_tensor:
        tokens = _axis_of_tokens(site, name)
        if tokens is not None and FORMATS[spec.format].is_scaled_by_amax(spec.scale_rule):
            base = _cleared_behind_groups(graph, site, base, tokens)
        scale = call(graph, OPS["tensor_scale"].overload, (base, spec.format), like, **options)
        options["tensor_scale"] = scale
    quantized = call(graph, OPS["quantize"].overload, (base, spec.format, axis), like, **options)
    quantized.meta["fp4_spec"], quantized.meta["fp4_gemm"] = spec, sites.index(site)
    codes, scales = (call(graph, operator.getitem, (quantized, i), like) for i in (0, 1))
    size, dtype = size_of(graph, base, axis), base.meta["val"].dtype
    values = call(graph, OPS["dequantize"].overload, (codes, scales, None, spec.format, axis, size, False, dtype), like)
    if order is not None:
        values = call(graph, aten.permute.default, (values, order), like)
    return values, _product(graph, (left_out, scale), like)


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
    base = through_permute(operand, 0)[0]
    return base.target is OPS["dequantize"].overload


def _rewrite(graph: Graph, site: Site, sites: Sequence[Site]) -> int:
    done, scales = 0, {}
    with graph.inserting_before(site.node):
        for name, spec in site.specs.items():
            if spec is not None and not _is_quantised(site.operand(name)):
                values, scales[name] = _qdq(graph, site, name, spec, sites)
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
        graph = graph_module.graph
        done = sum(_rewrite(graph, site, context.sites) for site in context.sites if site.status == "fp4")
        merge_equal(graph, lambda node: bool(node.meta.get("fp4compile")) and node.target in _CLEARING)
        return done
