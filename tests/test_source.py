"""The MODEL argument: what each kind of name gives, and what is refused."""

import json
import pickle
import sys

import pytest
import torch
from torch import nn

from fp4compile import explain
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.source import Request, load

MODELS = """
import torch
from torch import nn

import beside  # its folder is importable, as when a script runs


def build():
    return nn.Linear(8, 4), (torch.ones(2, 8),)


def by_name():
    return nn.Linear(8, 4), {"input": torch.ones(2, 8)}


def lone():
    return nn.Linear(8, 4)


def triple():
    return nn.Linear(8, 4), (), ()


def no_inputs():
    return nn.Linear(8, 4), 3


def failing():
    return [][1]


def _hidden():
    pass
"""

# Configurations small enough to build in no time: model type -> its sizes.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SPEECH = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "models.py").write_text(MODELS)
    return tmp_path / "models.py"


def config(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


# --- file.py:function -------------------------------------------------------------------------------------------


def test_function(models):
    source = load(f"{models}:build")
    assert isinstance(source.module, nn.Linear)
    assert source.module(*source.example_inputs).shape == (2, 4)
    assert set(load(f"{models}:by_name").example_inputs) == {"input"}


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("", FP4ValueError, "models.py:function; it defines build, by_name, lone, triple, no_inputs, failing$"),
        (":", FP4ValueError, "name the function"),
        (":biuld", FP4ValueError, "no function 'biuld'; it defines build, by_name"),
        (":torch", FP4ValueError, "no function 'torch'"),
        (":lone", FP4TypeError, r"must return \(module, example_inputs\), it returned Linear"),
        (":triple", FP4TypeError, "it returned a tuple of 3"),
        (":no_inputs", FP4TypeError, "must be a tuple, a mapping or a tensor, not int"),
        (":failing", FP4ValueError, "models.py:failing failed at line 29: IndexError: list index out of range"),
    ],
)
def test_wrong_function(models, function, error, message):
    with pytest.raises(error, match=message):
        load(f"{models}{function}")


def test_file_that_is_missing_or_does_not_run(models):
    with pytest.raises(FP4ValueError, match=r"no such file: .*nothing.py"):
        load(f"{models.parent}/nothing.py:build")
    models.write_text("x = 1\nraise KeyError('here')\n")
    with pytest.raises(FP4ValueError, match=r"models.py failed at line 2: KeyError: 'here'") as caught:
        load(f"{models}:build")
    assert isinstance(caught.value.__cause__, KeyError)
    models.write_text("x = 1\ny = = 2\n")
    with pytest.raises(FP4ValueError, match=r"models.py failed at line 2: SyntaxError"):
        load(f"{models}:build")


@pytest.mark.parametrize("sizes", [{"batch": 2}, {"sequence": 4}])
def test_sizes_belong_to_transformers_models(models, sizes):
    with pytest.raises(FP4ValueError, match=f"--{next(iter(sizes))} applies to transformers models only"):
        load(f"{models}:build", Request(**sizes))


# --- other files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.safetensors", "weights without a graph"),
        ("a.gguf", "weights without a graph"),
        ("a.onnx", "holds a graph"),
        ("a.pt", "runs code from the file"),
        ("a.bin", "runs code from the file"),
        ("a.txt", ".txt is none of them"),
        ("a", "without an ending"),
    ],
)
def test_files_that_explain_does_not_read(tmp_path, name, reason):
    (tmp_path / name).write_bytes(b"")
    supported = "explain reads file.py:function, a transformers directory or config.json, .pt2"
    with pytest.raises(FP4ValueError, match=rf"{reason}.*{supported}"):
        load(str(tmp_path / name))


def test_nothing_there(tmp_path):
    with pytest.raises(FP4ValueError, match=r"no such file or directory: 'org/model'.*downloaded first"):
        load("org/model")
    with pytest.raises(FP4ValueError, match=r"no transformers directory: it holds no config.json"):
        load(str(tmp_path))


