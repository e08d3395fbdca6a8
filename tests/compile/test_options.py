"""Options of `torch.compile(backend="fp4compile")`, their errors and warnings, and `last_report()`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError, FP4Warning, RewriteError
from fp4compile.recipe import RECIPES, Operand, Recipe, Rule
from tests.compile.common import Mlp, Stack, build, by_hand, compiled, plain, randn, relative, statuses, step

ROLES = ("forward", "dgrad", "wgrad")


def _paths(status: str) -> set[str]:
    return {path for (path, _), found in statuses().items() if found == status}


# --- keep and strict -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["second", "sec*", "s?cond", "second.weight"])
def test_keep_leaves_modules_in_high_precision(glob: str) -> None:
    model, x = build(Mlp), randn(13, 70)
    got = step(compiled(model, keep=[glob]), x)
    assert _paths("kept") == {"second"}
    assert _paths("fp4") == {"first", "third"}
    hand = by_hand(model, plain("hif4"))
    hand.second.__class__ = nn.Linear
    assert got.worst(step(hand, x)) < 2e-6
    assert got.worst(step(compiled(model), x)) > 0.01


def test_keeping_all_is_the_model_itself() -> None:
    model, x = build(Mlp), randn(13, 70)
    assert step(compiled(model, keep=["*"]), x).worst(step(model, x)) < 2e-6
    assert set(statuses().values()) == {"kept"}


def test_the_root_is_kept_by_its_path() -> None:
    """Which is empty, as messages about a GEMM of the root module say it; no warning that it matches nothing."""
    model, x = build(lambda: nn.Linear(64, 17)), randn(13, 64)
    step(compiled(model, "hif4", keep=["dgrad:"]), x)
    assert statuses() == {("", "forward"): "fp4", ("", "wgrad"): "fp4", ("", "dgrad"): "kept"}


def test_a_glob_that_matches_nothing_warns_and_names_the_nearest() -> None:
    model = compiled(build(Mlp), keep=["secnd"])
    with pytest.warns(FP4Warning, match=r"'secnd' .*matches no module; the nearest is 'second'"):
        model(randn(13, 70))


class _Odd(nn.Module):
    """dgrad of `narrow` runs along 10 features."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.wide(x).relu())


def test_strict_names_module_reason_and_remedy() -> None:
    model = compiled(build(_Odd), "hif4")
    with pytest.raises(RewriteError) as caught:
        model(randn(13, 64))
    message = str(caught.value)
    for part in (
        "'hif4'",
        "dgrad",
        "'narrow'",
        "test_options.py:",
        "size 64",
        "10 features",
        "keep=['narrow']",
        "strict=False",
    ):
        assert part in message


def test_not_strict_trains_and_reports_what_was_refused() -> None:
    model, x = build(_Odd), randn(13, 64)
    got = step(compiled(model, "hif4", strict=False), x).check()
    refused = [s for s in fp4compile.last_report().sites if s.status == "refused"]
    assert [(s.path, s.role) for s in refused] == [("narrow", "dgrad")]
    assert "does not divide the 10 features" in refused[0].reason
    assert refused[0].formats == {"grad": None, "weight": None}
    # The bias gradient below a dgrad in high precision: exact but for the mask of the forward's FP4.
    kept = step(compiled(model, "hif4", keep=["narrow"]), x)
    assert relative(got.tensors["narrow.bias"], kept.tensors["narrow.bias"]) < 2e-6
    assert relative(got.tensors["narrow.weight"], kept.tensors["narrow.weight"]) > 0.01  # its wgrad is FP4


def _backward_inside(model: nn.Module) -> Callable[[], object]:
    x = randn(13, 64)
    return lambda: model(x).sum().backward()


def _func_grad(model: nn.Module) -> Callable[[], object]:
    x, weights = randn(13, 64), dict(model.named_parameters())

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).sum()

    return lambda: torch.func.grad(loss)(weights)


