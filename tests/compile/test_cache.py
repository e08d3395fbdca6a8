"""Compile caches: a changed recipe never finds another one's graph, and a second process starts warm."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch.fx import GraphModule

from fp4compile.aot import decompositions
from fp4compile.backends.inductor import _JointPass
from fp4compile.capture import frame
from fp4compile.dynamo import Options, make_context, rewriter
from fp4compile.pipeline import default_pipeline, fingerprint
from fp4compile.recipe import RECIPES, Operand, Recipe, Rule
from tests.compile.common import build, by_hand, compiled, plain, randn, relative, step

X = randn(13, 70)


def _model() -> nn.Module:
    return build(lambda: nn.Sequential(nn.Linear(70, 16)))


@pytest.mark.slow
def test_a_changed_recipe_changes_the_graph_in_one_process() -> None:
    with fresh_cache():
        for format in ("mxfp4", "hif4", "mxfp4"):
            torch._dynamo.reset()
            got = step(compiled(_model(), f"{format}-plain", "inductor"), X)
            assert got.worst(step(by_hand(_model(), plain(format)), X)) < 2e-3


def _through_the_autograd_cache(recipe: str, key: bytes | None = None) -> tuple[Tensor, dict[str, int]]:
    """The output of a training forward compiled with AOTAutograd's cache on, and the counts of that cache."""

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        where = frame(graph_module, inputs)
        context = make_context(Options(recipe=recipe), where, "cpu")
        rewrite = rewriter(context, where, default_pipeline(), lambda context: None)
        joint_pass = _JointPass(rewrite, key or fingerprint(context, default_pipeline()))
        patches = {"joint_custom_pre_pass": joint_pass}
        return compile_fx(graph_module, inputs, config_patches=patches, decompositions=decompositions())

    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(enable_autograd_cache=True):
        out = torch.compile(_model(), backend=backend)(X)
        out.sum().backward()
    return out.detach(), dict(counters["aot_autograd"])


@pytest.mark.parametrize("constant", [False, True], ids=["ours", "constant"])
def test_the_uuid_of_the_pass_tells_recipes_apart(constant: bool) -> None:
    """With a constant uuid, the control, the second recipe runs the graph of the first."""
    key = b"constant" if constant else None
    with fresh_cache():
        first, counts = _through_the_autograd_cache("mxfp4-plain", key)
        assert counts["autograd_cache_miss"] == 1
        again, counts = _through_the_autograd_cache("mxfp4-plain", key)
        assert counts["autograd_cache_hit"] == 1
        assert torch.equal(first, again)
        other, counts = _through_the_autograd_cache("hif4-plain", key)
    assert counts.get("autograd_cache_hit", 0) == int(constant)
    assert (relative(other, first) < 1e-6) == constant


def _key(recipe: Any, backend: str = "reference", **options: Any) -> bytes:
    from fp4compile.capture import Frame

    context = make_context(Options(recipe=recipe, backend=backend, **options), Frame(), "cpu")
    return fingerprint(context, default_pipeline())


def test_everything_that_decides_the_graph_is_in_the_key() -> None:
    spec = Operand("mxfp4")
    recipes = [
        Recipe("r", (Rule("forward", input=spec, weight=spec),)),
        Recipe("r", (Rule("forward", modules="a*", input=spec, weight=spec),)),
        Recipe("r", (Rule("forward", input=spec),)),
        Recipe("r", (Rule("forward", weight=Operand("mxfp4", scale_rule="even")),)),
        Recipe("r", (Rule("forward", input=spec, weight=spec),), keep_heads=False),
        Recipe("r", (Rule("forward", input=spec, weight=spec),), keep_last=0.5),
        *RECIPES.presets.values(),
    ]
    keys = [_key(recipe) for recipe in recipes]
    keys += [_key(recipes[0], keep=["a"]), _key(recipes[0], strict=False), _key(recipes[0], "inductor")]
    keys.append(_key(recipes[0], "inductor", cache_weights=True))
    assert len(set(keys)) == len(keys)
    assert _key(recipes[0]) == keys[0]


_SCRIPT = """
import json, sys, torch
import fp4compile
from torch._dynamo.utils import counters
from tests.compile.common import Mlp, build, compiled, randn, step
model = build(lambda: Mlp(64, 64, 64, 64))
found = step(compiled(model, sys.argv[1], "inductor"), randn(13, 64))
report = fp4compile.last_report()
print(json.dumps({
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "sites": len(report.sites),
    "recipe": report.recipe,
    "output": found.tensors["output"].tolist(),
    "grad": found.tensors["first.weight"].tolist(),
}))
"""


def _process(recipe: str, folder: Any, root: str) -> dict[str, Any]:
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", _SCRIPT, recipe], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_processes_that_share_a_cache(tmp_path, pytestconfig) -> None:
    """Each run reports and computes its own recipe; the second of a recipe finds every kernel ready."""
    runs = [_process(r, tmp_path, str(pytestconfig.rootpath)) for r in ("hif4", "mxfp4", "hif4", "mxfp4")]
    for run, recipe in zip(runs, ("hif4", "mxfp4") * 2, strict=True):
        assert (run["recipe"], run["sites"]) == (recipe, 9)
    assert runs[0]["misses"] > 0
    for cold, warm in ((runs[0], runs[2]), (runs[1], runs[3])):
        assert (warm["hits"], warm["misses"]) == (cold["hits"] + cold["misses"], 0)
        assert relative(torch.tensor(warm["grad"]), torch.tensor(cold["grad"])) < 1e-6
    assert relative(torch.tensor(runs[1]["output"]), torch.tensor(runs[0]["output"])) > 0.02
