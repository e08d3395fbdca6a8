"""Row-wise scaled FP8 GEMMs of E2M1 operands on CUDA: from an op's arguments to launches.

    quantize_rowwise(x)       ->  window (scales of rows, flags cleared), quantize
    quantize_rowwise_both(x)  ->  window of both axes, quantize of both from one read, or of each where random
    mm_rowwise(a, b)          ->  torch._scaled_mm, then `exact` over all that read a flagged row

Nothing waits for the device: `exact` is always launched, and returns at once where no flag stands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fp4compile import rowwise
from fp4compile.backends.triton import produce
from fp4compile.backends.triton.codec import encoder, padded_size, pointers, transform
from fp4compile.backends.triton.launch import Launch, ceil_div, kept_zeros, power_of_two, signed
from fp4compile.backends.triton.replay import Launches, Replay
from fp4compile.formats import FORMATS
from fp4compile.hadamard import SIGN_STREAM, signs
from fp4compile.producer import produced_dtype
from fp4compile.rowwise import FLAGGED, GROUP, RUNS


@dataclass(frozen=True)
class Tile:
    """What a program takes of x [rows, columns]: the tile and its warps."""

    rows: int
    columns: int
    warps: int


_KERNELS = "rowwise_kernels"
# By the axes that are quantised: a thread holds one or two whole blocks of rows, and two of columns.
# Chosen by measurement on H100; benchmarks/NOTES.md holds the figures.
TILES: dict[tuple[int, ...], Tile] = {
    (0,): Tile(32, 64, 1),
    (1,): Tile(32, 64, 2),
    (0, 1): Tile(32, 64, 1),
}
# Instead of those, under random numbers.
RANDOM_TILES: dict[tuple[int, ...], Tile] = {(1,): Tile(32, 64, 1)}
# Elements that lie side by side and that a thread reads at once, for axis 0 and for axis 1.
_VECTORS = (2, 8)


@dataclass(frozen=True)
class Axis:
    """How one axis is quantised: the arguments of the op."""

    rounding: str
    scale_rule: str | None
    stream: int
    hadamard: int


# Axes with their options.
Wanted = tuple[tuple[int, Axis], ...]


def _random(wanted: Wanted) -> bool:
    return any(options.rounding == "stochastic" for _, options in wanted)


# --- what is supported -----------------------------------------------------------------------------------------------

LEAST_CAPABILITY = (8, 9)  # FP8 tensor cores


@cache
def refusal(format: str) -> str | None:
    """Why the kernels do not hold values of the format in FP8 rows, or None."""
    fmt = FORMATS[format]
    whole = all(edge % fmt.block == 0 for tile in TILES.values() for edge in (tile.rows, tile.columns))
    return rowwise.refusal(fmt) or (None if whole else f"no tile is made of blocks of {fmt.block}")


def sizes(arguments: Mapping[str, Any]) -> str | None:
    """Why `torch._scaled_mm` does not take the operands of `mm_rowwise`, or None."""
    a, b, bias = (arguments[name] for name in ("a", "b", "bias"))
    if arguments["dtype"] is not torch.bfloat16:
        return f"row-wise scaled FP8 GEMMs write bf16, not {arguments['dtype']}"
    if bias is not None and bias.dtype is not torch.bfloat16:
        return f"the bias is {bias.dtype}, not bf16"
    if a.dtype is b.dtype is torch.float8_e5m2:
        return "both operands are E5M2"
    if not isinstance(b.shape[0], int) or b.shape[0] % 16:
        return f"{b.shape[0]} output columns are no multiple of 16"
    return None if a.shape[0] != 0 and a.shape[1] != 0 else "an operand is empty"


# --- quantisation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What every call with one shape repeats: both launches without tensors and seeds, and the results' shapes.

    Attributes:
        shapes: axis -> (rows, length, blocks) of its results.
        values: dtype of the values.
    """

    window: Launch
    quantize: Launch
    shapes: Mapping[int, tuple[int, int, int]]
    values: torch.dtype


