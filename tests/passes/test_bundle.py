"""Tensors made from the same ones are quantised by one op per axis, bit for bit, where that moves fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch.nn import functional as F

from fp4compile.backend import Answer, No, Yes
from fp4compile.graph import MOVES, readers
from fp4compile.producer import parse
from tests.claims import Claims, everything
from tests.compile.common import LlamaBlock, build
from tests.helpers import NAMES, Captured, capture, randn, same_bits, trace

ops = torch.ops.fp4compile
CLAIMED = (
    "fake_quantize",
    "fake_quantize_both",
    "fake_quantize_each",
    "tensor_scale",
    "tensor_scale_both",
    "tensor_scale_each",
    "quantize_rowwise",
    "quantize_rowwise_both",
    "mm_rowwise",
)
# recipe -> how many tensors each op takes: of NVFP4 also one for the tensor scales. What is transformed or rounded at
# random is left alone, and so are FP8 rows.
RECIPES: dict[str, list[int]] = {
    "hif4-plain": [2, 3],
    "hif4": [],
    "nvfp4-plain": [2, 2, 3],
    "nvfp4": [],
    "mxfp4-plain": [],
    "mxfp4": [],
}
EACH = [name for name in CLAIMED if name.endswith("_each")]
BACKEND = Claims(**dict.fromkeys(CLAIMED, everything))
X, Y, Z = (randn(16, 64, seed=seed) for seed in range(3))


def captured(model: nn.Module, x: Tensor, recipe: str, until: str = "pair") -> Captured:
    found = capture(model, (x.requires_grad_(),), recipe)
    found.context.backend = BACKEND
    return found.until(until)


def traced(function: Callable[..., object]) -> Captured:
    found = trace(lambda x, y, z: function(x, y, z), X, Y, Z)
    found.context.backend = BACKEND
    return found.until("pair")


def results(found: Captured) -> list[int]:
    """How many tensors each op quantises that computes them, in graph order."""
    nodes = [node for op in CLAIMED for node in found.calls(op) if node.kwargs.get("producer")]
    return sorted(len(parse(node.kwargs["producer"]).results) for node in nodes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_backward_of_a_llama_block_keeps_its_bits(recipe: str, dtype: torch.dtype) -> None:
    found = captured(build(LlamaBlock).to(dtype), randn(2, 8, 64, dtype=dtype), recipe)
    before = found.execute()
    assert found.run("bundle") == len(RECIPES[recipe])
    assert results(found) == RECIPES[recipe]
    for node in (node for op in EACH for node in found.calls(op)):
        assert {n.meta["partitioner_tag"] for n in (node, *node.users)} == {"must_be_in_backward"}
    assert same_bits(found.execute(), before)
    text = found.text
    assert found.run("bundle") == 0
    assert found.text == text


def test_silu_backward_as_older_versions_of_torch_decompose_it() -> None:
    """A reciprocal in the place of the sigmoid."""

    def backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        sigmoid = 1 / (1 + torch.exp(-gate))
        return fq(dh * up * sigmoid * (1 + gate * (1 - sigmoid))), fq(dh * gate * sigmoid)

    found = traced(backward)
    before = found.execute(X, Y, Z)
    assert found.run("bundle") == 1
    (node,) = found.calls("fake_quantize_each")
    inputs = set(found.module.graph.find_nodes(op="placeholder"))
    assert set(node.all_input_nodes) == inputs
    assert same_bits(found.execute(X, Y, Z), before)


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def test_of_gelu_the_rows_have_one_tensor_and_the_columns_two() -> None:
    """Where nothing reads a gradient once for both axes; else that, which `absorb` lets compute it, reads less."""
    for both, expected in (({}, [1, 2]), ({"fake_quantize_both": everything}, [])):
        found = captured(Gelu(), randn(6, 32), "hif4-plain", "rescale")
        found.context.backend = Claims(fake_quantize=everything, fake_quantize_each=everything, **both)
        found.run("pair")
        before = found.execute()
        assert found.run("bundle") == len(expected)
        assert results(found) == expected
        assert same_bits(found.execute(), before)


def _saved(found: Captured) -> int:
    """Bytes that the forward makes and the backward reads, as Inductor's partitioner cuts the graph."""
    forward, _ = min_cut_rematerialization_partition(found.module, found.inputs(), num_fwd_outputs=1)
    (output,) = forward.graph.find_nodes(op="output")
    return sum(n.meta["val"].nbytes for n in output.args[0][1:] if n is not None and n.op != "placeholder")


