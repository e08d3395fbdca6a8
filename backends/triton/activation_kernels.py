# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
"""The functions of `fp4compile.activations` on sums in fp32, which kernels take as compile-time arguments."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def gelu(x):
    """x Phi(x), Phi the normal distribution."""
    return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh(u)) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    # The constant last: Triton's interpreter takes a constant times a tensor for a constant.
    return x / (1.0 + tl.exp((x + 0.044715 * x * x * x) * -_SQRT_8_OVER_PI))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


FUNCTIONS = {function.__name__: function for function in (relu, gelu, gelu_tanh, silu)}
