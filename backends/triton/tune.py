"""Cuts of packed GEMMs that were measured on this machine, kept in a file.

    tune("hif4", 4096, 14336, tokens=(1, 16))  ->  ~/.cache/fp4compile/packed_mm.json

A call of `mm` looks a cut up here and else takes the table's; it never measures. The file is keyed by the device's
name, the versions of torch and Triton and the text of the kernels, so that an old choice is never taken for a new one.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fp4compile.backends.triton import packed
from fp4compile.backends.triton.packed import CUTS, Cut
from fp4compile.files import cache_folder, write_atomically

_KERNELS = ("packed_kernels", "packed_hopper_kernels")
_ROUNDS = 5
# Weights in turn, so that none is found in the L2 cache.
_ROTATED_BYTES = 200 << 20


def path() -> Path:
    """The file."""
    return cache_folder() / "packed_mm.json"


@cache
def _place(index: int) -> str:
    """What a choice depends on beside the GEMM."""
    sources = (Path(packed.__file__).with_name(f"{name}.py").read_bytes() for name in _KERNELS)
    digest = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    return "|".join((torch.cuda.get_device_name(index), torch.__version__, version("triton"), digest))


def _gemm(format: str, most: int, n: int, k: int) -> str:
    return f"{format} {n}x{k} up to {most}"


def _read() -> dict[str, dict[str, Any]]:
    """What the file holds; a file that cannot be read is as good as none."""
    try:
        found = json.loads(path().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _cut(row: Any) -> Cut | None:
    """A cut of the table's, or None: the file may be anyone's."""
    cuts = {json.dumps(asdict(cut), sort_keys=True): cut for row in CUTS.values() for _, cut in row}
    return cuts.get(json.dumps(row, sort_keys=True))


@cache
def _stored(index: int) -> Mapping[str, Cut | None]:
    rows = _read().get(_place(index))
    return {gemm: _cut(row) for gemm, row in rows.items()} if isinstance(rows, dict) else {}


def stored(index: int, format: str, m: int, n: int, k: int) -> Cut | None:
    """The measured cut for m tokens on a CUDA device, if there is one."""
    return _stored(index).get(_gemm(format, packed.bucket(m), n, k))


def _milliseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of the calls, one after the other in a CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _fastest(format: str, m: int, n: int, k: int, cuts: Iterable[Cut], index: int) -> Cut:
    device = torch.device("cuda", index)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    codes, scales = torch.ops.fp4compile.quantize(weight, format, -1)
    copies = 1 + _ROTATED_BYTES // (codes.nbytes + scales.nbytes)
    weights = [(codes.clone(), scales.clone()) for _ in range(copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)

    def milliseconds(cut: Cut) -> float:
        planned = packed.planned(cut, m, n, k, format, False, index)

        def call(codes: torch.Tensor, scales: torch.Tensor) -> Callable[[], object]:
            return lambda: packed.multiply(x, codes, scales, None, None, None, planned, x.dtype)

        return _milliseconds([call(*each) for each in weights])

    return min(cuts, key=milliseconds)


def tune(format: str, n: int, k: int, tokens: Iterable[int] = tuple(CUTS), index: int = 0) -> dict[int, Cut]:
    """Measure the table's cuts for a weight [n, k] on CUDA device number `index` and store the fastest.

    Args:
        format: of the weight.
        tokens: numbers of tokens; each stands for its row of the table.

    Returns:
        The fastest cut by the largest number of tokens of its row.
    """
    chosen = {}
    with torch.cuda.device(index):
        for most in sorted({packed.bucket(m) for m in tokens}):
            candidates = dict.fromkeys(cut for _, cut in packed.cuts(most, k, format, packed.on_hopper(index)))
            chosen[most] = _fastest(format, most, n, k, candidates, index)
    rows = _read()
    here = rows.setdefault(_place(index), {})
    here |= {_gemm(format, most, n, k): asdict(cut) for most, cut in chosen.items()}
    write_atomically(path(), json.dumps(rows, indent=1, sort_keys=True).encode())
    _stored.cache_clear()
    packed.forget()
    return chosen
