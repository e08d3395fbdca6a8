"""What tests of GPU kernels share: what they need, Triton's interpreter and its compiler, and an interpreter of what
it compiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from fp4compile.backends.triton import launch
from tests import ptx

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
    reason="Triton 3.8 compiles operands of few tokens through shared memory",
)


def interpret_apart(module: str, every: int) -> None:
    """Call `interpret(every)` of a test module in a process of its own: Triton decides when it is imported whether it
    compiles or interprets."""
    code = f"from {module} import interpret; interpret({every})"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


SM_90 = 90
SM_100 = 100  # compiled only: not run on hardware


def compiled(planned: launch.Launch, given: Mapping[str, Any], capability: int = SM_90) -> str:
    """The PTX of a launch for a compute capability, ten times its number."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(launch.kernels(planned.module), planned.kernel)
    constants = {(kernel.arg_names.index(k),): v for k, v in planned.constants.items()}
    signature, attributes = dict.fromkeys(planned.constants, "constexpr"), {}
    for name, value in {**planned.arguments, **given}.items():
        at = (kernel.arg_names.index(name),)
        if value is None:
            signature[name], constants[at] = "constexpr", None
        elif isinstance(value, Tensor):
            signature[name], attributes[at] = _TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    options = {"num_warps": planned.num_warps, "enable_fp_fusion": False}
    result = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert result.asm["cubin"]
    return result.asm["ptx"]


def run_compiled(planned: launch.Launch, given: Mapping[str, Any], device: torch.device) -> None:
    """In the place of `launch.run`, on CPU tensors: the kernel as it is compiled for sm_90, the assembly in it too."""
    names = getattr(launch.kernels(planned.module), planned.kernel).arg_names
    values = {**planned.arguments, **given}
    arguments = [values[name] for name in names if values.get(name) is not None]
    ptx.run(compiled(planned, given), planned.grid, planned.num_warps, arguments)
