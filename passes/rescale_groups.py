"""Multiply the tokens of experts with their weights as FP8 with one scale per row, where a kernel does so.

    _grouped_mm(fake_quantize(%x, 'mxfp4', 1), permute(fake_quantize(%w, 'mxfp4', 2), [0, 2, 1]), %ends)
    ->
    %rows = view(%w, [experts * n, k])
    %x8, %x_scale, %x_exponents, %x_flags = quantize_rowwise(%x, 'mxfp4', 1)
    %w8, %w_scale, %w_exponents, %w_flags = quantize_rowwise(%rows, 'mxfp4', 1)
    grouped_mm_rowwise(%x8, %x_scale, ..., %w8, %w_scale, ..., %ends, dtype)

A stack [experts, k, n] that contracts over its middle axis is the matrix [experts * k, n], quantised along axis 0: each
of its rows has a part for every expert, and one scale for all of them. No block of it may hold values of two experts.

torch's grouped GEMM takes E4M3 alone. Gradients span more: along the tokens nearly every row of a wgrad would be
computed again, along the features so many of a dgrad's that on an H100 it cost more than it saved. Where experts have
few tokens, torch's GEMM in BF16 is the faster one (benchmarks/NOTES.md). So it is the forward of many tokens that
becomes FP8; the options say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch.fx import GraphModule, Node

from fp4compile import rowwise
from fp4compile.formats import FORMATS
from fp4compile.graph import Site, dims, size_hint
from fp4compile.ops import OPS
from fp4compile.passes.rescale import RowRewriter, refusal
from fp4compile.pipeline import Context
from fp4compile.recipe import Role
from fp4compile.rewrite import arguments, call, fake_quantized, through_permute

aten = torch.ops.aten
FAKE, GROUPED_MM_ROWWISE = OPS["fake_quantize"].overload, OPS["grouped_mm_rowwise"].overload


def _operand_refusal(fake: Node | None) -> str | None:
    """Why an operand cannot be FP8 in rows, or None; `fake` is what it fake-quantises, if it does."""
    if fake is None:
        return "an operand is not quantised along the contraction axis"
    return refusal(fake) or (None if dims(fake) == 2 else _no_matrix(fake))


def _no_matrix(fake: Node) -> str | None:
    """Why a stack of weights is no matrix of rows, or None."""
    x, given = cast(Node, fake.args[0]).meta["val"], arguments(fake)
    if not x.is_contiguous():
        return "the stack of weights is not contiguous"
    whole = math.lcm(FORMATS[given["format"]].block, given["hadamard"] or 1)
    if given["axis"] % 3 == 1 and x.shape[1] % whole != 0:
        return f"the {x.shape[1]} rows of each matrix are no whole blocks of {whole}"
    return None


def _stack(operand: Node) -> Node | None:
    """The fake quantisation along the contraction axis of a stack of weights, below one transposition."""
    inner, axis, _ = through_permute(operand, 1)
    if inner.target is not FAKE or dims(inner) != 3 or axis == 0:
        return None
    return inner if arguments(inner)["axis"] % 3 == axis else None


class _Rewriter(RowRewriter):
    """The rewrite of GEMMs of tokens and stacks of weights."""

    def gemm(self, site: Site, least_tokens: int) -> bool:
        """Rewrite one GEMM, unless there are too few tokens, or an operand or the backend's kernels object."""
        tokens, weights, ends = cast(tuple[Node, Node, Node], site.node.args[:3])
        operands = fake_quantized(tokens, 1), _stack(weights)
        each = size_hint(tokens.meta["val"].shape[0]) // size_hint(weights.meta["val"].shape[0])
        if each < least_tokens:
            return self.refuse(f"fewer than {least_tokens} tokens an expert")
        reason = next(filter(None, map(_operand_refusal, operands)), None)
        if reason is not None:
            return self.refuse(reason)
        parts = [self._operand(fake) for fake in operands if fake is not None]
        return self.multiply(site, GROUPED_MM_ROWWISE, parts, ends)

    def _operand(self, fake: Node) -> list[Node]:
        if fake not in self.made:
            x, format, axis, *others = fake.args
            if dims(fake) == 3:
                stack = cast(Node, x)
                experts, rows, columns = stack.meta["val"].shape
                with self.graph.inserting_before(fake):
                    x = call(self.graph, aten.view.default, (stack, [experts * rows, columns]), stack)
                axis = cast(int, axis) % 3 - 1
            self.made[fake] = self.quantized(fake, (x, format, axis, *others), **fake.kwargs)
        return self.made[fake]


def _is_of_tokens_and_weights(site: Site) -> bool:
    """Whether a GEMM multiplies rows of tokens with a stack of weights, both in formats that FP8 may hold."""
    formats = [spec.format for spec in site.specs.values() if spec]
    if site.node.target is not aten._grouped_mm.default or len(formats) != len(site.arguments) or site.node.kwargs:
        return False
    held = all(rowwise.refusal(FORMATS[name]) is None for name in formats)
    return held and [dims(cast(Node, operand)) for operand in site.node.args[:2]] == [2, 3]


@dataclass(frozen=True)
class RescaleGroups:
    """Replace GEMMs of tokens and experts by row-wise scaled FP8 GEMMs of the same values.

    Attributes:
        roles: of the GEMMs that are replaced: "forward", "dgrad".
        least_tokens: of an expert on average, as the graph was traced.
    """

    roles: tuple[Role, ...] = ("forward",)
    least_tokens: int = 1024

    name: ClassVar[str] = "rescale_groups"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("in_groups",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        kernels = {kernel.op for kernel in context.backend.kernels if kernel.device == context.device}
        if "grouped_mm_rowwise" not in kernels:
            return 0
        rewriter = _Rewriter(graph_module.graph, context)
        of_roles = (site for site in context.sites if site.status == "fp4" and site.role in self.roles)
        wanted = list(filter(_is_of_tokens_and_weights, of_roles))
        done = sum(rewriter.gemm(site, self.least_tokens) for site in wanted)
        graph_module.graph.eliminate_dead_code()
        notes = [f"{count} FP4 GEMMs of experts stay off FP8: {reason}" for reason, count in rewriter.refused.items()]
        context.notes += notes
        return done
