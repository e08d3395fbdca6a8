"""The table of ops: one row per op of `torch.ops.fp4compile`, the format an argument and never part of the name.

A row holds the schema, the reference implementation (compositions of `codec`), the shape rule and sample inputs. The
samples of an op times the kernels of a backend generate that backend's tests. Every op is opaque to compilers: what
runs inside one is the same eager and compiled, so the bits are too.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fp4compile import grouped, reference, samples
from fp4compile.errors import FP4ValueError
from fp4compile.hadamard import hadamard

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


_QUANTIZE_ARGS = (
    "Tensor x, str format, int axis, str rounding='nearest', str? scale_rule=None, bool block_2d=False, "
    "Tensor? tensor_scale=None, Tensor? seed=None, int stream=0, int hadamard=0, Tensor? sign_seed=None"
)

# The tensor is the producer of x and the other operands; x itself where there is none.
_PRODUCER_ARGS = "Tensor? p1=None, Tensor? p2=None, Tensor? p3=None, Tensor? p4=None, str producer=''"

_ROWS = (
    Op(
        "tensor_scale",
        f"(Tensor x, str format, int axis=-1, int hadamard=0, Tensor? sign_seed=None, {_PRODUCER_ARGS}, "
        "str? scale_rule=None) -> Tensor",
        reference.tensor_scale,
        lambda x, *args, **kwargs: x.new_empty((), dtype=torch.float32),
        samples.tensor_scale,
    ),
    Op(
        # Of x as it is, and transformed along the axis.
        "tensor_scale_both",
        f"(Tensor x, str format, int axis, int hadamard, Tensor? sign_seed=None, {_PRODUCER_ARGS}, "
        "str? scale_rule=None) -> (Tensor, Tensor)",
        reference.tensor_scale_both,
        lambda x, *args, **kwargs: tuple(x.new_empty((), dtype=torch.float32) for _ in range(2)),
        samples.tensor_scale_both,
    ),
    Op(
        # Of every tensor that the producer makes, two or three.
        "tensor_scale_each",
        f"(Tensor x, str format, {_PRODUCER_ARGS}, str? scale_rule=None) -> Tensor[]",
        reference.tensor_scale_each,
        reference.tensor_scale_each_fake,
        samples.tensor_scale_each,
    ),
    Op(
        "quantize",
        f"({_QUANTIZE_ARGS}, ScalarType? dtype=None) -> (Tensor, Tensor)",
        reference.quantize,
        reference.quantize_fake,
        samples.quantize,
    ),
    Op(
        "dequantize",
        "(Tensor codes, Tensor scales, Tensor? tensor_scale, str format, int axis, SymInt size, bool block_2d, "
        "ScalarType dtype) -> Tensor",
        reference.dequantize,
        reference.dequantize_fake,
        samples.dequantize,
    ),
    Op(
        "fake_quantize",
        f"({_QUANTIZE_ARGS}, bool fold=True, {_PRODUCER_ARGS}) -> Tensor",
        reference.fake_quantize,
        reference.fake_quantize_fake,
        samples.fake_quantize,
    ),
    Op(
        # Along axis 0 and along axis 1 of a matrix, in this order; lists give an option per axis.
        "fake_quantize_both",
        "(Tensor x, str format, str? scale_rule, str[] rounding, int[] stream, int[] hadamard, bool[] block_2d, "
        "Tensor? tensor_scale_0=None, Tensor? tensor_scale_1=None, Tensor? seed=None, Tensor? sign_seed=None, "
        f"bool fold=True, {_PRODUCER_ARGS}) -> (Tensor, Tensor)",
        reference.fake_quantize_both,
        reference.fake_quantize_both_fake,
        samples.fake_quantize_both,
    ),
    Op(
        # Of every tensor that the producer makes, two or three, to nearest.
        "fake_quantize_each",
        "(Tensor x, str format, int axis, str? scale_rule=None, Tensor? tensor_scale_0=None, "
        f"Tensor? tensor_scale_1=None, Tensor? tensor_scale_2=None, bool fold=True, {_PRODUCER_ARGS}) -> Tensor[]",
        reference.fake_quantize_each,
        reference.fake_quantize_each_fake,
        samples.fake_quantize_each,
    ),
    Op(
        # Clips where the forward has clipped `original` (None: nowhere), then undoes the forward's transform.
        "quantize_backward",
        "(Tensor grad, Tensor? original, str format, int axis, str? scale_rule=None, bool block_2d=False, "
        "Tensor? tensor_scale=None, int hadamard=0, Tensor? sign_seed=None, bool transformed=False) -> Tensor",
        reference.quantize_backward,
        lambda grad, *args, **kwargs: grad.new_empty(grad.shape),
        samples.quantize_backward,
    ),
    Op(
        "hadamard",
        "(Tensor x, int axis, int size, Tensor? seed=None) -> Tensor",
        hadamard,
        reference.hadamard_fake,
        samples.hadamard,
    ),
    Op(
        # With dense values `a_holds` may name a format that all of them are of, in blocks along K, without a tensor
        # scale: they are fake-quantised, and a kernel may take them apart again.
        "mm",
        "(Tensor a, Tensor b, Tensor? bias=None, Tensor? a_scales=None, Tensor? b_scales=None, "
        "Tensor? a_tensor_scale=None, Tensor? b_tensor_scale=None, str a_format='', str b_format='', "
        "bool b_block_2d=False, SymInt k=-1, ScalarType? dtype=None, str activation='', Tensor? factor=None, "
        "str a_holds='') -> Tensor",
        reference.mm,
        reference.mm_fake,
        samples.mm,
    ),
    Op(
        # Where each group of rows ends is data: `ends` of [G].
        "pad_groups",
        "(Tensor tokens, Tensor ends, int multiple) -> (Tensor, Tensor)",
        grouped.pad_groups,
        grouped.pad_groups_fake,
        samples.pad_groups,
    ),
    Op(
        "grouped_mm",
        "(Tensor a, Tensor b, Tensor ends, Tensor? a_tensor_scale=None, Tensor? b_tensor_scale=None) -> Tensor",
        grouped.grouped_mm,
        grouped.grouped_mm_fake,
        samples.grouped_mm,
    ),
    Op(
        # Rows of tokens and a packed stack [G, N, K]: codes [G, N, K / 2], K padded to whole blocks.
        "grouped_mm_packed",
        "(Tensor a, Tensor b, Tensor b_scales, Tensor ends, str b_format, SymInt k, bool b_block_2d=False, "
        "Tensor? a_tensor_scale=None, Tensor? b_tensor_scale=None) -> Tensor",
        reference.grouped_mm_packed,
        reference.grouped_mm_packed_fake,
        samples.grouped_mm_packed,
    ),
    Op(
        "quantize_rowwise",
        "(Tensor x, str format, int axis, str rounding='nearest', str? scale_rule=None, Tensor? seed=None, "
        "int stream=0, int hadamard=0, Tensor? sign_seed=None, "
        f"{_PRODUCER_ARGS}, bool e5m2=False) -> (Tensor, Tensor, Tensor, Tensor)",
        reference.quantize_rowwise,
        reference.quantize_rowwise_fake,
        samples.quantize_rowwise,
    ),
    Op(
        # Along axis 0 and along axis 1, in this order; options are given per axis.
        "quantize_rowwise_both",
        "(Tensor x, str format, str[] rounding, str[] scale_rule, int[] stream, int[] hadamard, Tensor? seed=None, "
        f"Tensor? sign_seed=None, {_PRODUCER_ARGS}, bool e5m2=False) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference.quantize_rowwise_both,
        reference.quantize_rowwise_both_fake,
        samples.quantize_rowwise_both,
    ),
    Op(
        "mm_rowwise",
        "(Tensor a, Tensor a_scale, Tensor a_exponents, Tensor a_flags, Tensor b, Tensor b_scale, "
        "Tensor b_exponents, Tensor b_flags, ScalarType dtype, Tensor? bias=None) -> Tensor",
        reference.mm_rowwise,
        reference.mm_rowwise_fake,
        samples.mm_rowwise,
    ),
    Op(
        # Rows of tokens, and of a stack of weights: [G N, K] or [N, G K]. `ends` of [G].
        "grouped_mm_rowwise",
        "(Tensor a, Tensor a_scale, Tensor a_exponents, Tensor a_flags, Tensor b, Tensor b_scale, "
        "Tensor b_exponents, Tensor b_flags, Tensor ends, ScalarType dtype) -> Tensor",
        reference.grouped_mm_rowwise,
        reference.grouped_mm_rowwise_fake,
        samples.grouped_mm_rowwise,
    ),
    Op(
        "draw_seed",
        "(Device device) -> Tensor",
        reference.draw_seed,
        reference.draw_seed_fake,
        samples.draw_seed,
        tags=(torch.Tag.nondeterministic_seeded,),
    ),
)

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _ROWS})

# What autocast puts in front of each op, by device.
_AUTOCAST = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST_KEYS = functools.reduce(
    operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)) for key in _AUTOCAST)
)


def _without_kernel(op: Op) -> Callable[..., Any]:
    """What torch calls for a device that has no kernel of the op: its reference.

    The first call of a process may stand in a program that was read from a file, which has installed no kernels: they
    are installed then, so that nothing runs by its reference unnoticed.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        from fp4compile.dispatch import install_default_kernels  # which reads the table of ops

        return (op.overload if install_default_kernels() else op.reference)(*args, **kwargs)

    return run