@cache
def _signs(size: int) -> int:
    """The sign bits of the transform without a seed, as a 32-bit word."""
    negative = signs(size, None, torch.device("cpu")) < 0
    return signed(sum(1 << i for i, bit in enumerate(negative.tolist()) if bit))


@lru_cache(maxsize=4096)
def plan(
    shape: torch.Size,
    dtype: torch.dtype,
    format: str,
    wanted: Wanted,
    signs_drawn: bool,
    producer: str = "",
    e5m2: bool = False,
) -> Plan:
    """Plan the quantisation of a contiguous x [rows, columns] along the wanted axes.

    Args:
        dtype: what the decoded values must fit.
        signs_drawn: whether a seed chooses the signs of the transform; else the kernel is compiled with them.
    """
    fmt = FORMATS[format]
    axes = tuple(axis for axis, _ in wanted)
    tile = RANDOM_TILES.get(axes, TILES[axes]) if _random(wanted) else TILES[axes]
    emax = math.floor(math.log2(fmt.element.max))
    # A tile holds whole runs of the transform.
    least = {axis: options.hadamard for axis, options in wanted}
    edges = max(tile.rows, least.get(0, 0)), max(tile.columns, least.get(1, 0))
    warps, extent = tile.warps * math.prod(edges) // (tile.rows * tile.columns), list(shape)
    shapes: dict[int, tuple[int, int, int]] = {}
    arguments: dict[str, Any] = {"rows": shape[0], "columns": shape[1], "sign_stream": SIGN_STREAM}
    made = {"PRODUCE": produce.function(producer)}
    constants: dict[str, Any] = {"BLOCK": fmt.block, "EMAX": emax, "TILE0": edges[0], "TILE1": edges[1], **made}
    for axis, options in wanted:
        lanes, size = shape[1 - axis], shape[axis]
        padded = padded_size(size, options.hadamard)
        blocks = ceil_div(padded, fmt.block)
        shapes[axis] = lanes, blocks * fmt.block, blocks
        extent[axis] = max(extent[axis], blocks * fmt.block)
        encoding, _ = encoder(format, options.scale_rule, options.rounding, dtype)
        own = {"padded": padded, "length": blocks * fmt.block, "stream": signed(options.stream)}
        arguments |= {f"{name}{axis}": value for name, value in own.items()}
        arguments |= {f"up_from{axis}": encoding["up_from"], "k_max": encoding["k_max"]}
        of_transform = {f"{name}{axis}": value for name, value in transform(options.hadamard).items()}
        constants |= {
            **of_transform,
            f"VECTOR{axis}": _VECTORS[axis],
            f"ALIGNED{axis}": (padded if axis else lanes) % 4 == 0,
            f"STOCHASTIC{axis}": options.rounding == "stochastic",
            f"SIGNS{axis}": None if signs_drawn or options.hadamard > fmt.block else _signs(options.hadamard),
        }
    for axis in {0, 1} - set(shapes):
        arguments |= dict.fromkeys((f"padded{axis}", f"length{axis}", f"stream{axis}", f"up_from{axis}"), 0)
        idle = {"VECTOR": 1, "ALIGNED": False, "STOCHASTIC": False, "SIGNS": None, **transform(0)}
        constants |= {f"{name}{axis}": value for name, value in idle.items()}
    down, across = (ceil_div(length, edge) for length, edge in zip(extent, edges, strict=True))
    arguments["across"] = across
    constants |= {
        "BF16": dtype is torch.bfloat16,
        "EVEN": all(size % edge == 0 for size, edge in zip(shape, edges, strict=True)),
        "WIDE": (extent[0] + edges[0]) * (extent[1] + edges[1]) >= 2**31,
    }
    groups = [ceil_div(shape[1 - axis], GROUP) if axis in shapes else 0 for axis in (0, 1)]
    looking = {"rows": shape[0], "columns": shape[1], "groups0": groups[0]}
    values = rowwise.values_dtype(e5m2)
    sampling = {"EMAX": emax, "HEADROOM": rowwise.WINDOWS[values].headroom, "RUN0": RUNS[0], "RUN1": RUNS[1], **made}
    return Plan(
        Launch(_KERNELS, "window", sum(groups), looking, sampling, 4),
        Launch(_KERNELS, "quantize", down * across, arguments, constants, warps),
        shapes,
        values,
    )


