"""Compile the halves of a graph with cached weights: forms become inputs, fetched when a half is called.

    %wq = cached_weight(%primals_3, 0, 1, ...)
    ->
    %cached_0 = input                      # cache.forms(0, primals_3)[1]

It happens behind the partitioner, so that to AOTAutograd a half takes what it took: the parameter itself, saved for
the backward as ever and checked there by autograd for writes since the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.output_code import CompiledFxGraph
from torch.fx import Graph, GraphModule, Node

from fp4compile.weight_cache import CACHED, Program, WeightCache


@dataclass(frozen=True)
class Slot:
    """An input that is fetched: form `form` of weight `weight`, of the tensor that is input `parameter`."""

    parameter: int
    weight: int
    form: int


def take_cached(graph: Graph) -> list[tuple[Slot, Any]]:
    """Turn cached weights into inputs behind the others: where each comes from, and its example value."""
    inputs = list(graph.find_nodes(op="placeholder"))
    last = inputs[-1] if inputs else None
    found: dict[Slot, Node] = {}
    for node in graph.find_nodes(op="call_function", target=CACHED, sort=True):
        parameter, weight, form, *_ = node.args
        slot = Slot(inputs.index(cast(Node, parameter)), cast(int, weight), cast(int, form))
        if slot not in found:
            assert last is not None
            with graph.inserting_after(last):
                last = found[slot] = graph.placeholder(f"cached_{len(found)}")
            last.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(found[slot])
        graph.erase_node(node)
    _copy_returned(graph, set(found.values()))
    return [(slot, node.meta["val"]) for slot, node in found.items()]


def _copy_returned(graph: Graph, cached: set[Node]) -> None:
    """Return copies of cached weights: what a forward returns may be overwritten in the backward."""
    output = graph.output_node()
    for node in output.all_input_nodes:
        if _storage(node) in {_storage(c) for c in cached}:
            with graph.inserting_before(output):
                copied = graph.call_function(torch.ops.aten.clone.default, (node,))
            copied.meta = dict(node.meta)
            output.replace_input_with(node, copied)


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


class HalfCompiler:
    """Inductor's compiler of one half, called for the forward (or inference) and the backward of one graph."""

    def __init__(self, cache: WeightCache, programs: Sequence[Program]) -> None:
        """`programs` is filled by the time that the first half is compiled."""
        self._cache, self._programs = cache, programs

    def __call__(self, half: GraphModule, example_inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """As `compile_fx_inner`."""
        taken = take_cached(half.graph)
        if not taken:
            return compile_fx_inner(half, example_inputs, *args, **kwargs)
        half.recompile()
        self._cache.fixed |= bool(kwargs.get("cudagraphs"))
        given = len(example_inputs)
        kwargs["static_input_idxs"] = [*kwargs.get("static_input_idxs", ()), *range(given, given + len(taken))]
        compiled = compile_fx_inner(half, [*example_inputs, *(value for _, value in taken)], *args, **kwargs)
        assert isinstance(compiled, CompiledFxGraph) and compiled.current_callable is not None
        compiled.current_callable = self._fetching(compiled.current_callable, [slot for slot, _ in taken])
        return compiled

    def _fetching(self, run: Callable[[list[Any]], Any], slots: Sequence[Slot]) -> Callable[..., Any]:
        """`run` with cached weights behind its inputs."""
        cache = self._cache
        read = list(dict.fromkeys((slot.weight, slot.parameter) for slot in slots))
        places = [(read.index((slot.weight, slot.parameter)), slot.form) for slot in slots]
        reads = [(self._programs[weight], parameter) for weight, parameter in read]

        def fetch(inputs: list[Any]) -> Any:
            forms = [cache.forms(program, inputs[parameter]) for program, parameter in reads]
            inputs += [forms[i][form] for i, form in places]  # in place: the caller's list is what frees its tensors
            del forms
            return run(inputs)

        return fetch
