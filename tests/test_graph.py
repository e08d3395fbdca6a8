"""Which matmuls of a model are GEMM sites, with their roles, paths and parameters; the report they end in."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fp4compile
from fp4compile.errors import RewriteError
from fp4compile.graph import clean_path, data_flow, verify
from fp4compile.report import Report, SiteRecord, merged
from tests.helpers import Captured, capture, randn, trace

Found = list[tuple[str, str, str]]
ALL = ("forward", "dgrad", "wgrad")
X = randn(4, 64)


def sites(model: nn.Module, *inputs: Tensor, train: bool = True, kind: str = "linear") -> Found:
    """(role, path, parameter) of the sites in FP4, sorted by path and role."""
    report = fp4compile.explain(model, inputs, "hif4-plain", train=train, backend="reference")
    assert all(site.status == "fp4" and site.kind == kind for site in report.sites)
    return sorted(((s.role, s.path, s.parameter) for s in report.sites), key=lambda s: (s[1:], ALL.index(s[0])))


def expect(**roles: str) -> Found:
    """`expect(a="forward wgrad")`: sites of layers named so, each with a parameter `weight`."""
    found = []
    for name, listed in sorted(roles.items()):
        path = name.replace("__", ".").lstrip("_")
        found += [(role, path, f"{path}.weight".lstrip(".")) for role in listed.split()]
    return found


class Weight(nn.Module):
    """Applies a function to the input and one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "F.linear": (lambda x, w: F.linear(x, w), (2, 4, 64), (32, 64)),
    "matmul": (lambda x, w: torch.matmul(x, w), (4, 64), (64, 32)),
    "matmul of 3-D": (lambda x, w: x @ w, (2, 4, 64), (64, 32)),
    "matmul, transposed": (lambda x, w: x @ w.T, (4, 64), (32, 64)),
    "einsum": (lambda x, w: torch.einsum("bi,io->bo", x, w), (4, 64), (64, 32)),
    "einsum of 3-D": (lambda x, w: torch.einsum("bti,oi->bto", x, w), (2, 4, 64), (32, 64)),
    "addmm": (lambda x, w: torch.addmm(x[:, :32], x, w), (4, 64), (64, 32)),
    "addmm with factors": (lambda x, w: torch.addmm(x[:, :32], x, w, beta=0.5, alpha=2), (4, 64), (64, 32)),
    "bmm": (lambda x, w: torch.bmm(x, w), (3, 4, 64), (3, 64, 32)),
    "bmm of a repeated weight": (lambda x, w: torch.bmm(x, w.expand(3, 64, 32)), (3, 4, 64), (64, 32)),
    "baddbmm": (lambda x, w: torch.baddbmm(x[:, :, :32], x, w), (3, 4, 64), (3, 64, 32)),
    "addbmm": (lambda x, w: torch.addbmm(x[0, :, :32], x, w, beta=0.5, alpha=2), (3, 4, 64), (3, 64, 32)),
    "weight on the left": (lambda x, w: w @ x, (64, 4), (32, 64)),
    "transposed weight on the left": (lambda x, w: w.T @ x, (64, 4), (64, 32)),
    "a view of the weight": (lambda x, w: x @ w.view(64, 32), (4, 64), (2, 32, 32)),
    "a part of the weight": (lambda x, w: x @ w[:64], (4, 64), (96, 32)),
    "a scaled weight": (lambda x, w: x @ (w * 2), (4, 64), (64, 32)),
    "a cast weight": (lambda x, w: (x.bfloat16() @ w.bfloat16()).float(), (4, 64), (64, 32)),
    "a conv-free 1x1": (lambda x, w: torch.tensordot(x, w, dims=([1], [0])), (4, 64), (64, 32)),
}


