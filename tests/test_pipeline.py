"""The order of passes, the driver that checks each, registered passes, and the QDQ form that all later passes keep."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import fp4compile
from fp4compile import pipeline
from fp4compile.errors import FP4TypeError, FP4ValueError, RewriteError
from fp4compile.passes import PIPELINE, Fold, Fuse, Legalise, Share
from fp4compile.pipeline import Context, Pass, Pipeline, default_pipeline, fingerprint
from fp4compile.recipe import Recipe
from tests.helpers import NAMES, PASSES, Captured, capture, context, export, randn, same_bits, trace

# --- the QDQ form


class Block(nn.Module):
    """Projections of one input, a product of activations, a bias, and sizes that blocks do not divide."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(k, 48), nn.Linear(k, 48, bias=False)
        self.o = nn.Linear(k, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.q(x) @ self.k(x).T) @ x)


RECIPES = [f"{name}{kind}" for name in ("hif4", "mxfp4", "nvfp4") for kind in ("-plain", "-w4a4", "")]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("k", "dtype"),
    [
        (64, torch.bfloat16),
        pytest.param(72, torch.float32, marks=pytest.mark.slow),
        pytest.param(64, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_later_passes_compute_what_the_qdq_form_says(recipe: str, k: int, dtype: torch.dtype) -> None:
    inputs = [randn(40, k, dtype=dtype).requires_grad_()]
    captured = capture(Block(k).to(dtype), inputs, recipe)
    captured.context.strict = False  # a transform of 64 does not divide 48 features: refused, and equal as well
    captured.until("stabilise")
    specification = captured.execute()
    captured.run("share", "fold", "fuse")
    assert captured.calls("fake_quantize") and not captured.calls("quantize")
    assert same_bits(captured.execute(), specification)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "-" in r] + ["hif4-w4a16"])
def test_without_stabilisers_the_qdq_form_is_the_specification(recipe: str) -> None:
    captured = capture(Block(64), [randn(8, 64)], recipe).until("insert_qdq")
    specification = captured.execute()
    captured.after("insert_qdq")
    assert same_bits(captured.execute(), specification)


@pytest.mark.parametrize("recipe", ["hif4-w4a16", "mxfp4-w4a4", "nvfp4-w4a4"])
def test_folded_weights_compute_what_the_qdq_form_says(recipe: str) -> None:
    captured = export(Block(64), [randn(8, 64)], recipe).until("stabilise")
    specification = captured.execute()
    captured.after("stabilise")
    assert len(captured.calls("mm")) == 3
    # A bias fused into the accumulator is the one difference: the order of fp32 additions.
    torch.testing.assert_close(captured.execute(), specification, rtol=1e-5, atol=1e-5)


def test_passes_know_symbolic_sizes() -> None:
    x, w = randn(6, 72), randn(72, 32)
    captured = trace(lambda x, w: x @ w, x, w, recipe="nvfp4-w4a4", parameters="w", mode="symbolic")
    captured.until("stabilise")
    inputs = randn(5, 40), randn(40, 16)
    specification = captured.execute(*inputs)
    captured.after("stabilise")
    assert same_bits(captured.execute(*inputs), specification)


# --- the order


def test_the_default_order_holds() -> None:
    assert tuple(step.name for step in default_pipeline().passes) == NAMES
    Pipeline(PIPELINE)


@pytest.mark.parametrize("name", [name for name in NAMES if PASSES[name].needs])
def test_a_pass_needs_the_facts_of_those_before_it(name: str) -> None:
    (fact,) = PASSES[name].needs
    with pytest.raises(FP4ValueError, match=rf"pass '{name}' needs \['{fact}'\], which no pass before it gives"):
        Pipeline((PASSES[name],))
    giver = next(index for index, step in enumerate(PIPELINE) if fact in step.gives)
    without = PIPELINE[:giver] + PIPELINE[giver + 1 :]
    with pytest.raises(FP4ValueError, match=rf"needs \['{fact}'\]"):
        Pipeline(without)


def test_a_wrong_order_is_an_error() -> None:
    with pytest.raises(FP4ValueError, match=r"pass 'annotate' needs \['sites'\]"):
        Pipeline(tuple(reversed(PIPELINE[3:5])))


def test_select() -> None:
    names = ["canonicalise", "find_sites"]
    assert Pipeline(PIPELINE).select(names).passes == tuple(PASSES[name] for name in names)
    with pytest.raises(
        FP4ValueError, match=r"unknown pass 'fuze'; allowed: absorb, activate, annotate.*Did you mean 'fuse'"
    ):
        Pipeline(PIPELINE).select(["fuze"])
    with pytest.raises(FP4ValueError, match="pass 'fuse' needs"):
        Pipeline(PIPELINE).select(["fuse"])


