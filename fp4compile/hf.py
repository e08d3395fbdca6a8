"""What convert and load need of transformers, which is imported only here and only when called."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fp4compile import experts
from fp4compile.errors import FP4ValueError, unknown

CONFIG = "config.json"
# What travels with a model besides its weights; never code, never pickles.
_COMPANIONS = (
    CONFIG,
    "generation_config.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "audio_tokenizer_config.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab*.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "normalizer.json",
    "sp*.model",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "LICENSE*",
)


def transformers() -> ModuleType:
    """The package, or an error that says how to get it."""
    try:
        import transformers as package
    except ImportError as error:
        raise FP4ValueError("transformers models need the transformers package: pip install transformers") from error
    return package


def is_model(thing: Any) -> bool:
    """Whether it is a transformers model; does not import transformers for anything else."""
    names = {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(thing).__mro__}
    return "transformers.PreTrainedModel" in names


def read_config(folder: Path) -> Any:
    """The configuration of a transformers folder.

    Raises:
        FP4ValueError: no such folder, no config.json or a malformed one, a model with code of its own, or
            one that is quantised already.
    """
    if not folder.is_dir():
        raise FP4ValueError(f"{str(folder)!r} is no folder; expected a transformers model folder")
    path = folder / CONFIG
    if not path.is_file():
        raise FP4ValueError(f"{str(folder)!r} is no transformers model folder: it has no {CONFIG}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = transformers().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FP4ValueError(f"{path}: {reason}") from error
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise FP4ValueError(f"{path}: the model is quantised already ({method}); convert the original")
    return config


def model_class(name: Any, where: str) -> type:
    """The transformers model class of that name; anything else is an error."""
    found = getattr(transformers(), name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers().PreTrainedModel)):
        raise FP4ValueError(f"{where}: {name!r} is no model class of transformers {transformers().__version__}")
    return found


def class_of(config: Any, folder: Path) -> type:
    """The class that config.json names as the one that was saved."""
    names = getattr(config, "architectures", None)
    if not names:
        raise FP4ValueError(f"{folder / CONFIG} does not name the model's class: add it as 'architectures'")
    return model_class(names[0], str(folder / CONFIG))


def meta_model(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without storage, in eval mode: enough to capture its graph and list its tensors.

    Experts run as one grouped GEMM: a loop over those that tokens were routed to is no graph. No cache is filled: no
    GEMM depends on one, and not every `forward` has an argument that says so.
    """
    with torch.device("meta"):
        model: Any = cls._from_config(deepcopy(config), dtype=dtype)
    for module in model.modules():  # a part of a model may have a configuration of its own
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    if experts.found_in(model) and getattr(model.config, "_experts_implementation", None) == "eager":
        model.set_experts_implementation("grouped_mm")
    made: nn.Module = model.eval()
    return made


def skeleton(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model with parameters on the meta device and buffers in memory, in eval mode.

    Buffers that no checkpoint holds (rotary frequencies, masks) are real: the constructor computes them.
    """

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter is None or parameter.is_meta:  # a tied parameter must stay the same object
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = cls._from_config(deepcopy(config), dtype=dtype)
    finally:
        hook.remove()
    return model.eval()


def kept_in_fp32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether transformers keeps a tensor in fp32 when it loads the model in `dtype`, by the model's own lists."""
    strict, in_fp16 = (getattr(model, f"_keep_in_fp32_modules{which}", None) or () for which in ("_strict", ""))
    globs = {torch.float16: (*strict, *in_fp16), torch.bfloat16: strict}.get(dtype, ())
    return any(re.search(glob.replace("*", ".*"), name) for glob in globs)


def renamed(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Name in a checkpoint -> name in the model, by transformers' own table of names that have changed.

    Only renamings: tensors that transformers would merge or split keep their names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    steps = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    found = {}
    for name in sorted(names):  # some steps wait for a name that sorts first
        new = name
        for step in steps:
            new = step.rename_source_key(new)[0]
        found[name] = new
    return found


def computed(model: Any, name: str) -> Tensor | None:
    """A tensor that transformers computes and does not save (Marian's sinusoids); None of any other."""
    if name not in (getattr(model, "_keys_to_ignore_on_save", None) or ()):
        return None
    path, _, attribute = name.rpartition(".")
    module = deepcopy(model.get_submodule(path)).to_empty(device="cpu")
    model._init_weights(module)
    tensor: Tensor = getattr(module, attribute).detach()
    return tensor


@dataclass(frozen=True)
class Merge:
    """How transformers makes a stack [experts, ...] from the tensors of single experts.

    Attributes:
        parts: of each part of a matrix, in order, the names of all experts' tensors.
        axis: of the stack along which parts lie side by side.
    """

    parts: tuple[tuple[str, ...], ...]
    axis: int


def merged(model: Any, names: Iterable[str]) -> dict[str, Merge]:
    """Name in the model -> the names in a checkpoint whose tensors transformers stacks to it, by its own table.

    Only stacks, of matrices or of parts of them side by side: what transformers changes besides is left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    names = sorted(names, key=_by_number)
    found: dict[str, Merge] = {}
    for step in get_model_conversion_mapping(model):
        if not isinstance(step, WeightConverter):
            continue
        stack, *others = step.operations
        sides = [other for other in others if isinstance(other, Concatenate)]
        if not isinstance(stack, MergeModulelist) or stack.dim != 0 or sides != others or len(sides) > 1:
            continue
        parts: dict[str, dict[str, list[str]]] = {}
        for name in names:
            target, pattern = step.rename_source_key(name)
            if pattern is not None:
                parts.setdefault(target, {p: [] for p in step.source_patterns})[pattern].append(name)
        axis = sides[0].dim if sides else 1
        found |= {target: Merge(tuple(map(tuple, of.values())), axis) for target, of in parts.items()}
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """What orders names by the numbers in them: experts.9 before experts.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def write_companions(origin: Any, config: Any, out: Path) -> None:
    """Copy a folder's config, tokenizer and licence files, or write the config of a model in memory."""
    if isinstance(origin, Path):
        for pattern in _COMPANIONS:
            for file in origin.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, out / file.name)
        return
    config.save_pretrained(out)
    if origin.can_generate():
        try:
            origin.generation_config.save_pretrained(out)
        except ValueError as error:  # settings that contradict each other
            raise FP4ValueError(f"transformers does not save the model's generation_config: {error}") from error


def refuse_saving(model: Any, folder: Path) -> None:
    """Make `save_pretrained` an error: of what it wrote, `from_pretrained` would fill the packed layers at random."""
    model.save_pretrained = partial(_not_saved, str(folder))


def _not_saved(folder: str, *_: Any, **__: Any) -> None:
    raise FP4ValueError(
        "transformers would write packed weights that neither it nor fp4compile.load reads: "
        f"copy the folder {folder!r}, or save the state_dict"
    )


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a loaded model the generation settings that lie beside it."""
    path = folder / "generation_config.json"
    if not model.can_generate() or not path.is_file():
        return
    try:
        model.generation_config = transformers().GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise FP4ValueError(f"{path}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def known_dtype(name: Any, where: str) -> torch.dtype:
    """The dtype that a file names; floating-point ones only."""
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if not isinstance(name, str) or name not in allowed:
        raise unknown(f"dtype in {where}:", name, allowed)
    return allowed[name]
