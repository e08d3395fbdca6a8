"""GEMMs of fake-quantised operands become GEMMs of packed ones where a kernel reads them, and only there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fp4compile.backend import Answer, No
from fp4compile.recipe import Recipe
from tests.claims import Claims, packed
from tests.helpers import Captured, capture, randn, trace

ops = torch.ops.fp4compile
BACKEND = Claims(mm=packed)


def captured(recipe: str | Recipe, train: bool = True) -> Captured:
    model = nn.Sequential(nn.Linear(70, 32), nn.ReLU(), nn.Linear(32, 48, bias=False))
    found = capture(model, (randn(5, 70).requires_grad_(train),), recipe, train)
    found.context.backend = BACKEND
    return found


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "nvfp4-plain", "hif4", "mxfp4", "nvfp4"])
def test_every_gemm_is_packed_and_keeps_its_values(recipe: str) -> None:
    found = captured(recipe).until("fuse")
    expected = found.execute()
    sites = [site for site in found.sites if site.status == "fp4"]
    assert found.run("pack") >= len(sites) > 0
    assert not found.calls("fake_quantize")
    for site in sites:
        assert site.node.kwargs["a_format"] == site.node.kwargs["b_format"] == recipe.split("-")[0]
        assert all(site.operand(name).meta["val"].dtype == torch.uint8 for name in site.arguments)
    for got, want in zip(found.execute(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # one fp32 GEMM against another order of sums
    assert found.run("pack") == 0


def test_the_activation_of_a_packed_weight_is_packed() -> None:
    found = captured("mxfp4-w4a4", train=False).until("fuse")
    expected = found.execute()
    found.run("pack")
    assert [node.kwargs["a_format"] for node in found.calls("mm")] == ["mxfp4", "mxfp4"]
    for got, want in zip(found.execute(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_nothing_is_tried_for_a_machine_without_the_kernel() -> None:
    def never(arguments: object) -> Answer:
        raise AssertionError("asked")

    found = captured("nvfp4-plain").until("fuse")
    backend = Claims(mm=never)
    backend.kernels = tuple(replace(kernel, available=lambda: No("another machine")) for kernel in backend.kernels)
    found.context.backend = backend
    before = found.text
    assert found.run("pack") == 0
    assert found.text == before


def test_a_declined_gemm_stays() -> None:
    def nothing(arguments: object) -> Answer:
        return No("no")

    found = captured("nvfp4-plain").until("fuse")
    before = found.text
    found.context.backend = Claims(mm=nothing)
    assert found.run("pack") == 0
    found.module.graph.eliminate_dead_code()
    assert found.text == before


X, W = randn(32, 64), randn(64, 32, seed=1)
LOOKALIKES = {
    "an operand in high precision": lambda x, w: ops.fake_quantize(x, "mxfp4", 1) @ w,
    "blocks along the other axis": lambda x, w: ops.fake_quantize(x, "mxfp4", 0) @ ops.fake_quantize(w, "mxfp4", 0),
    "a tensor scale within the values": lambda x, w: (
        ops.fake_quantize(x, "nvfp4", 1, tensor_scale=torch.tensor(0.5)) @ ops.fake_quantize(w, "nvfp4", 0)
    ),
    "values that were changed": lambda x, w: ops.fake_quantize(x, "mxfp4", 1).abs() @ ops.fake_quantize(w, "mxfp4", 0),
}


def packs(function: Callable[[Tensor, Tensor], Tensor]) -> int:
    found = trace(lambda x, w: function(x, w), X, W, parameters="w")
    found.run("find_sites")
    assert len(found.sites) == 1
    found.context.backend = BACKEND
    return found.run("pack")


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay(name: str) -> None:
    assert packs(LOOKALIKES[name]) == 0


def test_what_they_look_like_is_packed() -> None:
    assert packs(lambda x, w: ops.fake_quantize(x, "mxfp4", 1) @ ops.fake_quantize(w, "mxfp4", 0)) > 0
