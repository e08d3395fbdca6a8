"""The recipe writes its decision on each site; the graph stays as it is.

    mm(%x, %w)   # forward layers.0.q_proj: fp4, input hif4, weight hif4
    mm(%h, %w2)  # forward lm_head: kept, output head

A GEMM that the recipe wants in FP4 and that cannot be is refused: an error when strict, else reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from fp4compile.backend import No
from fp4compile.errors import RewriteError
from fp4compile.formats import FORMATS
from fp4compile.graph import FUSED_LAYERS, GEMM_OPS, Site, forward_of
from fp4compile.pipeline import Context
from fp4compile.recipe import HEADS, Operand, Recipe
from fp4compile.rewrite import through_permute


def _head(site: Site, context: Context) -> str | None:
    if not context.recipe.keep_heads:
        return None
    if site.parameter in context.embeddings:
        return "output head (tied to an embedding)"
    return "output head" if site.path.rpartition(".")[2] in HEADS else None


def _router(site: Site, context: Context) -> str | None:
    return "router logits" if context.recipe.keep_routers and site.parameter in context.routers else None


def _made(site: Site, context: Context) -> str | None:
    return "it makes a weight: no input of the model reaches it" if site.makes_weight else None


def _glob(site: Site, context: Context) -> str | None:
    glob = context.kept_by(site)
    return f"keep={glob!r}" if glob else None


def _depth(site: Site, context: Context) -> str | None:
    """Whether the site lies in one of the first or last blocks of the outermost block list above it."""
    recipe = context.recipe
    if not recipe.keeps_by_depth:
        return None
    if context.inner:
        raise RewriteError(
            f"recipe {recipe.name!r} keeps {_kept_blocks(recipe)} of the blocks, but this is "
            f"(part of) one block of a larger model, so the depth of {site.path!r} is not known. Compile the "
            "whole model, or use a recipe with keep_last = 0 (keep_first_n and keep_last_n too) that names the modules "
            "to keep."
        )
    for prefix in sorted(context.depths, key=len):
        found = re.match(rf"{re.escape(prefix)}\.(\d+)(\.|$)", site.path)
        if found:
            number, depth = int(found[1]), context.depths[prefix]
            last = max(int(depth * recipe.keep_last + 0.5), recipe.keep_last_n)
            kept = number < recipe.keep_first_n or number >= depth - last
            return f"among {_kept_blocks(recipe)} of {depth} blocks" if kept else None
    return None


def _kept_blocks(recipe: Recipe) -> str:
    """Which blocks a recipe keeps in high precision."""
    parts = {
        f"the first {recipe.keep_first_n}": recipe.keep_first_n,
        f"the last {recipe.keep_last:.0%}": recipe.keep_last,
        f"the last {recipe.keep_last_n}": recipe.keep_last_n,
    }
    return " and ".join(part for part, applies in parts.items() if applies)


_REASONS_TO_KEEP = (_head, _router, _made, _glob, _depth)


def _obstacle(site: Site, specs: dict[str, Operand | None], context: Context) -> str | None:
    """Why a GEMM that the recipe wants in FP4 cannot be."""
    if site.node.target not in GEMM_OPS:
        if not site.arguments:
            return f"it lies in a graph of its own within {site.node.target}, which no pass rewrites"
        remedy = FUSED_LAYERS.get(site.node.target)
        return f"the op {site.node.target} hides its GEMM from the graph" + (f"; {remedy}" if remedy else "")
    if site.gathered:
        return "each token multiplies a copy of its own of one of a stack of matrices, in a form that is not grouped"
    for name, spec in specs.items():
        if spec is None:
            continue
        answer = context.backend.supports_format(spec.format, context.device)
        if isinstance(answer, No):
            return f"backend {context.backend.name!r} lacks format {spec.format!r} on {context.device}: {answer.reason}"
        value = site.operand(name).meta["val"]
        if not value.is_floating_point():
            return f"operand {name!r} is {value.dtype}"
        size = value.shape[site.axes[name]]
        token_axis = site.role == "wgrad"  # padded with zeros, as both operands are
        if spec.hadamard and not token_axis and size % spec.hadamard != 0:
            return f"a Hadamard transform of size {spec.hadamard} does not divide the {size} features it runs along"
        if spec.requantise:
            reason = _not_requantised(site, name, context)
            if reason:
                return reason
    return None


def _not_requantised(site: Site, name: str, context: Context) -> str | None:
    """Why a backward operand cannot be made from what its forward GEMM read."""
    owner = forward_of(site, context.sites)
    if owner is None:
        return f"operand {name!r} is to be requantised, and which forward GEMM read it is not certain"
    if owner.specs.get(name) is None:
        return f"operand {name!r} is to be requantised, and its forward GEMM reads it in high precision"
    here, there = (through_permute(s.operand(name), s.axes[name])[0] for s in (site, owner))
    return None if here is there else f"operand {name!r} is to be requantised, and is not the forward's tensor"


def _annotate(site: Site, context: Context) -> None:
    site.status, site.specs = "kept", dict.fromkeys(site.arguments)
    for reason in _REASONS_TO_KEEP:
        site.reason = reason(site, context) or ""
        if site.reason:
            return
    divided = context.divided(site)
    if divided:
        context.refuse(site, divided)
        return
    rule = context.rule_for(site, site.role)
    specs = {name: spec for name, spec in rule.operands.items() if spec} if rule else {}
    if not specs:
        site.reason = f"recipe {context.recipe.name!r} leaves {site.role} GEMMs here in high precision"
        return
    site.specs = {name: specs.get(name) for name in site.arguments}
    obstacle = _obstacle(site, site.specs, context)
    if obstacle:
        context.refuse(site, obstacle)
        return
    site.status = "fp4"
    weight = site.specs.get("weight")
    if weight and site.role == "forward":
        value = site.operand("weight").meta["val"]
        count, size = int(value.numel()), int(value.shape[site.axes["weight"]])
        packed = FORMATS[weight.format].packed_bytes(count // max(size, 1), size)
        site.weight_bytes = (count * value.element_size(), packed)


@dataclass(frozen=True)
class Annotate:
    """Decide for every site."""

    name: ClassVar[str] = "annotate"
    needs: ClassVar[tuple[str, ...]] = ("sites",)
    gives: ClassVar[tuple[str, ...]] = ("annotated",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        for site in context.sites:
            _annotate(site, context)
        recipe = context.recipe
        if recipe.keeps_by_depth and context.sites and not context.depths:
            context.notes.append(
                f"recipe {recipe.name!r} keeps {_kept_blocks(recipe)} of the blocks: "
                "this model has no list of blocks, so it keeps none"
            )
        return 0
