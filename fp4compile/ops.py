"""The table of ops: one row per op of `torch.ops.fp4compile`, the format an argument and never part of the name.

A row holds the schema, the reference implementation (compositions of `codec`), the shape rule and sample inputs. The
samples of an op times the kernels of a backend generate that backend's tests. Every op is opaque to compilers: what
runs inside one is the same eager and compiled, so the bits are too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fp4compile import codec, rowwise
from fp4compile.errors import FP4ValueError
from fp4compile.formats import FORMATS
from fp4compile.hadamard import hadamard as _hadamard
from fp4compile.producer import parse, produce

LIBRARY = torch.library.Library("fp4compile", "DEF")


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: `torch.ops.fp4compile.<name>`.
        schema: arguments and results in torch's schema language.
        reference: the implementation that every kernel must agree with.
        fake: the shape rule.
        samples: argument tuples that a kernel is tested on.
        tags: torch tags.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    samples: Callable[[], Iterator[Mapping[str, Any]]]
    tags: tuple[torch.Tag, ...] = field(default=())

    @property
    def overload(self) -> Any:
        """The callable that graphs hold: `torch.ops.fp4compile.<name>.default`."""
        return getattr(torch.ops.fp4compile, self.name).default

    @cached_property
    def signature(self) -> inspect.Signature:
        """Names and defaults of the arguments."""
        return inspect.signature(self.reference)


def _ceil(size: Any, block: int) -> Any:
    """size / block rounded up; keeps symbolic sizes symbolic."""
    return (size + block - 1) // block


def _axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


def _transformed_shape(x: Tensor, axis: int, hadamard: int) -> list[Any]:
    shape = list(x.shape)
    if hadamard:
        shape[_axis(axis, x.dim())] = _ceil(shape[axis], hadamard) * hadamard
    return shape


def _transform(x: Tensor, axis: int, hadamard: int, sign_seed: Tensor | None) -> Tensor:
    return _hadamard(x, axis, hadamard, sign_seed) if hadamard else x


def _tensor_scale(
    x: Tensor,
    format: str,
    axis: int = -1,
    hadamard: int = 0,
    sign_seed: Tensor | None = None,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> Tensor:
    x = produce(x, (p1, p2, p3, p4), producer)
    return codec.tensor_scale(_transform(x, axis, hadamard, sign_seed), FORMATS[format])


def _quantize(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str = "nearest",
    scale_rule: str | None = None,
    block_2d: bool = False,
    tensor_scale: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    hadamard: int = 0,
    sign_seed: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    fmt = FORMATS[format]
    t = _transform(x, axis, hadamard, sign_seed)
    rule = fmt.rule(scale_rule)
    return codec.quantize(t, fmt, axis, rounding, rule, block_2d, tensor_scale, seed, stream, dtype or x.dtype)


def _quantize_fake(
    x: Tensor, format: str, axis: int, *args: Any, block_2d: bool = False, hadamard: int = 0, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    block_2d, hadamard = (args[2] if len(args) > 2 else block_2d), (args[6] if len(args) > 6 else hadamard)
    fmt = FORMATS[format]
    shape = _transformed_shape(x, axis, hadamard)
    size = shape.pop(axis)
    block = fmt.block_2d if block_2d and fmt.block_2d else fmt.block
    blocks = _ceil(size, block)
    codes = x.new_empty([*shape, blocks * (block // 2)], dtype=torch.uint8)
    if block_2d:
        shape[-1] = _ceil(shape[-1], block)
    return codes, x.new_empty([*shape, blocks], dtype=fmt.scale_dtype)


def _dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    return codec.dequantize(codes, scales, tensor_scale, FORMATS[format], axis, size, block_2d, dtype)


def _dequantize_fake(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: Any,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    shape = list(codes.shape[:-1])
    shape.insert(_axis(axis, codes.dim()), size)
    return codes.new_empty(shape, dtype=dtype)


def _fake_quantize(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str = "nearest",
    scale_rule: str | None = None,
    block_2d: bool = False,
    tensor_scale: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    hadamard: int = 0,
    sign_seed: Tensor | None = None,
    fold: bool = True,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> Tensor:
    fmt = FORMATS[format]
    x = produce(x, (p1, p2, p3, p4), producer)
    t = _transform(x, axis, hadamard, sign_seed)
    rule = fmt.rule(scale_rule)
    return codec.fake_quantize(t, fmt, axis, rounding, rule, block_2d, tensor_scale, seed, stream, x.dtype, fold)


def _produced_dtype(x: Tensor, producer: str) -> torch.dtype:
    return parse(producer).dtype if producer else x.dtype


def _fake_quantize_fake(
    x: Tensor, format: str, axis: int, *args: Any, hadamard: int = 0, producer: str = "", **kwargs: Any
) -> Tensor:
    hadamard, producer = (args[6] if len(args) > 6 else hadamard), (args[13] if len(args) > 13 else producer)
    return x.new_empty(_transformed_shape(x, axis, hadamard), dtype=_produced_dtype(x, producer))


def _fake_quantize_both(
    x: Tensor,
    format: str,
    scale_rule: str | None,
    rounding: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    block_2d: Sequence[bool],
    tensor_scale_0: Tensor | None = None,
    tensor_scale_1: Tensor | None = None,
    seed: Tensor | None = None,
    sign_seed: Tensor | None = None,
    fold: bool = True,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> tuple[Tensor, Tensor]:
    x = produce(x, (p1, p2, p3, p4), producer)
    first, second = (
        _fake_quantize(x, format, axis, mode, scale_rule, squares, scale, seed, number, size, sign_seed, fold)
        for axis, (mode, squares, scale, number, size) in enumerate(
            zip(rounding, block_2d, (tensor_scale_0, tensor_scale_1), stream, hadamard, strict=True)
        )
    )
    return first, second


def _fake_quantize_both_fake(
    x: Tensor,
    format: str,
    scale_rule: str | None,
    rounding: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    *args: Any,
    producer: str = "",
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    dtype = _produced_dtype(x, args[10] if len(args) > 10 else producer)
    first, second = (x.new_empty(_transformed_shape(x, axis, size), dtype=dtype) for axis, size in enumerate(hadamard))
    return first, second


def _hadamard_fake(x: Tensor, axis: int, size: int, seed: Tensor | None = None) -> Tensor:
    return x.new_empty(_transformed_shape(x, axis, size), dtype=torch.float32)


def _dense(values: Tensor, scales: Tensor | None, format: str, k: int, block_2d: bool, dtype: torch.dtype) -> Tensor:
    """An operand of `mm` in `dtype`, the contraction axis last."""
    if not format:
        return values.to(dtype)
    assert scales is not None
    return codec.dequantize(values, scales, None, FORMATS[format], -1, k, block_2d, dtype)


def _product_dtype(a: Tensor, a_format: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype asked for, else that of dense values; packed codes have none of their own."""
    return dtype or (torch.float32 if a_format else a.dtype)


