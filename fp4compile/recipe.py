"""Recipes: which operand of which GEMM becomes what. A recipe is data: saved, loaded, compared, overridden.

fprop Y = X W^T reads `input` and `weight`, dgrad dX = dY W reads `grad` and `weight`, wgrad dW = dY^T X reads `grad`
and `input`. The first rule whose glob and role match a GEMM decides; no rule, or a rule without operands, keeps it.
"""

from __future__ import annotations

import fnmatch
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tomli_w

from fp4compile.errors import FP4TypeError, FP4ValueError, FP4Warning, unknown
from fp4compile.files import write_atomically
from fp4compile.formats import E4M3_MAX, EDEN_GROUP, FORMATS
from fp4compile.hadamard import check_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Role = Literal["forward", "dgrad", "wgrad"]
ROLES: tuple[Role, ...] = ("forward", "dgrad", "wgrad")

# The operands each role reads.
OPERANDS: Mapping[str, tuple[str, str]] = {
    "forward": ("input", "weight"),
    "dgrad": ("grad", "weight"),
    "wgrad": ("grad", "input"),
}

# Last path components of output heads, which stay in high precision (as do heads tied to an embedding).
HEADS = ("lm_head", "head", "classifier", "score", "proj_out", "embed_out")

# Of a Hadamard transform: one fixed vector, or one that is drawn for each GEMM and step.
SIGNS = ("fixed", "fresh")


@dataclass(frozen=True)
class Operand:
    """How one operand of a GEMM is quantised.

    Attributes:
        format: a name in `FORMATS`.
        rounding: "nearest", "stochastic", or another one of the format.
        scale_rule: a scale rule of the format, None for its default.
        hadamard: size of the Hadamard transform along the contraction axis, 0 for none; both operands of a GEMM
            must agree.
        block_2d: square scale tiles, the same for a weight and its transpose.
        tensor_scale: a scale of the whole tensor; None for what the format and the scale rule have.
        signs: of the Hadamard transform: "fixed", or "fresh": drawn for each GEMM and step.
        requantise: in a backward GEMM, quantise what the forward GEMM read, not the tensor that this was made from.
        clip_mask: in a forward GEMM, no gradient reaches the elements that lie beyond the grid.
    """

    format: str
    rounding: str = "nearest"
    scale_rule: str | None = None
    hadamard: int = 0
    block_2d: bool = False
    tensor_scale: bool | None = None
    signs: str = "fixed"
    requantise: bool = False
    clip_mask: bool = False

    def __post_init__(self) -> None:
        fmt = FORMATS[self.format]
        rule = fmt.rule(self.scale_rule)
        fmt.check_rounding(self.rounding)
        if self.hadamard:
            check_size(self.hadamard)
        if self.signs not in SIGNS:
            raise unknown("signs", self.signs, SIGNS)
        if self.block_2d and fmt.block_2d is None:
            raise FP4ValueError(f"format {self.format} has no 2-D blocks")
        if self.block_2d and self.hadamard:
            raise FP4ValueError("2-D blocks are shared by both axes; a Hadamard transform along one would break that")
        if self.tensor_scale and not fmt.is_scaled_per_tensor(rule):
            having = ", ".join(f.name for f in FORMATS.values() if f.has_tensor_scale)
            raise FP4ValueError(f"format {self.format} has no tensor scale; formats that have: {having}")
        if self.tensor_scale is False and not fmt.has_tensor_scale and fmt.is_scaled_per_tensor(rule):
            raise FP4ValueError(f"scale rule {rule!r} leaves a factor to a tensor scale, which this switches off")
        if self.signs == "fresh" and not self.hadamard:
            raise FP4ValueError("fresh signs are those of a Hadamard transform, and hadamard is 0")
        if self.rounding == "eden" and self.hadamard != EDEN_GROUP:
            raise FP4ValueError(
                f"rounding 'eden' corrects {EDEN_GROUP} values at once, which a Hadamard transform of that size must "
                f"have mixed; hadamard is {self.hadamard}"
            )
        if self.rounding == "eden" and fmt.scaling(rule).most >= E4M3_MAX:
            raise FP4ValueError(f"rounding 'eden' raises scales, and scale rule {rule!r} leaves no room: use 'eden'")

    @property
    def scaled_per_tensor(self) -> bool:
        """Whether a tensor scale multiplies the accumulator of the operand's GEMM."""
        return self.tensor_scale is not False and FORMATS[self.format].is_scaled_per_tensor(self.scale_rule)

    @property
    def draws(self) -> bool:
        """Whether the operand's rounding takes random numbers."""
        return self.rounding != "nearest"


