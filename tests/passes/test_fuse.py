"""Pairs, transforms and packed weights are fused; what only looks like one is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp4compile.ops import OPS
from tests.helpers import capture, export, randn, same_bits, trace

ops = torch.ops.fp4compile
X = randn(4, 64)
CODES, SCALES = OPS["quantize"].reference(randn(32, 64, seed=1), "mxfp4", 1)
SCALE = torch.tensor(0.5)


def encode(x: Tensor, **options) -> tuple[Tensor, Tensor]:
    return ops.quantize(x, "mxfp4", 1, **options)


def decode(codes: Tensor, scales: Tensor, scale: Tensor | None = None, *, format="mxfp4", axis=1, size=64, tiles=False,
           dtype=torch.float32) -> Tensor:  # fmt: skip
    return ops.dequantize(codes, scales, scale, format, axis, size, tiles, dtype)


def _scaled(x: Tensor, made: Tensor | None, read: Tensor | None) -> Tensor:
    return decode(*ops.quantize(x, "nvfp4", 1, tensor_scale=made), read, format="nvfp4")


def _two_sources(x: Tensor) -> Tensor:
    codes, _ = encode(x)
    _, scales = encode(x.abs())
    return decode(codes, scales)


def _swapped_axes(x: Tensor) -> Tensor:
    codes, scales = encode(x)
    return decode(codes, scales, axis=0)


def _other_format(x: Tensor) -> Tensor:
    codes, scales = ops.quantize(x, "nvfp4", 1)
    return decode(codes, scales[:, ::2].contiguous())


LOOKALIKES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "codes from outside": (lambda codes, scales: decode(codes, scales), (CODES, SCALES)),
    "codes from one quantize, scales from another": (_two_sources, (X,)),
    "codes that were changed": (lambda x: decode(encode(x)[0] ^ 0x88, encode(x)[1]), (X,)),
    "scales that were changed": (lambda x: decode(encode(x)[0], encode(x)[1] + 1), (X,)),
    "another dtype": (lambda x: decode(*encode(x), dtype=torch.bfloat16), (X,)),
    "another axis": (_swapped_axes, (randn(64, 64),)),
    "another format": (_other_format, (X,)),
    "a tensor scale that was not divided by": (lambda x, s: _scaled(x, None, s), (X, SCALE)),
    "another tensor scale": (lambda x, s, t: _scaled(x, s, t), (X, SCALE, SCALE * 2)),
    "a Hadamard transform of something else": (lambda x: ops.hadamard(x, 1, 32).abs(), (X,)),
    "a GEMM of activations": (lambda x, y: x @ y, (X, X.T)),
    "packed, blocked along the rows": (lambda x, c, s: x @ decode(c, s), (X[:, :32], CODES, SCALES)),
    "packed, with a tensor scale": (lambda x, c, s, t: x @ decode(c, s, t).T, (X, CODES, SCALES, SCALE)),
    "packed, on the left": (lambda x, c, s: decode(c, s) @ x, (X.T, CODES, SCALES)),
    "packed, at work elsewhere": (lambda x, c, s: x + decode(c, s)[:4], (X, CODES, SCALES)),
}


@pytest.mark.parametrize(("function", "inputs"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_leaves_lookalikes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    captured = trace(function, *inputs)
    before, text = captured.execute(*inputs), captured.text
    assert captured.run("fuse") == 0
    assert captured.text == text
    assert same_bits(captured.execute(*inputs), before)


FUSED = {
    "pair": (lambda x: decode(*encode(x)), (X,), "fake_quantize"),
    "pair, tensor scale": (lambda x, s: _scaled(x, s, s), (X, SCALE), "fake_quantize"),
    "pair, tensor scale left out": (lambda x, s: _scaled(x, s, None), (X, SCALE), "fake_quantize"),
    "transform": (lambda x: encode(ops.hadamard(x, 1, 32)), (X,), "quantize"),
    "transform of a tensor scale": (lambda x: ops.tensor_scale(ops.hadamard(x, 1, 32), "nvfp4"), (X,), "tensor_scale"),
    "packed weight": (lambda x, c, s: x @ decode(c, s).permute(1, 0), (X, CODES, SCALES), "mm"),
    "packed weight, along the rows": (
        lambda x, c, s: x @ decode(c, s, axis=0),
        (X, *OPS["quantize"].reference(randn(64, 32, seed=1), "mxfp4", 0)),
        "mm",
    ),
    "packed weight in 2-D blocks": (
        lambda x, c, s: x @ decode(c, s, tiles=True).permute(1, 0),
        (X, *OPS["quantize"].reference(randn(96, 64, seed=1), "mxfp4", 1, block_2d=True)),
        "mm",
    ),
}


@pytest.mark.parametrize(("function", "inputs", "left"), FUSED.values(), ids=FUSED)
def test_fuses(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], left: str) -> None:
    captured = trace(function, *inputs)
    before = captured.execute(*inputs)
    assert captured.run("fuse") == 1
    ours = [node.target for node in captured.module.graph.nodes if node.meta.get("fp4compile")]
    assert ours == [OPS[left].overload]
    if left == "mm":  # the weight may lie the other way round in memory, which reorders fp32 sums
        torch.testing.assert_close(captured.execute(*inputs), before, rtol=1e-5, atol=1e-5)
    else:
        assert same_bits(captured.execute(*inputs), before)
    text = captured.text
    assert captured.run("fuse") == 0
    assert captured.text == text


@pytest.mark.parametrize("recipe", ["hif4", "mxfp4", "nvfp4", "hif4-plain", "nvfp4-w4a4"])
def test_of_a_training_graph_only_fake_quantisation_is_left(recipe: str) -> None:
    captured = capture(nn.Linear(64, 64), [randn(40, 64).requires_grad_()], recipe).until("fold")
    before = captured.execute()
    assert captured.run("fuse") > 0
    for op in ("quantize", "dequantize", "hadamard"):
        assert not captured.calls(op)
    assert same_bits(captured.execute(), before)
    text = captured.text
    assert captured.run("fuse") == 0
    assert captured.text == text


@pytest.mark.parametrize("recipe", ["hif4-w4a16", "nvfp4-w4a4"])
def test_sites_follow_their_gemms(recipe: str) -> None:
    captured = export(nn.Linear(64, 32), [X], recipe).until("fuse")
    (site,) = captured.sites
    assert site.node in list(captured.module.graph.nodes)
    assert site.operand("weight").target == "weight_codes"
    assert site.operand("input").name == ("input_1" if recipe.endswith("16") else "fake_quantize_default")