@pytest.mark.parametrize("recipe", [name for name, taken in RECIPES.items() if taken])
def test_the_backward_keeps_no_more(recipe: str) -> None:
    def saved(*names: str) -> int:
        block = build(lambda: LlamaBlock(64, hidden=1024)).bfloat16()
        found = capture(block, (randn(2, 64, 64, dtype=torch.bfloat16).requires_grad_(),), recipe)
        found.context.backend = BACKEND
        found.run(*names)
        return _saved(found)

    every = NAMES[: NAMES.index("absorb") + 1]
    assert saved(*every) <= saved(*(name for name in every if name != "bundle"))


def test_one_op_is_done_with_before_the_next_makes_its_results() -> None:
    """Both sets would be the largest tensors of the step; also in the order that the partitioner leaves."""
    found = captured(build(LlamaBlock).bfloat16(), randn(2, 8, 64, dtype=torch.bfloat16), "hif4-plain")
    found.run("bundle")
    _, backward = min_cut_rematerialization_partition(found.module, found.inputs(), num_fwd_outputs=1)
    columns, rows = backward.graph.find_nodes(op="call_function", target=ops.fake_quantize_each.default)
    weight_grads = [reader for result in columns.users for reader in readers(result, MOVES)]
    assert len(weight_grads) == 3 and all(node < rows for node in weight_grads)
    input_grads = [reader for result in rows.users for reader in readers(result, MOVES)]
    assert len(input_grads) == 2 and all(columns < node.args[1] for node in input_grads)  # quantised weights


class Butterfly(nn.Module):
    """A sum and a difference that the backward reads: it has no use for what they are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.one(x), self.other(x)
        return self.up(a + b) + self.down(a - b)


def test_what_the_backward_reads_is_written_and_not_computed_again() -> None:
    found = captured(Butterfly(), randn(8, 64), "hif4-plain")
    before, saved = found.execute(), _saved(found)
    assert found.run("bundle") == 2
    for node in found.calls("fake_quantize_each"):  # the gradients of a and b, from those of sum and difference
        assert {n.meta["partitioner_tag"] for n in node.all_input_nodes} == {"is_backward"}
    assert same_bits(found.execute(), before)
    assert _saved(found) == saved


def test_sites_name_the_kernel() -> None:
    found = captured(build(LlamaBlock).bfloat16(), randn(2, 8, 64, dtype=torch.bfloat16), "hif4-plain", "legalise")
    named = {f"{site.role} {site.path}" for site in found.sites if "claimed/fake_quantize_each" in site.kernels}
    assert named == {f"{role} {of}_proj" for role in ("wgrad", "dgrad") for of in ("gate", "up")} | {"wgrad down_proj"}


def test_without_a_kernel_nothing_changes() -> None:
    def answer(arguments: Mapping[str, Any]) -> Answer:
        return No("no") if arguments["producer"] else Yes()

    found = captured(build(LlamaBlock), randn(2, 8, 64), "hif4-plain")
    found.context.backend = Claims(**dict.fromkeys(CLAIMED, everything) | {"fake_quantize_each": answer})
    before = found.text
    assert found.run("bundle") == 0
    assert found.text == before

    viewed = traced(lambda x, y, z: tuple(fq(h.view(16, 64)) for h in (x.view(2, 8, 64) * y.view(2, 8, 64), x - y)))
    viewed.context.backend = found.context.backend
    before = viewed.text
    assert viewed.run("bundle") == 0
    assert viewed.text == before


def fq(x: Tensor, axis: int = 1, **options: Any) -> Tensor:
    return ops.fake_quantize(x, "hif4", axis, **options)


def _late(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    first = fq(x * y).sum(1, keepdim=True)
    return first, fq(y * z)


TAKEN: dict[str, tuple[Callable[..., object], list[int]]] = {
    "two products": (lambda x, y, z: (fq(x * y), fq(y + x)), [2]),
    "three tensors of one": (lambda x, y, z: (fq(x.exp()), fq(x.abs()), fq(-x)), [3]),
    "both axes": (lambda x, y, z: (fq(h := x * y), fq(h, 0), fq(g := x - y), fq(g, 0)), [2, 2]),
    "a tensor along one axis only": (lambda x, y, z: (fq(h := x * y), fq(h, 0), fq(x - y, 0)), [1, 2]),
    "two bundles": (lambda x, y, z: (fq(x * y), fq(x - y), fq(z.exp()), fq(z.abs())), [2, 2]),
    "a user in front": (_late, [2]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    function, expected = TAKEN[name]
    found = traced(function)
    before = found.execute(X, Y, Z)
    assert found.run("bundle") == len(expected)
    assert results(found) == expected
    assert same_bits(found.execute(X, Y, Z), before)


def _through_sine(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A producer knows no sine."""
    sine = x.sin()
    return fq(sine * y), fq(sine - y)


