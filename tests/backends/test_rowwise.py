"""E2M1 operands as FP8 in rows: what the oracle promises, and the Triton kernels against it.

Without a GPU the interpreter runs some of the ops' samples, that of PTX some as they are compiled for sm_90, and
every kind of kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp4compile import rowwise as oracle
from fp4compile.backend import Yes
from fp4compile.backends import triton as table
from fp4compile.backends.inductor import BACKEND
from fp4compile.backends.triton import rowwise
from fp4compile.backends.triton.replay import Replay
from fp4compile.dynamo import fp4compile_backend, last_report
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS
from fp4compile.report import Report, SiteRecord
from tests import ptx
from tests.backends.test_triton_kernels import (
    arguments,
    assert_compiled_agrees,
    assert_exact,
    assert_same,
    assert_stays_in_registers,
    meta,
    moved,
)
from tests.gpu import SM_100, compiled, interpret_apart, needs_gpu, needs_triton
from tests.helpers import randn

OPERATORS = ("quantize_rowwise", "quantize_rowwise_both")
KERNELS = {kernel.op: kernel for kernel in table.KERNELS if "rowwise" in kernel.op}
PARTS = ("", "_scale", "_exponents", "_flags")
SEED = torch.tensor(2**40 + 17, dtype=torch.int64)
ops = torch.ops.fp4compile


def quantized(x: Tensor, axis: int = 1, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values: tuple[Tensor, Tensor, Tensor, Tensor] = ops.quantize_rowwise(x, "mxfp4", axis, **options)
    return values


def operands(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Arguments of `mm_rowwise`."""
    sides = (("a", a), ("b", b))
    return {f"{side}{part}": t for side, tensors in sides for part, t in zip(PARTS, tensors, strict=True)}


