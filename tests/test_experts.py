"""Experts on packed weights: transformers' mixtures of experts from a checkpoint or memory to a loaded model."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import fp4compile
from fp4compile import checkpoint, cli, experts
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.packed import PackedLinear, PackedStack, PackedWeight
from fp4compile.recipe import Operand

tf = pytest.importorskip("transformers")

_SIZES = {"hidden_size": 64, "vocab_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
_HEADS = {**_SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1}
_LATENT = {f"{name}_head_dim": 16 for name in ("qk_rope", "qk_nope", "v")} | {"q_lora_rank": 32, "kv_lora_rank": 32}
# Each with what the others lack: parts side by side, a router of its own, biases and stacks [experts, in, out] under a
# clamped gate, shared experts, a forward without `use_cache`.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {**_HEADS, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 12}),
    "mixtral": ("Mixtral", {**_HEADS, "intermediate_size": 96, "num_local_experts": 4}),
    "gpt_oss": (
        "GptOss",
        {**_HEADS, "head_dim": 16, "intermediate_size": 48, "num_local_experts": 4, "layer_types": ["full_attention"]},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_HEADS, **_LATENT, "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
        },
    ),
    "granitemoe": ("GraniteMoe", {**_HEADS, "intermediate_size": 32, "num_local_experts": 4}),
}  # fmt: skip
TRAITS = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in ("qwen3_moe", "gpt_oss")]


@cache
def model(name: str) -> Any:
    """A small model whose experts do not treat their tokens alike, fp32."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    made = getattr(tf, f"{cls}ForCausalLM")(getattr(tf, f"{cls}Config")(**config)).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return made


