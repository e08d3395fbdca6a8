"""The Triton kernels against the ops' references: on a GPU, in Triton's interpreter, and compiled for a GPU.

Without a GPU the interpreter runs some of the ops' samples, that of PTX some as they are compiled for sm_90, and
every kind of kernel is compiled. Without Triton what is left is that each kernel says so.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile.backend import Answer, Kernel, No, Yes
from fp4compile.backends import triton as table
from fp4compile.backends.checks import SCALE_RULES
from fp4compile.backends.triton import codec, launch, replay
from fp4compile.backends.triton.replay import Plan
from fp4compile.formats import E2M1, FORMATS, S1P2, Element, Format, ScaleLevel
from fp4compile.ops import OPS
from fp4compile.producer import FUNCTIONS
from tests.gpu import ROOT, SM_90, SM_100, compiled, interpret_apart, needs_gpu, needs_triton, run_compiled
from tests.helpers import left_to_the_reference

CODECS = (
    "fake_quantize",
    "fake_quantize_both",
    "fake_quantize_each",
    "quantize",
    "dequantize",
    "tensor_scale",
    "tensor_scale_both",
    "tensor_scale_each",
)
KERNELS = {kernel.op: kernel for kernel in table.KERNELS if kernel.op in CODECS}
NAMES = ("hif4", "mxfp4", "nvfp4")
SEED = torch.tensor(2**40 + 17, dtype=torch.int64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def arguments(op: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of an op by name, as the dispatcher hands them to a kernel."""
    bound = inspect.signature(OPS[op].reference).bind(**sample)
    bound.apply_defaults()
    return dict(bound.arguments)


def moved(sample: Mapping[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.items()}


def assert_same(got: Any, expected: Any) -> None:
    """Equal bits; NaN where NaN is expected, whatever its payload."""
    if isinstance(expected, tuple | list):
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e)
        return
    got = got.cpu()
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert got.is_contiguous()
    assert torch.equal(got.isnan(), expected.isnan())
    bits, number = _BITS[got.element_size()], ~expected.isnan()
    assert torch.equal(got.view(bits)[number], expected.contiguous().view(bits)[number])


def samples(op: str, format: str | None = None) -> Iterator[Mapping[str, Any]]:
    """The op's samples of the built-in formats that kernels have."""
    wanted = NAMES if format is None else (format,)
    found = (sample for sample in OPS[op].samples() if sample["format"] in wanted)
    return (sample for sample in found if not left_to_the_reference(arguments(op, sample)))


def check(op: str, **sample: Any) -> None:
    """The kernel takes the sample on the GPU and agrees with the reference on the CPU."""
    given = arguments(op, sample)
    on_gpu = moved(given, "cuda")
    answer = KERNELS[op].supports(on_gpu)
    assert answer == Yes() or "two kernels are as fast" in answer.reason
    assert_same(KERNELS[op].run(**on_gpu), OPS[op].reference(**given))


