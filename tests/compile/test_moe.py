"""Mixtures of experts train in FP4 in every role, as FP4 experts written by hand do; routers do not."""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers.integrations import moe

import fp4compile
from fp4compile.ops import OPS
from fp4compile.recipe import HEADS, RECIPES, Recipe
from fp4compile.report import Report
from tests.claims import Claims, everything, registered
from tests.compile.common import Step, build, by_hand, compiled, randn, relative, step
from tests.compile.experts import (
    Batched,
    Grouped,
    HandBatched,
    HandGrouped,
    HandLoop,
    Loop,
    hand_grouped_mm,
    nearest,
    treatment,
)
from tests.helpers import export

# transformers asks for the torch version through an lru_cache when its experts are bf16.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
ROLES = {"forward", "dgrad", "wgrad"}
MAIN = ("hif4", "mxfp4", "nvfp4")
PLAIN = ("hif4-plain", "mxfp4-plain", "nvfp4-plain")
SAME = 2e-6  # as in test_numerics: the same torch ops, sums of residual branches in another order
ENDS = torch.tensor([3, 3, 37, 50], dtype=torch.int32)  # uneven, one without a token, no multiple of any block

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_HEADS = {"num_key_value_heads": 2, "head_dim": 32}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "moe_intermediate_size": 128,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}

# name -> (model class, configuration class, its arguments, number of layers with experts)
MODELS: Mapping[str, tuple[Any, Any, Mapping[str, Any], int]] = {
    "qwen3_moe": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig,
        {**_COMMON, **_HEADS, **_EXPERTS, "moe_intermediate_size": 128},
        2,
    ),
    "mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig, {**_COMMON, **_HEADS, **_LOCAL}, 2),
    "gpt_oss": (tf.GptOssForCausalLM, tf.GptOssConfig, {**_COMMON, **_HEADS, **_LOCAL}, 2),
    "deepseek_v3": (tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config, {**_COMMON, **_DEEPSEEK}, 1),
    "olmoe": (tf.OlmoeForCausalLM, tf.OlmoeConfig, {**_COMMON, **_EXPERTS, "num_key_value_heads": 2}, 2),
}


# --- one stack of experts --------------------------------------------------------------------------------------------


def _step(model: Any, x: Tensor, ends: Tensor = ENDS, seed: int = 1) -> Step:
    """Output and gradients; as `common.step`, with the ends of the groups."""
    inner = getattr(model, "_orig_mod", model)
    inner.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x, ends)
    (out.float() * randn(*out.shape, seed=7)).sum().backward()
    grads = {name: p.grad.clone() for name, p in inner.named_parameters()}
    return Step({"output": out.detach(), "input": x.grad, **grads})