@pytest.mark.parametrize(("function", "x", "weight"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_found_in_every_role(function, x: tuple[int, ...], weight: tuple[int, ...]) -> None:
    kind = "grouped" if len(x) == len(weight) == 3 else "linear"  # a matrix for each of a batch
    assert sites(Weight(function, *weight), randn(*x).requires_grad_(), kind=kind) == expect(_=" ".join(ALL))


SHAPES = {
    "1-D": (64,),
    "2-D": (4, 64),
    "4-D": (2, 3, 4, 64),
    "one token": (1, 64),
    "one of one": (1, 1, 64),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("out", "bias"), [(1, True), (1, False), (32, True)])
def test_a_linear_of_any_shape(shape: tuple[int, ...], out: int, bias: bool) -> None:
    model = nn.Linear(64, out, bias=bias)
    assert sites(model, randn(*shape).requires_grad_()) == expect(_="forward dgrad wgrad")
    assert sites(model, randn(*shape), train=False) == expect(_="forward")


def test_one_input_feature() -> None:
    assert sites(nn.Linear(1, 64), randn(4, 1).requires_grad_()) == expect(_="forward dgrad wgrad")


def test_paths_of_nested_modules() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.Tanh(), nn.ModuleDict({"up": nn.Linear(32, 8)})["up"]))
    assert sites(model, X) == expect(_0="forward wgrad", _1__1="forward dgrad wgrad")


