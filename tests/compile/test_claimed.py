"""Steps of graphs as a GPU gets them, on the CPU: every pass rewrites, a partitioner cuts, references run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fp4compile
from fp4compile.backend import Answer, Kernel, No, Yes
from fp4compile.backends.inductor import InductorBackend
from fp4compile.backends.reference import ReferenceBackend
from fp4compile.ops import OPS
from tests.claims import registered
from tests.compile.common import LlamaBlock, Step, build, compiled, randn, relative, step

CLAIMED = (
    "tensor_scale",
    "tensor_scale_both",
    "fake_quantize",
    "fake_quantize_both",
    "fake_quantize_each",
    "tensor_scale_each",
    "quantize_rowwise",
    "quantize_rowwise_both",
    "mm_rowwise",
)
RECIPES = ("hif4-plain", "mxfp4-plain", "nvfp4-plain", "hif4", "mxfp4", "nvfp4")


def _answer(op: str, arguments: Mapping[str, Any]) -> Answer:
    """Yes, but for the FP8 GEMM to what the device's does not take either."""
    if op == "mm_rowwise" and arguments["dtype"] is not torch.bfloat16:
        return No("not bf16")
    return Yes()


def _kernels() -> tuple[Kernel, ...]:
    return tuple(
        Kernel(f"claimed/{op}", op, "cpu", OPS[op].reference, lambda arguments, op=op: _answer(op, arguments))
        for op in CLAIMED
    )


class _Inductor(InductorBackend):
    name = "claimed-inductor"
    kernels = _kernels()


class _Reference(ReferenceBackend):
    name = "claimed-reference"
    kernels = _kernels()


def _block(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = build(lambda: LlamaBlock(128, heads=4, groups=4, hidden=256)).to(dtype)
    return model, randn(2, 64, 128, dtype=dtype)


def _steps(recipe: str, backend: Any, dtype: torch.dtype) -> tuple[Step, Step]:
    """By the reference, and by the backend."""
    model, x = _block(dtype)
    torch._dynamo.reset()
    wanted = step(compiled(model, recipe, "reference"), x)
    torch._dynamo.reset()
    with registered(backend) as name:
        got = step(compiled(model, recipe, name), x).check()
        report = fp4compile.last_report()
    assert report is not None
    kernels = {kernel for site in report.sites for kernel in site.kernel.split(" + ")}
    assert "claimed/quantize_rowwise_both" in kernels or "claimed/fake_quantize_both" in kernels
    return wanted, got


BACKENDS = [_Reference(), pytest.param(_Inductor(), marks=pytest.mark.slow)]


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "hif4", "nvfp4"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_step_of_a_llama_block(backend: Any, recipe: str) -> None:
    wanted, got = _steps(recipe, backend, torch.float32)
    assert got.worst(wanted) < 1e-5


PUBLISHED = ("mxfp4-tseng", "quartet", "fp4-all-the-way", "tetrajet", "tetrajet-v2", "quartet2")


@pytest.mark.parametrize(
    "recipe", ["nvfp4-4over6", *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)]
)
def test_a_step_of_published_recipes(recipe: str) -> None:
    """The same references in the same order, whatever is paired, absorbed or moved to the other half."""
    model, x = _block(torch.float32)
    wanted = step(compiled(model, recipe, "reference"), x)
    torch._dynamo.reset()
    with registered(_Reference()) as name:
        assert step(compiled(model, recipe, name), x).check().worst(wanted) == 0.0


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "mxfp4"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_step_in_fp8_rows_is_as_close_to_fp32_as_the_reference(backend: Any, recipe: str) -> None:
    """Between layers bf16 rounds in another order, which decides codes: neither step is the exact one."""
    model, x = _block(torch.float32)
    torch._dynamo.reset()
    exact = step(compiled(model, recipe, "reference"), x)
    wanted, got = _steps(recipe, backend, torch.bfloat16)
    for name, value in got.tensors.items():
        limit = relative(wanted.tensors[name].float(), exact.tensors[name], name)
        assert relative(value.float(), exact.tensors[name], name) < 1.5 * limit + 2.0**-8, name
