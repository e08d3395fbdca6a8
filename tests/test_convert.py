"""`convert`: what is decided, what is written, and that nothing is left behind when something is wrong."""

import copy
import importlib
import json
import os
import struct
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fp4compile
from fp4compile import hf
from fp4compile.checkpoint import Writer, from_file, from_folder, from_module
from fp4compile.convert import MANIFEST, TARGETS
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.packed import PackedWeight, replaced
from fp4compile.recipe import Operand, Recipe, Rule
from tests.models import model

transformers = pytest.importorskip("transformers")
# The package's functions of the same names hide the modules.
CONVERT = importlib.import_module("fp4compile.convert")

QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> the folder of a saved model."""
    root = tmp_path_factory.mktemp("models")

    @cache
    def folder(name: str) -> Path:
        model(name).save_pretrained(root / name)
        for file in ("tokenizer_config.json", "video_preprocessor_config.json", "spm.model", "source.spm", "bpe.codes"):
            (root / name / file).write_text("{}")
        (root / name / "modeling_custom.py").write_text("raise SystemExit")
        return root / name

    return folder


@pytest.fixture(scope="module")
def converted(saved: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, recipe) -> an artifact, made once."""
    root = tmp_path_factory.mktemp("converted")

    @cache
    def artifact(name: str, recipe: str) -> fp4compile.Artifact:
        return fp4compile.convert(saved(name), recipe, out=root / f"{name}-{recipe}")

    return artifact


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def parts(tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    return {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{path}.")}


# --- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe", "path", "axis"),
    [
        ("llama", "hif4-w4a16", "model.layers.0.mlp.down_proj", 1),
        ("gpt2", "nvfp4-w4a4", "transformer.h.0.attn.c_attn", 0),
        ("bert", "mxfp4-w4a16", "bert.encoder.layer.0.attention.self.query", 1),
    ],
)
def test_packed_weights_are_those_of_quantize(converted, name, recipe, path, axis):
    artifact = converted(name, recipe)
    held = parts(load_file(artifact.path / "model.safetensors"), path)
    weight = model(name).get_submodule(path).weight
    q = fp4compile.quantize(weight, recipe.partition("-")[0], axis)
    assert held["codes"].dtype == torch.uint8 and torch.equal(held["codes"], q.codes)
    assert torch.equal(held["scales"], q.scales)
    assert ("tensor_scale" in held) == (q.tensor_scale is not None)
    if q.tensor_scale is not None:
        assert torch.equal(held["tensor_scale"], q.tensor_scale)
    row = manifest(artifact.path)["weights"][path]
    assert (row["shape"], row["axis"], row["format"], row["block_2d"]) == (list(weight.shape), axis, q.format, False)


@pytest.mark.parametrize(("name", "recipe"), [("llama", "hif4-w4a16"), ("gpt2", "nvfp4-w4a4"), ("bert", "mxfp4-w4a16")])
def test_everything_else_is_untouched(converted, saved, name, recipe):
    before = load_file(saved(name) / "model.safetensors")
    after = load_file(converted(name, recipe).path / "model.safetensors")
    packed = {f"{path}.weight" for path in manifest(converted(name, recipe).path)["weights"]}
    assert packed and packed < set(before)
    for key in set(before) - packed:
        assert torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype
    assert not packed & set(after)
    assert {k for k in after if k.rpartition(".")[2] not in ("codes", "scales", "tensor_scale")} == set(before) - packed


def test_every_linear_but_the_head_is_packed_and_ties_are_stored_once(converted):
    artifact = converted("llama", "hif4-w4a16")
    linears = {n for n, m in model("llama").named_modules() if isinstance(m, nn.Linear)}
    assert set(manifest(artifact.path)["weights"]) == linears - {"lm_head"}
    keys = set(load_file(artifact.path / "model.safetensors"))
    assert len(keys & {"lm_head.weight", "model.embed_tokens.weight"}) == 1


def test_companion_files_travel_and_code_does_not(converted, saved):
    out = converted("llama", "hif4-w4a16").path
    assert {f.name for f in out.iterdir()} == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer_config.json", MANIFEST),
        *("video_preprocessor_config.json", "spm.model", "source.spm", "bpe.codes"),
    }
    assert (out / "config.json").read_bytes() == (saved("llama") / "config.json").read_bytes()