@pytest.mark.parametrize("make", [_backward_inside, _func_grad])
def test_gradients_within_the_compiled_code_are_refused(
    make: Callable[[torch.nn.Module], Callable[[], object]],
) -> None:
    """Their wgrads would stay in high precision and their dgrads be forward GEMMs, without a word."""
    step = make(build(_Odd))
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        with pytest.raises(FP4ValueError, match="takes gradients itself"):
            compiled(step, "hif4-plain")()
        compiled(step, "hif4-plain", strict=False)()
    assert any("wgrads are in high precision" in note for note in fp4compile.last_report().notes)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.one(x), lambda x: self.two(x), (x,))


@pytest.mark.slow
def test_branches_stay_in_high_precision_on_every_backend() -> None:
    """Inductor hands its pass each branch alone, whose inputs say nothing of parameters and tangents."""
    model, x = build(_Branches), randn(13, 64)
    with pytest.raises(RewriteError, match="graph of its own"):
        compiled(model, "hif4-plain", "inductor")(x)
    torch._dynamo.reset()
    got = compiled(model, "hif4-plain", "inductor", strict=False)(x)
    assert relative(got, model(x)) < 2e-6
    assert {path for path, _ in statuses()} == {"one", "two"} and set(statuses().values()) == {"refused"}


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipe": "hif5"}, FP4ValueError, "unknown recipe 'hif5'.*Did you mean 'hif4'"),
        ({"recipe": 4}, FP4TypeError, "recipe must be"),
        ({"recipe": "no/such.toml"}, FP4ValueError, "cannot read recipe 'no/such.toml'"),
        ({"recpie": "hif4"}, FP4ValueError, "unknown option 'recpie'.*Did you mean 'recipe'"),
        ({"backend": "inducter"}, FP4ValueError, "unknown backend 'inducter'.*Did you mean 'inductor'"),
        ({"backend": 1}, FP4TypeError, "'backend' must be a name"),
        ({"mode": "fast"}, FP4ValueError, "unknown mode 'fast'"),
        ({"strict": "no"}, FP4TypeError, "'strict' must be a bool"),
        ({"keep": "lm_head"}, FP4TypeError, "keep must be a list of globs"),
    ],
)
def test_wrong_options_escape_dynamo_as_they_are(options: dict, error: type, message: str) -> None:
    model = torch.compile(build(Mlp), backend="fp4compile", options=options)
    with pytest.raises(error, match=message) as caught:
        model(randn(13, 70))
    assert isinstance(caught.value, ValueError if error is FP4ValueError else TypeError)
    assert type(caught.value) is error


# --- what is accepted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("max-autotune", marks=pytest.mark.slow)])
def test_modes_of_inductor(mode: str) -> None:
    model, x = nn.Sequential(nn.Linear(70, 16)), randn(13, 70)
    wanted = step(by_hand(model, plain("hif4")), x)
    assert step(compiled(model, backend="auto", mode=mode), x).worst(wanted) < 2e-3


def test_no_options_is_hif4_on_inductor() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(64, 64)), backend="fp4compile")
    model(randn(13, 64)).sum().backward()
    report = fp4compile.last_report()
    assert (report.recipe, report.backend, report.device) == ("hif4", "inductor", "cpu")
    assert statuses() == {("0", "forward"): "fp4", ("0", "wgrad"): "fp4"}  # no input gradient, no dgrad