class Model(nn.Module):
    """Two Linears, `a` then `b`, and a function of the model and the input that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], a: nn.Module | None = None) -> None:
        super().__init__()
        self.a = a or nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _autocast(model: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.b(model.a(x))


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


CHAINS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "plain": lambda m, x: m.b(m.a(x).tanh()),
    "no activation between": lambda m, x: m.b(m.a(x)),
    "autocast": _autocast,
    "checkpointed module": lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)),
    "checkpointed function": lambda m, x: m.b(checkpoint(lambda t: m.a(t).tanh(), x, use_reentrant=False)),
    "checkpointed whole": lambda m, x: checkpoint(lambda t: m.b(m.a(t).tanh()), x, use_reentrant=False),
    "custom Function": lambda m, x: m.b(Sine.apply(m.a(x))),
    "custom Function with the GEMM in it": lambda m, x: m.b(Product.apply(x, m.a.weight)),
    "functional": lambda m, x: F.linear(F.linear(x, m.a.weight), m.b.weight, m.b.bias),
    "functional call": lambda m, x: m.b(torch.func.functional_call(m.a, dict(m.a.named_parameters()), (x,))),
    "residual": lambda m, x: m.b(m.a(x) + x) + x,
    "several calls of other tensors": lambda m, x: m.b(m.a(x) * m.a.bias),
}


@pytest.mark.parametrize("run", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("needs_grad", [True, False], ids=["dX", "no dX"])
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # Dynamo does, while it traces one
def test_two_layers(run: Callable[[Model, Tensor], Tensor], needs_grad: bool) -> None:
    first = "forward dgrad wgrad" if needs_grad else "forward wgrad"
    assert sites(Model(run), randn(4, 64).requires_grad_(needs_grad)) == expect(a=first, b="forward dgrad wgrad")


@pytest.mark.parametrize(
    ("frozen", "needs_grad", "expected"),
    [
        ("a", False, expect(a="forward", b="forward wgrad")),
        ("b", False, expect(a="forward wgrad", b="forward dgrad")),
        ("a", True, expect(a="forward dgrad", b="forward dgrad wgrad")),
        ("b", True, expect(a="forward dgrad wgrad", b="forward dgrad")),
        ("a b", True, expect(a="forward dgrad", b="forward dgrad")),
    ],
)
def test_frozen_layers_have_no_wgrad(frozen: str, needs_grad: bool, expected: Found) -> None:
    model = Model(CHAINS["plain"])
    for name in frozen.split():
        model.get_submodule(name).requires_grad_(False)
    assert sites(model, randn(4, 64).requires_grad_(needs_grad)) == expected


class Lora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.A = nn.Parameter(randn(64, 8))
        self.B = nn.Parameter(randn(8, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A @ self.B


def test_lora() -> None:
    assert sites(Model(CHAINS["plain"], a=Lora()), X) == sorted(
        [
            ("forward", "a", "a.A"),
            ("wgrad", "a", "a.A"),
            ("forward", "a", "a.B"),
            ("dgrad", "a", "a.B"),
            ("wgrad", "a", "a.B"),
            ("forward", "a.base", "a.base.weight"),
            *expect(b="forward dgrad wgrad"),
        ],
        key=lambda s: (s[1:], ALL.index(s[0])),
    )


def test_a_layer_called_twice_has_its_sites_twice() -> None:
    model = Model(lambda m, x: m.b(m.a(m.a(x).tanh())))
    assert sites(model, X) == expect(a="forward forward dgrad wgrad wgrad", b="forward dgrad wgrad")


def test_one_module_under_two_names() -> None:
    model = Model(lambda m, x: m.b(m.a(x).tanh()))
    model.b = model.a
    assert {site[2] for site in sites(model, X)} <= {"a.weight", "b.weight"}
    assert len(sites(model, X)) == 5


def test_projections_of_one_input_keep_their_wgrads_apart() -> None:
    model = Model(lambda m, x: m.a(x) * m.b(x))
    assert sites(model, X) == expect(a="forward wgrad", b="forward wgrad")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.linear = nn.Linear(64, 64)
        self.unembed = nn.Linear(64, 100, bias=False)
        self.unembed.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.linear(self.embed(tokens)))


def test_a_head_tied_to_the_embedding_is_kept() -> None:
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    report = fp4compile.explain(Tied(), (tokens,), "hif4-plain", train=True, backend="reference")
    by_path = {(s.path, s.role): (s.status, s.reason) for s in report.sites}
    assert {key: value[0] for key, value in by_path.items()} == {
        **{("linear", role): "fp4" for role in ALL},
        **{("unembed", role): "kept" for role in ALL},
    }
    assert by_path["unembed", "forward"][1] == "output head (tied to an embedding)"


# --- matmuls that are no sites

ACTIVATIONS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "attention": lambda m, x: m.b(torch.softmax((y := m.a(x)) @ y.T, -1) @ x),
    "Gram matrix of the layer's input": lambda m, x: m.b(m.a(x)) + (x @ x.T).sum(),
    "Gram matrix within": lambda m, x: m.b((y := m.a(x)) + (y @ y.T).sum()),
    "values that are the layer's input": lambda m, x: m.b(m.a(x) @ x.T @ x),
    "Gram matrix within, shaped like a weight": lambda m, x: m.b(y := m.a(torch.cat([x] * 8))) + (y @ y.T).sum(),
    "outer product": lambda m, x: m.b(m.a(x)) + torch.outer(x[0], x[1])[:8],
}


@pytest.mark.parametrize("run", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_products_of_activations_are_no_sites(run: Callable[[Model, Tensor], Tensor]) -> None:
    expected = expect(a="forward dgrad wgrad", b="forward dgrad wgrad")
    assert sites(Model(run), randn(8, 64).requires_grad_()) == expected


@pytest.mark.parametrize("fused", [True, False])
def test_attention(fused: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            out = F.scaled_dot_product_attention(q, k, v) if fused else torch.softmax(q @ k.mT, -1) @ v
            return self.o(out.transpose(1, 2).flatten(-2))

    own = dict.fromkeys("kqv", "forward wgrad")
    assert sites(Attention(), randn(2, 8, 64)) == expect(**own, o="forward dgrad wgrad")


def test_a_buffer_is_no_weight() -> None:
    model = Model(lambda m, x: m.b(m.a(x) @ m.basis))
    model.register_buffer("basis", randn(64, 64))
    assert sites(model, X) == expect(a="forward wgrad", b="forward dgrad wgrad")


def _masked() -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x)))
    prune.random_unstructured(model.a, "weight", 0.5)
    return model


def _of_a_buffer() -> nn.Module:
    model = Model(lambda m, x: m.b(m.a(x)))
    weight = model.a.weight.detach()
    del model.a.weight
    model.a.register_buffer("weight", weight)
    return model


def test_a_masked_weight() -> None:
    """It is computed from a parameter and a buffer."""
    masked = [(role, path, "a.weight_orig") for role, path, _ in expect(a="forward wgrad")]
    assert sites(_masked(), X) == masked + expect(b="forward dgrad wgrad")


def test_a_masked_weight_outside_of_a_linear_module() -> None:
    """It would stay in high precision, and the report would not say so."""
    model = Model(lambda m, x: m.b(F.linear(x, m.a.weight * m.mask)))
    model.register_buffer("mask", (randn(64, 64) > 0).float())
    assert sites(model, X) == expect(a="forward wgrad", b="forward dgrad wgrad")


def test_a_linear_module_is_one_whatever_its_weight_is_made_of() -> None:
    """It would stay in high precision, and the report would not say so."""
    assert sites(_of_a_buffer(), X) == expect(a="forward", b="forward dgrad wgrad")


def statuses(model: nn.Module, *inputs: Tensor) -> dict[tuple[str, str, str], str]:
    """(role, path, parameter) -> status, of a training step."""
    report = fp4compile.explain(model, inputs, "hif4-plain", train=True, backend="reference")
    return {(s.role, s.path, s.parameter): s.status for s in report.sites}


def test_a_normed_weight() -> None:
    """Spectral norm divides it by what buffers and the weight make; those products are no layers, and are kept."""
    model = Model(lambda m, x: m.b(m.a(x)))
    nn.utils.parametrizations.spectral_norm(model.a)
    found = statuses(model, X)
    weight = "a.parametrizations.weight.original"
    fp4 = {("forward", "a", weight), ("wgrad", "a", weight), *expect(b="forward dgrad wgrad")}
    assert {key for key, status in found.items() if status == "fp4"} == fp4
    assert {path for (_, path, _), status in found.items() if status == "kept"} == {"a.parametrizations.weight.0"}


@pytest.mark.parametrize("merge", [lambda w, b, a: w + b @ a, torch.addmm], ids=["mm", "addmm"])
def test_products_that_make_a_weight_are_kept(merge: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """B A of a merged LoRA; the layer that reads it is a site like any other."""
    model = Model(lambda m, x: m.b(F.linear(x, merge(m.a.weight, m.B, m.A))))
    model.A, model.B = nn.Parameter(randn(8, 64)), nn.Parameter(randn(64, 8))
    assert statuses(model, X) == {
        **{(role, "", "A"): "kept" for role in ALL},
        **dict.fromkeys(expect(a="forward wgrad", b="forward dgrad wgrad"), "fp4"),
    }


def _cross_attention(m: Model, x: Tensor) -> Tensor:
    return m.b((m.a(m.tokens) @ x.mT).softmax(-1) @ x)


def _normed_tokens(m: Model, x: Tensor) -> Tensor:
    return m.b(F.layer_norm(m.a(m.tokens), (64,), m.a.bias) @ x.mT @ x)


@pytest.mark.parametrize("run", [_cross_attention, _normed_tokens])
def test_a_layer_on_learned_tokens(run: Callable[[Model, Tensor], Tensor]) -> None:
    """What it makes depends on parameters alone and is no weight: attention's own products are no sites."""
    model = Model(run)
    model.tokens = nn.Parameter(randn(1, 8, 64))
    assert sites(model, randn(1, 16, 64)) == expect(a="forward dgrad wgrad", b="forward dgrad wgrad")


