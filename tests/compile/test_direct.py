"""How Inductor's code calls the ops: the kernels themselves, with the ops' bits, and from its cache too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.utils import fresh_cache, run_and_get_code

from fp4compile.backends.inductor.direct import write_direct_calls
from fp4compile.dispatch import install_kernels
from tests.gpu import ROOT
from tests.helpers import randn

pytestmark = pytest.mark.slow

ops = torch.ops.fp4compile
USUAL, FIXED, ANY = r"= torch\.ops\.fp4compile\.\w+\.default\(", r"= fp4compile_\w+\.run\(", r"= fp4compile_installed\("


@pytest.fixture(autouse=True)
def _direct() -> Iterator[None]:
    torch._dynamo.reset()
    install_kernels()
    write_direct_calls()
    with torch.no_grad(), fresh_cache():
        yield


def function(x: Tensor) -> Tensor:
    """A result of its own, results of several, default arguments and given ones, a transposed operand, a size."""
    y = ops.fake_quantize(x.sin(), "hif4", 1)
    codes, scales = ops.quantize(y.cos(), "mxfp4", axis=1, scale_rule="ceil")
    z = ops.dequantize(codes, scales, None, "mxfp4", 1, x.shape[1], False, torch.float32)
    product: Tensor = ops.mm(y, z.t())
    return product


def calls(code: str) -> dict[str, int]:
    return {pattern: len(re.findall(pattern, code)) for pattern in (USUAL, FIXED, ANY)}


def compiled(dynamic: bool = False) -> dict[str, int]:
    """How often each kind of call stands in the code, which gives the bits of the ops."""
    x = randn(24, 64)
    got, (code,) = run_and_get_code(torch.compile(function, dynamic=dynamic), x)
    assert torch.equal(got, function(x))
    return calls(code)


def test_a_call_with_static_sizes_is_bound_to_its_place() -> None:
    assert compiled() == {USUAL: 0, FIXED: 4, ANY: 0}


def test_a_call_with_dynamic_sizes_looks_its_kernel_up() -> None:
    assert compiled(dynamic=True) == {USUAL: 0, FIXED: 0, ANY: 4}


@config.patch(cpp_wrapper=True)
def test_code_in_cpp_calls_the_ops() -> None:
    assert compiled() == {USUAL: 0, FIXED: 0, ANY: 0}


@config.patch(graph_partition=True, custom_should_partition_ops=["fp4compile::quantize"])
def test_parts_of_a_graph() -> None:
    """As CUDA graphs leave out what they cannot capture."""
    assert compiled() == {USUAL: 0, FIXED: 4, ANY: 0}


def test_branches() -> None:
    def branches(x: Tensor, which: Tensor) -> Any:
        def one(x: Tensor) -> Tensor:
            return ops.fake_quantize(x + 1, "mxfp4", 1)

        def other(x: Tensor) -> Tensor:
            return ops.fake_quantize(x - 1, "hif4", 0)

        return torch.cond(which, one, other, (x.sin(),))

    x = randn(24, 64)
    for which in (torch.tensor(True), torch.tensor(False)):
        got, (code,) = run_and_get_code(torch.compile(branches), x, which)
        assert torch.equal(got, branches(x, which))
        assert calls(code) == {USUAL: 0, FIXED: 2, ANY: 0}
        torch._dynamo.reset()


_PROCESS = """
import json, torch
from torch._dynamo.utils import counters
from tests.compile.test_direct import function
from tests.helpers import randn
from fp4compile.dispatch import install_kernels
{prepare}
with torch.no_grad():
    got = torch.compile(function)(randn(24, 64))
print(json.dumps([got.double().sum().item(), counters["inductor"]["fxgraph_cache_hit"]]))
"""


def test_a_process_that_finds_the_code_in_the_cache_needs_no_preparation(tmp_path: Path) -> None:
    prepare = (
        "from fp4compile.backends.inductor.direct import write_direct_calls; install_kernels(); write_direct_calls()"
    )
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(prepare: str) -> Any:
        command = [sys.executable, "-c", _PROCESS.format(prepare=prepare)]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    first, second = run(prepare), run("")
    expected = function(randn(24, 64)).double().sum().item()
    assert first == [expected, 0]
    assert second == [expected, 1]
    texts = [path.read_text() for path in tmp_path.rglob("*.py")]
    assert any(re.search(FIXED, text) for text in texts)