def staircase() -> Tensor:
    """[16, 1280]: block exponents from 19 below to 21 above those of the four blocks that a sample sees."""
    steps = torch.exp2(torch.arange(40.0) - 19)
    steps[[i // 32 for i in oracle.sampled(1280, 1)]] = 1.0
    return randn(16, 1280).sign() * steps.repeat_interleave(32)


# --- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"scale_rule": "rceil", "hadamard": 32}, {"rounding": "stochastic", "seed": SEED}]
)
def test_rows_hold_what_fake_quantisation_gives(axis: int, options: dict[str, Any]) -> None:
    x = randn(150, 70) * randn(150, 1, seed=1).mul(9).exp2()
    values, scale, exponents, _ = quantized(x, axis, **options)
    expected = ops.fake_quantize(x, "mxfp4", axis, **options).movedim(axis, -1)
    decoded = oracle.dequantize(values, scale, exponents)
    assert torch.equal(decoded[:, : expected.shape[1]], expected)
    assert not decoded[:, expected.shape[1] :].any()


def test_where_no_flag_stands_the_scale_is_all_that_is_needed() -> None:
    x = randn(40, 512)  # of which the sample sees nothing of the first two blocks
    x[17, 32:64] *= 2.0**9
    x[35, :32] *= 2.0**-14
    values, scale, exponents, flags = quantized(x)
    assert flags.tolist() == [0, 1, 1]
    plain = values.float() * scale[:, None]
    expected = oracle.dequantize(values, scale, exponents)
    assert torch.equal(plain[:16], expected[:16])
    for row, block in ((17, slice(32, 64)), (35, slice(0, 32))):
        assert not torch.equal(plain[row], expected[row])
        # What lies outside is stored as it is on the grid of the element.
        assert set(values[row, block].float().abs().tolist()) <= set(FORMATS["mxfp4"].element.magnitudes)


@pytest.mark.parametrize("e5m2", [False, True])
def test_every_binade_of_the_window_is_exact(e5m2: bool) -> None:
    held = oracle.WINDOWS[oracle.values_dtype(e5m2)]
    x = staircase()
    values, scale, exponents, flags = quantized(x, e5m2=e5m2)
    assert values.dtype is oracle.values_dtype(e5m2)
    assert flags.all()
    assert (scale == 2.0 ** (-2 - held.headroom)).all()  # E2M1 has two binades above one
    plain = (values.float() * scale[:, None]).unflatten(1, (40, 32))
    exact = (plain == x.unflatten(1, (40, 32))).all(2)
    shift = exponents.t().int() - 127 - (-2 - held.headroom)
    assert torch.equal(exact, (shift >= -held.below) & (shift <= held.above))
    assert (shift[exact].min(), shift[exact].max()) == (-held.below, held.above)


def test_zeros_are_in_nobodys_way() -> None:
    x = torch.zeros(256, 64)
    x[3] = randn(64)
    values, scale, _, flags = quantized(x)
    assert not flags.any()
    assert not values[4:].float().any()
    assert (scale[:128] == scale[3]).all()  # a sample of zeros takes that of its group
    assert (scale[128:] == scale[200]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spoils_its_row_of_the_product(bad: float) -> None:
    a, b = randn(32, 64), randn(48, 64, seed=1)
    a[5, 40] = bad
    out = ops.mm_rowwise(*quantized(a), *quantized(b), torch.float32)
    assert out[5].isnan().all()
    rest = torch.arange(32) != 5
    expected = ops.fake_quantize(a, "mxfp4", 1)[rest] @ ops.fake_quantize(b, "mxfp4", 1).T
    torch.testing.assert_close(out[rest], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "axis"), [(1, 0), (1, 1), (17, 1), (100, 0), (128, 1), (4096, 1), (14336, 0)])
def test_samples_lie_within_the_axis(size: int, axis: int) -> None:
    at = oracle.sampled(size, axis)
    assert at
    assert all(0 <= i < size for i in at)
    assert len(at) <= oracle.SAMPLES
    if size >= 4096:
        assert len(set(at)) == oracle.SAMPLES


def test_formats_that_fp8_does_not_hold() -> None:
    held = [name for name in ("hif4", "mxfp4", "nvfp4") if oracle.refusal(FORMATS[name]) is None]
    assert held == ["mxfp4"]


# --- what the kernels support ----------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU, and tensors were on it."""
    monkeypatch.setattr(table, "available", lambda capability: Yes())
    monkeypatch.setattr(table, "_on_one_gpu", lambda arguments: None)


def test_sizes_that_the_gemm_takes() -> None:
    given = {**operands(quantized(randn(5, 64)), quantized(randn(32, 64))), "dtype": torch.bfloat16, "bias": None}
    assert rowwise.sizes(given) is None
    narrow = {**given, **operands(quantized(randn(5, 64)), quantized(randn(30, 64)))}
    empty = {**given, **operands(quantized(randn(0, 64)), quantized(randn(32, 64)))}
    for declined, why in (
        ({**given, "dtype": torch.float32}, "write bf16"),
        ({**given, "bias": randn(32)}, "bias is torch.float32"),
        (narrow, "multiple of 16"),
        (empty, "empty"),
        ({**given, **operands(*(quantized(randn(n, 64), e5m2=True) for n in (5, 32)))}, "both operands are E5M2"),
    ):
        reason = rowwise.sizes(declined)
        assert reason is not None
        assert why in reason


@pytest.mark.parametrize("format", ["hif4", "nvfp4"])
def test_other_formats_are_declined(format: str) -> None:
    reason = rowwise.refusal(format)
    assert reason is not None
    assert "E2M1" in reason


def test_the_report_counts_the_exact_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "COUNTS", {})
    site = SiteRecord("up", "forward", "linear", "fp4", {}, kernel="triton/quantize_rowwise + cublas/mm_rowwise")
    made = partial(Report, "mxfp4", "inductor", "cuda")
    report, packed = made([site]), made(notes=["1 GEMMs that the model holds packed: cublas/packed_mm_rowwise"])
    assert BACKEND.runtime_notes(report) == []
    devices = (torch.device("cpu"), torch.device("meta"))
    monkeypatch.setattr(rowwise, "COUNTS", {device: torch.tensor([1, 40]) for device in devices})
    for named in (report, packed):
        assert BACKEND.runtime_notes(named) == ["exact path taken by 2 of 80 row-wise scaled FP8 GEMMs so far"]
    assert BACKEND.runtime_notes(made([replace(site, kernel="inductor/aten.mm")])) == []