def tokens(count: int = 7) -> Tensor:
    return torch.randint(2, 96, (2, count), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, recipe) -> what was written, once."""
    root = tmp_path_factory.mktemp("experts")
    return cache(lambda name, recipe: fp4compile.convert(model(name), recipe, out=root / f"{name}-{recipe}"))


def fake(name: str, loaded: nn.Module, format: str) -> Any:
    """The original, with the weights that are packed in the loaded model fake-quantised."""
    made = copy.deepcopy(model(name))
    for path, layer in loaded.named_modules():
        if isinstance(layer, PackedLinear | PackedStack):
            weight = made.get_parameter(path if isinstance(layer, PackedStack) else f"{path}.weight")
            weight.data = fp4compile.fake_quantize(weight.data, format, layer.packed.axis)
            assert torch.equal(layer.weight, weight)
    return made


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", *TRAITS])
@pytest.mark.parametrize("format", ["hif4", pytest.param("nvfp4", marks=pytest.mark.slow)])
@torch.no_grad()
def test_logits_are_those_of_fake_quantised_weights(converted: Any, name: str, format: str) -> None:
    made = converted(name, f"{format}-w4a16")
    loaded = fp4compile.load(made.path)
    stacks = {path: m for path, m in loaded.named_modules() if isinstance(m, PackedStack)}
    assert sorted(path.rpartition(".")[2] for path in stacks) == ["down_proj", "gate_up_proj"]
    assert not any(p.dim() == 3 for p in loaded.parameters())
    reference = fake(name, loaded, format)
    torch.testing.assert_close(loaded(tokens()).logits, reference(tokens()).logits, rtol=1e-4, atol=1e-5)
    kernels = {s.kind: s.kernel for s in made.report.sites if s.status == "fp4"}
    assert kernels == {"linear": "fp4compile.mm", "grouped": "fp4compile.grouped_mm_packed"}
    assert made.report.count("refused") == 0


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@torch.no_grad()
@pytest.mark.slow
def test_activations_are_quantised_where_the_recipe_says_so(converted: Any, name: str) -> None:
    loaded = fp4compile.load(converted(name, "nvfp4-w4a4").path)
    torch._dynamo.reset()
    options = {"recipe": "nvfp4-w4a4", "backend": "reference"}
    compiled = torch.compile(model(name), backend="fp4compile", options=options)
    expected, got = (m(tokens(), use_cache=False).logits for m in (compiled, loaded))
    weights_only = fake(name, loaded, "nvfp4")(tokens()).logits
    # Summation order can move an activation across a rounding boundary, so not every bit agrees.
    assert (got - expected).norm() < 1e-3 * expected.norm() < (weights_only - expected).norm()


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_one_state_one_generation(converted: Any) -> None:
    loaded = fp4compile.load(converted("qwen3_moe", "hif4-w4a16").path)
    reference = fake("qwen3_moe", loaded, "hif4")
    made = [m.generate(tokens(), max_new_tokens=4, do_sample=False) for m in (loaded, reference)]
    assert torch.equal(*made)
    assert type(copy.deepcopy(loaded).model.layers[0].mlp.experts) is type(loaded.model.layers[0].mlp.experts)
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    expected = loaded(tokens(), use_cache=False).logits
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    other = fp4compile.load(converted("qwen3_moe", "hif4-w4a16").path)
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(loaded.state_dict())
    assert torch.equal(other(tokens()).logits, loaded(tokens()).logits)


def test_gradients_go_through_packed_experts(converted: Any) -> None:
    loaded = fp4compile.load(converted("qwen3_moe", "hif4-w4a16").path)
    reference = fake("qwen3_moe", loaded, "hif4")
    found = []
    for each in (loaded, reference):
        embedded = model("qwen3_moe").model.embed_tokens(tokens()).detach().requires_grad_()
        each(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_packed_experts_are_copied_and_pickled(converted: Any) -> None:
    loaded = fp4compile.load(converted("qwen3_moe", "hif4-w4a16").path)
    expected = loaded(tokens()).logits
    for made in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert type(made.model.layers[0].mlp.experts) is type(loaded.model.layers[0].mlp.experts)
        assert torch.equal(made(tokens()).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(converted: Any, dtype: torch.dtype) -> None:
    folder = converted("gpt_oss", "hif4-w4a16").path
    wide, loaded = fp4compile.load(folder), fp4compile.load(folder, dtype=dtype)
    stack = loaded.model.layers[0].mlp.experts.gate_up_proj
    assert stack.weight.dtype == dtype
    assert torch.equal(stack.weight.float(), wide.model.layers[0].mlp.experts.gate_up_proj.weight.to(dtype).float())
    expected = wide(tokens()).logits
    assert (loaded(tokens()).logits.float() - expected).norm() < 0.05 * expected.norm()


# --- checkpoints -----------------------------------------------------------------------------------------------------


def written(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("name", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mixtral",))])
def test_experts_that_a_checkpoint_holds_one_by_one_are_stacked(converted: Any, name: str, tmp_path: Path) -> None:
    model(name).save_pretrained(tmp_path / "source")
    source = written(tmp_path / "source")
    assert any(".experts.0." in key for key in source)
    expected = converted(name, "hif4-w4a16")
    made = fp4compile.convert(tmp_path / "source", "hif4-w4a16", out=tmp_path / "out")
    mine, other = written(made.path), written(expected.path)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert made.report.weight_bytes == expected.report.weight_bytes
    assert json.loads((made.path / "fp4compile.json").read_text())["extra"] == []


@pytest.mark.slow
def test_a_stack_that_is_not_whole_is_named(tmp_path: Path) -> None:
    model("qwen3_moe").save_pretrained(tmp_path / "source")
    source = written(tmp_path / "source")
    save_file({k: v for k, v in source.items() if ".experts.3.up" not in k}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(FP4ValueError, match=r"lacks .*experts\.gate_up_proj \(to be packed\); it holds .*experts\.0\."):
        fp4compile.convert(tmp_path / "source", out=tmp_path / "out")
    save_file({k: v for k, v in source.items() if ".experts.3." not in k}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(FP4ValueError, match=r"shape \(11, 64, 64\), the model expects \(12, 64, 64\)"):
        fp4compile.convert(tmp_path / "source", out=tmp_path / "out")


def test_parts_of_a_stack() -> None:
    def entries(*tensors: Tensor) -> list[checkpoint.Entry]:
        def reading(t: Tensor) -> Callable[[], Tensor]:
            return lambda: t

        return [checkpoint.Entry(t.dtype, tuple(t.shape), reading(t)) for t in tensors]

    up, gate = torch.arange(24.0).view(2, 3, 4), torch.arange(32.0).view(2, 4, 4)
    stack = checkpoint.stacked([entries(*up), entries(*gate)], 1)
    assert stack is not None and stack.shape == (2, 7, 4)
    assert torch.equal(stack.read(), torch.cat([up, gate], 1))
    for parts in (
        [entries(*up), entries(gate[0])],
        [entries(*up), entries(*gate.half())],
        [entries(*up), entries(*gate[..., :3])],
        [entries(up[0], gate[0])],
    ):
        assert checkpoint.stacked(parts, 1) is None


# --- sizes, and the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bytes_and_commands_end_to_end(tmp_path: Path) -> None:
    config = {**MODELS["qwen3_moe"][1], "moe_intermediate_size": 64}  # whole blocks of 64
    torch.manual_seed(0)
    made = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**config)).eval().bfloat16()
    made.save_pretrained(tmp_path / "source")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    for arguments in (["convert", source, "--to", "safetensors", "-o", out], ["explain", source]):
        done = CliRunner().invoke(cli.app, [*arguments, "--recipe", "hif4-w4a16"], prog_name="fp4compile")
        assert done.exit_code == 0, done.output
        assert "0 refused" in done.output
    manifest = json.loads((tmp_path / "out" / "fp4compile.json").read_text())
    before, after = manifest["report"]["weight_bytes"]
    assert after <= 0.285 * before
    stack = manifest["weights"]["model.layers.0.mlp.experts.gate_up_proj"]
    assert (stack["shape"], stack["axis"], stack["format"]) == ([12, 128, 64], 2, "hif4")
    loaded = fp4compile.load(out)
    assert loaded.model.layers[0].mlp.experts.gate_up_proj.codes.dtype == torch.uint8


# --- the module ------------------------------------------------------------------------------------------------------

SPECS: dict[str, tuple[Operand, Operand | None]] = {
    "transformed": (Operand("hif4", hadamard=32), Operand("hif4", hadamard=32)),
    "2-D blocks, tensor scales": (Operand("nvfp4", block_2d=True), Operand("nvfp4")),
    "a rule": (Operand("mxfp4", scale_rule="rceil"), None),
}


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("weight", "given"), SPECS.values(), ids=SPECS)
def test_a_stack_is_a_packed_linear_layer_for_each_expert(weight: Operand, given: Operand | None, axis: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dense, tokens = (torch.randn(shape, generator=generator) for shape in ((3, 64, 64), (10, 64)))
    row = PackedWeight.from_dict(json.loads(json.dumps(PackedWeight((3, 64, 64), axis, weight, given).to_dict())))
    parts = row.pack(dense)
    assert {n: (p.shape, p.dtype) for n, p in parts.items()} == {n: (p.shape, p.dtype) for n, p in row.parts().items()}
    stack = PackedStack(row, parts, torch.float32)
    got = stack(tokens, torch.tensor([4, 4, 8]))
    one = PackedWeight((64, 64), axis - 1, weight, given)
    for expert, span in ((0, slice(0, 4)), (2, slice(4, 8))):
        own = {n: p if n == "tensor_scale" else p[expert] for n, p in parts.items()}
        layer = PackedLinear(one, own, None, torch.float32)
        assert torch.equal(stack.weight[expert], layer.weight)
        if given is None or not given.scaled_per_tensor:  # else one scale for the tokens of all
            torch.testing.assert_close(got[span], layer(tokens[span]), rtol=1e-5, atol=1e-5)
    assert not got[8:].any()


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_other_modules_and_shapes_are_refused() -> None:
    row = PackedWeight((4, 64, 96), 2, Operand("hif4"))
    module = nn.Module()
    module.gate_up_proj = nn.Parameter(torch.zeros(4, 64, 96, device="meta"))
    with pytest.raises(FP4TypeError, match="not one of transformers' stacked experts: it has no num_experts"):
        experts.pack(module, "gate_up_proj", row)
    mixture = copy.deepcopy(model("mixtral")).model.layers[0].mlp.experts
    for name, why in (("gate_up_proj", "no gate_up_proj of shape"), ("w1", "the stacks of experts are gate_up_proj")):
        with pytest.raises(FP4TypeError, match=why):
            experts.pack(mixture, name, row)


@pytest.mark.parametrize("how", ["eager", pytest.param("batched_mm", marks=pytest.mark.slow)])
def test_however_the_model_runs_its_experts(converted: Any, how: str, tmp_path: Path) -> None:
    made = copy.deepcopy(model("qwen3_moe"))
    made.set_experts_implementation(how)
    mine = written(fp4compile.convert(made, "hif4-w4a16", out=tmp_path / "out").path)
    other = written(converted("qwen3_moe", "hif4-w4a16").path)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert made.config._experts_implementation == how


@pytest.mark.parametrize(("shape", "axis"), [([3, 64, 64], 0), ([64, 64], 2), ([2, 3, 64, 64], 3)])
def test_rows_that_no_layer_runs(shape: list[int], axis: int) -> None:
    data = PackedWeight((64, 64), 1, Operand("hif4")).to_dict()
    with pytest.raises(FP4ValueError, match="a stack of matrices along 1 or 2"):
        PackedWeight.from_dict({**data, "shape": shape, "axis": axis})


@pytest.mark.slow
def test_experts_kept_by_name_stay_dense(tmp_path: Path) -> None:
    keep = ["model.layers.*.mlp.experts"]
    made = fp4compile.convert(model("qwen3_moe"), "hif4-w4a16", out=tmp_path / "out", keep=keep)
    loaded = fp4compile.load(made.path)
    assert type(loaded.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    assert torch.equal(
        loaded.model.layers[0].mlp.experts.down_proj, model("qwen3_moe").model.layers[0].mlp.experts.down_proj
    )


@torch.no_grad()
def test_one_stack_of_a_module_may_stay_dense(converted: Any) -> None:
    loaded = fp4compile.load(converted("gpt_oss", "hif4-w4a16").path)
    mixture = loaded.model.layers[0].mlp.experts
    expected = loaded(tokens()).logits
    dense = mixture.down_proj.weight
    del mixture.down_proj
    mixture.down_proj = nn.Parameter(dense)
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
