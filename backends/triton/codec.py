"""The codec ops on CUDA, from an op's arguments to launches: geometry, tile, constants of a format.

    fake_quantize(x [2, 512, 4096], "hif4", axis=1)
        -> Launch("codec_kernels", "fake_quantize", 1024 programs, {lanes: 4096, size: 512, …}, columns, tiles [64, 64])

A call with a shape that was seen before finds its launch in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fp4compile.backend import No
from fp4compile.backends import checks
from fp4compile.backends.triton import produce
from fp4compile.backends.triton.launch import Launch, ceil_div, power_of_two, round_up, signed
from fp4compile.backends.triton.replay import Launches, Replay, contiguous
from fp4compile.codec import E4M3_MAX, SCALINGS, TENSOR_SCALE_MIN, e6m2_max, e8m0_up_from
from fp4compile.formats import E2M1, FORMATS, Element, Format
from fp4compile.hadamard import SIGN_STREAM
from fp4compile.producer import MOST_OPERANDS, MOST_RESULTS, parse, produced_dtype

HADAMARD_SIZES = (0, 16, 32, 64, 128)
DTYPES = checks.DTYPES
_POINTERS = tuple(f"p{i}" for i in range(1, MOST_OPERANDS))
_RESULTS = range(MOST_RESULTS)
_KERNELS = "codec_kernels"
_FLAT = 8192  # elements per program where blocks play no part


@dataclass(frozen=True)
class Tile:
    """How much a program takes: elements in all and per warp, the least length along the lanes (where they are not
    cut into runs), `low`, how many consecutive elements of a column one thread holds, and `vector`, of how many columns
    side by side."""

    elements: int
    per_warp: int
    least: int
    low: int = 1
    vector: int = 1


# Chosen by measurement on H100; benchmarks/NOTES.md holds the figures.
# Rows by the scaling of the format's first level.
ROWS = {
    "e6m2": Tile(elements=2048, per_warp=512, least=64),
    "e8m0": Tile(elements=2048, per_warp=512, least=64),
    "e4m3": Tile(elements=2048, per_warp=1024, least=64),
}
# Eight elements of a column in a thread save three exchanges of each maximum and butterfly.
COLUMNS = Tile(elements=4096, per_warp=2048, least=64, low=8, vector=8)
# A longer transform of columns must lie within one warp: between two it would go through shared memory.
LONG_COLUMNS = Tile(elements=2048, per_warp=2048, least=64, low=8, vector=8)
# Of both axes: half as much in a thread. With a transform it would go through shared memory.
BOTH = Tile(elements=4096, per_warp=1024, least=64, low=8, vector=4)
# Of several tensors, whose producer holds all of them in registers, a thread takes fewer elements.
EACH_COLUMNS = Tile(elements=2048, per_warp=512, least=64, low=8, vector=2)
_LONG = 64
# The least edge of a tile that is quantised along both axes. Its threads hold as much as those of COLUMNS.
_EDGE = 64


# --- constants of a format -------------------------------------------------------------------------------------------


def _element(element: Element) -> dict[str, Any] | No:
    """The rounding that the kernels have for the element: E2M1 ties to even, evenly spaced ties away."""
    step = element.magnitudes[1]
    if (element.magnitudes, element.tie) == (E2M1.magnitudes, "even"):
        return {"ELEMENT": "e2m1", "STEP": 1.0}
    even_steps = element.magnitudes == tuple(step * i for i in range(8))
    if even_steps and math.frexp(step)[0] == 0.5 and element.tie == "away":
        return {"ELEMENT": "even", "STEP": step}
    return No(f"the Triton kernels round E2M1 (ties to even) and evenly spaced elements, not {element.name}")


def constants_of(fmt: Format) -> dict[str, Any] | No:
    """The constants that the format's row decides, or why no kernel reads the row."""
    element = _element(fmt.element)
    if isinstance(element, No):
        return element
    blocks = tuple(level.block for level in fmt.levels if level.block is not None)
    first, block = fmt.levels[0].dtype, fmt.block
    if (first == "e6m2") != (len(blocks) > 1) or (first == "e6m2" and (blocks, fmt.block_2d) != ((64, 8, 4), None)):
        return No(f"the Triton kernels know one block scale, or E6M2 over 64, 8 and 4, not {blocks}")
    if block & (block - 1) or not 8 <= block <= 1024 or fmt.block_2d not in (None, block):
        return No(f"the Triton kernels need blocks of a power of two from 8 to 1024, 2-D blocks as long: {block}")
    return {"SCALING": first, "BLOCK": block, **element}