def test_a_product_of_positions_and_a_parameter() -> None:
    """The relative positions of XLNet: what attention multiplies with is no weight."""
    model = Model(lambda m, x: m.b((x @ (torch.arange(8)[:, None].expand(8, 64).sin() @ m.r).mT).softmax(-1) @ m.a(x)))
    model.r = nn.Parameter(randn(64, 64))
    found = sites(model, randn(8, 64))
    assert [role for role, _, parameter in found if parameter == "r"] == ["forward", "wgrad"]
    assert len(found) == 2 + len(expect(a="forward wgrad", b="forward dgrad wgrad"))


def test_learned_tokens_of_a_multi_head_attention() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Parameter(randn(1, 8, 64))
            self.attend = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(self.tokens, x, x)[0]

    found = sites(Pool(), randn(1, 16, 64))
    assert {parameter for _, _, parameter in found} == {"attend.in_proj_weight", "attend.out_proj.weight"}
    assert sorted(role for role, _, p in found if "in_proj" in p) == ["dgrad", "forward", "forward", "wgrad", "wgrad"]


def test_weights_that_each_token_picks_are_refused() -> None:
    """In the forms that `regroup` knows they are grouped; in any other they would stay unseen."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(randn(4, 64, 32))

        def forward(self, x: Tensor, expert: Tensor) -> Tensor:
            return torch.einsum("td,tkdh->tkh", x, self.up[expert])

    inputs = (X.clone().requires_grad_(), torch.tensor([[0, 1], [1, 2], [3, 0], [1, 1]]))
    report = fp4compile.explain(Experts(), inputs, "hif4-plain", train=True)
    assert sorted(s.role for s in report.sites) == ["dgrad", "forward", "wgrad"]
    assert {(s.status, s.kind, s.parameter) for s in report.sites} == {("refused", "grouped", "up")}
    assert all("copy of its own" in s.reason for s in report.sites)


def test_tensors_in_the_place_of_parameters() -> None:
    model = Model(lambda m, x: m.b(m.a(x)))
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x,))

    assert [(role, path) for role, path, _ in sites(call, X)] == [
        (role, path) for role, path, _ in expect(a="forward wgrad", b="forward dgrad wgrad")
    ]


# --- what is not in one graph


def notes(model: nn.Module, *inputs: Tensor) -> Report:
    return fp4compile.explain(model, inputs, "hif4-plain", train=True, backend="reference")


class Broken(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)


def test_a_graph_break_gives_two_graphs_and_a_note() -> None:
    report = notes(Broken(CHAINS["plain"]), X)
    found = [(s.role, s.path, s.parameter) for s in report.sites]
    assert sorted(found) == sorted(expect(a="forward wgrad", b="forward dgrad wgrad"))
    assert report.graphs == 2
    assert len(report.notes) == 1 and "graph break (1x)" in report.notes[0]


def test_a_layer_that_dynamo_cannot_see_is_reported() -> None:
    class Linear(nn.Linear):  # the name that a user's subclass may have as well
        @torch._dynamo.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    report = notes(Model(lambda m, x: m.b(m.a(x)), a=Linear(64, 64)), X)
    assert any("graph break" in note for note in report.notes)
    refused = [(s.path, s.role, s.kernel) for s in report.sites if s.status == "refused"]
    assert refused == [("a", "forward", "eager")]


def test_a_layer_that_is_not_called_is_noted() -> None:
    report = notes(Model(lambda m, x: m.b(x)), X)
    assert [(s.role, s.path) for s in report.sites] == [("forward", "b"), ("wgrad", "b")]
    assert report.notes == ["a: not called with these inputs"]


# --- roles and printing of graphs

TEXT = """\
%x_1: bf16[4, 64] = input
%w_1: bf16[64, 32] = input
%mm: bf16[4, 32] = aten.mm(%x_1, %w_1)  # forward (root): fp4
%sum_1: f32[4] = aten.sum.dim_IntList(%mm, [1], dtype=float32)
return %sum_1
"""


def test_text() -> None:
    captured = trace(
        lambda x, w: torch.sum(x @ w, 1, dtype=torch.float32),
        randn(4, 64, dtype=torch.bfloat16),
        randn(64, 32, dtype=torch.bfloat16),
        parameters="w",
    ).until("annotate")
    assert captured.text == TEXT


def test_sites_say_where_they_are() -> None:
    captured = capture(Weight(lambda x, w: x @ w, 64, 32), [X]).until("find_sites")
    assert re.fullmatch(r"forward GEMM of '\(root module\)' \(mm, .*test_graph\.py:\d+\)", captured.sites[0].where)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['self']._modules['layers']._modules['0'].a", "layers.0.a"),
        ("L['self'].layers.0.a", "layers.0.a"),
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("L['fn']._modules['_orig_mod']._modules['a']", "a"),
        ("G['model'].layers['3'].up", "layers.3.up"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_clean_path(raw: str, path: str) -> None:
    assert clean_path(raw) == path


def test_flow_names_weights_and_the_backward() -> None:
    captured = capture(nn.Linear(64, 32), [X])
    flow = data_flow(captured.module.graph, captured.context.parameters)
    assert set(flow.weights.values()) == {"weight", "bias"}
    assert {node.name for node in captured.context.parameters} < {node.name for node in flow.weights}
    tagged = {n for n in captured.module.graph.nodes if n.meta.get("partitioner_tag") == "is_backward"}
    assert flow.backward <= tagged | {n for n in captured.module.graph.nodes if n.op in ("placeholder", "output")}


# --- verification


def graph_of_product() -> Captured:
    return trace(lambda x, w: (x @ w).relu(), randn(4, 64), randn(64, 32), parameters="w")


def test_verify_accepts_a_graph() -> None:
    verify(graph_of_product().module.graph, "nothing")


def test_verify_finds_a_use_before_the_definition() -> None:
    graph = graph_of_product().module.graph
    *_, mm, relu, _ = graph.nodes
    mm.prepend(relu)
    with pytest.raises(RewriteError, match="pass 'clumsy' left a malformed graph"):
        verify(graph, "clumsy")


def test_verify_finds_a_node_of_ours_without_a_value() -> None:
    graph = graph_of_product().module.graph
    *_, relu, _ = graph.nodes
    relu.meta = {"fp4compile": True}
    with pytest.raises(RewriteError, match=r"pass 'clumsy' inserted relu without meta\['val'\]"):
        verify(graph, "clumsy")


# --- reports


def record(path: str = "a", role: str = "forward", parameter: str = "a.weight", **more: Any) -> SiteRecord:
    return SiteRecord(path, role, "linear", **{"status": "fp4", "formats": {}, "parameter": parameter, **more})


def report(*records: SiteRecord, **more: Any) -> Report:
    return Report("hif4", "reference", "cpu", list(records), **more)


def test_a_report_survives_json() -> None:
    before = notes(Tied(), torch.zeros(2, 8, dtype=torch.int64))
    data = json.loads(before.to_json())
    assert data.pop("fp4_share") == before.fp4_share
    data["sites"] = [SiteRecord(**site) for site in data["sites"]]
    assert tuple(data.pop("weight_bytes")) == before.weight_bytes
    data["weights"] = {name: tuple(both) for name, both in data["weights"].items()}
    assert Report(**data) == before


def test_merging_adds_graphs_and_replaces_records_of_the_same_gemm() -> None:
    first = report(record("a", flops=1), record("b", flops=2), notes=["n"], graphs=1, weights={"a.w": (8, 2)})
    first.pass_seconds = {"fuse": 1.0}
    second = report(
        record("a", flops=3), record("a", "dgrad"), notes=["n", "m"], graphs=2, weights={"a.w": (8, 2), "b.w": (16, 4)}
    )
    second.pass_seconds = {"fuse": 2.0, "fold": 1.0}
    first.merge(second)
    found = [(s.path, s.role, s.flops) for s in first.sites]
    assert found == [("b", "forward", 2), ("a", "forward", 3), ("a", "dgrad", 0)]
    assert (first.notes, first.graphs, first.weight_bytes) == (["n", "m"], 3, (24, 6))
    assert first.pass_seconds == {"fuse": 3.0, "fold": 1.0}


@torch.library.custom_op("somelib::grouped_mm_opaque", mutates_args=())
def grouped_mm_opaque(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight


@grouped_mm_opaque.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _cond(model: Model, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda t: model.a(t).sin(), lambda t: model.b(t), (x,))


def _scan(model: Model, x: Tensor) -> Tensor:
    return scan(lambda c, row: (model.b(model.a(c)) + row, c.clone()), x[0], x, dim=0)[1]


@pytest.mark.parametrize("run", [_cond, _scan])
@pytest.mark.parametrize("train", [False, True])
def test_gemms_in_graphs_within_the_graph_are_reported(run: Callable[[Model, Tensor], Tensor], train: bool) -> None:
    report = fp4compile.explain(Model(run), X, "hif4-plain", train=train)
    assert {(s.path, s.parameter) for s in report.sites} == {("a", "a.weight"), ("b", "b.weight")}
    assert all(s.status == "refused" and "graph of its own" in s.reason for s in report.sites)
    kept = fp4compile.explain(Model(run), X, "hif4-plain", train=train, keep=["a", "b"])
    assert {s.status for s in kept.sites} == {"kept"}


@torch.no_grad()
def test_torchs_fused_layers_are_reported() -> None:
    """torch's encoder layers are one op in evaluation without gradients."""
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).eval()
    x = randn(2, 4, 64)
    refused = fp4compile.explain(layer, x, "hif4-plain").sites
    weights = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert {site.parameter for site in refused} == weights
    assert all(site.status == "refused" and "set_fastpath_enabled(False)" in site.reason for site in refused)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert sites(layer, x, train=False) == [
            ("forward", "linear1", "linear1.weight"),
            ("forward", "linear2", "linear2.weight"),
            ("forward", "self_attn", "self_attn.in_proj_weight"),
            ("forward", "self_attn.out_proj", "self_attn.out_proj.weight"),
        ]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_bilinear_layer_is_reported() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Bilinear(8, 8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x, x)

    (site,) = fp4compile.explain(Two(), randn(4, 8), "hif4-plain").sites
    assert (site.path, site.status) == ("both", "refused")
    assert "_trilinear" in site.reason


