"""`load`: a folder that `convert` wrote in, a model that runs on packed weights out.

Reads JSON and safetensors, nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile import checkpoint, experts, hf
from fp4compile.checkpoint import WEIGHTS
from fp4compile.convert import MANIFEST, VERSION
from fp4compile.dispatch import install_kernels
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.packed import DTYPES, PARTS, PackedLayer, PackedWeight, replaced


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FP4ValueError(f"{str(folder)!r} is no converted model: it has no {MANIFEST}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FP4ValueError(f"{path}: malformed JSON: {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise FP4ValueError(
            f"{path}: version {version!r} is not known here (known: {VERSION}); it was written by fp4compile "
            f"{data.get('fp4compile', '?') if isinstance(data, dict) else '?'}"
        )
    if not isinstance(data.get("weights"), dict):
        raise FP4ValueError(f"{path}: 'weights' must be a table")
    if not isinstance(data.setdefault("extra", []), list):
        raise FP4ValueError(f"{path}: 'extra' must be a list")
    return data


def _rows(manifest: Mapping[str, Any], folder: Path) -> dict[str, PackedWeight]:
    rows = {}
    for path, data in manifest["weights"].items():
        try:
            rows[path] = PackedWeight.from_dict(data)
        except FP4ValueError as error:
            raise FP4ValueError(f"{folder / MANIFEST}: weight of {path!r}: {error}") from error
    return rows


def _replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _pack_modules(model: nn.Module, rows: Mapping[str, PackedWeight], where: str) -> None:
    """Put a `PackedLinear` in the place of each packed module and of those that share its weight, and a `PackedStack`
    in that of each packed parameter of experts."""
    by_weight: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        by_weight.setdefault(id(getattr(module, "weight", None)), []).append(path)
    for path, row in rows.items():
        parent, _, name = path.rpartition(".")
        try:
            module = model.get_submodule(parent if row.stacked else path)
        except AttributeError as error:
            raise FP4ValueError(f"{where}: the model has no module {path!r}") from error
        if row.stacked:
            experts.pack(module, name, row)
            continue
        first = replaced(module, row)
        made = {id(module): first}
        for other in by_weight[id(module.weight)]:
            twin = model.get_submodule(other)
            if id(twin) not in made:
                made[id(twin)] = replaced(twin, row, share=first)
            _replace_module(model, other, made[id(twin)])


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor: in its `_parameters` or its `_buffers`."""

    held: dict[str, Any]
    name: str
    is_parameter: bool

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self.held[self.name]
        return found


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Every name in the state dict -> all places that hold that very tensor."""
    same: dict[int, list[_Place]] = {}
    names: dict[str, list[_Place]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    group = same.setdefault(id(tensor), [])
                    group.append(_Place(held, name, held is module._parameters))
                    names[f"{path}.{name}" if path else name] = group
    return names


def _fill(model: nn.Module, file: Path, device: torch.device, dtype: torch.dtype, extra: list[str]) -> None:
    """Give every tensor its stored values, one at a time, in the dtype that transformers gives it; ties hold."""
    places = _places(model)
    layers = [path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedLayer)]
    parts = {f"{path}.{part}" for path in layers for part in PARTS}
    filled: set[int] = set()
    for name, entry in checkpoint.from_file(file).items():
        if name not in places:
            if name in extra:
                continue
            raise FP4ValueError(f"{file}: the model has no tensor {name!r}")
        expected = tuple(places[name][0].tensor.shape)
        if expected != entry.shape:
            raise FP4ValueError(f"{file}: tensor {name!r} has shape {entry.shape}, expected {expected}")
        own = places[name][0].tensor.dtype
        if name in parts and entry.dtype != own:
            raise FP4ValueError(f"{file}: tensor {name!r} has dtype {entry.dtype}, expected {own}")
        if own.is_floating_point and name not in parts and hf.kept_in_fp32(model, name, dtype):
            own = torch.float32
        tensor = entry.read().to(device, own)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for place in places[name]:
            place.held[place.name] = parameter if place.is_parameter else tensor
        filled.add(id(places[name]))
    missing = [name for name, group in places.items() if id(group) not in filled]
    if missing:
        raise FP4ValueError(f"{file} lacks {', '.join(missing[:8])}")


def _device(name: str | torch.device) -> torch.device:
    """The device, once it is known to hold tensors here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises each of them for some device
        reason = str(error).splitlines()[0]
        raise FP4ValueError(f"cannot load to device {str(name)!r}: {reason}") from error
    return device


def load(dir: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Load a model that `fp4compile.convert` wrote; its FP4 weights stay packed in memory.

    Args:
        dir: the folder.
        device: where the tensors go.
        dtype: fp32, bf16 or fp16, for everything that is not packed but what transformers keeps in fp32 for the model;
            None is that of most of the checkpoint's matrices.

    Returns:
        The transformers model in eval mode, parameters frozen; each packed layer is a `PackedLinear`, and each packed
        stack of experts a `PackedStack`. `save_pretrained` refuses: what is kept is the folder, or the state dict.

    Raises:
        FP4ValueError: no converted model, an unknown version or format, a tensor missing or of another shape, no such
            device here.
        FP4TypeError: an unusable dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise FP4TypeError(f"cannot load as {dtype!r}; allowed: {', '.join(map(str, DTYPES))}")
    target = _device(device)
    folder = Path(dir).expanduser()
    if not folder.is_dir():
        raise FP4ValueError(f"{str(folder)!r} is no folder")
    where = str(folder / MANIFEST)
    manifest = _read_manifest(folder)
    rows = _rows(manifest, folder)
    config = hf.read_config(folder)
    cls = hf.model_class(manifest.get("architecture"), where)
    dtype = dtype or hf.known_dtype(manifest.get("dtype"), where)
    model = hf.skeleton(cls, config, dtype)
    _pack_modules(model, rows, where)
    _fill(model, folder / WEIGHTS, target, dtype, manifest["extra"])
    for path, module in model.named_modules():
        if isinstance(module, PackedLayer):
            module.dtype = torch.float32 if hf.kept_in_fp32(model, f"{path}.weight", dtype) else dtype
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to(target)
    install_kernels()
    hf.read_generation_config(model, folder)
    hf.refuse_saving(model, folder)
    return model