def _without_autocast(op: Op) -> Callable[..., Any]:
    """What torch calls under autocast: the op, which computes in the dtypes that it names, as it does elsewhere."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op.overload(*args, **kwargs)

    return run


for _op in _ROWS:
    LIBRARY.define(_op.name + _op.schema, tags=_op.tags)
    LIBRARY.impl(_op.name, _without_kernel(_op), "CompositeExplicitAutograd")
    for _key in _AUTOCAST:
        LIBRARY.impl(_op.name, _without_autocast(_op), _key)
    torch.library.register_fake(f"fp4compile::{_op.name}", _op.fake, lib=LIBRARY)

BY_OVERLOAD: Mapping[Any, Op] = MappingProxyType({op.overload: op for op in _ROWS})


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (divisor,) = ctx.saved_tensors
    # A tensor scale left out of the values leaves x / tensor_scale.
    grad = grad if divisor is None else (grad / divisor).to(grad.dtype)
    return grad, *([None] * ctx.others)


def _setup_straight_through(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    given = dict(zip(OPS["fake_quantize"].signature.parameters, inputs, strict=True))
    if given["hadamard"] or given["producer"]:
        raise FP4ValueError("fake_quantize with a Hadamard transform or a producer has no straight-through gradient")
    ctx.others = len(inputs) - 1
    ctx.save_for_backward(None if given["fold"] else given["tensor_scale"])


def _setup_mm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, bias, _, b_scales, a_ts, b_ts, _, b_format, b_block_2d, k, _, activation, factor, _ = inputs
    if not b_format:
        raise FP4ValueError("fp4compile.mm is differentiable only with a packed second operand (frozen weights)")
    if activation or factor is not None:
        raise FP4ValueError("fp4compile.mm with an activation or a factor has no gradient: apply them to the result")
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
    return (grad_a.to(ctx.a_dtype), None, grad_bias, *([None] * 12))


# Quantisation is a staircase: its useful gradient is the straight-through one (Bengio et al., 2013).
torch.library.register_autograd(
    "fp4compile::fake_quantize", _straight_through, setup_context=_setup_straight_through, lib=LIBRARY
)
torch.library.register_autograd("fp4compile::mm", _mm_backward, setup_context=_setup_mm, lib=LIBRARY)


def _setup_grouped_mm_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, b, b_scales, ends, b_format, k, b_block_2d, a_ts, b_ts = inputs
    ctx.save_for_backward(b, b_scales, ends, a_ts, b_ts)
    ctx.b_format, ctx.k, ctx.b_block_2d = b_format, k, b_block_2d


def _grouped_mm_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    b, b_scales, ends, a_ts, b_ts = ctx.saved_tensors
    ops = torch.ops.fp4compile
    stack = ops.dequantize(b, b_scales, None, ctx.b_format, -1, ctx.k, ctx.b_block_2d, grad.dtype)
    return ops.grouped_mm(grad.contiguous(), stack, ends, a_ts, b_ts), *([None] * 8)


torch.library.register_autograd(
    "fp4compile::grouped_mm_packed",
    _grouped_mm_packed_backward,
    setup_context=_setup_grouped_mm_packed,
    lib=LIBRARY,
)