def test_manifest_and_artifact_agree(converted, saved):
    artifact = converted("gpt2", "nvfp4-w4a4")
    data = manifest(artifact.path)
    assert data["version"] == 1 and data["formats"] == ["nvfp4"] and data["architecture"] == "GPT2LMHeadModel"
    assert data["recipe"]["name"] == "nvfp4-w4a4" and data["recipe"]["rule"][0]["input"] == {"format": "nvfp4"}
    assert all(row["input"]["format"] == "nvfp4" for row in data["weights"].values())
    assert data["report"]["fp4"] == artifact.report.count("fp4") == 4
    assert data["report"]["summary"] == artifact.report.summary()
    before = load_file(saved("gpt2") / "model.safetensors")
    assert artifact.bytes_before == sum(t.nbytes for t in before.values())
    assert artifact.bytes_after == (artifact.path / "model.safetensors").stat().st_size
    dense, packed = artifact.report.weight_bytes
    assert dense == sum(before[f"{path}.weight"].nbytes for path in data["weights"])
    after = load_file(artifact.path / "model.safetensors")
    assert packed == sum(sum(t.nbytes for n, t in parts(after, p).items() if n != "bias") for p in data["weights"])
    assert {s.kernel for s in artifact.report.sites if s.status == "fp4"} == {"fp4compile.mm"}


