"""What the codec kernels cost, next to a copy, to plain-torch HiFloat4 and to torchao.

N(0, 1) data in bf16. Kernels are timed in CUDA graphs, so that what a launch costs the host plays no part; that is
measured apart, on a small matrix. GB/s counts bytes read and written, far more than the L2 cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu_codec import PEERS
from benchmarks.gpu.options import Options
from benchmarks.gpu.sheet import Bar, Row, Sheet, absent, middle
from benchmarks.gpu.timing import compare, host_microseconds
from fp4compile.backends.triton.codec import arithmetic_bounds
from fp4compile.dispatch import install_kernels
from fp4compile.formats import FORMATS
from fp4compile.recipe import RECIPES, Operand

SIZE = 8192
SMALL = 128  # edge of the matrix on which the host's part is measured
CALLS = 8  # in one graph
AXES = {1: "rows", 0: "columns"}
COPY = "device-to-device copy"
NAMES = ("hif4", "mxfp4", "nvfp4")
# The least share of the copy's GB/s: rounding to nearest alone, and everything that does more in one pass.
NEAREST = Bar("≥", 0.92)
BUSY = Bar("≥", 0.85)


@dataclass(frozen=True)
class Case:
    """One thing to time, and the bytes it has to move."""

    name: str
    run: Callable[[], object]
    bytes: float
    bar: Bar | None = None
    is_peer: bool = False


def _tensor_scale(x: Tensor, format: str) -> Tensor | None:
    return torch.ops.fp4compile.tensor_scale(x, format) if FORMATS[format].has_tensor_scale else None


def specs(format: str) -> dict[str, tuple[Operand, Bar | None]]:
    """What an operand of the format may ask for, with its bar; the Hadamard size is that of the training recipe."""
    plain = Operand(format)
    free = replace(plain, scale_rule="truncation-free")
    stochastic = replace(free, rounding="stochastic")
    size = max(spec.hadamard for spec in RECIPES.get(format).operands)
    asked: dict[str, tuple[Operand, Bar | None]] = {
        "": (plain, NEAREST),
        ", truncation-free": (free, None),
        ", stochastic": (stochastic, BUSY),
        f", Hadamard {size}": (replace(plain, hadamard=size), BUSY),
        f", Hadamard {size}, stochastic": (replace(stochastic, hadamard=size), BUSY),
    }
    return {**asked, ", squares": (replace(plain, block_2d=True), None)} if FORMATS[format].block_2d else asked


def _options(spec: Operand) -> dict[str, Any]:
    """Of one operand, as arguments of `fake_quantize`."""
    return {name: getattr(spec, name) for name in ("rounding", "scale_rule", "block_2d", "hadamard")}


def fake_quantize_cases(x: Tensor, format: str, axis: int) -> Iterator[Case]:
    """`fake_quantize` in every way that a recipe may ask for."""
    scale, seed = _tensor_scale(x, format), torch.tensor(1234, device=x.device)
    for label, (spec, bar) in specs(format).items():
        call = partial(
            torch.ops.fp4compile.fake_quantize, x, format, axis, tensor_scale=scale, seed=seed, **_options(spec)
        )
        yield Case(f"{format} {AXES[axis]}{label}", call, 2 * x.nbytes, bar)


def _gradients(format: str) -> tuple[Operand, Operand]:
    """What the training recipe asks of a gradient [M, N]: along axis 0 for wgrad, along axis 1 for dgrad."""
    rules = {rule.role: rule for rule in RECIPES.get(format).rules}
    first, second = rules["wgrad"].grad, rules["dgrad"].grad
    assert first and second
    return first, second


def both_axes_cases(x: Tensor, format: str) -> Iterator[Case]:
    """Two results of one x: by one read where a kernel does that, else by a launch for each."""
    ops, scale, seed = torch.ops.fp4compile, _tensor_scale(x, format), torch.tensor(1234, device=x.device)
    plain, names = Operand(format), ("rounding", "hadamard", "block_2d")
    for label, pair in {"": (plain, plain), f", gradient of {format}": _gradients(format)}.items():
        given = {"x": x, "format": format, "seed": seed}
        options = {name: [getattr(spec, name) for spec in pair] for name in names}
        scales = {f"tensor_scale_{axis}": scale for axis in (0, 1)}
        rule = pair[0].scale_rule
        call = partial(ops.fake_quantize_both, **given, **options, **scales, scale_rule=rule, stream=[0, 1])
        if arithmetic_bounds(**{name: options[name] for name in ("rounding", "hadamard")}):
            singles = [
                partial(ops.fake_quantize, axis=axis, tensor_scale=scale, **given, **_options(spec))
                for axis, spec in enumerate(pair)
            ]
            label, call = f"{label}, two launches", partial(_in_turn, singles)
        yield Case(f"{format} both axes{label}", call, 3 * x.nbytes, BUSY)


def _in_turn(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def packing_cases(x: Tensor, format: str, axis: int) -> Iterator[Case]:
    """`quantize` and `dequantize`."""
    ops, scale, size = torch.ops.fp4compile, _tensor_scale(x, format), x.shape[axis]
    codes, scales = ops.quantize(x, format, axis, tensor_scale=scale)
    moved = x.nbytes + codes.nbytes + scales.nbytes

    def pack() -> object:
        return ops.quantize(x, format, axis, tensor_scale=scale)

    def unpack() -> object:
        return ops.dequantize(codes, scales, scale, format, axis, size, False, x.dtype)

    name = f"{format} {AXES[axis]}"
    yield Case(f"{name}, quantize", pack, moved)
    yield Case(f"{name}, dequantize", unpack, moved)


def our_cases(x: Tensor) -> Iterator[Case]:
    """Every op of the codec."""
    for format in NAMES:
        for axis in AXES:
            yield from fake_quantize_cases(x, format, axis)
            yield from packing_cases(x, format, axis)
        yield from both_axes_cases(x, format)
        if FORMATS[format].has_tensor_scale:
            yield Case(f"{format} tensor scale", partial(_tensor_scale, x, format), x.nbytes)


def peer_cases(x: Tensor) -> Iterator[Case]:
    """Plain-torch HiFloat4 and torchao, compiled."""
    for name, run in PEERS.values():
        if not (name.startswith("torchao") and absent("torchao")):
            yield Case(f"{name}, torch.compile", partial(torch.compile(run), x), 2 * x.nbytes, is_peer=True)


def copy_case(x: Tensor) -> Case:
    """The device-to-device copy that every share refers to."""
    target = torch.empty_like(x)
    return Case(COPY, lambda: target.copy_(x), 2 * x.nbytes)


def all_cases(x: Tensor) -> list[Case]:
    """The copy, ours, the peers."""
    return [copy_case(x), *our_cases(x), *peer_cases(x)]


def row(case: Case, times: list[float], copy: float, host: float) -> Row:
    """Speeds, and the share of the copy's."""
    ms, spread = middle(times)
    gbps = case.bytes / ms / 1e6
    return Row(case.name, ms, "ms", spread, gbps / copy, case.bar, {"GB/s": gbps, "host µs": host})


def run(options: Options) -> Sheet:
    """Measure the section."""
    install_kernels()
    x = torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device=options.device)
    sheet = Sheet("codec", f"codec kernels on {SIZE} × {SIZE} bf16", "GB/s over the copy's")
    cases = all_cases(x)
    times, errors = compare({case.name: [case.run] for case in cases}, CALLS, options.rounds, options.seconds)
    small = {case.name: case.run for case in all_cases(x[:SMALL, :SMALL].contiguous()) if case.name in times}
    copy = cases[0].bytes / middle(times[COPY])[0] / 1e6
    for case in cases:
        if case.name in times:
            sheet.rows.append(row(case, times[case.name], copy, host_microseconds(small[case.name])))
        else:
            sheet.rows.append(Row(case.name, bar=case.bar, error=errors[case.name], is_peer=case.is_peer))
    sheet.notes += [note for note in [absent("torchao")] if note]
    return sheet