def test_a_recipe_object_and_its_file_do_the_same(tmp_path) -> None:
    spec = Operand("mxfp4", scale_rule="even")
    recipe = Recipe("mine", (Rule("forward", modules="f*", input=spec, weight=spec),))
    recipe.save(tmp_path / "mine.toml")
    model, x = build(Mlp), randn(13, 70)
    as_object = step(compiled(model, recipe), x)
    assert fp4compile.last_report().recipe == "mine"
    assert _paths("fp4") == {"first"}
    torch._dynamo.reset()
    for path in (tmp_path / "mine.toml", str(tmp_path / "mine.toml")):
        assert step(compiled(model, path), x).worst(as_object) == 0.0
    weight, x_q = (fp4compile.fake_quantize(t, "mxfp4", scale_rule="even") for t in (model.first.weight, x))
    first = nn.functional.linear(x_q, weight, model.first.bias)
    wanted = model.third(nn.functional.gelu(model.second(nn.functional.gelu(first))))
    assert relative(as_object.tensors["output"], wanted.detach()) < 2e-6


def test_a_registered_recipe_is_found_by_name() -> None:
    recipe = Recipe("only-second", (Rule("forward", modules="second", weight=Operand("hif4")),))
    fp4compile.register_recipe(recipe)
    try:
        compiled(build(Mlp), "only-second")(randn(13, 70))
    finally:
        del RECIPES.registered["only-second"]
    assert _paths("fp4") == {"second"}


# --- the depth rule of nvfp4 -----------------------------------------------------------------------------------------


def test_nvfp4_keeps_the_last_blocks() -> None:
    """15% of 4 blocks is one; the head is kept as a head."""
    compiled(build(lambda: Stack(depth=4)), "nvfp4")(randn(13, 64)).sum().backward()
    assert _paths("kept") == {"layers.3.up", "layers.3.down", "head"}
    assert len(_paths("fp4")) == 6
    assert "last 15% of 4 blocks" in next(s.reason for s in fp4compile.last_report().sites if s.path == "layers.3.up")


def test_blocks_in_a_sequential_count_as_blocks() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Mlp(16, 16, 16, 16) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blocks(x)

    compiled(Chain(), "nvfp4")(randn(3, 16))
    assert _paths("kept") == {f"blocks.3.{name}" for name in ("first", "second", "third")}


def test_a_block_compiled_alone_cannot_know_its_depth() -> None:
    model = build(lambda: Stack(depth=4))
    model.layers[1].compile(backend="fp4compile", options={"recipe": "nvfp4", "backend": "reference"})
    with pytest.raises(RewriteError, match=r"one block of a larger model.*depth of 'up'.*keep_last = 0"):
        model(randn(13, 64))
    torch._dynamo.reset()
    model.layers[1].compile(backend="fp4compile", options={"recipe": "mxfp4", "backend": "reference"})
    model(randn(13, 64)).sum().backward()  # a recipe without a depth rule is free to
    assert _paths("fp4") == {"up", "down"}


@pytest.mark.parametrize("how", ["torch.compile", "module.compile", "function"])
def test_a_model_without_blocks_is_quantised_whole(how: str) -> None:
    model = build(lambda: Mlp(64, 64, 64, 64))
    options = {"recipe": "nvfp4", "backend": "reference"}
    if how == "module.compile":
        model.compile(backend="fp4compile", options=options)
        run = model
    else:
        subject = model if how == "torch.compile" else lambda x: model(x)
        run = torch.compile(subject, backend="fp4compile", options=options)
    run(randn(13, 64)).sum().backward()
    assert _paths("fp4") == {"first", "second", "third"}
    assert any("no list of blocks" in note for note in fp4compile.last_report().notes)


# --- last_report -----------------------------------------------------------------------------------------------------