@dataclass(frozen=True)
class Rule:
    """What the GEMMs of `role` in modules matching the glob `modules` get; operands left None stay as they are."""

    role: Role
    modules: str = "*"
    input: Operand | None = None
    weight: Operand | None = None
    grad: Operand | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise unknown("role", self.role, ROLES)
        for name in ("input", "weight", "grad"):
            if getattr(self, name) is not None and name not in OPERANDS[self.role]:
                raise FP4ValueError(f"a {self.role} GEMM reads {' and '.join(OPERANDS[self.role])}, not {name}")
        sizes = {spec.hadamard if spec else 0 for spec in self.operands.values()}
        if len(sizes) > 1:
            raise FP4ValueError(f"the operands of a {self.role} GEMM need the same Hadamard size, got {sorted(sizes)}")
        if len({spec.signs for spec in self.operands.values() if spec}) > 1:
            raise FP4ValueError(f"the operands of a {self.role} GEMM need the same signs, or their transforms stay")
        for name, spec in self.operands.items():
            if spec and spec.requantise and (self.role == "forward" or name == "grad"):
                raise FP4ValueError(f"the {name} of a {self.role} GEMM cannot be requantised: no forward GEMM read it")
            if spec and spec.clip_mask and self.role != "forward":
                raise FP4ValueError(f"a {self.role} GEMM takes no clip mask: gradients are those of forward operands")

    @property
    def operands(self) -> dict[str, Operand | None]:
        """The two operands of the role by name."""
        return {name: getattr(self, name) for name in OPERANDS[self.role]}


