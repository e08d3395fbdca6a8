"""GEMMs under tensor scales: what cuBLAS is told, read back from the memory it is pointed to, and what it returns."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.backend import No
from fp4compile.backends.triton import gemm
from fp4compile.ops import OPS
from tests.gpu import needs_gpu
from tests.helpers import randn

_BY_NUMBER = {number: dtype for dtype, number in gemm._DTYPES.items()}


def arguments(a: Tensor, b: Tensor, **options: Any) -> dict[str, Any]:
    bound = OPS["mm"].signature.bind(a, b, **options)
    bound.apply_defaults()
    return dict(bound.arguments)


def operand(rows: int, columns: int, layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, columns]: contiguous, transposed, a slice of a wider matrix, or in no order that cuBLAS reads."""
    made = {
        "rows": lambda: randn(rows, columns, seed=seed),
        "columns": lambda: randn(columns, rows, seed=seed).t(),
        "slice": lambda: randn(rows, columns + 3, seed=seed)[:, :columns],
        "every second": lambda: randn(rows, 2 * columns, seed=seed)[:, ::2],
    }[layout]()
    moved = torch.empty_strided(made.shape, made.stride(), dtype=dtype)
    return moved.copy_(made)


LAYOUTS = ("rows", "columns", "slice", "every second")
SCALE, OTHER = torch.tensor(0.37), torch.tensor(3.0)
OPTIONS: dict[str, Mapping[str, Any]] = {
    "both scales": {"a_tensor_scale": SCALE, "b_tensor_scale": OTHER},
    "one scale": {"b_tensor_scale": OTHER},
    "no scale": {},
    "bias": {"a_tensor_scale": SCALE, "bias": randn(24, seed=3)},
    "fp32": {"a_tensor_scale": SCALE, "dtype": torch.float32},
    "fp16": {"a_tensor_scale": SCALE, "dtype": torch.float16},
}


def assert_rounded_once(got: Tensor, given: Mapping[str, Any]) -> None:
    """The fp32 result, off by its order of sums, rounded to the result's dtype."""
    exact = OPS["mm"].reference(**{**given, "dtype": torch.float32})
    assert got.dtype == (given["dtype"] or given["a"].dtype)
    tolerance = max(torch.finfo(got.dtype).eps / 2, 2e-6)
    torch.testing.assert_close(got.float(), exact, rtol=tolerance * 1.01, atol=1e-5)


def _read(address: int, number: int, rows: int, columns: int, stride: int) -> Tensor:
    """The matrix that lies there by columns."""
    dtype = _BY_NUMBER[number]
    count = stride * (columns - 1) + rows
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (1, stride))


class Cublas:
    """cublasGemmEx as its documentation words it, on host memory."""

    def __init__(self) -> None:
        self.pointer_mode, self.math_mode = 0, 5
        self.status = self.status_of_mode = 0
        self.zeros: list[int] = []

    def cublasSetPointerMode_v2(self, handle: int, mode: int) -> int:
        self.pointer_mode = mode
        return self.status_of_mode if mode else 0

    def cublasGetMathMode(self, handle: int, mode: ctypes.c_int) -> int:
        mode.value = self.math_mode
        return 0

    def cublasSetMathMode(self, handle: int, mode: int) -> int:
        self.math_mode = mode
        return 0

    def cublasGemmEx(self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int,
                     a_type: int, lda: int, b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int,
                     compute: int, algorithm: int) -> int:  # fmt: skip
        assert (self.pointer_mode, self.math_mode, compute) == (1, 16, 68)
        left = _read(a, a_type, k, m, lda).t() if transa else _read(a, a_type, m, k, lda)
        right = _read(b, b_type, n, k, ldb).t() if transb else _read(b, b_type, k, n, ldb)
        scale, rest = (_read(address, 0, 1, 1, 1) for address in (alpha, beta))
        assert rest.item() == 0
        self.zeros.append(beta)
        _read(c, c_type, m, n, ldc).copy_(scale * (left.float() @ right.float()))
        return self.status


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Cublas:
    found = Cublas()
    monkeypatch.setattr(gemm, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 0)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_layouts_are_read_in_place(cublas: Cublas, a_layout: str, b_layout: str, dtype: torch.dtype) -> None:
    a, b = operand(5, 16, a_layout, dtype, 0), operand(16, 24, b_layout, dtype, 1)
    given = arguments(a, b, a_tensor_scale=SCALE, b_tensor_scale=OTHER)
    assert_rounded_once(gemm.mm(**given), given)
    assert (cublas.pointer_mode, cublas.math_mode) == (0, 5)
    for x, layout in ((a, a_layout), (b, b_layout)):
        assert (gemm._matrix(x)[0] is x) == (layout != "every second")


