"""GEMMs with packed weights take the activations behind them where nothing else reads the sums and a kernel does it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4compile.activations import ACTIVATIONS
from fp4compile.backend import Answer, No
from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import Operand
from fp4compile.rewrite import arguments
from tests.claims import Claims, everything
from tests.helpers import Captured, capture, randn

Function = Callable[[Tensor], Tensor]
X, BIAS = randn(2, 3, 64, seed=2), randn(96, seed=1)


def _halves(y: Tensor) -> tuple[Tensor, Tensor]:
    return y[..., :48], y[..., 48:]


def _swapped(y: Tensor) -> Tensor:
    up, gate = y.chunk(2, -1)
    return F.silu(gate) * up


def _gated(function: Function) -> Function:
    def gated(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return function(gate) * up

    return gated


def _tanh(y: Tensor) -> Tensor:
    return F.gelu(y, approximate="tanh")


FOUND: dict[str, list[Function]] = {
    "relu": [F.relu, torch.relu],
    "gelu": [F.gelu, nn.GELU()],
    "gelu_tanh": [_tanh, nn.GELU("tanh")],
    "silu": [F.silu, nn.SiLU()],
    "reglu": [_gated(F.relu), lambda y: y[..., 48:] * torch.relu(y[..., :48])],
    "geglu": [_gated(F.gelu), lambda y: F.gelu(_halves(y)[0]) * _halves(y)[1]],
    "geglu_tanh": [_gated(_tanh), lambda y: y.split(48, -1)[1] * _tanh(y.split(48, -1)[0])],
    "swiglu": [_gated(F.silu), lambda y: F.silu(y.split([48, 48], 2)[0]) * y.split([48, 48], 2)[1]],
}


class _Layer(nn.Module):
    def __init__(self, function: Function, dtype: torch.dtype = torch.bfloat16, tokens: Operand | None = None) -> None:
        super().__init__()
        row = PackedWeight((96, 64), 1, Operand("hif4"), tokens)
        self.linear = PackedLinear(row, row.pack(randn(96, 64)), BIAS.to(dtype), dtype)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


def _filled(found: Captured) -> list[Tensor]:
    """Codes, scales, biases and tokens in the places of the graph's inputs."""
    layer = _Layer(F.silu).linear
    by_dtype = {torch.uint8: layer.codes, torch.int32: layer.scales}
    values = [node.meta["val"] for node in found.module.graph.find_nodes(op="placeholder")]
    return [by_dtype.get(v.dtype, (BIAS if v.dim() == 1 else X).to(v.dtype)) for v in values]


def captured(
    function: Function | _Layer | _Apart,
    dtype: torch.dtype = torch.bfloat16,
    claim: Callable[..., Answer] = everything,
) -> Captured:
    model = function if isinstance(function, _Layer | _Apart) else _Layer(function, dtype)
    found = capture(model, (X.to(dtype),), "hif4-w4a16", train=False)
    found.context.backend = Claims(mm=claim)
    return found.until("rescale")


def activation_of(found: Captured) -> str:
    (gemm,) = found.calls("mm")
    return str(gemm.kwargs.get("activation", ""))


def test_every_activation_is_found_here() -> None:
    assert set(FOUND) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "function"), [(name, f) for name, functions in FOUND.items() for f in functions])