class TestOnGpu:
    pytestmark = needs_gpu

    # In parts, so that several processes can share the compiling.
    @pytest.mark.parametrize("part", range(6))
    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("op", KERNELS)
    def test_every_sample_has_the_references_bits(self, op: str, format: str, part: int) -> None:
        for sample in islice(samples(op, format), part, None, 6):
            check(op, **sample)

    @pytest.mark.parametrize("options", range(8))
    @pytest.mark.parametrize("format", NAMES)
    def test_large_tensors(self, format: str, options: int) -> None:
        chosen, dtype = OPTIONS[options], codec.DTYPES[(options + NAMES.index(format)) % 3]
        if chosen.get("block_2d") and FORMATS[format].block_2d is None:
            pytest.skip("no 2-D blocks")
        for x in large(dtype):
            scale = OPS["tensor_scale"].reference(x, format) if FORMATS[format].has_tensor_scale else None
            for axis in (x.dim() - 2, x.dim() - 1):
                sample = {"x": x, "format": format, "axis": axis, "tensor_scale": scale, **chosen}
                check("fake_quantize", **sample)
                check("quantize", **sample)
                if "hadamard" in chosen:
                    continue
                codes, scales = OPS["quantize"].reference(**sample)
                packed = {"codes": codes, "scales": scales, "tensor_scale": scale, "format": format, "axis": axis}
                square = chosen.get("block_2d", False)
                check("dequantize", **packed, size=x.shape[axis], block_2d=square, dtype=dtype)

    @pytest.mark.parametrize("options", range(4))
    @pytest.mark.parametrize("format", NAMES)
    def test_both_axes_of_large_matrices(self, format: str, options: int) -> None:
        for x in large(codec.DTYPES[options % 3]):
            if x.dim() == 2:
                scale = OPS["tensor_scale"].reference(x, format) if FORMATS[format].has_tensor_scale else None
                scales = {"tensor_scale_0": scale, "tensor_scale_1": scale}
                check("fake_quantize_both", x=x, format=format, scale_rule=None, **scales, **BOTH_OPTIONS[options])

    def test_every_stored_scale_decodes_alike(self) -> None:
        for format, count in (("mxfp4", 256), ("nvfp4", 256), ("hif4", 4096)):
            fmt = FORMATS[format]
            scales = torch.arange(count).mul(1 if count == 256 else 1048575).to(torch.int32).to(fmt.scale_dtype)
            codes = torch.arange(0, 256).to(torch.uint8).repeat(count)[: count * fmt.block // 2]
            packed = {"codes": codes.view(count, -1), "scales": scales[:, None], "tensor_scale": None}
            for dtype in codec.DTYPES:
                options = {"format": format, "axis": 1, "size": fmt.block, "block_2d": False, "dtype": dtype}
                check("dequantize", **packed, **options)

    @pytest.mark.parametrize("format", NAMES)
    def test_every_bf16_value_rounds_alike(self, format: str) -> None:
        x = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.bfloat16)
        lanes = torch.stack((x, x.roll(1), torch.full_like(x, 3.0)), dim=1).repeat_interleave(22, 1)[:, :64]
        for rule in SCALE_RULES[FORMATS[format].levels[0].dtype]:
            check("quantize", x=lanes.contiguous(), format=format, axis=1, scale_rule=rule)

    def test_more_than_2_31_elements(self) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < 14 * 2**30:
            pytest.skip("needs 14 GiB of GPU memory")
        x = torch.zeros(2**16 + 64, 2**15, dtype=torch.bfloat16, device="cuda")
        x[-64:, -64:] = torch.randn(64, 64).to("cuda", torch.bfloat16)
        for axis in (0, 1):
            y = KERNELS["fake_quantize"].run(**arguments("fake_quantize", {"x": x, "format": "mxfp4", "axis": axis}))
            expected = OPS["fake_quantize"].reference(x[-64:, -64:].cpu(), "mxfp4", axis)
            assert_same(y[-64:, -64:].contiguous(), expected)
            del y

    def test_the_ops_run_the_kernels(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fp4compile

        ran: list[str] = []
        run = replay.run
        monkeypatch.setattr(replay, "run", lambda each, *rest: (ran.append(each.kernel), run(each, *rest)))
        x = torch.randn(61, 77)  # of this size for the first time: later calls are replayed
        got = fp4compile.fake_quantize(x.cuda(), "nvfp4", axis=0)
        assert_same(got, fp4compile.fake_quantize(x, "nvfp4", axis=0))
        assert ran == ["amax", "tensor_scale", "fake_quantize"]

    @pytest.mark.parametrize("added", range(2))
    def test_other_rows_of_the_format_table(self, added: int, monkeypatch: pytest.MonkeyPatch) -> None:
        fmt = list(CUSTOM.values())[added]
        monkeypatch.setattr(FORMATS, "_rows", {**FORMATS._rows, fmt.name: fmt})
        x = next(large(torch.float32))
        for axis in (0, 1):
            for rule in SCALE_RULES[fmt.levels[0].dtype]:
                check("fake_quantize", x=x, format=fmt.name, axis=axis, scale_rule=rule)
                stochastic = {"rounding": "stochastic", "seed": SEED, "scale_rule": rule}
                check("quantize", x=x, format=fmt.name, axis=axis, **stochastic)


BOTH_OPTIONS: tuple[dict[str, Any], ...] = (
    {"rounding": ["nearest"] * 2, "stream": [0, 0], "hadamard": [0, 0], "block_2d": [False] * 2},
    {"rounding": ["nearest"] * 2, "stream": [0, 0], "hadamard": [64, 64], "block_2d": [False] * 2},
    {
        "rounding": ["stochastic"] * 2,
        "stream": [2**32 - 1, 4],
        "seed": SEED,
        "hadamard": [16, 0],
        "block_2d": [False] * 2,
    },
    {
        "rounding": ["nearest", "stochastic"],
        "stream": [5, 6],
        "seed": SEED,
        "hadamard": [0, 128],
        "block_2d": [False] * 2,
    },
)
NEAREST = {"rounding": ["nearest"] * 2, "stream": [0, 0], "hadamard": [0, 0], "block_2d": [False] * 2}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"scale_rule": "truncation-free"},
    {"rounding": "stochastic", "seed": SEED, "stream": 2**32 - 1, "scale_rule": "truncation-free"},
    {"rounding": "stochastic", "seed": SEED, "stream": 3},
    {"hadamard": 32, "sign_seed": SEED},
    {"hadamard": 128, "rounding": "stochastic", "seed": SEED},
    {"block_2d": True},
    {"block_2d": True, "hadamard": 16, "rounding": "stochastic", "seed": SEED},
)


