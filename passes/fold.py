"""Quantise the weights of an inference graph once: constants become packed codes and scales.

    %w = attribute q_proj.weight
    %codes, %scales = quantize(%w, 'hif4', 1)
    ->
    %codes = attribute q_proj_weight_codes
    %scales = attribute q_proj_weight_scales

Hadamard transforms and tensor scales of constants are evaluated as well; what is drawn at run time is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node, map_arg

from fp4compile.ops import OPS
from fp4compile.pipeline import Context

_FOLDED = (OPS["tensor_scale"].overload, OPS["quantize"].overload)
_EVALUATED = (*_FOLDED, OPS["hadamard"].overload)  # a transform of a weight is only kept quantised


def _attribute(graph_module: GraphModule, name: str) -> Any:
    found: Any = graph_module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _is_constant(node: Node) -> bool:
    known = node.target in _EVALUATED and all(map(_is_constant, node.all_input_nodes))
    return node.op == "get_attr" or known


def _evaluate(graph_module: GraphModule, node: Node) -> Any:
    if node.op == "get_attr":
        return _attribute(graph_module, str(node.target))
    args, kwargs = map_arg((node.args, node.kwargs), lambda source: _evaluate(graph_module, source))
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _weight(node: Node) -> str:
    """Path of the constant that a folded node quantises."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _constants(graph_module: GraphModule, stem: str, replaced: dict[str, tuple[Node, torch.Tensor]]) -> None:
    """Buffers `stem_<key>`, numbered where a name is taken, read in the place of the nodes they replace."""
    number = next(n for n in count() if not any(hasattr(graph_module, _name(stem, key, n)) for key in replaced))
    graph = graph_module.graph
    for key, (node, tensor) in replaced.items():
        name = _name(stem, key, number)
        graph_module.register_buffer(name, tensor)
        with graph.inserting_before(node):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        graph.erase_node(node)


def _name(stem: str, key: str, number: int) -> str:
    return f"{stem}_{key}_{number}" if number else f"{stem}_{key}"


@dataclass(frozen=True)
class Fold:
    """Evaluate quantisations whose inputs are constants of the graph."""

    name: ClassVar[str] = "fold"
    needs: ClassVar[tuple[str, ...]] = ("shared",)
    gives: ClassVar[tuple[str, ...]] = ("folded",)

    def run(self, graph_module: GraphModule, context: Context) -> int:
        done = 0
        for node in list(graph_module.graph.nodes):
            if node.target not in _FOLDED or not _is_constant(node):
                continue
            with torch.no_grad():
                result = _evaluate(graph_module, node)
            stem = _weight(node).replace(".", "_")
            if isinstance(result, torch.Tensor):
                _constants(graph_module, stem, {"tensor_scale": (node, result)})
            else:
                items = {("codes", "scales")[item.args[1]]: item for item in node.users}
                _constants(graph_module, stem, {k: (item, result[item.args[1]]) for k, item in items.items()})
                graph_module.graph.erase_node(node)
            done += 1
        return done
