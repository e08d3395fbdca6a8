"""The arms of a study by name, and the plans that say which arms are trained.

bf16                    torch.compile without FP4
hif4, own.toml          a recipe, as `options={"recipe": ...}` takes it
hif4-plain+rht+sr       a recipe with ingredients added: the ablations
hif4:wgrad              a recipe in one of the three GEMMs alone; the others stay in BF16
hif4@0.9                a recipe, then BF16 from 90% of the steps on
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fp4compile.recipe import RECIPES, ROLES, Operand, Recipe, resolve
from lm.machine import BadInput

# Ingredient -> the operand spec with it, from role, name of the operand and its spec.
INGREDIENTS: Mapping[str, Callable[[str, str, Operand], Operand]] = {
    # On both operands of the backward GEMMs, of the size that the format's own recipe has.
    "rht": lambda role, name, spec: spec if role == "forward" else replace(spec, hadamard=hadamard_size(spec.format)),
    "sr": lambda role, name, spec: replace(spec, rounding="stochastic") if name == "grad" else spec,
    "tf": lambda role, name, spec: replace(spec, scale_rule="truncation-free"),
    "2d": lambda role, name, spec: replace(spec, block_2d=True) if name == "weight" else spec,
    "nopts": lambda role, name, spec: without_tensor_scale(spec),
}
WHAT = {
    "rht": "Hadamard transform of both operands of the backward GEMMs",
    "sr": "stochastic rounding of the gradients",
    "tf": "truncation-free scales",
    "2d": "2-D blocks of the weights",
    "nopts": "no tensor scale",
}
LABELS = {"bf16": "BF16", "hif4": "HiF4", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def hadamard_size(format: str) -> int:
    """Size of the Hadamard transform in the recipe that is named after the format."""
    return max(operand.hadamard for operand in RECIPES.get(format).operands)


def without_tensor_scale(spec: Operand) -> Operand:
    """The operand with scales of blocks alone, of a format that has a scale of the tensor too."""
    if not spec.scaled_per_tensor:
        raise BadInput(f"ingredient 'nopts': {spec.format} has no tensor scale to go without")
    return replace(spec, tensor_scale=False)


def label(arm: str) -> str:
    """How tables and figures call an arm."""
    return re.sub(r"^\w+", lambda base: LABELS.get(base[0], base[0]), arm)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: as above; a TOML file's arm is called by its recipe's name.
        recipe: None for BF16.
        switch: fraction of the steps from which on there is no FP4; None to keep the recipe.
    """

    name: str
    recipe: Recipe | None
    switch: float | None = None

    @property
    def precisions(self) -> dict[float, Recipe | None]:
        """What `fp4compile.Schedule` takes."""
        return {0.0: self.recipe} | ({} if self.switch is None else {self.switch: None})

    @property
    def slug(self) -> str:
        """The name in file names: letters, digits, dots, dashes and underscores."""
        return self.name.replace("+", "_").replace(":", ".").replace("@", "_at")


