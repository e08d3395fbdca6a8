"""The public functions on tensors: what they return, what they refuse, and the same bits compiled."""

import dataclasses

import pytest
import torch
from torch import Tensor

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS

NAMES = ("hif4", "mxfp4", "nvfp4")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
    )


OPTIONS = [
    # format, options
    *((f.name, {"scale_rule": rule}) for f in FORMATS.values() for rule in f.scale_rules),
    *((name, {"rounding": "stochastic", "seed": 5, "scale_rule": "truncation-free"}) for name in NAMES),
    ("mxfp4", {"block_2d": True}),
    ("nvfp4", {"block_2d": True}),
    ("nvfp4", {"tensor_scale": False}),
    ("nvfp4", {"tensor_scale": True}),
    ("nvfp4", {"tensor_scale": 0.01, "block_2d": True}),
    ("nvfp4", {"tensor_scale": torch.tensor([0.003], dtype=torch.float64)}),
]


# --- what they return ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 70), -1), ((70, 5), 0), ((2, 3, 33), 1), ((7,), 0), ((0, 64), 1), ((0, 64), 0)]
)
def test_quantized_holds_packed_codes_and_scales(name, shape, axis):
    fmt = FORMATS[name]
    q = fp4compile.quantize(randn(*shape).bfloat16(), name, axis)
    others = [size for i, size in enumerate(shape) if i != axis % len(shape)]
    blocks = -(-shape[axis] // fmt.block)
    assert q.codes.dtype == torch.uint8
    assert q.codes.shape == (*others, blocks * fmt.block // 2)
    assert q.scales.dtype == fmt.scale_dtype
    assert q.scales.shape == (*others, blocks)
    assert (q.format, q.shape, q.axis, q.block_2d) == (name, shape, axis % len(shape), False)
    assert (q.tensor_scale is not None) == fmt.has_tensor_scale
    assert q.nbytes == q.codes.numel() + q.scales.numel() * fmt.scale_dtype.itemsize + 4 * fmt.has_tensor_scale
    assert fp4compile.dequantize(q).shape == shape
    assert fp4compile.dequantize(q).dtype == torch.float32
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.axis = 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_fake_quantize_is_dequantize_of_quantize(name, options, axis, dtype):
    for x in (randn(40, 70).to(dtype), randn(70, 40).to(dtype).t()):
        x[0, 0], x[3, 5], x[39] = float("nan"), float("-inf"), -0.0
        expected = fp4compile.dequantize(fp4compile.quantize(x, name, axis, **options), dtype)
        result = fp4compile.fake_quantize(x, name, axis, **options)
        assert torch.equal(result.isnan(), expected.isnan())
        assert same_bits(result.nan_to_num(), expected.nan_to_num())
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_public_functions_equal_the_reference(name, options, dtype):
    x = randn(3, 20, 70).to(dtype)
    q = fp4compile.quantize(x, name, 1, **options)
    seed = torch.tensor(options["seed"]) if "seed" in options else None
    arguments = {**options, "seed": seed, "tensor_scale": q.tensor_scale}
    codes, scales = OPS["quantize"].reference(x, name, 1, **arguments)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scales, scales)
    assert same_bits(
        fp4compile.fake_quantize(x, name, 1, **options),
        OPS["fake_quantize"].reference(x, name, 1, **arguments),
    )


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "rule"), [(f.name, rule) for f in FORMATS.values() for rule in f.scale_rules])
def test_the_ends_of_the_range_equal_the_reference_and_stay_finite(name, rule, dtype, rounding):
    limits = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    mantissa = torch.rand(64, 128, generator=generator) * 2 - 1
    for end in (limits.max, limits.smallest_normal / 64):
        x = (mantissa.double() * end).to(dtype)
        x[0] = end
        options = {"rounding": rounding, "scale_rule": rule}
        y = fp4compile.fake_quantize(x, name, seed=1, **options)
        scaled = FORMATS[name].is_scaled_per_tensor(rule)
        scale = OPS["tensor_scale"].reference(x, name, scale_rule=rule) if scaled else None
        arguments = {**options, "seed": torch.tensor(1), "tensor_scale": scale}
        assert same_bits(y, OPS["fake_quantize"].reference(x, name, 1, **arguments))
        assert y.isfinite().all()


