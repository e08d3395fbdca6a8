"""Activations that a GEMM applies to its sums: rows that references, kernels and passes read.

    mm(x, w, bias, activation="silu")    ->  silu(x w^T + bias)
    mm(x, w, bias, activation="swiglu")  ->  silu(gate) * up    w, bias: the rows of gate, then as many of up
    mm(x, w, bias, activation="silu", factor=up)  ->  silu(x w^T + bias) * up

All of it is computed in fp32, of sums, scales and bias in fp32, and the result is rounded once. Eager PyTorch rounds
more often: a linear layer rounds its sums to bf16, the activation its result, the gate's product once more.

Gated forms are named as in Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fp4compile.errors import FP4ValueError, unknown

# `gelu` by the error function, `gelu_tanh` by its approximation.
FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
)


@dataclass(frozen=True)
class Activation:
    """One activation.

    Attributes:
        function: a key of `FUNCTIONS`.
        gated: whether it is of the first half of the outputs alone, and multiplied with the other half.
    """

    function: str
    gated: bool = False

    def of(self, x: Tensor) -> Tensor:
        """The activation of x [..., N]: [..., N], gated [..., N / 2]."""
        function = FUNCTIONS[self.function]
        if not self.gated:
            return function(x)
        gate, up = x.chunk(2, -1)
        return function(gate) * up


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        **{name: Activation(name) for name in FUNCTIONS},
        "reglu": Activation("relu", gated=True),
        "geglu": Activation("gelu", gated=True),
        "geglu_tanh": Activation("gelu_tanh", gated=True),
        "swiglu": Activation("silu", gated=True),
    }
)


def columns(activation: str, rows: Any) -> Any:
    """Outputs of a GEMM whose weight has so many rows; symbolic where they are.

    Args:
        activation: a key of `ACTIVATIONS`, or "" for none.

    Raises:
        FP4ValueError: another name, or a gated activation of an odd number of rows.
    """
    if not activation:
        return rows
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    if not ACTIVATIONS[activation].gated:
        return rows
    if rows % 2:
        raise FP4ValueError(f"activation {activation!r} halves the outputs: {rows} rows of a weight are no two parts")
    return rows // 2


def activated(x: Tensor, activation: str) -> Tensor:
    """x [..., N], or what the activation makes of it, in x's dtype."""
    columns(activation, x.shape[-1])
    return ACTIVATIONS[activation].of(x) if activation else x
