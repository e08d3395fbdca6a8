"""The table of activations: what eager PyTorch computes, and what the op makes of sums."""

import pytest
import torch
import torch.nn.functional as F

from fp4compile.activations import ACTIVATIONS, activated, columns
from fp4compile.backend import Yes
from fp4compile.backends.inductor import cpu
from fp4compile.errors import FP4ValueError
from fp4compile.ops import OPS
from tests.helpers import randn

EAGER = {
    "relu": lambda x: F.relu(x),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
    "reglu": lambda x: F.relu(x[:, :4]) * x[:, 4:],
    "geglu": lambda x: F.gelu(x[:, :4]) * x[:, 4:],
    "geglu_tanh": lambda x: F.gelu(x[:, :4], approximate="tanh") * x[:, 4:],
    "swiglu": lambda x: F.silu(x[:, :4]) * x[:, 4:],
}


def test_every_activation_is_checked_here() -> None:
    assert set(EAGER) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", EAGER)
def test_activations_are_those_of_eager_torch(name: str) -> None:
    x = randn(5, 8).mul(3)
    expected = EAGER[name](x)
    assert torch.equal(activated(x, name), expected)
    assert columns(name, 8) == expected.shape[1]


def test_none_is_the_identity() -> None:
    x = randn(3, 5)
    assert activated(x, "") is x
    assert columns("", 5) == 5


def test_what_is_in_no_table() -> None:
    with pytest.raises(FP4ValueError, match=r"unknown activation 'swiglue'.*'swiglu'"):
        columns("swiglue", 8)
    with pytest.raises(FP4ValueError, match="7 rows of a weight are no two parts"):
        columns("geglu", 7)


@pytest.mark.parametrize("name", EAGER)
def test_the_op_rounds_once(name: str) -> None:
    """Activation and factor are of the sums in fp32, with the bias on them: the reference, and the CPU's kernel."""
    a, weight, bias = randn(6, 64).bfloat16(), randn(8, 64, seed=1), randn(8, seed=2)
    codes, scales = OPS["quantize"].reference(weight, "mxfp4", -1)
    dense = OPS["dequantize"].reference(codes, scales, None, "mxfp4", -1, 64, False, torch.float32)
    given = {"a": a, "b": codes, "bias": bias, "b_scales": scales, "b_format": "mxfp4", "k": 64, "activation": name}
    y = EAGER[name](a.float() @ dense.T + bias)
    factor = randn(*y.shape, seed=3).bfloat16()
    for options, expected in (({}, y), ({"factor": factor}, y * factor.float())):
        expected = expected.to(torch.bfloat16)
        assert torch.equal(OPS["mm"].reference(**given, **options), expected)
        bound = OPS["mm"].signature.bind(**given, **options)
        bound.apply_defaults()
        (kernel,) = (k for k in cpu.KERNELS if k.op == "mm")
        if isinstance(kernel.supports(bound.arguments), Yes):  # else this machine has no C compiler
            assert torch.equal(kernel.run(**bound.arguments), expected)
