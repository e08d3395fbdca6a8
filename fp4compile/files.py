"""Files that fp4compile writes: never left half-written, and where those of this machine are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fp4compile.errors import FP4ValueError


def check_parents(path: Path) -> None:
    """Raise unless the folder that a path lies in is one or can be made, before any work."""
    above = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise FP4ValueError(f"cannot write {str(path)!r}: {str(above)!r} is no folder")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def cache_folder() -> Path:
    """Where what was built or measured on this machine is kept, per user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fp4compile"