def test_a_model_in_memory_gives_the_same_bytes(converted, tmp_path):
    artifact = fp4compile.convert(model("llama"), "hif4-w4a16", out=tmp_path / "out")
    first = load_file(converted("llama", "hif4-w4a16").path / "model.safetensors")
    second = load_file(artifact.path / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    config = json.loads((artifact.path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


# --- which weights: plans without a capture of a whole language model --------------------------------------------


class Config(transformers.PretrainedConfig):
    model_type = "fp4compile_test"
    use_cache = False


class Small(transformers.PreTrainedModel):
    """A model of two layers; subclasses say how they are used."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(96, 64)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64, bias=False)
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.embed(input_ids)))


class Twice(Small):
    """Two modules share a weight."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.second.weight = self.first.weight


class Computed(Small):
    """A weight that is scaled before it is used."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(input_ids))
        return nn.functional.linear(x, self.second.weight * 2)


class Parameters(Small):
    """A weight that belongs to no linear layer."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.table = nn.Parameter(torch.randn(64, 64))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.first(self.embed(input_ids)) @ self.table


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a test's class one of transformers' and give it example inputs."""

    def make(cls: type) -> Any:
        # transformers puts another module object in its own place once a class has been asked for.
        monkeypatch.setattr(sys.modules["transformers"], cls.__name__, cls, raising=False)
        torch.manual_seed(1)
        return cls(Config()).eval()

    return make


def plan(made: Any, out: Path, recipe: Any = "hif4-w4a16", **options: Any) -> fp4compile.Artifact:
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    return fp4compile.convert(made, recipe, out=out, example_inputs=inputs, **options)


def test_a_conversion_that_packs_nothing_says_so(small, tmp_path):
    artifact = plan(small(Small), tmp_path / "out", keep=["*"])
    assert "no weight was packed by recipe 'hif4-w4a16': it keeps every GEMM of this model" in artifact.report.notes


def test_keep_globs_stay(small, tmp_path):
    artifact = plan(small(Small), tmp_path / "out", keep=["sec*"])
    assert set(manifest(artifact.path)["weights"]) == {"first"}
    assert [s.reason for s in artifact.report.sites if s.path == "second"] == ["keep='sec*'"]
    assert manifest(artifact.path)["recipe"]["keep"] == ["sec*"]


def test_example_inputs_may_be_positional(small, tmp_path):
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert fp4compile.convert(small(Small), out=tmp_path / "a", example_inputs=(ids,)).report.count("fp4") == 2
    with pytest.raises(FP4TypeError, match=r"do not fit Small\.forward"):
        fp4compile.convert(small(Small), out=tmp_path / "b", example_inputs=(ids, ids))


def test_inputs_that_the_model_cannot_take_are_named(small, tmp_path):
    words = {"input_ids": "four score and seven"}
    with pytest.raises(FP4ValueError, match="cannot capture Small on the meta device with inputs input_ids"):
        fp4compile.convert(small(Small), out=tmp_path / "out", example_inputs=words)


def test_training_recipes_count_with_their_forward_rules(small, tmp_path):
    artifact = plan(small(Small), tmp_path / "out", "nvfp4")
    rows = manifest(artifact.path)["weights"]
    assert all(row["block_2d"] and row["input"]["format"] == "nvfp4" for row in rows.values())


def test_recipe_objects_scale_rules_and_stochastic_rounding(small, tmp_path):
    spec = Operand("mxfp4", scale_rule="rceil", rounding="stochastic")
    artifact = plan(small(Small), tmp_path / "out", Recipe("mine", (Rule("forward", weight=spec),)))
    assert any("becomes rounding to nearest" in note for note in artifact.report.notes)
    held = parts(load_file(artifact.path / "model.safetensors"), "first")
    q = fp4compile.quantize(small(Small).first.weight, "mxfp4", 1, scale_rule="rceil")
    assert torch.equal(held["codes"], q.codes) and torch.equal(held["scales"], q.scales)


def test_four_over_six_weights_are_stored_and_served(small, tmp_path):
    artifact = plan(small(Small), tmp_path / "out", "nvfp4-4over6")
    held = parts(load_file(artifact.path / "model.safetensors"), "first")
    q = fp4compile.quantize(small(Small).first.weight, "nvfp4", 1, scale_rule="4over6", block_2d=True)
    assert torch.equal(held["codes"], q.codes) and torch.equal(held["scales"], q.scales)
    assert held["tensor_scale"] == q.tensor_scale


def test_what_training_alone_needs_is_not_stored(small, tmp_path):
    spec = Operand("mxfp4", scale_rule="gaussian", hadamard=16, signs="fresh", clip_mask=True)
    artifact = plan(small(Small), tmp_path / "out", Recipe("mine", (Rule("forward", input=spec, weight=spec),)))
    for row in manifest(artifact.path)["weights"].values():
        for held in (row, row["input"]):
            assert (held["scale_rule"], held["signs"], held["clip_mask"]) == ("gaussian", "fixed", False)


def test_a_shared_weight_is_stored_once(small, tmp_path):
    artifact = plan(small(Twice), tmp_path / "out")
    keys = set(load_file(artifact.path / "model.safetensors"))
    assert sum(key.endswith(".codes") for key in keys) == 1


def test_a_shared_weight_under_two_specs_is_an_error(small, tmp_path):
    rules = (Rule("forward", "first", weight=Operand("hif4")), Rule("forward", weight=Operand("mxfp4")))
    made = small(Twice)
    with pytest.raises(FP4ValueError, match=r"'first\.weight' is read by two GEMMs(.|\n)*hif4(.|\n)*mxfp4"):
        plan(made, tmp_path / "out", Recipe("two", rules))
    with pytest.raises(FP4ValueError, match="high precision"):
        plan(made, tmp_path / "out", keep=["first"])
    assert not any(tmp_path.iterdir())


class Stack(nn.Module):
    """Experts that run in a loop over what the router chose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 64, 64))


class Mixture(Small):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.experts = Stack()


def test_experts_without_a_gemm_are_not_left_out_in_silence(small, tmp_path):
    made = small(Mixture)
    with pytest.raises(FP4ValueError, match="experts: no GEMM that reads these experts"):
        plan(made, tmp_path / "out")
    assert plan(made, tmp_path / "kept", keep=["experts"]).report.count("refused") == 0
    assert plan(made, tmp_path / "loose", strict=False).report.count("refused") == 1


@pytest.mark.parametrize(
    ("cls", "reason"), [(Computed, "computed in the graph from 'second.weight'"), (Parameters, "of a Parameters")]
)
def test_a_weight_that_cannot_be_packed_is_refused(small, tmp_path, cls, reason):
    made = small(cls)
    with pytest.raises(FP4ValueError, match=reason) as error:
        plan(made, tmp_path / "out")
    assert "strict=False" in str(error.value) and not any(tmp_path.iterdir())
    artifact = plan(made, tmp_path / "out", strict=False)
    assert set(manifest(artifact.path)["weights"]) == {"first"} and artifact.report.count("refused") == 1
    artifact = plan(made, tmp_path / "out", strict=False, keep=["first"], overwrite=True)
    assert "no weight was packed by recipe 'hif4-w4a16': no GEMM that it asks for can be" in artifact.report.notes


def test_an_embedding_is_never_packed(small, tmp_path):
    recipe = Recipe("all", (Rule("forward", weight=Operand("hif4")),), keep_heads=False)

    class Tied(Small):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.head = nn.Linear(64, 96, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(super().forward(input_ids))

    with pytest.raises(FP4ValueError, match="of a Embedding"):
        plan(small(Tied), tmp_path / "out", recipe)


# --- checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(saved: Any, tmp_path: Path) -> Any:
    """Write a copy of the saved Llama with other tensors."""

    def write(change: Any, name: str = "source") -> Path:
        out = tmp_path / name
        out.mkdir()
        (out / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
        save_file(change(load_file(saved("llama") / "model.safetensors")), out / "model.safetensors")
        return out

    return write


def test_a_weight_that_the_checkpoint_lacks_is_named(folder, tmp_path):
    source = folder(lambda t: {k: v for k, v in t.items() if "q_proj" not in k and k != "model.norm.weight"})
    missing = (
        r"lacks tensors of LlamaForCausalLM: model\.layers\.0\.self_attn\.q_proj\.weight \(to be packed\), model\.norm"
    )
    with pytest.raises(FP4ValueError, match=missing):
        fp4compile.convert(source, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_base_model_names_shards_and_extra_tensors(folder, converted, tmp_path):
    def change(tensors):
        renamed = {k.removeprefix("model."): v for k, v in tensors.items()}
        return renamed | {"unknown.table": torch.arange(3, dtype=torch.int64)}

    source = folder(change)
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(shards.values()):
        save_file({n: t for n, t in tensors.items() if shards[n] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    artifact = fp4compile.convert(source, out=tmp_path / "out")
    mine = load_file(artifact.path / "model.safetensors")
    other = load_file(converted("llama", "hif4-w4a16").path / "model.safetensors")
    assert torch.equal(mine.pop("unknown.table"), torch.arange(3))
    assert manifest(artifact.path)["extra"] == ["unknown.table"]
    assert mine.keys() == other.keys() and all(torch.equal(mine[k], other[k]) for k in mine)
    fp4compile.load(artifact.path)


def test_names_of_old_checkpoints(tmp_path):
    config = transformers.ViTConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    made = transformers.ViTForImageClassification(config)
    made.save_pretrained(tmp_path)  # under the names of the time when the architecture was new
    assert not set(from_folder(tmp_path)) <= set(made.state_dict())
    meta = hf.meta_model(type(made), config, torch.float32)
    items = CONVERT._match(meta, {}, from_folder(tmp_path), "here")
    assert {i.name for i in items} == set(made.state_dict())
    assert all(torch.equal(i.entry.read(), made.state_dict()[i.name]) for i in items)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": torch.ones(3)}, r"'model\.norm\.weight' has shape \(3,\)"),
        ({"lm_head.weight": torch.zeros(96, 80)}, "ties .* but their values differ"),
        (
            {QUERY: torch.zeros(80, 80, dtype=torch.float64)},
            r"of dtype torch\.float64 cannot be packed; allowed: fp32, bf16, fp16",
        ),
    ],
)
def test_wrong_checkpoints(saved, tmp_path, changes, message):
    tensors = load_file(saved("llama") / "model.safetensors") | changes
    save_file(tensors, tmp_path / "model.safetensors")
    meta = hf.meta_model(type(model("llama")), model("llama").config, torch.float32)
    packed = {QUERY: PackedWeight((80, 80), 1, Operand("hif4"))}
    with pytest.raises(FP4ValueError, match=message):
        CONVERT._match(meta, packed, from_folder(tmp_path), "here")


def test_folders_that_are_none(folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    pickled = folder(lambda t: t, "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cut = folder(lambda t: t, "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    nameless = folder(lambda t: t, "nameless")
    config = json.loads((nameless / "config.json").read_text())
    (nameless / "config.json").write_text(json.dumps(config | {"architectures": ["Nobody"]}))
    unnamed = folder(lambda t: t, "unnamed")
    (unnamed / "config.json").write_text(json.dumps(config | {"architectures": []}))
    numbered = folder(lambda t: t, "numbered")
    (numbered / "config.json").write_text(json.dumps(config | {"architectures": [3]}))
    packed = folder(lambda t: t, "packed")
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    broken = folder(lambda t: t, "broken")
    (broken / "config.json").write_text("{")
    for source, message in (
        (empty, "has no config.json"),
        (tmp_path / "nowhere", "is no folder"),
        (pickled, "Pickled weights"),
        (cut, "not a whole safetensors file"),
        (nameless, "'Nobody' is no model class"),
        (numbered, "3 is no model class"),
        (unnamed, "does not name the model's class: add it as 'architectures'"),
        (packed, r"quantised already \(gptq\)"),
        (broken, "config.json"),
    ):
        with pytest.raises(FP4ValueError, match=message):
            fp4compile.convert(source, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_values_or_without_weights(small, tmp_path):
    hollow, packed = small(Small), small(Small)
    hollow.second.to("meta")
    packed.first = replaced(packed.first, PackedWeight((64, 64), 1, Operand("hif4")))
    for made, message in (
        (hollow, r"'second\.weight' of Small is on the meta device"),
        (packed, "Small is quantised already; convert the original"),
    ):
        with pytest.raises(FP4ValueError, match=message):
            plan(made, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_settings_that_transformers_does_not_save(tmp_path):
    made = copy.deepcopy(model("llama"))
    made.generation_config.temperature = 0.5
    with pytest.raises(FP4ValueError, match=r"does not save the model's generation_config: (.|\n)*temperature"):
        hf.write_companions(made, made.config, tmp_path)


def test_what_transformers_computes_and_does_not_save(tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    made = transformers.MarianMTModel(transformers.MarianConfig(**sizes, max_position_embeddings=8))
    made.save_pretrained(tmp_path)
    meta = hf.meta_model(type(made), made.config, torch.float32)
    items = {item.name: item for item in CONVERT._match(meta, {}, from_folder(tmp_path), "here")}
    for name in ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"):
        assert name not in from_folder(tmp_path)
        assert torch.equal(items[name].tensors()[name], made.state_dict()[name])


def test_tied_weights_may_hold_nan(tmp_path):
    made = copy.deepcopy(model("llama"))
    made.lm_head.weight.data[0, 0] = float("nan")
    meta = hf.meta_model(type(made), made.config, torch.float32)
    (item,) = (i for i in CONVERT._match(meta, {}, from_module(made), "here") if i.name == "model.embed_tokens.weight")
    assert item.tensors()[item.name].isnan().sum() == 1


# --- arguments and files -----------------------------------------------------------------------------------------


def test_wrong_names_list_what_is_allowed(saved, tmp_path):
    with pytest.raises(FP4ValueError, match=r"unknown recipe 'hif5-w4a16'.*hif4-w4a16"):
        fp4compile.convert(saved("llama"), "hif5-w4a16", out=tmp_path / "out")
    with pytest.raises(FP4ValueError, match=f"unknown target 'onyx'; allowed: {', '.join(TARGETS)}"):
        fp4compile.convert(saved("llama"), to="onyx", out=tmp_path / "out")
    for thing in (nn.Linear(4, 4), 3):
        with pytest.raises(FP4TypeError, match=f"not a {type(thing).__name__}"):
            fp4compile.convert(thing, out=tmp_path / "out")
    with pytest.raises(FP4TypeError, match="keep must be a list"):
        fp4compile.convert(saved("llama"), out=tmp_path / "out", keep="mlp")
    assert not any(tmp_path.iterdir())


def test_output_folders(small, saved, tmp_path):
    made, out = small(Small), tmp_path / "out"
    out.mkdir()
    plan(made, out)  # an empty folder will do
    (out / "mine.txt").write_text("keep me")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(FP4ValueError, match=r"not empty; pass overwrite=True"):
        plan(made, out)
    data = manifest(out)
    (out / MANIFEST).write_text(json.dumps(data | {"files": [*data["files"], "tokenizer.json", "../x"]}))
    (tmp_path / "x").write_text("not ours")
    plan(made, out, "mxfp4-w4a16", overwrite=True)
    assert manifest(out)["formats"] == ["mxfp4"]
    assert (out / "mine.txt").exists() and not (out / "tokenizer.json").exists() and (tmp_path / "x").exists()
    with pytest.raises(FP4ValueError, match="exists and is no folder"):
        plan(made, tmp_path / "x")
    with pytest.raises(FP4ValueError, match="the model's own folder"):
        fp4compile.convert(saved("llama"), out=saved("llama"), overwrite=True)


def test_an_output_folder_that_is_there_stays_the_same_one(small, tmp_path):
    """A mount point cannot be renamed over, and a link may lead to another file system."""
    made, there = small(Small), tmp_path / "there"
    there.mkdir()
    inode = there.stat().st_ino
    for name, target in (("link", there), ("dangling", tmp_path / "new")):
        (tmp_path / name).symlink_to(target)
        plan(made, tmp_path / name)
        assert (tmp_path / name).is_symlink() and manifest(target)["formats"]
    assert there.stat().st_ino == inode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "new", "there"]


def test_an_output_below_a_file_and_a_converted_source(small, tmp_path, monkeypatch):
    made, out = small(Small), tmp_path / "out"
    plan(made, out)
    with pytest.raises(FP4ValueError, match="is converted already"):
        fp4compile.convert(out, out=tmp_path / "again")
    (tmp_path / "file").touch()
    monkeypatch.setattr(CONVERT, "decide", None)  # before any work
    with pytest.raises(FP4ValueError, match="file' is no folder"):
        plan(made, tmp_path / "file" / "out")
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path == there)  # a mount point in a folder of root's
    with pytest.raises(TypeError, match="NoneType"):  # the work that the others do not come to
        plan(made, there)
    for where in (tmp_path / "new" / "out", tmp_path / "out"):
        with pytest.raises(FP4ValueError, match="no permission to write in"):
            plan(made, where, overwrite=True)


@pytest.mark.parametrize("error", [RuntimeError("disk on fire"), KeyboardInterrupt()])
def test_nothing_is_left_behind(small, tmp_path, monkeypatch, error):
    made, calls = small(Small), []
    write = Writer.write

    def fail(self: Writer, name: str, tensor: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise error
        write(self, name, tensor)

    monkeypatch.setattr(Writer, "write", fail)
    with pytest.raises(type(error)):
        plan(made, tmp_path / "out")
    assert len(calls) == 3 and not any(tmp_path.iterdir())


def test_an_old_conversion_survives_a_failed_one(small, tmp_path, monkeypatch):
    made = small(Small)
    plan(made, tmp_path / "out")
    before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

    def fail(*args: Any) -> dict[str, Any]:
        raise OSError("no space left")

    monkeypatch.setattr(CONVERT, "_manifest", fail)
    with pytest.raises(OSError, match="no space left"):
        plan(made, tmp_path / "out", "mxfp4-w4a16", overwrite=True)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


# --- the file format and the rows ----------------------------------------------------------------------------------


def test_writer_makes_files_that_safetensors_reads(tmp_path):
    tensors = {
        "b": torch.arange(3, dtype=torch.uint8),
        "a": torch.randn(2, 3).bfloat16(),
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(3, 2).t(),
        "long": torch.arange(2),
    }
    with Writer(tmp_path / "x", {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    held = load_file(tmp_path / "x")
    assert held.keys() == tensors.keys() and all(torch.equal(held[n], t) for n, t in tensors.items())
    entries = from_file(tmp_path / "x")
    assert all((e.dtype, e.shape) == (tensors[n].dtype, tuple(tensors[n].shape)) for n, e in entries.items())
    length = struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0]
    assert length % 8 == 0  # the data starts aligned


def test_writer_insists_on_its_layout(tmp_path):
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}
    with pytest.raises(FP4ValueError, match=r"'a' is torch\.float16"), Writer(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2).half())
    with pytest.raises(FP4ValueError, match="not written: b"), Writer(tmp_path / "x", layout) as writer:
        writer.write("a", torch.zeros(2))


def test_indices_that_disagree_with_their_shards(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("a", "b"):
        save_file({name: torch.zeros(2), "both": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    for shard_of, message in (
        ({"a": "a.safetensors", "b": "b.safetensors"}, r"b\.safetensors and another shard .* both hold 'both'"),
        ({"a": "a.safetensors", "c": "a.safetensors"}, "names 'c', which no shard holds"),
        ({"a": "c.safetensors"}, r"names 'c\.safetensors', which does not lie beside it"),
        ({"a": 3}, "names 3, which does not lie beside it"),
    ):
        index.write_text(json.dumps({"weight_map": shard_of}))
        with pytest.raises(FP4ValueError, match=message):
            from_folder(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))  # a tensor that the index leaves out is read
    assert set(from_folder(tmp_path)) == {"a", "both"}


def test_indices_cannot_leave_their_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(FP4ValueError, match="does not lie beside it"):
        from_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(FP4ValueError, match="not an index"):
        from_folder(tmp_path)


def test_rows_round_trip_and_refuse_nonsense():
    row = PackedWeight((4, 8), 1, Operand("nvfp4", block_2d=True), Operand("hif4"))
    assert PackedWeight.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    assert PackedWeight.from_dict(replace(row, input=None).to_dict()).input is None
    older = {"shape": [4, 8], "axis": 1, "format": "hif4", "tensor_scale": True, "input": None}
    assert PackedWeight.from_dict(older) == PackedWeight((4, 8), 1, Operand("hif4"))
    for broken in ({}, row.to_dict() | {"axis": 2}, row.to_dict() | {"format": "fp5"}, row.to_dict() | {"more": 1}):
        with pytest.raises(FP4ValueError):
            PackedWeight.from_dict(broken)
