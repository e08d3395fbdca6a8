"""`convert`: a model in, a folder with packed FP4 weights out.

    config.json + safetensors  ->  meta model  ->  captured graph  ->  passes up to insert_qdq
    quantize(%q_proj.weight, 'hif4', 1)  ->  q_proj.codes, q_proj.scales

The graph decides: what stands there as `quantize` of a parameter is what is packed, along the axis and in the
format written there. It is captured without weights; these are then read, packed and written one at a time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fp4compile import checkpoint, hf
from fp4compile import recipe as recipes
from fp4compile.checkpoint import WEIGHTS, Entry
from fp4compile.errors import FP4TypeError, FP4ValueError, unknown
from fp4compile.files import check_writable
from fp4compile.packed import DTYPES, PackedLayer, PackedWeight
from fp4compile.plan import decide, tied_names
from fp4compile.recipe import Recipe
from fp4compile.report import Report

MANIFEST = "fp4compile.json"
# Raised when a reader of the old layout would misread the new one.
VERSION = 1


@dataclass(frozen=True)
class Artifact:
    """What a conversion wrote.

    Attributes:
        path: the folder.
        report: what each GEMM became; `weights` counts the bytes of the packed weights before and after.
        bytes_before, bytes_after: bytes of all tensors of the model, and of the written weight file.
    """

    path: Path
    report: Report
    bytes_before: int
    bytes_after: int


# --- what the checkpoint holds ------------------------------------------------------------------------------


def _candidates(name: str, prefix: str) -> list[str]:
    """Names under which a checkpoint may hold a tensor: saved from, or for, the base model alone."""
    return [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"] if prefix else [name]


@dataclass(frozen=True)
class _Item:
    """One tensor of the model, tied names merged: its name in the output and where its values come from."""

    name: str
    entry: Entry
    packed: PackedWeight | None = None

    @property
    def module(self) -> str:
        """Path of what takes the weight's place: its linear layer, or of a stack of experts the parameter itself."""
        return self.name if self.packed and self.packed.stacked else self.name.rpartition(".")[0]

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what is written."""
        if self.packed is None:
            return {self.name: (self.entry.dtype, self.entry.shape)}
        return {f"{self.module}.{n}": (t.dtype, tuple(t.shape)) for n, t in self.packed.parts().items()}

    def tensors(self) -> dict[str, Tensor]:
        """What is written."""
        value = self.entry.read()
        if self.packed is None:
            return {self.name: value}
        return {f"{self.module}.{n}": t for n, t in self.packed.pack(value).items()}


def _match(model: Any, plan: Mapping[str, PackedWeight], source: Mapping[str, Entry], where: str) -> list[_Item]:
    """Every tensor of the model with its source, then those that the checkpoint holds beyond the model's.

    Raises:
        FP4ValueError: the checkpoint lacks a tensor, holds another shape, or two values for tied names.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    unknown_names = [name for name in source if name not in shapes]
    new = {old: name for old, name in hf.renamed(model, unknown_names).items() if name not in source}
    source = _stacks(model, {new.get(name, name): entry for name, entry in source.items()}, shapes)
    items: list[_Item] = []
    used: set[str] = set()
    missing: list[str] = []
    for names in {group[0]: group for group in tied_names(model).values()}.values():
        found = {n: next((c for c in _candidates(n, model.base_model_prefix) if c in source), "") for n in names}
        keys = {n: key for n, key in found.items() if key}
        if not keys:
            made = hf.computed(model, names[0])
            if made is not None:
                items.append(_Item(names[0], checkpoint.of_tensor(made)))
            else:
                missing.append(f"{names[0]} (to be packed)" if names[0] in plan else names[0])
            continue
        name = next(iter(keys))
        item = _Item(name, source[keys[name]], plan.get(names[0]))
        _check(item, shapes[name], f"{where}: tensor {keys[name]!r}")
        _check_equal(item.entry, [source[k] for k in keys.values()], list(keys.values()), where)
        used.update(keys.values())
        items.append(item)
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        lacking = f"{', '.join(missing[:8])}{more}"
        raise FP4ValueError(f"{where} lacks tensors of {type(model).__name__}: {lacking}{_advice(missing, source)}")
    return items + [_Item(name, entry) for name, entry in source.items() if name not in used]


def _stacks(model: Any, source: Mapping[str, Entry], known: Container[str]) -> dict[str, Entry]:
    """The checkpoint with the experts that it holds one by one in stacks, as transformers makes them."""
    made = dict(source)
    for name, merge in hf.merged(model, [name for name in source if name not in known]).items():
        stack = checkpoint.stacked([[source[n] for n in part] for part in merge.parts], merge.axis)
        if stack is not None and name not in source:
            made[name] = stack
            for n in itertools.chain(*merge.parts):
                del made[n]
    return made


