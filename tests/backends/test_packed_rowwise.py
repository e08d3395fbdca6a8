"""W4A4 in FP8: packed weights as FP8 in rows, values that are quantised once more, and which calls take this way."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fp4compile import codec, rowwise
from fp4compile.backend import Yes
from fp4compile.backends import triton as table
from fp4compile.backends.inductor import BACKEND
from fp4compile.backends.triton import packed as packed_mm
from fp4compile.backends.triton import packed_rowwise
from fp4compile.backends.triton.replay import Replay
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS
from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import Operand
from tests.backends.test_triton_kernels import meta, moved
from tests.gpu import compiled, interpret_apart, needs_gpu, needs_triton
from tests.helpers import capture, randn

FORMAT = "mxfp4"
(KERNEL,) = (kernel for kernel in table.KERNELS if kernel.name == "cublas/packed_mm_rowwise")


def weights() -> dict[str, tuple[Tensor, bool]]:
    """Weights [rows, columns] and whether their blocks are square: ragged ones, and rows that span many binades."""
    wide = randn(70, 1100, seed=1) * torch.arange(-20, 15).repeat_interleave(32).exp2()[:1100]
    wide[5, :32] = wide[40, 64:96] = 0.0
    wide[17, 3] = torch.nan
    tiny = randn(48, 96, seed=2) * 2.0**-130
    steps = randn(33, 480, seed=3).sign() * torch.arange(15.0).exp2().repeat_interleave(32)  # all of a window
    return {
        "many binades": (wide, False),
        "plain": (randn(64, 512), False),
        "ragged": (randn(37, 70), False),
        "squares": (wide, True),
        "zeros": (torch.zeros(20, 64), False),
        "subnormal": (tiny, False),
        "a window": (steps, False),
    }


def packed(weight: Tensor, block_2d: bool) -> tuple[Tensor, Tensor]:
    codes, scales = OPS["quantize"].reference(weight, FORMAT, 1, block_2d=block_2d)
    return codes, scales


def decoded(codes: Tensor, scales: Tensor, block_2d: bool) -> tuple[Tensor, ...]:
    arguments = {"codes": codes, "scales": scales, "format": FORMAT, "block_2d": block_2d}
    made: tuple[Tensor, ...] = Replay(packed_rowwise.plan_decode, arguments)(*arguments.values())
    return made


def assert_rows_are_the_weight(made: tuple[Tensor, ...], codes: Tensor, scales: Tensor, squares: bool) -> None:
    """Bit for bit; without the exponents where no flag stands, and flags where they have to stand alone."""
    values, scale, exponents, flags = (t.cpu() for t in made)
    rows, width = codes.shape[0], 2 * codes.shape[1]
    exact = codec.dequantize(codes, scales, None, FORMATS[FORMAT], 1, width, squares, torch.float32)
    got = rowwise.dequantize(values, scale, exponents)
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.nan_to_num(), exact.nan_to_num())
    plain = values.float() * scale[:, None]
    wrong = ((plain != exact) & ~exact.isnan()).any(1)
    of_group = torch.nn.functional.pad(wrong, (0, -rows % 16)).unflatten(0, (-1, 16)).any(1)
    assert torch.equal(flags.bool(), of_group)


def interpret(every: int) -> None:
    """The kernel on every n-th weight, and on every n-th whole GEMM against the op's reference."""
    for weight, squares in list(weights().values())[::every]:
        codes, scales = packed(weight.nan_to_num(), squares)  # the interpreter has no NaN in FP8
        assert_rows_are_the_weight(decoded(codes, scales, squares), codes, scales, squares)
    assert not decoded(*packed(weights()["a window"][0], False), False)[3].any()
    for activation in ("", "swiglu")[::every]:
        given = call(weights()["many binades"][0].nan_to_num()[:64], 40, activation)
        got, expected = packed_rowwise.bind_mm(given)(*given.values()), OPS["mm"].reference(**given)
        assert_close(got, expected, given)