@cache
def known(format: str) -> dict[str, Any] | No:
    """`constants_of` by name."""
    return constants_of(FORMATS[format])


def _format_constants(format: str) -> dict[str, Any]:
    constants = known(format)
    assert not isinstance(constants, No)
    return constants


@cache
def encoder(
    format: str, scale_rule: str | None, rounding: str, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, constants) of a kernel that encodes; `dtype` is what the decoded values must fit."""
    fmt = FORMATS[format]
    rule, top, largest = fmt.rule(scale_rule), fmt.element.max, torch.finfo(dtype).max
    arguments = {
        "up_from": e8m0_up_from(fmt.element, rule) if fmt.levels[0].dtype == "e8m0" else 0,
        "k_max": min(math.floor(math.log2(largest / top)), 127),
        "s_max": e6m2_max(largest),
    }
    constants = {
        **_format_constants(format),
        "TOP": top,
        "EMAX": math.floor(math.log2(top)),
        "TRUNCATION_FREE": rule == "truncation-free",
        "STOCHASTIC": rounding == "stochastic",
    }
    return arguments, constants


def transform(hadamard: int) -> dict[str, Any]:
    """The constants of the Hadamard transform in front."""
    factor = 1.0 / math.sqrt(hadamard) if hadamard else 1.0
    return {"HADAMARD": hadamard, "LOG2": hadamard.bit_length() - 1, "FACTOR": factor}


# --- geometry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A tensor as [batch, lanes, size], or [batch, size, lanes] in columns, the transform's padding in `padded`."""

    batch: int
    lanes: int
    size: int
    padded: int
    columns: bool


def padded_size(size: int, pad: int) -> int:
    """What a Hadamard transform of size `pad`, or none, makes of a size."""
    return round_up(size, pad) if pad else size


def _transformed(shape: Sequence[int], axis: int, pad: int) -> list[int]:
    """The shape that a Hadamard transform along `axis` leaves."""
    return [*shape[:axis], padded_size(shape[axis], pad), *shape[axis + 1 :]]


