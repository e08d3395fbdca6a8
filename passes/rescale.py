"""Multiply FP4 operands as FP8 with one scale per row, where a kernel does so and FP8 holds their values.

    mm(fake_quantize(%x, 'mxfp4', 1), permute(fake_quantize(%w, 'mxfp4', 1), [1, 0]))
    ->
    %x8, %x_scale, %x_exponents, %x_flags = quantize_rowwise(%x, 'mxfp4', 1)
    %w8, %w_scale, %w_exponents, %w_flags = quantize_rowwise(%w, 'mxfp4', 1)
    mm_rowwise(%x8, %x_scale, ..., %w8, %w_scale, ..., dtype)

Gradients, whose blocks differ most, become E5M2, all others E4M3.

A tensor that one half of the step wants along both axes, as dgrad and wgrad want the gradient, is read once.

    quantize_rowwise(%dy, ..., 0, e5m2=True), quantize_rowwise(%dy, ..., 1, e5m2=True)
    ->
    quantize_rowwise_both(%dy, ..., e5m2=True)
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile import rowwise
from fp4compile.formats import FORMATS
from fp4compile.graph import GEMM_OPS, Site, is_backward
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.rewrite import arguments, call, fake_quantized, producer_of

aten = torch.ops.aten
QUANTIZE_ROWWISE, QUANTIZE_ROWWISE_BOTH = OPS["quantize_rowwise"].overload, OPS["quantize_rowwise_both"].overload
MM_ROWWISE = OPS["mm_rowwise"].overload
_PARTS = 4  # values, scale, exponents, flags
# What `quantize_rowwise_both` takes per axis, and what both axes share.
_PER_AXIS = ("rounding", "scale_rule", "stream", "hadamard")
_SHARED = ("seed", "sign_seed", "e5m2")


def refusal(fake: Node) -> str | None:
    """Why what an operand fake-quantises cannot be FP8 in rows, or None."""
    given = arguments(fake)
    reason = rowwise.refusal(FORMATS[given["format"]])
    if reason is None and given["block_2d"]:
        reason = "2-D blocks"
    if reason is None and not set(fake.kwargs) <= set(OPS["quantize_rowwise"].signature.parameters):
        reason = "an operand has a tensor scale"
    return reason


@dataclass
class RowRewriter:
    """A rewrite of GEMMs of one graph; `made` holds the four parts of each operand that was quantised anew."""

    graph: Graph
    context: Context
    made: dict[Any, list[Node]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)

    def multiply(self, site: Site, op: Any, parts: Sequence[list[Node]], *others: Any, **options: Any) -> bool:
        """Put `op` of operands in rows in a site's place, unless the backend's kernels object."""
        node = site.node
        with self.graph.inserting_before(node):
            gemm = call(self.graph, op, (*parts[0], *parts[1], *others, node.meta["val"].dtype), node, **options)
        for made in (*(cast(Node, values.args[0]) for values, *_ in parts), gemm):
            if not self.context.has_kernel(made):
                self.graph.erase_node(gemm)
                return self.refuse("; ".join(self.context.kernel(made)[1]))
        site.replace(gemm, b=_PARTS)
        site.axes = dict.fromkeys(site.axes, -1)
        return True

    def refuse(self, reason: str) -> bool:
        """Leave a GEMM as it is."""
        self.refused[reason] += 1
        return False

    def quantized(self, fake: Node, args: tuple[Any, ...], **options: Any) -> list[Node]:
        """The four parts of what `fake` quantises, made where it stands."""
        with self.graph.inserting_before(fake):
            node = call(self.graph, QUANTIZE_ROWWISE, args, fake, **options)
            return [call(self.graph, operator.getitem, (node, i), fake) for i in range(_PARTS)]


def _operand_refusal(fake: Node | None) -> str | None:
    """Why an operand cannot be FP8 in rows, or None; `fake` is what it fake-quantises, if it does."""
    return "an operand is not quantised along the contraction axis of a matrix" if fake is None else refusal(fake)


class _Rewriter(RowRewriter):
    """The rewrite of GEMMs of matrices, and of quantisations that read one tensor along both axes."""

    def gemm(self, site: Site) -> bool:
        """Rewrite one GEMM, unless an operand or the backend's kernels object."""
        node, op = site.node, GEMM_OPS[site.node.target]
        if node.target not in (aten.mm.default, aten.addmm.default):
            return self.refuse("a batched or grouped GEMM")
        operands = [fake_quantized(cast(Node, node.args[i]), axis) for i, axis in ((op.a, 1), (op.b, 0))]
        reason = next(filter(None, map(_operand_refusal, operands)), None)
        if reason is not None:
            return self.refuse(reason)
        bias = {"bias": cast(Node, node.args[0])} if node.target is aten.addmm.default else {}
        if node.kwargs or any(added.meta["val"].dim() != 1 for added in bias.values()):
            return self.refuse("what is added is not one bias per column")
        e5m2 = [site.arguments.get("grad") == position for position in (op.a, op.b)]
        parts = [self._operand(fake, wide) for fake, wide in zip(operands, e5m2, strict=True) if fake is not None]
        return self.multiply(site, MM_ROWWISE, parts, **bias)

    def _operand(self, fake: Node, e5m2: bool) -> list[Node]:
        key = fake, e5m2
        if key not in self.made:
            options = {**fake.kwargs, **({"e5m2": True} if e5m2 else {})}
            self.made[key] = self.quantized(fake, fake.args, **options)
        return self.made[key]

    def pairs(self) -> int:
        """Quantise along both axes at once where that needs no more memory; the number of pairs."""
        found: dict[Any, list[Node]] = defaultdict(list)
        for node in self.graph.find_nodes(op="call_function", target=QUANTIZE_ROWWISE, sort=True):
            given = arguments(node)
            key = given["x"], given["format"], is_backward(node), given["e5m2"], *producer_of(node).items()
            found[key].append(node)
        return sum(map(self._pair, found.values()))

    def _pair(self, nodes: Sequence[Node]) -> bool:
        """Join the first quantisation along each axis, if there is one along either."""
        first = {arguments(node)["axis"] % 2: node for node in reversed(nodes)}
        given = [arguments(first[axis]) for axis in sorted(first)]
        shared = {name: {each[name] for each in given} - {None, False} for name in _SHARED}
        if len(first) != 2 or any(len(values) > 1 for values in shared.values()):
            return False
        fmt = FORMATS[given[0]["format"]]
        options = {name: [each[name] for each in given] for name in _PER_AXIS}
        options["scale_rule"] = [fmt.rule(rule) for rule in options["scale_rule"]]
        options |= {name: next(iter(values)) for name, values in shared.items() if values}
        options |= producer_of(nodes[0])
        early = min(first.values(), key=nodes.index)
        with self.graph.inserting_before(early):
            both = call(self.graph, QUANTIZE_ROWWISE_BOTH, early.args[:2], early, **options)
            if not self.context.has_kernel(both):
                self.graph.erase_node(both)
                return False
            parts = [call(self.graph, operator.getitem, (both, i), early) for i in range(2 * _PARTS)]
        for axis, node in first.items():
            for item in list(node.users):
                item.replace_all_uses_with(parts[_PARTS * axis + item.args[1]])
                self.graph.erase_node(item)
            self.graph.erase_node(node)
        return True