def with_ingredients(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with ingredients added to every operand that it quantises."""
    for name in names:
        if name not in INGREDIENTS:
            raise BadInput(f"unknown ingredient {name!r} of {recipe.name}; there are {', '.join(INGREDIENTS)}")
        change = INGREDIENTS[name]
        rules = []
        for rule in recipe.rules:
            changed = {key: change(rule.role, key, spec) for key, spec in rule.operands.items() if spec}
            rules.append(replace(rule, **changed))
        source = f"{recipe.source}; with {WHAT[name]}"
        recipe = replace(recipe, name=f"{recipe.name}+{name}", rules=tuple(rules), source=source)
    return recipe


def in_role(recipe: Recipe, role: str) -> Recipe:
    """The recipe without the rules of the other roles."""
    if role not in ROLES:
        raise BadInput(f"unknown GEMM {role!r} of {recipe.name}; there are {', '.join(ROLES)}")
    rules = tuple(rule for rule in recipe.rules if rule.role == role)
    return replace(recipe, name=f"{recipe.name}:{role}", rules=rules, source=f"{recipe.source}; {role} alone")


def stabilisers(recipe: Recipe) -> str:
    """What a recipe does beyond quantising every GEMM to the nearest values, in words."""
    specs = recipe.operands
    found = {
        "Hadamard transform": any(spec.hadamard for spec in specs),
        "stochastic rounding": any(spec.rounding == "stochastic" for spec in specs),
        "truncation-free scales": any(spec.scale_rule == "truncation-free" for spec in specs),
        "2-D blocks": any(spec.block_2d for spec in specs),
        f"BF16 in {recipe.keep_last:.0%} of the layers": recipe.keep_last > 0,
    }
    return ", ".join(name for name, there in found.items() if there) or "none"


def make_arm(text: str, switch: float | None = None) -> Arm:
    """The arm that a name stands for; `switch` is an `@` by other means."""
    text, at, fraction = text.partition("@")
    if at:
        try:
            switch = float(fraction)
        except ValueError:
            raise BadInput(f"arm {text}@{fraction}: what follows the @ is a fraction of the steps") from None
    if text == "bf16":
        if switch is not None:
            raise BadInput("arm bf16 has no FP4 to switch off")
        return Arm("bf16", None)
    if text.endswith(".toml"):
        recipe = resolve(text)
    else:
        text, colon, role = text.partition(":")
        name, *ingredients = text.split("+")
        recipe = with_ingredients(resolve(name), ingredients)
        recipe = in_role(recipe, role) if colon else recipe
    return Arm(recipe.name if switch is None else f"{recipe.name}@{switch:g}", recipe, switch)


def check_widths(options: argparse.Namespace, recipes: Iterable[Recipe]) -> None:
    """Refuse sizes (--dim, --heads, --ff) that would fail only once the first arm has been trained."""
    if options.dim % options.heads:
        raise BadInput(f"--heads {options.heads} does not divide --dim {options.dim}")
    if options.dim // options.heads % 2:
        raise BadInput(f"rotary positions need an even head size; --dim / --heads is {options.dim // options.heads}")
    for recipe in recipes:
        size = max((operand.hadamard for operand in recipe.operands), default=0)
        for name in ("dim", "ff"):
            width = getattr(options, name)
            if size and width % size:
                raise BadInput(
                    f"recipe {recipe.name} uses a Hadamard transform of size {size}, "
                    f"which does not divide --{name} {width}"
                )


# --- plans -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Arms of one model that are trained with the same seeds."""

    model: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What `study.py run` trains.

    Attributes:
        steps, batch: optimiser steps of every run and windows of a step, where the options do not say otherwise.
        parts: in the order in which they are trained.
        branch: fraction of the steps that all arms of a seed share.
    """

    about: str
    steps: int
    batch: int
    parts: tuple[Part, ...]
    branch: float = 0.0


FOUR = (0, 1, 2, 3)  # the fewest seeds that carry a claim
MAIN = ("bf16", "hif4", "mxfp4", "nvfp4")
PLAIN = ("hif4-plain", "mxfp4-plain", "nvfp4-plain")
# Arm -> the recipe that it is by another name: measured once.
TWINS = {"hif4-plain+rht": "hif4", "mxfp4-plain+rht+sr+tf": "mxfp4"}
ABLATIONS = (
    *(
        name
        for more in ("", "+rht", "+sr", "+rht+sr", "+tf", "+rht+sr+tf")
        for format in ("hif4", "mxfp4", "nvfp4")
        if (name := f"{format}-plain{more}") not in TWINS
    ),
    *(f"{format}-plain+2d" for format in ("mxfp4", "nvfp4")),
    "nvfp4-plain+nopts",
    "hif4@0.9",
)
# What the probe measures; of one role alone, the three recipes.
PROBED = (
    *dict.fromkeys((*MAIN[1:], *PLAIN, *(arm for arm in ABLATIONS if "@" not in arm))),
    *(f"{arm}:{role}" for arm in MAIN[1:] for role in ROLES),
)
PLANS: Mapping[str, Plan] = {
    "quick": Plan("four seeds of short runs, dense", 1000, 32, (Part("dense", (*MAIN, "hif4-plain"), FOUR),)),
    "branch": Plan(
        "four seeds of every format with and without stabilisers, branching off BF16, dense and MoE",
        1200,
        64,
        (Part("dense", (*MAIN, *PLAIN), FOUR), Part("moe", (*MAIN, *PLAIN), FOUR)),
        branch=0.5,
    ),
    "full": Plan(
        "four seeds of the recipes, dense and MoE, and of the ablations",
        3000,
        128,
        (Part("dense", MAIN, FOUR), Part("moe", MAIN, FOUR), Part("dense", ABLATIONS, FOUR)),
    ),
}
