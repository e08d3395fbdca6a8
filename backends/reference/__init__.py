"""The oracle: runs the rewritten graph node by node with the reference implementation of every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import default_partition, make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule, Interpreter

from fp4compile.aot import decompositions
from fp4compile.backend import Backend, Rewrite
from fp4compile.ops import OPS
from fp4compile.pipeline import Context

_REFERENCES = {op.overload: op.reference for op in OPS.values()}


class _Reference(Interpreter):
    """Runs ops of ours by their reference, without the dispatcher and so without any backend's kernel."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(_REFERENCES.get(target, target), args, kwargs)


def _interpret(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    return make_boxed_func(_Reference(graph_module).run)


class ReferenceBackend(Backend):
    """Eager and slow, with the fewest parts between the specification and the result."""

    name = "reference"
    doc = "the oracle: runs the rewritten graph op by op in plain torch, on any device"

    def compile(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        rewrite: Rewrite,
        context: Context,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        def partition(joint: GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            rewrite(joint.graph)
            joint.recompile()
            return default_partition(joint, joint_inputs, **kwargs)

        def infer(inference: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            rewrite(inference.graph)
            inference.recompile()
            return _interpret(inference, inputs)

        compiler = aot_autograd(
            fw_compiler=_interpret,
            bw_compiler=_interpret,
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=decompositions(),
        )
        with torch._functorch.config.patch(enable_autograd_cache=False):
            return compiler(graph_module, example_inputs)

    def without_fp4(self, mode: str | None) -> dict[str, Any]:
        return {"backend": "aot_eager"}


BACKEND = ReferenceBackend()