class _Broken(nn.Module):
    """A graph break between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        torch._dynamo.graph_break()
        return self.after(x.relu())


def test_the_report_merges_the_graphs_of_one_model() -> None:
    step(compiled(build(_Broken)), randn(5, 32))
    report = fp4compile.last_report()
    assert report.graphs == 2
    assert statuses() == {(path, role): "fp4" for path in ("before", "after") for role in ROLES}
    assert len(report.sites) == 6


class _Loop(nn.Module):
    """A graph break in a loop: Dynamo leaves such a function to Python as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class _Parts(nn.Module):
    """A layer, two modules of one class that Dynamo makes a graph of each, and a function that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.loop = nn.Linear(32, 32), nn.ModuleList(_Broken() for _ in range(2)), _Loop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.loop(x)


def test_the_report_of_a_model_in_pieces_knows_their_places() -> None:
    """A graph of a block serves those of its class; what no graph holds is refused."""
    model = compiled(build(_Parts))
    step(model, randn(5, 32))
    report = fp4compile.last_report()
    blocks = {f"blocks.*.{name}" for name in ("before", "after")}
    assert {s.path: s.status for s in report.sites if s.role == "forward"} == {
        **dict.fromkeys(blocks, "fp4"),
        **dict.fromkeys(("first", "loop.layers.0", "loop.layers.1"), "refused"),
    }
    assert {s.parameter for s in report.sites if s.status == "fp4"} == {f"{path}.weight" for path in blocks}
    assert blocks == {name.removesuffix(".weight") for name in report.weights}


class _Inner(nn.Module):
    """A graph break before the only block, so that the graph starts there."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Mlp(32, 32, 32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.block(x)


def test_globs_are_of_the_whole_model_where_graphs_start_within_it() -> None:
    """A warning that one matches no module would be an error here."""
    step(compiled(build(_Inner), keep=["block.first", "wgrad:block.third.weight"]), randn(5, 32))
    kept = {key for key, status in statuses().items() if status == "kept"}
    assert kept == {
        ("block.first", "forward"),
        ("block.first", "dgrad"),
        ("block.first", "wgrad"),
        ("block.third", "wgrad"),
    }


def test_one_graph_for_modules_that_the_recipe_treats_differently_is_an_error() -> None:
    with pytest.raises(RewriteError, match=r"'blocks\.0' to 'blocks\.1', share one graph"):
        step(compiled(build(_Parts), keep=["blocks.0.*"]), randn(5, 32))
    step(compiled(build(_Parts), keep=["blocks.0.before"], strict=False), randn(5, 32))
    assert statuses()["blocks.*.before", "forward"] == "refused"
    assert statuses()["blocks.*.after", "forward"] == "fp4"
    step(compiled(build(_Parts), keep=["blocks.*.before"]), randn(5, 32))
    assert statuses()["blocks.*.before", "forward"] == "kept"


def test_an_error_within_a_model_in_pieces_says_what_to_keep() -> None:
    transformed = {name: Operand("mxfp4", hadamard=64) for name in ("input", "weight")}
    recipe = Recipe("mine", rules=(Rule(role="forward", **transformed),))
    with pytest.raises(RewriteError, match=r"keep=\['blocks\.\*\.before'\]"):
        step(compiled(build(_Parts), recipe), randn(5, 32))
    step(compiled(build(_Parts), recipe, keep=["blocks.*.before", "blocks.*.after"]), randn(5, 32))


def test_a_model_without_a_graph_is_told_from_the_one_before() -> None:
    note = "not in this report: what was compiled after its last graph, which gave no graph"
    step(compiled(build(Mlp)), randn(13, 70))
    assert note not in fp4compile.last_report().notes
    step(compiled(build(_Loop)), randn(5, 32))
    assert note in fp4compile.last_report().notes
    assert any("function left to Python as a whole" in each for each in fp4compile.last_report().notes)


def test_a_recompilation_does_not_double_the_sites() -> None:
    model = compiled(build(Mlp))
    step(model, randn(13, 70))
    step(model, randn(14, 70))
    assert len(fp4compile.last_report().sites) == 9


def test_another_model_starts_a_new_report() -> None:
    step(compiled(build(Mlp)), randn(13, 70))
    step(compiled(build(_Broken), "mxfp4-plain"), randn(5, 32))
    report = fp4compile.last_report()
    assert report.recipe == "mxfp4-plain"
    assert {s.path for s in report.sites} == {"before", "after"}