def large(dtype: torch.dtype) -> Iterator[Tensor]:
    """Several tiles, wide in range, a few values not finite: ragged, whole, and in batches."""
    for shape in ((141, 261), (192, 384), (3, 65, 72)):
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(shape, generator=generator)
        x *= torch.randn(*shape[:-1], 1, generator=generator).mul(2).exp()
        flat = x.flatten(0, -2)
        flat[5, 7], flat[130, 60], flat[17, 20:70] = float("nan"), float("-inf"), 0.0
        flat[40:48] *= 1e-39
        yield x.to(dtype)


# --- without a GPU ---------------------------------------------------------------------------------------------------


def check_interpreted(op: str, sample: Mapping[str, Any]) -> None:
    """The kernel on CPU tensors; only where Triton was imported with TRITON_INTERPRET=1."""
    # The interpreter cuts fp32 to bf16 instead of rounding it, and flushes what is subnormal in bf16.
    wide = {k: v.float() if isinstance(v, Tensor) and v.dtype == torch.bfloat16 else v for k, v in sample.items()}
    given = {k: torch.float32 if v is torch.bfloat16 else v for k, v in arguments(op, wide).items()}
    assert_same(KERNELS[op].run(**given), OPS[op].reference(**given))


def interpret(every: int) -> None:
    """Every n-th sample of every op."""
    for number, op in enumerate(KERNELS):
        for sample in islice(samples(op), number, None, every):
            check_interpreted(op, sample)


@needs_triton
def test_the_interpreter_has_the_references_bits() -> None:
    interpret_apart(__name__, 61)


@needs_triton
@pytest.mark.slow
def test_the_interpreter_has_the_references_bits_on_every_sample() -> None:
    interpret_apart(__name__, 1)


