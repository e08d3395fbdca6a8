"""Recipes as data: presets, TOML, errors that say what is allowed, and which rule decides."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError, FP4Warning
from fp4compile.formats import FORMATS
from fp4compile.recipe import RECIPES, ROLES, Operand, Recipe, Rule, load, loads, resolve

PRESETS = [f"{name}{kind}" for name in ("hif4", "mxfp4", "nvfp4") for kind in ("", "-plain", "-w4a16", "-w4a4")]
PUBLISHED = ["mxfp4-tseng", "quartet", "fp4-all-the-way", "tetrajet", "tetrajet-v2", "quartet2", "nvfp4-4over6"]
HIF4 = Operand("hif4")
BIASED = Operand("nvfp4", rounding="stochastic")


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(RECIPES.registered)
    yield
    RECIPES.registered.clear()
    RECIPES.registered.update(before)


# --- presets


def test_every_preset_exists() -> None:
    assert {*PRESETS, *PUBLISHED} == set(RECIPES.presets)


@pytest.mark.parametrize("name", ["hif4", "mxfp4", "nvfp4", *PUBLISHED])
def test_published_presets_cite_their_paper_and_say_what_was_inferred(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = resolve(name)
    assert recipe.inferred and recipe.keep_heads
    assert "arXiv:" in recipe.source or name in ("hif4", "mxfp4", "nvfp4")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_where_they_come_from_and_warn_of_nothing(name: str) -> None:
    recipe = resolve(name)
    assert recipe.name == name
    assert recipe.source
    assert recipe.keep_heads
    assert {spec.format for spec in recipe.operands} == {name.partition("-")[0]}


@pytest.mark.parametrize("format", ["hif4", "mxfp4", "nvfp4"])
def test_plain_presets_have_nothing_to_derive(format: str) -> None:
    recipe = resolve(f"{format}-plain")
    assert recipe.operands == [Operand(format)] * 6
    assert [rule.role for rule in recipe.rules] == list(ROLES)
    assert recipe.keep_last == 0 and recipe.keep == ()


@pytest.mark.parametrize("format", ["hif4", "mxfp4", "nvfp4"])
def test_inference_presets_have_no_backward(format: str) -> None:
    weights, both = resolve(f"{format}-w4a16"), resolve(f"{format}-w4a4")
    assert weights.rules == (Rule("forward", weight=Operand(format)),)
    assert both.rules == (Rule("forward", input=Operand(format), weight=Operand(format)),)


def summary(name: str) -> dict[str, tuple[str, ...]]:
    """role.operand -> what the published recipe asks for."""
    found = {}
    for rule in resolve(name).rules:
        for operand, spec in rule.operands.items():
            assert spec is not None
            parts = {
                "SR": spec.rounding == "stochastic",
                "EDEN": spec.rounding == "eden",
                f"RHT-{spec.hadamard}": spec.hadamard > 0,
                "fresh": spec.signs == "fresh",
                "2-D": spec.block_2d,
                "again": spec.requantise,
                "mask": spec.clip_mask,
            }
            found[f"{rule.role}.{operand}"] = tuple(part for part, there in parts.items() if there)
    return found


def test_hif4_transforms_the_backward_and_rounds_to_nearest() -> None:
    rht = ("RHT-64",)
    assert summary("hif4") == {
        "forward.input": (),
        "forward.weight": (),
        "dgrad.grad": rht,
        "dgrad.weight": rht,
        "wgrad.grad": rht,
        "wgrad.input": rht,
    }


def test_mxfp4_rounds_gradients_stochastically_without_truncation() -> None:
    assert summary("mxfp4") == {
        "forward.input": (),
        "forward.weight": (),
        "dgrad.grad": ("SR", "RHT-32"),
        "dgrad.weight": ("RHT-32",),
        "wgrad.grad": ("SR", "RHT-32"),
        "wgrad.input": ("RHT-32",),
    }
    assert {FORMATS["mxfp4"].rule(spec.scale_rule) for spec in resolve("mxfp4").operands} == {"rceil"}


def test_nvfp4_has_weight_tiles_and_transforms_wgrad_only() -> None:
    assert summary("nvfp4") == {
        "forward.input": (),
        "forward.weight": ("2-D",),
        "dgrad.grad": ("SR",),
        "dgrad.weight": ("2-D",),
        "wgrad.grad": ("SR", "RHT-16"),
        "wgrad.input": ("RHT-16",),
    }
    assert resolve("nvfp4").keep_last == 0.15
    assert all(spec.scaled_per_tensor for spec in resolve("nvfp4").operands)


# Recipe -> the parts of each operand: forward X and W, dgrad dY and W, wgrad dY and X.
PARTS = {
    "mxfp4-tseng": ["SR RHT-64 fresh"] * 4,
    "quartet": ["RHT-32 mask"] * 2 + ["SR RHT-32 fresh", "SR RHT-32 fresh again"] * 2,
    "fp4-all-the-way": ["", "", "SR", "", "SR", "SR"],
    "tetrajet": ["", "", "SR", "SR again", "SR", "SR again"],
    "tetrajet-v2": ["", ""] + ["SR RHT-32 fresh", "SR RHT-32 fresh again"] * 2,
    "quartet2": ["", ""] + ["EDEN RHT-128 fresh", "EDEN RHT-128 fresh again"] * 2,
    "nvfp4-4over6": ["", "2-D", "SR", "2-D", "SR RHT-16", "RHT-16"],
}
RULES = {
    "mxfp4-tseng": ["floor-3/4"] * 4,
    "quartet": ["gaussian"] * 2 + ["floor-3/4"] * 4,
    "fp4-all-the-way": ["nearest"] * 6,
    "tetrajet": ["rceil"] * 6,
    "tetrajet-v2": ["nearest"] * 2 + ["17/16"] * 4,
    "quartet2": ["4over6"] * 2 + ["eden"] * 4,
    "nvfp4-4over6": ["4over6"] * 2 + ["nearest", "4over6"] + ["nearest"] * 2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_the_parts_of_the_table(name: str) -> None:
    assert [" ".join(parts) for parts in summary(name).values()] == PARTS[name]
    operands = resolve(name).operands
    assert [FORMATS[spec.format].rule(spec.scale_rule) for spec in operands] == RULES[name]
    expected = "mxfp4" if name in ("mxfp4-tseng", "quartet", "tetrajet") else "nvfp4"
    assert {spec.format for spec in operands} == {expected}


# --- TOML

RICH = Recipe(
    "mine",
    (
        Rule("forward", "layers.*.mlp.*", input=HIF4, weight=Operand("nvfp4", block_2d=True, tensor_scale=False)),
        Rule("forward", "layers.0.*"),
        Rule("dgrad", grad=Operand("mxfp4", "stochastic", "truncation-free", 64), weight=Operand("mxfp4", hadamard=64)),
        Rule("wgrad", input=HIF4),
    ),
    keep=("*.router", 'a "quoted" [glob]', "wgrad:layers.0.*"),
    keep_heads=False,
    keep_last=0.25,
    keep_first_n=1,
    keep_last_n=2,
    source="a paper, ü\nsecond line",
)


@pytest.mark.parametrize(
    "recipe", [*(RECIPES.presets[name] for name in [*PRESETS, *PUBLISHED]), RICH], ids=lambda r: r.name
)
def test_saving_and_loading_gives_the_same_recipe(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "recipe.toml"
    recipe.save(path)
    assert load(path) == recipe
    assert list(path.parent.iterdir()) == [path]


def test_a_file_is_a_recipe_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    RICH.save(path)
    assert resolve(str(path)) == resolve(path) == RICH


def test_defaults_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    Recipe("small", (Rule("forward", weight=HIF4),)).save(path)
    assert 'weight = { format = "hif4" }' in path.read_text() or 'format = "hif4"' in path.read_text()
    assert "hadamard" not in path.read_text()


HEAD = 'name = "x"\n[[rule]]\nrole = "forward"\n'  # three lines
BROKEN = {
    "syntax": ('name = "x"\nrule = = 3', ["malformed TOML", "line 2"]),
    "no rule": ('name = "x"', ["'rule'", "at least one [[rule]]"]),
    "rule is a table": ('name = "x"\n[rule]\nrole = "forward"', [":2", "'rule'", "[[rule]]"]),
    "rule is a number": ('name = "x"\nrule = [3]', [":2", "'rule'", "array of tables"]),
    "no name": ('[[rule]]\nrole = "forward"', ["'name'", "needs a name"]),
    "unknown top key": ('name = "x"\nkep = []\n[[rule]]\nrole = "forward"', [":2", "'kep'", "allowed", "'keep'"]),
    "unknown rule key": (HEAD + 'glob = "*"', [":4", "'glob'", "allowed", "modules"]),
    "unknown operand key": (HEAD + 'input = { format = "hif4", hadamar = 4 }', [":4", "'hadamar'", "'hadamard'"]),
    "no role": ('name = "x"\n[[rule]]\nmodules = "*"', [":2", "'rule'", "lacks 'role'"]),
    "no format": (HEAD + "input = { hadamard = 16 }", [":4", "'input'", "lacks 'format'"]),
    "operand is a name": (HEAD + 'weight = "hif4"', [":4", "'weight'", "expected a table", "str"]),
    "keep is a name": ('name = "x"\nkeep = "*"\n[[rule]]\nrole = "forward"', [":2", "'keep'", "list of globs"]),
    "keep of numbers": ('name = "x"\nkeep = [1]\n[[rule]]\nrole = "forward"', [":2", "'keep'", "list of globs"]),
    "keep_last is a name": ('name = "x"\nkeep_last = "5"\n[[rule]]\nrole = "forward"', [":2", "'keep_last'", "float"]),
    "keep_last is 1": ('name = "x"\nkeep_last = 1\n[[rule]]\nrole = "forward"', ["keep_last must be in [0, 1), got 1"]),
    "hadamard is a name": (HEAD + 'input = { format = "hif4", hadamard = "64" }', [":4", "'hadamard'", "int"]),
    "keep_first_n is a fraction": ('name = "x"\nkeep_first_n = 0.5\n[[rule]]\nrole = "forward"', [":2", "int", "0.5"]),
    "keep_last_n is negative": ('name = "x"\nkeep_last_n = -1\n[[rule]]\nrole = "forward"', ["at least 0, got -1"]),
    "keep in no role": ('name = "x"\nkeep = ["fprop:*"]\n[[rule]]\nrole = "forward"', ["'fprop'", "dgrad, forward"]),
    "requantise is a name": (HEAD + 'input = { format = "hif4", requantise = "yes" }', [":4", "'requantise'", "bool"]),
    "tensor scale of hif4": (HEAD + 'input = { format = "hif4", tensor_scale = true }', [":4", "'input'", "nvfp4"]),
    "block_2d is a number": (HEAD + 'weight = { format = "nvfp4", block_2d = 1 }', [":4", "'block_2d'", "bool"]),
    "name is a number": ('name = 3\n[[rule]]\nrole = "forward"', [":1", "'name'", "str"]),
    "unknown format": (HEAD + 'input = { format = "mxfp44" }', [":4", "'input'", "'mxfp44'", "Did you mean 'mxfp4'"]),
    "unknown role": ('name = "x"\n[[rule]]\nrole = "fprop"', ["role 'fprop'", "dgrad, forward, wgrad"]),
    "operand of another role": (HEAD + 'grad = { format = "hif4" }', ["reads input and weight, not grad"]),
    "a number is a truth value": ('name = "x"\nkeep_first_n = true\n[[rule]]\nrole = "forward"', [":2", "int", "True"]),
    "a fraction is one": ('name = "x"\nkeep_last = false\n[[rule]]\nrole = "forward"', [":2", "float", "False"]),
    "rules, not rule": ('name = "x"\nrules = []\n[[rule]]\nrole = "forward"', [":2", "'rules'", "mean 'rule'"]),
    "an array within": (HEAD + '[[rule.input]]\nformat = "hif4"', [":4", "'input'", "expected a table"]),
}


@pytest.mark.parametrize(("text", "parts"), BROKEN.values(), ids=BROKEN)
def test_errors_name_file_line_key_and_what_is_allowed(text: str, parts: list[str]) -> None:
    with pytest.raises(FP4ValueError) as raised:
        loads(text, "recipe.toml")
    message = str(raised.value)
    assert message.startswith("recipe.toml")
    for part in parts:
        assert part in message


def test_a_line_is_that_of_the_offending_key_and_not_of_its_namesake() -> None:
    text = HEAD + 'input = { format = "hif4" }\n\n[[rule]]\nrole = "wgrad"\ninput = { format = "mxfp44" }\n'
    with pytest.raises(FP4ValueError, match=r"recipe\.toml:8"):
        loads(text, "recipe.toml")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FP4ValueError, match=r"cannot read recipe 'nowhere\.toml': No such file"):
        resolve("nowhere.toml")


def test_a_file_without_the_ending_is_not_looked_for_among_the_presets(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(HEAD)
    with pytest.raises(FP4ValueError, match=r"ends in \.toml, that of '.*mine\.txt' does not"):
        resolve(tmp_path / "mine.txt")


def test_a_file_may_begin_with_a_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(HEAD, encoding="utf-8-sig")
    assert load(tmp_path / "mine.toml").name == "x"


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FP4ValueError, match=r"recipe\.toml"):
        load(path)


# --- what an operand and a rule may be

OPERAND_ERRORS = {
    "format": ({"format": "fp5"}, "unknown format 'fp5'; allowed: hif4, mxfp4, nvfp4"),
    "rounding": ({"format": "hif4", "rounding": "up"}, "unknown rounding of format hif4: 'up'; allowed: nearest, sto"),
    "4 over 6": (
        {"format": "mxfp4", "scale_rule": "4over6"},
        r"unknown scale rule of format mxfp4: '4over6'; .*\('4over6' is a scale rule of nvfp4\)",
    ),
    "Gaussian scales": ({"format": "nvfp4", "scale_rule": "gaussian"}, "is a scale rule of mxfp4"),
    "eden of mxfp4": ({"format": "mxfp4", "rounding": "eden", "hadamard": 128}, r"\('eden' is a rounding of nvfp4\)"),
    "eden unmixed": ({"format": "nvfp4", "rounding": "eden", "scale_rule": "eden"}, "128 values .* hadamard is 0"),
    "eden without room": ({"format": "nvfp4", "rounding": "eden", "hadamard": 128}, "'nearest' leaves no room"),
    "tensor scale": ({"format": "hif4", "tensor_scale": True}, "hif4 has no tensor scale; formats that have: nvfp4"),
    "tensor scale of mxfp4": ({"format": "mxfp4", "tensor_scale": True}, "mxfp4 has no tensor scale"),
    "no tensor scale": (
        {"format": "mxfp4", "scale_rule": "floor-3/4", "tensor_scale": False},
        "'floor-3/4' leaves a factor to a tensor scale, which this switches off",
    ),
    "signs": ({"format": "hif4", "hadamard": 64, "signs": "new"}, "unknown signs 'new'; allowed: fixed, fresh"),
    "signs of nothing": ({"format": "hif4", "signs": "fresh"}, "fresh signs are those of a Hadamard transform"),
    "scale rule": ({"format": "mxfp4", "scale_rule": "up"}, "unknown scale rule of format mxfp4: 'up'; allowed: ceil"),
    "hadamard of 48": ({"format": "hif4", "hadamard": 48}, "power of two of at least 2, got 48"),
    "hadamard of 1": ({"format": "hif4", "hadamard": 1}, "power of two of at least 2, got 1"),
    "hadamard of -16": ({"format": "hif4", "hadamard": -16}, "power of two of at least 2, got -16"),
    "tiles": ({"format": "hif4", "block_2d": True}, "format hif4 has no 2-D blocks"),
    "tiles and transform": ({"format": "nvfp4", "block_2d": True, "hadamard": 16}, "2-D blocks are shared"),
}


@pytest.mark.parametrize(("options", "message"), OPERAND_ERRORS.values(), ids=OPERAND_ERRORS)
def test_operands_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(FP4ValueError, match=message):
        Operand(**options)


AGAIN, MASKED = Operand("hif4", requantise=True), Operand("hif4", clip_mask=True)
RULE_ERRORS = {
    "signs": (
        ("wgrad", {"grad": Operand("hif4", hadamard=64, signs="fresh"), "input": Operand("hif4", hadamard=64)}),
        "operands of a wgrad GEMM need the same signs",
    ),
    "forward again": (("forward", {"weight": AGAIN}), "the weight of a forward GEMM cannot be requantised"),
    "gradient again": (("dgrad", {"grad": AGAIN}), "the grad of a dgrad GEMM cannot be requantised"),
    "backward mask": (("wgrad", {"input": MASKED}), "a wgrad GEMM takes no clip mask"),
}


@pytest.mark.parametrize(("given", "message"), RULE_ERRORS.values(), ids=RULE_ERRORS)
def test_rules_that_cannot_be(given: tuple, message: str) -> None:
    role, operands = given
    with pytest.raises(FP4ValueError, match=message):
        Rule(role, **operands)


@pytest.mark.parametrize(("role", "reads", "other"), [
    ("forward", "input and weight", "grad"),
    ("dgrad", "grad and weight", "input"),
    ("wgrad", "grad and input", "weight"),
])  # fmt: skip
def test_a_role_reads_two_operands(role: str, reads: str, other: str) -> None:
    with pytest.raises(FP4ValueError, match=f"a {role} GEMM reads {reads}, not {other}"):
        Rule(role, **{other: HIF4})


@pytest.mark.parametrize("second", [None, HIF4, Operand("hif4", hadamard=32)], ids=["none", "plain", "other size"])
def test_both_operands_need_the_same_transform(second: Operand | None) -> None:
    with pytest.raises(FP4ValueError, match=r"operands of a wgrad GEMM need the same Hadamard size, got \[\d+, 64\]"):
        Rule("wgrad", grad=Operand("hif4", hadamard=64), input=second)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 15])
def test_keep_last_is_a_fraction(fraction: float) -> None:
    with pytest.raises(FP4ValueError, match=r"keep_last must be in \[0, 1\)"):
        Recipe("x", (), keep_last=fraction)


# --- what decides

FIRST, SECOND = Operand("hif4"), Operand("mxfp4")
FORWARD = (Rule("forward", "a.*", weight=FIRST), Rule("dgrad", grad=SECOND), Rule("forward", weight=SECOND))
ORDERED = Recipe("x", FORWARD)


@pytest.mark.parametrize(
    ("path", "role", "expected"),
    [
        ("a.b", "forward", FIRST),
        ("a.b.c", "forward", FIRST),
        ("a", "forward", SECOND),
        ("b.a.b", "forward", SECOND),
        ("", "forward", SECOND),
        ("A.b", "forward", SECOND),
    ],
)
def test_the_first_rule_that_matches_decides(path: str, role: str, expected: Operand) -> None:
    rule = ORDERED.rule_for(path, role)
    assert rule is not None and rule.weight is expected


def test_without_a_rule_nothing_decides() -> None:
    assert ORDERED.rule_for("a.b", "wgrad") is None


def test_keep_adds_to_the_recipe_and_leaves_the_preset() -> None:
    recipe = resolve(dataclasses.replace(ORDERED, keep=("a",)), keep=["b.*"])
    assert recipe.keep == ("a", "b.*")
    assert [recipe.kept_by(path, "forward") for path in ("a", "b.c", "b")] == ["a", "b.*", None]
    assert resolve("hif4", keep=["x"]).keep == ("x",)
    assert resolve("hif4").keep == ()


def test_keep_by_role() -> None:
    recipe = dataclasses.replace(ORDERED, keep=("wgrad:a.*", "b"))
    assert [recipe.kept_by("a.x", role) for role in ROLES] == [None, None, "wgrad:a.*"]
    assert [recipe.kept_by("b", role) for role in ROLES] == ["b"] * 3
    assert recipe.globs[:2] == ["a.*", "b"]
    with pytest.raises(FP4ValueError, match=r"unknown role in keep='x:a': 'x'; allowed: dgrad, forward, wgrad"):
        resolve("hif4", keep=["x:a"])


@pytest.mark.parametrize("keep", ["layers.*", [1], [None], None])
def test_keep_is_a_list_of_globs(keep) -> None:
    with pytest.raises(FP4TypeError, match="keep must be a list of globs"):
        resolve("hif4", keep=keep)


# --- names


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(FP4ValueError, match=r"unknown recipe 'hif'; allowed: .*nvfp4-w4a4.*Did you mean 'hif4'\?"):
        resolve("hif")


@pytest.mark.parametrize("recipe", [3, None, {"name": "hif4"}, ["hif4"]])
def test_a_recipe_is_a_name_a_path_or_a_recipe(recipe) -> None:
    with pytest.raises(FP4TypeError, match="recipe must be a name"):
        resolve(recipe)


def test_registering(registry: None) -> None:
    mine = Recipe("mine", (Rule("forward", weight=HIF4),))
    assert fp4compile.register_recipe(mine) is mine
    assert resolve("mine") is mine
    assert "mine" in RECIPES.names()
    newer = dataclasses.replace(mine, keep=("a",))
    fp4compile.register_recipe(newer)
    assert resolve("mine") is newer


def test_a_fixture_forgets_what_was_registered() -> None:
    assert "mine" not in RECIPES.names()


def test_what_cannot_be_registered(registry: None) -> None:
    with pytest.raises(FP4ValueError, match="'hif4' is a preset"):
        fp4compile.register_recipe(Recipe("hif4", ()))
    with pytest.raises(FP4TypeError, match="needs a Recipe, got str"):
        fp4compile.register_recipe("hif4")


# --- warnings


@pytest.mark.parametrize("format", ["hif4", "mxfp4", "nvfp4"])
def test_biased_stochastic_rounding_of_a_users_recipe_warns(format: str) -> None:
    spec = Operand(format, rounding="stochastic")
    recipe = Recipe("mine", (Rule("dgrad", grad=spec), Rule("wgrad", grad=spec)))
    with pytest.warns(FP4Warning, match=rf"'mine': stochastic rounding of {format}.*'truncation-free'") as caught:
        resolve(recipe)
    assert len(caught) == 1


def test_unbiased_stochastic_rounding_does_not_warn() -> None:
    for format, rule in [*((name, "truncation-free") for name in FORMATS), ("mxfp4", "rceil"), ("nvfp4", "17/16")]:
        resolve(Recipe("mine", (Rule("dgrad", grad=Operand(format, "stochastic", rule)),)))


def test_a_preset_does_not_warn_of_its_own_choices_but_its_copy_does() -> None:
    preset = resolve("nvfp4")
    assert BIASED in preset.operands
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(preset)
        resolve("nvfp4", keep=["a"])
    with pytest.warns(FP4Warning, match="biased"):
        resolve(dataclasses.replace(preset, name="my-nvfp4"))
