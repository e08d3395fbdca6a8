"""The CPU kernels against the ops' references: bit for bit on every sample and on larger, odder tensors."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.backend import Kernel, No, Yes
from fp4compile.backends.inductor import cpu
from fp4compile.formats import FORMATS, S1P2, Element, Format, ScaleLevel
from fp4compile.ops import OPS
from tests.helpers import left_to_the_reference

KERNELS = {kernel.op: kernel for kernel in cpu.KERNELS}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("hif4", "mxfp4", "nvfp4")
SEED = torch.tensor(2**40 + 17, dtype=torch.int64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
# fp32 sums of the same products in another order: a few units in the last place of a length-K sum.
_MM_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}

pytestmark = pytest.mark.skipif(isinstance(cpu.library(), No), reason="no C compiler")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(op: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an op by name, as the dispatcher hands them to a kernel."""
    bound = inspect.signature(OPS[op].reference).bind(**sample)
    bound.apply_defaults()
    return dict(bound.arguments)


def assert_same(got: Any, expected: Any) -> None:
    """Equal bits; NaN where NaN is expected, whatever its payload."""
    if isinstance(expected, tuple):
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e)
        return
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.is_contiguous()
    if got.is_floating_point():
        assert torch.equal(got.isnan(), expected.isnan())
        nan = expected.isnan()
        got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
    bits = _BITS[got.element_size()]
    assert torch.equal(got.view(bits), expected.contiguous().view(bits))


def check(op: str, **sample: Any) -> None:
    """The kernel takes the sample and agrees with the reference on one thread and on two."""
    given, kernel = arguments(op, sample), KERNELS[op]
    assert kernel.supports(given) == Yes()
    expected = OPS[op].reference(**given)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same(kernel.run(**given), expected)


@pytest.mark.parametrize("kernel", [k for k in cpu.KERNELS if k.op != "mm"], ids=lambda k: k.op)
def test_every_sample_has_the_references_bits(kernel: Kernel) -> None:
    for sample in OPS[kernel.op].samples():
        given = arguments(kernel.op, sample)
        if sample.get("producer") or left_to_the_reference(given):  # a producer: to what compiles the graph around it
            assert isinstance(kernel.supports(given), No)
        elif sample.get("format") in (None, *NAMES):
            check(kernel.op, **sample)


def test_mm_samples_are_within_rounding_of_the_reference() -> None:
    taken = 0
    for sample in OPS["mm"].samples():
        given = arguments("mm", sample)
        if isinstance(KERNELS["mm"].supports(given), Yes):
            taken += 1
            expected = OPS["mm"].reference(**given)
            got = KERNELS["mm"].run(**given)
            assert got.dtype == expected.dtype
            limit = _MM_TOLERANCE[got.dtype]
            torch.testing.assert_close(got, expected, rtol=limit, atol=limit * float(expected.abs().max()))
    assert taken


@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("block_2d", [False, True])
def test_mm_of_few_rows_decodes_the_weight_in_pieces(format: str, block_2d: bool, monkeypatch: Any) -> None:
    if block_2d and FORMATS[format].block_2d is None:
        pytest.skip("no 2-D blocks")
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 1)  # 64 rows at a time
    weight, x = torch.randn(150, 200), torch.randn(2, 3, 200)
    codes, scales = OPS["quantize"].reference(weight, format, 1, block_2d=block_2d)
    given = arguments(
        "mm", {"a": x, "b": codes, "b_scales": scales, "b_format": format, "b_block_2d": block_2d, "k": 200}
    )
    torch.testing.assert_close(KERNELS["mm"].run(**given), OPS["mm"].reference(**given), rtol=1e-5, atol=1e-4)


