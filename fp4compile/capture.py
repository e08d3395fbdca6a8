"""From what Dynamo hands over to what passes need: which inputs are parameters, their names, the depth of the model."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import Graph, GraphModule, Node

from fp4compile.graph import clean_path


@dataclass(frozen=True)
class Frame:
    """What is known of a Dynamo graph when its backend is called.

    Attributes:
        parameters: input position -> name of the parameter.
        embeddings: names of parameters that are embedding tables.
        depths: path of each list of blocks -> its length.
        root: the module whose forward was traced, if there is one.
        session: the object that stands for one `torch.compile` call; graphs of one model share it.
    """

    parameters: dict[int, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    depths: dict[str, int] = field(default_factory=dict)
    root: nn.Module | None = None
    session: object = None

    def is_inner(self) -> bool:
        """Whether the traced module is a child of another one."""
        return self.root is not None and any(
            any(child is self.root for child in holder.values())
            for holder in gc.get_referrers(self.root)
            if isinstance(holder, dict) and isinstance(next(iter(holder.values()), None), nn.Module)
        )


def _traced() -> tuple[nn.Module | None, object]:
    """The module whose frame Dynamo is compiling, and the `torch.compile` call that asked for it."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # called by hand, outside Dynamo
        return None, None
    root = output.local_scope.get("self")
    return (root if isinstance(root, nn.Module) else None), output.compiler_fn


def _source_name(placeholder: Node) -> str:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return clean_path(name() if callable(name) else name)


def frame(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Frame:
    """Describe the Dynamo graph that a backend was just handed."""
    root, session = _traced()
    known = {id(p): name for name, p in root.named_parameters(remove_duplicate=False)} if root is not None else {}
    parameters = {}
    for index, (node, example) in enumerate(zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=False)):
        if isinstance(example, nn.Parameter):
            parameters[index] = clean_path(known.get(id(example), "")) or _source_name(node) or str(node.target)
    modules = dict(root.named_modules(remove_duplicate=False)) if root is not None else {}
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    embeddings = frozenset(parameters[i] for i in parameters if id(example_inputs[i]) in tables)
    depths = {clean_path(name): len(m) for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) > 1}
    return Frame(parameters, embeddings, depths, root, session)


def graph_parameters(graph: Graph, parameters: dict[int, str]) -> dict[Node, str]:
    """Placeholders of an AOTAutograd graph that stand for parameters of the Dynamo graph it was made from."""
    found = {}
    for position, node in enumerate(graph.find_nodes(op="placeholder")):
        description = node.meta.get("desc")
        while hasattr(description, "base"):  # a piece of a tensor subclass
            description = description.base
        index = getattr(description, "idx", position if description is None else None)
        is_input = description is None or type(description).__name__ in ("PlainAOTInput", "BufferAOTInput")
        if is_input and index in parameters and isinstance(node.meta.get("val"), torch.Tensor):
            found[node] = parameters[index]
    return found