@pytest.mark.slow
def test_max_pooling_is_captured() -> None:
    """Its decomposition needs a part of Inductor that nothing else has imported."""
    code = (
        "import torch, fp4compile; from torch import nn;"
        "m = nn.Sequential(nn.MaxPool1d(2), nn.Linear(8, 8));"
        "print(fp4compile.explain(m, torch.randn(2, 16), 'hif4-plain').count('fp4'))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_gemm_hidden_in_an_op_of_another_library_is_reported() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.somelib.grouped_mm_opaque(x, self.experts)

    (site,) = fp4compile.explain(Hidden(), torch.randn(4, 16), "hif4-plain").sites
    assert (site.kind, site.role, site.status, site.parameter) == ("grouped", "forward", "refused", "experts")
    assert "somelib.grouped_mm_opaque" in site.reason
    assert site.flops == 2 * 4 * 16 * 8


@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4-plain"])
def test_grouped_gemms_are_found_in_every_role(recipe: str) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 64, 32, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return torch._grouped_mm(x, self.weight, offs=ends)

    x = torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)
    sites = fp4compile.explain(Experts(), (x, torch.tensor([5, 16], dtype=torch.int32)), recipe, train=True).sites
    assert {s.role for s in sites} == {"forward", "dgrad", "wgrad"}
    assert all((s.kind, s.status, s.flops) == ("grouped", "fp4", 2 * 16 * 64 * 32) for s in sites)