def large(dtype: torch.dtype) -> Tensor:
    """Enough for two threads and several tiles, ragged, wide in range, a few values not finite."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(141, 261, generator=generator) * torch.randn(141, 1, generator=generator).mul(2).exp()
    x[5, 7], x[130, 250], x[17, 100:200] = float("nan"), float("-inf"), 0.0
    x[40:48] *= 1e-39
    return x.to(dtype)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"rounding": "stochastic", "seed": SEED, "stream": 2**32 - 1, "scale_rule": "truncation-free"},
    {"hadamard": 32, "sign_seed": SEED},
    {"hadamard": 128, "rounding": "stochastic", "seed": SEED},
    {"hadamard": 512},
    {"block_2d": True},
    {"block_2d": True, "hadamard": 16},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_large_tensors(format: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    if options.get("block_2d") and FORMATS[format].block_2d is None:
        pytest.skip("no 2-D blocks")
    x = large(dtype)
    scale = OPS["tensor_scale"].reference(x, format) if FORMATS[format].has_tensor_scale else None
    for axis in (0, 1):
        sample = {"x": x, "format": format, "axis": axis, "tensor_scale": scale, **options}
        check("fake_quantize", **sample)
        check("quantize", **sample)
        if "hadamard" in options:
            check("hadamard", x=x, axis=axis, size=options["hadamard"], seed=options.get("sign_seed"))
            continue
        codes, scales = OPS["quantize"].reference(**sample)
        square = options.get("block_2d", False)
        check("dequantize", codes=codes, scales=scales, tensor_scale=scale, format=format, axis=axis,
              size=x.shape[axis], block_2d=square, dtype=dtype)  # fmt: skip


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second column": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "flipped into four axes": lambda x: x[:140, :260].reshape(5, 28, 10, 26).permute(2, 0, 3, 1),
    "three axes": lambda x: x[:140].reshape(10, 14, 261).transpose(0, 2),
    "expanded": lambda x: x[:, :1].expand(141, 70),
    "offset": lambda x: x[3:, 5:],
    "narrow": lambda x: x[:, :260].reshape(141, 130, 2),
    "vector": lambda x: x[0],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(view: Any) -> None:
    x = view(large(torch.bfloat16))
    check("tensor_scale", x=x, format="nvfp4")
    for format in NAMES:
        for axis in range(x.dim()):
            check("fake_quantize", x=x, format=format, axis=axis)
            if FORMATS[format].block_2d and axis >= x.dim() - 2 >= 0:
                check("quantize", x=x, format=format, axis=axis, block_2d=True, hadamard=4)
    check("quantize", x=x, format="mxfp4", axis=-1, rounding="stochastic", seed=SEED)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_every_stored_byte_decodes_alike(format: str) -> None:
    block = FORMATS[format].block
    scales = torch.arange(256, dtype=torch.uint8).reshape(256, 1)
    codes = torch.arange(block // 2, dtype=torch.uint8).repeat(256, 1) * 17 + 8
    for dtype in DTYPES:
        check("dequantize", codes=codes, scales=scales, tensor_scale=None, format=format, axis=1, size=block,
              block_2d=False, dtype=dtype)  # fmt: skip


@pytest.mark.parametrize("value", [2.0**-126, 2.0**-122, 2.0**-121, 1e30])
def test_extreme_tensor_scales(value: float) -> None:
    x = torch.tensor([0.0, 1e-38, 1e-30, 1.0, 3e38]).repeat(20).reshape(4, 25)
    for rounding in ("nearest", "stochastic"):
        sample = {"x": x, "tensor_scale": torch.tensor(value), "rounding": rounding, "seed": SEED}
        check("fake_quantize", format="nvfp4", axis=-1, **sample)
    check("tensor_scale", x=x[:, :2] * 1e-5, format="nvfp4")


@pytest.mark.parametrize("shape", [(0, 15, 16), (8, 0, 33, 8), (3, 5, 0), (4, 3, 0, 5)])
def test_no_elements_in_any_layout(shape: tuple[int, ...]) -> None:
    """Their strides may be anything, and `contiguous` leaves them so."""
    for axis in range(len(shape)):
        for turned in (torch.empty(shape), torch.empty(shape[::-1]).permute(*range(len(shape))[::-1])):
            check("fake_quantize", x=turned, format="hif4", axis=axis)
            check("quantize", x=turned, format="mxfp4", axis=axis, hadamard=32)
            check("hadamard", x=turned, axis=axis, size=16)
    gap = torch.empty_strided((0, 15, 15), (15, 1, 15))
    check("fake_quantize", x=gap, format="nvfp4", axis=0)


def test_flush_to_zero_of_the_caller_changes_nothing() -> None:
    """Inductor's loops and users may set it per thread; subnormal inputs must still reach their codes."""
    x = torch.randn(64, 1024) * 1e-39
    expected = OPS["fake_quantize"].reference(x, "mxfp4", -1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = cpu.fake_quantize(**arguments("fake_quantize", {"x": x, "format": "mxfp4", "axis": -1}))
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, expected)