_RESULTS = ("values", "scale", "exponents", "flags")
_WINDOW = ("scale0_ptr", "flags0_ptr", "scale1_ptr", "flags1_ptr")


def _results(
    x: Tensor, values: torch.dtype, rows: int, length: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty((rows, length), dtype=values),
        x.new_empty((rows,), dtype=torch.float32),
        x.new_empty((blocks, rows), dtype=torch.uint8),
        x.new_empty((ceil_div(rows, FLAGGED),), dtype=torch.uint8),
    )


def _parts(wanted: Wanted) -> Sequence[Wanted]:
    """The axes by launches: random numbers are bound by arithmetic, not by reading x, and by registers."""
    return [(each,) for each in wanted] if _random(wanted) else [wanted]


def plan_rows(
    x: Tensor,
    format: str,
    wanted: Wanted,
    seed: Tensor | None,
    sign_seed: Tensor | None,
    producer: str = "",
    e5m2: bool = False,
    **operands: Tensor | None,
) -> tuple[Launches, tuple[Tensor, ...]]:
    """The launches that quantise along the wanted axes, of contiguous tensors, and the results."""
    planned_for = partial(
        plan, x.shape, produced_dtype(x, producer), format,
        signs_drawn=sign_seed is not None, producer=producer, e5m2=e5m2,
    )  # fmt: skip
    planned = planned_for(wanted)
    results = {axis: _results(x, planned.values, *sizes) for axis, sizes in planned.shapes.items()}
    source: dict[str, Any] = {"x_ptr": x, **pointers(operands)}
    given: dict[int, dict[str, Any]] = {}
    for axis in (0, 1):
        tensors = results.get(axis, (None,) * len(_RESULTS))
        given[axis] = {f"{name}{axis}_ptr": tensor for name, tensor in zip(_RESULTS, tensors, strict=True)}
    every = given[0] | given[1]
    launches = [(planned.window, source | {name: every[name] for name in _WINDOW})]
    idle, seeds = dict.fromkeys(every), {"seed_ptr": seed, "sign_seed_ptr": sign_seed}
    for part in _parts(wanted):
        own = {name: value for axis, _ in part for name, value in given[axis].items()}
        launches.append((planned_for(part).quantize, source | idle | own | seeds))
    return launches, tuple(tensor for axis in sorted(results) for tensor in results[axis])


def plan_quantize_rowwise(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str,
    scale_rule: str | None,
    seed: Tensor | None,
    stream: int,
    hadamard: int,
    sign_seed: Tensor | None,
    **produced: Any,
) -> tuple[Launches, tuple[Tensor, ...]]:
    """`plan_rows` of the op `quantize_rowwise`."""
    wanted = ((axis % 2, Axis(rounding, scale_rule, stream, hadamard)),)
    return plan_rows(x, format, wanted, seed, sign_seed, **produced)


def plan_quantize_rowwise_both(
    x: Tensor,
    format: str,
    rounding: Sequence[str],
    scale_rule: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    seed: Tensor | None,
    sign_seed: Tensor | None,
    **produced: Any,
) -> tuple[Launches, tuple[Tensor, ...]]:
    """`plan_rows` of the op `quantize_rowwise_both`."""
    options = zip(rounding, scale_rule, stream, hadamard, strict=True)
    wanted = tuple((axis, Axis(*each)) for axis, each in enumerate(options))
    return plan_rows(x, format, wanted, seed, sign_seed, **produced)


