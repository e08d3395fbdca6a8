"""Producers move into the quantisations that read them, bit for bit, and stay where that costs more than it saves."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.nn import functional as F

from fp4compile.backend import Answer, No
from fp4compile.producer import parse
from fp4compile.recipe import Operand, Recipe
from tests.claims import Claims, everything
from tests.compile.common import LlamaBlock, build
from tests.helpers import NAMES, Captured, capture, forward_recipe, randn, same_bits, trace

ops = torch.ops.fp4compile
BACKEND = Claims(fake_quantize=everything, fake_quantize_both=everything, tensor_scale=everything)
PRODUCED = ("fake_quantize", "fake_quantize_both", "tensor_scale")


def produced(found: Captured) -> list[str]:
    """The layouts of the operands of every producer, in graph order."""
    calls = [node for op in PRODUCED for node in found.calls(op) if node.kwargs.get("producer")]
    return [" ".join(parse(node.kwargs["producer"]).layouts) for node in calls]


def captured(model: nn.Module, x: Tensor, recipe: str | Recipe) -> Captured:
    found = capture(model, (x.requires_grad_(),), recipe)
    found.context.backend = BACKEND
    return found.until("pair")


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain", "hif4", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_llama_block_keeps_its_bits(recipe: str, dtype: torch.dtype) -> None:
    found = captured(build(LlamaBlock).to(dtype), randn(2, 8, 64, dtype=dtype), recipe)
    before = found.execute()
    assert found.run("absorb") > 0
    assert same_bits(found.execute(), before)
    text = found.text
    assert found.run("absorb") == 0
    assert found.text == text


def test_what_is_absorbed_in_a_llama_block() -> None:
    found = captured(build(LlamaBlock).bfloat16(), randn(2, 8, 64, dtype=torch.bfloat16), "hif4-plain")
    found.run("absorb")
    # Both norms and the SwiGLU, for the forward and again for wgrad. The gradients of the SwiGLU's inputs, which read
    # the same tensors, are not.
    assert sorted(produced(found)) == ["full full"] * 2 + ["full row column"] * 4


def kept(found: Captured) -> int:
    """Bytes that the forward makes and the backward reads, as Inductor's partitioner cuts the graph."""
    forward, _ = min_cut_rematerialization_partition(found.module, found.inputs(), num_fwd_outputs=1)
    (output,) = forward.graph.find_nodes(op="output")
    made = [n.meta["val"] for n in output.args[0][1:] if n is not None and n.op != "placeholder"]
    return sum(value.nbytes for value in made)


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4"])
def test_of_what_is_absorbed_nothing_is_kept(recipe: str) -> None:
    tokens, hidden = 128, 1024

    def bytes_kept(*names: str) -> int:
        block = build(lambda: LlamaBlock(64, hidden=hidden)).bfloat16()
        x = randn(2, tokens // 2, 64, dtype=torch.bfloat16).requires_grad_()
        found = capture(block, (x,), recipe)
        found.context.backend = BACKEND
        found.run(*names)
        return kept(found)

    usual, absorbed = bytes_kept(), bytes_kept(*NAMES[: NAMES.index("absorb") + 1])
    # The input of the down projection and those behind both norms, bf16.
    assert absorbed <= usual - 2 * tokens * (hidden + 2 * 64)


class Residual(nn.Module):
    """The sum that the second layer reads is all that the backward needs of both terms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.one(x) + self.other(x))


def test_the_backward_keeps_no_more_for_a_producer() -> None:
    found = captured(Residual(), randn(8, 64), "hif4-plain")
    assert found.run("absorb") == 0


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def test_gelu_and_its_backward() -> None:
    found = captured(Gelu(), randn(6, 32), "hif4-plain")
    before = found.execute()
    assert found.run("absorb") > 0
    assert "full" in produced(found)
    assert same_bits(found.execute(), before)


def test_what_a_gemm_in_high_precision_reads_in_the_backward_stays() -> None:
    found = captured(Gelu(), randn(6, 32), forward_recipe(input=Operand("hif4"), weight=Operand("hif4")))
    assert len(found.calls("fake_quantize")) == 4
    assert found.run("absorb") == 0


def test_symbolic_sizes() -> None:
    found = trace(lambda x, y: ops.fake_quantize(x.sigmoid() * y, "hif4", 1), X, Y, mode="symbolic")
    found.context.backend = BACKEND
    before = found.execute(X, Y)
    assert found.run("absorb") == 1
    assert same_bits(found.execute(X, Y), before)


def test_a_symbolic_number_is_no_operand() -> None:
    found = trace(lambda x: ops.fake_quantize(x.exp() * x.shape[0], "hif4", 1), X, mode="symbolic")
    found.context.backend = BACKEND
    assert found.run("absorb") == 0


# A vector that is read as a row or as a column of numbers, against as many rows as columns.
SQUARE: dict[str, tuple[Callable[..., object], str]] = {
    "a column": (lambda x, w: fq(x * w), "full column"),
    "a row": (lambda x, w: fq(x * w.unsqueeze(-1)), "full row"),
    "a row by a view": (lambda x, w: fq(x * w.view(64, 1)), "full row"),
    "both": (lambda x, w: fq(x * w + w[:, None]), "full column row"),
}


@pytest.mark.parametrize("name", SQUARE)
def test_a_vector_against_a_square(name: str) -> None:
    function, layouts = SQUARE[name]
    x, w = randn(64, 64), randn(64, seed=1)
    found = trace(lambda x, w: function(x, w), x, w)
    found.context.backend = BACKEND
    before = found.execute(x, w)
    assert found.run("absorb") == 1
    assert produced(found) == [layouts]
    assert same_bits(found.execute(x, w), before)


def test_without_a_kernel_nothing_changes() -> None:
    def nothing(arguments: object) -> Answer:
        return No("no")

    found = captured(build(LlamaBlock), randn(2, 8, 64), "hif4-plain")
    found.context.backend = Claims(fake_quantize=nothing, fake_quantize_both=nothing)
    before = found.text
    assert found.run("absorb") == 0
    assert found.text == before


X, Y, Z = (randn(16, 64, seed=seed) for seed in range(3))


def fq(x: Tensor, axis: int = 1) -> Tensor:
    return ops.fake_quantize(x, "hif4", axis)


def _shared(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    product = x * y
    return fq(product + z), product.sum()


def _decayed(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        x = x * 0.99
    return x


# What is absorbed: the function, and the layouts of the operands.
TAKEN: dict[str, tuple[Callable[..., object], list[str]]] = {
    "one tensor": (lambda x, y, z: fq(x.exp()), ["full"]),
    "a row and a column": (lambda x, y, z: fq(x * y[:, :1] + z[0]), ["full row column"]),
    "a number": (lambda x, y, z: fq(2.0 - x * y), ["full full"]),
    "two roots": (lambda x, y, z: (fq(x * y), fq(z.exp(), 0)), ["full full", "full"]),
    "through views": (lambda x, y, z: fq((x.view(2, 8, 64) * y.view(2, 8, 64)).view(16, 64)), ["full full"]),
    "a sum that others read": (_shared, ["full full"]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    function, layouts = TAKEN[name]
    found = trace(lambda x, y, z: function(x, y, z), X, Y, Z)
    found.context.backend = BACKEND
    before = found.execute(X, Y, Z)
    assert found.run("absorb") == len(layouts)
    assert [layout.replace(" scalar", "") for layout in produced(found)] == layouts
    assert same_bits(found.execute(X, Y, Z), before)


LEFT: dict[str, Callable[..., object]] = {
    "no elementwise op": lambda x, y, z: fq(x @ y.T),
    "another reader": lambda x, y, z: (fq(h := x * y), h.sum()),
    "a reader behind a view": lambda x, y, z: (fq(h := x * y), h.view(-1).cumsum(0)),
    "two quantisations in one half": lambda x, y, z: (fq(h := x.exp()), fq(h, 0)),
    "a transposed operand": lambda x, y, z: fq(x * y.view(64, 16).T),
    "a number per head, as many heads as rows": lambda x, y, z: fq((x.view(16, 16, 4) * y[:, :1]).view(16, 64)),
    "six operands": lambda x, y, z: fq(((x - y[:, :1]) * z[:, :1] * y[0] + z[0]) * y[1]),
    "arithmetic for longer than memory takes": lambda x, y, z: fq(_decayed(x, 600)),
    "a factor of a sum": lambda x, y, z: fq(torch.add(x, y, alpha=2)),
    "an operand of another shape": lambda x, y, z: fq((x.view(32, 32) * y[:, 0].repeat(2)[:, None]).view(16, 64)),
    "integers": lambda x, y, z: fq(x * y.to(torch.int32)),
    "two roots of one tensor": lambda x, y, z: (fq(x * y), fq(y * z, 0)),
    "five tensors": lambda x, y, z: fq(x * y + z + x.T.reshape(16, 64) * y.T.reshape(16, 64) + z.T.reshape(16, 64)),
    "no tensor of full size": lambda x, y, z: fq(x[:, :1] * y[0]),
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    found = trace(lambda x, y, z: LEFT[name](x, y, z), X, Y, Z)
    found.context.backend = BACKEND
    assert found.calls("fake_quantize")
    assert found.run("absorb") == 0


def test_a_scale_and_a_quantisation_share_a_cheap_producer_only() -> None:
    def scaled(h: Tensor) -> Tensor:
        return ops.fake_quantize(h, "nvfp4", 1, tensor_scale=ops.tensor_scale(h, "nvfp4"))

    for found, taken in (
        (trace(lambda x, y: scaled(x * y), X, Y), 2),
        (trace(lambda x, y, z: scaled(x * y * z), X, Y, Z), 0),
    ):
        found.context.backend = BACKEND
        assert found.run("absorb") == taken


def test_every_combination_of_layouts_is_a_matrix() -> None:
    shapes = {"full": (16, 64), "row": (16, 1), "column": (1, 64), "scalar": (1, 1)}
    for second, third in product(shapes, shapes):
        y, z = randn(*shapes[second], seed=1), randn(*shapes[third], seed=2)
        found = trace(lambda x, y, z: fq((x * y) - z), X, y, z)
        found.context.backend = BACKEND
        before = found.execute(X, y, z)
        assert found.run("absorb") == 1
        assert produced(found) == [f"full {second} {third}"]
        assert same_bits(found.execute(X, y, z), before)
