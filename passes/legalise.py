"""Ask the backend's kernels who will run each op, and write the answer on the sites. The graph stays as it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from fp4compile.graph import MOVES
from fp4compile.ops import OPS, Op
from fp4compile.pipeline import Context
from fp4compile.rewrite import value

_BY_OVERLOAD = {op.overload: op for op in OPS.values()}


@cache
def _signature(op: Op) -> inspect.Signature:
    return inspect.signature(op.reference)


def _arguments(op: Op, node: Node, device: str) -> dict[str, Any]:
    bound = _signature(op).bind(*value(node.args), **value(node.kwargs))
    bound.apply_defaults()
    return {name: _placed(argument, device) for name, argument in bound.arguments.items()}


def _placed(argument: Any, device: str) -> Any:
    """A meta tensor (a model without weights) stands for one on the device that will run the graph."""
    if not isinstance(argument, FakeTensor) or argument.device.type != "meta":
        return argument
    with argument.fake_mode:
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)


def _ops_of(node: Node) -> Iterator[Node]:
    """The op that makes an operand, below views, and what it reads from other ops of ours."""
    while node.op == "call_function" and node.target in MOVES:
        node = node.all_input_nodes[0]
    if node.op == "call_function" and node.meta.get("fp4compile"):
        yield node
        if node.target not in _BY_OVERLOAD:
            for source in node.all_input_nodes:
                yield from _ops_of(source)


@dataclass(frozen=True)
class Legalise:
    """Record the kernels of every FP4 site."""

    name: ClassVar[str] = "legalise"
    needs: ClassVar[tuple[str, ...]] = ("fused",)
    gives: ClassVar[tuple[str, ...]] = ("legal",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        chosen: dict[Node, str] = {}
        for site in context.sites:
            if site.status != "fp4":
                site.kernels = [f"{context.backend.name}/{_short(site.node)}"]
                continue
            ops = [op for name in site.arguments for op in _ops_of(site.operand(name))]
            for node in [*ops, site.node]:
                if node not in chosen:
                    chosen[node] = self._kernel(node, context)
                if chosen[node] not in site.kernels:
                    site.kernels.append(chosen[node])
        return 0

    def _kernel(self, node: Node, context: Context) -> str:
        op = _BY_OVERLOAD.get(node.target)
        if op is None:
            return f"{context.backend.name}/{_short(node)}"
        name, declined = context.backend.kernel_for(op.name, _arguments(op, node, context.device), context.device)
        context.notes += [note for note in declined if note not in context.notes]
        return name


def _short(node: Node) -> str:
    return str(node.target).removesuffix(".default")
