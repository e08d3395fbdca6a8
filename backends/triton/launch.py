"""From an op's arguments to the launch of a kernel: geometry, tile, constants.

    fake_quantize(x [2, 512, 4096], "hif4", axis=1)
        -> Launch("fake_quantize", 1024 programs, {batch: 2, lanes: 4096, size: 512, …}, columns, tiles [64, 64])

A `Launch` is data: it is run on a device, or only compiled where there is none. Triton is imported with the first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fp4compile.backend import No
from fp4compile.backends import checks
from fp4compile.codec import _SCALINGS, _TENSOR_SCALE_MIN, E4M3_MAX, e6m2_max
from fp4compile.formats import E2M1, FORMATS, Element, Format
from fp4compile.hadamard import SIGN_STREAM

HADAMARD_SIZES = (0, 16, 32, 64, 128)
DTYPES = checks.DTYPES
_NEVER = 1 << 23  # a fraction that no mantissa reaches
_FLAT = 8192  # elements per program where blocks play no part


@dataclass(frozen=True)
class Tile:
    """How much a program takes: elements in all and per warp, the least length along the lanes (where they are not
    cut into runs), and `low`, how many consecutive elements of a column one thread holds."""

    elements: int
    per_warp: int
    least: int
    low: int


# By the scaling of the format's first level and whether the blocked axis is strided.
# Chosen by measurement on H100; benchmarks/NOTES.md holds the figures.
TILES = {
    ("e6m2", False): Tile(elements=4096, per_warp=512, least=64, low=1),
    ("e8m0", False): Tile(elements=4096, per_warp=512, least=64, low=1),
    ("e4m3", False): Tile(elements=2048, per_warp=1024, least=64, low=1),
    ("e6m2", True): Tile(elements=4096, per_warp=2048, least=64, low=8),
    ("e8m0", True): Tile(elements=4096, per_warp=2048, least=64, low=8),
    ("e4m3", True): Tile(elements=8192, per_warp=1024, least=64, low=4),
}
# Columns with more arithmetic: a transform in front (eight elements of a column in a thread save three exchanges of
# each butterfly), or random numbers.
_BUSY = Tile(elements=4096, per_warp=2048, least=64, low=8)


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name in `kernels`, the number of programs, its arguments and constants."""

    kernel: str
    grid: int
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4


@cache
def _kernels() -> ModuleType:
    from fp4compile.backends.triton import kernels

    return kernels


def run(launch: Launch, device: torch.device) -> None:
    """Launch on the current stream of the device."""
    kernel = getattr(_kernels(), launch.kernel)[(launch.grid,)]
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    if device.type != "cuda":  # Triton's interpreter
        kernel(**launch.arguments, **launch.constants, **options)
        return
    with torch.cuda.device(device):
        kernel(**launch.arguments, **launch.constants, **options)


# --- constants of a format -------------------------------------------------------------------------------------------


def _element(element: Element) -> dict[str, Any] | No:
    """The rounding that kernels.py has for the element: E2M1 ties to even, evenly spaced ties away."""
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


def _up_from(fmt: Format, rule: str) -> int:
    """The fraction of a block's maximum, as 23 bits, from which an E8M0 exponent moves up."""
    top = fmt.element.max
    emax = math.floor(math.log2(top))

    def fraction(m: float) -> int:
        return int((m / 2.0**emax - 1) * 2**23)

    rules = {
        "floor": _NEVER,
        "ceil": 1,
        "even": fraction((top + 2.0 ** (emax + 1)) / 2),
        "rceil": fraction(top) + 1,
    }
    return rules.get(rule, 0)


@cache
def _rounding(
    format: str, scale_rule: str | None, rounding: str, dtype: torch.dtype
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments, constants) of the encoder; `dtype` is what the decoded values must fit."""
    fmt = FORMATS[format]
    rule, top, largest = fmt.rule(scale_rule), fmt.element.max, torch.finfo(dtype).max
    arguments = {
        "up_from": _up_from(fmt, rule),
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


def _transform(hadamard: int) -> dict[str, Any]:
    """The constants of the Hadamard transform in front."""
    factor = 1.0 / math.sqrt(hadamard) if hadamard else 1.0
    return {"HADAMARD": hadamard, "LOG2": hadamard.bit_length() - 1, "FACTOR": factor}


def _signed(word: int) -> int:
    """A 32-bit word as a signed integer."""
    return (word + 2**31) % 2**32 - 2**31


# --- geometry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A tensor as [batch, lanes, size], or [batch, size, lanes] in columns, the transform's padding in `padded`."""

    batch: int
    lanes: int
    size: int
    padded: int
    columns: bool


