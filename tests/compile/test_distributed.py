"""DDP and FSDP2 on two processes: gradients equal the mean of what one process gives on each microbatch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fp4compile
from fp4compile.errors import RewriteError
from tests.compile.common import Stack, build, relative

pytestmark = pytest.mark.slow

WORLD = 2
ROLES = ("forward", "dgrad", "wgrad")
BLOCKS = {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}
_SMALL_BUCKET = 40_000  # bytes, about one block


def _options(recipe: str, backend: str) -> dict[str, object]:
    return {"backend": "fp4compile", "options": {"recipe": recipe, "backend": backend}}


def _step(model: nn.Module, rank: int) -> None:
    """A step on the rank's microbatch, with its random seed."""
    x = torch.randn(13, 64, generator=torch.Generator().manual_seed(100 + rank))
    torch.manual_seed(50 + rank)
    model(x).square().mean().backward()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def _wrap(model: nn.Module, kind: str, group: dist.ProcessGroup | None = None) -> nn.Module:
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if kind == "ddp buckets":
        dist._DEFAULT_FIRST_BUCKET_BYTES = _SMALL_BUCKET
    wrapped = DistributedDataParallel(model, process_group=group)
    if kind == "ddp buckets":
        wrapped.bucket_bytes_cap = _SMALL_BUCKET
    return wrapped


def _alone(kind: str, rank: int, recipe: str, backend: str, groups: list[dist.ProcessGroup]) -> dict[str, Tensor]:
    """One process on a rank's microbatch, its graphs cut in the same places: each graph draws its own seed."""
    torch._dynamo.reset()
    model = build(Stack)
    how = _options(recipe, backend)
    if kind == "fsdp":
        for layer in model.layers:
            layer.compile(**how)
        _step(model, rank)
    elif kind == "ddp buckets":
        _step(torch.compile(_wrap(model, kind, groups[dist.get_rank()]), **how), rank)
    else:
        _step(torch.compile(model, **how), rank)
    return _gradients(model)


def _check_report(kind: str) -> None:
    report = fp4compile.last_report()
    found = {(s.path, s.role): s.status for s in report.sites}
    if kind == "fsdp":  # a hook around each block breaks the graph: blocks share one, and none holds the head
        blocks = {(f"layers.*.{name}", role): "fp4" for name in ("up", "down") for role in ROLES}
        assert found == blocks | {("head", "forward"): "refused"}
        return
    wanted = {(path, role): "fp4" for path in BLOCKS for role in ROLES} | {("head", r): "kept" for r in ROLES}
    assert found == wanted
    assert len(report.sites) == len(wanted)
    assert (report.graphs > 1) == (kind == "ddp buckets")


def _train(rank: int, folder: str, kind: str, recipe: str, backend: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        groups = [dist.new_group([r]) for r in range(WORLD)]
        model = build(Stack)
        run = torch.compile(_wrap(model, kind), **_options(recipe, backend))
        _step(run, rank)
        _check_report(kind)
        got = _gradients(model)
        each = [_alone(kind, r, recipe, backend, groups) for r in range(WORLD)]
        assert relative(each[0]["layers.0.up.weight"], each[1]["layers.0.up.weight"]) > 0.1
        for name, grad in got.items():
            assert relative(grad, sum(one[name] for one in each) / WORLD) < 1e-6, name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "ddp buckets", "fsdp"])
@pytest.mark.parametrize(("recipe", "backend"), [("hif4", "reference"), ("mxfp4", "reference"), ("mxfp4", "inductor")])
def test_gradients_are_the_mean_over_ranks(kind: str, recipe: str, backend: str, tmp_path: Path) -> None:
    mp.spawn(_train, (str(tmp_path), kind, recipe, backend), nprocs=WORLD)


def _compiled_in_place(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        model = _wrap(build(Stack), "ddp")
        model.compile(**_options("hif4", "reference"))
        _step(model, rank)
        assert {s.path for s in fp4compile.last_report().sites} == {*BLOCKS, "head"}
    finally:
        dist.destroy_process_group()


def test_paths_of_a_wrapped_model_that_is_compiled_in_place(tmp_path: Path) -> None:
    """They are the model's, not the wrapper's: no `module.` before them."""
    mp.spawn(_compiled_in_place, (str(tmp_path),), nprocs=WORLD)


def _depth_rule(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        run = torch.compile(_wrap(build(Stack), "fsdp"), **_options("nvfp4", "reference"))
        with pytest.raises(RewriteError, match="one block of a larger model"):
            run(torch.randn(13, 64))
    finally:
        dist.destroy_process_group()


def test_fsdp_refuses_a_recipe_that_counts_blocks(tmp_path: Path) -> None:
    """Blocks share one graph there, so none can be the last."""
    mp.spawn(_depth_rule, (str(tmp_path),), nprocs=WORLD)
