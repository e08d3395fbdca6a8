"""Files that fp4compile writes: never left half-written, and where those of this machine are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from fp4compile.errors import FP4ValueError


def check_writable(path: Path) -> None:
    """Raise unless a folder takes files, or that of a file does or can be made, before any work.

    A pipe or a device takes what it is given.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        return
    real = path.resolve()
    above = next(folder for folder in ((real,) if real.is_dir() else real.parents) if folder.exists())
    if not above.is_dir():
        raise FP4ValueError(f"cannot write {str(path)!r}: {str(above)!r} is no folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FP4ValueError(f"cannot write {str(path)!r}: no permission to write in {str(above)!r}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file in the same folder, then rename; a link keeps leading to what it names.

    What is no file, as a pipe or a device, takes the bytes as they come.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = path.resolve()
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
