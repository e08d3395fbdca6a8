"""The default backend: Inductor on CPU and CUDA, with FP4 codecs as opaque kernels.

The rewrite runs inside Inductor's joint-graph pass, on the forward and backward graph together, before it is
partitioned; everything around the FP4 operands is compiled as it is for BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from fp4compile.aot import decompositions
from fp4compile.backend import Backend, Rewrite
from fp4compile.backends import triton
from fp4compile.backends.inductor import cpu
from fp4compile.backends.inductor.direct import write_direct_calls
from fp4compile.backends.inductor.halves import HalfCompiler
from fp4compile.dispatch import install_kernels
from fp4compile.pipeline import Context, default_pipeline, fingerprint
from fp4compile.report import Report


class _JointPass(CustomGraphPass):
    """Our rewrite as Inductor's joint pass, behind one that the user has set."""

    def __init__(self, rewrite: Rewrite, key: bytes) -> None:
        self._rewrite, self._key = rewrite, key
        before: Any = torch._inductor.config.joint_custom_pre_pass
        self._before = tuple(before) if isinstance(before, list | tuple) else (before,) if before else ()

    def __call__(self, graph: Graph) -> None:
        for step in self._before:
            step(graph)
        if not _is_nested(graph):
            self._rewrite(graph)

    def uuid(self) -> Any:
        """What Inductor's caches know the rewrite by: everything that decides its result."""
        return self._key, *(step.uuid() for step in self._before if isinstance(step, CustomGraphPass))


def _is_nested(graph: Graph) -> bool:
    """Whether a graph lies within another, as a branch of `torch.cond` does: its inputs are not AOTAutograd's, which
    alone tell what is a parameter and what a tangent. The passes report its GEMMs where it is called."""
    inputs = graph.find_nodes(op="placeholder")
    return bool(inputs) and not any("desc" in node.meta for node in inputs)


class InductorBackend(Backend):
    """Lowers the rewritten graph with Inductor."""

    name = "inductor"
    doc = "the default: torch's Inductor on CPU and CUDA, FP4 codecs as opaque kernels"
    kernels = cpu.KERNELS + triton.KERNELS
    caches_weights = True

    def runtime_notes(self, report: Report) -> list[str]:
        # Notes name the kernels of weights that a loaded model holds packed.
        named = (*(site.kernel for site in report.sites), *report.notes)
        return triton.rowwise.notes() if any("mm_rowwise" in each for each in named) else []

    def compile(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        rewrite: Rewrite,
        context: Context,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        if context.device == "cpu":
            cpu.prebuild()  # the C compiler runs beside AOTAutograd's tracing
        install_kernels(self.name)
        write_direct_calls()
        joint_pass = _JointPass(rewrite, fingerprint(context, default_pipeline()))
        patches = {**(list_mode_options(mode) if mode else {}), "joint_custom_pre_pass": joint_pass}
        # On a hit of AOTAutograd's cache no pass would run: no report and no strict error. Kernels are still cached.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            compiled: Any = compile_fx(
                graph_module,
                example_inputs,
                inner_compile=HalfCompiler(context.weight_cache, context.programs)
                if context.weight_cache
                else compile_fx_inner,
                config_patches=patches,
                decompositions=decompositions(),
            )
        return compiled


BACKEND = InductorBackend()