class Mixed(nn.Module):
    """Takes a positional and a keyword argument."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 4)

    def forward(self, x, *, scale=None):
        out = self.proj(x)
        return out if scale is None else out * scale


X, SCALE = torch.ones(2, 8), torch.ones(1)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((X,), {}), ((), {"x": X, "scale": SCALE}), ((X,), {"scale": SCALE})],
    ids=["args", "kwargs", "both"],
)
def test_exported_program(tmp_path, args, kwargs):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Mixed(), args, kwargs), path)
    source = load(str(path), Request(trust_pickle=True))
    report = explain(source.module, source.example_inputs, "mxfp4-w4a4")
    assert [(site.path, site.status) for site in report.sites] == [("proj", "fp4")]
    with pytest.raises(FP4ValueError, match="--batch applies to transformers models only"):
        load(str(path), Request(batch=2, trust_pickle=True))


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_not_read_without_trust(tmp_path):
    path, trace = tmp_path / "model.pt2", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Trap(str(trace))))
    with pytest.raises(FP4ValueError, match=r"can run code from the file.*--trust-pickle"):
        load(str(path))
    assert not trace.exists()


def test_exported_program_that_is_none(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not a zip")
    with pytest.raises(FP4ValueError, match=r"cannot read .* as an exported program"):
        load(str(path), Request(trust_pickle=True))


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name", "shapes"),
    [
        ({"model_type": "llama", **SMALL}, "LlamaForCausalLM", {"input_ids": (1, 128)}),
        (
            {"model_type": "llama", **SMALL, "architectures": ["LlamaModel"], "max_position_embeddings": 16},
            "LlamaModel",
            {"input_ids": (1, 16)},
        ),
        ({"model_type": "bert", **SMALL}, "BertForMaskedLM", {"input_ids": (1, 128)}),
        (
            {"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2},
            "T5ForConditionalGeneration",
            {"input_ids": (1, 128), "decoder_input_ids": (1, 128)},
        ),
        (
            {"model_type": "vit", **SMALL, "image_size": 32},
            "ViTForImageClassification",
            {"pixel_values": (1, 3, 32, 32)},
        ),
        (
            {"model_type": "whisper", **SPEECH, "max_source_positions": 20, "max_target_positions": 10},
            "WhisperForConditionalGeneration",
            {"input_features": (1, 80, 40), "decoder_input_ids": (1, 10)},
        ),
        ({"model_type": "wav2vec2", **SMALL}, "Wav2Vec2ForCTC", {"input_values": (1, 16000)}),
        (
            {
                "model_type": "clip",
                "architectures": ["CLIPModel"],
                "text_config": SMALL,
                "vision_config": {**SMALL, "image_size": 64},
            },
            "CLIPModel",
            {"input_ids": (1, 77), "pixel_values": (1, 3, 64, 64)},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configuration(tmp_path, values, name, shapes):
    source = load(config(tmp_path, **values))
    assert type(source.module).__name__ == name
    assert {k: tuple(v.shape) for k, v in source.example_inputs.items()} == shapes
    tensors = [*source.module.parameters(), *source.example_inputs.values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert not source.module.training


def test_sizes_mode_and_dtype(tmp_path):
    folder = config(tmp_path, model_type="llama", dtype="bfloat16", max_position_embeddings=64, **SMALL)
    source = load(f"{folder}/config.json", Request(batch=3, sequence=64, train=True))
    assert source.example_inputs["input_ids"].shape == (3, 64)
    assert source.module.training
    assert source.module.dtype == torch.bfloat16
    with pytest.raises(FP4ValueError, match="--sequence 65 exceeds the 64 positions of llama"):
        load(folder, Request(sequence=65))


def test_sequence_of_a_model_that_reads_no_tokens(tmp_path):
    folder = config(tmp_path, model_type="vit", **SMALL)
    with pytest.raises(FP4ValueError, match="--sequence does not apply to vit, which reads pixel_values"):
        load(folder, Request(sequence=8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 8}, "cannot read .*config.json' as a transformers configuration"),
        ({"model_type": "no-such-model"}, "cannot read .*config.json' as a transformers configuration"),
        ({"model_type": "llama", **SMALL, "architectures": ["Nope"]}, "'Nope' is no model class"),
        ({"model_type": "llama", **SMALL, "architectures": ["AutoConfig"]}, "'AutoConfig' is no model class"),
    ],
)
def test_wrong_configuration(tmp_path, values, message):
    with pytest.raises(FP4ValueError, match=message):
        load(config(tmp_path, **values))


def test_malformed_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FP4ValueError, match=r"cannot read .* as a transformers configuration"):
        load(str(tmp_path / "config.json"))


def test_code_of_a_configuration_does_not_run(tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    folder = config(tmp_path, model_type="own", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(FP4ValueError, match="cannot read"):
        load(folder)
    assert not (tmp_path / "trace").exists()


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FP4ValueError, match=r"transformers.*pip install"):
        load(config(tmp_path, model_type="llama", **SMALL))


def test_a_configuration_is_explained_without_weights(tmp_path):
    source = load(config(tmp_path, model_type="llama", **SMALL), Request(sequence=8, train=True))
    report = explain(source.module, source.example_inputs, "mxfp4-plain", train=True)
    assert (report.count("fp4"), report.count("kept"), report.count("refused")) == (21, 3, 0)
    assert not any("meta" in site.kernel or "not on the CPU" in site.reason for site in report.sites)
    assert not report.notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "gemms"),
    [
        ({"model_type": "bert", **SMALL}, 7),
        ({"model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}, 16),
        ({"model_type": "vit", **SMALL, "image_size": 32}, 6),
        ({"model_type": "whisper", **SPEECH, "max_source_positions": 20, "max_target_positions": 10}, 16),
        ({"model_type": "wav2vec2", **SMALL}, 7),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
# Dynamo warns of a cached function in transformers' wav2vec2, which asks whether torch.distributed is there.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`-wrapped:UserWarning")
def test_kinds_of_models_are_explained_without_weights(tmp_path, values, gemms):
    source = load(config(tmp_path, **values))
    report = explain(source.module, source.example_inputs, "hif4-w4a16")
    assert (report.count("fp4"), report.count("refused")) == (gemms, 0)
