"""The recipe's decision for each site, with its reason, and what cannot be done."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from fp4compile.backend import Answer, Backend, No, Yes
from fp4compile.errors import RewriteError
from fp4compile.formats import FORMATS
from fp4compile.packed import PackedWeight
from fp4compile.recipe import HEADS, Operand, Recipe, Rule
from fp4compile.report import SiteRecord
from tests.helpers import Captured, capture, forward_recipe, randn, trace

HIF4, RHT = Operand("hif4"), Operand("hif4", hadamard=64)


def linear(recipe: str | Recipe = "hif4-plain", k: int = 64, parameter: str = "w") -> Captured:
    """A graph of one forward site whose sites are found."""
    captured = trace(lambda x, w: x @ w, randn(4, k), randn(k, 32), recipe=recipe, parameters="w").until("find_sites")
    for site in captured.sites:
        site.path, site.parameter = parameter.rpartition(".")[0], parameter
    return captured


def decide(captured: Captured) -> SiteRecord:
    captured.run("annotate")
    (record,) = captured.context.report().sites
    return record


def test_leaves_the_graph_and_decides_the_same_again() -> None:
    captured = capture(nn.Linear(64, 32), [randn(4, 64)], "hif4").until("find_sites")
    nodes = list(captured.module.graph.nodes)
    assert captured.run("annotate") == 0
    assert list(captured.module.graph.nodes) == nodes
    text, report = captured.text, captured.context.report().sites
    assert captured.run("annotate") == 0
    assert (captured.text, captured.context.report().sites) == (text, report)


def test_writes_specs_formats_and_bytes() -> None:
    captured = linear("hif4-w4a16")
    record = decide(captured)
    assert record.status == "fp4"
    assert record.formats == {"input": None, "weight": "hif4"}
    assert captured.context.report().weight_bytes == (64 * 32 * 4, 64 * 32 * 4.5 / 8)


@pytest.mark.parametrize("format", FORMATS)
def test_packed_bytes_are_those_of_whole_blocks(format: str) -> None:
    """The numbers that `convert` writes: 65 values take two blocks of 64."""
    captured = capture(nn.Linear(65, 3), [randn(4, 65)], f"{format}-w4a16").until("annotate")
    parts = PackedWeight((3, 65), 1, Operand(format, tensor_scale=False)).parts()
    assert captured.context.report().weight_bytes == (65 * 3 * 4, sum(part.nbytes for part in parts.values()))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_keeps_heads(name: str, prefix: str) -> None:
    record = decide(linear(parameter=f"{prefix}{name}.weight"))
    assert (record.status, record.reason) == ("kept", "output head")


@pytest.mark.parametrize("path", ["heads", "head.0", "my_head", "lm_head.dense", "scores"])
def test_what_only_looks_like_a_head_is_none(path: str) -> None:
    assert decide(linear(parameter=f"{path}.weight")).status == "fp4"


def test_a_recipe_may_quantise_heads() -> None:
    recipe = forward_recipe(weight=HIF4, keep_heads=False)
    assert decide(linear(recipe, parameter="lm_head.weight")).status == "fp4"


def test_keeps_what_is_tied_to_an_embedding() -> None:
    captured = linear(parameter="embed.weight")
    captured.context.embeddings.add("embed.weight")
    assert decide(captured).reason == "output head (tied to an embedding)"


@pytest.mark.parametrize(
    ("glob", "status"),
    [("a.b", "kept"), ("a.*", "kept"), ("*", "kept"), ("a.b.w", "kept"), ("a", "fp4"), ("b", "fp4"), ("A.B", "fp4")],
)
def test_keep_globs_match_whole_paths_or_parameters(glob: str, status: str) -> None:
    recipe = Recipe("test", (Rule("forward", weight=HIF4),), keep=("none", glob))
    record = decide(linear(recipe, parameter="a.b.w"))
    assert record.status == status
    assert record.reason == (f"keep={glob!r}" if status == "kept" else "")


@pytest.mark.parametrize(
    ("fraction", "kept"), [(0.0, []), (0.1, []), (0.15, [3]), (0.25, [3]), (0.5, [2, 3]), (0.99, [0, 1, 2, 3])]
)
def test_keeps_the_last_blocks(fraction: float, kept: list[int]) -> None:
    recipe = Recipe("test", (Rule("forward", weight=HIF4),), keep_last=fraction)
    found = []
    for index in range(4):
        captured = linear(recipe, parameter=f"model.layers.{index}.mlp.experts.3.up.weight")
        captured.context.depths = {"model.layers": 4, f"model.layers.{index}.mlp.experts": 8}
        if decide(captured).status == "kept":
            found.append(index)
    assert found == kept


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_first_n": 1}, [0]),
        ({"keep_last_n": 2}, [2, 3]),
        ({"keep_first_n": 1, "keep_last_n": 1}, [0, 3]),
        ({"keep_last": 0.5, "keep_last_n": 1}, [2, 3]),
        ({"keep_first_n": 9}, [0, 1, 2, 3]),
    ],
)
def test_keeps_blocks_by_number(options: dict[str, float], kept: list[int]) -> None:
    recipe = Recipe("test", (Rule("forward", weight=HIF4),), **options)
    found = []
    for index in range(4):
        captured = linear(recipe, parameter=f"layers.{index}.up.weight")
        captured.context.depths = {"layers": 4}
        site = decide(captured)
        if site.status == "kept":
            assert site.reason.startswith("among the ") and site.reason.endswith(" of 4 blocks")
            found.append(index)
    assert found == kept


def test_keeps_one_role_of_a_module() -> None:
    spec = Operand("hif4")
    rules = (Rule("forward", input=spec, weight=spec), Rule("wgrad", grad=spec, input=spec))
    recipe = Recipe("test", rules, keep=("wgrad:0",))
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    captured = capture(model, [randn(4, 64)], recipe).until("annotate")
    assert {(s.path, s.role): s.reason for s in captured.sites if s.status == "kept" and s.role != "dgrad"} == {
        ("0", "wgrad"): "keep='wgrad:0'"
    }


AGAIN = Operand("hif4", requantise=True)


def test_what_cannot_be_requantised_says_why() -> None:
    recipe = Recipe("again", (Rule("wgrad", grad=HIF4, input=AGAIN),))
    captured = capture(nn.Linear(64, 32), [randn(4, 64)], recipe).until("annotate")
    assert captured.sites[1].status == "refused"
    assert "'input' is to be requantised, and its forward GEMM reads it in high precision" in captured.sites[1].reason
    rules = (Rule("forward", input=HIF4), *recipe.rules)
    captured = capture(nn.Linear(64, 32), [randn(4, 64)], Recipe("again", rules))
    captured.run("canonicalise", "find_sites")
    forward, wgrad = captured.sites
    forward.path = "elsewhere"
    captured.run("annotate")
    assert wgrad.status == "refused" and "which forward GEMM read it is not certain" in wgrad.reason


def test_modules_outside_the_blocks_have_no_depth() -> None:
    captured = linear(Recipe("test", (Rule("forward", weight=HIF4),), keep_last=0.5), parameter="projector.weight")
    captured.context.depths = {"layers": 2}
    assert decide(captured).status == "fp4"


def test_depth_needs_the_whole_model() -> None:
    captured = linear(Recipe("deep", (Rule("forward", weight=HIF4),), keep_last=0.5), parameter="q.weight")
    captured.context.inner = True
    with pytest.raises(RewriteError, match=r"'deep' keeps the last 50% .* depth of 'q' is not known.*keep_last = 0"):
        captured.run("annotate")


def test_without_a_rule_a_gemm_is_kept() -> None:
    captured = capture(nn.Linear(64, 32), [randn(4, 64)], Recipe("f", (Rule("forward", weight=HIF4),)))
    captured.until("annotate")
    assert {site.role: site.reason for site in captured.sites} == {
        "forward": "",
        "wgrad": "recipe 'f' leaves wgrad GEMMs here in high precision",
    }


def test_a_rule_without_operands_keeps() -> None:
    recipe = Recipe("test", (Rule("forward", "a"), Rule("forward", weight=HIF4)))
    assert decide(linear(recipe, parameter="a.weight")).status == "kept"
    assert decide(linear(recipe, parameter="b.weight")).status == "fp4"


class Picky(Backend):
    name = "picky"

    def supports_format(self, name: str, device: str) -> Answer:
        return No("no such numbers here") if name == "hif4" else Yes()

    def compile(self, *args, **kwargs):
        raise AssertionError


def picky() -> Captured:
    captured = linear()
    captured.context.backend = Picky()
    return captured


def integers() -> Captured:
    def quantised(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    x, w = torch.ones(4, 64, dtype=torch.int64), torch.ones(64, 32, dtype=torch.int64)
    return trace(quantised, x, w, parameters="w").until("find_sites")


OBSTACLES = {
    "format": (picky, "backend 'picky' lacks format 'hif4' on cpu: no such numbers here"),
    "dtype": (integers, "operand 'input' is torch.int64"),
    "hadamard": (
        lambda: linear(forward_recipe(input=RHT, weight=RHT), k=96),
        "a Hadamard transform of size 64 does not divide the 96 features",
    ),
}


@pytest.mark.parametrize(("make", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_cannot_be_done_is_an_error_or_reported(make, reason: str) -> None:
    captured = make()
    with pytest.raises(RewriteError, match=rf"the forward GEMM of .* cannot be FP4: {re.escape(reason)}.*strict=False"):
        captured.run("annotate")
    captured.context.strict = False
    record = decide(captured)
    assert record.status == "refused"
    assert reason in record.reason
    assert record.formats == {"input": None, "weight": None}


def test_a_token_axis_may_be_padded_for_the_transform() -> None:
    captured = capture(nn.Linear(64, 64), [randn(5, 64)], "hif4").until("annotate")
    assert [site.status for site in captured.sites] == ["fp4", "fp4"]
