"""Linear layers of a decode step: packed FP4 weights against bf16 `linear`.

    y[M, N] = x[M, K] @ W[N, K].T    # W packed, x and y bf16

The shapes are those of Llama 3 8B, the projections of one input joined. CUDA graphs; each call of a graph reads
another copy of the weight, several times the L2 cache in all. A result is checked before its case is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.options import Options
from benchmarks.gpu.sheet import Bar, Row, Sheet, absent, middle, reason
from benchmarks.gpu.timing import compare, graphed, turns
from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import Operand

Linear = Callable[[Tensor], Tensor]
BASE = "bf16"
NAMES = ("hif4", "mxfp4", "nvfp4")
# (N, K) -> the least speed-up over bf16 for every number of tokens M.
BARS: Mapping[tuple[int, int], Mapping[int, float]] = {
    (28672, 4096): {1: 2.9, 16: 2.8, 64: 2.0, 256: 1.0},
    (4096, 14336): {1: 2.65, 16: 2.55, 64: 2.0, 256: 1.0},
    (6144, 4096): {1: 2.2, 16: 2.1, 64: 2.0, 256: 1.0},
}
CALLS = 24  # in one graph
ROTATION = 4  # copies of a weight take this many times the L2 cache
COPY_BYTES = 1 << 29
# One rounding to bf16 leaves about 2e-3; sums in bf16 leave ten times as much.
TOLERANCE = 4e-3


@dataclass(frozen=True)
class Layer:
    """A linear layer in several copies of its weight, of `bytes` each (0: not known)."""

    name: str
    copies: list[Linear]
    bytes: int = 0
    is_peer: bool = False


def _copies(bytes: int, device: str) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 0
    return min(max(math.ceil(ROTATION * cache / bytes), 2), CALLS)


def dense(weight: Tensor) -> Layer:
    """bf16 `linear`."""
    count = _copies(weight.nbytes, weight.device.type)
    return Layer(BASE, [partial(F.linear, weight=weight.clone()) for _ in range(count)], weight.nbytes)


def packed(weight: Tensor, format: str) -> tuple[Layer, Tensor]:
    """The layer on packed weights, and the values that these stand for."""
    row = PackedWeight((weight.shape[0], weight.shape[1]), 1, Operand(format))
    parts = row.pack(weight)
    bytes = sum(part.nbytes for part in parts.values())
    layers = [
        PackedLinear(row, {name: part.clone() for name, part in parts.items()}, None, weight.dtype)
        for _ in range(_copies(bytes, weight.device.type))
    ]
    # NVFP4's tensor scale is applied in fp32: bf16 values would be rounded once more.
    exact = PackedLinear(row, parts, None, torch.float32).weight
    return Layer(format, list(layers), bytes), exact


# --- peers -----------------------------------------------------------------------------------------------------------


def bitsandbytes_fp4(weight: Tensor) -> Linear:
    """bitsandbytes' FP4, blocks of 64."""
    import bitsandbytes

    codes, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="fp4")
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


def gemlite_mxfp4(weight: Tensor) -> Linear:
    """gemlite's MXFP4, activations in bf16."""
    from gemlite.helper import A16W4_MXFP

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    made: Linear = A16W4_MXFP(device=str(weight.device), dtype=weight.dtype).from_linear(layer, del_orig=False)
    return made


# Package -> what its rows are called, and a layer on its packing of a weight.
PEERS: Mapping[str, tuple[str, Callable[[Tensor], Linear]]] = {
    "bitsandbytes": ("bitsandbytes FP4", bitsandbytes_fp4),
    "gemlite": ("gemlite MXFP4", gemlite_mxfp4),
}


def peers(weight: Tensor, note: Callable[[str], None]) -> Iterator[Layer]:
    """The peers that are installed and pack this weight."""
    count = _copies(weight.nbytes // 4, weight.device.type)
    for package, (name, make) in PEERS.items():
        missing = absent(package)
        if missing:
            note(missing)
            continue
        try:
            yield Layer(name, [make(weight) for _ in range(count)], is_peer=True)
        except Exception as error:  # a peer may fail in any way; the note says how
            note(f"{name}: {reason(error)}")


# --- measuring -------------------------------------------------------------------------------------------------------


def copy_speed(options: Options) -> float:
    """GB/s read and written by a device-to-device copy."""
    source = torch.randn(COPY_BYTES // 4, device=options.device)
    target = torch.empty_like(source)
    (times,) = turns([graphed([lambda: target.copy_(source)], 4)], options.rounds, options.seconds)
    return 2 * source.nbytes / (middle(times)[0] / 4) / 1e6


def error_of(layer: Layer, x: Tensor, exact: Tensor) -> float:
    """Distance of the result from that in fp32, relative to its norm."""
    expected = x.float() @ exact.T
    return float((layer.copies[0](x).float() - expected).norm() / expected.norm())


def wrong(layer: Layer, x: Tensor, exact: Tensor) -> str | None:
    """Why the layer is not worth timing, or None."""
    try:
        error = error_of(layer, x, exact)
    except Exception as problem:  # whatever a kernel raises
        return reason(problem)
    return None if error <= TOLERANCE else f"its result is off by {error:.2g}, allowed {TOLERANCE:g}"


def rows_of(
    layers: list[Layer], problems: Mapping[str, str], x: Tensor, n: int, limit: float, copy: float, options: Options
) -> Iterator[Row]:
    """Time the layers that are right on one x [M, K]."""
    cases = {layer.name: [partial(call, x) for call in layer.copies] for layer in layers if layer.name not in problems}
    times, errors = compare(cases, CALLS, options.rounds, options.seconds)
    if BASE not in times:
        raise RuntimeError(f"bf16 linear could not be timed: {errors.get(BASE) or problems.get(BASE)}")
    base = middle(times[BASE])[0]
    for layer in layers:
        ours = layer.name in NAMES
        name, bar = f"{n}×{x.shape[1]}, M = {x.shape[0]}, {layer.name}", Bar("≥", limit) if ours else None
        if layer.name in times:
            ms, spread = middle(times[layer.name])
            gbps = (layer.bytes + x.nbytes + 2 * n * x.shape[0]) / ms / 1e6
            details = {"GB/s": gbps, "of copy": gbps / copy} if layer.bytes else {}
            yield Row(name, ms * 1e3, "µs", spread, base / ms, bar, details)
        else:
            error = problems.get(layer.name) or errors[layer.name]
            yield Row(name, unit="µs", bar=bar, error=error, is_peer=layer.is_peer)


def measure(sheet: Sheet, n: int, k: int, copy: float, options: Options) -> None:
    """Add the rows of one weight [n, k]."""
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=options.device) / math.sqrt(k)
    ours = [packed(weight, format) for format in NAMES]
    others = list(peers(weight, lambda line: sheet.notes.append(line) if line not in sheet.notes else None))
    layers = [dense(weight), *(layer for layer, _ in ours), *others]
    for m, limit in BARS[n, k].items():
        x = torch.randn(m, k, dtype=weight.dtype, device=options.device)
        found = {layer.name: wrong(layer, x, exact) for layer, exact in ours}
        problems = {name: problem for name, problem in found.items() if problem}
        sheet.rows += rows_of(layers, problems, x, n, limit, copy, options)


def run(options: Options) -> Sheet:
    """Measure the section."""
    sheet = Sheet("decode", "linear layers on packed weights", "bf16's time over the case's")
    copy = copy_speed(options)
    sheet.notes.append(f"device-to-device copy: {copy:.0f} GB/s read and written")
    for n, k in BARS:
        measure(sheet, n, k, copy, options)
    return sheet
