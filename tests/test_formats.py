"""The table of formats: its rows against the definitions, its look-ups, and registration."""

import dataclasses

import pytest
import torch

from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.formats import E2M1, FORMATS, S1P2, ScaleLevel, register_format

BUILTIN = {
    # name: (element, block, bits per value, 2-D edge, has a tensor scale, dtype of a stored scale, default
    # rule)
    "hif4": (S1P2, 64, 4.5, None, False, torch.int32, "authors"),
    "mxfp4": (E2M1, 32, 4.25, 32, False, torch.uint8, "floor"),
    "nvfp4": (E2M1, 16, 4.5, 16, True, torch.uint8, "nearest"),
}


def e2m1(code: int) -> float:
    """Two exponent bits, bias 1, one mantissa bit; exponent 0 is subnormal."""
    exponent, mantissa = code >> 1, code & 1
    return (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2


ELEMENTS = [(E2M1, e2m1, "even"), (S1P2, lambda code: code / 4, "away")]


def test_builtin_rows():
    rows = {
        f.name: (
            f.element,
            f.block,
            f.bits_per_value,
            f.block_2d,
            f.has_tensor_scale,
            f.scale_dtype,
            f.rule(None),
        )
        for f in FORMATS.values()
    }
    assert rows == BUILTIN
    assert {f.name: [(v.dtype, v.block) for v in f.levels] for f in FORMATS.values()} == {
        "hif4": [("e6m2", 64), ("u1", 8), ("u1", 4)],
        "mxfp4": [("e8m0", 32)],
        "nvfp4": [("e4m3", 16), ("fp32", None)],
    }


@pytest.mark.parametrize(("element", "magnitude", "tie"), ELEMENTS, ids=lambda v: getattr(v, "name", ""))
def test_elements(element, magnitude, tie):
    assert element.magnitudes == tuple(magnitude(code) for code in range(8))
    assert [str(v) for v in element.values] == [f"{s}{magnitude(c)}" for s in ("", "-") for c in range(8)]
    assert element.max == magnitude(7)
    assert element.tie == tie


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitudes": (0.0, 1.0)}, "eight magnitudes rising from 0"),
        ({"magnitudes": (0.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)}, "eight magnitudes rising from 0"),
        ({"magnitudes": (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)}, "eight magnitudes rising from 0"),
        ({"tie": "up"}, r"unknown tie rule 'up'; allowed: away, even"),
    ],
)
def test_bad_elements(changes, message):
    with pytest.raises(FP4ValueError, match=message):
        dataclasses.replace(E2M1, **changes)


@pytest.mark.parametrize(
    ("name", "given", "rule", "truncation_free"),
    [
        ("hif4", None, "authors", False),
        ("hif4", "truncation-free", "truncation-free", True),
        ("mxfp4", None, "floor", False),
        ("mxfp4", "ceil", "ceil", True),
        ("mxfp4", "even", "even", False),
        ("mxfp4", "floor-3/4", "floor-3/4", True),
        ("mxfp4", "rceil", "rceil", True),
        ("mxfp4", "truncation-free", "rceil", True),
        ("nvfp4", "nearest", "nearest", False),
        ("nvfp4", "truncation-free", "truncation-free", True),
    ],
)
def test_scale_rules(name, given, rule, truncation_free):
    assert FORMATS[name].rule(given) == rule
    assert FORMATS[name].is_truncation_free(given) is truncation_free


@pytest.mark.parametrize("name", BUILTIN)
def test_every_rule_and_rounding_of_a_format_is_a_row(name):
    fmt = FORMATS[name]
    assert fmt.scaling("truncation-free").truncation_free
    assert fmt.roundings[:2] == ("nearest", "stochastic")
    for rule in fmt.scale_rules:
        assert fmt.is_scaled_per_tensor(rule) == (name == "nvfp4" or rule == "floor-3/4")
        fmt.scaling(rule)
    for rounding in fmt.roundings:
        fmt.check_rounding(rounding)
    with pytest.raises(FP4ValueError, match=f"rounding of format {name}: 'up'; allowed: "):
        fmt.check_rounding("up")


@pytest.mark.parametrize("name", BUILTIN)
def test_an_unknown_scale_rule_names_the_allowed_ones(name):
    with pytest.raises(FP4ValueError, match=f"scale rule of format {name}: 'flor'; allowed: ") as error:
        FORMATS[name].rule("flor")
    assert all(rule in str(error.value) for rule in FORMATS[name].scale_rules)


@pytest.mark.parametrize("name", ["hif5", "HIF4", "", 3, None, ["hif4"]])
def test_an_unknown_format_names_the_known_ones(name):
    with pytest.raises(FP4ValueError, match=r"unknown format .*; allowed: hif4, mxfp4, nvfp4"):
        FORMATS[name]


def test_a_misspelt_format_gets_a_hint():
    with pytest.raises(FP4ValueError, match="Did you mean 'mxfp4'"):
        FORMATS["mxpf4"]


def test_table_is_a_read_only_mapping():
    assert list(FORMATS) == list(BUILTIN)
    assert len(FORMATS) == 3
    assert "hif4" in FORMATS
    assert "hif5" not in FORMATS
    assert FORMATS["hif4"].name == "hif4"
    with pytest.raises(TypeError):
        FORMATS["hif5"] = FORMATS["hif4"]


@pytest.fixture
def registered():
    """Registers a variant of a built-in row and takes every new row out again."""
    before = set(FORMATS)

    def register(base: str, **changes: object):
        return register_format(dataclasses.replace(FORMATS[base], **changes))

    yield register
    for name in set(FORMATS) - before:
        del FORMATS._rows[name]


def test_register(registered):
    row = registered("mxfp4", name="mxfp4-16", levels=(ScaleLevel("e8m0", 16),))
    assert FORMATS["mxfp4-16"] is row
    assert row.block == 16
    assert row.bits_per_value == 4.5
    assert registered("mxfp4", name="mxfp4-16", levels=(ScaleLevel("e8m0", 16),)) == row
    with pytest.raises(FP4ValueError, match="a different format named 'mxfp4-16'"):
        registered("mxfp4", name="mxfp4-16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": ()}, "first scale level must be e6m2, e8m0 or e4m3"),
        ({"levels": (ScaleLevel("u1", 8),)}, "first scale level must be e6m2, e8m0 or e4m3"),
        ({"levels": (ScaleLevel("e8m0", None),)}, "over an even block"),
        ({"levels": (ScaleLevel("e8m0", 5),)}, "over an even block"),
        ({"scale_rules": ("floor",)}, "must name 'truncation-free'"),
        (
            {"scale_rules": ("floor", "rceil", "truncation-free", "4over6")},
            "rule for e8m0 scales .*'4over6'; allowed: ceil",
        ),
        ({"roundings": ("nearest", "eden")}, "rounding 'eden' needs E4M3 scales"),
    ],
)
def test_register_refuses(registered, changes, message):
    with pytest.raises(FP4ValueError, match=message):
        registered("mxfp4", name="broken", **changes)
    assert "broken" not in FORMATS


def test_register_takes_formats_only():
    with pytest.raises(FP4TypeError, match="register_format needs a Format, got dict"):
        register_format({"name": "broken"})