def _mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
    a_format: str = "",
    b_format: str = "",
    b_block_2d: bool = False,
    k: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    left = _dense(a, a_scales, a_format, k, False, torch.float32)
    right = _dense(b, b_scales, b_format, k, b_block_2d, torch.float32)
    out = left @ (right.mT if b_format else right)
    for scale in (a_tensor_scale, b_tensor_scale):
        out = out if scale is None else out * scale
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(_product_dtype(a, a_format, dtype))


def _mm_fake(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    a_scales: Tensor | None = None,
    b_scales: Tensor | None = None,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
    a_format: str = "",
    b_format: str = "",
    b_block_2d: bool = False,
    k: int = -1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    columns = b.shape[-2] if b_format else b.shape[-1]
    return a.new_empty([*a.shape[:-1], columns], dtype=_product_dtype(a, a_format, dtype))


def _draw_seed(device: torch.device) -> Tensor:
    return torch.randint(0, 2**32, (), dtype=torch.int64, device=device)


def _draw_seed_fake(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


def _quantize_rowwise(
    x: Tensor,
    format: str,
    axis: int,
    rounding: str = "nearest",
    scale_rule: str | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    hadamard: int = 0,
    sign_seed: Tensor | None = None,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> tuple[Tensor, ...]:
    fmt, axis = FORMATS[format], _axis(axis, x.dim())
    x = produce(x, (p1, p2, p3, p4), producer)
    t = _transform(x, axis, hadamard, sign_seed)
    return rowwise.quantize(x, t, fmt, axis, rounding, fmt.rule(scale_rule), seed, stream)


def _quantize_rowwise_fake(
    x: Tensor, format: str, axis: int, *args: Any, hadamard: int = 0, **kwargs: Any
) -> tuple[Tensor, ...]:
    shape = _transformed_shape(x, axis, args[4] if len(args) > 4 else hadamard)
    size, block = shape.pop(axis), FORMATS[format].block
    (rows,), blocks = shape, _ceil(size, block)
    return (
        x.new_empty([rows, blocks * block], dtype=torch.float8_e4m3fn),
        x.new_empty([rows], dtype=torch.float32),
        x.new_empty([blocks, rows], dtype=torch.uint8),
        x.new_empty([_ceil(rows, rowwise.FLAGGED)], dtype=torch.uint8),
    )


def _quantize_rowwise_both(
    x: Tensor,
    format: str,
    rounding: Sequence[str],
    scale_rule: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    seed: Tensor | None = None,
    sign_seed: Tensor | None = None,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> tuple[Tensor, ...]:
    x = produce(x, (p1, p2, p3, p4), producer)
    rows = zip(rounding, scale_rule, stream, hadamard, strict=True)
    made = (
        _quantize_rowwise(x, format, axis, mode, rule, seed, number, size, sign_seed)
        for axis, (mode, rule, number, size) in enumerate(rows)
    )
    return tuple(tensor for four in made for tensor in four)


def _quantize_rowwise_both_fake(
    x: Tensor,
    format: str,
    rounding: Sequence[str],
    scale_rule: Sequence[str],
    stream: Sequence[int],
    hadamard: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    made = (_quantize_rowwise_fake(x, format, axis, hadamard=size) for axis, size in enumerate(hadamard))
    return tuple(tensor for four in made for tensor in four)


def _mm_rowwise(
    a: Tensor,
    a_scale: Tensor,
    a_exponents: Tensor,
    a_flags: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_exponents: Tensor,
    b_flags: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    out = rowwise.dequantize(a, a_scale, a_exponents) @ rowwise.dequantize(b, b_scale, b_exponents).t()
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def _mm_rowwise_fake(
    a: Tensor,
    a_scale: Tensor,
    a_exponents: Tensor,
    a_flags: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_exponents: Tensor,
    b_flags: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    return a.new_empty([a.shape[0], b.shape[0]], dtype=dtype)


# --- samples ---------------------------------------------------------------------------------------------------------


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


def _quantize_samples() -> Iterator[Mapping[str, Any]]:
    for name, fmt in FORMATS.items():
        for x, axis in _inputs():
            base = {"x": x, "format": name, "axis": axis}
            yield base
            for rule in fmt.scale_rules:
                yield {**base, "scale_rule": rule}
            stochastic = {"rounding": "stochastic", "seed": _SEED, "stream": 7}
            yield {**base, **stochastic, "scale_rule": "truncation-free"}
            yield {**base, "hadamard": 16, "sign_seed": _SEED}
            yield {**base, **stochastic, "hadamard": 64}
            if fmt.block_2d:
                yield {**base, "block_2d": True}
            if fmt.has_tensor_scale:
                yield {**base, "tensor_scale": codec.tensor_scale(x, fmt)}
                yield {**base, "tensor_scale": torch.tensor(0.01), "block_2d": True}


def _tensor_scale_samples() -> Iterator[Mapping[str, Any]]:
    for name, fmt in FORMATS.items():
        if fmt.has_tensor_scale:
            for x, axis in _inputs():
                yield {"x": x, "format": name}
                yield {"x": x, "format": name, "axis": axis, "hadamard": 16}
            for given in _produced_inputs():
                yield {**given, "format": name}
                yield {**given, "format": name, "axis": 0, "hadamard": 16}


def _dequantize_samples() -> Iterator[Mapping[str, Any]]:
    for sample in _quantize_samples():
        if "hadamard" in sample or "rounding" in sample:
            continue
        codes, scales = _quantize(**sample)
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


def _fake_quantize_samples() -> Iterator[Mapping[str, Any]]:
    for sample in _quantize_samples():
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


def _fake_quantize_both_samples() -> Iterator[Mapping[str, Any]]:
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


def _hadamard_samples() -> Iterator[Mapping[str, Any]]:
    for x, axis in _inputs():
        for size in (2, 16, 64):
            yield {"x": x, "axis": axis, "size": size}
            yield {"x": x, "axis": axis, "size": size, "seed": _SEED}


def _mm_samples() -> Iterator[Mapping[str, Any]]:
    a, b, bias = _tensor(5, 70), _tensor(70, 9, seed=1), _tensor(9, seed=2)
    scale = torch.tensor(0.37)
    yield {"a": a, "b": b}
    yield {"a": a[None], "b": b[None], "a_tensor_scale": scale}
    yield {"a": a.bfloat16(), "b": b.bfloat16(), "bias": bias.bfloat16(), "a_tensor_scale": scale}
    for name, fmt in FORMATS.items():
        a_codes, a_scales = _quantize(a, name, -1)
        for block_2d in {False, fmt.block_2d is not None}:
            b_codes, b_scales = _quantize(b, name, 0, block_2d=block_2d)
            weight = {"b": b_codes, "b_scales": b_scales, "b_format": name, "b_block_2d": block_2d, "k": 70}
            yield {"a": a, "bias": bias, **weight}
            yield {"a": a.bfloat16(), **weight}
            yield {"a": a_codes, "a_scales": a_scales, "a_format": name, **weight, "dtype": torch.bfloat16}


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


def _quantize_rowwise_samples() -> Iterator[Mapping[str, Any]]:
    for name in _rowwise_formats():
        for x in _rowwise_inputs():
            for axis in (0, 1):
                base = {"x": x, "format": name, "axis": axis}
                stochastic = {"rounding": "stochastic", "seed": _SEED, "stream": 7}
                yield base
                yield {**base, "scale_rule": "truncation-free", "hadamard": 32, "sign_seed": _SEED}
                yield {**base, **stochastic, "scale_rule": "truncation-free"}
                yield {**base, **stochastic, "hadamard": 16}
        for given in _produced_inputs():
            yield from ({**given, "format": name, "axis": axis} for axis in (0, 1))


def _quantize_rowwise_both_samples() -> Iterator[Mapping[str, Any]]:
    for name in _rowwise_formats():
        for x in _rowwise_inputs():
            base = {"x": x, "format": name, "seed": _SEED, "stream": [3, 4], "scale_rule": ["floor", "rceil"]}
            yield {**base, "rounding": ["nearest", "nearest"], "hadamard": [0, 0]}
            yield {**base, "rounding": ["stochastic", "nearest"], "hadamard": [32, 0]}
            yield {**base, "rounding": ["stochastic", "stochastic"], "hadamard": [16, 64]}
        for given in _produced_inputs():
            yield {**base, **given, "rounding": ["nearest", "stochastic"], "hadamard": [32, 0]}


def _mm_rowwise_samples() -> Iterator[Mapping[str, Any]]:
    names = ("", "_scale", "_exponents", "_flags")
    for format in _rowwise_formats():
        for size, dtype in ((70, torch.float32), (256, torch.bfloat16), (64, torch.float16)):
            a, b = _tensor(150, size, seed=1), _tensor(144, size, seed=2)
            far, lost = a.clone(), a.clone()
            far[3] *= 2.0 ** torch.arange(size).remainder(64).floor_divide(32).mul(14)
            lost[2, 5], lost[140, 3] = float("nan"), float("inf")
            for left in (a, far, lost):
                operands = {
                    f"{side}{name}": tensor
                    for side, x in (("a", left), ("b", b))
                    for name, tensor in zip(names, _quantize_rowwise(x, format, 1), strict=True)
                }
                yield {**operands, "dtype": dtype}
                yield {**operands, "dtype": dtype, "bias": _tensor(144, dtype=dtype, seed=3)}


def _draw_seed_samples() -> Iterator[Mapping[str, Any]]:
    yield {"device": torch.device("cpu")}


_QUANTIZE_ARGS = (
    "Tensor x, str format, int axis, str rounding='nearest', str? scale_rule=None, bool block_2d=False, "
    "Tensor? tensor_scale=None, Tensor? seed=None, int stream=0, int hadamard=0, Tensor? sign_seed=None"
)

# The tensor is the producer of x and the other operands; x itself where there is none.
_PRODUCER_ARGS = "Tensor? p1=None, Tensor? p2=None, Tensor? p3=None, Tensor? p4=None, str producer=''"

_ROWS = (
    Op(
        "tensor_scale",
        f"(Tensor x, str format, int axis=-1, int hadamard=0, Tensor? sign_seed=None, {_PRODUCER_ARGS}) -> Tensor",
        _tensor_scale,
        lambda x, *args, **kwargs: x.new_empty((), dtype=torch.float32),
        _tensor_scale_samples,
    ),
    Op(
        "quantize",
        f"({_QUANTIZE_ARGS}, ScalarType? dtype=None) -> (Tensor, Tensor)",
        _quantize,
        _quantize_fake,
        _quantize_samples,
    ),
    Op(
        "dequantize",
        "(Tensor codes, Tensor scales, Tensor? tensor_scale, str format, int axis, SymInt size, bool block_2d, "
        "ScalarType dtype) -> Tensor",
        _dequantize,
        _dequantize_fake,
        _dequantize_samples,
    ),
    Op(
        "fake_quantize",
        f"({_QUANTIZE_ARGS}, bool fold=True, {_PRODUCER_ARGS}) -> Tensor",
        _fake_quantize,
        _fake_quantize_fake,
        _fake_quantize_samples,
    ),
    Op(
        # Along axis 0 and along axis 1 of a matrix, in this order; lists give an option per axis.
        "fake_quantize_both",
        "(Tensor x, str format, str? scale_rule, str[] rounding, int[] stream, int[] hadamard, bool[] block_2d, "
        "Tensor? tensor_scale_0=None, Tensor? tensor_scale_1=None, Tensor? seed=None, Tensor? sign_seed=None, "
        f"bool fold=True, {_PRODUCER_ARGS}) -> (Tensor, Tensor)",
        _fake_quantize_both,
        _fake_quantize_both_fake,
        _fake_quantize_both_samples,
    ),
    Op(
        "hadamard",
        "(Tensor x, int axis, int size, Tensor? seed=None) -> Tensor",
        _hadamard,
        _hadamard_fake,
        _hadamard_samples,
    ),
    Op(
        "mm",
        "(Tensor a, Tensor b, Tensor? bias=None, Tensor? a_scales=None, Tensor? b_scales=None, "
        "Tensor? a_tensor_scale=None, Tensor? b_tensor_scale=None, str a_format='', str b_format='', "
        "bool b_block_2d=False, SymInt k=-1, ScalarType? dtype=None) -> Tensor",
        _mm,
        _mm_fake,
        _mm_samples,
    ),
    Op(
        "quantize_rowwise",
        "(Tensor x, str format, int axis, str rounding='nearest', str? scale_rule=None, Tensor? seed=None, "
        "int stream=0, int hadamard=0, Tensor? sign_seed=None, "
        f"{_PRODUCER_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)",
        _quantize_rowwise,
        _quantize_rowwise_fake,
        _quantize_rowwise_samples,
    ),
    Op(
        # Along axis 0 and along axis 1, in this order; options are given per axis.
        "quantize_rowwise_both",
        "(Tensor x, str format, str[] rounding, str[] scale_rule, int[] stream, int[] hadamard, Tensor? seed=None, "
        f"Tensor? sign_seed=None, {_PRODUCER_ARGS}) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _quantize_rowwise_both,
        _quantize_rowwise_both_fake,
        _quantize_rowwise_both_samples,
    ),
    Op(
        "mm_rowwise",
        "(Tensor a, Tensor a_scale, Tensor a_exponents, Tensor a_flags, Tensor b, Tensor b_scale, "
        "Tensor b_exponents, Tensor b_flags, ScalarType dtype, Tensor? bias=None) -> Tensor",
        _mm_rowwise,
        _mm_rowwise_fake,
        _mm_rowwise_samples,
    ),
    Op(
        "draw_seed",
        "(Device device) -> Tensor",
        _draw_seed,
        _draw_seed_fake,
        _draw_seed_samples,
        tags=(torch.Tag.nondeterministic_seeded,),
    ),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _ROWS})

for _op in _ROWS:
    LIBRARY.define(_op.name + _op.schema, tags=_op.tags)
    LIBRARY.impl(_op.name, _op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fp4compile::{_op.name}", _op.fake, lib=LIBRARY)

BY_OVERLOAD: Mapping[Any, Op] = MappingProxyType({op.overload: op for op in _ROWS})
# Ops that read a tensor x only to quantise it.
QUANTISING = frozenset(op.overload for op in _ROWS if op.name != "hadamard" and "x" in op.signature.parameters)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (divisor,) = ctx.saved_tensors
    # A tensor scale left out of the values leaves x / tensor_scale.
    grad = grad if divisor is None else (grad / divisor).to(grad.dtype)
    return grad, *([None] * ctx.others)


def _setup_straight_through(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    if inputs[9] or inputs[16]:
        raise FP4ValueError("fake_quantize with a Hadamard transform or a producer has no straight-through gradient")
    ctx.others = len(inputs) - 1
    tensor_scale, fold = inputs[6], inputs[11]
    ctx.save_for_backward(None if fold else tensor_scale)


def _setup_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, bias, _, b_scales, a_ts, b_ts, _, b_format, b_block_2d, k, _ = inputs
    if not b_format:
        raise FP4ValueError("fp4compile.mm is differentiable only with a packed second operand (frozen weights)")
    ctx.save_for_backward(b, b_scales, a_ts, b_ts)
    ctx.b_format, ctx.b_block_2d, ctx.k, ctx.a_dtype = b_format, b_block_2d, k, a.dtype
    ctx.bias = None if bias is None else (bias.dtype, bias.dim())


def _mm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    b, b_scales, a_ts, b_ts = ctx.saved_tensors
    weight = torch.ops.fp4compile.dequantize(b, b_scales, b_ts, ctx.b_format, -1, ctx.k, ctx.b_block_2d, grad.dtype)
    grad_bias = None
    if ctx.bias is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias[0])
    grad_a = grad @ weight if a_ts is None else (grad @ weight) * a_ts
    return (grad_a.to(ctx.a_dtype), None, grad_bias, *([None] * 9))


# Quantisation is a staircase: its useful gradient is the straight-through one (Bengio et al., 2013).
torch.library.register_autograd(
    "fp4compile::fake_quantize", _straight_through, setup_context=_setup_straight_through, lib=LIBRARY
)
torch.library.register_autograd("fp4compile::mm", _mm_backward, setup_context=_setup_mm, lib=LIBRARY)
