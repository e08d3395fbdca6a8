"""What the MODEL argument of the command line names, as a module and example inputs.

    models.py:build     a function that returns (module, example_inputs)
    llama/              a transformers folder, or its config.json: built on the meta device, without weights
    model.pt2           an exported program; reading one runs code from the file, so it has to be allowed

A transformers model on the meta device has shapes and no memory, so that a laptop explains a 70B
configuration.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fp4compile import hf
from fp4compile.errors import FP4TypeError, FP4ValueError

READS = "file.py:function, a transformers directory or config.json, .pt2"

# Why a file with one of these endings cannot be explained.
_NOT_READ: Mapping[str, str] = {
    ".safetensors": "it holds weights without a graph; name the directory that holds its config.json",
    ".gguf": "it holds weights without a graph",
    ".onnx": "it holds a graph without a backward and without module paths",
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "it is a pickle: reading it runs code from the file"),
}

# file.py:function, the function perhaps forgotten.
FUNCTION = re.compile(r"(.+\.py)(?::(.*))?")

SEQUENCE = 128  # tokens of an example, where the model takes as many


@dataclass(frozen=True)
class Source:
    """A model to look at.

    Attributes:
        module: what to call.
        example_inputs: a tuple (positional), a mapping (keywords) or one tensor.
    """

    module: Callable[..., Any]
    example_inputs: Any


@dataclass(frozen=True)
class Request:
    """What the user said about a model besides its name.

    Attributes:
        batch, sequence: sizes of the example inputs of a transformers model; None for the default.
        train: whether the model will be trained.
        trust_pickle: whether code from a `.pt2` file may run.
    """

    batch: int | None = None
    sequence: int | None = None
    train: bool = False
    trust_pickle: bool = False


def load(model: str, request: Request | None = None) -> Source:
    """The module and the example inputs that `model` names.

    Raises:
        FP4ValueError: nothing of that name, another kind of file, one that needs trust, wrong sizes.
        FP4TypeError: a function that returns something else than (module, example_inputs).
    """
    request = request or Request()
    python = FUNCTION.fullmatch(model)
    if python:
        _refuse_sizes(request, "file.py:function returns its own inputs")
        return _from_function(Path(python[1]), python[2] or "")
    path = Path(model)
    if not path.exists():
        raise FP4ValueError(
            f"no such file or directory: {model!r}. MODEL is one of {READS}; a model of an online hub has "
            "to be downloaded first"
        )
    if path.is_dir():
        return _from_config(_config_of(path), request)
    reader = _READERS.get(path.suffix)
    if reader is None:
        reason = _NOT_READ.get(path.suffix, f"{path.suffix or 'a file without an ending'} is none of them")
        raise FP4ValueError(f"cannot read {model!r}: {reason}. explain reads {READS}")
    return reader(path, request)


def _refuse_sizes(request: Request, reason: str) -> None:
    for name in ("batch", "sequence"):
        if getattr(request, name) is not None:
            raise FP4ValueError(f"--{name} applies to transformers models only: {reason}")


# --- file.py:function ---------------------------------------------------------------------------------------


def _from_function(path: Path, name: str) -> Source:
    if not path.is_file():
        raise FP4ValueError(f"no such file: {str(path)!r}")
    if not name:
        raise FP4ValueError(f"name the function that makes the model: {path}:function{_functions_of(path)}")
    module = _import(path)
    function = getattr(module, name, None)
    if not callable(function):
        raise FP4ValueError(f"{path} has no function {name!r}{_functions_of(path)}")
    with _blame(f"{path}:{name}", path):
        made = function()
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        found = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise FP4TypeError(f"{path}:{name} must return (module, example_inputs), it returned {found}")
    if not isinstance(made[1], torch.Tensor | tuple | list | Mapping):
        raise FP4TypeError(
            f"the example inputs of {path}:{name} must be a tuple, a mapping or a tensor, not {type(made[1]).__name__}"
        )
    return Source(*made)


def _functions_of(path: Path) -> str:
    """'; it defines a, b', found without running the file; '' where that fails."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return ""
    names = [n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    return f"; it defines {', '.join(names)}" if names else ""


def _import(path: Path) -> ModuleType:
    """Run a Python file as a module, with its folder importable as when a script runs."""
    name = f"fp4compile_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and Dynamo look their module up
    sys.path.insert(0, str(path.parent.resolve()))
    with _blame(str(path), path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _blame(what: str, path: Path) -> Iterator[None]:
    """Turn an exception of the user's code into one line that names its place; the cause stays attached."""
    try:
        yield
    except (FP4ValueError, FP4TypeError):
        raise
    except Exception as error:
        trace, own = traceback.extract_tb(error.__traceback__), path.resolve()
        frames = [f for f in trace if Path(f.filename).resolve() == own]
        number = error.lineno if isinstance(error, SyntaxError) else frames[-1].lineno if frames else None
        at = f" at line {number}" if number else ""
        raise FP4ValueError(f"{what} failed{at}: {type(error).__name__}: {error}") from error


# --- .pt2 ---------------------------------------------------------------------------------------------------


def _from_exported(path: Path, request: Request) -> Source:
    _refuse_sizes(request, "a .pt2 file carries its own inputs")
    if not request.trust_pickle:
        raise FP4ValueError(
            f"loading {str(path)!r} can run code from the file: .pt2 files contain pickles. If you trust "
            "its origin, add --trust-pickle"
        )
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        raise FP4ValueError(f"cannot read {str(path)!r} as an exported program: {error}") from error
    if program.example_inputs is None:
        raise FP4ValueError(f"{str(path)!r} holds no example inputs; export the model again")
    args, kwargs = program.example_inputs
    module = program.module()
    if not args:
        return Source(module, dict(kwargs))
    return Source(functools.partial(module, **kwargs) if kwargs else module, tuple(args))


# --- transformers -------------------------------------------------------------------------------------------

# Tried in this order for a configuration that does not name its class.
_AUTO_CLASSES = (
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModel",
)


def _config_of(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise FP4ValueError(f"{str(folder)!r} is no transformers directory: it holds no config.json")
    return path


def _from_config(path: Path, request: Request) -> Source:
    auto = hf.transformers().AutoConfig
    try:
        config = auto.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError or a validation error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FP4ValueError(f"cannot read {str(path)!r} as a transformers configuration: {reason}") from error
    for part in (config, config.get_text_config()):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # Dynamo cannot trace a cache on the meta device
    model: Any = hf.meta_model(_class_of(config, str(path)), config, config.dtype or torch.float32)
    model.to("meta")  # a legacy constructor, torch.Tensor(n), ignores the default device
    return Source(model.train(request.train), example_inputs(model, request))


def _class_of(config: Any, where: str) -> Any:
    """The class that the configuration names, or a usual one of its kind."""
    if config.architectures:
        return hf.model_class(config.architectures[0], where)
    for auto in (getattr(hf.transformers(), name) for name in _AUTO_CLASSES):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise FP4ValueError(f"{where}: transformers has no model for a {type(config).__name__}")


def _first(config: Any, names: Iterable[str], default: Any = None) -> Any:
    """The first attribute of a configuration that is there and is not None."""
    return next((v for name in names if (v := getattr(config, name, None)) is not None), default)


def _tokens(config: Any, request: Request) -> tuple[int, int]:
    """Batch and sequence of token ids, within what the model's positions allow."""
    text = config.get_text_config(decoder=True)
    limit = _first(text, ("max_target_positions", "max_position_embeddings"), sys.maxsize)
    wanted = request.sequence or min(SEQUENCE, limit)
    if wanted > limit:
        raise FP4ValueError(f"--sequence {wanted} exceeds the {limit} positions of {config.model_type}")
    return request.batch or 1, wanted


def _image(config: Any, request: Request) -> tuple[int, ...]:
    """[batch, channels, height, width], with the frames of a video behind the batch."""
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = _first(vision, ("image_size", "input_size"), 224)
    size = (size["height"], size["width"]) if isinstance(size, Mapping) else size
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    frames, channels = getattr(vision, "num_frames", None), getattr(vision, "num_channels", 3)
    return (request.batch or 1, *((frames,) if frames else ()), channels, height, width)


def _mel(config: Any, request: Request) -> tuple[int, ...]:
    """[batch, frames, mel bins]."""
    bins = _first(config, ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"), 80)
    return request.batch or 1, 400, bins


def _spectrogram(config: Any, request: Request) -> tuple[int, ...]:
    """[batch, frames, mel bins], as many frames as the model has positions for."""
    return request.batch or 1, config.max_length, config.num_mel_bins


def _whisper(config: Any, request: Request) -> tuple[int, ...]:
    """[batch, mel bins, frames]; the frames of 30 seconds, the only length it takes."""
    return request.batch or 1, config.num_mel_bins, 2 * config.max_source_positions


def _samples(config: Any, request: Request) -> tuple[int, ...]:
    """[batch, samples]: one second at 16 kHz."""
    return request.batch or 1, 16_000


Shape = Callable[[Any, Request], tuple[int, ...]]

# The shape of a model's main input, by the model type where that decides, else by the input's name.
_SHAPES: Mapping[str, Shape] = {
    "whisper": _whisper,
    "audio-spectrogram-transformer": _spectrogram,
    "input_ids": _tokens,
    "pixel_values": _image,
    "pixel_values_videos": _image,
    "input_features": _mel,
    "input_values": _samples,
}


def example_inputs(model: Any, request: Request) -> dict[str, torch.Tensor]:
    """Meta inputs of a transformers model by name: its main input and what goes with it.

    Raises:
        FP4ValueError: a main input of no known shape, or a sequence for a model that reads none.
    """
    config, main = model.config, model.main_input_name
    shape = _SHAPES.get(config.model_type) or _SHAPES.get(main)
    if shape is None:
        known = [name for name in _SHAPES if "_" in name]
        raise FP4ValueError(
            f"the main input of {config.model_type}, {main!r}, is none of {', '.join(known)}: write a "
            "file.py:function that returns (module, example_inputs)"
        )
    shapes = {main: shape(config, request)}
    if config.is_encoder_decoder:
        shapes["decoder_input_ids"] = _tokens(config, request)
    elif _reads_text_and_image(model):
        shapes["pixel_values"] = _image(config, request)
    if request.sequence is not None and not any(map(_is_ids, shapes)):
        raise FP4ValueError(f"--sequence does not apply to {config.model_type}, which reads {main}")
    dtypes = {name: torch.long if _is_ids(name) else model.dtype for name in shapes}
    return {name: torch.zeros(size, dtype=dtypes[name], device="meta") for name, size in shapes.items()}


def _is_ids(name: str) -> bool:
    return name.endswith("input_ids")


def _reads_text_and_image(model: Any) -> bool:
    """Whether the model compares texts with images (CLIP). One that writes of images runs on text alone."""
    parts = ("text_config", "vision_config")
    return not model.can_generate() and all(getattr(model.config, part, None) is not None for part in parts)


_READERS: Mapping[str, Callable[[Path, Request], Source]] = {".json": _from_config, ".pt2": _from_exported}
