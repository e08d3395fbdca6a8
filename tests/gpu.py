"""What tests of GPU kernels share: what they need, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not _TRITON, reason="Triton is not installed")
_TRITON_3_8 = _TRITON and Version(version("triton")) >= Version("3.8")
before_triton_3_8 = pytest.mark.skipif(
    _TRITON_3_8,
    reason="Triton 3.8 compiles operands of few tokens through shared memory and interprets no function as a constant",
)


def interpret_apart(module: str, every: int) -> None:
    """Call `interpret(every)` of a test module in a process of its own: Triton decides when it is imported whether it
    compiles or interprets."""
    code = f"from {module} import interpret; interpret({every})"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