@pytest.mark.parametrize(("rounding", "launched"), [("nearest", [{0, 1}]), ("stochastic", [{0}, {1}])])
def test_random_axes_are_launched_one_by_one(rounding: str, launched: list[set[int]]) -> None:
    given = {
        "x": meta(256, 512),
        "format": "mxfp4",
        "rounding": ["nearest", rounding],
        "scale_rule": ["rceil"] * 2,
        "stream": [1, 2],
        "hadamard": [32, 0],
        "seed": meta(dtype=torch.int64),
    }
    (window, at), *quantizing = rowwise.plan_quantize_rowwise_both(**arguments("quantize_rowwise_both", given))[0]
    assert window.kernel == "window"
    assert at["scale0_ptr"] is not None and at["scale1_ptr"] is not None
    assert [{axis for axis in (0, 1) if at[f"values{axis}_ptr"] is not None} for _, at in quantizing] == launched


# --- on a GPU --------------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = needs_gpu

    # In parts, so that several processes can share the compiling.
    @pytest.mark.parametrize("part", range(6))
    @pytest.mark.parametrize("op", OPERATORS)
    def test_every_sample_has_the_oracles_bits(self, op: str, part: int) -> None:
        for sample in islice(OPS[op].samples(), part, None, 6):
            given = arguments(op, sample)
            on_gpu = moved(given, "cuda")
            assert KERNELS[op].supports(on_gpu) == Yes()
            assert_same(KERNELS[op].run(**on_gpu), OPS[op].reference(**given))

    def test_every_gemm_agrees_to_the_rounding_of_bf16(self) -> None:
        for sample in OPS["mm_rowwise"].samples():
            given = arguments("mm_rowwise", {**sample, "dtype": torch.bfloat16})
            if given["bias"] is not None:
                given["bias"] = given["bias"].bfloat16()
            on_gpu = moved(given, "cuda")
            assert KERNELS["mm_rowwise"].supports(on_gpu) == Yes()
            got, expected = KERNELS["mm_rowwise"].run(**on_gpu).cpu(), OPS["mm_rowwise"].reference(**given)
            assert torch.equal(got.isnan(), expected.isnan())
            # Both are rounded to bf16, and each of the fp32 additions may cut off the last bit of a partial sum.
            a, b = (oracle.dequantize(*(given[f"{side}{part}"] for part in PARTS[:3])).abs() for side in "ab")
            limit = 2**-7 * expected.abs() + a.shape[1] * 2**-23 * (a @ b.T)
            assert not ((got - expected).abs() > limit).any()

    @pytest.mark.parametrize("positive", [False, True])
    def test_long_sums_are_fp32_sums(self, positive: bool) -> None:
        a, b = (randn(*shape, seed=seed).cuda().bfloat16() for seed, shape in enumerate(((256, 14336), (512, 14336))))
        if positive:  # accumulators of fewer bits lose 12% of such a sum
            a, b = a.abs(), b.abs()
        got = ops.mm_rowwise(*quantized(a), *quantized(b), torch.bfloat16).double()
        expected = ops.fake_quantize(a, "mxfp4", 1).double() @ ops.fake_quantize(b, "mxfp4", 1).double().T
        assert (got - expected).norm() < 2.5e-3 * expected.norm()

    def test_flagged_rows_take_the_exact_path_and_are_counted(self) -> None:
        a, b = randn(300, 4096).cuda().bfloat16(), randn(192, 4096, seed=1).cuda().bfloat16()
        a[5, 70:80] *= 2.0**12
        b[190, 600:640] *= 2.0**12
        before = rowwise.COUNTS[a.device].tolist() if a.device in rowwise.COUNTS else [0, 0]
        left, right = quantized(a), quantized(b)
        assert left[3].any() and right[3].any()
        got = KERNELS["mm_rowwise"].run(**operands(left, right), dtype=torch.bfloat16, bias=None).double()
        x, y = (ops.fake_quantize(each, "mxfp4", 1).double() for each in (a, b))
        expected = x @ y.T
        # One rounding to bf16 (half of its 2**-7), and 4096 fp32 additions of which each may cut off the last bit.
        bound = 2.0**-8 * expected.abs() + 4096 * 2.0**-23 * (x.abs() @ y.abs().T)
        good = (got - expected).abs() <= bound
        assert good[:16].all() and good[:, 176:].all()  # the groups of the flagged row and column
        rest = (got - expected)[16:, :176]
        assert rest.norm() < 2.5e-3 * expected[16:, :176].norm()
        assert rowwise.COUNTS[a.device].tolist() == [before[0] + 1, before[1] + 1]

    def test_a_training_step_runs_on_the_kernels(self) -> None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(256, 512, bias=False), torch.nn.Linear(512, 128)).cuda().bfloat16()
        x = randn(64, 256).cuda().bfloat16().requires_grad_()
        found = []
        for backend in ("reference", "inductor"):
            model.zero_grad()
            options = {"recipe": "mxfp4-plain", "backend": backend}
            y = torch.compile(model, backend=fp4compile_backend, options=options)(x)
            y.backward(torch.ones_like(y))
            found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            torch._dynamo.reset()
        report = last_report()
        assert report is not None
        assert all(site.kernel.endswith("cublas/mm_rowwise") for site in report.sites)
        assert any("exact path taken by" in note for note in report.notes)
        for got, expected in zip(found[1], found[0], strict=True):
            assert (got.double() - expected.double()).norm() < 1e-2 * expected.double().norm()