def test_an_activation_becomes_an_argument(name: str, function: Function, dtype: torch.dtype) -> None:
    found, layer = captured(function, dtype), _Layer(function, dtype).linear
    inputs = _filled(found)
    (before,) = found.execute(*inputs)
    assert found.run("activate") == 1
    assert activation_of(found) == name
    (got,) = found.execute(*inputs)
    assert (got.shape, got.dtype) == (before.shape, before.dtype)
    # Sums are rounded, an activation (steeper by 1.13 at most) of them is, and a product: before. The last alone: now.
    sums = X.to(dtype).double() @ layer.weight.double().T + layer.bias.double()
    expected, half_ulp = ACTIVATIONS[name].of(sums), torch.finfo(dtype).eps / 2
    size = math.prod(part.abs() for part in (sums.chunk(2, -1) if ACTIVATIONS[name].gated else [sums]))
    # fp32 sums of 64 products, and the error functions and exponentials of fp32.
    slack = 2.0**-18 * size.clamp(min=sums.abs().amax())
    assert ((got - expected).abs() <= half_ulp * expected.abs() * 1.001 + slack).all()
    assert ((before - expected).abs() <= half_ulp * 1.02 * (2.13 * size + 2 * expected.abs()) + slack).all()
    assert found.run("activate") == 0


class _Apart(nn.Module):
    """A gate and what it multiplies as layers of their own."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.multiply = _Layer(F.silu), _Layer(nn.Identity()), multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(self.gate(x), self.up(x))


def test_the_other_arguments_stay() -> None:
    """Of a GEMM that is called with all of them, as one of quantised tokens is."""
    found = captured(_Layer(F.silu, tokens=Operand("hif4")))
    before = arguments(found.calls("mm")[0])
    assert found.run("activate") == 1
    assert arguments(found.calls("mm")[0]) == {**before, "activation": "silu"}


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate first": lambda gate, up: gate * up,
    "up first": lambda gate, up: up * gate,
}


@pytest.mark.parametrize("multiply", PRODUCTS.values(), ids=PRODUCTS)
def test_a_gate_takes_the_result_of_another_gemm(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = captured(_Apart(multiply))
    (before,) = found.execute(*(inputs := _filled(found)))
    assert found.run("activate") == 1
    up, gate = found.calls("mm")
    assert (gate.kwargs["activation"], gate.kwargs["factor"]) == ("silu", up)
    assert not found.calls(torch.ops.aten.mul.Tensor)
    (got,) = found.execute(*inputs)
    # The roundings of the sums and of the activation are left out, one of the result is in both.
    ulp, size = torch.finfo(torch.bfloat16).eps, (got.abs() + before.abs()).amax()
    assert ((got - before).abs() <= 2.2 * ulp * size).all()
    assert found.run("activate") == 0


def test_a_factor_of_another_shape_is_multiplied_behind() -> None:
    found = captured(_Apart(lambda gate, up: gate * up[..., :1]))
    assert found.run("activate") == 1
    assert [node.kwargs.get("activation") for node in found.calls("mm") if node.kwargs] == ["silu"]
    assert found.calls(torch.ops.aten.mul.Tensor)


LOOKALIKES: dict[str, Function] = {
    "the sums are read, too": lambda y: F.silu(y) + y,
    "the wrong half": _swapped,
    "a part that is no half": lambda y: F.silu(y[..., :32]) * y[..., 64:],
    "halves of the tokens": lambda y: F.silu(y.transpose(0, 2)[:48]) * y.transpose(0, 2)[48:],
    "a half that is read twice": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] + y.chunk(2, -1)[1],
    "the sums are the factor": lambda y: F.silu(y) * y,
    "one half twice": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[0],
    "another function": F.softplus,
    "a slope": lambda y: F.leaky_relu(y, 0.1),
    "another dtype": lambda y: F.silu(y.double()),
}


@pytest.mark.parametrize("function", LOOKALIKES.values(), ids=LOOKALIKES)
def test_lookalikes_stay(function: Function) -> None:
    found = captured(function)
    before = found.text
    assert found.run("activate") == 0
    assert found.text == before


def test_a_kernel_that_declines_says_why() -> None:
    def plain(arguments: dict[str, object]) -> Answer:
        return No("it applies none") if arguments["activation"] else everything(arguments)

    found = captured(F.silu, claim=plain)
    before = found.text
    assert found.run("activate") == 0
    assert found.text == before
    assert "1 activations stay behind their GEMMs: claimed/mm: it applies none" in found.context.notes
