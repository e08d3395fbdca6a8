"""What each op computes, and the shape rule of its results: compositions of `codec`, plain torch on any device.

    quantize(x, "hif4", 1)  ->  codec.quantize(produce(x), ...)    # behind a producer and a Hadamard transform, if any

The rows of `ops` name them; the arguments are those of the ops' schemas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fp4compile import codec, grouped, rowwise
from fp4compile.activations import activated, columns
from fp4compile.formats import FORMATS
from fp4compile.hadamard import hadamard as hadamard_transform
from fp4compile.hadamard import inverse_hadamard
from fp4compile.producer import parse, produce, produce_each, produced_dtype


def _ceil(size: Any, block: int) -> Any:
    """size / block rounded up; keeps symbolic sizes symbolic."""
    return (size + block - 1) // block


def _axis(axis: int, ndim: int) -> int:
    return axis + ndim if axis < 0 else axis


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _given(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults too: dispatchers give them by position or by name."""
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _transformed_shape(x: Tensor, axis: int, hadamard: int) -> list[Any]:
    shape = list(x.shape)
    if hadamard:
        shape[_axis(axis, x.dim())] = _ceil(shape[axis], hadamard) * hadamard
    return shape


def _transform(x: Tensor, axis: int, hadamard: int, sign_seed: Tensor | None) -> Tensor:
    return hadamard_transform(x, axis, hadamard, sign_seed) if hadamard else x


def tensor_scale(
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
    scale_rule: str | None = None,
) -> Tensor:
    """The scale of a whole tensor."""
    fmt = FORMATS[format]
    if fmt.scaling(scale_rule).shrink == 1.0:  # else it does not depend on x
        x = _transform(produce(x, (p1, p2, p3, p4), producer), axis, hadamard, sign_seed)
    return codec.tensor_scale(x, fmt, scale_rule)