# --- without a GPU ---------------------------------------------------------------------------------------------------


def _finite(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without NaN and Inf, which the interpreter's conversion to FP8 does not know, and in fp32, as it cuts bf16."""
    named = ("x", "p1", "p2", "p3", "p4")

    def finite(x: Tensor) -> Tensor:
        return x.float().nan_to_num().clamp(-(2.0**60), 2.0**60)  # a transform of larger ones overflows

    return {k: finite(v) if isinstance(v, Tensor) and k in named else v for k, v in given.items()}


def interpret(every: int) -> None:
    """Every n-th sample of the quantisations, and a GEMM with flags of each kind."""
    for number, op in enumerate(OPERATORS):
        for sample in islice(OPS[op].samples(), number, None, every):
            given = arguments(op, _finite(sample))
            assert_same(KERNELS[op].run(**given), OPS[op].reference(**given))
    given = arguments(OPERATORS[0], {"x": staircase(), "format": "mxfp4", "axis": 1})
    assert_same(KERNELS[OPERATORS[0]].run(**given), OPS[OPERATORS[0]].reference(**given))
    interpret_exact()


def interpret_exact() -> None:
    """Rows and columns of flagged groups are computed from exponents; all others keep what was there."""
    rowwise._MOST_PROGRAMS = 5  # of a process of its own: fewer than the parts, so that they take turns
    a, b = randn(70, 96), randn(80, 96, seed=1)
    a[20, 32:64] *= 2.0**12
    b[66, :32] *= 2.0**-20
    for left in (a, randn(70, 96)):
        for right in (b, randn(80, 96, seed=1)):
            for bias in (None, randn(80, seed=2)):
                given = operands(quantized(left), quantized(right))
                expected = OPS["mm_rowwise"].reference(**given, dtype=torch.float32, bias=bias)
                out = torch.full_like(expected, 99.0)
                arguments = {"out": out, "counted": rowwise.counts(out.device), "bias": bias, **given}
                Replay(rowwise.plan_again, arguments)(*arguments.values())
                rows, columns = (given[f"{s}_flags"].bool().repeat_interleave(oracle.FLAGGED) for s in "ab")
                again = rows[:70, None] | columns[None, :80]
                torch.testing.assert_close(out, torch.where(again, expected, 99.0), rtol=1e-5, atol=1e-3)
                whole = KERNELS["mm_rowwise"].run(**given, dtype=torch.float32, bias=bias)
                torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-3)
    assert rowwise.COUNTS[out.device].tolist() == [12, 16]