def _written(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    sine = x.sin()
    return fq(sine * y), fq(sine - y), sine @ z.T


def _chain(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return fq((x * y) + fq(x - y)), fq(x)


def _four(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    made = x * y, x - y, x + y, y * y
    return [ops.fake_quantize(h, "nvfp4", 1, tensor_scale=ops.tensor_scale(h, "nvfp4")) for h in made]


LEFT: dict[str, Callable[..., object]] = {
    "one tensor": lambda x, y, z: fq(x * y),
    "four tensors": _four,
    "tensors of different ones": lambda x, y, z: (fq(x.exp()), fq(y * z)),
    "another reader": lambda x, y, z: (fq(h := x * y), fq(x - y), h.sum()),
    "one is made from the other's quantisation": _chain,
    "different axes": lambda x, y, z: (fq(x * y), fq(x - y, 0)),
    "transforms": lambda x, y, z: (fq(x * y, hadamard=16), fq(x - y, hadamard=16)),
    "tensor scales of transforms": lambda x, y, z: [ops.tensor_scale(h, "nvfp4", hadamard=16) for h in (x * y, x - y)],
    "different formats": lambda x, y, z: (fq(x * y), ops.fake_quantize(x - y, "mxfp4", 1)),
    "2-D blocks": lambda x, y, z: [ops.fake_quantize(h, "nvfp4", 1, block_2d=True) for h in (x * y, x - y)],
    "what they are made from is written for them alone": _through_sine,
    "other shapes": lambda x, y, z: (fq(x * y), fq((x - y).view(32, 32))),
    "different dtypes": lambda x, y, z: (fq(x * y), fq((x - y).bfloat16())),
}


def test_what_is_written_for_others_is_read() -> None:
    found = traced(_written)
    before = found.execute(X, Y, Z)
    assert found.run("bundle") == 1
    assert same_bits(found.execute(X, Y, Z), before)


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    found = traced(LEFT[name])
    before = found.text
    assert found.run("bundle") == 0
    assert found.text == before


def test_symbolic_sizes() -> None:
    found = trace(lambda x, y: (fq(x * y), fq(x - y)), X, Y, mode="symbolic")
    found.context.backend = BACKEND
    before = found.execute(X, Y)
    assert found.run("bundle") == 1
    assert same_bits(found.execute(X, Y), before)


def test_random_rounding_is_left() -> None:
    def function(x: Tensor, y: Tensor, seed: Tensor) -> object:
        random = {"rounding": "stochastic", "scale_rule": "truncation-free", "seed": seed}
        return fq(x * y, stream=3, **random), fq(y.abs() * x, stream=4, **random), fq(x + y), fq(x - y)

    found = trace(lambda x, y, seed: function(x, y, seed), X, Y, torch.tensor(7))
    found.context.backend = BACKEND
    before = found.execute(X, Y, torch.tensor(7))
    assert found.run("bundle") == 1
    assert results(found) == [2]
    assert [node.kwargs["stream"] for node in found.calls("fake_quantize")] == [3, 4]
    assert same_bits(found.execute(X, Y, torch.tensor(7)), before)


def test_tensor_scales_stay_with_their_tensors() -> None:
    def function(x: Tensor, y: Tensor) -> object:
        made = x * y, x - y
        scales = [ops.tensor_scale(h, "nvfp4") for h in made]
        return [ops.fake_quantize(h, "nvfp4", 1, tensor_scale=s) for h, s in zip(made, scales, strict=True)]

    found = trace(lambda x, y: function(x, y * 2**-20), X, Y)
    found.context.backend = BACKEND
    before = found.execute(X, Y)
    assert found.run("bundle") == 2
    assert results(found) == [2, 2]
    assert same_bits(found.execute(X, Y), before)
