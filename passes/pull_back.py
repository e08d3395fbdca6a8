"""Gradients of what the forward transformed or clipped come back to the tensor that it was made from.

    %dx = mm(%dy, %wq)                     # in the basis of the forward's transform, as the requantised %wq is
    ->
    %gemm = mm(%dy, %wq)
    %dx   = quantize_backward(%gemm, %x, 'mxfp4', 1, scale_rule='gaussian', hadamard=32, transformed=True)

With a clip mask no gradient reaches elements that lie beyond the grid (the clipped straight-through estimator of QuEST,
arXiv:2502.05003, and Quartet, arXiv:2505.14669). The mask is computed anew from the tensor: nothing is kept for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch.fx import Graph, GraphModule, Node

from fp4compile.errors import RewriteError
from fp4compile.graph import Site, forward_of
from fp4compile.ops import OPS
from fp4compile.pipeline import Context
from fp4compile.recipe import Role
from fp4compile.rewrite import arguments, call, through_permute

HADAMARD, BACKWARD = OPS["hadamard"].overload, OPS["quantize_backward"].overload
# Role -> the forward operand whose gradient the GEMM gives, and the operand that it shares with the forward.
_GRADIENT_OF: dict[Role, tuple[str, str]] = {"dgrad": ("input", "weight"), "wgrad": ("weight", "input")}
# What of the forward's quantisation a clip mask depends on.
_OPTIONS = ("scale_rule", "block_2d", "tensor_scale")


def _owner(site: Site, context: Context) -> Site | None:
    """The forward GEMM of a backward one, if it is FP4; raises where a clip mask would be lost."""
    owner = forward_of(site, context.sites)
    rule = context.rule_for(site, "forward")
    if owner is None and rule and any(spec.clip_mask for spec in rule.operands.values() if spec):
        raise RewriteError(
            f"recipe {context.recipe.name!r} asks for a clip mask, but it is not certain which forward GEMM the "
            f"{site.where} belongs to. Keep it (keep=[{context.glob(site)!r}])"
        )
    return owner if owner and owner.status == "fp4" else None


def _quantize_of(site: Site, name: str) -> Node:
    """The quantize of an FP4 operand."""
    values, _, _ = through_permute(site.operand(name), site.axes[name])
    return cast(Node, cast(Node, values.args[0]).args[0])


def _rewrite(graph: Graph, site: Site, context: Context) -> bool:
    operand, shared = _GRADIENT_OF[site.role]
    owner = _owner(site, context)
    spec, again = owner.specs.get(operand) if owner else None, site.specs.get(shared)
    transformed = bool(spec and spec.hadamard and again and again.requantise)
    if owner is None or spec is None or not (spec.clip_mask or transformed):
        return False
    if any(user.target is BACKWARD for user in site.node.users):
        return False
    quantized = _quantize_of(owner, operand)
    x, format, axis = cast(tuple[Node, str, int], quantized.args)
    options: dict[str, Any] = {k: v for k, v in quantized.kwargs.items() if k in _OPTIONS and spec.clip_mask}
    if x.target is HADAMARD:
        transform = arguments(x)
        x = transform["x"]
        options |= {"hadamard": transform["size"], "sign_seed": transform["seed"], "transformed": transformed}
    first = site.arguments[shared] == min(site.arguments.values())
    ndim = site.node.meta["val"].dim()
    features = ndim - 2 if first else ndim - 1
    original = x if spec.clip_mask else None
    if original is not None and axis % ndim != features:
        with graph.inserting_before(site.node):
            order = [*range(ndim - 2), ndim - 1, ndim - 2]
            original = call(graph, torch.ops.aten.permute.default, (original, order), site.node)
    with graph.inserting_after(site.node):
        given = {name: option for name, option in options.items() if option is not None}
        pulled = call(graph, BACKWARD, (site.node, original, format, features), site.node, **given)
    site.node.replace_all_uses_with(pulled, delete_user_cb=lambda user: user is not pulled)
    return True


@dataclass(frozen=True)
class PullBack:
    """Undo the forward's transform on gradients, and clip them where it clipped."""

    name: ClassVar[str] = "pull_back"
    needs: ClassVar[tuple[str, ...]] = ("stabilised",)
    gives: ClassVar[tuple[str, ...]] = ("pulled_back",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        graph = graph_module.graph
        return sum(_rewrite(graph, site, context) for site in context.sites if site.role in _GRADIENT_OF)