def test_the_zero_is_made_once(cublas: Cublas) -> None:
    a, b = operand(5, 16, "rows", torch.bfloat16, 0), operand(16, 24, "rows", torch.bfloat16, 1)
    gemm.mm(**arguments(a, b, a_tensor_scale=SCALE))
    gemm.mm(**arguments(a, b, b_tensor_scale=OTHER))
    assert cublas.zeros == [gemm._ZEROS[a.device].data_ptr()] * 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("m", "n", "k"), [(5, 24, 16), (1, 24, 1), (0, 24, 16), (5, 24, 0)])
@pytest.mark.usefixtures("cublas")
def test_scales_bias_and_dtypes(m: int, n: int, k: int, options: Mapping[str, Any]) -> None:
    given = arguments(randn(m, k).bfloat16(), randn(k, n, seed=1).bfloat16(), **options)
    assert_rounded_once(gemm.mm(**given), given)


def test_a_status_is_an_error_and_modes_are_put_back(cublas: Cublas) -> None:
    cublas.status = 7
    given = arguments(randn(2, 3).bfloat16(), randn(3, 4).bfloat16())
    with pytest.raises(RuntimeError, match="cublasGemmEx returned status 7"):
        gemm.mm(**given)
    assert (cublas.pointer_mode, cublas.math_mode) == (0, 5)


def test_modes_are_put_back_where_one_is_refused(cublas: Cublas) -> None:
    cublas.status_of_mode = 7
    given = arguments(randn(2, 3).bfloat16(), randn(3, 4).bfloat16())
    with pytest.raises(RuntimeError, match="cublasSetPointerMode_v2 returned status 7"):
        gemm.mm(**given)
    assert (cublas.pointer_mode, cublas.math_mode) == (0, 5)


@pytest.mark.usefixtures("cublas")
def test_a_scale_of_one_is_fp32_whatever_the_default_dtype() -> None:
    given = arguments(randn(5, 16).bfloat16(), randn(16, 24, seed=1).bfloat16())
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = gemm.mm(**given)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_rounded_once(got, given)


DECLINED = {
    "packed": {"a_format": "nvfp4"},
    "3 and 2 dimensions": {"a": torch.ones(1, 2, 3, dtype=torch.bfloat16)},
    "not both bf16": {"a": torch.ones(2, 3)},
    "one fp32 number": {"a_tensor_scale": torch.ones(2)},
}


@pytest.mark.parametrize(("word", "changed"), DECLINED.items(), ids=DECLINED)
def test_declines_say_why(word: str, changed: Mapping[str, Any]) -> None:
    given = arguments(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16))
    assert gemm.dense_operands(given) is None
    reason = gemm.dense_operands({**given, **changed})
    assert reason is not None
    assert word in reason


def test_without_torchs_cublas_the_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm.ctypes, "CDLL", lambda path: SimpleNamespace())
    gemm.library.cache_clear()
    try:
        assert isinstance(gemm.library(), No)
        assert "cuBLAS cannot be called" in (gemm.available({}) or "")
    finally:
        gemm.library.cache_clear()


def on_gpu(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments on the GPU, with the strides that they have."""

    def moved(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)

    return {k: moved(v) if isinstance(v, Tensor) else v for k, v in given.items()}


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("b_layout", LAYOUTS)
    @pytest.mark.parametrize("a_layout", LAYOUTS)
    def test_layouts(self, a_layout: str, b_layout: str) -> None:
        a, b = operand(300, 136, a_layout, torch.bfloat16, 0), operand(136, 24, b_layout, torch.bfloat16, 1)
        given = arguments(a, b, a_tensor_scale=SCALE, b_tensor_scale=OTHER)
        assert_rounded_once(gemm.mm(**on_gpu(given)).cpu(), given)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(self, options: Mapping[str, Any]) -> None:
        given = arguments(randn(40, 64).bfloat16(), randn(64, 24, seed=1).bfloat16(), **options)
        assert_rounded_once(gemm.mm(**on_gpu(given)).cpu(), given)

    def test_in_a_cuda_graph(self) -> None:
        a, b, scale = randn(64, 64).bfloat16().cuda(), randn(64, 32).bfloat16().cuda(), SCALE.cuda()
        given = arguments(a, b, a_tensor_scale=scale, b_tensor_scale=scale)
        expected = gemm.mm(**given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = gemm.mm(**given)
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
        scale.mul_(2)
        graph.replay()
        assert torch.equal(y, gemm.mm(**given))
