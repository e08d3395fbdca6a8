"""A matrix that one half of the graph quantises along both axes is read once, where the backend has a kernel for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp4compile.backend import Answer, No
from tests.claims import Claims, everything
from tests.helpers import Captured, capture, randn, same_bits, trace

ops = torch.ops.fp4compile
BACKEND = Claims(fake_quantize_both=everything)


def training(recipe: str) -> Captured:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 64))
    found = capture(model, [randn(64, 64).requires_grad_()], recipe)
    found.context.backend = BACKEND
    return found


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "hif4", "mxfp4", "nvfp4"])
def test_each_gradient_is_read_once_and_no_bit_changes(recipe: str) -> None:
    found = training(recipe).until("fuse")
    before, single = found.execute(), len(found.calls("fake_quantize"))
    gradients = sum(site.status == "fp4" for site in found.sites if site.role == "wgrad")
    assert found.run("pair") == gradients > 0
    assert len(found.calls("fake_quantize_both")) == gradients
    assert len(found.calls("fake_quantize")) == single - 2 * gradients
    assert same_bits(found.execute(), before)
    text = found.text
    assert found.run("pair") == 0
    assert found.text == text


def test_both_tensor_scales_of_a_gradient_come_from_one_read() -> None:
    found = training("nvfp4").until("fuse")
    before, single = found.execute(), len(found.calls("tensor_scale"))
    found.context.backend = Claims(tensor_scale_both=everything)
    gradients = sum(site.status == "fp4" for site in found.sites if site.role == "wgrad")
    assert found.run("pair") == gradients > 0
    pairs = found.calls("tensor_scale_both")
    assert len(pairs) == gradients
    assert all(node.meta["partitioner_tag"] == "must_be_in_backward" for node in pairs)
    assert len(found.calls("tensor_scale")) == single - 2 * gradients
    assert same_bits(found.execute(), before)


def test_only_the_backward_pairs_and_stays_there() -> None:
    found = training("hif4-plain").until("pair")
    for node in found.calls("fake_quantize_both"):
        assert node.meta["partitioner_tag"] == "must_be_in_backward"
        assert all(item.meta["partitioner_tag"] == "must_be_in_backward" for item in node.users)
    # Inputs and weights are quantised along one axis in the forward and along the other in the backward.
    tags = {node.meta["partitioner_tag"] for node in found.calls("fake_quantize")}
    assert tags == {"is_forward", "must_be_in_backward"}


def test_sites_name_the_kernel() -> None:
    found = training("hif4-plain").until("legalise")
    for site in found.sites:
        assert ("claimed/fake_quantize_both" in site.kernels) == (site.role != "forward")


def test_without_a_kernel_nothing_changes() -> None:
    def declined(arguments: object) -> Answer:
        return No("no")

    found = training("nvfp4").until("fuse")
    found.context.backend = Claims(fake_quantize_both=declined)
    text = found.text
    assert found.run("pair") == 0
    assert found.text == text


def one(x: Tensor, axis: int, format: str = "nvfp4", **options: object) -> Tensor:
    return ops.fake_quantize(x, format, axis, **options)


X, SEED, OTHER = randn(64, 64), torch.tensor(1), torch.tensor(2)
STOCHASTIC = {"rounding": "stochastic"}
LOOKALIKES: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "one axis twice": (lambda x: (one(x, 0), one(x, -2, hadamard=16)), (X,)),
    "two tensors": (lambda x, y: (one(x, 0), one(y, 1)), (X, X + 1)),
    "two formats": (lambda x: (one(x, 0), one(x, 1, "mxfp4")), (X,)),
    "two scale rules": (lambda x: (one(x, 0), one(x, 1, scale_rule="truncation-free")), (X,)),
    "two seeds": (
        lambda x, s, t: (one(x, 0, seed=s, **STOCHASTIC), one(x, 1, seed=t, **STOCHASTIC)),
        (X, SEED, OTHER),
    ),
    "two sign seeds": (
        lambda x, s: (one(x, 0, hadamard=16, sign_seed=s), one(x, 1, hadamard=16)),
        (X, SEED),
    ),
    "three axes": (lambda x: (one(x, 0), one(x, 1)), (X[None],)),
    "a tensor scale that depends on the first": (
        lambda x: (first := one(x, 0), one(x, 1, tensor_scale=first.amax().float())),
        (X,),
    ),
}


@pytest.mark.parametrize(("function", "inputs"), LOOKALIKES.values(), ids=LOOKALIKES)
def test_leaves_lookalikes(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> None:
    found = trace(function, *inputs)
    found.context.backend = BACKEND
    text = found.text
    assert found.run("pair") == 0
    assert found.text == text


PAIRS: dict[str, Callable[..., object]] = {
    "plain": lambda x, s: (one(x, 0), one(x, 1)),
    "negative axes, the second first": lambda x, s: (one(x, -1), one(x, -2)),
    "all options": lambda x, s: (
        one(x, 1, hadamard=16, block_2d=True),
        one(x, 0, seed=s, stream=9, tensor_scale=ops.tensor_scale(x, "nvfp4"), **STOCHASTIC),
    ),
    "used before the second": lambda x, s: one(x, 1).relu() + one(x, 0),
}


@pytest.mark.parametrize("function", PAIRS.values(), ids=PAIRS)
def test_pairs(function: Callable[..., object]) -> None:
    found = trace(function, X, SEED)
    found.context.backend = BACKEND
    before = found.execute(X, SEED)
    assert found.run("pair") == 1
    assert not found.calls("fake_quantize")
    assert same_bits(found.execute(X, SEED), before)