def test_merging_keeps_sites_of_other_parameters_at_one_path() -> None:
    first = report(record("a", parameter="a.A"))
    first.merge(report(record("a", parameter="a.B")))
    assert [s.parameter for s in first.sites] == ["a.A", "a.B"]


def test_merged_leaves_its_inputs() -> None:
    assert merged([]) is None
    first, second = report(record("a"), graphs=1), report(record("b"), graphs=1)
    before = dataclasses.replace(first, sites=list(first.sites))
    both = merged([first, second])
    assert both is not None
    assert [s.path for s in both.sites] == ["a", "b"]
    assert first == before


def test_share_and_summary_count_flops() -> None:
    whole = report(record(flops=30), record("b", flops=10, status="kept"), record("c", flops=0, status="refused"))
    assert whole.fp4_share == 0.75
    assert (whole.count("fp4"), whole.count("kept"), whole.count("refused")) == (1, 1, 1)
    assert "1 GEMMs in FP4, 1 kept, 1 refused; 75.0% of the linear GEMM FLOPs in FP4" in whole.summary()
    assert report().fp4_share == 0.0


def test_the_text_holds_paths_reasons_and_notes() -> None:
    whole = report(record("layers.0", reason="[because]", status="refused"), notes=["mind [this]"])
    text = whole.to_text()
    for part in ("layers.0", "refused", "[because]", "note: mind [this]"):
        assert part in text
    assert str(whole) == text.rstrip()