# --- the GEMM --------------------------------------------------------------------------------------------------------


# device -> GEMMs that had a flagged row, and all GEMMs; both only ever grow.
COUNTS: dict[torch.device, Tensor] = {}


def counts(device: torch.device) -> Tensor:
    """GEMMs on the device that had a flagged row, and all GEMMs."""
    return kept_zeros(COUNTS, 2, torch.int64, device)


# Few rows are flagged, if any: many parts with little each. Elements of a chunk, parts that share the flagged groups of
# a chunk, blocks at a time. Most GEMMs have no flag: no more programs look than run at once, four on each of 132 SMs.
_EXACT = {"TILE": 32, "SPLIT": 4, "STEP": 4}
_MOST_PROGRAMS = 528


@lru_cache(maxsize=4096)
def plan_exact(rows: int, columns: int, blocks: int, block: int) -> Launch:
    """The launch that computes again what a flagged row had a part in."""
    chunks = max(ceil_div(rows, _EXACT["TILE"]), ceil_div(columns, _EXACT["TILE"]))
    flags = {"FLAGS_A": power_of_two(ceil_div(rows, FLAGGED)), "FLAGS_B": power_of_two(ceil_div(columns, FLAGGED))}
    programs = min(chunks * _EXACT["SPLIT"], _MOST_PROGRAMS)
    sizes = {"rows": rows, "columns": columns, "blocks": blocks, "chunks": chunks}
    return Launch(_KERNELS, "exact", programs, sizes, {**flags, **_EXACT, "BLOCK": block}, 4)


def plan_again(
    out: Tensor, counted: Tensor, bias: Tensor | None, **operands: Tensor
) -> tuple[Launches, tuple[Tensor, ...]]:
    """The launch that makes what `torch._scaled_mm` wrote exact where an operand of `mm_rowwise` has flags."""
    blocks, rows = operands["a_exponents"].shape
    launch = plan_exact(rows, out.shape[1], blocks, operands["a"].shape[1] // blocks)
    pointers = {f"{name}_ptr": tensor for name, tensor in operands.items()}
    return [(launch, {**pointers, "bias_ptr": bias, "out_ptr": out, "counts_ptr": counted})], ()


def bind_mm_rowwise(arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The op `mm_rowwise` for calls like this one."""
    operands = {name: value for name, value in arguments.items() if name not in ("dtype", "bias")}
    device, shape = operands["a"].device, (operands["a"].shape[0], operands["b"].shape[0])
    like = torch.empty(shape, dtype=arguments["dtype"], device="meta")
    again = Replay(plan_again, {**operands, "bias": arguments["bias"], "out": like, "counted": counts(device)})

    def mm_rowwise(
        a: Tensor,
        a_scale: Tensor,
        a_exponents: Tensor,
        a_flags: Tensor,
        b: Tensor,
        b_scale: Tensor,
        b_exponents: Tensor,
        b_flags: Tensor,
        dtype: torch.dtype,
        bias: Tensor | None,
    ) -> Tensor:
        scales = {"scale_a": a_scale.unsqueeze(1), "scale_b": b_scale.unsqueeze(0)}
        # Fast accumulation keeps so few bits that it loses 12% of a sum of 14336 positive products.
        out: Tensor = torch._scaled_mm(a, b.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=False)
        again(a, a_scale, a_exponents, a_flags, b, b_scale, b_exponents, b_flags, bias, out, counts(device))
        return out

    return mm_rowwise


def notes() -> list[str]:
    """What a report says of the GEMMs that ran so far; waits for the device."""
    taken, total = (sum(int(each[i]) for each in COUNTS.values()) for i in (0, 1))
    return [f"exact path taken by {taken} of {total} row-wise scaled FP8 GEMMs so far"] if total else []
