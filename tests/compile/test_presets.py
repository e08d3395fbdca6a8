"""Every published recipe on one linear layer: each role's arithmetic written out by hand, equal to the last bit.

The arithmetic of the ingredients themselves (scale rules, corrections, clip masks) is rebuilt in `test_ingredients`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4compile.hadamard import hadamard, inverse_hadamard
from fp4compile.presets import presets
from tests.compile.common import LlamaBlock, build, compiled, randn, statuses, step

# An element that another order of sums carries across a rounding boundary changes one code of one block.
FLIPPED = 2e-3
TOKENS, INPUTS, OUTPUTS = 24, 256, 128  # a transform along the tokens is padded
OPS = torch.ops.fp4compile

Operand = tuple[Tensor, list[Tensor]]  # values, and tensor scales left out of them
Step = tuple[Tensor, Tensor, Tensor]  # output, weight gradient, input gradient


@dataclass(frozen=True)
class Draw:
    """The step's seed. GEMMs count from 1 in the order of the graph: forward, wgrad, dgrad."""

    seed: Tensor

    def signs(self, gemm: int) -> Tensor:
        return self.seed + (gemm << 32)

    def stochastic(self, stream: int, rounding: str = "stochastic") -> dict[str, Any]:
        return {"rounding": rounding, "seed": self.seed, "stream": stream}


def mxfp4(x: Tensor, axis: int, scale_rule: str, **options: Any) -> Operand:
    return OPS.fake_quantize(x, "mxfp4", axis, scale_rule=scale_rule, **options), []


def shrunk(x: Tensor, axis: int, **options: Any) -> Operand:
    """Stochastic rounding of 3/4 of the values; 4/3 is left for the accumulator."""
    fold = {"tensor_scale": torch.tensor(4 / 3), "fold": False}
    return OPS.fake_quantize(x, "mxfp4", axis, scale_rule="floor-3/4", **fold, **options), [fold["tensor_scale"]]


def nvfp4(x: Tensor, axis: int, cap: float = 448.0 * 6.0, **options: Any) -> Operand:
    """`cap`: what the tensor's amax is in units of its scale."""
    size, signs = options.get("hadamard", 0), options.get("sign_seed")
    t = hadamard(x, axis, size, signs) if size else x
    scale = t.abs().amax().float() / torch.tensor(cap)
    return OPS.fake_quantize(x, "nvfp4", axis, tensor_scale=scale, fold=False, **options), [scale]


def again(requantise: Callable[..., Operand], quantised: Operand, axis: int, **options: Any) -> Operand:
    """Quantise what the forward read; the tensor scale that this lacks stays left out."""
    values, left_out = quantised
    made, scales = requantise(values, axis, **options)
    return made, [left_out[0] * scales[0]] if left_out and scales else left_out + scales


def gemm(a: Operand, b: Operand) -> Tensor:
    """a b, fp32 sums, tensor scales on them."""
    scales = [*a[1], *b[1]]
    if not scales:
        return a[0] @ b[0]
    out = a[0].float() @ b[0].float()
    for scale in scales:
        out = out * scale
    return out.to(a[0].dtype)


def transposed(operand: Operand) -> Operand:
    return operand[0].T, operand[1]


# --- by hand: x [tokens, in], w [out, in], g [tokens, out] ------------------------------------------------------------