def tensor_scale_both(
    x: Tensor,
    format: str,
    axis: int,
    hadamard: int,
    sign_seed: Tensor | None = None,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
    scale_rule: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The scales of a whole tensor as it is, and of its transform."""
    made = produce(x, (p1, p2, p3, p4), producer)
    return (
        tensor_scale(made, format, scale_rule=scale_rule),
        tensor_scale(made, format, axis, hadamard, sign_seed, scale_rule=scale_rule),
    )


def tensor_scale_each(
    x: Tensor,
    format: str,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
    scale_rule: str | None = None,
) -> list[Tensor]:
    """`tensor_scale` of every tensor that a producer makes."""
    made = produce_each(x, (p1, p2, p3, p4), producer)
    return [tensor_scale(each, format, scale_rule=scale_rule) for each in made]


def tensor_scale_each_fake(*args: Any, **kwargs: Any) -> list[Tensor]:
    """The shape rule of `tensor_scale_each`."""
    given = _given(tensor_scale_each, args, kwargs)
    return [given["x"].new_empty((), dtype=torch.float32) for _ in parse(given["producer"]).results]


def quantize(
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
    """Packed codes and scales."""
    fmt = FORMATS[format]
    t = _transform(x, axis, hadamard, sign_seed)
    rule = fmt.rule(scale_rule)
    return codec.quantize(t, fmt, axis, rounding, rule, block_2d, tensor_scale, seed, stream, dtype or x.dtype)


def quantize_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The shape rule of `quantize`."""
    given = _given(quantize, args, kwargs)
    x, axis, block_2d, fmt = given["x"], given["axis"], given["block_2d"], FORMATS[given["format"]]
    shape = _transformed_shape(x, axis, given["hadamard"])
    size = shape.pop(axis)
    block = fmt.block_2d if block_2d and fmt.block_2d else fmt.block
    blocks = _ceil(size, block)
    codes = x.new_empty([*shape, blocks * (block // 2)], dtype=torch.uint8)
    if block_2d:
        shape[-1] = _ceil(shape[-1], block)
    return codes, x.new_empty([*shape, blocks], dtype=fmt.scale_dtype)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The values of codes and scales."""
    return codec.dequantize(codes, scales, tensor_scale, FORMATS[format], axis, size, block_2d, dtype)


def dequantize_fake(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: Any,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The shape rule of `dequantize`."""
    shape = list(codes.shape[:-1])
    shape.insert(_axis(axis, codes.dim()), size)
    return codes.new_empty(shape, dtype=dtype)


def fake_quantize(
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
    """The values that codes and scales of x would have."""
    fmt = FORMATS[format]
    x = produce(x, (p1, p2, p3, p4), producer)
    t = _transform(x, axis, hadamard, sign_seed)
    rule = fmt.rule(scale_rule)
    return codec.fake_quantize(t, fmt, axis, rounding, rule, block_2d, tensor_scale, seed, stream, x.dtype, fold)


def fake_quantize_fake(*args: Any, **kwargs: Any) -> Tensor:
    """The shape rule of `fake_quantize`."""
    given = _given(fake_quantize, args, kwargs)
    x: Tensor = given["x"]
    shape = _transformed_shape(x, given["axis"], given["hadamard"])
    return x.new_empty(shape, dtype=produced_dtype(x, given["producer"]))


def fake_quantize_both(
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
    """`fake_quantize` along axis 0 and along axis 1."""
    x = produce(x, (p1, p2, p3, p4), producer)
    first, second = (
        fake_quantize(x, format, axis, mode, scale_rule, squares, scale, seed, number, size, sign_seed, fold)
        for axis, (mode, squares, scale, number, size) in enumerate(
            zip(rounding, block_2d, (tensor_scale_0, tensor_scale_1), stream, hadamard, strict=True)
        )
    )
    return first, second


def fake_quantize_both_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The shape rule of `fake_quantize_both`."""
    given = _given(fake_quantize_both, args, kwargs)
    x: Tensor = given["x"]
    dtype, sizes = produced_dtype(x, given["producer"]), given["hadamard"]
    first, second = (x.new_empty(_transformed_shape(x, axis, size), dtype=dtype) for axis, size in enumerate(sizes))
    return first, second


def fake_quantize_each(
    x: Tensor,
    format: str,
    axis: int,
    scale_rule: str | None = None,
    tensor_scale_0: Tensor | None = None,
    tensor_scale_1: Tensor | None = None,
    tensor_scale_2: Tensor | None = None,
    fold: bool = True,
    p1: Tensor | None = None,
    p2: Tensor | None = None,
    p3: Tensor | None = None,
    p4: Tensor | None = None,
    producer: str = "",
) -> list[Tensor]:
    """`fake_quantize`, to nearest, of every tensor that a producer makes."""
    scales = (tensor_scale_0, tensor_scale_1, tensor_scale_2)
    made = produce_each(x, (p1, p2, p3, p4), producer)
    return [
        fake_quantize(each, format, axis, scale_rule=scale_rule, tensor_scale=scale, fold=fold)
        for each, scale in zip(made, scales[: len(made)], strict=True)
    ]


def fake_quantize_each_fake(*args: Any, **kwargs: Any) -> list[Tensor]:
    """The shape rule of `fake_quantize_each`."""
    given = _given(fake_quantize_each, args, kwargs)
    x, producer = given["x"], parse(given["producer"])
    return [x.new_empty(x.shape, dtype=producer.dtype) for _ in producer.results]


def quantize_backward(
    grad: Tensor,
    original: Tensor | None,
    format: str,
    axis: int,
    scale_rule: str | None = None,
    block_2d: bool = False,
    tensor_scale: Tensor | None = None,
    hadamard: int = 0,
    sign_seed: Tensor | None = None,
    transformed: bool = False,
) -> Tensor:
    """The gradient of what was quantised from that of its quantised values."""
    back = grad if transformed else _transform(grad, axis, hadamard, sign_seed)
    if original is not None:
        t, fmt = _transform(original, axis, hadamard, sign_seed), FORMATS[format]
        kept = codec.unclipped(t, fmt, axis, fmt.rule(scale_rule), block_2d, tensor_scale, original.dtype)
        back = torch.where(kept, back, 0.0)
    if hadamard:
        back = inverse_hadamard(back, axis, hadamard, sign_seed)
    return back.narrow(axis, 0, grad.shape[axis]).to(grad.dtype).clone(memory_format=torch.contiguous_format)


def hadamard_fake(x: Tensor, axis: int, size: int, seed: Tensor | None = None) -> Tensor:
    """The shape rule of `hadamard`."""
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


def mm(
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
    activation: str = "",
    factor: Tensor | None = None,
    a_holds: str = "",
) -> Tensor:
    """The GEMM of dense or packed operands: fp32 products and sums, tensor scales, bias, activation and factor on
    them, one rounding."""
    left = _dense(a, a_scales, a_format, k, False, torch.float32)
    right = _dense(b, b_scales, b_format, k, b_block_2d, torch.float32)
    out = left @ (right.mT if b_format else right)
    for scale in (a_tensor_scale, b_tensor_scale):
        out = out if scale is None else out * scale
    if bias is not None:
        out = out + bias.to(torch.float32)
    out = activated(out, activation)
    if factor is not None:
        out = out * factor.to(torch.float32)
    return out.to(_product_dtype(a, a_format, dtype))


def mm_fake(
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
    activation: str = "",
    factor: Tensor | None = None,
    a_holds: str = "",
) -> Tensor:
    """The shape rule of `mm`."""
    outputs = columns(activation, b.shape[-2] if b_format else b.shape[-1])
    return a.new_empty([*a.shape[:-1], outputs], dtype=_product_dtype(a, a_format, dtype))


def grouped_mm_packed(
    a: Tensor,
    b: Tensor,
    b_scales: Tensor,
    ends: Tensor,
    b_format: str,
    k: int,
    b_block_2d: bool = False,
    a_tensor_scale: Tensor | None = None,
    b_tensor_scale: Tensor | None = None,
) -> Tensor:
    """`grouped.grouped_mm` of tokens [T, K] and a packed stack [G, N, K]: [T, N] in a's dtype."""
    stack = _dense(b, b_scales, b_format, k, b_block_2d, torch.float32)
    return grouped.grouped_mm(a, stack.mT, ends, a_tensor_scale, b_tensor_scale)


def grouped_mm_packed_fake(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The shape rule of `grouped_mm_packed`."""
    return a.new_empty([a.shape[0], b.shape[1]])


def draw_seed(device: torch.device) -> Tensor:
    """A seed of stochastic rounding, from torch's generator of the device."""
    return torch.randint(0, 2**32, (), dtype=torch.int64, device=device)


def draw_seed_fake(device: torch.device) -> Tensor:
    """The shape rule of `draw_seed`."""
    return torch.empty((), dtype=torch.int64, device=device)


def quantize_rowwise(
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
    e5m2: bool = False,
) -> tuple[Tensor, ...]:
    """FP8 values in rows, scales of rows, exponents of blocks, flags of rows (`rowwise`)."""
    fmt, axis = FORMATS[format], _axis(axis, x.dim())
    x = produce(x, (p1, p2, p3, p4), producer)
    t = _transform(x, axis, hadamard, sign_seed)
    dtype = rowwise.values_dtype(e5m2)
    return rowwise.quantize(x, t, fmt, axis, rounding, fmt.rule(scale_rule), seed, stream, dtype)


def quantize_rowwise_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The shape rule of `quantize_rowwise`."""
    given = _given(quantize_rowwise, args, kwargs)
    return _rows_fake(given["x"], given["format"], given["axis"], given["hadamard"], given["e5m2"])


def _rows_fake(x: Tensor, format: str, axis: int, hadamard: int, e5m2: bool) -> tuple[Tensor, ...]:
    shape = _transformed_shape(x, axis, hadamard)
    size, block = shape.pop(axis), FORMATS[format].block
    (rows,), blocks = shape, _ceil(size, block)
    return (
        x.new_empty([rows, blocks * block], dtype=rowwise.values_dtype(e5m2)),
        x.new_empty([rows], dtype=torch.float32),
        x.new_empty([blocks, rows], dtype=torch.uint8),
        x.new_empty([_ceil(rows, rowwise.FLAGGED)], dtype=torch.uint8),
    )


def quantize_rowwise_both(
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
    e5m2: bool = False,
) -> tuple[Tensor, ...]:
    """`quantize_rowwise` along axis 0, then along axis 1."""
    x = produce(x, (p1, p2, p3, p4), producer)
    rows = zip(rounding, scale_rule, stream, hadamard, strict=True)
    made = (
        quantize_rowwise(x, format, axis, mode, rule, seed, number, size, sign_seed, e5m2=e5m2)
        for axis, (mode, rule, number, size) in enumerate(rows)
    )
    return tuple(tensor for four in made for tensor in four)


def quantize_rowwise_both_fake(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The shape rule of `quantize_rowwise_both`."""
    given = _given(quantize_rowwise_both, args, kwargs)
    x, format, e5m2 = given["x"], given["format"], given["e5m2"]
    made = (_rows_fake(x, format, axis, size, e5m2) for axis, size in enumerate(given["hadamard"]))
    return tuple(tensor for four in made for tensor in four)


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
    bias: Tensor | None = None,
) -> Tensor:
    """The GEMM of operands that `quantize_rowwise` made, from the exponents of their blocks."""
    out = rowwise.dequantize(a, a_scale, a_exponents) @ rowwise.dequantize(b, b_scale, b_exponents).t()
    return (out if bias is None else out + bias.to(torch.float32)).to(dtype)


def mm_rowwise_fake(*args: Any, **kwargs: Any) -> Tensor:
    """The shape rule of `mm_rowwise`."""
    given = _given(mm_rowwise, args, kwargs)
    a, b = given["a"], given["b"]
    made: Tensor = a.new_empty([a.shape[0], b.shape[0]], dtype=given["dtype"])
    return made


def grouped_mm_rowwise(
    a: Tensor,
    a_scale: Tensor,
    a_exponents: Tensor,
    a_flags: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_exponents: Tensor,
    b_flags: Tensor,
    ends: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`grouped.grouped_mm` of tokens and a stack of weights that `quantize_rowwise` made, from the exponents of blocks.

    Args:
        a: [T, K], rows of tokens.
        b: [G N, K], a stack [G, N, K] quantised along its last axis; or [N, G K], a stack [G, K, N] along its middle
            one, each matrix in whole blocks.
        ends: [G], where each group of tokens ends. What lies behind the last group is zero in the result.

    Returns:
        [T, N] in `dtype`, products and sums in fp32.
    """
    left, right = rowwise.dequantize(a, a_scale, a_exponents), rowwise.dequantize(b, b_scale, b_exponents)
    return grouped.grouped_mm(left, rowwise.stacked(right, a.shape[1], len(ends)), ends).to(dtype)


def grouped_mm_rowwise_fake(*args: Any, **kwargs: Any) -> Tensor:
    """The shape rule of `grouped_mm_rowwise`."""
    given = _given(grouped_mm_rowwise, args, kwargs)
    a, b, ends = (given[name] for name in ("a", "b", "ends"))
    columns = rowwise.stacked(b, a.shape[1], ends.shape[0]).shape[2]
    made: Tensor = a.new_empty([a.shape[0], columns], dtype=given["dtype"])
    return made