def _advice(missing: Iterable[str], source: Iterable[str]) -> str:
    """What to do about tensors that transformers stacks from numbered ones of a checkpoint, as it does with experts."""
    for name in missing:
        part = re.compile(rf"{re.escape(name.rpartition('.')[0])}\.\d+\.")
        found = next(filter(part.match, source), None)
        if found:
            return (
                f"; it holds {found!r} and its like, which transformers stacks as it loads them: "
                "load the model with transformers, and convert that"
            )
    return ""


def _check(item: _Item, shape: tuple[int, ...], what: str) -> None:
    if item.entry.shape != shape:
        raise FP4ValueError(f"{what} has shape {item.entry.shape}, the model expects {shape}")
    if item.packed and item.entry.dtype not in DTYPES:
        raise FP4ValueError(f"{what} of dtype {item.entry.dtype} cannot be packed; allowed: fp32, bf16, fp16")


def _check_equal(first: Entry, all_of_it: Sequence[Entry], keys: list[str], where: str) -> None:
    others = [entry for entry in all_of_it if entry is not first]
    if not all((o.dtype, o.shape) == (first.dtype, first.shape) and _same_bits(first.read(), o.read()) for o in others):
        raise FP4ValueError(f"{where}: the configuration ties {' and '.join(keys)}, but their values differ")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same; a NaN equals itself."""
    return torch.equal(*(t.flatten().view(torch.uint8) for t in (a, b)))


# --- writing ------------------------------------------------------------------------------------------------


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not (console.is_terminal and sys.stderr.isatty()), transient=True)


def _write_safetensors(items: Sequence[_Item], folder: Path) -> None:
    """Pack and write tensor by tensor; no more than one is held."""
    layout = {name: row for item in items for name, row in item.layout().items()}
    with checkpoint.Writer(folder / WEIGHTS, layout) as writer, _progress() as progress:
        task = progress.add_task("packing weights", total=sum(item.entry.nbytes for item in items))
        for item in items:
            for name, tensor in item.tensors().items():
                writer.write(name, tensor)
            progress.advance(task, item.entry.nbytes)


# Target -> what writes the tensors into a folder.
TARGETS: Mapping[str, Callable[[Sequence[_Item], Path], None]] = {"safetensors": _write_safetensors}


def _packed_bytes(items: Iterable[_Item]) -> dict[str, tuple[int, int]]:
    """Packed weight -> its bytes in the source and as written."""
    return {
        item.name: (item.entry.nbytes, sum(checkpoint.nbytes(*row) for row in item.layout().values()))
        for item in items
        if item.packed
    }


def _manifest(
    model: nn.Module,
    recipe: Recipe,
    dtype: torch.dtype,
    items: Sequence[_Item],
    report: Report,
    files: list[str],
) -> dict[str, Any]:
    from fp4compile import __version__

    known = set(model.state_dict())
    packed = {item.module: item.packed for item in items if item.packed}
    counts: dict[str, Any] = {s: report.count(s) for s in ("fp4", "kept", "refused")}
    return {
        "version": VERSION,
        "fp4compile": __version__,
        "architecture": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "formats": sorted({row.weight.format for row in packed.values()}),
        "recipe": recipe.to_dict(),
        "weights": {path: row.to_dict() for path, row in packed.items()},
        "extra": sorted(item.name for item in items if item.name not in known),
        "files": sorted(files),
        "report": {
            **counts,
            "fp4_share": report.fp4_share,
            "weight_bytes": list(report.weight_bytes),
            "notes": report.notes,
            "summary": report.summary(),
        },
    }


def _check_out(out: Path, source: Any, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise FP4ValueError(f"output {str(out)!r} exists and is no folder")
    check_writable(out)
    if isinstance(source, Path) and out.resolve() == source.resolve():
        raise FP4ValueError(f"output {str(out)!r} is the model's own folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FP4ValueError(f"output folder {str(out)!r} is not empty; pass overwrite=True to replace its files")


def _publish(new: Path, out: Path) -> None:
    """Put a finished folder in its place: by one rename, or file by file into a folder that is there.

    One that is there may be a mount point, which nothing can be renamed to. Nothing is deleted that a conversion did
    not write. The manifest goes first and comes last, so that a folder that is part old and part new is none that
    loads.
    """
    if not out.is_dir():
        os.replace(new, out)
        return
    old = out / MANIFEST
    if old.is_file():
        try:
            stale = json.loads(old.read_text(encoding="utf-8")).get("files", [])
        except (ValueError, AttributeError):
            stale = []
        old.unlink()
        for name in stale:
            if isinstance(name, str) and Path(name).name == name:
                (out / name).unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda f: f.name == MANIFEST):
        os.replace(file, out / file.name)


@dataclass(frozen=True)
class _Source:
    """A model to convert: its configuration, class and tensors; `origin` is the folder or the model."""

    origin: Any
    config: Any
    cls: type
    entries: dict[str, Entry]

    @property
    def name(self) -> str:
        return str(self.origin) if isinstance(self.origin, Path) else self.cls.__name__

    @property
    def dtype(self) -> torch.dtype:
        """Of most of the floating-point matrices, by their elements: some checkpoints hold a few in fp32."""
        sizes = dict.fromkeys(DTYPES, 0)
        for entry in self.entries.values():
            if entry.dtype in sizes and len(entry.shape) > 1:
                sizes[entry.dtype] += math.prod(entry.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])


def _source(model_or_path: Any) -> _Source:
    if isinstance(model_or_path, str | Path):
        folder = Path(model_or_path).expanduser()
        if (folder / MANIFEST).is_file():
            raise FP4ValueError(f"{str(folder)!r} is converted already: it holds {MANIFEST}. Convert the original")
        config = hf.read_config(folder)
        return _Source(folder, config, hf.class_of(config, folder), checkpoint.from_folder(folder))
    if not hf.is_model(model_or_path):
        raise FP4TypeError(
            "convert takes a transformers model or the folder of one, not a " + type(model_or_path).__name__
        )
    config, name = deepcopy(model_or_path.config), type(model_or_path).__name__
    if getattr(config, "quantization_config", None) or any(isinstance(m, PackedLayer) for m in model_or_path.modules()):
        raise FP4ValueError(f"{name} is quantised already; convert the original")
    hollow = [n for n, t in model_or_path.state_dict().items() if t.is_meta]
    if hollow:
        raise FP4ValueError(
            f"{hollow[0]!r} of {name} is on the meta device and holds no values: load the whole model into memory"
        )
    config.architectures = [name]
    cls = hf.model_class(name, "the model's class")
    return _Source(model_or_path, config, cls, checkpoint.from_module(model_or_path))


def convert(
    model_or_path: Any,
    recipe: str | Path | Recipe = "hif4-w4a16",
    to: str = "safetensors",
    out: str | Path = "dir",
    *,
    keep: Sequence[str] = (),
    example_inputs: Any = None,
    strict: bool = True,
    overwrite: bool = False,
) -> Artifact:
    """Write a model with the weights that the recipe names packed to FP4; `fp4compile.load` runs the result.

    The inference graph is captured without weights. Each weight is quantised once along its contraction axis,
    to nearest; one tensor is in memory at a time. A training recipe counts with its forward rules.

    Args:
        model_or_path: a transformers model folder with safetensors weights, or a transformers model.
        recipe: a preset's name, a TOML file or a `Recipe`.
        to: the target, "safetensors".
        out: folder to write: `model.safetensors`, `config.json` and tokenizer files, `fp4compile.json`.
        keep: globs of modules that stay in high precision.
        example_inputs: what the model is called with to capture it, made up by default; only shapes and
            dtypes matter.
        strict: a GEMM that the recipe asks for and that cannot be done is an error; else it is reported.
        overwrite: replace files in `out` if it holds any.

    Raises:
        FP4ValueError: an unknown recipe or target, no model folder, `out` not empty, a weight missing in the
            checkpoint, a weight that two GEMMs want in different ways, a GEMM refused (when strict).
        FP4TypeError: neither a path nor a transformers model.
    """
    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    resolved = recipes.resolve(recipe, keep)
    given, out = _source(model_or_path), Path(out).expanduser()
    _check_out(out, given.origin, overwrite)
    model = hf.meta_model(given.cls, given.config, given.dtype)
    report, weights = decide(model, example_inputs, resolved, strict)
    if not weights:
        none = "no GEMM that it asks for can be" if report.count("refused") else "it keeps every GEMM of this model"
        report.notes.append(f"no weight was packed by recipe {resolved.name!r}: {none}")
    items = _match(model, weights, given.entries, given.name)
    report.weights = _packed_bytes(items)
    real = out.resolve()  # where a link leads, perhaps to another file system
    beside = real if real.is_dir() else real.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=f".{real.name}.") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        hf.write_companions(given.origin, given.config, new)
        TARGETS[to](items, new)
        after = (new / WEIGHTS).stat().st_size
        manifest = _manifest(model, resolved, given.dtype, items, report, [f.name for f in new.iterdir()])
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _publish(new, real)
    return Artifact(out, report, sum(item.entry.nbytes for item in items), after)
