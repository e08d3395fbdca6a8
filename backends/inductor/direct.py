"""Calls of the ops in the code that Inductor writes: to the kernels themselves, past torch's dispatcher.

    buf0 = torch.ops.fp4compile.fake_quantize.default(arg0_1, 'hif4', 0)
    ->
    buf0 = fp4compile_installed('fake_quantize', 'cuda')(arg0_1, 'hif4', 0)

To Inductor an op stays what it is, an opaque call with a schema and a shape rule; only this line is written otherwise.
What it leaves out has nothing to do there: AOTAutograd runs such code below autograd, with gradients off, on plain
tensors. Where Inductor writes C++ instead of Python the op is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.codegen.wrapper import ExternKernelAllocLine
from torch._inductor.virtualized import V

from fp4compile.ops import OPS

# The line may come back from Inductor's cache in another process: it names what every process can import.
_IMPORT = "from fp4compile.backend import installed as fp4compile_installed"


@dataclass
class _Line(ExternKernelAllocLine):
    """A line that calls the kernels of an op."""

    op: str

    def codegen(self, code: Any) -> None:
        """Write it as Inductor writes the op's own, under another name."""
        node: Any = self.node
        name = node.python_kernel_name
        node.python_kernel_name = f"fp4compile_installed({self.op!r}, {node.get_device().type!r})"
        try:
            super().codegen(code)
        finally:
            node.python_kernel_name = name


def _writer(op: str) -> Callable[[Any, Callable[[Any], None]], None]:
    def write(node: Any, writeline: Callable[[Any], None]) -> None:
        wrapper = V.graph.wrapper_code
        wrapper.add_import_once(_IMPORT)
        writeline(_Line(wrapper, node, op))

    return write


@cache
def write_direct_calls() -> None:
    """Have Inductor write all calls of ops in this way from now on."""
    for op in OPS:
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.fp4compile.{op}.default"] = CustomCodegen(python=_writer(op))