def call(weight: Tensor, tokens: int, activation: str = "", bias: bool = True) -> dict[str, Any]:
    """All arguments of a call on MXFP4 values."""
    x = OPS["fake_quantize"].reference(randn(tokens, weight.shape[1], seed=4).bfloat16(), FORMAT, 1)
    codes, scales = packed(weight, False)
    bound = OPS["mm"].signature.bind(
        x,
        codes,
        randn(weight.shape[0], seed=5).bfloat16() if bias else None,
        b_scales=scales,
        b_format=FORMAT,
        k=weight.shape[1],
        activation=activation,
        a_holds=FORMAT,
    )
    bound.apply_defaults()
    return dict(bound.arguments)


def assert_close(got: Tensor, expected: Tensor, given: Mapping[str, Any]) -> None:
    """One rounding to bf16 of sums in fp32; two more in front of and behind an activation of slope 1.13 at most."""
    assert got.shape == expected.shape
    weight = codec.dequantize(
        given["b"].cpu(), given["b_scales"].cpu(), None, FORMATS[FORMAT], 1, given["k"], False, torch.float32
    )
    sums = given["a"].cpu().float().abs() @ weight.abs().T + given["bias"].cpu().float().abs()
    z = given["a"].cpu().float() @ weight.T + given["bias"].cpu().float()
    ulp, slack = torch.finfo(torch.bfloat16).eps, sums * 2.0**-20
    if given["activation"]:
        (gate, up), (of_gate, of_up) = z.abs().chunk(2, -1), slack.chunk(2, -1)
        allowed = ulp * 1.02 * (1.13 * gate * up + 2 * expected.float().abs()) + 1.2 * (of_gate * up + gate * of_up)
    else:
        allowed = ulp * expected.float().abs() + slack
    assert ((got.cpu().float() - expected.float()).abs() <= allowed).all()


@needs_triton
def test_the_interpreter_has_the_weights_bits() -> None:
    interpret_apart(__name__, 3)


@needs_triton
@pytest.mark.slow
def test_the_interpreter_has_the_bits_of_every_weight() -> None:
    interpret_apart(__name__, 1)


@needs_triton
def test_compiles_for_hopper() -> None:
    given = {"codes": meta(4096, 2048, dtype=torch.uint8), "scales": meta(4096, 128, dtype=torch.uint8)}
    ((planned, tensors),) = packed_rowwise.plan_decode(**given, format=FORMAT, block_2d=False)[0]
    ptx = compiled(planned, tensors)
    # A program writes 16 rows of 16 blocks at a time, 64 bytes a thread, all of them sixteen at once.
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert (ptx.count("st.global.v4.b32"), ptx.count("st.global.b16")) == (4, 1)  # and exponents two by two