def _ceil(size: int, block: int) -> int:
    return -(-size // block)


def _padded(size: int, pad: int) -> int:
    return _ceil(size, pad) * pad if pad else size


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def geometry(shape: Sequence[int], axis: int, run: int, pad: int, block_2d: bool) -> Geometry:
    """See a contiguous tensor as lanes along `axis`.

    Args:
        run: elements that belong together; lanes of whole runs are cut into them.
        pad: the Hadamard size, or 0.
    """
    size, inner = shape[axis], math.prod(shape[axis + 1 :])
    padded = _padded(size, pad)
    if inner > 1 or (block_2d and axis == len(shape) - 2):
        return Geometry(math.prod(shape[:axis]), inner, size, padded, True)
    if block_2d:
        return Geometry(math.prod(shape[: axis - 1]), shape[axis - 1], size, padded, False)
    lanes = math.prod(shape[:axis])
    if size % run == 0:
        return Geometry(1, lanes * (size // run), run, run, False)
    return Geometry(1, lanes, size, padded, False)


def _tile(g: Geometry, scaling: str, run: int, edge: int, busy: bool = False) -> tuple[int, dict[str, Any], int]:
    """(programs, constants, warps) of a launch over `g` in tiles of whole runs."""
    tile = _BUSY if busy and g.columns else TILES[scaling, g.columns]
    k = run if not g.columns and g.padded == run else max(run, tile.least)
    wanted = max(tile.elements // k, 1)
    lanes = max(min(wanted, _power_of_two(g.lanes)), edge or 1, 8)
    grid = g.batch * _ceil(g.lanes, lanes) * _ceil(g.padded, k)
    constants = {
        "L": lanes,
        "K": k,
        "LOW": min(tile.low, k),
        "COLUMNS": g.columns,
        "EVEN": g.lanes % lanes == 0 and g.size % k == 0,
        "WIDE": g.batch * (g.lanes + lanes) * (g.padded + k) >= 2**31,
    }
    return grid, constants, max(min(lanes * k // tile.per_warp, 8), 1)


def _contiguous(x: Tensor) -> Tensor:
    return x.detach().contiguous()


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
    """What `fake_quantize` and `quantize` share and every call repeats: the launch without tensors and seeds.

    Args:
        dtype: what the decoded values must fit.
        own: constants of that kernel alone.
    """
    arguments, constants = _rounding(format, scale_rule, rounding, dtype)
    block = constants["BLOCK"]
    edge, run_length = block if block_2d else 0, max(block, hadamard)
    g = geometry(shape, axis, run_length, hadamard, block_2d)
    grid, tile, warps = _tile(g, constants["SCALING"], run_length, edge, hadamard > 0 or rounding == "stochastic")
    sizes = {"lanes": g.lanes, "size": g.size, "padded": g.padded}
    aligned = (g.lanes if g.columns else g.padded) % 4 == 0
    all_constants = {**constants, **_transform(hadamard), **tile, "EDGE": edge, "ALIGNED": aligned, **dict(own)}
    return Launch(kernel, grid, {**arguments, **sizes, "sign_stream": SIGN_STREAM}, all_constants, warps)


def _with(launch: Launch, arguments: Mapping[str, Any]) -> Launch:
    return Launch(launch.kernel, launch.grid, {**launch.arguments, **arguments}, launch.constants, launch.num_warps)


def _inputs(
    x: Tensor, tensor_scale: Tensor | None, seed: Tensor | None, stream: int, sign_seed: Tensor | None
) -> dict[str, Any]:
    return {
        "x_ptr": x,
        "ts_ptr": tensor_scale,
        "seed_ptr": seed,
        "counter_stream": _signed(stream),
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
) -> tuple[Launch, Tensor]:
    """The launch of the op `fake_quantize` on a contiguous x, and its result."""
    axis %= x.dim()
    own = (("FOLD", fold and tensor_scale is not None),)
    launch = _quantizing("fake_quantize", x.shape, x.dtype, format, axis, rounding, scale_rule, block_2d, hadamard, own)
    y = x.new_empty([*x.shape[:axis], _padded(x.shape[axis], hadamard), *x.shape[axis + 1 :]])
    return _with(launch, {**_inputs(x, tensor_scale, seed, stream, sign_seed), "y_ptr": y}), y


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
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """The launch of the op `quantize` on a contiguous x, and its results."""
    axis, fmt = axis % x.dim(), FORMATS[format]
    own = (("NAN", _SCALINGS[fmt.levels[0].dtype].nan),)
    launch = _quantizing(
        "quantize", x.shape, dtype or x.dtype, format, axis, rounding, scale_rule, block_2d, hadamard, own
    )
    shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
    blocks = _ceil(_padded(x.shape[axis], hadamard), fmt.block)
    codes = x.new_empty([*shape, blocks * fmt.block // 2], dtype=torch.uint8)
    if block_2d:
        shape[-1] = _ceil(shape[-1], fmt.block)
    scales = x.new_empty([*shape, blocks], dtype=fmt.scale_dtype)
    # A lane that was cut into runs has that many blocks.
    of_lane = _ceil(launch.arguments["padded"], fmt.block)
    results = {"codes_ptr": _words(codes), "scales_ptr": scales, "blocks": of_lane}
    return _with(launch, {**_inputs(x, tensor_scale, seed, stream, sign_seed), **results}), (codes, scales)


def plan_dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> tuple[Launch, Tensor]:
    """The launch of the op `dequantize` on contiguous codes and scales, and its result."""
    axis %= codes.dim()
    shape = list(codes.shape[:-1])
    shape.insert(axis, size)
    y = codes.new_empty(shape, dtype=dtype)
    constants = _format_constants(format)
    block = constants["BLOCK"]
    edge = block if block_2d else 0
    # Codes may hold more blocks than `size` needs: only then lanes keep their length.
    whole = codes.shape[-1] * 2 == size
    g = geometry(shape, axis, block if whole else 2 * codes.shape[-1] + 1, 0, block_2d)
    grid, tile, warps = _tile(g, constants["SCALING"], block, edge)
    blocks = 1 if not g.columns and g.size == block and whole and not block_2d else codes.shape[-1] * 2 // block
    arguments = {
        "codes_ptr": _words(codes),
        "scales_ptr": scales,
        "y_ptr": y,
        "ts_ptr": tensor_scale,
        "lanes": g.lanes,
        "size": g.size,
        "blocks": blocks,
    }
    return Launch("dequantize", grid, arguments, {**constants, **tile, "EDGE": edge}, warps), y


def plan_tensor_scale(
    x: Tensor, format: str, axis: int, hadamard: int, sign_seed: Tensor | None
) -> tuple[tuple[Launch, Launch], Tensor]:
    """The two launches of the op `tensor_scale` on a contiguous x: maxima of tiles, then of those; and its result."""
    if hadamard:
        g = geometry(x.shape, axis % x.dim(), hadamard, hadamard, False)
        grid, tile, warps = _tile(g, FORMATS[format].levels[0].dtype, hadamard, 0, busy=True)
    else:
        n = x.numel()
        g = Geometry(1, 1, n, n, False)
        grid, warps = _ceil(n, _FLAT), 8
        wide = n + _FLAT >= 2**31
        tile = {"L": 1, "K": _FLAT, "LOW": 1, "COLUMNS": False, "EVEN": n % _FLAT == 0, "WIDE": wide}
    y = x.new_empty((), dtype=torch.float32)
    partial = x.new_empty((grid,), dtype=torch.int32)
    arguments = {
        "x_ptr": x,
        "partial_ptr": partial,
        "sign_seed_ptr": sign_seed,
        "lanes": g.lanes,
        "size": g.size,
        "padded": g.padded,
        "sign_stream": SIGN_STREAM,
    }
    first = Launch("amax", grid, arguments, {**_transform(hadamard), **tile}, warps)
    constants = {"TOP": E4M3_MAX * FORMATS[format].element.max, "LEAST": _TENSOR_SCALE_MIN, "CHUNK": 4096}
    second = Launch("tensor_scale", 1, {"partial_ptr": partial, "y_ptr": y, "count": grid}, constants, 8)
    return (first, second), y


def fake_quantize(x: Tensor, **arguments: Any) -> Tensor:
    """The op `fake_quantize`."""
    launch, y = plan_fake_quantize(_contiguous(x), **arguments)
    if y.numel():
        run(launch, x.device)
    return y


def quantize(x: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `quantize`."""
    launch, results = plan_quantize(_contiguous(x), **arguments)
    if results[0].numel():
        run(launch, x.device)
    return results


def dequantize(codes: Tensor, scales: Tensor, **arguments: Any) -> Tensor:
    """The op `dequantize`."""
    launch, y = plan_dequantize(_contiguous(codes), _contiguous(scales), **arguments)
    if y.numel():
        run(launch, codes.device)
    return y


def _dense(x: Tensor) -> Tensor:
    """x in the order of its memory where it fills that without gaps, else a copy: order plays no part in a maximum."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return _contiguous(x.permute(order))


def tensor_scale(x: Tensor, hadamard: int, **arguments: Any) -> Tensor:
    """The op `tensor_scale`."""
    if not x.numel():
        return torch.ones((), dtype=torch.float32, device=x.device)
    launches, y = plan_tensor_scale(_contiguous(x) if hadamard else _dense(x), hadamard=hadamard, **arguments)
    for launch in launches:
        run(launch, x.device)
    return y
