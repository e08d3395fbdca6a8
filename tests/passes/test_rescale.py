"""GEMMs of MXFP4 operands become row-wise scaled FP8 GEMMs where a kernel runs them, and keep their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fp4compile import rowwise as oracle
from fp4compile.backend import Answer, Kernel, No, Yes, get_backend
from fp4compile.backends.inductor import InductorBackend
from fp4compile.backends.triton import rowwise
from fp4compile.dynamo import fp4compile_backend, last_report
from fp4compile.ops import OPS
from fp4compile.recipe import Operand, Recipe, Rule
from tests.claims import Claims, everything, registered
from tests.helpers import Captured, capture, randn, trace

ops = torch.ops.fp4compile
ROWWISE = ("quantize_rowwise", "quantize_rowwise_both", "mm_rowwise")
CLAIMS = dict.fromkeys(ROWWISE, everything)
BACKEND = Claims(**CLAIMS)


def nothing(arguments: Mapping[str, Any]) -> Answer:
    return No("not today")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32, bias=False))


def captured(recipe: str | Recipe, backend: Any = BACKEND, train: bool = True) -> Captured:
    found = capture(mlp(), (randn(40, 96).requires_grad_(train),), recipe, train)
    found.context.backend = backend
    return found.until("pack")


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    """The same FP4 values, in fp32 GEMMs of another order."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "mxfp4"])
def test_every_gemm_reads_fp8_and_keeps_its_values(recipe: str) -> None:
    found = captured(recipe)
    expected = found.execute()
    assert found.run("rescale") == 6
    assert not found.calls("fake_quantize")
    for site in found.sites:
        assert site.node.target is OPS["mm_rowwise"].overload
        for name in site.arguments:
            assert site.operand(name).meta["val"].dtype is oracle.values_dtype(name == "grad")
    close(found.execute(), expected)
    text = found.text
    assert found.run("rescale") == 0
    assert found.text == text
    found.run("legalise")
    kernels = {kernel for site in found.sites for kernel in site.kernels}
    assert kernels == {f"claimed/{op}" for op in ROWWISE}
    assert not found.context.notes


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "mxfp4"])
def test_each_tensor_is_read_as_seldom_as_can_be(recipe: str) -> None:
    found = captured(recipe)
    found.run("rescale")
    both = found.calls("quantize_rowwise_both")
    alone = found.calls("quantize_rowwise")
    assert len(both) == 2  # the gradients; inputs and weights are wanted along one axis by each half
    assert len(alone) == 8
    backward = {"is_backward", "must_be_in_backward"}
    assert all(node.meta["partitioner_tag"] in backward for node in both)
    halves = [node.meta["partitioner_tag"] in backward for node in alone]
    assert halves.count(True) == halves.count(False) == 4
    assert all(node.args[2] % 2 == 1 for node, late in zip(alone, halves, strict=True) if not late)


def test_one_input_of_three_projections_is_quantised_once() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(64, 32, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    found = capture(Projections(), (randn(40, 64),), "mxfp4-plain", train=False)
    found.context.backend = BACKEND
    assert found.until("pack").run("rescale") == 3
    assert len(found.calls("quantize_rowwise")) == 1 + 3


@pytest.mark.parametrize("declined", ROWWISE)
def test_what_a_kernel_declines_stays(declined: str) -> None:
    claims = {op: nothing if op == declined else everything for op in ROWWISE}
    found = captured("mxfp4-plain", Claims(**claims))
    before, expected = found.text, found.execute()
    if declined == "quantize_rowwise_both":
        assert found.run("rescale") == 6
        assert len(found.calls("quantize_rowwise")) == 12
        close(found.execute(), expected)
    else:
        assert found.run("rescale") == 0
        assert found.text == before
        assert found.context.notes == [f"6 FP4 GEMMs stay off FP8: claimed/{declined}: not today"]


def test_without_a_kernel_nothing_is_said() -> None:
    found = captured("mxfp4-plain", get_backend("reference"))
    assert found.run("rescale") == 0
    assert not found.context.notes


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "mxfp4-w4a16"])
def test_other_formats_and_operands_stay(recipe: str) -> None:
    found = captured(recipe, train="w4" not in recipe)
    text = found.text
    assert found.run("rescale") == 0
    assert found.text == text
    assert not found.context.notes