def _experts(recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> tuple[Grouped, HandGrouped]:
    model = Grouped().to(dtype)
    by_loop = copy.deepcopy(model)
    by_loop.__class__, by_loop.how = HandGrouped, treatment(recipe)
    return model, by_loop


@pytest.mark.parametrize("backend", ["reference", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", [*PLAIN, *MAIN])
def test_grouped_experts_are_fp4_experts_in_a_loop(recipe: str, backend: str) -> None:
    """Bit for bit: the same values, in sums of the same order; Inductor is told to round like eager."""
    model, by_loop = _experts(nearest(recipe))
    x = randn(50, 64, dtype=torch.bfloat16)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        got = _step(compiled(model, nearest(recipe), backend), x)
    wanted = _step(by_loop, x).check()
    assert got.worst(wanted) == 0.0
    assert min(_step(model, x).error(wanted).values()) > 0.1
    sites = fp4compile.last_report().sites
    assert {(s.parameter, s.role) for s in sites} == {(w, role) for w in ("w1", "w2", "w3") for role in ROLES}
    assert all((s.kind, s.status) == ("grouped", "fp4") for s in sites)


class _OneExpert(nn.Module):
    """A stack of weights of which one takes every token; the others are zeros, and so are the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 128, 256, dtype=torch.bfloat16))
        self.weight.data[1] = randn(128, 256, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([13, 63, 63, 63], dtype=torch.int32)
        return torch._grouped_mm(torch.cat([x.new_zeros(13, 128), x]), self.weight, offs=ends)[13:]


class _OneLinear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("recipe", ["mxfp4-tseng", "quartet", "fp4-all-the-way", "tetrajet", "tetrajet-v2", "quartet2"])
def test_an_expert_that_takes_every_token_is_a_linear_layer(recipe: str) -> None:
    """Bit for bit, for recipes that quantise operands again, clip gradients, or scale by numbers of their own."""
    experts = _OneExpert()
    dense = _OneLinear(experts.weight.data[1])
    x = randn(50, 128, dtype=torch.bfloat16)
    wanted, got = (step(compiled(model, nearest(recipe)), x).tensors for model in (dense, experts))
    sites = fp4compile.last_report().sites
    assert {(s.kind, s.status) for s in sites if s.role != "forward"} == {("grouped", "fp4")}
    assert not got["weight"][[0, 2, 3]].any()
    got["weight"] = got["weight"][1]
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


class _Cast(Grouped):
    """fp32 weights that experts use in bf16, as torchtitan does."""

    def mm(self, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return super().mm(x.bfloat16(), weight.bfloat16(), ends)


class _Checkpointed(Grouped):
    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        out: Tensor = checkpoint(super().forward, x, ends, use_reentrant=False)
        return out


def test_fp32_weights_that_are_cast() -> None:
    model, x = _Cast(), randn(50, 64)
    got = _step(compiled(model, "hif4-plain"), x).tensors
    halved, _ = _experts(RECIPES.get("hif4-plain"))
    wanted = _step(compiled(halved, "hif4-plain"), x.bfloat16()).tensors
    for name in ("output", "w1", "w2", "w3"):  # the input's two gradients are added in fp32 here, in bf16 there
        assert got[name].dtype == (torch.bfloat16 if name == "output" else torch.float32)
        assert torch.equal(got[name], wanted[name].to(got[name].dtype)), name


def test_exported_experts_are_packed() -> None:
    """Weights of an inference graph are quantised once, in whatever layout the graph reads them."""
    model, x = Grouped().bfloat16(), randn(50, 64, dtype=torch.bfloat16)
    captured = export(model, (x, ENDS), "nvfp4-w4a4", decompose=False).until("insert_qdq")
    wanted = captured.execute(x, ENDS)
    captured.after("insert_qdq")
    assert {str(n.target) for n in captured.module.graph.find_nodes(op="get_attr")} == {
        f"{name}_{part}" for name in ("w1", "w2", "w3") for part in ("codes", "scales", "tensor_scale")
    }
    assert all(torch.equal(a, b) for a, b in zip(captured.execute(x, ENDS), wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4"])
def test_checkpointed_experts_are_rounded_with_the_same_bits(recipe: str) -> None:
    model, x = _Checkpointed().bfloat16(), randn(50, 64, dtype=torch.bfloat16)
    got = _step(compiled(model, recipe), x)
    assert got.worst(_step(compiled(Grouped().bfloat16(), recipe), x)) == 0.0


@pytest.mark.parametrize("recipe", MAIN)
def test_kernels_of_a_device_change_nothing(recipe: str) -> None:
    """Every pass that asks for kernels gets them: what each makes of stacks and of padded tokens has the same bits."""
    model, _ = _experts(RECIPES.get(recipe))
    x = randn(50, 64, dtype=torch.bfloat16)
    wanted = _step(compiled(model, recipe), x)
    torch._dynamo.reset()
    with registered(Claims(**dict.fromkeys(OPS, everything))) as backend:
        assert _step(compiled(model, recipe, backend), x).worst(wanted) == 0.0
    assert all("claimed/" in s.kernel and s.status == "fp4" for s in fp4compile.last_report().sites)


def test_what_lies_behind_the_last_expert_counts_for_nothing() -> None:
    model, by_loop = _experts(RECIPES.get("hif4-plain"))
    x, ends = randn(50, 64, dtype=torch.bfloat16), torch.tensor([5, 5, 20, 31], dtype=torch.int32)
    got, wanted = (_step(m, x, ends).tensors for m in (compiled(model, "hif4-plain"), by_loop))
    for name in ("w1", "w2", "w3"):
        assert torch.equal(got[name], wanted[name]), name
    for name in ("output", "input"):
        assert torch.equal(got[name][:31], wanted[name][:31]), name


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-plain"])
def test_a_tensor_scale_is_that_of_the_tokens_of_experts(recipe: str) -> None:
    """Whatever a buffer holds behind them, in the input and in the gradient; torch leaves such rows unwritten."""
    model, _ = _experts(RECIPES.get(recipe))
    fp4, found = compiled(model, recipe), []
    for behind in (0.0, 1e15):
        x, grad = (randn(61, 64, seed=seed, dtype=torch.bfloat16) for seed in (0, 7))
        x[50:], grad[50:] = behind, behind
        model.zero_grad()
        torch.manual_seed(1)
        out = fp4(x.requires_grad_(), ENDS)
        out.backward(grad)
        assert x.grad is not None
        found.append([out[:50], x.grad[:50], *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_symbolic_numbers_of_tokens_draw_the_same_bits() -> None:
    """What is cleared behind the tokens of experts is one tensor, however many GEMMs read it."""
    model, _ = _experts(RECIPES.get("nvfp4"))
    x = randn(50, 64, dtype=torch.bfloat16)
    wanted = _step(compiled(model, "nvfp4"), x)
    torch._dynamo.reset()
    options = {"recipe": "nvfp4", "backend": "reference"}
    assert _step(torch.compile(model, backend="fp4compile", dynamic=True, options=options), x).worst(wanted) == 0.0


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain"])
def test_another_routing_makes_no_other_graph(recipe: str) -> None:
    model, by_loop = _experts(RECIPES.get(recipe))
    fp4 = compiled(model, recipe)
    x = randn(50, 64, dtype=torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    for ends in (
        ENDS,
        torch.tensor([0, 0, 0, 50], dtype=torch.int32),
        torch.tensor([10, 21, 50, 50], dtype=torch.int32),
    ):
        assert _step(fp4, x, ends).worst(_step(by_loop, x, ends)) == 0.0
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_another_number_of_tokens_makes_as_many_graphs_as_bf16() -> None:
    made = []
    for make in (lambda m: compiled(m, "nvfp4-plain"), lambda m: torch.compile(m, backend="aot_eager")):
        torch._dynamo.reset()
        counters.clear()
        model, by_loop = _experts(RECIPES.get("nvfp4-plain"))
        run = make(model)
        for tokens in (50, 61, 83, 4):
            x, ends = randn(tokens, 64, dtype=torch.bfloat16), ENDS.clamp(max=tokens)
            got = _step(run, x, ends)
            if not made:
                assert got.worst(_step(by_loop, x, ends)) == 0.0
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] == 2


# --- other ways to write experts -------------------------------------------------------------------------------------


def _pair(model: nn.Module, by_hand: type[nn.Module], recipe: str) -> tuple[nn.Module, Any]:
    copied: Any = copy.deepcopy(model)
    copied.__class__, copied.how = by_hand, treatment(RECIPES.get(recipe))
    return model, copied


@pytest.mark.parametrize("recipe", PLAIN)
def test_batches_of_experts(recipe: str) -> None:
    model, by_loop = _pair(Batched(), HandBatched, recipe)
    got, wanted = step(compiled(model, recipe), randn(13, 64)), step(by_loop, randn(13, 64)).check()
    assert got.worst(wanted) < SAME
    sites = fp4compile.last_report().sites
    assert {(s.parameter, s.role) for s in sites} == {(w, role) for w in ("up", "down") for role in ROLES}
    assert all((s.kind, s.status) == ("grouped", "fp4") for s in sites)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLAIN)
def test_a_loop_over_experts_that_dynamo_captures(recipe: str) -> None:
    """Numbers of tokens that depend on data, one of them zero, in one graph for every routing."""
    model, by_loop = _pair(build(Loop), HandLoop, recipe)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fp4 = compiled(model, recipe)
        for seed in (0, 1):
            x = randn(50, 64, seed=seed)
            assert step(fp4, x).worst(step(by_loop, x)) < SAME
    assert counters["stats"]["unique_graphs"] == 1
    sites = fp4compile.last_report().sites
    assert {(s.status, s.role) for s in sites if s.parameter in ("up", "down")} == {("fp4", role) for role in ROLES}
    assert {s.reason for s in sites if s.path == "gate"} == {"router logits"}
    assert fp4compile.last_report().notes == [
        "24 GEMMs have sizes that depend on data: their FLOPs are not known and count 0"
    ]


def test_a_loop_over_experts_that_dynamo_leaves_to_python_is_reported() -> None:
    report = fp4compile.explain(build(Loop), randn(50, 64), "hif4-plain", train=True)
    found = {(s.parameter, s.kind, s.status) for s in report.sites}
    assert found == {("up", "grouped", "refused"), ("down", "grouped", "refused"), ("gate.weight", "linear", "refused")}
    assert any("capture_dynamic_output_shape_ops = True" in note for note in report.notes)


def test_modules_in_a_loop_are_found_through_the_graph_that_they_share() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).tanh()

    class Modules(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Expert() for _ in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for index, expert in enumerate(self.experts):
                x = x + expert(x[torch.where(x[:, 0] > index)[0]]).sum(0)
            return x

    report = fp4compile.explain(Modules(), randn(50, 64), "hif4-plain", train=True)
    assert {s.status for s in report.sites} == {"fp4"}
    assert len(report.notes) == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mxfp4", "nvfp4"])
def test_stochastic_gradients_have_the_right_mean(recipe: str) -> None:
    """As for linear layers: over n steps the error shrinks by sqrt(n), to that factor itself."""
    model, by_loop = _experts(RECIPES.get(recipe), torch.bfloat16)
    x, fp4 = randn(50, 64, dtype=torch.bfloat16), compiled(model, recipe)
    wanted = _step(by_loop, x)
    steps = [_step(fp4, x, seed=seed).tensors for seed in range(48)]
    for name in ("input", "w1", "w2", "w3"):
        values = [s[name].float() for s in steps]
        single = sum(relative(v, wanted.tensors[name].float()) for v in values) / len(values)
        mean = relative(torch.stack(values).mean(0), wanted.tensors[name].float())
        assert single > 0.02, name
        assert 0.6 < mean * len(values) ** 0.5 / single < 1.5, name


# --- models of transformers ------------------------------------------------------------------------------------------


def _model(name: str, **more: Any) -> nn.Module:
    model_class, config_class, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model_class(config_class(**{**arguments, **more})).eval()


def _gradients(model: Any) -> dict[str, Tensor]:
    inner = getattr(model, "_orig_mod", model)
    inner.zero_grad()
    ids = torch.randint(3, 60, (2, 37), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    out = model(input_ids=ids, use_cache=False)
    out.logits.float().log_softmax(-1)[..., 0].mean().neg().backward()
    grads = {name: p.grad.clone() for name, p in inner.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


def _check(report: Report, model: nn.Module, layers: int) -> None:
    """Every expert GEMM and all but heads and routers are FP4, in every role."""
    assert not report.count("refused"), report.to_text()
    stacks = {name for name, p in model.named_parameters() if p.dim() == 3}
    grouped = [(s.parameter, s.role) for s in report.sites if s.kind == "grouped" and s.status == "fp4"]
    assert sorted(grouped) == sorted((name, role) for name in stacks for role in ROLES)
    assert len(stacks) == 2 * layers
    kept = [(s.path.rpartition(".")[2], s.reason) for s in report.sites if s.status == "kept"]
    routers = [name for name, reason in kept if reason == "router logits"]
    assert len(routers) == 3 * layers
    assert set(routers) <= {"gate", "router"}
    assert {name for name, _ in kept} - set(routers) <= set(HEADS)
    assert report.fp4_share > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MAIN)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_fp4_experts_by_hand(name: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere in the model sums come in another order, and what that carries across a rounding boundary may cross
    more of them on its way down: 3% of a gradient were seen, where FP4 itself is 50%."""
    model = _model(name)
    got = _gradients(compiled(model, recipe))  # with the random bits of the recipe
    _check(fp4compile.last_report(), model, MODELS[name][3])
    assert all(grad.isfinite().all() and grad.any() for grad in got.values())
    got = _gradients(compiled(model, nearest(recipe)))
    usual = _gradients(model)
    how = treatment(nearest(recipe))
    monkeypatch.setattr(moe, "_grouped_mm", lambda x, weight, offs: hand_grouped_mm(x, weight, offs, how))
    wanted = _gradients(by_hand(model, how))
    assert got.keys() == wanted.keys()
    for tensor, value in got.items():
        error = relative(value, wanted[tensor])
        assert error < (SAME if "experts" in tensor else 0.25 * relative(usual[tensor], wanted[tensor])), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_batched_experts_are_grouped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a weight per token, with matrices on the left (Qwen) and on the right (gpt-oss)."""
    model = _model(name, experts_implementation="batched_mm")
    got = _gradients(compiled(model, "hif4"))
    _check(fp4compile.last_report(), model, MODELS[name][3])
    how = treatment(RECIPES.get("hif4"))
    monkeypatch.setattr(moe, "_grouped_mm", lambda x, weight, offs: hand_grouped_mm(x, weight, offs, how))
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))  # the blocks of wgrad depend on the order
    model.set_experts_implementation("grouped_mm")
    wanted = _gradients(by_hand(model, how))
    assert got.keys() == wanted.keys()
    for tensor, value in got.items():
        assert relative(value, wanted[tensor]) < SAME, tensor


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_any_number_of_tokens_in_one_graph(implementation: str) -> None:
    model = _model("qwen3_moe", experts_implementation=implementation)
    torch._dynamo.reset()
    counters.clear()
    options = {"recipe": "nvfp4", "backend": "reference"}
    fp4 = torch.compile(model, backend="fp4compile", dynamic=True, options=options)
    for tokens in (37, 21, 50):
        model.zero_grad()
        fp4(input_ids=torch.randint(3, 60, (2, tokens)), use_cache=False).logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert counters["stats"]["unique_graphs"] == 1
    _check(fp4compile.last_report(), model, 2)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MAIN)
def test_bf16_experts_under_inductor(recipe: str) -> None:
    """torch's own grouped GEMM, which transformers calls in bf16."""
    model = _model("qwen3_moe").bfloat16()
    got = _gradients(compiled(model, recipe, "auto"))
    _check(fp4compile.last_report(), model, 2)
    assert all(grad.isfinite().all() and grad.any() for grad in got.values())