@dataclass(frozen=True)
class Recipe:
    """Ordered rules and what is kept in high precision.

    Attributes:
        name: what `options={"recipe": ...}` and reports call it.
        rules: the first match decides.
        keep: globs of module paths that stay in high precision, in one role where it stands first: `wgrad:layers.0.*`.
        keep_heads: keep output heads (`HEADS`, or tied to an embedding).
        keep_routers: keep the linear layers that choose experts: top-k, sort or argmax of what they compute.
        keep_last: fraction of the repeated blocks (`layers.N`), counted from the end, that stays in high precision.
        keep_first_n, keep_last_n: how many of the first and of the last blocks stay in high precision.
        source: where the recipe comes from.
        inferred: what the source leaves open and was decided here.
    """

    name: str
    rules: tuple[Rule, ...]
    keep: tuple[str, ...] = ()
    keep_heads: bool = True
    keep_routers: bool = True
    keep_last: float = 0.0
    source: str = ""
    inferred: str = ""
    keep_first_n: int = 0
    keep_last_n: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_last < 1.0:
            raise FP4ValueError(f"keep_last must be in [0, 1), got {self.keep_last}")
        for name in ("keep_first_n", "keep_last_n"):
            if getattr(self, name) < 0:
                raise FP4ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for entry in self.keep:
            role = entry.rpartition(":")[0]
            if role and role not in ROLES:
                raise unknown(f"role in keep={entry!r}:", role, ROLES)

    def rule_for(self, path: str, role: str) -> Rule | None:
        """The rule that decides for a GEMM, or None."""
        return next((r for r in self.rules if r.role == role and fnmatch.fnmatchcase(path, r.modules)), None)

    def kept_by(self, path: str, role: str) -> str | None:
        """The entry of `keep` that matches a module path in a role, or None."""
        for entry in self.keep:
            only, _, glob = entry.rpartition(":")
            if only in ("", role) and fnmatch.fnmatchcase(path, glob):
                return entry
        return None

    @property
    def globs(self) -> list[str]:
        """Every glob that modules are compared with."""
        return [entry.rpartition(":")[2] for entry in self.keep] + [rule.modules for rule in self.rules]

    @property
    def keeps_by_depth(self) -> bool:
        """Whether blocks stay in high precision by their number."""
        return bool(self.keep_last or self.keep_first_n or self.keep_last_n)

    @property
    def operands(self) -> list[Operand]:
        """Every operand spec of every rule."""
        return [spec for rule in self.rules for spec in rule.operands.values() if spec]

    def warn_if_biased(self) -> None:
        """Warn about stochastic rounding under a scale rule that truncates: its expectation is not the input."""
        for spec in dict.fromkeys(self.operands):
            if spec.rounding == "stochastic" and not FORMATS[spec.format].is_truncation_free(spec.scale_rule):
                warnings.warn(
                    f"recipe {self.name!r}: stochastic rounding of {spec.format} under scale rule "
                    f"{FORMATS[spec.format].rule(spec.scale_rule)!r} is biased, because the top of a block saturates; "
                    "use scale_rule='truncation-free'",
                    FP4Warning,
                    stacklevel=2,
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults, in the shape of the TOML file."""
        rules = []
        for rule in self.rules:
            row: dict[str, Any] = {"role": rule.role, "modules": rule.modules}
            row |= {name: _non_defaults(spec) for name, spec in rule.operands.items() if spec}
            rules.append(row)
        head = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rules" and not _is_default(self, f)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in head.items()} | {"rule": rules}

    def save(self, path: str | Path) -> None:
        """Write the recipe as TOML."""
        write_atomically(Path(path), tomli_w.dumps(self.to_dict()).encode())


def _is_default(recipe: Recipe, column: Field[Any]) -> bool:
    return bool(getattr(recipe, column.name) == column.default)


def _non_defaults(spec: Operand) -> dict[str, Any]:
    defaults = asdict(Operand(spec.format))
    return {k: v for k, v in asdict(spec).items() if k == "format" or v != defaults[k]}


# --- TOML ------------------------------------------------------------------------------------------------------------


def _lines_of(text: str, pattern: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), 1) if re.search(pattern, line)]


@dataclass
class _Reader:
    """Turns parsed TOML into dataclasses; its errors name the file, the line and the key.

    `start` is the line at which the table that is being read begins: keys are looked for from there on.
    """

    where: str
    text: str
    start: int = 0

    def line_of(self, key: str) -> int | None:
        found = _lines_of(self.text, rf"(^|[\s{{,.\[]){re.escape(key)}\s*(=|\])")
        return next((line for line in found if line >= self.start), None)

    def error(self, key: str, message: str) -> FP4ValueError:
        line = self.line_of(key)
        at = f"{self.where}:{line}" if line else self.where
        return FP4ValueError(f"{at}: key {key!r}: {message}")

    def build(self, cls: type, table: Any, key: str, **converted: Any) -> Any:
        if not isinstance(table, dict):
            raise self.error(key, f"expected a table, got {type(table).__name__}")
        allowed = {f.name: f for f in fields(cls) if f.name != "rules"}  # which stand in tables of their own, [[rule]]
        for name, value in table.items():
            if name not in allowed:
                spelled = ("rule" if f.name == "rules" else f.name for f in fields(cls))
                raise self.error(name, str(unknown("key", name, spelled)))
            expected = _TOML_TYPES.get(str(allowed[name].type), object)
            truth = isinstance(value, bool) and expected not in (bool, object)  # to Python an int as well
            if name not in converted and (truth or not isinstance(value, expected)):
                raise self.error(name, f"expected {allowed[name].type}, got {value!r}")
        lacking = [f.name for f in allowed.values() if f.default is MISSING and f.name not in {**table, **converted}]
        if lacking:
            raise self.error(key, f"lacks {', '.join(map(repr, lacking))}")
        try:
            return cls(**{**table, **converted})
        except (FP4ValueError, FP4TypeError, TypeError) as error:
            raise self.error(key, str(error)) from error

    def operand(self, table: Any, name: str) -> Operand:
        outer, self.start = self.start, self.line_of(name) or self.start
        spec: Operand = self.build(Operand, table, name)
        self.start = outer
        return spec

    def rule(self, table: Any, start: int) -> Rule:
        self.start = start
        if not isinstance(table, dict):
            raise self.error("rule", "expected an array of tables, [[rule]]")
        specs = {n: self.operand(table[n], n) for n in ("input", "weight", "grad") if n in table}
        rule: Rule = self.build(Rule, table, "rule", **specs)
        self.start = 0
        return rule

    def recipe(self, data: dict[str, Any]) -> Recipe:
        data = dict(data)
        rules = data.pop("rule", None)
        if not isinstance(rules, list) or not rules:
            raise self.error("rule", "a recipe needs at least one [[rule]]")
        keep = data.get("keep", [])
        if not isinstance(keep, list) or not all(isinstance(k, str) for k in keep):
            raise self.error("keep", f"expected a list of globs, got {keep!r}")
        if "name" not in data:
            raise self.error("name", "a recipe needs a name")
        starts = _lines_of(self.text, r"^\s*\[\[\s*rule\s*\]\]")
        starts += [0] * (len(rules) - len(starts))  # rules that are written as an inline array
        converted = tuple(map(self.rule, rules, starts))
        recipe: Recipe = self.build(Recipe, data, "recipe", rules=converted, keep=tuple(keep))
        return recipe


_TOML_TYPES: Mapping[str, Any] = {
    "str": str,
    "str | None": str,
    "int": int,
    "bool": bool,
    "bool | None": bool,
    "float": (int, float),
}


def loads(text: str, where: str = "<string>") -> Recipe:
    """A recipe from TOML text; errors name line and key."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FP4ValueError(f"{where}: malformed TOML: {error}") from error
    return _Reader(where, text).recipe(data)


def load(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except OSError as error:
        raise FP4ValueError(f"cannot read recipe {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FP4ValueError(f"recipe {str(path)!r} is not UTF-8 text: {error.reason}") from error
    return loads(text, str(path))


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecipeTable:
    """Recipes by name: the presets, and those that were registered."""

    registered: dict[str, Recipe] = field(default_factory=dict)

    @cached_property
    def presets(self) -> Mapping[str, Recipe]:
        """The presets by name; read late, as they are made of what this module defines."""
        from fp4compile.presets import presets

        return {recipe.name: recipe for recipe in presets()}

    def names(self) -> list[str]:
        """Every known name, presets first."""
        return [*self.presets, *self.registered]

    def get(self, name: str) -> Recipe:
        """The recipe of that name; raises with the known names for an unknown one."""
        found = self.registered.get(name) or self.presets.get(name)
        if found is None:
            raise unknown("recipe", name, self.names())
        return found


RECIPES = RecipeTable()


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name. A preset's name cannot be taken."""
    if not isinstance(recipe, Recipe):
        raise FP4TypeError(f"register_recipe needs a Recipe, got {type(recipe).__name__}")
    if recipe.name in RECIPES.presets:
        raise FP4ValueError(f"{recipe.name!r} is a preset; give the recipe another name")
    RECIPES.registered[recipe.name] = recipe
    return recipe


def _named(name: str) -> Recipe:
    if name not in RECIPES.names() and Path(name).is_file():
        raise FP4ValueError(f"the name of a recipe file ends in .toml, that of {name!r} does not")
    return RECIPES.get(name)


def resolve(recipe: str | Path | Recipe, keep: Any = ()) -> Recipe:
    """The recipe that a user names: a preset, a registered one, a TOML file or a `Recipe`, with `keep` globs added.

    Warns where a recipe that is not a preset rounds stochastically under a biased scale rule.
    """
    if isinstance(recipe, str | Path):
        text = str(recipe)
        found = load(text) if text.endswith(".toml") else _named(text)
    elif isinstance(recipe, Recipe):
        found = recipe
    else:
        raise FP4TypeError(f"recipe must be a name, a .toml path or a Recipe, got {type(recipe).__name__}")
    if RECIPES.presets.get(found.name) != found:
        found.warn_if_biased()
    if isinstance(keep, str) or not isinstance(keep, Iterable) or not all(isinstance(glob, str) for glob in keep):
        raise FP4TypeError(f"keep must be a list of globs, got {keep!r}")
    return replace(found, keep=(*found.keep, *keep)) if keep else found