CUSTOM = {
    "e8m0 over 16, even steps": Format(
        "cpu_test_a", S1P2, (ScaleLevel("e8m0", 16),), torch.uint8,
        ("floor", "ceil", "even", "rceil", "truncation-free"), {"truncation-free": "rceil"}, 16, "",
    ),
    "e4m3 over 128": Format(
        "cpu_test_b", FORMATS["nvfp4"].element, (ScaleLevel("e4m3", 128),), torch.uint8,
        ("nearest", "truncation-free"), {}, None, "",
    ),
}  # fmt: skip
DECLINED = {
    "element": Format(
        "cpu_test_c", Element("odd", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0), "even"),
        (ScaleLevel("e8m0", 32),), torch.uint8,
        ("floor", "truncation-free"), {"truncation-free": "rceil"}, None, "",
    ),
    "power of two": Format(
        "cpu_test_d", S1P2, (ScaleLevel("e4m3", 48),), torch.uint8,
        ("nearest", "truncation-free"), {}, None, "",
    ),
}  # fmt: skip


@pytest.fixture
def added(request: pytest.FixtureRequest, monkeypatch: Any) -> Iterator[Format]:
    """A format that is registered for one test."""
    monkeypatch.setattr(FORMATS, "_rows", {**FORMATS._rows, request.param.name: request.param})
    yield request.param
    cpu._known.cache_clear()
    cpu._fields.cache_clear()


@pytest.mark.parametrize("added", CUSTOM.values(), ids=CUSTOM, indirect=True)
def test_other_rows_of_the_format_table(added: Format) -> None:
    x = large(torch.float32)
    for axis in (0, 1):
        for rule in added.scale_rules:
            check("fake_quantize", x=x, format=added.name, axis=axis, scale_rule=rule)
            stochastic = {"rounding": "stochastic", "seed": SEED, "scale_rule": rule}
            check("quantize", x=x, format=added.name, axis=axis, **stochastic)


@pytest.mark.parametrize("added", DECLINED.values(), ids=DECLINED, indirect=True)
def test_declines_a_format_it_cannot_round(added: Format) -> None:
    given = arguments("quantize", {"x": torch.ones(4, 64), "format": added.name, "axis": 1})
    answer = KERNELS["quantize"].supports(given)
    assert isinstance(answer, No)


def test_declines_say_why() -> None:
    cases = {
        "float64": {"x": torch.ones(2, 64, dtype=torch.float64)},
        "seed": {"x": torch.ones(2, 64), "rounding": "stochastic"},
        "power of two": {"x": torch.ones(2, 64), "hadamard": 48},
        "scale rule 'gaussian'": {"x": torch.ones(2, 64), "format": "mxfp4", "scale_rule": "gaussian"},
        "rounding 'eden'": {"x": torch.ones(2, 64), "format": "nvfp4", "rounding": "eden"},
        "2-D": {"x": torch.ones(2, 64), "block_2d": True},
        "not on the CPU": {"x": torch.ones(2, 64, device="meta")},
    }
    for word, sample in cases.items():
        answer = KERNELS["quantize"].supports(arguments("quantize", {"format": "hif4", "axis": 1, **sample}))
        assert isinstance(answer, No)
        assert word in answer.reason


def test_no_compiler_is_an_answer(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu, "_built", None)
    answer = KERNELS["hadamard"].supports(arguments("hadamard", {"x": torch.ones(64), "axis": 0, "size": 2}))
    assert isinstance(answer, No)
    assert "no C compiler found" in answer.reason


def test_a_broken_compiler_is_an_answer(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer = cpu._build()
    assert isinstance(answer, No)
    assert "could not build" in answer.reason
    assert not list((tmp_path / "fp4compile").iterdir())


def test_two_processes_build_at_once(tmp_path: Path) -> None:
    code = "from fp4compile.backends.inductor import cpu; assert cpu.library().fp4_run"
    root = Path(cpu.__file__).resolve().parents[2]
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(2)]
    assert [p.wait(timeout=300) for p in running] == [0, 0]
    built = list((tmp_path / "fp4compile").iterdir())
    assert len(built) == 1
    assert built[0].suffix == ".so"


def openmp_runtimes() -> set[str]:
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    return {f for f in files if "libgomp" in f or "libomp" in f or "libiomp" in f}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_kernels_bring_no_openmp_runtime_and_no_threads_of_their_own() -> None:
    torch.set_num_threads(2)
    x = torch.randn(1024, 1024)
    before = len(os.listdir("/proc/self/task"))
    (x @ x).add(1)
    with_torch, runtimes = len(os.listdir("/proc/self/task")), openmp_runtimes()
    check("fake_quantize", x=x, format="hif4", axis=0)
    assert len(os.listdir("/proc/self/task")) <= max(before, with_torch)
    assert openmp_runtimes() == runtimes
