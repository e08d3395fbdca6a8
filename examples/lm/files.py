"""Text files in an order that does not depend on the machine."""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

from lm.machine import BadInput


def files_of(path: Path) -> list[Path]:
    """The file itself, or every file below the folder."""
    if not path.exists():
        raise BadInput(f"--text {path}: no such file or folder")
    return [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]


def python_sources(root: Path, skipped: Sequence[str] = ()) -> list[Path]:
    """The Python files below `root`, without those below folders of the `skipped` names."""
    return [path for path in root.rglob("*.py") if not set(skipped).intersection(path.relative_to(root).parts)]


def shuffled(paths: Sequence[Path]) -> list[Path]:
    """A fixed order that follows neither names nor folders, so that every part is like the rest."""
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def read_file(path: Path) -> bytes:
    """A file's bytes, unpacked if it is an .xz; none for a binary file, which a NUL gives away."""
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except lzma.LZMAError as error:
        raise BadInput(f"cannot unpack {path}: {error}") from error
    return b"" if b"\0" in data else data