# --- the driver


@dataclass(frozen=True)
class Rewrite:
    """A pass that does what a function says."""

    function: Callable[[Graph], int]
    name: ClassVar[str] = "rewrite"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ("rewritten",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        return self.function(graph_module.graph)


def product() -> Captured:
    return trace(lambda x, w: (x @ w).relu(), randn(4, 64), randn(64, 32), parameters="w")


def _use_before_definition(graph: Graph) -> int:
    *_, mm, relu, _ = graph.nodes
    mm.prepend(relu)
    return 1


def _no_value(graph: Graph) -> int:
    *_, relu, output = graph.nodes
    with graph.inserting_before(output):
        added = graph.call_function(torch.ops.aten.neg.default, (relu,))
    added.meta["fp4compile"] = True
    relu.replace_all_uses_with(added, delete_user_cb=lambda user: user is output)
    return 1


@pytest.mark.parametrize(
    ("function", "complaint"),
    [(_use_before_definition, "left a malformed graph"), (_no_value, r"inserted neg\w* without meta\['val'\]")],
)
def test_a_pass_that_breaks_the_graph_is_named(function: Callable[[Graph], int], complaint: str) -> None:
    captured = product()
    with pytest.raises(RewriteError, match=f"pass 'rewrite' {complaint}"):
        Pipeline((Rewrite(function),)).run(captured.module, captured.context)


def test_the_driver_cleans_up_notes_facts_and_time_and_shows_each_step() -> None:
    def dead(graph: Graph) -> int:
        *_, relu, output = graph.nodes
        with graph.inserting_before(output):
            graph.call_function(torch.ops.aten.neg.default, (relu,))
        return 1

    captured, seen = product(), []
    steps = (PASSES["canonicalise"], Rewrite(dead))

    def observe(step: Pass, graph: Graph, context: Context) -> None:
        seen.append((step.name, len(graph.nodes)))

    Pipeline(steps).run(captured.module, captured.context, observe)
    assert seen == [("canonicalise", 5), ("rewrite", 5)]
    assert captured.context.facts == {"canonical", "rewritten"}
    assert set(captured.context.seconds) == {"canonicalise", "rewrite"}
    assert not captured.calls(torch.ops.aten.neg.default)


# --- registered passes


@pytest.fixture
def registry() -> Iterator[None]:
    before = list(pipeline._EXTRA)
    yield
    pipeline._EXTRA[:] = before


@dataclass(frozen=True)
class CountQuantise:
    """A user's pass: counts quantisations, with an option."""

    seen: list[int] = dataclasses.field(default_factory=list, compare=False)
    name: ClassVar[str] = "count"
    needs: ClassVar[tuple[str, ...]] = ("shared",)
    gives: ClassVar[tuple[str, ...]] = ("counted",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        quantize = torch.ops.fp4compile.quantize.default
        self.seen.append(len(graph_module.graph.find_nodes(op="call_function", target=quantize)))
        return 0


def test_a_registered_pass_runs_behind_the_named_one(registry: None) -> None:
    mine = CountQuantise()
    assert fp4compile.register_pass(mine, after="share") is mine
    order: list[str] = []

    def observe(step: Pass | None, graph: Graph, context: Context) -> None:
        order.append(step.name if step else "")

    fp4compile.explain(nn.Linear(64, 32), (randn(4, 64),), "hif4-plain", backend="reference", observe=observe)
    assert order == ["", *NAMES[: NAMES.index("share") + 1], "count", *NAMES[NAMES.index("share") + 1 :]]
    assert mine.seen == [2]


def test_passes_registered_at_one_place_run_latest_first_and_can_follow_each_other(registry: None) -> None:
    first, second = CountQuantise(), Rewrite(lambda graph: 0)
    fp4compile.register_pass(first, after="share")
    fp4compile.register_pass(second, after="count")
    names = [step.name for step in default_pipeline().passes]
    assert names[names.index("share") :][:4] == ["share", "count", "rewrite", "fold"]


def test_a_pass_registered_again_replaces_the_one_before(registry: None) -> None:
    fp4compile.register_pass(CountQuantise(), after="share")
    newer = fp4compile.register_pass(CountQuantise(), after="fuse")
    added = [step for step in default_pipeline().passes if step.name == "count"]
    assert len(added) == 1 and added[0] is newer


def test_a_pass_of_the_default_pipeline_keeps_its_name(registry: None) -> None:
    class Share(CountQuantise):
        name = "share"

    with pytest.raises(FP4ValueError, match="'share' is a pass of the default pipeline"):
        fp4compile.register_pass(Share(), after="fuse")


def test_the_readme_lists_the_passes_in_order() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"`capture → ([^`]*) → backend`", readme)
    assert listed is not None and tuple(re.split(r"\s*→\s*", listed[1])) == NAMES


def test_registrations_are_gone_after_the_fixture() -> None:
    assert tuple(step.name for step in default_pipeline().passes) == NAMES


@dataclass
class NoRun:
    name: ClassVar[str] = "nothing"
    needs: ClassVar[tuple[str, ...]] = ()
    gives: ClassVar[tuple[str, ...]] = ()


class NoDataclass:
    name = "plain"
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    def run(self, graph_module: GraphModule, context: Context) -> int:
        return 0


@pytest.mark.parametrize("step", [NoRun(), NoDataclass(), CountQuantise, "fuse", None])
def test_what_is_no_pass_cannot_be_registered(step, registry: None) -> None:
    with pytest.raises(FP4TypeError, match="register_pass needs a frozen dataclass with name, needs, gives and run"):
        fp4compile.register_pass(step, after="share")


def test_a_registration_at_a_wrong_place_is_undone(registry: None) -> None:
    with pytest.raises(FP4ValueError, match=r"unknown pass 'sharing'; allowed: .*Did you mean 'share'"):
        fp4compile.register_pass(CountQuantise(), after="sharing")
    with pytest.raises(FP4ValueError, match=r"pass 'count' needs \['shared'\]"):
        fp4compile.register_pass(CountQuantise(), after="stabilise")
    assert tuple(step.name for step in default_pipeline().passes) == NAMES


# --- what compile caches key on


@dataclass(frozen=True)
class Optional(Rewrite):
    """A pass with an option."""

    depth: int = 1


def key(recipe: str | Recipe = "hif4", *steps: Pass, **options: object) -> bytes:
    return fingerprint(context(recipe, **options), Pipeline((*PIPELINE, *steps)))


def _nothing(graph: Graph) -> int:
    return 0


OTHER_KEYS = {
    "recipe": lambda: key("hif4-plain"),
    "keep": lambda: key(dataclasses.replace(context("hif4").recipe, keep=("a",))),
    "strict": lambda: key(strict=False),
    "a pass more": lambda: key("hif4", Rewrite(_nothing)),
    "a pass's option": lambda: key("hif4", Optional(_nothing, 2)),
}


@pytest.mark.parametrize("other", OTHER_KEYS.values(), ids=OTHER_KEYS)
def test_whatever_changes_the_result_changes_the_key(other: Callable[[], bytes]) -> None:
    assert other() == other()
    assert other() not in (key(), key("hif4", Optional(_nothing, 1)))


# --- sites that cannot be done


def test_refusing_is_an_error_or_an_entry() -> None:
    captured = capture(nn.Sequential(nn.Linear(64, 32)), [randn(4, 64)]).until("annotate")
    site = captured.sites[0]
    captured.context.strict = True
    with pytest.raises(RewriteError) as raised:
        captured.context.refuse(site, "it is Monday")
    for part in ("'hif4-plain'", "forward GEMM of '0'", "addmm", "it is Monday", "keep=['0']", "strict=False"):
        assert part in str(raised.value)
    captured.context.strict = False
    captured.context.refuse(site, "it is Monday")
    record = captured.context.report().sites[0]
    assert (record.status, record.reason) == ("refused", "it is Monday")
    assert record.formats == {"input": None, "weight": None}


def test_a_report_holds_what_the_passes_wrote() -> None:
    captured = export(nn.Linear(64, 32), [randn(4, 64)], "mxfp4-w4a16").until("legalise")
    captured.context.notes.append("a note")
    report = captured.context.report()
    (record,) = report.sites
    assert (record.path, record.role, record.kind, record.status) == ("", "forward", "linear", "fp4")
    assert (record.parameter, record.kernel) == ("weight", "reference/mm")
    assert record.formats == {"input": None, "weight": "mxfp4"}
    assert (record.flops, report.weight_bytes) == (2 * 4 * 64 * 32, (8192, 1088))
    assert (report.recipe, report.backend, report.device) == ("mxfp4-w4a16", "reference", "cpu")
    assert report.notes == ["a note"]


def test_passes_are_frozen_dataclasses_with_facts() -> None:
    for step in PIPELINE:
        assert dataclasses.is_dataclass(step) and step.__dataclass_params__.frozen
        assert step.gives
    assert {Share, Fold, Fuse, Legalise} <= {type(step) for step in PIPELINE}
