"""A backend from another distribution: installed, found by its entry point, used, and what its mistakes look like."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Runs in a process of its own, with the plugin's folder on its path; prints one JSON object.
_SCRIPT = """
import json, sys
import fp4compile
from fp4compile.backend import backend_names
from tests.compile.common import Mlp, build, by_hand, compiled, plain, randn, step

recipe, options = sys.argv[1], json.loads(sys.argv[2])
model, x = build(lambda: Mlp(64, 64, 64, 64)), randn(13, 64)
found = {"names": backend_names()}
try:
    got = step(compiled(model, recipe, **options), x)
except Exception as error:
    found |= {"error": type(error).__name__, "message": str(error)}
else:
    import fp4compile_tiny
    report = fp4compile.last_report()
    found |= {
        "calls": len(fp4compile_tiny.CALLS),
        "backend": report.backend,
        "kernels": sorted({k for s in report.sites for k in s.kernel.split(" + ")}),
        "status": sorted({s.status for s in report.sites}),
        "reasons": sorted({s.reason for s in report.sites}),
        "notes": report.notes,
    }
    if recipe.endswith("-plain"):
        how = model if "refused" in found["status"] else by_hand(model, plain(recipe.removesuffix("-plain")))
        found["error to hand"] = got.worst(step(how, x))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin as pip installs it, in a folder of its own; nothing is fetched."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools to build the plugin without a network")
    source = tmp_path_factory.mktemp("source") / "package"
    target = tmp_path_factory.mktemp("target")
    shutil.copytree(Path(__file__).parent / "package", source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def use(installed: Path, pytestconfig: pytest.Config) -> Any:
    """Compile a model in a fresh process that has the plugin."""

    def run(recipe: str, **options: Any) -> dict[str, Any]:
        root = str(pytestconfig.rootpath)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join((root, str(installed)))}
        command = [sys.executable, "-c", _SCRIPT, recipe, json.dumps(options)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_a_plugin_runs_its_kernel(use: Any) -> None:
    found = use("hif4-plain", backend="tiny")
    assert {"tiny", "reference", "inductor"} <= set(found["names"])
    assert (found["backend"], found["status"]) == ("tiny", ["fp4"])
    assert "tiny/fake_quantize" in found["kernels"]
    assert found["calls"] == 18  # three layers, three GEMMs, two operands
    assert found["error to hand"] < 2e-6


@pytest.mark.slow
def test_a_kernel_that_declines_is_reported_with_its_reason(use: Any) -> None:
    found = use("hif4", backend="tiny")
    assert "tiny/fake_quantize: no Hadamard transform in this kernel" in found["notes"]
    assert found["calls"] == 6  # the forward alone


def test_a_format_that_the_plugin_lacks_is_an_error(use: Any) -> None:
    found = use("nvfp4-plain", backend="tiny")
    assert found["error"] == "RewriteError"
    for part in ("'first'", "backend 'tiny' lacks format 'nvfp4'", "hif4 and mxfp4 only", "strict=False"):
        assert part in found["message"]


@pytest.mark.slow
def test_or_a_reported_fallback(use: Any) -> None:
    found = use("nvfp4-plain", backend="tiny", strict=False)
    assert found["status"] == ["refused"]
    assert all("lacks format 'nvfp4'" in reason for reason in found["reasons"])
    assert (found["calls"], found["error to hand"] < 2e-6) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("broken_import", ["'broken_import'", "fp4compile_tiny.broken:BACKEND", "no_such_vendor_library"]),
        ("no_such_name", ["'no_such_name'", "fp4compile_tiny:MISSING", "MISSING"]),
        ("not_a_backend", ["'not_a_backend'", "str, not a Backend"]),
    ],
)
def test_a_broken_plugin_is_named(use: Any, name: str, parts: list[str]) -> None:
    found = use("hif4-plain", backend=name)
    assert found["error"] == "FP4ValueError"
    for part in parts:
        assert part in found["message"]