def geometry(shape: Sequence[int], axis: int, run: int, pad: int, block_2d: bool) -> Geometry:
    """See a contiguous tensor as lanes along `axis`.

    Args:
        run: elements that belong together; lanes of whole runs are cut into them.
        pad: the Hadamard size, or 0.
    """
    size, inner = shape[axis], math.prod(shape[axis + 1 :])
    padded = padded_size(size, pad)
    if inner > 1 or (block_2d and axis == len(shape) - 2):
        return Geometry(math.prod(shape[:axis]), inner, size, padded, True)
    if block_2d:
        return Geometry(math.prod(shape[: axis - 1]), shape[axis - 1], size, padded, False)
    lanes = math.prod(shape[:axis])
    if size % run == 0:
        return Geometry(1, lanes * (size // run), run, run, False)
    return Geometry(1, lanes, size, padded, False)


def _columns(hadamard: int) -> Tile:
    return LONG_COLUMNS if hadamard >= _LONG else COLUMNS


def _tile(g: Geometry, scaling: str, run: int, edge: int, columns: Tile) -> tuple[int, dict[str, Any], int]:
    """(programs, constants, warps) of a launch over `g` in tiles of whole runs; `columns` is what it takes of those."""
    tile = columns if g.columns else ROWS[scaling]
    k = run if not g.columns and g.padded == run else max(run, tile.least)
    wanted = max(tile.elements // k, 1)
    lanes = max(min(wanted, power_of_two(g.lanes)), edge or 1, 8)
    grid = g.batch * ceil_div(g.lanes, lanes) * ceil_div(g.padded, k)
    constants = {
        "L": lanes,
        "K": k,
        "LOW": min(tile.low, k),
        "VECTOR": tile.vector,
        "COLUMNS": g.columns,
        "EVEN": g.lanes % lanes == 0 and g.size % k == 0,
        "WIDE": g.batch * (g.lanes + lanes) * (g.padded + k) >= 2**31,
        "BATCHED": g.batch > 1,
    }
    return grid, constants, max(min(lanes * k // tile.per_warp, 8), 1)


def _words(codes: Tensor) -> Tensor:
    """Packed codes as 32-bit words of eight."""
    return codes.view(torch.int32) if codes.numel() else codes


# --- the ops ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _quantizing(
    kernel: str,
    shape: torch.Size,
    dtype: torch.dtype,
    format: str,
    axis: int,
    rounding: str,
    scale_rule: str | None,
    block_2d: bool,
    hadamard: int,
    own: tuple[tuple[str, Any], ...],
) -> Launch:
    """What calls of `fake_quantize` or `quantize` with one shape share.

    Args:
        dtype: what the decoded values must fit.
        own: constants of that kernel alone.
    """
    arguments, constants = encoder(format, scale_rule, rounding, dtype)
    block = constants["BLOCK"]
    edge, run_length = block if block_2d else 0, max(block, hadamard)
    g = geometry(shape, axis, run_length, hadamard, block_2d)
    grid, tile, warps = _tile(g, constants["SCALING"], run_length, edge, _columns(hadamard))
    sizes = {"lanes": g.lanes, "size": g.size, "padded": g.padded}
    aligned = (g.lanes if g.columns else g.padded) % 4 == 0
    all_constants = {**constants, **transform(hadamard), **tile, "EDGE": edge, "ALIGNED": aligned, **dict(own)}
    return Launch(_KERNELS, kernel, grid, {**arguments, **sizes, "sign_stream": SIGN_STREAM}, all_constants, warps)


def _producing(shape: Sequence[int], producer: str) -> dict[str, Any]:
    """The constants of a producer; rows are found by a division, which is cheap by a constant."""
    return {"PRODUCE": produce.function(producer), "WIDTH": shape[-1] if producer else 0}


def pointers(operands: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The operands of a producer beside x, None for those that it lacks."""
    return {name: operands.get(name) for name in _POINTERS}


def _inputs(
    x: Tensor, tensor_scale: Tensor | None, seed: Tensor | None, stream: int, sign_seed: Tensor | None
) -> dict[str, Any]:
    return {
        "x_ptr": x,
        "ts_ptr": tensor_scale,
        "seed_ptr": seed,
        "counter_stream": signed(stream),
        "sign_seed_ptr": sign_seed,
    }


def plan_fake_quantize(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str,
    scale_rule: str | None,
    block_2d: bool,
    tensor_scale: Tensor | None,
    seed: Tensor | None,
    stream: int,
    hadamard: int,
    sign_seed: Tensor | None,
    fold: bool,
    producer: str = "",
    **operands: Tensor | None,
) -> tuple[Launches, Tensor]:
    """The launch of the op `fake_quantize` on contiguous tensors with its arguments, and its result."""
    axis %= x.dim()
    own = (("FOLD", fold and tensor_scale is not None), *_producing(x.shape, producer).items())
    dtype = produced_dtype(x, producer)
    launch = _quantizing("fake_quantize", x.shape, dtype, format, axis, rounding, scale_rule, block_2d, hadamard, own)
    y = x.new_empty(_transformed(x.shape, axis, hadamard), dtype=dtype)
    given = {**_inputs(x, tensor_scale, seed, stream, sign_seed), **pointers(operands), "y_ptr": y}
    return [(launch, given)], y


def plan_quantize(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str,
    scale_rule: str | None,
    block_2d: bool,
    tensor_scale: Tensor | None,
    seed: Tensor | None,
    stream: int,
    hadamard: int,
    sign_seed: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Launches, tuple[Tensor, Tensor]]:
    """The launch of the op `quantize` on contiguous tensors with its arguments, and its results."""
    axis, fmt = axis % x.dim(), FORMATS[format]
    own = (("NAN", SCALINGS[fmt.levels[0].dtype].nan),)
    launch = _quantizing(
        "quantize", x.shape, dtype or x.dtype, format, axis, rounding, scale_rule, block_2d, hadamard, own
    )
    shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
    blocks = ceil_div(padded_size(x.shape[axis], hadamard), fmt.block)
    codes = x.new_empty([*shape, blocks * fmt.block // 2], dtype=torch.uint8)
    if block_2d:
        shape[-1] = ceil_div(shape[-1], fmt.block)
    scales = x.new_empty([*shape, blocks], dtype=fmt.scale_dtype)
    results = {"codes_ptr": _words(codes), "scales_ptr": scales}
    return [(launch, {**_inputs(x, tensor_scale, seed, stream, sign_seed), **results})], (codes, scales)


@lru_cache(maxsize=4096)
def _decoding(shape: torch.Size, format: str, axis: int, size: int, block_2d: bool) -> Launch:
    """What calls of `dequantize` share; `shape` is that of the codes."""
    constants = _format_constants(format)
    block = constants["BLOCK"]
    edge = block if block_2d else 0
    # Codes may hold more blocks than `size` needs: only then lanes keep their length.
    whole = shape[-1] * 2 == size
    g = geometry(_decoded(shape, axis, size), axis, block if whole else 2 * shape[-1] + 1, 0, block_2d)
    grid, tile, warps = _tile(g, constants["SCALING"], block, edge, COLUMNS)
    blocks = 1 if not g.columns and g.size == block and whole and not block_2d else shape[-1] * 2 // block
    arguments = {"lanes": g.lanes, "size": g.size, "blocks": blocks}
    return Launch(_KERNELS, "dequantize", grid, arguments, {**constants, **tile, "EDGE": edge}, warps)


def _decoded(shape: Sequence[int], axis: int, size: int) -> list[int]:
    """The shape of the values of codes, whose blocked axis is the last one."""
    decoded = list(shape[:-1])
    decoded.insert(axis, size)
    return decoded


def plan_dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> tuple[Launches, Tensor]:
    """The launch of the op `dequantize` on contiguous tensors with its arguments, and its result."""
    axis %= codes.dim()
    y = codes.new_empty(_decoded(codes.shape, axis, size), dtype=dtype)
    launch = _decoding(codes.shape, format, axis, size, block_2d)
    given = {"codes_ptr": _words(codes), "scales_ptr": scales, "y_ptr": y, "ts_ptr": tensor_scale}
    return [(launch, given)], y


@lru_cache(maxsize=4096)
def _scaling(
    shape: torch.Size, format: str, axis: int, hadamard: int, producer: str, both: bool
) -> tuple[Launch, Launch]:
    """What calls of `tensor_scale`, or of `tensor_scale_both`, share: the maxima of all tiles, then of those."""
    fmt = FORMATS[format]
    if hadamard or producer:
        length = hadamard or _EDGE  # rows are cut into runs: where a run lies is known per run, not per element
        g = geometry(shape, axis if hadamard else len(shape) - 1, length, hadamard, False)
        grid, tile, warps = _tile(g, fmt.levels[0].dtype, length, 0, _columns(hadamard))
    else:
        n = math.prod(shape)
        g = Geometry(1, 1, n, n, False)
        grid, warps = ceil_div(n, _FLAT), 8
        tile = {"L": 1, "K": _FLAT, "LOW": 1, "VECTOR": 1, "COLUMNS": False}
        tile |= {"EVEN": n % _FLAT == 0, "WIDE": n + _FLAT >= 2**31, "BATCHED": False}
    arguments = {"lanes": g.lanes, "size": g.size, "padded": g.padded, "sign_stream": SIGN_STREAM}
    constants = {**transform(hadamard), **tile, **_producing(shape, producer), "BOTH": both}
    return Launch(_KERNELS, "amax", grid, arguments, constants, warps), _from_maxima(format, grid, 1 + both)


def _from_maxima(format: str, tiles: int, scales: int) -> Launch:
    """The last step from the maxima of so many tiles to each of some tensor scales."""
    constants = {"TOP": E4M3_MAX * FORMATS[format].element.max, "LEAST": TENSOR_SCALE_MIN, "CHUNK": 4096}
    return Launch(_KERNELS, "tensor_scale", scales, {"count": tiles}, constants, 8)


def plan_tensor_scale(
    x: Tensor,
    format: str,
    axis: int,
    hadamard: int,
    sign_seed: Tensor | None,
    producer: str = "",
    scale_rule: str | None = None,
    **operands: Tensor | None,
) -> tuple[Launches, Tensor]:
    """The two launches of the op `tensor_scale` on contiguous tensors with their arguments, and its result.

    It is the same under every scale rule that the kernels have.
    """
    planned = _scaling(x.shape, format, axis % x.dim(), hadamard, producer, False)
    launches, (y,) = _plan_scales(x, planned, {**pointers(operands), "sign_seed_ptr": sign_seed})
    return launches, y


def plan_tensor_scale_both(
    x: Tensor,
    format: str,
    axis: int,
    hadamard: int,
    sign_seed: Tensor | None,
    producer: str = "",
    scale_rule: str | None = None,
    **operands: Tensor | None,
) -> tuple[Launches, tuple[Tensor, ...]]:
    """The two launches of the op `tensor_scale_both` on contiguous tensors with their arguments, and its results."""
    planned = _scaling(x.shape, format, axis % x.dim(), hadamard, producer, True)
    return _plan_scales(x, planned, {**pointers(operands), "sign_seed_ptr": sign_seed})


def _plan_scales(
    x: Tensor, launches: tuple[Launch, Launch], others: Mapping[str, Tensor | None]
) -> tuple[Launches, tuple[Tensor, ...]]:
    """Launches with their arguments, the first reading others beside x; as many results as the last has programs."""
    amax, last = launches
    results = tuple(x.new_empty((), dtype=torch.float32) for _ in range(last.grid))
    partial = x.new_empty((last.grid * amax.grid,), dtype=torch.int32)
    given = {"x_ptr": x, "partial_ptr": partial, **others}
    written = {f"y_{i}_ptr": results[i] if i < len(results) else None for i in _RESULTS}
    return [(amax, given), (last, {"partial_ptr": partial, **written})], results


@lru_cache(maxsize=4096)
def _quantizing_both(
    shape: torch.Size,
    dtype: torch.dtype,
    format: str,
    scale_rule: str | None,
    hadamard: tuple[int, ...],
    block_2d: tuple[bool, ...],
    fold: bool,
    producer: str,
) -> Launch | None:
    """What calls of `fake_quantize_both` share; None where the matrix is not made of whole tiles."""
    arguments, constants = map(dict, encoder(format, scale_rule, "nearest", dtype))
    block = constants["BLOCK"]
    edge = max(_EDGE, block)
    rows, columns = shape
    if rows % edge or columns % edge:
        return None
    del constants["STOCHASTIC"]
    for axis in (0, 1):
        own = {**transform(hadamard[axis]), "EDGE": block if block_2d[axis] else 0}
        constants |= {f"{name}_{axis}": value for name, value in own.items()}
    constants |= {"ROWS": edge, "COLUMNS": edge, "FOLD": fold, "WIDE": rows * columns >= 2**31}
    tile = COLUMNS if any(hadamard) else BOTH
    constants |= {"LOW": tile.low, "VECTOR": tile.vector}
    constants["PRODUCE"] = produce.function(producer)
    arguments |= {"rows": rows, "columns": columns, "sign_stream": SIGN_STREAM}
    grid = rows // edge * (columns // edge)
    return Launch(_KERNELS, "fake_quantize_both", grid, arguments, constants, min(edge * edge // tile.per_warp, 8))


def arithmetic_bounds(rounding: Sequence[str], hadamard: Sequence[int]) -> bool:
    """Whether quantisation along both axes takes longer than its memory: reading x once would gain nothing then, and
    the larger program is slower than two."""
    return "stochastic" in rounding or max(hadamard) >= _LONG


def plan_fake_quantize_both(
    x: Tensor,
    format: str,
    scale_rule: str | None,
    rounding: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    block_2d: Sequence[bool],
    tensor_scale_0: Tensor | None,
    tensor_scale_1: Tensor | None,
    seed: Tensor | None,
    sign_seed: Tensor | None,
    fold: bool,
    producer: str = "",
    **operands: Tensor | None,
) -> tuple[Launches, tuple[Tensor, Tensor]]:
    """The launches of the op `fake_quantize_both` on contiguous tensors with their arguments, and its results.

    One launch; two for ragged matrices, a tensor scale along one axis only, and where arithmetic bounds them.
    """
    scales, dtype = (tensor_scale_0, tensor_scale_1), produced_dtype(x, producer)
    launch = None
    if (tensor_scale_0 is None) == (tensor_scale_1 is None) and not arithmetic_bounds(rounding, hadamard):
        folded, sizes, squares = fold and tensor_scale_0 is not None, tuple(hadamard), tuple(block_2d)
        launch = _quantizing_both(x.shape, dtype, format, scale_rule, sizes, squares, folded, producer)
    if launch is None:
        planned = [
            plan_fake_quantize(
                x,
                format=format,
                axis=axis,
                rounding=rounding[axis],
                scale_rule=scale_rule,
                block_2d=block_2d[axis],
                tensor_scale=scales[axis],
                seed=seed,
                stream=stream[axis],
                hadamard=hadamard[axis],
                sign_seed=sign_seed,
                fold=fold,
                producer=producer,
                **operands,
            )
            for axis in (0, 1)
        ]
        return [each for launches, _ in planned for each in launches], (planned[0][1], planned[1][1])
    results = torch.empty_like(x, dtype=dtype), torch.empty_like(x, dtype=dtype)
    given = {
        "x_ptr": x,
        "y_0_ptr": results[0],
        "y_1_ptr": results[1],
        "ts_0_ptr": tensor_scale_0,
        "ts_1_ptr": tensor_scale_1,
        "sign_seed_ptr": sign_seed,
        **pointers(operands),
    }
    return [(launch, given)], results


# --- several tensors of one producer ---------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _quantizing_each(
    shape: torch.Size, format: str, axis: int, scale_rule: str | None, fold: bool, producer: str
) -> Launch:
    """What calls of `fake_quantize_each` share."""
    arguments, constants = map(dict, encoder(format, scale_rule, "nearest", parse(producer).dtype))
    del constants["STOCHASTIC"]
    g = geometry(shape, axis, constants["BLOCK"], 0, False)
    grid, tile, warps = _tile(g, constants["SCALING"], constants["BLOCK"], 0, EACH_COLUMNS)
    arguments |= {"lanes": g.lanes, "size": g.size}
    constants |= {**tile, **_producing(shape, producer), "FOLD": fold}
    return Launch(_KERNELS, "fake_quantize_each", grid, arguments, constants, warps)


def plan_fake_quantize_each(
    x: Tensor,
    format: str,
    axis: int,
    scale_rule: str | None,
    tensor_scale_0: Tensor | None,
    tensor_scale_1: Tensor | None,
    tensor_scale_2: Tensor | None,
    fold: bool,
    producer: str,
    **operands: Tensor | None,
) -> tuple[Launches, tuple[Tensor, ...]]:
    """The launch of the op `fake_quantize_each` on contiguous tensors with its arguments, and its results."""
    scales, made = (tensor_scale_0, tensor_scale_1, tensor_scale_2), parse(producer)
    folded = fold and tensor_scale_0 is not None
    launch = _quantizing_each(x.shape, format, axis % x.dim(), scale_rule, folded, producer)
    results = tuple(x.new_empty(x.shape, dtype=made.dtype) for _ in made.results)
    given = {
        "x_ptr": x,
        **pointers(operands),
        **{f"y_{i}_ptr": results[i] if i < len(results) else None for i in _RESULTS},
        **{f"ts_{i}_ptr": scale for i, scale in enumerate(scales)},
    }
    return [(launch, given)], results


@lru_cache(maxsize=4096)
def _scaling_each(shape: torch.Size, format: str, producer: str) -> tuple[Launch, Launch]:
    """What calls of `tensor_scale_each` share: the maxima of all tiles, then of those."""
    g = geometry(shape, len(shape) - 1, _EDGE, 0, False)
    grid, tile, warps = _tile(g, FORMATS[format].levels[0].dtype, _EDGE, 0, EACH_COLUMNS)
    arguments, constants = {"lanes": g.lanes, "size": g.size}, {**tile, **_producing(shape, producer)}
    amax = Launch(_KERNELS, "amax_each", grid, arguments, constants, warps)
    return amax, _from_maxima(format, grid, len(parse(producer).results))


def plan_tensor_scale_each(
    x: Tensor, format: str, producer: str, scale_rule: str | None, **operands: Tensor | None
) -> tuple[Launches, tuple[Tensor, ...]]:
    """The two launches of the op `tensor_scale_each` on contiguous tensors with their arguments, and its results.

    They are the same under every scale rule that the kernels have.
    """
    return _plan_scales(x, _scaling_each(x.shape, format, producer), pointers(operands))


def _dense(x: Tensor) -> Tensor:
    """x in the order of its memory where it fills that without gaps, else a copy: order plays no part in a maximum."""
    if x.is_contiguous():
        return x
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return contiguous(x.permute(order))


def _one(x: Tensor, *_: Any) -> Tensor:
    """The scale of a tensor without elements."""
    return torch.ones((), dtype=torch.float32, device=x.device)


def bind_tensor_scale(arguments: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The op `tensor_scale` for calls like this one."""
    if not arguments["x"].numel():
        return _one
    in_order = arguments["hadamard"] or arguments["producer"]
    return Replay(plan_tensor_scale, arguments, contiguous if in_order else _dense)


def bind_tensor_scale_both(arguments: Mapping[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op `tensor_scale_both` for calls like this one."""
    if not arguments["x"].numel():
        return lambda x, *_: (_one(x), _one(x))
    return Replay(plan_tensor_scale_both, arguments)
