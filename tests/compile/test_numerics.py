"""A compiled model computes what FP4 autograd written by hand computes: outputs and every gradient."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.compile.common import (
    Hand,
    LlamaBlock,
    Mlp,
    Treatment,
    build,
    by_hand,
    compiled,
    plain,
    randn,
    relative,
    statuses,
    step,
)

FORMATS = ("hif4", "mxfp4", "nvfp4")
BACKENDS = ("reference", pytest.param("inductor", marks=pytest.mark.slow))
MODELS = {"mlp": (Mlp, (13, 70)), "llama": (LlamaBlock, (2, 13, 64))}

# The reference backend runs the same torch ops as the code by hand does; only sums of bias gradients and of residual
# branches come in another order. An element that such a difference carries across a rounding boundary changes one
# code of one block, in these sizes up to 1e-3 of a tensor's norm: other libraries or compilers may meet one.
SAME = 2e-6
FLIPPED = 2e-3
BOUND = {"reference": SAME, "inductor": FLIPPED}


def _case(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, torch.Tensor]:
    make, shape = MODELS[name]
    return build(make).to(dtype), randn(*shape, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("format", FORMATS)
def test_plain_recipes_are_fp4_autograd(format: str, name: str, backend: str) -> None:
    model, x = _case(name)
    wanted = step(by_hand(model, plain(format)), x).check()
    got = step(compiled(model, f"{format}-plain", backend), x)
    assert got.worst(wanted) < BOUND[backend]
    assert min(step(model, x).error(wanted).values()) > 10 * FLIPPED or name == "mlp"
    assert set(statuses().values()) == {"fp4"}


@pytest.mark.parametrize("format", ["hif4", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_inductor_on_the_mlp(format: str) -> None:
    """The fast part of the above for the default backend, chosen by its name "auto"."""
    model, x = _case("mlp")
    wanted = step(by_hand(model, plain(format)), x)
    assert step(compiled(model, f"{format}-plain", "auto"), x).worst(wanted) < FLIPPED


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("name", ["llama", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", FORMATS)
def test_bf16_and_autocast(format: str, name: str, autocast: bool, backend: str) -> None:
    """bf16 operands hold codes times block scales exactly; NVFP4's tensor scale multiplies the fp32 accumulator.

    Fused, Inductor keeps intermediates in fp32 that eager rounds to bf16, which moves inputs of quantisers by an ulp
    and codes by a step; told to round like eager, it agrees as tightly as in fp32.
    """
    model, x = _case(name, torch.float32 if autocast else torch.bfloat16)
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precision, torch._inductor.config.patch(emulate_precision_casts=True):
        wanted = step(by_hand(model, plain(format)), x).check()
        got = step(compiled(model, f"{format}-plain", backend), x)
    assert got.worst(wanted) < FLIPPED
    assert step(model, x).tensors["output"].dtype == (torch.float32 if autocast else torch.bfloat16)


# --- recommended recipes ---------------------------------------------------------------------------------------------


def _recommended(format: str, rounded: bool) -> Treatment:
    """Operands of the recommended recipes; `rounded=False` leaves the gradients that are rounded stochastically."""
    if format == "hif4":
        forward, backward = Hand("hif4"), Hand("hif4", hadamard=64)
        return {"forward": (forward, forward), "dgrad": (backward, backward), "wgrad": (backward, backward)}
    if format == "mxfp4":
        forward = Hand("mxfp4", options={"scale_rule": "truncation-free"})
        backward = replace(forward, hadamard=32)
        grad = replace(backward, quantize=rounded)
        return {"forward": (forward, forward), "dgrad": (grad, backward), "wgrad": (grad, backward)}
    x, weight = Hand("nvfp4"), Hand("nvfp4", options={"block_2d": True})
    grad, transformed = Hand("nvfp4", quantize=rounded), Hand("nvfp4", hadamard=16)
    return {
        "forward": (x, weight),
        "dgrad": (grad, weight),
        "wgrad": (replace(transformed, quantize=rounded), transformed),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_recommended_hif4_is_a_hadamard_transform_in_the_backward(backend: str) -> None:
    """Round to nearest everywhere, so that all of it can be rebuilt; 26 tokens are padded to 64 in wgrad."""
    model, x = build(lambda: LlamaBlock(128)), randn(2, 13, 128)
    wanted = step(by_hand(model, _recommended("hif4", True)), x).check()
    got = step(compiled(model, "hif4", backend), x)
    assert got.worst(wanted) < BOUND[backend]
    assert step(by_hand(model, plain("hif4")), x).worst(wanted) > 10 * FLIPPED  # the transform shows


def _stochastic(format: str, backend: str = "reference") -> tuple[torch.nn.Module, torch.Tensor, torch.nn.Module]:
    model, x = build(lambda: Mlp(64, 128, 64, 32)), randn(13, 64)
    return model, x, compiled(model, format, backend)


@pytest.mark.parametrize("format", ["mxfp4", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_stochastic_gradients_have_the_right_mean(format: str) -> None:
    """Errors of independent steps average out: over n steps the error shrinks by sqrt(n), to that factor itself.

    The mean is what the code by hand gives with those gradients left unrounded. Two-level NVFP4 scales let the top of a
    block saturate, a bias of 0.35% that is lost in the bound.
    """
    model, x, fp4 = _stochastic(format, "inductor")
    wanted = step(by_hand(model, _recommended(format, False)), x)
    steps = [step(fp4, x, seed).check() for seed in range(48)]
    assert relative(steps[0].tensors["output"], wanted.tensors["output"]) < SAME
    for name in ("input", "first.weight", "second.weight", "third.weight", "first.bias", "second.bias"):
        values = [s.tensors[name] for s in steps]
        single = sum(relative(v, wanted.tensors[name]) for v in values) / len(values)
        mean = relative(torch.stack(values).mean(0), wanted.tensors[name])
        assert single > 0.02, name
        assert 0.6 < mean * len(values) ** 0.5 / single < 1.5, name


@pytest.mark.parametrize("format", ["mxfp4", pytest.param("nvfp4", marks=pytest.mark.slow)])
def test_the_global_seed_decides_stochastic_rounding(format: str) -> None:
    model, x, fp4 = _stochastic(format)
    first, again, other = (step(fp4, x, seed) for seed in (1, 1, 2))
    assert first.worst(again) == 0.0
    assert relative(other.tensors["output"], first.tensors["output"]) == 0.0  # the forward rounds to nearest
    assert relative(other.tensors["first.weight"], first.tensors["first.weight"]) > 0.02
    weight = model.first.weight
    one, two = (torch.autograd.grad(fp4(x).sum(), weight)[0] for _ in range(2))
    assert relative(one, two) > 0.02  # the generator moves on: no step repeats the last one's bits


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_both_backends_round_with_the_same_bits(format: str) -> None:
    model, x, reference = _stochastic(format)
    wanted = step(reference, x, 5)
    torch._dynamo.reset()
    assert step(compiled(model, format, "inductor"), x, 5).worst(wanted) < FLIPPED


def test_the_draw_is_torchs_own() -> None:
    """One draw of 32 bits per step from the global generator, so that a checkpointed generator state resumes it."""
    _, x, fp4 = _stochastic("mxfp4")
    step(fp4, x)
    torch.manual_seed(3)
    fp4(x).sum().backward()
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randint(0, 2**32, (), dtype=torch.int64)
    assert torch.equal(after, torch.get_rng_state())


def test_a_function_of_tensors_alone_has_nothing_to_quantise() -> None:
    fp4 = torch.compile(F.linear, backend="fp4compile", options={"recipe": "hif4-plain", "backend": "reference"})
    x, w = randn(5, 64), randn(7, 64)
    assert torch.equal(fp4(x, w), F.linear(x, w))
    assert statuses() == {}
