"""Imports point one way, and the two folders at the top have one name each."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "fp4compile").glob("*.py"))


def imported(source: str) -> Iterator[str]:
    """Every module that a source file of the core imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in ("fp4compile" if node.level else "", node.module or "") if part)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def outward(source: str) -> list[str]:
    """What a source file imports of passes and backends."""
    folders = ("fp4compile.passes", "fp4compile.backends", "passes", "backends")
    return [name for name in imported(source) if any(f"{name}.".startswith(f"{folder}.") for folder in folders)]


@pytest.mark.parametrize("path", CORE, ids=[path.stem for path in CORE])
def test_the_core_imports_neither_passes_nor_backends(path: Path) -> None:
    assert outward(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import fp4compile.passes", True),
        ("from fp4compile import passes", True),
        ("from fp4compile.backends.inductor import BACKEND", True),
        ("def f():\n    from . import backends", True),
        ("from .passes.fuse import Fuse", True),
        ("import fp4compile.backend", False),
        ("from fp4compile.backend import Backend", False),
        ("'fp4compile.passes:PIPELINE'", False),
    ],
)
def test_the_search_finds_every_form(source: str, found: bool) -> None:
    assert bool(outward(source)) == found


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_the_folders_cannot_be_imported_by_their_bare_names(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"ImportError: import fp4compile.{folder}, not the top-level folder" in result.stderr
