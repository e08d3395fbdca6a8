"""Small models, one training step, and FP4 training written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp4compile
from fp4compile.hadamard import hadamard
from fp4compile.recipe import HEADS

# --- models ----------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Three linear layers with biases; by default no size is a multiple of any block."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        first, second, third, last = sizes or (70, 45, 33, 17)
        self.first, self.second, self.third = nn.Linear(first, second), nn.Linear(second, third), nn.Linear(third, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.gelu(self.second(F.gelu(self.first(x)))))


class Block(nn.Module):
    """A residual MLP with a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Blocks in a list, and an output head."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class LlamaBlock(nn.Module):
    """Grouped-query attention and SwiGLU, as in Llama."""

    def __init__(self, width: int = 64, heads: int = 4, groups: int = 2, hidden: int = 128) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        linear = partial(nn.Linear, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q_proj, self.k_proj = linear(width, width), linear(width, groups * self.size)
        self.v_proj, self.o_proj = linear(width, groups * self.size), linear(width, width)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(width, hidden),
            linear(width, hidden),
            linear(hidden, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q = self.q_proj(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k = self.k_proj(h).unflatten(-1, (self.groups, self.size)).transpose(1, 2)
        v = self.v_proj(h).unflatten(-1, (self.groups, self.size)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with the weights of a seed."""
    torch.manual_seed(seed)
    return make()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- a step ----------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one forward and backward gave: the output, the input's gradient, every parameter's gradient."""

    tensors: dict[str, Tensor]

    def error(self, other: Step) -> dict[str, float]:
        """Relative error of each tensor in the 2-norm, against those of `other`."""
        assert self.tensors.keys() == other.tensors.keys()
        return {name: relative(value, other.tensors[name], name) for name, value in self.tensors.items()}

    def worst(self, other: Step) -> float:
        return max(self.error(other).values())

    def check(self) -> Step:
        """Every tensor is finite, and no gradient is zero."""
        for name, value in self.tensors.items():
            assert value.isfinite().all(), name
            assert value.any(), name
        return self


def relative(value: Tensor, wanted: Tensor, name: str = "") -> float:
    assert value.shape == wanted.shape
    assert value.dtype == wanted.dtype, f"{name}: {value.dtype}, not {wanted.dtype}"
    value, wanted = value.double(), wanted.double()
    return ((value - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def step(model: Callable[..., Tensor], x: Tensor, seed: int = 1) -> Step:
    """Forward, and backward of a loss whose gradient differs between outputs; `seed` is the global one."""
    inner = getattr(model, "_orig_mod", model)
    for parameter in inner.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    out = model(x)
    (out.float() * randn(*out.shape, seed=7)).sum().backward()
    tensors = {"output": out.detach(), "input": x.grad}
    tensors |= {name: p.grad for name, p in inner.named_parameters()}
    return Step({name: value.clone() for name, value in tensors.items() if value is not None})


def compiled(model: Any, recipe: Any = "hif4-plain", backend: str = "reference", **options: Any) -> Any:
    """`torch.compile` as users write it."""
    settings = {"recipe": recipe, "backend": backend, **options}
    return torch.compile(model, backend="fp4compile", options=settings)


def statuses() -> dict[tuple[str, str], str]:
    """(path, role) -> status, of the last report."""
    report = fp4compile.last_report()
    assert report is not None
    return {(site.path, site.role): site.status for site in report.sites}


# --- by hand ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hand:
    """How one operand is treated; `quantize=False` leaves the value that stochastic rounding has on average."""

    format: str
    hadamard: int = 0
    quantize: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor | None]:
        """The operand's values without their tensor scale, and that scale."""
        dtype = x.dtype
        x = hadamard(x, axis, self.hadamard) if self.hadamard else x
        if not self.quantize:
            return x.to(dtype), None
        q = fp4compile.quantize(x, self.format, axis, **self.options)
        return fp4compile.dequantize(replace(q, tensor_scale=None), dtype), q.tensor_scale


# Role -> the two operands, in the order in which `product` takes them.
Treatment = Mapping[str, tuple[Hand, Hand]]


def product(a: Tensor, b: Tensor, pair: tuple[Hand, Hand], bias: Tensor | None = None) -> Tensor:
    """a b^T for a [M, K] and b [N, K], in FP4 along K; tensor scales multiply the fp32 accumulator."""
    (a_values, a_scale), (b_values, b_scale) = pair[0](a, 1), pair[1](b, 1)
    scales = [scale for scale in (a_scale, b_scale) if scale is not None]
    if not scales:
        return F.linear(a_values, b_values, bias)
    out = a_values.float() @ b_values.float().T
    for scale in scales:
        out = out * scale
    return (out if bias is None else out + bias.float()).to(a.dtype)


class _HandLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Treatment) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.bias = how, bias is not None
        with torch.autocast("cpu", enabled=False):
            return product(x.flatten(0, -2), weight, how["forward"], bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.flatten(0, -2), x.flatten(0, -2)
        with torch.autocast("cpu", enabled=False):
            dx = product(rows, weight.T, ctx.how["dgrad"]).view_as(x)
            dw = product(rows.T, x_rows.T, ctx.how["wgrad"])
        return dx, dw, rows.sum(0) if ctx.bias else None, None


def hand_linear(x: Tensor, weight: Tensor, how: Treatment) -> Tensor:
    """x weight^T in FP4, forward and backward."""
    out: Tensor = _HandLinear.apply(x, weight, None, how)
    return out


class _Linear(nn.Linear):
    how: Treatment

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _HandLinear.apply(x, weight, bias, self.how)


def by_hand(model: nn.Module, how: Treatment) -> nn.Module:
    """A copy whose linear layers, output heads aside, are FP4 autograd written by hand."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name.rpartition(".")[2] not in HEADS:
            module.__class__ = _Linear
            module.how = how
    return model


def plain(format: str) -> Treatment:
    pair = (Hand(format), Hand(format))
    return dict.fromkeys(("forward", "dgrad", "wgrad"), pair)
