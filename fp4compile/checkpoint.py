"""Tensors by name, read and written one at a time, so that no model need fit in memory twice.

A source is a plain mapping, name -> `Entry`: what a tensor looks like and how to read it. Sources are
safetensors files (memory-mapped) or a module's state. The writer lays out a safetensors file from dtypes and
shapes alone and then takes the tensors in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fp4compile.errors import FP4ValueError, unknown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Names of the safetensors format.
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


def from_file(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file. Reading one maps its pages and copies nothing."""
    try:
        handle: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FP4ValueError(f"{path} is not a whole safetensors file: {error}") from error
    entries = {}
    for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
        piece = handle.get_slice(name)
        kind = piece.get_dtype()
        if kind not in _DTYPES:
            raise unknown(f"dtype of tensor {name!r} in {path}:", kind, _DTYPES)
        entries[name] = Entry(_DTYPES[kind], tuple(piece.get_shape()), partial(handle.get_tensor, name))
    return entries


def from_folder(folder: Path) -> dict[str, Entry]:
    """The tensors of a model folder: one safetensors file, or the shards that an index names.

    Raises:
        FP4ValueError: no safetensors weights, a shard is missing or cut short, two hold the same tensor, or none holds
            one that the index names.
    """
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        return from_file(single)
    if not index.is_file():
        raise FP4ValueError(
            f"{folder} holds neither {WEIGHTS} nor {INDEX}. Pickled weights (.bin, .pt) are not read: save "
            "the model again with save_pretrained, which writes safetensors"
        )
    try:
        shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(shard_of.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FP4ValueError(f"{index} is not an index of safetensors shards: {error!r}") from error
    entries: dict[str, Entry] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
            raise FP4ValueError(f"{index} names {file!r}, which does not lie beside it")
        shard = from_file(folder / file)
        twice = next(iter(entries.keys() & shard.keys()), None)
        if twice is not None:
            raise FP4ValueError(f"{folder / file} and another shard that {index} names both hold {twice!r}")
        entries |= shard
    lost = next((name for name in shard_of if name not in entries), None)
    if lost is not None:
        raise FP4ValueError(f"{index} names {lost!r}, which no shard holds: the files are not of one model")
    return entries


def of_tensor(tensor: Tensor) -> Entry:
    """A tensor in memory."""

    def give() -> Tensor:
        return tensor

    return Entry(tensor.dtype, tuple(tensor.shape), give)


def from_module(model: nn.Module) -> dict[str, Entry]:
    """The tensors of a module's state dict."""
    return {name: of_tensor(tensor) for name, tensor in model.state_dict().items()}


def stacked(parts: Sequence[Sequence[Entry]], axis: int) -> Entry | None:
    """The stack [n, ...] of n tensors, each made of parts side by side along `axis` of the stack; read at once.

    Args:
        parts: of each part, n tensors of one dtype and shape.

    Returns:
        None where the parts do not make a stack.
    """
    kinds = [{(entry.dtype, entry.shape) for entry in of_part} for of_part in parts]
    if len({len(of_part) for of_part in parts}) != 1 or any(len(kind) != 1 for kind in kinds):
        return None
    dtypes, shapes = zip(*(next(iter(kind)) for kind in kinds), strict=True)
    others = {(*shape[: axis - 1], *shape[axis:]) for shape in shapes}
    if len(set(dtypes)) != 1 or len(others) != 1 or len({len(shape) for shape in shapes}) != 1:
        return None
    sizes = [shape[axis - 1] for shape in shapes]
    shape = (len(parts[0]), *shapes[0][: axis - 1], sum(sizes), *shapes[0][axis:])

    def read() -> Tensor:
        stack = torch.empty(shape, dtype=dtypes[0])
        for of_part, place in zip(parts, stack.split(sizes, axis), strict=True):
            for entry, matrix in zip(of_part, place, strict=True):
                matrix.copy_(entry.read())
        return stack

    return Entry(dtypes[0], shape, read)


class Writer:
    """Writes one safetensors file of a known layout; tensors may come in any order, one at a time.

    Args:
        path: the file to create.
        layout: name -> (dtype, shape) of everything that will be written.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        self._layout, self._missing = layout, set(layout)
        # Wide elements first, as safetensors itself does: then every tensor is aligned to its element.
        order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for name in order:
            dtype, shape = layout[name]
            start, end = end, end + nbytes(dtype, shape)
            self._offsets[name] = start
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; its dtype and shape must be those of the layout."""
        if (tensor.dtype, tuple(tensor.shape)) != self._layout[name]:
            raise FP4ValueError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {self._layout[name]}"
            )
        self._file.seek(self._start + self._offsets[name])
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(data.numpy().data)
        self._missing.discard(name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._missing:
            raise FP4ValueError(f"not written: {', '.join(sorted(self._missing))}")
