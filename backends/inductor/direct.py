"""Calls of the ops in the code that Inductor writes: to the kernels themselves, past torch's dispatcher.

    buf0 = torch.ops.fp4compile.tensor_scale.default(arg0_1, 'nvfp4')
    ->
    fp4compile_buf0 = Place('tensor_scale', 'cuda')
    …
    buf0 = fp4compile_buf0.run(arg0_1, 'nvfp4', -1, 0, None, None, None, None, None, '', None)

or, where a size is dynamic,

    buf0 = fp4compile_installed('tensor_scale', 'cuda')(arg0_1, 'nvfp4', -1, …)

To Inductor an op stays what it is, an opaque call with a schema and a shape rule; only this line is written otherwise.
What it leaves out has nothing to do there: AOTAutograd runs such code below autograd, with gradients off, on plain
tensors, and their sizes and strides are those that the code was written for. Where Inductor writes C++ instead of
Python the op is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.codegen.wrapper import ExternKernelAllocLine
from torch._inductor.virtualized import V

from fp4compile.ops import OPS, Op

# The code may come back from Inductor's cache in another process: it names what every process can import.
_IMPORT = "from fp4compile.dispatch import Place as fp4compile_Place, installed as fp4compile_installed"


@dataclass
class _Line(ExternKernelAllocLine):
    """A line that calls the kernels of an op."""

    op: Op

    def codegen(self, code: Any) -> None:
        """Write it as Inductor writes the op's own, under another name and with all arguments in order."""
        node: Any = self.node
        given = node.codegen_args()
        named = dict(text.split("=", 1) for text in node.codegen_kwargs())
        parameters = list(self.op.signature.parameters.values())[len(given) :]
        given += [named.get(p.name, repr(p.default)) for p in parameters]
        wrapper, usual = self.wrapper, node.python_kernel_name
        wrapper.add_import_once(_IMPORT)
        where = f"({self.op.name!r}, {node.get_device().type!r})"
        node.python_kernel_name = f"fp4compile_installed{where}"
        if _static(node):
            place = f"fp4compile_{node.get_name()}"
            wrapper.add_import_once(f"{place} = fp4compile_Place{where}")
            node.python_kernel_name = f"{place}.run"
        try:
            wrapper._generate_extern_kernel_alloc_helper(node, given)
        finally:
            node.python_kernel_name = usual


def _static(node: Any) -> bool:
    """Whether all calls from this line are alike."""
    sizes = [n for x in node.inputs for n in (*x.get_size(), *x.get_stride())]
    return not any(getattr(n, "free_symbols", None) for n in (*sizes, *node.constant_args))


def _writer(op: Op) -> Callable[[Any, Callable[[Any], None]], None]:
    return lambda node, writeline: writeline(_Line(V.graph.wrapper_code, node, op))


@cache
def write_direct_calls() -> None:
    """Have Inductor write all calls of ops in this way from now on."""
    for op in OPS.values():
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.fp4compile.{op.name}.default"] = CustomCodegen(python=_writer(op))