@needs_triton
def test_the_interpreter_has_the_oracles_bits() -> None:
    interpret_apart(__name__, 41)


@needs_triton
@pytest.mark.slow
def test_the_interpreter_has_the_oracles_bits_on_every_sample() -> None:
    interpret_apart(__name__, 1)


@needs_triton
@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_compiled_has_the_oracles_bits(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = islice(OPS[op].samples(), OPERATORS.index(op), None, 30)  # with NaN, Inf and bf16
    assert_compiled_agrees(KERNELS[op], some, monkeypatch)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATORS)
def test_what_is_compiled_has_the_oracles_bits_on_more_samples(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    some = islice(OPS[op].samples(), OPERATORS.index(op), None, 2)  # with NaN, Inf and bf16
    assert_compiled_agrees(KERNELS[op], some, monkeypatch)


# --- assembly ---------------------------------------------------------------------------------------------------------


def _float(bits: Tensor) -> Tensor:
    return (bits << 16).to(torch.int32).view(torch.float32)


def _pairs(x: Tensor) -> np.ndarray[Any, Any]:
    """Words of bf16 that are alike."""
    half = x.bfloat16().view(torch.int16).numpy().view("u2").astype("u4")
    return half | half << 16


@needs_triton
@pytest.mark.parametrize("window", [-96, -5, 0, 96])
@pytest.mark.parametrize(
    ("dtype", "shift"),
    [(dtype, shift) for dtype, held in oracle.WINDOWS.items() for shift in (-held.below, -1, 0, held.above)],
)
def test_pairs_are_rounded_as_the_oracle_rounds(window: int, dtype: torch.dtype, shift: int) -> None:
    """Every finite bf16 number, in a block that lies `shift` above the window of its row."""
    from fp4compile.backends.triton import rowwise_kernels as kernels

    x = torch.arange(2**16)[torch.arange(2**16) & 0x7F80 != 0x7F80]
    others = (_pairs(torch.full(x.shape, v)) for v in (2.0**-window, 2.0**shift, 6 * 2.0**shift))
    words = ptx.assembly(kernels._ROUND_PAIR.value, _pairs(_float(x)), *others)
    assert (words >> 16 == words & 0xFFFF).all()
    t = (_float(x).abs().double() * 2.0 ** (-window - shift)).clamp(max=6)
    grid = torch.tensor(FORMATS["mxfp4"].element.magnitudes, dtype=torch.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    below = (t[:, None] > middles).sum(1)
    code = below + ((t[:, None] == middles).any(1) & (below % 2 == 1))  # a tie goes to the even code
    expected = torch.copysign(grid[code] * 2.0**shift, _float(x).double())
    got = torch.from_numpy(words.astype("u2").view("f2")).to(dtype)
    assert torch.equal(got.view(torch.uint8), expected.to(torch.float32).to(dtype).view(torch.uint8))


@needs_triton
def test_pairs_of_bad_blocks_are_nan() -> None:
    from fp4compile.backends.triton import rowwise_kernels as kernels

    x, nan = (np.arange(2**16, dtype="u4") * 0x10001, np.full(2**16, 0x7FFF7FFF, "u4"))
    words = ptx.assembly(kernels._ROUND_PAIR.value, x, nan, nan, nan)
    assert np.isnan(words.view("f2")).all()


@needs_triton
def test_what_rounds_up_is_the_upper_neighbour_where_the_random_number_is_below_the_fraction() -> None:
    from fp4compile.backends.triton import arithmetic

    generator = torch.Generator().manual_seed(0)
    cases, expected = [], []
    for power in (1.0, 4.0, 2.0**-8):
        tops = torch.rand(60, generator=generator) * (2 * power)
        tiny = torch.tensor([0.0, 2.0**-100, 0.5 * power, power, 1.5 * power * (1 - 2.0**-24), 2.0**-30 * power])
        for t in map(Fraction, torch.cat([tops, tiny]).tolist()):
            gap = Fraction(power) / 2
            lower = t // gap * gap
            at = int((t - lower) / gap * 2**24)  # random numbers around the fraction decide
            for word in {0, 2**24 - 1, *(min(max(at + i, 0), 2**24 - 1) for i in (-1, 0, 1))}:
                cases.append((t, word, power))
                expected.append(lower + gap if Fraction(word, 2**24) < (t - lower) / gap else lower)
    given = np.array([[float(value) for value in case] for case in cases], "f4").T.copy()
    got = ptx.assembly(arithmetic._NEXT_MULTIPLE.value, *given).view("f4")
    assert list(map(Fraction, got.tolist())) == expected


AXES: dict[str, tuple[int, ...]] = {"columns": (0,), "rows": (1,), "both": (0, 1)}
HOW = {
    "nearest": rowwise.Axis("nearest", None, 0, 0),
    "transformed, stochastic": rowwise.Axis("stochastic", "rceil", 3, 32),
}


@needs_triton
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize(("shape", "e5m2"), [((256, 512), False), ((70, 33), False), ((256, 512), True)])
def test_quantisation_compiles_for_sm_90_without_approximations(
    shape: tuple[int, int], e5m2: bool, axes: tuple[int, ...], how: rowwise.Axis
) -> None:
    x, seed = meta(*shape), meta(dtype=torch.int64) if how.rounding == "stochastic" else None
    launches, _ = rowwise.plan_rows(x, "mxfp4", tuple((axis, how) for axis in axes), seed, None, e5m2=e5m2)
    for each, given in launches:
        assert_exact(compiled(each, given))
    # What rounds bf16 two by two, and what rounds up.
    nearest = how.rounding == "nearest"
    ptx = compiled(*launches[-1])
    assert ("fma.rn.bf16x2" in ptx, "fma.rp.f32" in ptx) == (nearest, not nearest)
    assert ("e5m2x2" in ptx, "e4m3x2" in ptx) == (e5m2, not e5m2)


@needs_triton
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_tiles_stay_in_registers(axes: tuple[int, ...]) -> None:
    wanted = tuple((axis, HOW["nearest"]) for axis in axes)
    planned, given = rowwise.plan_rows(meta(8192, 14336), "mxfp4", wanted, None, None)[0][-1]
    assert_stays_in_registers(planned, given, planned.constants["TILE0"] * planned.constants["TILE1"])


@needs_triton
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_quantisation_compiles_for_sm_100_without_approximations(axes: tuple[int, ...]) -> None:
    """Compiled only: not run on hardware."""
    x, how = meta(256, 512), HOW["nearest"]
    launches, _ = rowwise.plan_rows(x, "mxfp4", tuple((axis, how) for axis in axes), None, None)
    for each, given in launches:
        assert_exact(compiled(each, given, SM_100))


@needs_triton
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_quantisation_of_a_product_compiles_for_sm_90(axes: tuple[int, ...]) -> None:
    x, how = meta(70, 96), HOW["nearest"]
    text = "full full: t0 = exp.float32(a0); t1 = mul.bfloat16(t0, a1)"
    wanted = tuple((axis, how) for axis in axes)
    for each, given in rowwise.plan_rows(x, "mxfp4", wanted, None, None, text, p1=meta(70, 96))[0]:
        assert "ex2" in compiled(each, given)


@needs_triton
def test_the_exact_gemm_compiles_for_sm_90() -> None:
    given: dict[str, Any] = {"bias_ptr": None, "out_ptr": meta(256, 512), "counts_ptr": meta(2, dtype=torch.int64)}
    for side, rows in (("a", 256), ("b", 512)):
        results = OPS["quantize_rowwise"].fake(meta(rows, 128), "mxfp4", 1)
        given |= {f"{side}{part}_ptr": tensor for part, tensor in zip(PARTS, results, strict=True)}
    assert "mma" in compiled(rowwise.plan_exact(256, 512, 4, 32), given)