def test_2d_blocks_stay_and_the_report_says_so() -> None:
    square = Operand("mxfp4", block_2d=True)
    recipe = Recipe("squares", (Rule("forward", input=Operand("mxfp4"), weight=square),))
    found = captured(recipe)
    assert found.run("rescale") == 0
    assert found.context.notes == ["2 FP4 GEMMs stay off FP8: 2-D blocks"]


def test_batched_gemms_stay_and_the_report_says_so() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(3, 64, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.weight)

    found = capture(Experts(), (randn(3, 8, 64),), "mxfp4-plain", train=False)
    found.context.backend = BACKEND
    assert found.until("pack").run("rescale") == 0
    assert found.context.notes == ["1 FP4 GEMMs stay off FP8: a batched or grouped GEMM"]


X, W = randn(32, 64), randn(64, 32, seed=1)
LOOKALIKES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "an operand in high precision": lambda x, w: ops.fake_quantize(x, "mxfp4", 1) @ w,
    "blocks along the other axis": lambda x, w: ops.fake_quantize(x, "mxfp4", 0) @ ops.fake_quantize(w, "mxfp4", 0),
    "values that were changed": lambda x, w: ops.fake_quantize(x, "mxfp4", 1).abs() @ ops.fake_quantize(w, "mxfp4", 0),
    "a bias per row": lambda x, w: torch.addmm(
        x[:, :1], ops.fake_quantize(x, "mxfp4", 1), ops.fake_quantize(w, "mxfp4", 0)
    ),
}


@pytest.mark.parametrize("function", LOOKALIKES.values(), ids=LOOKALIKES)
def test_leaves_lookalikes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    found = trace(lambda x, w: function(x, w), X, W, parameters="w")
    found.run("find_sites")
    (site,) = found.sites
    site.status, site.specs = "fp4", dict.fromkeys(site.arguments, Operand("mxfp4"))
    found.context.backend = BACKEND
    text = found.text
    assert found.run("rescale") == 0
    assert found.text == text
    assert len(found.context.notes) == 1


class _Claims(InductorBackend):
    """Inductor on the CPU, with the references of the row-wise ops as its kernels."""

    name = "inductor-rowwise"
    kernels = tuple(Kernel(f"claimed/{op}", op, "cpu", OPS[op].reference, lambda arguments: Yes()) for op in ROWWISE)


def trained(backend: str, recipe: str) -> list[Tensor]:
    """Output and gradients of one step."""
    model, x = mlp(), randn(40, 96).requires_grad_()
    options = {"recipe": recipe, "backend": backend}
    torch.manual_seed(7)  # of the seed that stochastic rounding draws
    y = torch.compile(model, backend=fp4compile_backend, options=options)(x)
    y.backward(randn(40, 32, seed=3))
    gradients = [p.grad for p in (*model.parameters(), x)]
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("recipe", ["mxfp4-plain", "mxfp4"])
@pytest.mark.parametrize("backend", ["reference", "inductor"])
def test_a_step_trains_as_the_quantised_form_does(backend: str, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained("reference", recipe)
    torch._dynamo.reset()
    with registered(_Claims() if backend == "inductor" else Claims(**CLAIMS)) as name:
        got = trained(name, recipe)
        monkeypatch.setattr(rowwise, "COUNTS", {torch.device("cpu"): torch.tensor([2, 6])})
        report = last_report()
    assert report is not None
    counted = "exact path taken by 2 of 6 row-wise scaled FP8 GEMMs so far" in report.notes
    assert counted == (backend == "inductor")
    assert all("claimed/mm_rowwise" in site.kernel for site in report.sites)
    assert len(got) == len(expected) == 5
    close(got, expected)


def test_tokens_of_any_number_share_a_graph() -> None:
    def graphs(run: Callable[[Tensor], Tensor]) -> int:
        torch._dynamo.reset()
        counters.clear()
        for tokens in (48, 17, 130, 2):
            run(randn(tokens, 96).requires_grad_()).sum().backward()
        found: int = counters["stats"]["unique_graphs"]
        return found

    usual = graphs(torch.compile(mlp(), dynamic=True))
    with registered(_Claims()) as name:
        options = {"recipe": "mxfp4", "backend": name}
        assert 1 <= graphs(torch.compile(mlp(), backend=fp4compile_backend, dynamic=True, options=options)) <= usual