def test_tensor_scale_options():
    x = randn(4, 64)
    amax = x.abs().amax()
    assert fp4compile.quantize(x, "nvfp4").tensor_scale == amax / 2688
    assert fp4compile.quantize(x, "nvfp4", tensor_scale=True).tensor_scale == amax / 2688
    assert fp4compile.quantize(x, "nvfp4", tensor_scale=False).tensor_scale is None
    given = fp4compile.quantize(x, "nvfp4", tensor_scale=0.1).tensor_scale
    assert given.dtype == torch.float32
    assert given.shape == ()
    assert given == torch.tensor(0.1)
    for name in ("hif4", "mxfp4"):
        assert fp4compile.quantize(x, name, tensor_scale=False).tensor_scale is None


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_an_int_or_a_tensor(name):
    x = randn(8, 128)
    a, b, c = (
        fp4compile.fake_quantize(x, name, rounding="stochastic", seed=seed, scale_rule="truncation-free")
        for seed in (7, torch.tensor(7), 8)
    )
    assert same_bits(a, b)
    assert not same_bits(a, c)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_straight_through(name, dtype):
    x = randn(6, 70).to(dtype).requires_grad_()
    weight = randn(6, 70, seed=1).to(dtype)
    (fp4compile.fake_quantize(x, name, 0) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert not fp4compile.quantize(x, name).codes.requires_grad


# --- compiled -----------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_gives_the_same_bits(dynamo, name, dtype):
    def all_three(x: Tensor) -> list[Tensor]:
        # The arithmetic around the calls tempts Inductor to fuse across them.
        results = []
        for axis in (0, -1):
            y = x * 0.7 + 0.1
            q = fp4compile.quantize(y, name, axis)
            random = {"rounding": "stochastic", "seed": 3, "scale_rule": "truncation-free"}
            results += [
                fp4compile.fake_quantize(y, name, axis=axis),
                fp4compile.fake_quantize(y, name, axis=axis, **random),
                q.codes,
                q.scales,
                fp4compile.dequantize(q, dtype),
                y,
            ]
        return results

    x = randn(70, 40).to(dtype)
    compiled = torch.compile(all_three, backend="inductor", fullgraph=True)(x)
    # y itself may differ from eager: Inductor keeps bf16 intermediates in fp32. The functions are compared on
    # its y.
    for i, axis in ((0, 0), (6, -1)):
        faked, random, codes, scales, decoded, y = compiled[i : i + 6]
        q = fp4compile.quantize(y, name, axis)
        assert torch.equal(codes, q.codes)
        assert torch.equal(scales, q.scales)
        assert same_bits(decoded, fp4compile.dequantize(q, dtype))
        assert same_bits(faked, fp4compile.fake_quantize(y, name, axis))
        options = {"rounding": "stochastic", "seed": 3, "scale_rule": "truncation-free"}
        assert same_bits(random, fp4compile.fake_quantize(y, name, axis, **options))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_alone_and_with_dynamic_sizes(dynamo, name):
    faked = torch.compile(lambda x: fp4compile.fake_quantize(x, name, axis=0), fullgraph=True, dynamic=True)
    for shape in ((70, 40), (33, 9), (64, 64)):
        x = randn(*shape)
        assert same_bits(faked(x), fp4compile.fake_quantize(x, name, axis=0))


def test_a_compiled_function_returns_a_quantized(dynamo):
    x = randn(4, 96)
    q = torch.compile(lambda x: fp4compile.quantize(x, "hif4"), fullgraph=True)(x)
    assert isinstance(q, fp4compile.Quantized)
    assert same_bits(fp4compile.dequantize(q), fp4compile.fake_quantize(x, "hif4"))


def test_exported(dynamo):
    class Faked(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fp4compile.fake_quantize(x, "nvfp4", axis=0)

    x = randn(70, 8)
    assert same_bits(torch.export.export(Faked(), (x,)).module()(x), fp4compile.fake_quantize(x, "nvfp4", axis=0))


# --- what they refuse ---------------------------------------------------------------------------------------

X = randn(4, 64)

REFUSED = [
    # tensor, format, options, error, what its message names
    (X, "fp4", {}, FP4ValueError, ["format 'fp4'", "hif4, mxfp4, nvfp4"]),
    (X, "mxpf4", {}, FP4ValueError, ["Did you mean 'mxfp4'?"]),
    (X, "hif4", {"rounding": "up"}, FP4ValueError, ["rounding of format hif4: 'up'", "nearest, stochastic"]),
    (X, "hif4", {"scale_rule": "floor"}, FP4ValueError, ["format hif4: 'floor'", "authors, truncation-free"]),
    (
        X,
        "mxfp4",
        {"scale_rule": "up"},
        FP4ValueError,
        ["'up'", "ceil, even, floor, floor-3/4, gaussian, rceil, truncation-free"],
    ),
    (X, "mxfp4", {"scale_rule": "4over6"}, FP4ValueError, ["scale rule of format mxfp4: '4over6'", "of nvfp4"]),
    (X, "hif4", {"rounding": "eden", "seed": 1}, FP4ValueError, ["rounding of format hif4: 'eden'", "of nvfp4"]),
    (X, "nvfp4", {"rounding": "eden"}, FP4ValueError, ["rounding='eden' needs a seed"]),
    (X, "mxfp4", {"scale_rule": "floor-3/4", "tensor_scale": 2.0}, FP4ValueError, ["fixed tensor scale"]),
    (X, "hif4", {"axis": 2}, FP4ValueError, ["axis 2", "(4, 64)", "-2..1"]),
    (X, "hif4", {"axis": -3}, FP4ValueError, ["axis -3", "-2..1"]),
    (X, "hif4", {"axis": 0.0}, FP4ValueError, ["axis 0.0", "-2..1"]),
    (X.int(), "hif4", {}, FP4TypeError, ["int32", "float32, bfloat16, float16"]),
    (X.double(), "hif4", {}, FP4TypeError, ["float64", "float32, bfloat16, float16"]),
    (X.to(torch.complex64), "hif4", {}, FP4TypeError, ["complex64", "float32, bfloat16, float16"]),
    (X.bool(), "hif4", {}, FP4TypeError, ["bool", "float32, bfloat16, float16"]),
    ([1.0, 2.0], "hif4", {}, FP4TypeError, ["torch.Tensor", "list"]),
    (torch.tensor(1.0), "hif4", {}, FP4ValueError, ["0-d"]),
    (X, "hif4", {"rounding": "stochastic"}, FP4ValueError, ["seed", "int or a 0-d int64 tensor"]),
    (X, "hif4", {"rounding": "stochastic", "seed": -1}, FP4ValueError, ["[0, 2**63)", "-1"]),
    (X, "hif4", {"rounding": "stochastic", "seed": 2**63}, FP4ValueError, ["[0, 2**63)", str(2**63)]),
    (
        X,
        "hif4",
        {"rounding": "stochastic", "seed": 1.5},
        FP4TypeError,
        ["float", "int or a 0-d int64 tensor"],
    ),
    (X, "hif4", {"rounding": "stochastic", "seed": torch.tensor([1])}, FP4TypeError, ["0-d int64", "(1,)"]),
    (
        X,
        "hif4",
        {"rounding": "stochastic", "seed": torch.tensor(1.0)},
        FP4TypeError,
        ["0-d int64", "float32"],
    ),
    (X, "hif4", {"block_2d": True}, FP4ValueError, ["hif4 has no 2-D blocks", "mxfp4, nvfp4"]),
    (X[0], "mxfp4", {"block_2d": True}, FP4ValueError, ["last two axes", "(64,)"]),
    (X[None], "mxfp4", {"block_2d": True, "axis": 0}, FP4ValueError, ["last two axes", "axis 0"]),
    (X, "hif4", {"tensor_scale": 1.0}, FP4ValueError, ["hif4 has no tensor scale", "nvfp4"]),
    (X, "mxfp4", {"tensor_scale": True}, FP4ValueError, ["mxfp4 has no tensor scale", "nvfp4"]),
    *(
        (X, "nvfp4", {"tensor_scale": given}, FP4ValueError, ["tensor_scale", repr(given)])
        for given in (0.0, -1.0, float("nan"), float("inf"), "1", 1e-60, 1e60)
    ),
    (X, "nvfp4", {"tensor_scale": torch.ones(2)}, FP4TypeError, ["one floating-point number", "(2,)"]),
    (X, "nvfp4", {"tensor_scale": torch.tensor(1)}, FP4TypeError, ["one floating-point number", "int64"]),
]


@pytest.mark.parametrize("function", [fp4compile.quantize, fp4compile.fake_quantize], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("x", "format", "options", "error", "named"),
    REFUSED,
    ids=lambda v: v[0] if isinstance(v, list) and isinstance(v[0], str) else "",
)
def test_bad_input_is_named_with_what_is_allowed(function, x, format, options, error, named):
    with pytest.raises(error) as raised:
        function(x, format, **options)
    assert all(words in str(raised.value) for words in named), str(raised.value)


@pytest.mark.parametrize(
    ("q", "dtype", "named"),
    [
        (X, torch.float32, ["Quantized", "Tensor"]),
        (fp4compile.quantize(X, "hif4"), torch.float64, ["float64", "fp32, bf16, fp16"]),
        (fp4compile.quantize(X, "hif4"), torch.int8, ["int8", "fp32, bf16, fp16"]),
    ],
    ids=["tensor", "float64", "int8"],
)
def test_dequantize_refuses(q, dtype, named):
    with pytest.raises(FP4TypeError) as raised:
        fp4compile.dequantize(q, dtype)
    assert all(words in str(raised.value) for words in named)
