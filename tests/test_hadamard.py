"""The random Hadamard transform: its matrix, its signs, its padding, and that it cancels in a product."""

import math

import pytest
import torch
from torch.testing import assert_close

from fp4compile import philox
from fp4compile.errors import FP4ValueError
from fp4compile.hadamard import SIGN_STREAM, hadamard, signs

CPU = torch.device("cpu")
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seed(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def sylvester(size: int) -> torch.Tensor:
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def rounding(size: int) -> float:
    """A bound on the relative error of one transform: log2(size) sums and one product round once each."""
    return (math.log2(size) + 2) * 2.0**-24


@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_sylvester_times_signs(size):
    # One-hot inputs pass through the butterflies without rounding, so the matrix is exact.
    matrix = hadamard(torch.eye(size), 0, size, seed(5))
    scale = torch.tensor(1 / math.sqrt(size), dtype=torch.float32)
    assert torch.equal(matrix, sylvester(size) * signs(size, seed(5), CPU) * scale)


@pytest.mark.parametrize("size", SIZES)
def test_orthonormal(size):
    matrix = hadamard(torch.eye(size), 0, size).double()
    # The only error is that of fp32(1/sqrt(size)), squared: none where sqrt(size) is a power of two.
    exact = math.isqrt(size) ** 2 == size
    tolerance = 0.0 if exact else 2.0**-23
    assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=tolerance)


def test_signs():
    s = signs(64, None, CPU)
    assert set(s.tolist()) == {-1.0, 1.0}
    assert torch.equal(s, signs(64, seed(0), CPU))
    assert torch.equal(s[:16], signs(16, None, CPU))
    assert not torch.equal(s, signs(64, seed(1), CPU))
    assert torch.equal(s < 0, philox.philox_words(64, seed(0), SIGN_STREAM, CPU) >= 2**31)


@pytest.mark.parametrize("size", [0, 1, 3, 48, -2, -16])
def test_size_must_be_a_power_of_two(size):
    with pytest.raises(FP4ValueError, match=rf"power of two of at least 2, got {size}"):
        hadamard(randn(2, 48), -1, size)


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("length", [0, 1, 15, 64, 70])
def test_a_short_run_is_padded_with_zeros(size, length):
    x = randn(3, length)
    y = hadamard(x, -1, size, seed(2))
    padded = -(-length // size) * size
    assert y.shape == (3, padded)
    assert torch.equal(y, hadamard(torch.nn.functional.pad(x, (0, padded - length)), -1, size, seed(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_axis_strides_and_dtype(axis, dtype):
    x = randn(5, 20, 33).to(dtype).transpose(0, 2)
    y = hadamard(x, axis, 16, seed(4))
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    assert torch.equal(y, hadamard(x.movedim(axis, -1).contiguous().float(), -1, 16, seed(4)).movedim(-1, axis))


@pytest.mark.parametrize("sign_seed", [None, 1, 2**40])
@pytest.mark.parametrize("size", [2, 16, 64, 128])
def test_cancels_in_a_product(size, sign_seed):
    a, b = randn(7, 200), randn(200, 5, seed=1)
    s = None if sign_seed is None else seed(sign_seed)
    # Per run |<Ha, Hb> - <a, b>| <= 2 * rounding * |a| * |b|, and Cauchy-Schwarz over the runs; the scale
    # adds 2**-23.
    bound = (2 * rounding(size) + 2.0**-23) * a.norm(dim=1).double()[:, None] * b.norm(dim=0).double()
    difference = hadamard(a, 1, size, s).double() @ hadamard(b, 0, size, s).double() - a.double() @ b.double()
    assert (difference.abs() <= bound).all()


def test_the_inverse_is_the_butterflies_then_the_signs():
    x, s = randn(4, 64), signs(64, seed(3), CPU)
    undone = hadamard(hadamard(x, -1, 64, seed(3)) * s, -1, 64, seed(3)) * s
    assert ((undone - x).norm(dim=1) <= 2 * rounding(64) * x.norm(dim=1)).all()


def test_spreads_an_outlier():
    x = torch.zeros(64)
    x[17] = 8.0
    assert hadamard(x, 0, 64).abs().unique().tolist() == [1.0]
