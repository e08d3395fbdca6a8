"""`load`: the loaded model computes what fake quantisation of the original's weights computes, from packed weights."""

import copy
import json
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.packed import PackedLinear, PackedWeight, replaced
from fp4compile.recipe import Operand
from tests.models import model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, recipe) -> the folder, converted once."""
    root = tmp_path_factory.mktemp("converted")

    @cache
    def folder(name: str, recipe: str) -> Path:
        return fp4compile.convert(model(name), recipe, out=root / f"{name}-{recipe}").path

    return folder


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}


def fake(name: str, format: str, paths: Any) -> Any:
    """The original with the weights of those modules fake-quantised along their contraction axis."""
    made = copy.deepcopy(model(name))
    for path in paths:
        module = made.get_submodule(path)
        axis = 0 if type(module).__name__ == "Conv1D" else 1
        module.weight.data = fp4compile.fake_quantize(module.weight.data, format, axis)
    return made


def tokens() -> Tensor:
    return torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(3))


CASES = [("llama", "hif4"), ("gpt2", "nvfp4"), ("bert", "mxfp4")]


@pytest.mark.parametrize(("name", "format"), CASES)
@torch.no_grad()
def test_weights_are_bit_equal_and_outputs_agree(converted, name, format):
    loaded = fp4compile.load(converted(name, f"{format}-w4a16"))
    layers = packed_layers(loaded)
    reference = fake(name, format, layers)
    for path, layer in layers.items():
        weight = reference.get_submodule(path).weight
        assert layer.weight.dtype == weight.dtype and torch.equal(layer.weight, weight)
        assert f"format={format}" in repr(layer)
    heads = [m for n, m in loaded.named_modules() if isinstance(m, nn.Linear)]
    assert layers and len(heads) == {"llama": 1, "gpt2": 1, "bert": 2}[name] - (name == "bert")
    torch.testing.assert_close(loaded(tokens()).logits, reference(tokens()).logits, rtol=1e-4, atol=1e-5)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@torch.no_grad()
def test_activations_are_quantised_where_the_recipe_says_so(converted):
    loaded = fp4compile.load(converted("gpt2", "nvfp4-w4a4"))
    torch._dynamo.reset()
    options = {"recipe": "nvfp4-w4a4", "backend": "reference"}
    compiled = torch.compile(model("gpt2"), backend="fp4compile", options=options)
    expected, got = (m(tokens(), use_cache=False).logits for m in (compiled, loaded))
    weights_only = fp4compile.load(converted("gpt2", "nvfp4-w4a16"))(tokens()).logits
    # Summation order can move an activation across a rounding boundary, so not every bit agrees.
    assert (got - expected).norm() < 1e-3 * expected.norm() < (weights_only - expected).norm()


@pytest.mark.parametrize("recipe", ["hif4-w4a16", "nvfp4-w4a4"])
def test_compiles_in_one_graph(converted, recipe):
    name = "gpt2" if "nvfp4" in recipe else "llama"
    loaded = fp4compile.load(converted(name, recipe))
    compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = loaded(tokens(), use_cache=False).logits
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


def test_generates(converted):
    loaded = fp4compile.load(converted("llama", "hif4-w4a16"))
    reference = fake("llama", "hif4", packed_layers(loaded))
    made = [m.generate(tokens(), max_new_tokens=5, do_sample=False) for m in (loaded, reference)]
    assert made[0].shape == (2, 12) and torch.equal(*made)


@torch.no_grad()
def test_state_dict_round_trips(converted):
    first, second = (fp4compile.load(converted("gpt2", "nvfp4-w4a16")) for _ in range(2))
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert any(k.endswith(".codes") for k in state) and state["transformer.wte.weight"].dtype == torch.float32
    for tensor in second.state_dict().values():
        tensor.zero_()
    second.load_state_dict(state)
    assert torch.equal(first(tokens()).logits, second(tokens()).logits)


def test_transformers_does_not_save_what_it_would_not_read(converted, tmp_path):
    folder = converted("llama", "hif4-w4a16")
    for loaded in (fp4compile.load(folder), copy.deepcopy(fp4compile.load(folder))):
        with pytest.raises(FP4ValueError, match=f"copy the folder '{folder}'"):
            loaded.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    again = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(again(tokens()).logits, loaded(tokens()).logits)


def test_ties_hold_after_loading(converted):
    loaded = fp4compile.load(converted("llama", "hif4-w4a16"))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes(converted, dtype):
    loaded = fp4compile.load(converted("gpt2", "nvfp4-w4a16"), dtype=dtype)
    layer = loaded.transformer.h[0].attn.c_attn
    assert {t.dtype for n, t in loaded.state_dict().items() if n.rpartition(".")[2] in ("weight", "bias")} == {dtype}
    assert layer.tensor_scale.dtype == torch.float32 and layer.weight.dtype == dtype
    out = loaded(tokens()).logits
    expected = fake("gpt2", "nvfp4", packed_layers(loaded))(tokens()).logits
    assert out.dtype == dtype and (out.float() - expected).norm() < 0.02 * expected.norm()


@torch.no_grad()
def test_casts_and_moves_leave_the_tensor_scale_alone(converted):
    loaded = fp4compile.load(converted("gpt2", "nvfp4-w4a16")).to(torch.bfloat16)
    layer = loaded.transformer.h[0].attn.c_attn
    assert layer.tensor_scale.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16 and loaded(tokens()).logits.dtype == torch.bfloat16
    on_meta = copy.deepcopy(layer).to("meta")
    assert on_meta.tensor_scale.is_meta and on_meta.tensor_scale.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_runs_on_a_gpu(converted):
    folder = converted("gpt2", "nvfp4-w4a16")
    out = fp4compile.load(folder, device="cuda")(tokens().cuda()).logits.cpu()
    torch.testing.assert_close(out, fp4compile.load(folder)(tokens()).logits, rtol=1e-2, atol=1e-3)


# --- one layer -----------------------------------------------------------------------------------------------------


def layer(row: PackedWeight, seed: int = 0) -> tuple[PackedLinear, nn.Linear]:
    torch.manual_seed(seed)
    linear = nn.Linear(row.features[0], row.features[1])
    made = replaced(linear, row)
    for name, tensor in row.pack(linear.weight.detach()).items():
        setattr(made, name, tensor)
    made.bias = linear.bias.detach()
    return made, linear


@pytest.mark.parametrize("format", ["hif4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("shape", [(5, 70), (64, 64), (1, 33)])
@torch.no_grad()
def test_any_shape_and_any_rank(format, shape):
    made, linear = layer(PackedWeight(shape, 1, Operand(format)))
    dense = fp4compile.fake_quantize(linear.weight, format, 1)
    for size in ((3, shape[1]), (2, 3, shape[1]), (shape[1],), (0, shape[1])):
        x = torch.randn(size)
        torch.testing.assert_close(made(x), nn.functional.linear(x, dense, linear.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [None, Operand("nvfp4")])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_activations_of_other_dtypes_are_refused(given, dtype):
    made, _ = layer(PackedWeight((8, 64), 1, Operand("hif4"), given))
    for autocast in (False, True):  # which casts neither integers nor fp64 for a linear layer
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(FP4TypeError, match=f"PackedLinear takes fp32, bf16 or fp16, not {dtype}"),
        ):
            made(torch.ones(3, 64, dtype=dtype))


@torch.no_grad()
def test_a_hadamard_recipe_transforms_both_operands():
    spec = Operand("mxfp4", hadamard=32)
    made, linear = layer(PackedWeight((16, 64), 1, spec, spec))
    assert (made.weight - linear.weight).norm() < 0.2 * linear.weight.norm()
    x = torch.randn(5, 64)
    exact = linear(x)
    assert (made(x) - exact).norm() < 0.25 * exact.norm()


@pytest.mark.parametrize(("format", "rule"), [("nvfp4", "4over6"), ("nvfp4", "17/16"), ("mxfp4", "floor-3/4")])
@torch.no_grad()
def test_scale_rules_of_training_recipes(format, rule):
    """What decodes a weight does not depend on the rule; what is left to a tensor scale, fixed or not, is stored."""
    spec = Operand(format, scale_rule=rule)
    made, linear = layer(PackedWeight((40, 70), 1, spec, spec))
    assert torch.equal(made.weight, fp4compile.fake_quantize(linear.weight, format, 1, scale_rule=rule))
    x = torch.randn(5, 70)
    quantized = fp4compile.fake_quantize(x, format, scale_rule=rule)
    expected = nn.functional.linear(quantized, made.weight, linear.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_square_blocks():
    made, linear = layer(PackedWeight((40, 70), 1, Operand("mxfp4", block_2d=True)))
    assert torch.equal(made.weight, fp4compile.fake_quantize(linear.weight, "mxfp4", 1, block_2d=True))
    assert "block_2d=True" in repr(made)


@pytest.mark.parametrize("given", [None, Operand("nvfp4")])
def test_gradients_reach_the_input(given):
    made, _ = layer(PackedWeight((8, 64), 1, Operand("hif4"), given))
    x = torch.randn(3, 64, requires_grad=True)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, made.weight.sum(0).expand(3, 64))


@pytest.mark.parametrize("given", [None, Operand("nvfp4")])
@torch.no_grad()
def test_autocast_is_that_of_a_linear_layer(given):
    made, linear = layer(PackedWeight((8, 64), 1, Operand("hif4"), given))
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got, like = made(x), linear(x)
    assert got.dtype == like.dtype == torch.bfloat16
    assert torch.equal(got, made(x.bfloat16()))
    assert made(x).dtype == torch.float32


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(converted: Any, tmp_path: Path) -> Any:
    """A copy of a conversion whose manifest can be changed."""

    def change(**entries: Any) -> Path:
        source = converted("llama", "hif4-w4a16")
        for file in source.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        data = json.loads((tmp_path / "fp4compile.json").read_text()) | entries
        (tmp_path / "fp4compile.json").write_text(json.dumps(data))
        return tmp_path

    return change


PATH = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 99}, "version 99 is not known here"),
        ({"weights": []}, "'weights' must be a table"),
        ({"weights": {PATH: {"shape": [2, 2]}}}, f"weight of '{PATH}': malformed"),
        ({"weights": {"nobody": {}}}, "weight of 'nobody': malformed"),
        ({"architecture": "os"}, "'os' is no model class"),
        ({"dtype": "float8"}, "unknown dtype in .*'float8'"),
        ({"dtype": ["float32"]}, "unknown dtype in"),
        ({"extra": None}, "'extra' must be a list"),
        ({"weights": {}}, "the model has no tensor"),
    ],
)
def test_manifests_that_are_refused(folder, entries, message):
    with pytest.raises(FP4ValueError, match=message):
        fp4compile.load(folder(**entries))


def test_unknown_formats_and_modules_are_named(folder):
    good = json.loads((folder() / "fp4compile.json").read_text())["weights"]
    with pytest.raises(FP4ValueError, match="unknown format 'fp5'; allowed: hif4"):
        fp4compile.load(folder(weights=good | {PATH: good[PATH] | {"format": "fp5"}}))
    with pytest.raises(FP4ValueError, match="the model has no module 'nobody'"):
        fp4compile.load(folder(weights=good | {"nobody": good[PATH]}))
    for change in ({"axis": 1.0}, {"axis": "1"}, {"shape": ["a", 2]}, {"shape": "64"}):
        with pytest.raises(FP4ValueError, match="a packed weight is a matrix packed along axis 0 or 1"):
            fp4compile.load(folder(weights=good | {PATH: good[PATH] | change}))
    for name, value in (("block_2d", 0), ("hadamard", 0.0), ("requantise", "no")):
        with pytest.raises(FP4ValueError, match=f"malformed description.*{name} is {value!r}"):
            fp4compile.load(folder(weights=good | {PATH: good[PATH] | {name: value}}))
    with pytest.raises(FP4TypeError, match="LlamaForCausalLM has no weight of shape"):
        fp4compile.load(folder(weights=good | {"": good[PATH]}))
    with pytest.raises(FP4TypeError, match="no weight of shape"):
        fp4compile.load(folder(weights=good | {PATH: good[PATH] | {"shape": [80, 64]}}))


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(FP4ValueError, match="is no folder"):
        fp4compile.load(tmp_path / "nowhere")
    with pytest.raises(FP4ValueError, match=r"has no fp4compile\.json"):
        fp4compile.load(tmp_path)
    with pytest.raises(FP4TypeError, match=r"cannot load as 'bf16'; allowed: torch\.float32, torch\.bfloat16"):
        fp4compile.load(folder(), dtype="bf16")
    with pytest.raises(FP4ValueError, match="cannot load to device 'banana': "):
        fp4compile.load(folder(), device="banana")
    (folder() / "generation_config.json").write_text("{")
    with pytest.raises(FP4ValueError, match=r"generation_config\.json: It looks like"):
        fp4compile.load(tmp_path)
    (tmp_path / "fp4compile.json").write_text("{")
    with pytest.raises(FP4ValueError, match="malformed JSON"):
        fp4compile.load(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_missing_tensors_are_named(folder, device):
    path = folder() / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v.clone() for k, v in tensors.items() if k != f"{PATH}.codes"}, path)
    with pytest.raises(FP4ValueError, match=rf"lacks {PATH}\.codes$"):
        fp4compile.load(path.parent, device=device)


@pytest.mark.parametrize(("part", "dtype"), [("codes", torch.int8), ("scales", torch.float32)])
def test_codes_and_scales_of_another_dtype_are_named(folder, part, dtype):
    path = folder() / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors[f"{PATH}.{part}"] = tensors[f"{PATH}.{part}"].to(dtype)
    save_file(tensors, path)
    with pytest.raises(FP4ValueError, match=rf"'{PATH}\.{part}' has dtype {dtype}, expected torch\.u?int"):
        fp4compile.load(path.parent)


def test_to_the_meta_device(converted):
    loaded = fp4compile.load(converted("llama", "hif4-w4a16"), device="meta")
    assert all(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


# --- checkpoints of several dtypes ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_few_matrices_of_another_dtype_do_not_decide(tmp_path):
    """One dtype for all, as transformers has it: an fp32 head cannot multiply fp16 activations."""
    made = copy.deepcopy(model("bert")).half()
    made.cls.predictions.transform.dense.float()
    made.bert.embeddings.LayerNorm.float()
    made.save_pretrained(tmp_path / "model")
    fp4compile.convert(tmp_path / "model", "hif4-w4a16", out=tmp_path / "out", keep=["cls.*"])
    loaded = fp4compile.load(tmp_path / "out")
    assert {t.dtype for t in loaded.state_dict().values() if t.is_floating_point()} == {torch.float16}
    assert loaded(tokens()).logits.dtype == torch.float16
    assert next(iter(packed_layers(loaded).values())).weight.dtype == torch.float16


def test_tensors_that_are_not_packed_take_the_model_s_dtype(tmp_path):
    made = nn.BatchNorm1d(2).eval()
    state = {n: t.to(torch.float16 if t.is_floating_point() else torch.int32) for n, t in made.state_dict().items()}
    state["num_batches_tracked"] += 7
    save_file(state, tmp_path / "a.safetensors")
    sys.modules["fp4compile.load"]._fill(made, tmp_path / "a.safetensors", torch.device("cpu"), torch.float32, [])
    assert (made.num_batches_tracked.dtype, int(made.num_batches_tracked)) == (torch.int64, 7)
    assert {t.dtype for t in (*made.parameters(), made.running_mean)} == {torch.float32}


@torch.no_grad()
def test_what_transformers_keeps_in_fp32_stays_so(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    made = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()
    made.save_pretrained(tmp_path / "model")
    fp4compile.convert(tmp_path / "model", "hif4-w4a16", out=tmp_path / "out", keep=["encoder.*"])
    loaded = fp4compile.load(tmp_path / "out", dtype=torch.float16)
    reference = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float16)
    for path, module in reference.named_modules():
        if isinstance(module, nn.Linear):
            assert loaded.get_submodule(path).weight.dtype == module.weight.dtype, path
    assert loaded(input_ids=tokens(), decoder_input_ids=tokens()).logits.dtype == torch.float16


# --- slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), CASES)
@torch.no_grad()
def test_inductor_compiles_the_loaded_model(converted, name, format):
    loaded = fp4compile.load(converted(name, f"{format}-w4a16"))
    expected = loaded(tokens()).logits
    compiled = torch.compile(loaded, fullgraph=True)
    torch.testing.assert_close(compiled(tokens()).logits, expected, rtol=1e-3, atol=1e-4)
