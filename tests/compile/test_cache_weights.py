"""`cache_weights=True`: the bits of a run without it, and weights quantised once each time that they change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch._inductor.compile_fx import compile_fx_inner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import fp4compile
from fp4compile.backends import inductor
from fp4compile.backends.inductor import halves
from fp4compile.dynamo import fp4compile_backend
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.weight_cache import Program, WeightCache
from tests.compile.common import LlamaBlock, Mlp, Stack, build, randn
from tests.compile.experts import Grouped
from tests.helpers import same_bits

AdamW = partial(torch.optim.AdamW, lr=0.1)
Make = Callable[[], nn.Module]
Call = Callable[..., Tensor]


def compiled(
    model: Any, recipe: str = "hif4-plain", cache: bool = True, dynamic: bool | None = None, **how: Any
) -> Any:
    """Under the function behind the name "fp4compile": a bare checkout has no entry point that torch finds it by."""
    torch._dynamo.reset()
    options = {"recipe": recipe, "cache_weights": cache, **how}
    return torch.compile(model, backend=fp4compile_backend, dynamic=dynamic, options=options)


@dataclass
class Counted:
    """Programs that were run, by the parameter's name; in their order."""

    names: list[str] = field(default_factory=list)

    def take(self) -> list[str]:
        taken, self.names = self.names, []
        return taken


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    counted, make = Counted(), WeightCache._make

    def counting(cache: WeightCache, entry: Any, tensor: Tensor) -> None:
        counted.names.append(entry.program.parameter)
        make(cache, entry, tensor)

    monkeypatch.setattr(WeightCache, "_make", counting)
    yield counted


def train(
    model: nn.Module, run: Call, inputs: list[Tensor], optimizer: Any, after: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """Outputs and gradients of two optimiser steps, each of all inputs as micro-batches."""
    # Gradients are added to tensors of their own: those that a CUDA graph gives are overwritten by the next replay.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = []
    stepping = optimizer(model.parameters())
    for step in range(2):
        for number, each in enumerate(inputs):
            torch.manual_seed(10 * step + number)
            torch.compiler.cudagraph_mark_step_begin()
            x = each.detach().clone().requires_grad_()
            y = run(x)
            y.backward(randn(*y.shape, seed=number, dtype=y.dtype).to(y.device))
            found += [y.detach().clone(), x.grad.clone()]
            after()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        stepping.step()
        stepping.zero_grad(set_to_none=False)
    return found


def both(make: Make, inputs: list[Tensor], *args: Any, optimizer: Any = AdamW, **how: Any) -> bool:
    """Whether training with cached weights and without them gives the same bits."""
    found = []
    for cache in (False, True):
        model = make()
        found.append(train(model, compiled(model, *args, cache=cache, **how), inputs, optimizer))
    return same_bits(*found)


def llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return build(lambda: LlamaBlock(64, heads=4, groups=4)).to(dtype)


def mlp() -> nn.Module:
    return build(lambda: Mlp(64, 32, 32, 64))


def batches(*shape: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=seed, dtype=dtype) for seed in range(count)]


# --- the bits, and how often -----------------------------------------------------------------------------------------

RECIPES = ("hif4-plain", "mxfp4-plain", "hif4", "nvfp4", "quartet")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_block_trains_with_the_same_bits(recipe: str) -> None:
    assert both(llama, batches(2, 32, 64, dtype=torch.bfloat16), recipe)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_once_for_each_step_of_the_optimizer(made: Counted, how: dict[str, bool]) -> None:
    """A fused optimiser writes parameters without counting it."""
    calls: list[int] = []
    model = mlp()
    optimizer = partial(AdamW, **how)
    train(model, compiled(model), batches(16, 64), optimizer, lambda: calls.append(len(made.take())))
    assert calls == [3, 0, 0, 3, 0, 0]
    assert both(mlp, batches(16, 64), optimizer=optimizer)


