"""Hand packed operands to GEMMs that read them: FP4 tensor cores, where the device has them.

    mm(fake_quantize(%x, 'nvfp4', 1), permute(fake_quantize(%w, 'nvfp4', 1), [1, 0]))
    ->
    fp4compile.mm(%x_codes, %w_codes, a_scales=%x_scales, b_scales=%w_scales, a_format='nvfp4', b_format='nvfp4', k=...)

Codes have the blocked axis last, so that either operand of any GEMM is packed without a transposition.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.backend import Yes
from fp4compile.graph import GEMM_OPS, Site
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import arguments, call, fake_quantized, merge_equal, size_of

aten = torch.ops.aten
QUANTIZE, MM = OPS["quantize"].overload, OPS["mm"].overload
_GEMMS = (aten.mm.default, aten.addmm.default, MM)


def _operands(node: Node) -> tuple[Node, Node]:
    op = GEMM_OPS[node.target] if node.target is not MM else None
    return cast(tuple[Node, Node], node.args[:2] if op is None else (node.args[op.a], node.args[op.b]))


def _packed(graph: Graph, fake: Node, side: str) -> tuple[Node, dict[str, Any]]:
    """The codes of a fake quantisation and the arguments of `mm` that describe them."""
    quantized = call(graph, QUANTIZE, fake.args[:3], fake, **{k: v for k, v in fake.kwargs.items() if k != "fold"})
    codes, scales = (call(graph, operator.getitem, (quantized, i), fake) for i in (0, 1))
    described: dict[str, Any] = {f"{side}_scales": scales, f"{side}_format": fake.args[1]}
    if side == "b" and arguments(fake)["block_2d"]:
        described["b_block_2d"] = True
    return codes, described


def _rewrite(graph: Graph, site: Site, context: Context, kernels: set[str]) -> bool:
    node = site.node
    a, b = _operands(node)
    left = fake_quantized(a, 1)
    packed_b = bool(node.kwargs.get("b_format"))
    right = None if packed_b else fake_quantized(b, 0)
    if left is None or arguments(left)["block_2d"] or (right is None and not packed_b):
        return False
    options: dict[str, Any] = dict(node.kwargs)
    if node.target is aten.addmm.default:
        options = {"bias": node.args[0]}
    with graph.inserting_before(node):
        codes, described = _packed(graph, left, "a")
        options |= described | {"k": size_of(graph, left, cast(int, left.args[2])), "dtype": node.meta["val"].dtype}
        if right is not None:
            b, described = _packed(graph, right, "b")
            options |= described
        gemm = call(graph, MM, (codes, b), node, **options)
    if context.kernel(gemm)[0] not in kernels:
        graph.erase_node(gemm)  # what else was inserted is dead now
        return False
    site.replace(gemm)
    return True


@dataclass(frozen=True)
class Pack:
    """Replace GEMMs of fake-quantised operands by GEMMs of packed ones."""

    name: ClassVar[str] = "pack"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("packed",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        candidates = (k for k in context.backend.kernels if k.packed and k.device == context.device)
        kernels = {k.name for k in candidates if isinstance(k.available(), Yes)}
        if not kernels:
            return 0
        done = sum(_rewrite(graph, site, context, kernels) for site in context.sites if site.node.target in _GEMMS)
        graph.eliminate_dead_code()
        return done and done + merge_equal(graph, lambda node: node.target in (QUANTIZE, operator.getitem))
