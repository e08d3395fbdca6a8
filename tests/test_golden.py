"""Each pass on the example of tests/golden/<pass>/model.py: the graph text before and after it.

`make golden` writes the texts anew. A model gives `make() -> (module, example inputs)`, RECIPE and TRAIN; with
EXPORT its inference graph comes from torch.export, parameters as attributes, and not from torch.compile; with
CLAIMS (op -> what of it) the backend is one that claims kernels for these ops; with CACHE weights are cached.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.fx import Graph

import fp4compile
from fp4compile.backend import get_backend
from fp4compile.graph import Site, text
from fp4compile.passes import PIPELINE
from fp4compile.pipeline import Context, Pass, Pipeline
from fp4compile.weight_cache import WeightCache
from tests.claims import Claims, registered
from tests.helpers import NAMES, export

GOLDEN = Path(__file__).parent / "golden"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", GOLDEN / name / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _about(site: Site) -> str:
    operands = " ".join(
        f"{name}[{axis}]={spec.format if (spec := site.specs.get(name)) else '-'}" for name, axis in site.axes.items()
    )
    parts = [f"{site.role} {site.path or '(root)'} ({site.parameter}): {operands}", *site.kernels, site.reason]
    return "; ".join(part for part in parts if part)


def _renumber(text: str) -> str:
    """Number the nodes of each name anew: torch's versions leave different gaps."""
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, body in re.findall(r"^%(\w+).*? = (\w+)", text, re.MULTILINE):
        stem = re.sub(r"_\d+$", "", name)
        count = counts[stem]
        counts[stem] += 1
        names[name] = name if body in ("input", "attribute") else f"{stem}_{count}" if count else stem
    return re.sub(r"%(\w+)", lambda found: f"%{names[found[1]]}", text)


def _print(graph: Graph, context: Context) -> str:
    programs = "".join(f"# forms of {p.parameter}:\n{_renumber(text(p.module.graph))}" for p in context.programs)
    return _renumber(text(graph, context.sites)) + "".join(f"# {_about(site)}\n" for site in context.sites) + programs


def _texts(name: str) -> dict[str, str]:
    """The graph before the first pass ("") and after each pass up to the named one."""
    example = _example(name)
    torch.manual_seed(0)
    model, inputs = example.make()
    found = {}

    def observe(step: Pass | None, graph: Graph, context: Context) -> None:
        context.weight_cache = WeightCache() if getattr(example, "CACHE", False) else None
        found[step.name if step else ""] = _print(graph, context)

    wanted = NAMES[: NAMES.index(name) + 1]
    if getattr(example, "EXPORT", False):
        captured = export(model, inputs, example.RECIPE, decompose=False)
        observe(None, captured.module.graph, captured.context)
        Pipeline(PIPELINE).select(wanted).run(captured.module, captured.context, observe)
    else:
        claims = getattr(example, "CLAIMS", None)
        with registered(Claims(**claims) if claims else get_backend("reference")) as backend:
            fp4compile.explain(
                model, inputs, example.RECIPE, train=example.TRAIN, backend=backend, passes=wanted, observe=observe
            )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_golden(name: str, request: pytest.FixtureRequest) -> None:
    texts = _texts(name)
    before = ("", *NAMES)[NAMES.index(name)]
    for file, produced in (("before.txt", texts[before]), ("after.txt", texts[name])):
        path = GOLDEN / name / file
        if request.config.getoption("--update-golden"):
            path.write_text(produced, encoding="utf-8")
        assert produced == path.read_text(encoding="utf-8"), f"{path} differs; `make golden` writes it anew"


def test_every_pass_has_a_golden() -> None:
    assert sorted(path.parent.name for path in GOLDEN.glob("*/model.py")) == sorted(NAMES)