def assert_compiled_agrees(
    kernel: Kernel, samples: Iterable[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's launches are run as PTX, on CPU tensors."""
    monkeypatch.setattr(replay, "run", run_compiled)
    for sample in samples:
        given = arguments(kernel.op, sample)
        assert_same(kernel.run(**given), OPS[kernel.op].reference(**given))


@needs_triton
@pytest.mark.parametrize("op", KERNELS)
def test_what_is_compiled_has_the_references_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = islice(samples(op), list(KERNELS).index(op), None, 75)
    assert_compiled_agrees(KERNELS[op], some, monkeypatch)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("op", KERNELS)
def test_what_is_compiled_has_the_references_bits_on_more_samples(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = islice(samples(op), list(KERNELS).index(op), None, 4)
    assert_compiled_agrees(KERNELS[op], some, monkeypatch)


Planned = tuple[launch.Launch, dict[str, Any]]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def quantizing(x: Tensor, format: str, axis: int, **options: Any) -> list[Planned]:
    """The launches of `fake_quantize` and `quantize`, on tensors without data."""
    scale = meta(dtype=torch.float32) if FORMATS[format].has_tensor_scale else None
    sample = moved({"x": x, "format": format, "axis": axis, "tensor_scale": scale, **options}, "meta")
    fake, packed = arguments("fake_quantize", sample), arguments("quantize", sample)
    return [*codec.plan_fake_quantize(**fake)[0], *codec.plan_quantize(**packed)[0]]


def both(x: Tensor, format: str, **options: Any) -> list[Planned]:
    """The launches of `fake_quantize_both`."""
    scale = meta(dtype=torch.float32) if FORMATS[format].has_tensor_scale else None
    given = moved({**NEAREST, "tensor_scale_0": scale, "tensor_scale_1": scale, **options}, "meta")
    sample = {"x": x, "format": format, "scale_rule": None, **given}
    return list(codec.plan_fake_quantize_both(**arguments("fake_quantize_both", sample))[0])


def each(format: str, axis: int) -> list[Planned]:
    """The launch of `fake_quantize_each` of two products in rows, of three in columns."""
    results = 2 if axis else 3
    scale = meta(dtype=torch.float32) if FORMATS[format].has_tensor_scale else None
    scales = {f"tensor_scale_{i}": scale for i in range(results)}
    products = "full full: t0 = mul.bfloat16(a0, a1); t1 = mul.bfloat16(a0, t0); t2 = mul.bfloat16(a1, a1) -> "
    names = " ".join(f"t{i}" for i in range(results))
    sample = {"x": meta(256, 512), "p1": meta(256, 512), "format": format, "axis": axis, "producer": products + names}
    sample |= scales
    return list(codec.plan_fake_quantize_each(**arguments("fake_quantize_each", sample))[0])


def decoding(format: str, axis: int) -> list[Planned]:
    codes, scales = OPS["quantize"].fake(meta(256, 512), format, axis)
    return list(codec.plan_dequantize(codes, scales, None, format, axis, (256, 512)[axis], False, torch.bfloat16)[0])


def scaling(axis: int, hadamard: int, plan: Plan = codec.plan_tensor_scale) -> list[Planned]:
    return [(launch, dict(given)) for launch, given in plan(meta(256, 512), "nvfp4", axis, hadamard, None)[0]]


COMPILED: dict[str, Callable[[], list[Planned]]] = {
    "hif4 rows": lambda: quantizing(meta(256, 512), "hif4", 1),
    "hif4 columns": lambda: quantizing(meta(256, 512), "hif4", 0, **OPTIONS[2]),
    "mxfp4 columns": lambda: quantizing(meta(256, 512, dtype=torch.float32), "mxfp4", 0),
    "mxfp4 rows, ragged": lambda: quantizing(meta(3, 70, dtype=torch.float16), "mxfp4", 1, **OPTIONS[3]),
    "nvfp4 rows, Hadamard": lambda: quantizing(meta(256, 512), "nvfp4", 1, hadamard=16),
    "nvfp4 squares": lambda: quantizing(meta(256, 512), "nvfp4", 0, block_2d=True),
    "hif4 both": lambda: both(meta(256, 512), "hif4"),
    "nvfp4 both": lambda: both(meta(256, 512), "nvfp4", hadamard=[16, 0]),
    "hif4 each of columns": lambda: each("hif4", 0),
    "nvfp4 each of rows": lambda: each("nvfp4", 1),
    "decoding": lambda: [*decoding("hif4", 1), *decoding("nvfp4", 0)],
    "tensor scale": lambda: [*scaling(0, 0), *scaling(0, 16)],
    "tensor scales": lambda: [
        *scaling(0, 16, codec.plan_tensor_scale_both),
        *scaling(1, 16, codec.plan_tensor_scale_both),
    ],
    "64-bit offsets": lambda: quantizing(meta(2**16 + 64, 2**15), "mxfp4", 0)[:1],
}


def assert_exact(ptx: str) -> None:
    """No approximate division, nothing that flushes subnormal numbers."""
    for inexact in ("div.full", "div.approx", "rcp.approx", "mul.ftz", "add.ftz"):
        assert inexact not in ptx


def assert_compiles_exactly(launches: list[Planned], capability: int) -> None:
    for planned, given in launches:
        ptx = compiled(planned, given, capability)
        assert_exact(ptx)
        # What names its rounding is not contracted: fused multiply-adds are those that are written.
        assert not re.search(r"\b(mul|add|sub)\.f32", ptx)
        # Maxima keep NaN.
        assert "TOP" not in planned.constants or planned.kernel == "tensor_scale" or "max.NaN.f32" in ptx


@needs_triton
@pytest.mark.parametrize("launches", COMPILED.values(), ids=COMPILED)
def test_compiles_for_sm_90_without_approximations(launches: Callable[[], list[Planned]]) -> None:
    assert_compiles_exactly(launches(), SM_90)


def fused(x: Any, y: Any, z: Any) -> Any:
    """x y + z rounded once, for sums that 64 significant bits hold: all of those below."""
    return (x.astype(np.longdouble) * y + z).astype(np.float32)


@pytest.mark.slow
@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="no wide floating-point numbers")
@pytest.mark.parametrize("divisor", [n / 8 for n in range(8, 16)])
def test_one_correction_divides_by_numbers_of_few_bits(divisor: float) -> None:
    """The steps of `_quotient` for every mantissa of E4M3, which those of E6M2 and of the largest elements are too, and
    all of fp32: Triton's interpreter has no fused multiply-add."""
    a = (torch.arange(2**23, dtype=torch.int32) + 0x3F800000).view(torch.float32).numpy()
    b, one = np.full(1, divisor, np.float32), np.ones(1, np.float32)
    newton = (np.int32(0x7EF311C7) - b.view(np.int32)).view(np.float32)
    for _ in range(2):
        newton = fused(newton, fused(-b, newton, one), newton)
    for reciprocal in (newton, one / b):
        q = a * reciprocal
        assert (fused(fused(-q, b, a), reciprocal, q) == a / b).all()


def assert_stays_in_registers(planned: launch.Launch, given: Mapping[str, Any], elements: int) -> None:
    """Threads exchange fewer words than each holds elements: a few maxima. How Triton lays a tile out, on which that
    depends, has changed between its releases."""
    ptx = compiled(planned, given)
    assert ptx.count("shfl.sync") + ptx.count("st.shared") < elements // (32 * planned.num_warps)


@needs_triton
@pytest.mark.parametrize("format", NAMES)
def test_columns_stay_in_registers(format: str) -> None:
    x = meta(8192, 14336)
    for planned, given in codec.plan_fake_quantize(**_fake(format, 0, x))[0]:
        assert_stays_in_registers(planned, given, planned.constants["L"] * planned.constants["K"])
    for planned, given in both(x, format):
        assert_stays_in_registers(planned, given, planned.constants["ROWS"] * planned.constants["COLUMNS"])
    for planned, given in each(format, 0):
        assert_stays_in_registers(planned, given, 3 * planned.constants["L"] * planned.constants["K"])


@needs_triton
@pytest.mark.parametrize("name", ["hif4 rows", "mxfp4 columns", "nvfp4 squares", "hif4 both", "decoding"])
def test_compiles_for_sm_100_without_approximations(name: str) -> None:
    """Compiled only: not run on hardware."""
    assert_compiles_exactly(COMPILED[name](), SM_100)


SWIGLU = (
    "full full: t0 = cast.float32(a0); t1 = neg.float32(t0); t2 = exp.float32(t1); t3 = add.float32(t2, 1.0); "
    "t4 = div.float32(t0, t3); t5 = cast.bfloat16(t4); t6 = mul.bfloat16(t5, a1)"
)
# gate, up and the gradient -> those of gate and of up, and what the SwiGLU made of both.
SWIGLU_BACKWARD = (
    "full full full: t0 = cast.float32(a0); t1 = neg.float32(t0); t2 = exp.float32(t1); t3 = add.float32(t2, 1.0); "
    "t4 = div.float32(t0, t3); t5 = cast.bfloat16(t4); t6 = mul.bfloat16(a2, t5); t7 = mul.bfloat16(a2, a1); "
    "t8 = cast.float32(t7); t9 = sigmoid.float32(t0); t10 = mul.float32(t8, t9); t11 = sub.float32(1.0, t9); "
    "t12 = mul.float32(t0, t11); t13 = add.float32(t12, 1.0); t14 = mul.float32(t10, t13); t15 = cast.bfloat16(t14); "
    "t16 = mul.bfloat16(t5, a1) -> t15 t6 t16"
)
EVERY = (
    "full row column scalar: t0 = add.float32(a0, a1); t1 = mul.float32(t0, a2); t2 = sub.float32(a3, t1); "
    + "; ".join(
        f"t{i} = {name}.float32(t{i - 1})"
        for i, name in enumerate(sorted(name for name, f in FUNCTIONS.items() if f.arity == 1), 3)
    )
)


@needs_triton
@pytest.mark.parametrize("shape", [(256, 512), (70, 96)])
def test_producers_compile_for_sm_90(shape: tuple[int, int]) -> None:
    x, up = meta(*shape), meta(*shape)
    calls = [_fake("hif4", axis, x, p1=up, producer=SWIGLU) for axis in (0, 1)]
    operands = {"p1": meta(shape[0], 1), "p2": meta(1, shape[1]), "p3": meta(1)}
    calls.append(_fake("mxfp4", 1, x, **operands, producer=EVERY))
    launches = [planned for call in calls for planned in codec.plan_fake_quantize(**call)[0]]
    sample = {"x": x, "p1": up, "p2": up, "format": "hif4", "axis": 0, "producer": SWIGLU_BACKWARD}
    launches += codec.plan_fake_quantize_each(**arguments("fake_quantize_each", sample))[0]
    for planned, given in launches:
        assert "mufu.ex2" in compiled(planned, given) or "ex2.approx" in compiled(planned, given)


def _fake(format: str, axis: int, x: Tensor, **options: Any) -> dict[str, Any]:
    return arguments("fake_quantize", {"x": x, "format": format, "axis": axis, **options})


def test_one_launch_for_both_axes_where_memory_bounds_it() -> None:
    assert len(both(meta(256, 512), "hif4")) == 1
    assert len(both(meta(256, 512), "nvfp4", hadamard=[32, 0], block_2d=[True, False])) == 1
    assert len(both(meta(256, 500), "hif4")) == 2
    assert len(both(meta(256, 512), "hif4", hadamard=[64, 0])) == 2
    assert len(both(meta(256, 512), "mxfp4", rounding=["nearest", "stochastic"])) == 2
    assert len(both(meta(256, 512), "nvfp4", tensor_scale_1=None)) == 2


def test_offsets_are_wide_only_where_they_must_be() -> None:
    for axis in (0, 1):
        (fake, _), (packed, _) = quantizing(meta(2**16 + 64, 2**15), "hif4", axis)
        assert fake.constants["WIDE"]
        assert packed.constants["WIDE"]
        (fake, _), (packed, _) = quantizing(meta(2**14, 2**15), "hif4", axis)
        assert not fake.constants["WIDE"]


@pytest.mark.parametrize(
    ("shape", "axis", "block_2d", "expected"),
    [
        ((6, 128), 1, False, codec.Geometry(1, 12, 64, 64, False)),
        ((6, 70), 1, False, codec.Geometry(1, 6, 70, 70, False)),
        ((2, 70, 3), 1, False, codec.Geometry(2, 3, 70, 70, True)),
        ((2, 64, 1), 1, False, codec.Geometry(1, 2, 64, 64, False)),
        ((5, 64, 128), 2, True, codec.Geometry(5, 64, 128, 128, False)),
        ((5, 64, 128), 1, True, codec.Geometry(5, 128, 64, 64, True)),
        ((5, 64, 1), 1, True, codec.Geometry(5, 1, 64, 64, True)),
    ],
)
def test_geometry(shape: tuple[int, ...], axis: int, block_2d: bool, expected: codec.Geometry) -> None:
    assert codec.geometry(shape, axis, 64, 0, block_2d) == expected


# --- what they support -----------------------------------------------------------------------------------------------


def test_without_a_gpu_every_kernel_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for kernel in KERNELS.values():
        answer = kernel.supports(arguments(kernel.op, next(samples(kernel.op))))
        assert isinstance(answer, No)
        assert "Triton is not installed" in answer.reason or "no CUDA device" in answer.reason


def test_without_triton_the_answer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    table.available.cache_clear()
    try:
        assert table.available() == No("Triton is not installed: pip install 'fp4compile[triton]'")
    finally:
        table.available.cache_clear()


def test_importing_the_table_does_not_import_the_kernels() -> None:
    code = "import sys, fp4compile.backends.inductor as i; assert len(i.BACKEND.kernels) >= 10; " + (
        "assert 'fp4compile.backends.triton.codec_kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as a machine with a GPU gives them."""
    monkeypatch.setattr(table, "available", lambda least: Yes())


def _answer(kernel: Kernel, **sample: Any) -> Answer:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 64, device="cuda") if "x" not in sample else sample.pop("x")
        return kernel.supports(arguments(kernel.op, {"x": x, "format": "hif4", "axis": 1, **sample}))


@pytest.mark.usefixtures("anywhere")
def test_declines_say_why() -> None:
    cases: dict[str, dict[str, Any]] = {
        "one of 16, 32, 64, 128": {"hadamard": 512},
        "without a seed": {"rounding": "stochastic"},
        "2-D": {"block_2d": True},
        "not on a CUDA device": {"x": torch.ones(2, 64)},
    }
    for word, sample in cases.items():
        answer = _answer(KERNELS["quantize"], **sample)
        assert isinstance(answer, No)
        assert word in answer.reason
    assert _answer(KERNELS["quantize"], hadamard=64) == Yes()


@pytest.mark.usefixtures("anywhere")
def test_each_tensor_is_checked() -> None:
    with torch._subclasses.FakeTensorMode():
        x, scale = torch.empty(64, 64, device="cuda"), torch.empty((), device="cuda")
    two = "full full: t0 = mul.bfloat16(a0, a1); t1 = add.bfloat16(a0, a1) -> t0 t1"
    sample = {"x": x, "p1": x, "format": "nvfp4", "axis": 1, "producer": two}
    kernel = KERNELS["fake_quantize_each"]
    for more, reason in (
        ({"producer": two.replace(" -> t0 t1", "")}, "tensors that the producer makes: 1, not 2 or 3"),
        ({"producer": f"{two} t0 t1"}, "tensors that the producer makes: 4, not 2 or 3"),
        ({"producer": ""}, "without a producer there is one tensor"),
        ({"tensor_scale_0": scale}, "some have a tensor scale and some have none"),
        ({"tensor_scale_0": scale, "tensor_scale_1": x}, "is not one"),
        ({"scale_rule": "4over6"}, "scale rule '4over6'"),
    ):
        assert reason in _answer(kernel, **{**sample, **more}).reason
    one = {"x": x, "p1": x, "format": "nvfp4", "producer": two.replace(" -> t0 t1", "")}
    assert "not 2 or 3" in KERNELS["tensor_scale_each"].supports(arguments("tensor_scale_each", one)).reason
    for more in ({}, {"tensor_scale_0": scale, "tensor_scale_1": scale}):
        assert _answer(kernel, **sample, **more) == Yes()


@pytest.mark.usefixtures("anywhere")
def test_both_axes_are_checked() -> None:
    cases: dict[str, dict[str, Any]] = {
        "one of 16, 32, 64, 128": {"hadamard": [0, 512]},
        "without a seed": {"rounding": ["nearest", "stochastic"]},
        "2-D": {"block_2d": [True, False]},
        "tensor_scale is not one": {"tensor_scale_1": torch.ones(2, device="meta")},
        "two kernels are as fast": {"hadamard": [128, 0]},
        "not two": {"x": torch.ones(2, 64, 3, device="meta")},
    }
    kernel = KERNELS["fake_quantize_both"]
    options = {**BOTH_OPTIONS[0], "format": "hif4", "scale_rule": None, "x": torch.ones(64, 64, device="meta")}
    for word, changed in cases.items():
        given = arguments("fake_quantize_both", {**options, **changed})
        with torch._subclasses.FakeTensorMode():
            on_gpu = {n: torch.empty(v.shape, device="cuda") if isinstance(v, Tensor) else v for n, v in given.items()}
            answer = kernel.supports(on_gpu)
        assert isinstance(answer, No)
        assert word in answer.reason


def test_gemms_on_fp4_tensor_cores_come_first() -> None:
    gemms = [kernel.name for kernel in table.KERNELS if kernel.op == "mm"]
    assert gemms == ["cublas/fp4_mm", "cublas/packed_mm_rowwise", "triton/packed_mm", "cublas/mm"]


CUSTOM = {
    "e8m0 over 16, even steps": Format(
        "triton_test_a", S1P2, (ScaleLevel("e8m0", 16),), torch.uint8,
        ("floor", "ceil", "even", "rceil", "truncation-free"), {"truncation-free": "rceil"}, 16, "",
    ),
    "e4m3 over 128": Format(
        "triton_test_b", E2M1, (ScaleLevel("e4m3", 128),), torch.uint8,
        ("nearest", "truncation-free"), {}, None, "",
    ),
}  # fmt: skip
DECLINED = {
    "round E2M1": Format(
        "triton_test_c", Element("odd", (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.0), "even"),
        (ScaleLevel("e8m0", 32),), torch.uint8,
        ("floor", "truncation-free"), {"truncation-free": "rceil"}, None, "",
    ),
    "power of two": Format(
        "triton_test_d", S1P2, (ScaleLevel("e4m3", 48),), torch.uint8,
        ("nearest", "truncation-free"), {}, None, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fmt", CUSTOM.values(), ids=CUSTOM)
def test_other_formats_are_read_from_their_row(fmt: Format) -> None:
    assert not isinstance(codec.constants_of(fmt), No)


@pytest.mark.parametrize(("word", "fmt"), DECLINED.items(), ids=DECLINED)
def test_declines_a_format_it_cannot_round(word: str, fmt: Format) -> None:
    answer = codec.constants_of(fmt)
    assert isinstance(answer, No)
    assert word in answer.reason