@dataclass(frozen=True)
class Rescale:
    """Replace GEMMs of fake-quantised operands by row-wise scaled FP8 GEMMs of the same values."""

    name: ClassVar[str] = "rescale"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("rescaled",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        kernels = {kernel.op for kernel in context.backend.kernels if kernel.device == context.device}
        if "mm_rowwise" not in kernels:
            return 0
        rewriter = _Rewriter(graph_module.graph, context)
        wanted = [site for site in context.sites if site.status == "fp4" and _reads_fake_quantised(site)]
        done = sum(map(rewriter.gemm, wanted))
        graph_module.graph.eliminate_dead_code()
        rewriter.pairs()
        context.notes += [f"{count} FP4 GEMMs stay off FP8: {reason}" for reason, count in rewriter.refused.items()]
        return done


def join(graph: Graph, context: Context) -> int:
    """Quantise in one op what one half quantises in rows along both axes, where a kernel does; the number of pairs."""
    return _Rewriter(graph, context).pairs()


def _reads_fake_quantised(site: Site) -> bool:
    """Whether a GEMM reads two operands in formats that FP8 may hold, neither of them packed."""
    formats = [spec.format for spec in site.specs.values() if spec]
    held = len(formats) == len(site.arguments) and site.node.target in GEMM_OPS
    return held and all(rowwise.refusal(FORMATS[name]) is None for name in formats)