class WritesData(torch.optim.Optimizer):
    """As optimisers outside torch may: no counter sees the write."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=0.1)


@pytest.mark.slow
def test_an_optimizer_that_writes_data() -> None:
    assert both(mlp, batches(16, 64), optimizer=WritesData)


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_a_compiled_optimizer(fused: bool) -> None:
    class Compiled:
        def __init__(self, parameters: Any) -> None:
            optimizer = AdamW(parameters, fused=fused)
            self.step, self.zero_grad = torch.compile(optimizer.step, backend="eager"), optimizer.zero_grad

    assert both(mlp, batches(16, 64), optimizer=Compiled)


@pytest.mark.slow
def test_forward_and_backward_share_what_both_read(made: Counted) -> None:
    """The tensor scale of a weight is one form; the weight itself has one along each axis."""
    model = mlp()
    train(model, compiled(model, "nvfp4-plain"), batches(16, 64, count=1), AdamW)
    report = fp4compile.last_report()
    assert report is not None
    assert sorted(set(made.names)) == ["first.weight", "second.weight", "third.weight"] and len(made.names) == 6
    # Twice fp32, and four bytes of scale: 64 x 32, 32 x 32 and 32 x 64 elements.
    size = 2 * 4 * (64 * 32 + 32 * 32 + 32 * 64) + 3 * 4
    assert f"3 weights are quantised when they change; their forms take {size / 2**10:.1f} KiB" in report.notes


# --- models ----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight, read by two layers and by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x + self.embedding(torch.arange(len(x))))
        y: Tensor = self.second(F.gelu(self.first(x)))
        return y


@pytest.mark.slow
def test_tied_weights(made: Counted) -> None:
    assert both(lambda: build(Tied), batches(16, 64))
    assert len(made.names) == 2 * 2


class Mixture(nn.Module):
    """Stacks of weights, one for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Grouped()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x, torch.tensor([5, 5, 30, len(x)], dtype=torch.int32))
        return y


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mxfp4-plain", "nvfp4"])
def test_experts(made: Counted, recipe: str) -> None:
    assert both(lambda: Mixture().bfloat16(), batches(48, 64, dtype=torch.bfloat16), recipe)
    assert sorted(made.names) == sorted(f"experts.w{i}" for i in (1, 2, 3) for _ in range(2))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(64, 32, 32, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, checkpoint(self.inner, x, use_reentrant=False), use_reentrant=False)
        return y


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hif4-plain", "nvfp4"])
def test_activation_checkpointing(made: Counted, recipe: str) -> None:
    assert both(lambda: build(Checkpointed), batches(16, 64), recipe)
    assert len(made.names) == 6


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp(64, 32, 32, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.inner(x)
        return y


@pytest.mark.slow
def test_autocast(made: Counted) -> None:
    assert both(lambda: build(Autocast), batches(16, 64), "nvfp4-plain")
    assert len(made.names) == 6


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_dynamic_shapes(made: Counted, dynamic: bool | None) -> None:
    """A graph that is compiled again, for symbolic sizes, has the forms of the first one."""
    inputs = [randn(n, 64) for n in (16, 9, 33)]
    assert both(mlp, inputs, dynamic=dynamic)
    assert len(made.names) == 6
    report = fp4compile.last_report()
    assert report is not None and len([note for note in report.notes if "3 weights are quantised" in note]) == 1


@pytest.mark.slow
def test_cuda_graphs_want_forms_that_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a CUDA device Inductor makes no graph; forms are overwritten all the same."""
    seen: list[tuple[int, ...]] = []
    forms = WeightCache.forms

    def watched(cache: WeightCache, program: Program, tensor: Tensor) -> tuple[Tensor, ...]:
        found = forms(cache, program, tensor)
        seen.append(tuple(form.data_ptr() for form in found))
        return found

    monkeypatch.setattr(WeightCache, "forms", watched)
    assert both(mlp, batches(16, 64), mode="reduce-overhead")
    assert len(set(seen)) == 3


@dataclass
class Halves:
    """What Inductor was given: bytes that the forward returns beside its inputs, and inputs that it takes for fixed."""

    returned: int = 0
    fixed: list[int] = field(default_factory=list)


def halves_of(model: nn.Module, cache: bool, monkeypatch: pytest.MonkeyPatch) -> Halves:
    found = Halves()

    def spy(half: GraphModule, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        names = [node.name for node in half.graph.find_nodes(op="placeholder")]
        static = {names[index] for index in kwargs["static_input_idxs"]}
        found.fixed.append(sum(name.startswith("cached_") and name in static for name in names))
        if not kwargs.get("is_backward"):
            returned = [node for node in half.graph.output_node().all_input_nodes if node.op != "placeholder"]
            found.returned = sum(node.meta["val"].nbytes for node in returned)
        return compile_fx_inner(half, inputs, *args, **kwargs)

    for module in (halves, inductor):
        monkeypatch.setattr(module, "compile_fx_inner", spy)
    compiled(model, "nvfp4-plain", cache=cache)(randn(16, 64).requires_grad_()).sum().backward()
    return found


@pytest.mark.slow
def test_the_backward_is_kept_less_and_cuda_graphs_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cached, usual = (halves_of(build(Autocast), cache, monkeypatch) for cache in (True, False))
    # The casts of three weights, to bf16, and their tensor scales.
    assert usual.returned - cached.returned == 2 * (64 * 32 + 32 * 32 + 32 * 64) + 3 * 4
    assert cached.fixed == [6, 6] and usual.fixed == [0, 0]  # three weights and their tensor scales


class Broken(nn.Module):
    """Two graphs, and a weight that both read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Mlp(64, 32, 32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        y: Tensor = self.first(x)
        return y


@pytest.mark.slow
def test_two_graphs_of_one_model(made: Counted) -> None:
    assert both(lambda: build(Broken), batches(16, 64))
    assert len(made.names) == 6


@pytest.mark.slow
def test_blocks_that_share_a_graph(made: Counted) -> None:
    """Each block's weights have forms of their own: they do not drive out one another's."""

    def make() -> nn.Module:
        torch._dynamo.reset()
        model = build(lambda: Stack(64, 3))
        for layer in model.layers:
            layer.compile(backend=fp4compile_backend, options={"recipe": "hif4-plain", "cache_weights": True})
        return model

    model = make()
    cached = train(model, model, batches(16, 64), AdamW)
    assert len(made.names) == 2 * 3 * 2
    plain = build(lambda: Stack(64, 3))
    torch._dynamo.reset()
    for layer in plain.layers:
        layer.compile(backend=fp4compile_backend, options={"recipe": "hif4-plain"})
    assert same_bits(cached, train(plain, plain, batches(16, 64), AdamW))


@pytest.mark.slow
def test_training_and_evaluation_take_turns(made: Counted) -> None:
    """What evaluation reads is a part of what training reads."""
    x = randn(16, 64)

    def evaluated(cache: bool) -> list[Tensor]:
        model = mlp()
        run = compiled(model, "hif4-plain", cache)
        found = []

        def evaluate() -> None:
            model.eval()
            with torch.no_grad():
                found.append(run(x).clone())
            model.train()

        return train(model, run, batches(16, 64), AdamW, evaluate) + found

    assert same_bits(evaluated(False), evaluated(True))
    assert len(made.names) == 2 * 3


@pytest.mark.slow
def test_a_schedule() -> None:
    def trained(cache: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model = mlp()
        schedule = fp4compile.Schedule(model, {0.0: "hif4-plain", 0.5: None}, 2, options={"cache_weights": cache})
        return [*train(model, schedule.at(0), batches(16, 64), AdamW), schedule.at(1)(randn(16, 64)).detach()]

    assert same_bits(trained(False), trained(True))


# --- inference -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["hif4-w4a16", "mxfp4-w4a4", "nvfp4-w4a4"])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference(made: Counted, recipe: str, guard: Callable[[], Any]) -> None:
    model, x = llama(), randn(2, 32, 64, dtype=torch.bfloat16)
    with guard():
        wanted = compiled(model, recipe, cache=False)(x)
        run = compiled(model, recipe)
        assert all(torch.equal(run(x), wanted) for _ in range(3))
    assert len(made.take()) == 7
    with torch.no_grad():
        model.q_proj.weight.mul_(2)
    with guard():
        changed = run(x)
        assert made.take() == ["q_proj.weight"]
        assert torch.equal(compiled(model, recipe, cache=False)(x), changed) and not torch.equal(changed, wanted)


# --- changes ---------------------------------------------------------------------------------------------------------


def replace_parameter(model: nn.Module) -> None:
    model.first.weight = nn.Parameter(randn(32, 64, seed=5))


def replace_data(model: nn.Module) -> None:
    model.first.weight.data = randn(32, 64, seed=5)


def load(model: nn.Module) -> None:
    model.load_state_dict({**model.state_dict(), "first.weight": randn(32, 64, seed=5)})


def write_through_data(model: nn.Module) -> None:
    model.first.weight.data.mul_(2)
    torch.autograd.graph.increment_version(model.first.weight)


def write_in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model.first.weight.mul_(2)


CHANGES = (replace_parameter, replace_data, load, write_through_data, write_in_inference_mode)


@pytest.mark.slow
@torch.no_grad()
def test_changes_between_calls_are_seen(made: Counted) -> None:
    x = randn(16, 64)
    for change in CHANGES:
        model, other = mlp(), mlp()
        run = compiled(model)
        before = run(x)
        made.take()
        change(model)
        after = run(x)
        assert "first.weight" in made.take(), change.__name__
        change(other)
        assert torch.equal(after, compiled(other, cache=False)(x)), change.__name__
        assert not torch.equal(after, before), change.__name__


@pytest.mark.slow
@torch.no_grad()
def test_a_write_through_data_alone_is_not_seen(made: Counted) -> None:
    """As the option's documentation says."""
    model, x = mlp(), randn(16, 64)
    run = compiled(model)
    before = run(x)
    model.first.weight.data.mul_(2)
    assert torch.equal(run(x), before)
    torch.autograd.graph.increment_version(model.first.weight)
    assert not torch.equal(run(x), before)


@pytest.mark.slow
def test_a_write_between_forward_and_backward_is_an_error_as_ever() -> None:
    for cache in (False, True):
        model = mlp()
        y = compiled(model, cache=cache)(randn(16, 64, seed=1).requires_grad_())
        with torch.no_grad():
            model.second.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.slow
def test_a_model_that_is_gone_leaves_nothing() -> None:
    def size() -> int:
        gc.collect()
        return sum(x.numel() for x in gc.get_objects() if type(x) is Tensor and x.shape == (96, 64))

    model = build(lambda: nn.Sequential(nn.Linear(64, 96, bias=False)))
    run = compiled(model)
    run(randn(16, 64).requires_grad_()).sum().backward()
    assert size() == 2 * 96 * 64  # along each axis
    keeper = run  # the compiled function outlives the weights
    del model[0]
    gc.collect()
    assert size() == 0
    del keeper


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_backend_that_cannot_says_so() -> None:
    with pytest.raises(FP4ValueError, match="backend 'reference' cannot cache weights"):
        compiled(mlp(), backend="reference")(randn(2, 64))


def test_the_option_is_a_bool() -> None:
    with pytest.raises(FP4TypeError, match="option 'cache_weights' must be a bool, got 1"):
        compiled(mlp(), cache=1)(randn(2, 64))  # type: ignore[arg-type]


def test_weights_that_fsdp_gathers_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(mlp(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(FP4ValueError, match="FSDP gathers them"):
            compiled(model)(randn(2, 64))
    finally:
        dist.destroy_process_group()


def test_weights_in_tensors_of_another_class_are_refused() -> None:
    model = mlp()
    model.first.weight = nn.Parameter(TwoTensor(randn(32, 64), randn(32, 64)))
    with pytest.raises(FP4ValueError, match="they are TwoTensors"):
        compiled(model)(randn(2, 64))


def test_weights_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = mlp()
        with pytest.raises(FP4ValueError, match="inference mode, where torch counts no writes"):
            compiled(model)(randn(2, 64))


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("recipe", ["hif4-plain", "mxfp4-plain", "nvfp4"])
def test_on_cuda(made: Counted, recipe: str, mode: str | None) -> None:
    def make() -> nn.Module:
        return build(lambda: Mlp(128, 256, 256, 128)).bfloat16().cuda()

    inputs = [x.cuda() for x in batches(64, 128, count=4, dtype=torch.bfloat16)]
    assert both(make, inputs, recipe, mode=mode, optimizer=partial(AdamW, fused=True))
    assert len(made.names) == 6