def hif4(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def plain(t: Tensor, axis: int, size: int = 0) -> Operand:
        return OPS.fake_quantize(t, "hif4", axis, hadamard=size), []

    y = gemm(plain(x, 1), transposed(plain(w, 1)))
    dw = gemm(transposed(plain(g, 0, 64)), plain(x, 0, 64))
    return y, dw, gemm(plain(g, 1, 64), plain(w, 0, 64))


def mxfp4_recommended(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def rht(t: Tensor, axis: int, **options: Any) -> Operand:
        return mxfp4(t, axis, "rceil", hadamard=32, **options)

    y = gemm(mxfp4(x, 1, "rceil"), transposed(mxfp4(w, 1, "rceil")))
    dw = gemm(transposed(rht(g, 0, **draw.stochastic(2))), rht(x, 0))
    return y, dw, gemm(rht(g, 1, **draw.stochastic(4)), rht(w, 0))


def nvfp4_recommended(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    y = gemm(nvfp4(x, 1), transposed(nvfp4(w, 1, block_2d=True)))
    dw = gemm(transposed(nvfp4(g, 0, hadamard=16, **draw.stochastic(2))), nvfp4(x, 0, hadamard=16))
    return y, dw, gemm(nvfp4(g, 1, **draw.stochastic(4)), nvfp4(w, 0, block_2d=True))


def mxfp4_tseng(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def sr(t: Tensor, axis: int, number: int, stream: int) -> Operand:
        return shrunk(t, axis, hadamard=64, sign_seed=draw.signs(number), **draw.stochastic(stream))

    dw = gemm(transposed(sr(g, 0, 2, 0)), sr(x, 0, 2, 1))
    return x @ w.T, dw, gemm(sr(g, 1, 3, 2), sr(w, 0, 3, 3))


def quartet(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def backward(number: int) -> dict[str, Any]:
        return {"hadamard": 32, "sign_seed": draw.signs(number)}

    def masked(gradient: Tensor, original: Tensor) -> Tensor:
        rotated = hadamard(original, 1, 32)
        blocks = rotated.double().unflatten(1, (-1, 32))
        spread = blocks.square().mean(-1, keepdim=True).sqrt()
        beyond = (blocks.abs() > 6 * torch.exp2((spread * 2.92247856 / 6).log2().floor())).flatten(1)
        assert 0.001 < beyond.float().mean() < 0.1
        return inverse_hadamard(gradient.float().masked_fill(beyond, 0.0), 1, 32).to(gradient.dtype)

    x_q, w_q = (mxfp4(t, 1, "gaussian", hadamard=32) for t in (x, w))
    dw = gemm(
        transposed(shrunk(g, 0, **backward(2), **draw.stochastic(2))),
        again(shrunk, x_q, 0, **backward(2), **draw.stochastic(3)),
    )
    dx = gemm(
        shrunk(g, 1, **backward(3), **draw.stochastic(4)),
        again(shrunk, w_q, 0, **backward(3), **draw.stochastic(5)),
    )
    return gemm(x_q, transposed(w_q)), masked(dw, w), masked(dx, x)


def fp4_all_the_way(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    dw = gemm(transposed(nvfp4(g, 0, **draw.stochastic(2))), nvfp4(x, 0, **draw.stochastic(3)))
    dx = gemm(nvfp4(g, 1, **draw.stochastic(4)), nvfp4(w, 0))
    return gemm(nvfp4(x, 1), transposed(nvfp4(w, 1))), dw, dx


def tetrajet(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def sr(t: Tensor, axis: int, stream: int) -> Operand:
        return mxfp4(t, axis, "rceil", **draw.stochastic(stream))

    x_q, w_q = mxfp4(x, 1, "rceil"), mxfp4(w, 1, "rceil")
    dw = gemm(transposed(sr(g, 0, 2)), again(sr, x_q, 0, stream=3))
    return gemm(x_q, transposed(w_q)), dw, gemm(sr(g, 1, 4), again(sr, w_q, 0, stream=5))


def tetrajet_v2(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def sr(t: Tensor, axis: int, number: int, stream: int) -> Operand:
        transform = {"hadamard": 32, "sign_seed": draw.signs(number)}
        return nvfp4(t, axis, 448 * (6 * 16 / 17), scale_rule="17/16", **transform, **draw.stochastic(stream))

    x_q, w_q = nvfp4(x, 1), nvfp4(w, 1)
    dw = gemm(transposed(sr(g, 0, 2, 2)), again(sr, x_q, 0, number=2, stream=3))
    dx = gemm(sr(g, 1, 3, 4), again(sr, w_q, 0, number=3, stream=5))
    return gemm(x_q, transposed(w_q)), dw, dx


def quartet2(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def eden(t: Tensor, axis: int, number: int, stream: int) -> Operand:
        transform = {"hadamard": 128, "sign_seed": draw.signs(number)}
        cap = 255.99 * 6 / (17 / 16 * 0.93)
        return nvfp4(t, axis, cap, scale_rule="eden", **transform, **draw.stochastic(stream, "eden"))

    x_q, w_q = (nvfp4(t, 1, 256.0 * 6.0, scale_rule="4over6") for t in (x, w))
    dw = gemm(transposed(eden(g, 0, 2, 2)), again(eden, x_q, 0, number=2, stream=3))
    dx = gemm(eden(g, 1, 3, 4), again(eden, w_q, 0, number=3, stream=5))
    return gemm(x_q, transposed(w_q)), dw, dx


def nvfp4_4over6(x: Tensor, w: Tensor, g: Tensor, draw: Draw) -> Step:
    def chosen(t: Tensor, axis: int, block_2d: bool = False) -> Operand:
        return nvfp4(t, axis, 256.0 * 6.0, scale_rule="4over6", block_2d=block_2d)

    dw = gemm(transposed(nvfp4(g, 0, hadamard=16, **draw.stochastic(2))), nvfp4(x, 0, hadamard=16))
    dx = gemm(nvfp4(g, 1, **draw.stochastic(4)), chosen(w, 0, True))
    return gemm(chosen(x, 1), transposed(chosen(w, 1, True))), dw, dx


BY_HAND: Mapping[str, Callable[[Tensor, Tensor, Tensor, Draw], Step]] = {
    "hif4": hif4,
    "mxfp4": mxfp4_recommended,
    "nvfp4": nvfp4_recommended,
    "mxfp4-tseng": mxfp4_tseng,
    "quartet": quartet,
    "fp4-all-the-way": fp4_all_the_way,
    "tetrajet": tetrajet,
    "tetrajet-v2": tetrajet_v2,
    "quartet2": quartet2,
    "nvfp4-4over6": nvfp4_4over6,
}


def measured(name: str, dtype: torch.dtype, seed: int = 3) -> tuple[Step, Step]:
    """A compiled training step, and the same by hand."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False).to(dtype)
    x, g = randn(TOKENS, INPUTS, dtype=dtype), randn(TOKENS, OUTPUTS, seed=1, dtype=dtype)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = compiled(layer, name)(leaf)
    y.backward(g)
    torch.manual_seed(seed)
    draw = Draw(torch.randint(0, 2**32, (), dtype=torch.int64))
    assert layer.weight.grad is not None and leaf.grad is not None
    with torch.no_grad():
        return (y.detach(), layer.weight.grad, leaf.grad), BY_HAND[name](x, layer.weight, g, draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BY_HAND)
def test_a_step_is_its_arithmetic_by_hand(name: str, dtype: torch.dtype) -> None:
    got, wanted = measured(name, dtype)
    for what, a, b in zip(("output", "weight gradient", "input gradient"), got, wanted, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b), f"{what}: {(a - b).abs().max()}"
    forward = "kept" if name == "mxfp4-tseng" else "fp4"
    assert statuses() == {("", "forward"): forward, ("", "wgrad"): "fp4", ("", "dgrad"): "fp4"}


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_HAND)
def test_inductor_computes_the_same_on_a_whole_model(name: str) -> None:
    """Partitioned and compiled: the bits of codecs and draws are the reference's, sums come in another order."""
    model = build(lambda: LlamaBlock(128, groups=4))
    x = randn(2, 20, 128)
    wanted = step(compiled(model, name), x, 5).check()
    torch._dynamo.reset()
    got = step(compiled(model, name, "inductor"), x, 5).check()
    assert got.worst(wanted) < FLIPPED
    assert {"fp4"} <= set(statuses().values()) <= {"fp4", "kept"}


def test_every_published_recipe_is_here() -> None:
    inference_or_plain = ("-plain", "-w4a16", "-w4a4")
    assert {recipe.name for recipe in presets() if not recipe.name.endswith(inference_or_plain)} == set(BY_HAND)
