"""Sample inputs of each op: argument tuples that every kernel of the op is tested on.

Ragged and whole shapes, either axis, transposed and empty tensors, each dtype, every option, and values that are not
finite. Tensors are on the CPU and the same at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fp4compile import codec, reference, rowwise
from fp4compile.activations import ACTIVATIONS
from fp4compile.formats import FORMATS
from fp4compile.producer import parse


def _tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def _inputs() -> Iterator[tuple[Tensor, int]]:
    """Tensors and axes: ragged, whole, transposed, empty, one token, each dtype, and values that are not finite."""
    yield _tensor(4, 128), -1
    yield _tensor(64, 40, dtype=torch.bfloat16), 0
    yield _tensor(3, 70, dtype=torch.float16), 1
    yield _tensor(2, 5, 33), 1
    yield _tensor(48, 130).t(), -1
    yield _tensor(0, 64), -1
    yield _tensor(0, 64), 0
    yield _tensor(1, 200, dtype=torch.bfloat16), -1
    special = _tensor(4, 96) * 1e4
    special[0, 3], special[1, 40], special[2] = float("nan"), float("-inf"), -0.0
    special[3, :8] = torch.tensor([1e-40, -1e-40, 1e-45, 2e-38, 3e38, -3e38, 0.0, -0.0])
    yield special, -1
    yield special, 0


_SEED = torch.tensor(1234, dtype=torch.int64)


def quantize() -> Iterator[Mapping[str, Any]]:
    """Samples of `quantize`."""
    for name, fmt in FORMATS.items():
        for x, axis in _inputs():
            base = {"x": x, "format": name, "axis": axis}
            yield base
            for rule in fmt.scale_rules:
                yield {**base, "scale_rule": rule}
            stochastic = {"rounding": "stochastic", "seed": _SEED, "stream": 7}
            yield {**base, **stochastic, "scale_rule": "truncation-free"}
            if "eden" in fmt.roundings:
                yield {**base, **stochastic, "rounding": "eden", "scale_rule": "eden", "hadamard": 128}
            yield {**base, "hadamard": 16, "sign_seed": _SEED}
            yield {**base, **stochastic, "hadamard": 64}
            if fmt.block_2d:
                yield {**base, "block_2d": True}
            if fmt.has_tensor_scale:
                yield {**base, "tensor_scale": codec.tensor_scale(x, fmt)}
                yield {**base, "tensor_scale": torch.tensor(0.01), "block_2d": True}


def tensor_scale() -> Iterator[Mapping[str, Any]]:
    """Samples of `tensor_scale`."""
    for name, fmt in FORMATS.items():
        if fmt.has_tensor_scale:
            for x, axis in _inputs():
                yield {"x": x, "format": name}
                yield {"x": x, "format": name, "axis": axis, "hadamard": 16}
                yield {"x": x, "format": name, "scale_rule": fmt.scale_rules[-1]}
            for given in _produced_inputs():
                yield {**given, "format": name}
                yield {**given, "format": name, "axis": 0, "hadamard": 16}


def tensor_scale_both() -> Iterator[Mapping[str, Any]]:
    """Samples of `tensor_scale_both`."""
    for name, fmt in FORMATS.items():
        if fmt.has_tensor_scale:
            for x, axis in _inputs():
                yield {"x": x, "format": name, "axis": axis, "hadamard": 16}
            for given in _produced_inputs():
                yield {**given, "format": name, "axis": 0, "hadamard": 16}


def dequantize() -> Iterator[Mapping[str, Any]]:
    """Samples of `dequantize`."""
    for sample in quantize():
        if "hadamard" in sample or "rounding" in sample:
            continue
        codes, scales = reference.quantize(**sample)
        x, axis, format = sample["x"], sample["axis"], sample["format"]
        for scale in {None, sample.get("tensor_scale")}:
            yield {
                "codes": codes,
                "scales": scales,
                "tensor_scale": scale,
                "format": format,
                "axis": axis,
                "size": x.shape[axis],
                "block_2d": sample.get("block_2d", False),
                "dtype": x.dtype,
            }


# Exact in every order and on every backend: sums and products alone.
_GATED = (
    "full row full: t0 = cast.float32(a0); t1 = mul.float32(t0, a1); t2 = cast.bfloat16(t1); t3 = mul.bfloat16(t2, a2)"
)
_SHIFTED = "full column scalar: t0 = mul.float32(a0, a1); t1 = sub.float32(1.0, t0); t2 = add.float32(t1, a2)"


def _produced_inputs() -> Iterator[dict[str, Any]]:
    """Matrices, whole and ragged, that a producer makes."""
    for rows, columns in ((64, 192), (50, 70), (3, 33)):
        x, gate = _tensor(rows, columns, dtype=torch.bfloat16), _tensor(rows, columns, dtype=torch.bfloat16, seed=1)
        gate[0, 3] = float("nan")
        yield {"x": x, "p1": _tensor(rows, 1, seed=2), "p2": gate, "producer": _GATED}
        yield {"x": _tensor(rows, columns), "p1": _tensor(1, columns), "p2": _tensor(1), "producer": _SHIFTED}


def fake_quantize() -> Iterator[Mapping[str, Any]]:
    """Samples of `fake_quantize`."""
    for sample in quantize():
        yield sample
        if sample.get("tensor_scale") is not None:
            yield {**sample, "fold": False}
    for name in FORMATS:
        for given in _produced_inputs():
            for axis in (0, 1):
                base = {**given, "format": name, "axis": axis}
                yield base
                stochastic = {"rounding": "stochastic", "seed": _SEED, "stream": 7, "scale_rule": "truncation-free"}
                yield {**base, **stochastic, "hadamard": 16}


def fake_quantize_both() -> Iterator[Mapping[str, Any]]:
    """Samples of `fake_quantize_both`."""
    for name, fmt in FORMATS.items():
        plain = {"rounding": ["nearest"] * 2, "stream": [3, 4], "hadamard": [0, 0], "block_2d": [False] * 2}
        wide = _tensor(128, 192, dtype=torch.bfloat16, seed=1)
        wide[3, 5], wide[100, 70:140] = float("nan"), 0.0
        for x in (wide, _tensor(64, 128), _tensor(48, 40).t()):
            base = {"x": x, "format": name, "scale_rule": None, "seed": _SEED, **plain}
            yield base
            yield {**base, "hadamard": [64, 16], "sign_seed": _SEED, "scale_rule": "truncation-free"}
            yield {**base, "rounding": ["stochastic", "nearest"], "scale_rule": "truncation-free"}
            yield {**base, "rounding": ["stochastic"] * 2, "hadamard": [16, 0]}
            if fmt.block_2d:
                yield {**base, "block_2d": [True, False]}
            if fmt.has_tensor_scale:
                scales = {"tensor_scale_0": codec.tensor_scale(x, fmt), "tensor_scale_1": torch.tensor(0.01)}
                yield {**base, **scales}
                yield {**base, **scales, "rounding": ["nearest", "stochastic"], "fold": False}
        for given in _produced_inputs():
            yield {**given, "format": name, "scale_rule": None, **plain}


# Two tensors and three, of two operands and of three; sums and products alone.
_TWO = "full full: t0 = mul.bfloat16(a0, a1); t1 = add.bfloat16(a0, t0) -> t1 t0"
_THREE = (
    "full row full: t0 = cast.float32(a0); t1 = mul.float32(t0, a1); t2 = cast.bfloat16(t1); "
    "t3 = mul.bfloat16(t2, a2); t4 = sub.bfloat16(1.0, t2); t5 = mul.bfloat16(a2, a2) -> t5 t3 t4"
)


def _produced_groups() -> Iterator[dict[str, Any]]:
    """Matrices, whole and ragged, of which a producer makes two or three."""
    for rows, columns in ((64, 64), (50, 72), (3, 33)):
        x, gate = _tensor(rows, columns, dtype=torch.bfloat16), _tensor(rows, columns, dtype=torch.bfloat16, seed=1)
        gate[0, 3] = float("nan")
        yield {"x": x, "p1": gate, "producer": _TWO}
        yield {"x": x, "p1": _tensor(rows, 1, seed=2), "p2": gate, "producer": _THREE}


def tensor_scale_each() -> Iterator[Mapping[str, Any]]:
    """Samples of `tensor_scale_each`."""
    for name, fmt in FORMATS.items():
        if fmt.has_tensor_scale:
            for given in _produced_groups():
                yield {**given, "format": name}
                yield {**given, "format": name, "scale_rule": fmt.scale_rules[-1]}


def fake_quantize_each() -> Iterator[Mapping[str, Any]]:
    """Samples of `fake_quantize_each`."""
    for name, fmt in FORMATS.items():
        for given in _produced_groups():
            results = len(parse(given["producer"]).results)
            for axis in (0, 1):
                base = {**given, "format": name, "axis": axis}
                yield base
                yield {**base, "scale_rule": "truncation-free"}
                if fmt.has_tensor_scale:
                    scales = {f"tensor_scale_{i}": torch.tensor(2.0 ** -(i + 5)) for i in range(results)}
                    yield {**base, **scales}
                    yield {**base, **scales, "scale_rule": "truncation-free", "fold": False}


def quantize_backward() -> Iterator[Mapping[str, Any]]:
    """Samples of `quantize_backward`."""
    for name, fmt in FORMATS.items():
        for x, axis in _inputs():
            base = {"grad": x.new_ones(x.shape), "original": x, "format": name, "axis": axis}
            yield base
            yield {**base, "hadamard": 16, "sign_seed": _SEED, "scale_rule": fmt.scale_rules[-1]}
            if x.shape[axis] % 32 == 0:
                yield {**base, "original": None, "hadamard": 32, "transformed": True}
            if fmt.block_2d:
                yield {**base, "block_2d": True}
            if fmt.has_tensor_scale:
                yield {**base, "tensor_scale": torch.tensor(0.01)}


def hadamard() -> Iterator[Mapping[str, Any]]:
    """Samples of `hadamard`."""
    for x, axis in _inputs():
        for size in (2, 16, 64):
            yield {"x": x, "axis": axis, "size": size}
            yield {"x": x, "axis": axis, "size": size, "seed": _SEED}


def mm() -> Iterator[Mapping[str, Any]]:
    """Samples of `mm`."""
    a, b, bias = _tensor(5, 70), _tensor(70, 9, seed=1), _tensor(9, seed=2)
    scale = torch.tensor(0.37)
    yield {"a": a, "b": b}
    yield {"a": a[None], "b": b[None], "a_tensor_scale": scale}
    yield {"a": a.bfloat16(), "b": b.bfloat16(), "bias": bias.bfloat16(), "a_tensor_scale": scale}
    for name, fmt in FORMATS.items():
        a_codes, a_scales = reference.quantize(a, name, -1)
        for block_2d in {False, fmt.block_2d is not None}:
            b_codes, b_scales = reference.quantize(b, name, 0, block_2d=block_2d)
            weight = {"b": b_codes, "b_scales": b_scales, "b_format": name, "b_block_2d": block_2d, "k": 70}
            yield {"a": a, "bias": bias, **weight}
            yield {"a": a.bfloat16(), **weight}
            yield {"a": a_codes, "a_scales": a_scales, "a_format": name, **weight, "dtype": torch.bfloat16}
        stacked, stacked_scales = reference.quantize(_tensor(34, 70, seed=1), name, -1)
        weight = {"b": stacked, "b_scales": stacked_scales, "b_format": name, "k": 70}
        for activation in ACTIVATIONS:
            yield {"a": a, "bias": _tensor(34, seed=2), **weight, "activation": activation}
            yield {"a": a.bfloat16()[None], "b_tensor_scale": scale, **weight, "activation": activation}
        yield {
            "a": a.bfloat16(),
            **weight,
            "activation": "silu",
            "factor": _tensor(5, 34, dtype=torch.bfloat16, seed=3),
        }


def _ends() -> Iterator[Tensor]:
    """Ends of groups of up to 40 rows: uneven, empty, none of a group, rows behind the last group; both dtypes."""
    for ends in ((3, 3, 20, 40), (0, 0, 0), (40,), (0, 33), (17, 40, 40, 40, 40)):
        yield torch.tensor(ends, dtype=torch.int32)
    yield torch.tensor((8, 30), dtype=torch.int64)


def pad_groups() -> Iterator[Mapping[str, Any]]:
    """Samples of `pad_groups`."""
    for ends in _ends():
        for multiple in (1, 16, 64):
            yield {"tokens": _tensor(40, 24, dtype=torch.bfloat16), "ends": ends, "multiple": multiple}
            yield {"tokens": _tensor(9, 40).t(), "ends": ends, "multiple": multiple}
    yield {"tokens": _tensor(0, 8), "ends": torch.zeros(2, dtype=torch.int32), "multiple": 32}


def grouped_mm() -> Iterator[Mapping[str, Any]]:
    """Samples of `grouped_mm`."""
    for ends in _ends():
        groups, scale = len(ends), torch.tensor(0.37)
        for dtype in (torch.float32, torch.bfloat16):
            tokens, weights = _tensor(40, 24, dtype=dtype), _tensor(groups, 16, 24, dtype=dtype, seed=1).mT
            other = _tensor(40, 32, dtype=dtype, seed=2)
            for a, b in ((tokens, weights), (weights.mT, tokens.t()), (tokens.t(), other)):
                yield {"a": a, "b": b, "ends": ends}
                yield {"a": a, "b": b, "ends": ends, "a_tensor_scale": scale, "b_tensor_scale": scale * 3}


def grouped_mm_packed() -> Iterator[Mapping[str, Any]]:
    """Samples of `grouped_mm_packed`."""
    scale = torch.tensor(0.37)
    for name, fmt in FORMATS.items():
        for ends in _ends():
            stack = _tensor(len(ends), 48, 70, seed=1)
            for block_2d in {False, fmt.block_2d is not None}:
                codes, scales = reference.quantize(stack, name, -1, block_2d=block_2d)
                base = {"b": codes, "b_scales": scales, "ends": ends, "b_format": name, "k": 70, "b_block_2d": block_2d}
                yield {**base, "a": _tensor(40, 70)}
                yield {**base, "a": _tensor(40, 70, dtype=torch.bfloat16), "b_tensor_scale": scale}
            yield {**base, "a": _tensor(70, 40).t(), "a_tensor_scale": scale, "b_tensor_scale": scale * 3}


def _rowwise_formats() -> list[str]:
    return [name for name, fmt in FORMATS.items() if rowwise.refusal(fmt) is None]


def _rowwise_inputs() -> Iterator[Tensor]:
    """Matrices of `_inputs` and what tries windows: ranges beyond one, samples of zeros, several groups of rows."""
    yield from (x.contiguous() for x, _ in _inputs() if x.dim() == 2 and x.numel())
    wide = _tensor(300, 272, seed=3)
    wide[7, 130:140] *= 2.0**9
    wide[140, 64:96] *= 2.0**-20
    wide[200:], wide[250, 35] = 0.0, 1.0
    wide[:, 32:160] = 0.0
    yield wide.bfloat16()
    yield _tensor(160, 64, seed=4) * 2.0**-110


def quantize_rowwise() -> Iterator[Mapping[str, Any]]:
    """Samples of `quantize_rowwise`."""
    for name in _rowwise_formats():
        for x in _rowwise_inputs():
            for axis in (0, 1):
                base = {"x": x, "format": name, "axis": axis}
                stochastic = {"rounding": "stochastic", "seed": _SEED, "stream": 7}
                yield base
                yield {**base, "scale_rule": "truncation-free", "hadamard": 32, "sign_seed": _SEED}
                yield {**base, **stochastic, "scale_rule": "truncation-free"}
                yield {**base, **stochastic, "hadamard": 16}
                yield from ({**base, **more, "e5m2": True} for more in ({}, stochastic))
        for given in _produced_inputs():
            yield from ({**given, "format": name, "axis": axis} for axis in (0, 1))


def quantize_rowwise_both() -> Iterator[Mapping[str, Any]]:
    """Samples of `quantize_rowwise_both`."""
    for name in _rowwise_formats():
        for x in _rowwise_inputs():
            base = {"x": x, "format": name, "seed": _SEED, "stream": [3, 4], "scale_rule": ["floor", "rceil"]}
            yield {**base, "rounding": ["nearest", "nearest"], "hadamard": [0, 0]}
            yield {**base, "rounding": ["stochastic", "nearest"], "hadamard": [32, 0]}
            yield {**base, "rounding": ["stochastic", "stochastic"], "hadamard": [16, 64]}
            yield {**base, "rounding": ["stochastic", "nearest"], "hadamard": [32, 0], "e5m2": True}
        for given in _produced_inputs():
            yield {**base, **given, "rounding": ["nearest", "stochastic"], "hadamard": [32, 0]}


def mm_rowwise() -> Iterator[Mapping[str, Any]]:
    """Samples of `mm_rowwise`."""
    names = ("", "_scale", "_exponents", "_flags")
    for format in _rowwise_formats():
        for size, dtype in ((70, torch.float32), (256, torch.bfloat16), (64, torch.float16)):
            a, b = _tensor(150, size, seed=1), _tensor(144, size, seed=2)
            far, lost = a.clone(), a.clone()
            far[3] *= 2.0 ** torch.arange(size).remainder(64).floor_divide(32).mul(14)
            lost[2, 5], lost[140, 3] = float("nan"), float("inf")
            for left, e5m2 in ((a, ""), (far, ""), (lost, ""), (far, "a"), (lost, "b")):
                operands = {
                    f"{side}{name}": tensor
                    for side, x in (("a", left), ("b", b))
                    for name, tensor in zip(
                        names, reference.quantize_rowwise(x, format, 1, e5m2=side == e5m2), strict=True
                    )
                }
                yield {**operands, "dtype": dtype}
                yield {**operands, "dtype": dtype, "bias": _tensor(144, dtype=dtype, seed=3)}


def grouped_mm_rowwise() -> Iterator[Mapping[str, Any]]:
    """Samples of `grouped_mm_rowwise`: stacks quantised along either axis, flags on tokens, on weights, on neither."""
    names = ("", "_scale", "_exponents", "_flags")
    for format in _rowwise_formats():
        for number, ends in enumerate(_ends()):
            tokens, stack = _tensor(40, 96, seed=1), _tensor(len(ends), 48, 96, seed=2)
            if number % 3:
                tokens[2, 32:64] *= 2.0**14
                stack[-1, 17, :32] *= 2.0**-20
            if number == 4:
                tokens[30, 5], stack[0, 3, 3] = float("nan"), float("inf")
            left = reference.quantize_rowwise(tokens, format, 1)
            # [G, N, K] along K, then [G, K, N] along K: 48 is no multiple of a block, 96 is.
            for flat, axis in ((stack.flatten(0, 1), 1), (stack.mT.flatten(0, 1), 0)):
                right = reference.quantize_rowwise(flat, format, axis)
                sides = (("a", left), ("b", right))
                operands = {f"{s}{n}": t for s, tensors in sides for n, t in zip(names, tensors, strict=True)}
                yield from ({**operands, "ends": ends, "dtype": dtype} for dtype in (torch.float32, torch.bfloat16))


def draw_seed() -> Iterator[Mapping[str, Any]]:
    """Samples of `draw_seed`."""
    yield {"device": torch.device("cpu")}
