"""Quantise the weights of an inference graph once: constants become packed codes and scales.

    %w = attribute q_proj.weight
    %codes, %scales = quantize(%w, 'hif4', 1)
    ->
    %codes = attribute q_proj_weight_codes
    %scales = attribute q_proj_weight_scales
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from fp4compile.ops import OPS
from fp4compile.pipeline import Context

_FOLDED = (OPS["tensor_scale"].overload, OPS["quantize"].overload)


def _attribute(graph_module: GraphModule, name: str) -> Any:
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _constant(graph_module: GraphModule, node: Node, name: str, tensor: torch.Tensor) -> Node:
    """A buffer that holds `tensor`, read where `node` stands."""
    graph_module.register_buffer(name, tensor)
    graph = graph_module.graph
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
    constant.meta = {**node.meta, "val": node.meta["val"]}
    return constant


def _arguments(graph_module: GraphModule, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return torch.fx.map_arg((node.args, node.kwargs), lambda n: _attribute(graph_module, n.target))


@dataclass(frozen=True)
class Fold:
    """Evaluate quantisations whose inputs are constants of the graph."""

    name: ClassVar[str] = "fold"
    needs: ClassVar[tuple[str, ...]] = ("shared",)
    gives: ClassVar[tuple[str, ...]] = ("folded",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        done = 0
        for node in list(graph_module.graph.nodes):
            constant = node.target in _FOLDED and all(n.op == "get_attr" for n in node.all_input_nodes)
            if not constant:
                continue
            args, kwargs = _arguments(graph_module, node)
            with torch.no_grad():
                result = node.target(*args, **kwargs)
            stem = str(node.args[0].target).replace(".", "_")
            self._replace(graph_module, node, result, stem)
            done += 1
        return done

    def _replace(self, graph_module: GraphModule, node: Node, result: Any, stem: str) -> None:
        if isinstance(result, torch.Tensor):
            node.replace_all_uses_with(_constant(graph_module, node, f"{stem}_{node.name}", result))
        else:
            for item in list(node.users):
                assert item.target is operator.getitem
                suffix = ("codes", "scales")[item.args[1]]  # type: ignore[call-overload]
                name = f"{stem}_{node.name}_{suffix}"
                item.replace_all_uses_with(_constant(graph_module, item, name, result[item.args[1]]))  # type: ignore[index]
                graph_module.graph.erase_node(item)
        graph_module.graph.erase_node(node)