@pytest.mark.parametrize(
    "options", [{}, {"block_2d": True}, {"scale_rule": "ceil"}, {"scale_rule": "rceil"}, {"scale_rule": "even"}]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_values_that_are_quantised_once_more_are_the_same(options: dict[str, Any], dtype: torch.dtype) -> None:
    x = (randn(64, 320) * randn(64, 1, seed=1).mul(20).exp2()).to(dtype)
    x[3, :40], x[4, 7], x[5, 9] = 0.0, torch.nan, 3e38
    x[6] = torch.exp2(torch.arange(-133.0, 187.0).clamp(max=100)).to(dtype)
    held = OPS["fake_quantize"].reference(x, FORMAT, 1, **options)
    values, scale, exponents, _ = OPS["quantize_rowwise"].reference(held, FORMAT, 1, scale_rule="floor")
    again = rowwise.dequantize(values, scale, exponents).to(dtype)
    assert torch.equal(again.isnan(), held.isnan())
    assert torch.equal(again.nan_to_num(), held.nan_to_num())


def _reason(given: Mapping[str, Any]) -> str:
    checks = (packed_mm.operands, packed_rowwise.operands, packed_rowwise.tokens)
    return next(filter(None, (check(given) for check in checks)), "")


def test_what_calls_take_this_way() -> None:
    kernels = [kernel.name for kernel in table.KERNELS if kernel.op == "mm"]
    assert kernels.index(KERNEL.name) < kernels.index("triton/packed_mm")
    good = call(randn(64, 96), packed_rowwise.LEAST_TOKENS)
    assert not _reason(good)
    a, b, scales, bias = (good[name] for name in ("a", "b", "b_scales", "bias"))
    for why, changes in {
        "511 tokens are fewer than 512": {"a": a[1:]},
        "not known to hold": {"a_holds": ""},
        "the weight's format": {"a_holds": "nvfp4"},
        "tensor scale": {"b_tensor_scale": torch.ones(())},
        "bf16": {"a": a.float()},
        "write bf16": {"dtype": torch.float32},
        "add and": {"bias": bias.float()},
        "60 rows": {"b": b[:60], "b_scales": scales[:60], "bias": None},
        "not a dense operand": {"a_format": FORMAT},
        "no activation": {"activation": "mish"},
    }.items():
        assert why in _reason({**good, **changes})
    unknown = SimpleNamespace(shape=(ShapeEnv().create_unbacked_symint(), 3, 96))
    assert "not known yet" in str(packed_rowwise.tokens({"a": unknown}))


@pytest.mark.parametrize("format", ["hif4", "nvfp4"])
def test_other_formats_decode_the_weight_to_bf16(format: str) -> None:
    given = {"a": randn(300, 64).bfloat16(), "b": torch.empty(16, 32), "bias": None, "b_format": format}
    assert "not E2M1 under one" in str(packed_rowwise.operands({**given, "a_holds": format, "dtype": None}))


@pytest.mark.parametrize("given", [None, Operand(FORMAT), Operand(FORMAT, block_2d=True)])
def test_a_packed_layer_says_what_it_has_quantised(given: Operand | None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PackedWeight((32, 64), 1, Operand(FORMAT), given)
    layer, seen = PackedLinear(row, row.pack(randn(32, 64)), None, torch.bfloat16), []
    monkeypatch.setattr(torch.ops.fp4compile, "mm", lambda x, *args, **options: seen.append((x, options)))
    layer(randn(2, 3, 64, seed=1).bfloat16())
    ((x, options),) = seen
    assert options["a_holds"] == (FORMAT if given else "")
    if given:
        assert torch.equal(OPS["fake_quantize"].reference(x, FORMAT, -1), x)


@pytest.mark.parametrize(("tokens", "kernel"), [(512, KERNEL.name), (511, "triton/packed_mm")])
def test_a_report_names_the_kernel(tokens: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with a GPU writes it, of a loaded model without data."""
    monkeypatch.setattr(table, "available", lambda least=None: Yes())
    row = PackedWeight((32, 64), 1, Operand(FORMAT), Operand(FORMAT))
    layer = PackedLinear(row, row.parts(), None, torch.bfloat16)
    x = torch.empty(tokens, 64, dtype=torch.bfloat16, device="meta")
    found = capture(layer, (x,), "mxfp4-w4a4", train=False)
    found.context.backend, found.context.device = BACKEND, "cuda"
    found.run("legalise")
    assert found.context.notes[-1] == f"1 GEMMs with weights that the model holds packed: {kernel}"


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("name", weights())
    def test_rows_are_the_weight(self, name: str) -> None:
        weight, squares = weights()[name]
        codes, scales = packed(weight, squares)
        made = decoded(codes.cuda(), scales.cuda(), squares)
        assert_rows_are_the_weight(made, codes, scales, squares)

    @pytest.mark.parametrize("activation", ["", "swiglu"])
    def test_gemms_with_and_without_flags(self, activation: str) -> None:
        import fp4compile  # noqa: F401 - installs the kernels

        for weight in (randn(528, 1024), weights()["many binades"][0].nan_to_num()[:64]):
            given = call(weight, 600, activation)
            on_gpu = moved(given, "cuda")
            assert KERNEL.supports(on_gpu) == Yes()
            assert_close(OPS["mm"].overload(**on_gpu), OPS["mm"].reference(**given), given)
