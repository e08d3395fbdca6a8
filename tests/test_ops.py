"""Every op on its own samples: real and fake agree, opcheck is clean; and the gradients."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fp4compile.dispatch import install_kernels
from fp4compile.errors import FP4ValueError
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS

# One sample in this many goes through opcheck, which traces each call several times. Coprime to the samples
# per input.
THIN = 43


@pytest.fixture(scope="module", autouse=True)
def kernels():
    install_kernels()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layout(outputs: object) -> list[tuple]:
    return [(t.shape, t.dtype, t.stride(), t.device) for t in tree_leaves(outputs)]


def memory(x: Tensor) -> Tensor:
    """The bytes of a tensor: some dtypes have no arithmetic, and NaN equals NaN here."""
    return x.contiguous().flatten().view(torch.uint8)


def has_nan(outputs: object) -> bool:
    return any(bool(t.isnan().any()) for t in tree_leaves(outputs))


@pytest.mark.parametrize("name", OPS)
def test_fake_agrees_with_real_on_every_sample(name):
    op, count = OPS[name], 0
    for sample in op.samples():
        mode = FakeTensorMode()
        fake = tree_map_only(Tensor, mode.from_tensor, dict(sample))
        with mode:
            expected = layout(op.overload(**fake))
        assert layout(op.overload(**sample)) == expected, sample
        count += 1
    assert count


@pytest.mark.parametrize("name", [name for name in OPS if "mm" in name])
def test_autocast_reaches_nothing_within_an_op(name):
    for sample in itertools.islice(OPS[name].samples(), 0, None, THIN):
        expected = OPS[name].overload(**sample)
        with torch.autocast("cpu", torch.bfloat16):
            got = OPS[name].overload(**sample)
        assert layout(got) == layout(expected)
        assert all(
            torch.equal(memory(a), memory(b)) for a, b in zip(tree_leaves(got), tree_leaves(expected), strict=True)
        )


@pytest.mark.parametrize("name", OPS)
def test_references_copy_nothing_from_the_host(name, monkeypatch):
    """Which a CUDA graph could not hold; and what they kept of a call would lie in its memory."""
    samples = list(itertools.islice(OPS[name].samples(), 0, None, THIN))

    def refused(*args, **kwargs):
        raise AssertionError("a copy from the host")

    monkeypatch.setattr(torch, "tensor", refused)
    monkeypatch.setattr(torch, "as_tensor", refused)
    for sample in samples:
        OPS[name].reference(**sample)


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone_and_results_are_their_own(name):
    for sample in itertools.islice(OPS[name].samples(), 0, None, THIN):
        tensors = [v for v in sample.values() if isinstance(v, Tensor)]
        before = [t.clone() for t in tensors]
        outputs = tree_leaves(OPS[name].overload(**sample))
        assert all(torch.equal(memory(a), memory(b)) for a, b in zip(tensors, before, strict=True))
        owned = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        assert not any(t.numel() and t.untyped_storage().data_ptr() in owned for t in outputs)


def compares(sample: Mapping[str, object]) -> bool:
    """Whether opcheck can compare tensors of a sample's dtypes: it cannot multiply FP8."""
    return all(v.dtype != torch.float8_e4m3fn for v in sample.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    op = OPS[name]
    for sample in itertools.islice(op.samples(), 0, None, THIN):
        utils = ["test_autograd_registration", "test_faketensor"]
        if compares(sample):
            utils.append("test_schema")
        # Compares the values of two calls, and NaN to NaN is unequal to it.
        repeats = torch.Tag.nondeterministic_seeded not in op.tags
        if repeats and compares(sample) and not has_nan(op.overload(**sample)):
            utils.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(op.overload, (), dict(sample), test_utils=utils)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_opcheck_every_sample(name):
    op = OPS[name]
    for sample in op.samples():
        utils = ["test_faketensor", *(["test_schema"] if compares(sample) else [])]
        torch.library.opcheck(op.overload, (), dict(sample), test_utils=utils)


@pytest.mark.parametrize("name", ["fake_quantize", "mm"])
def test_opcheck_with_gradients(name):
    for sample in itertools.islice(OPS[name].samples(), 0, None, THIN if name == "fake_quantize" else 1):
        if (
            sample.get("hadamard")
            or sample.get("producer")
            or (name == "mm" and ("b_format" not in sample or "a_format" in sample or "activation" in sample))
        ):
            continue  # have no gradient
        first = "x" if name == "fake_quantize" else "a"
        # As in test_opcheck: no NaN.
        arguments = {**sample, first: sample[first].nan_to_num(0.0, 1.0, -1.0).requires_grad_()}
        torch.library.opcheck(OPS[name].overload, (), arguments)


def test_draw_seed():
    torch.manual_seed(0)
    first, second = (torch.ops.fp4compile.draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(torch.ops.fp4compile.draw_seed(torch.device("cpu")), first)
    assert first != second
    assert first.dtype == torch.int64
    assert first.shape == ()
    assert all(0 <= v < 2**32 for v in (first, second))
    assert torch.Tag.nondeterministic_seeded in OPS["draw_seed"].overload.tags


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_fake_quantize_is_straight_through(name, rounding):
    x, w = randn(5, 70).requires_grad_(), randn(5, 70, seed=1)
    y = torch.ops.fp4compile.fake_quantize(x, name, 0, rounding=rounding, seed=torch.tensor(1))
    (y * w).sum().backward()
    assert torch.equal(x.grad, w)


def test_fake_quantize_with_a_transform_has_no_gradient():
    x = randn(5, 64).requires_grad_()
    with pytest.raises(FP4ValueError, match="no straight-through gradient"):
        torch.ops.fp4compile.fake_quantize(x, "hif4", -1, hadamard=16)


PACKED = [(f.name, edge) for f in FORMATS.values() for edge in {False, f.block_2d is not None}]


def packed_weight(name: str, block_2d: bool) -> tuple[dict[str, object], Tensor]:
    """The arguments of `mm` for a packed weight of logical shape [70, 9], and its dense value [9, 70]."""
    w = randn(9, 70, seed=1)
    scale = torch.ops.fp4compile.tensor_scale(w, name) if FORMATS[name].has_tensor_scale else None
    codes, scales = torch.ops.fp4compile.quantize(w, name, 1, block_2d=block_2d, tensor_scale=scale)
    arguments = {
        "b": codes,
        "b_scales": scales,
        "b_tensor_scale": scale,
        "b_format": name,
        "b_block_2d": block_2d,
        "k": 70,
    }
    return arguments, torch.ops.fp4compile.dequantize(codes, scales, scale, name, 1, 70, block_2d, torch.float32)


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
@pytest.mark.parametrize(("name", "block_2d"), PACKED)
def test_mm_with_a_packed_weight_is_a_linear_layer(name, block_2d, batch):
    packed, dense = packed_weight(name, block_2d)
    results = []
    for forward in (
        lambda a, bias: torch.ops.fp4compile.mm(a, bias=bias, **packed),
        lambda a, bias: torch.nn.functional.linear(a, dense, bias),
    ):
        a, bias = randn(*batch, 70).requires_grad_(), randn(9, seed=2).requires_grad_()
        out = forward(a, bias)
        (out * randn(*batch, 9, seed=3)).sum().backward()
        results.append((out.detach(), a.grad, bias.grad))
    # fp32 sums of at most 70 products, in any order, around a scale that is applied before or after the sum:
    # at most 72 roundings of 2**-24 relative to the sum of magnitudes.
    (out, grad, grad_bias), expected = results
    g = randn(*batch, 9, seed=3).abs()
    sizes = (
        a.detach().abs() @ dense.abs().t() + bias.detach().abs(),
        g @ dense.abs(),
        g.flatten(0, -2).sum(0),
    )
    for value, other, size in zip((out, grad, grad_bias), expected, sizes, strict=True):
        assert ((value - other).abs() <= 72 * 2.0**-24 * size).all()


def test_mm_without_a_packed_weight_has_no_gradient():
    a, b = randn(5, 70).requires_grad_(), randn(70, 9)
    with pytest.raises(FP4ValueError, match="packed second operand"):
        torch.ops.fp4compile.mm(a, b)


def test_mm_with_an_activation_has_no_gradient():
    packed, _ = packed_weight("hif4", False)
    for options in ({"activation": "silu"}, {"factor": randn(5, 9)}):
        with pytest.raises(FP4ValueError, match="an activation or a factor has no gradient"):
            torch.ops.fp4compile.mm(randn(5, 70).requires_grad_(), **options, **packed)


@pytest.mark.parametrize(
    ("activation", "what"), [("sillu", "unknown activation 'sillu'.* 'silu'"), ("swiglu", "9 rows .* no two parts")]
)
def test_mm_says_which_activations_there_are(activation, what):
    packed, _ = packed_weight("hif4", False)
    for device in ("cpu", "meta"):
        given = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in packed.items()}
        with pytest.raises(FP4ValueError, match=what):
            torch.ops.fp4compile.mm(torch.zeros(5, 70, device=device), activation=activation, **given)


def test_a_tensor_scale_outside_the_operand_reaches_the_gradient():
    packed, dense = packed_weight("nvfp4", False)
    x, g = randn(5, 70).requires_grad_(), randn(5, 9, seed=3)
    scale = torch.ops.fp4compile.tensor_scale(x.detach(), "nvfp4")
    a = torch.ops.fp4compile.fake_quantize(x, "nvfp4", -1, tensor_scale=scale, fold=False)
    a.retain_grad()
    torch.ops.fp4compile.mm(a, a_tensor_scale=scale, **packed).backward(g)
    # As above; a few more roundings for multiplying and dividing by the scale.
    bound = 16 * 2.0**-24 * (g.abs() @ dense.abs())
    assert ((a.grad - (g @ dense) * scale).abs() <= bound * scale).all()
    assert ((x.grad - g @ dense).abs() <= bound).all()
