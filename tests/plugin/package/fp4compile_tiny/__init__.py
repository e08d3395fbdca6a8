"""A backend as a third party writes one: a kernel, the formats it knows, and eager execution of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from functorch.compile import default_partition, make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from fp4compile.aot import decompositions
from fp4compile.backend import Answer, Backend, Kernel, No, Rewrite, Yes
from fp4compile.dispatch import install_kernels
from fp4compile.ops import OPS
from fp4compile.pipeline import Context

CALLS = []


def fake_quantize(**arguments: Any) -> torch.Tensor:
    """Counts, and computes what the reference computes."""
    CALLS.append(arguments["format"])
    return OPS["fake_quantize"].reference(**arguments)


def supports(arguments: Mapping[str, Any]) -> Answer:
    if arguments["hadamard"]:
        return No("no Hadamard transform in this kernel")
    return Yes()


class TinyBackend(Backend):
    name = "tiny"
    doc = "runs graphs eagerly, with a kernel that counts its calls"
    kernels = (Kernel("tiny/fake_quantize", "fake_quantize", "cpu", fake_quantize, supports),)

    def supports_format(self, name: str, device: str) -> Answer:
        return Yes() if name in ("hif4", "mxfp4") else No("tiny has tables for hif4 and mxfp4 only")

    def compile(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        rewrite: Rewrite,
        context: Context,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        install_kernels("inductor")  # what lies behind ours where ours declines
        install_kernels(self.name)

        def run(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            return make_boxed_func(graph.forward)

        def infer(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            rewrite(graph.graph)
            graph.recompile()
            return run(graph, inputs)

        def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            rewrite(joint.graph)
            joint.recompile()
            return default_partition(joint, joint_inputs, **kwargs)

        compiler = aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=decompositions(),
        )
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compiler(graph_module, example_inputs)


BACKEND = TinyBackend()
NOT_A_BACKEND = "a string"
