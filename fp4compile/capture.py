"""From what Dynamo hands over to what passes need: the parameters, their names, the depth of the model."""

from __future__ import annotations

import gc
import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.eager_transforms import _autograd_grad
from torch.fx import Graph, GraphModule, Node
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fp4compile.graph import clean_path

# What differentiates within a Dynamo graph: `torch.autograd.grad` and `Tensor.backward` when Dynamo traces them, the
# gradients of torch.func. The GEMMs of such a gradient lie in the forward, where roles cannot be told.
_DIFFERENTIATE = {torch.autograd.grad: "torch.autograd.grad or backward", _autograd_grad: "a gradient of torch.func"}


@dataclass(frozen=True)
class Frame:
    """What is known of a Dynamo graph when its backend is called.

    Attributes:
        parameters: input position -> name of the parameter.
        buffers: the same of buffers.
        embeddings: names of parameters that are embedding tables.
        depths: path of each list of blocks -> its length.
        root: the module whose forward was traced, if there is one.
        session: the object that stands for one `torch.compile` call; graphs of one model share it.
        untracked: why a change of a parameter may go unnoticed; empty where none does.
        differentiates: what takes gradients within the graph; empty where nothing does.
        model: the module that was compiled, if a module was.
        places: paths in it of the root and of modules of its class and sizes, which the graph may serve as well.
    """

    parameters: dict[int, str] = field(default_factory=dict)
    buffers: dict[int, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    depths: dict[str, int] = field(default_factory=dict)
    root: nn.Module | None = None
    session: object = None
    untracked: str = ""
    differentiates: str = ""
    model: nn.Module | None = None
    places: tuple[str, ...] = ("",)

    def is_inner(self) -> bool:
        """Whether the traced module is one of the blocks of a larger model, or lies in one."""
        if self.root is None:
            return False
        parents: dict[int, list[nn.Module]] = defaultdict(list)
        for module in gc.get_objects():
            if issubclass(type(module), nn.Module):
                for child in (getattr(module, "_modules", None) or {}).values():
                    parents[id(child)].append(module)
        pending, seen = [self.root], set()
        while pending:
            module = pending.pop()
            above = [] if id(module) in seen else parents[id(module)]
            if any(map(is_block_list, above)):
                return True
            seen.add(id(module))
            pending += above
        return False


def is_block_list(module: nn.Module) -> bool:
    """A ModuleList, or a Sequential of modules of one class with modules inside; of more than one."""
    children = list(module.children())
    if len(children) < 2:
        return False
    alike = len({type(child) for child in children}) == 1 and any(children[0].children())
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.Sequential) and alike)


def _traced(sources: Iterable[str]) -> tuple[nn.Module | None, object]:
    """The module that most of the parameters are read from, and the `torch.compile` call being served."""
    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # called by hand, outside Dynamo
        return None, None
    scopes = {"L": output.local_scope, "G": output.global_scope}
    found = [re.match(r"([LG])\['([^']*)'\]", source) for source in sources]
    counts = Counter((m[1], m[2]) for m in found if m)
    objects = [scopes[scope].get(name) for (scope, name), _ in counts.most_common()]
    root = next((o for o in (*objects, output.local_scope.get("self")) if isinstance(o, nn.Module)), None)
    # DDP compiles each bucket through an optimizer that it makes anew for every frame.
    owner = getattr(output.compiler_fn, "__self__", None)
    return root, getattr(owner, "backend_compile_fn", output.compiler_fn)


def _compiled_model() -> nn.Module | None:
    """The module whose call is being compiled: Dynamo compiles within that call."""
    caller = inspect.currentframe()
    while caller is not None:
        owner = caller.f_locals.get("self")
        if isinstance(owner, OptimizedModule):
            owner = owner._orig_mod
        elif not isinstance(owner, nn.Module) or owner._compiled_call_impl is None:
            owner = None
        if owner is not None:
            return owner.module if isinstance(owner, DistributedDataParallel) else owner
        caller = caller.f_back
    return None


def _places(root: nn.Module | None, model: nn.Module | None) -> tuple[str, ...]:
    """The paths in a model of modules that are like the root; "" for the model itself, or of no model."""
    if root is None or model is None or root is model:
        return ("",)
    alike = {name: module for name, module in model.named_modules() if type(module) is type(root)}
    if all(module is not root for module in alike.values()):
        return ("",)
    shapes = _shapes(root)
    return tuple(clean_path(name) for name, module in alike.items() if _shapes(module) == shapes)


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """What modules of a class have in common that one graph may serve."""
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters(remove_duplicate=False)]


def _source(placeholder: Node) -> str:
    """Where Dynamo reads an input from: `L['self']._modules['proj']._parameters['weight']`."""
    name = getattr(getattr(placeholder.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)


def frame(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Frame:
    """Describe the Dynamo graph that a backend was just handed."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    inputs = [
        (index, node, example)
        for index, (node, example) in enumerate(zip(placeholders, example_inputs, strict=False))
        if isinstance(example, nn.Parameter)
    ]
    root, session = _traced(_source(node) for _, node, _ in inputs)
    named = root.named_parameters(remove_duplicate=False) if root is not None else ()
    known = {id(parameter): name for name, parameter in named}
    parameters = {
        index: clean_path(known.get(id(example), "")) or clean_path(_source(node)) or str(node.target)
        for index, node, example in inputs
    }
    sources = {i: _source(n) for i, n in enumerate(placeholders) if i not in parameters}
    buffers = {i: clean_path(source) for i, source in sources.items() if "._buffers[" in source}
    modules = dict(root.named_modules(remove_duplicate=False)) if root is not None else {}
    tables = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    embeddings = frozenset(parameters[i] for i in parameters if id(example_inputs[i]) in tables)
    depths = {clean_path(name): len(m) for name, m in modules.items() if is_block_list(m)}
    untracked = _untracked(modules.values(), [example for _, _, example in inputs])
    model = _compiled_model()
    return Frame(
        parameters,
        buffers,
        embeddings,
        depths,
        root,
        session,
        untracked,
        differentiates=_differentiates(graph_module),
        model=model,
        places=_places(root, model),
    )


def _differentiates(graph_module: GraphModule) -> str:
    """What takes gradients within a Dynamo graph or one inside it, or ""."""
    graphs = (module.graph for module in graph_module.modules() if isinstance(module, GraphModule))
    return next((_DIFFERENTIATE[n.target] for graph in graphs for n in graph.nodes if n.target in _DIFFERENTIATE), "")


def _untracked(modules: Iterable[nn.Module], parameters: Iterable[torch.Tensor]) -> str:
    """Why writes of parameters may go unnoticed, or ""."""
    if any(getattr(module, "_is_fsdp_managed_module", False) for module in modules):
        return "FSDP gathers them for each call, into memory whose writes are not counted"
    for parameter in parameters:
        wraps: bool = is_traceable_wrapper_subclass(parameter)
        if wraps:
            return f"they are {type(parameter).__name__}s"
        if parameter.is_inference():
            return "they were made in inference mode, where torch counts no writes"
    return ""


def graph_parameters(graph: Graph, parameters: dict[int, str]) -> dict[Node, str]:
    """Placeholders of an AOTAutograd graph that stand for inputs, by position, of the Dynamo graph it was made from."""
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
