"""Layers whose weights stay packed: codes and scales in, `fp4compile.mm` or `fp4compile.grouped_mm_packed` out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from fp4compile.dispatch import install_kernels
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.hadamard import signs
from fp4compile.recipe import Operand

PARTS = ("codes", "scales", "tensor_scale")

# Of what a packed layer takes, and of the weights that are packed.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedWeight:
    """How a weight is packed and how its GEMM reads the other operand.

    Attributes:
        shape: of the weight in the model; of a stack of matrices, one per expert, [experts, ...].
        axis: the contraction axis: 1 for `nn.Linear` [out, in], 0 for GPT-2's `Conv1D` [in, out]; of a stack 1 or 2.
        weight: its spec; weights are rounded to nearest.
        input: spec of the activation, None where it stays in high precision.
    """

    shape: tuple[int, ...]
    axis: int
    weight: Operand
    input: Operand | None = None

    @property
    def stacked(self) -> bool:
        """Whether there is a matrix for each expert."""
        return len(self.shape) == 3

    @property
    def features(self) -> tuple[int, int]:
        """Sizes of input and output."""
        matrix, axis = self.shape[-2:], self.axis - len(self.shape)
        return matrix[axis], matrix[-3 - axis]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: shape, axis, the weight's spec and the input's."""
        spec = asdict(self.weight)
        spec.pop("rounding")
        given = asdict(self.input) if self.input else None
        return {"shape": list(self.shape), "axis": self.axis, **spec, "input": given}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PackedWeight:
        """The inverse of `to_dict`.

        Raises:
            FP4ValueError: a key is missing or unknown, or a format is not known here.
        """
        try:
            spec = dict(data)
            shape, axis, given = tuple(spec.pop("shape")), spec.pop("axis"), spec.pop("input")
            row = cls(shape, axis, _operand(spec), _operand(given) if given else None)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise FP4ValueError(f"malformed description of a packed weight: {error!r}") from error
        whole = all(type(size) is int for size in (*shape, axis))
        if not whole or len(shape) not in (2, 3) or axis not in (len(shape) - 2, len(shape) - 1):
            allowed = "a matrix packed along axis 0 or 1, or a stack of matrices along 1 or 2"
            raise FP4ValueError(f"a packed weight is {allowed}, got {shape}, {axis!r}")
        return row

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Quantise a weight to nearest.

        Returns:
            `codes` uint8 [out, in/2], padded to whole blocks, of a stack [experts, out, in/2]; `scales`; `tensor_scale`
            if the spec has one, one for a stack.
        """
        install_kernels()
        spec = self.weight
        scale = None
        if spec.scaled_per_tensor:
            rule = spec.scale_rule
            scale = torch.ops.fp4compile.tensor_scale(weight, spec.format, self.axis, spec.hadamard, scale_rule=rule)
        codes, scales = torch.ops.fp4compile.quantize(
            weight,
            spec.format,
            self.axis,
            scale_rule=spec.scale_rule,
            block_2d=spec.block_2d,
            tensor_scale=scale,
            hadamard=spec.hadamard,
        )
        parts = {"codes": codes, "scales": scales}
        return parts if scale is None else {**parts, "tensor_scale": scale}

    def parts(self) -> dict[str, Tensor]:
        """What `pack` returns, on the meta device: dtypes and shapes."""
        return self.pack(torch.empty(self.shape, device="meta"))


_KINDS = get_type_hints(Operand)


def _operand(data: Mapping[str, Any]) -> Operand:
    """A spec from plain data; version 0.1 wrote `tensor_scale` true for formats that have none, too."""
    made = Operand(**{k: v for k, v in data.items() if (k, v) != ("tensor_scale", True)})
    for name, kind in _KINDS.items():
        if not isinstance(getattr(made, name), kind):
            raise TypeError(f"{name} is {getattr(made, name)!r}")
    return made


class PackedLayer(nn.Module):
    """A packed weight in a model.

    Attributes:
        codes, scales, tensor_scale: buffers, as `PackedWeight.pack` returns them; `tensor_scale` stays fp32.
        dtype: what the weight decodes to: the model's.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None

    def __init__(self, packed: PackedWeight, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        self.in_features, self.out_features = packed.features
        self.dtype = dtype
        for name in PARTS:
            self.register_buffer(name, parts.get(name))

    def _given(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The activation [..., in], fake-quantised where the row says so, and the tensor scale left for the product."""
        if x.dtype not in DTYPES:
            raise FP4TypeError(f"{type(self).__name__} takes fp32, bf16 or fp16, not {x.dtype}")
        x = _autocast(x)
        spec = self.packed.input
        if spec is None:
            return x, None
        shape = x.shape
        x = x.reshape(-1, self.in_features)  # the GEMM's operand: a 2-D block spans tokens of the whole batch
        scale = None
        if spec.scaled_per_tensor:
            rule = spec.scale_rule
            scale = torch.ops.fp4compile.tensor_scale(x.detach(), spec.format, -1, spec.hadamard, scale_rule=rule)
        x = torch.ops.fp4compile.fake_quantize(
            x,
            spec.format,
            -1,
            scale_rule=spec.scale_rule,
            block_2d=spec.block_2d,
            tensor_scale=scale,
            hadamard=spec.hadamard,
            fold=False,
        )
        return x.reshape(shape), scale

    @property
    def weight(self) -> Tensor:
        """The dense weight in the model's layout and dtype, decoded anew at every access."""
        row, spec = self.packed, self.packed.weight
        dtype = torch.float32 if spec.hadamard else self.dtype
        dense: Tensor = torch.ops.fp4compile.dequantize(
            self.codes,
            self.scales,
            self.tensor_scale,
            spec.format,
            row.axis,
            self.in_features,
            spec.block_2d,
            dtype,
        )
        return _untransformed(dense, row.axis, spec.hadamard).to(self.dtype) if spec.hadamard else dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """Move or cast as `nn.Module` does, but never cast the tensor scale: its range is fp32's."""
        scale = self.tensor_scale
        super()._apply(fn, recurse)
        if scale is not None and self.tensor_scale is not None and self.tensor_scale.dtype != scale.dtype:
            self.tensor_scale = scale.to(self.tensor_scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self

    def _about(self) -> str:
        row = self.packed
        given = f", input={row.input.format}" if row.input else ""
        blocks = ", block_2d=True" if row.weight.block_2d else ""
        return f"format={row.weight.format}{blocks}{given}"


def _autocast(x: Tensor) -> Tensor:
    """The activation as autocast, where it is on, would hand it to a linear layer."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


class PackedLinear(PackedLayer):
    """A linear layer on a packed weight.

    Takes [..., in] in fp32, bf16 or fp16 and returns [..., out] in that dtype (in autocast's, where that is on),
    accumulated in fp32. The activation is fake-quantised first where the row says so.

    Attributes:
        bias: [out] or None.
    """

    bias: Tensor | None

    def __init__(
        self, packed: PackedWeight, parts: Mapping[str, Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__(packed, parts, dtype)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        spec = self.packed.weight
        x, a_scale = self._given(x)
        return torch.ops.fp4compile.mm(
            x,
            self.codes,
            self.bias,
            b_scales=self.scales,
            a_tensor_scale=a_scale,
            b_tensor_scale=self.tensor_scale,
            b_format=spec.format,
            b_block_2d=spec.block_2d,
            k=self.in_features,
            a_holds=self.packed.input.format if self.packed.input else "",
        )

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self._about()}"


class PackedStack(PackedLayer):
    """The weights of all experts of a layer, packed, in the place of a stacked parameter.

    Takes tokens [T, in] in fp32, bf16 or fp16, sorted by expert, and where the tokens of each expert end, [experts];
    returns [T, out] in that dtype, accumulated in fp32, zero behind the last expert's tokens. The tokens are
    fake-quantised first where the row says so.
    """

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        spec = self.packed.weight
        x, a_scale = self._given(x)
        return torch.ops.fp4compile.grouped_mm_packed(
            x,
            self.codes,
            self.scales,
            ends,
            spec.format,
            self.in_features,
            spec.block_2d,
            a_scale,
            self.tensor_scale,
        )

    def extra_repr(self) -> str:
        sizes = f"experts={self.packed.shape[0]}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._about()}"


def _untransformed(values: Tensor, axis: int, size: int) -> Tensor:
    """Undo `hadamard`: the matrix is its own inverse, the signs then come last instead of first."""
    flips = signs(size, None, values.device).repeat(values.shape[axis] // size)
    flips = flips if axis == values.dim() - 1 else flips[:, None]
    transformed: Tensor = torch.ops.fp4compile.hadamard(values * flips, axis, size)
    return transformed * flips


def replaced(module: nn.Module, packed: PackedWeight, share: PackedLinear | None = None) -> PackedLinear:
    """A `PackedLinear` to stand for a linear module, its tensors still on the meta device.

    Args:
        module: `nn.Linear` or GPT-2's `Conv1D`.
        share: the layer whose packed weight it shares.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != packed.shape:
        raise FP4TypeError(f"{type(module).__name__} has no weight of shape {packed.shape}")
    parts = packed.parts() if share is None else {n: t for n, t in share.named_buffers() if n in PARTS}
    bias = getattr(module, "bias", None)
    return PackedLinear(packed, parts, bias, weight.dtype)
