"""Quantised forms of weights that outlive a call: made anew where a weight has changed, handed over where it has not.

    cache.forms(program, q_proj.weight)  ->  (fake_quantize(weight, ..., 1), fake_quantize(weight, ..., 0))

In a graph such a form is a call of `cached_weight`, which a backend replaces by an input of the half it stands in.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from fp4compile.errors import RewriteError
from fp4compile.ops import LIBRARY

# Result `form` of the graph's program `weight`. `backward` keeps the nodes of both halves of a joint graph apart.
LIBRARY.define(
    "cached_weight(Tensor parameter, int weight, int form, bool backward, int[] size, int[] stride, "
    "ScalarType dtype) -> Tensor"
)


def _uncached(*args: Any, **kwargs: Any) -> Tensor:
    raise RewriteError(
        "fp4compile.cached_weight stands for an input of a graph, and whoever runs this graph has put none there, as "
        "compiled autograd does. Leave out cache_weights=True"
    )


def _like_a_form(
    parameter: Tensor,
    weight: int,
    form: int,
    backward: bool,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return parameter.new_empty_strided(size, stride, dtype=dtype)


LIBRARY.impl("cached_weight", _uncached, "CompositeExplicitAutograd")
torch.library.register_fake("fp4compile::cached_weight", _like_a_form, lib=LIBRARY)
CACHED = torch.ops.fp4compile.cached_weight.default


@dataclass(frozen=True)
class Program:
    """What makes the forms of one weight.

    Attributes:
        parameter: the weight's name.
        module: takes the weight, gives a tuple of its forms; deterministic.
        sizes: for each form, in order, a key that is the same for forms that are the same -> its bytes.
    """

    parameter: str
    module: GraphModule
    sizes: Mapping[str, int]


@dataclass
class _Entry:
    """The forms of a tensor as it was.

    Attributes:
        program: what makes them.
        state: what changes when the tensor is written, and the stream on which the forms were made.
    """

    program: Program
    state: tuple[Any, ...] | None = None
    forms: tuple[Tensor, ...] = ()
    _places: dict[tuple[str, ...], tuple[int, ...] | None] = field(default_factory=dict)

    def places(self, keys: tuple[str, ...]) -> tuple[int, ...] | None:
        """Where forms of these keys stand among those of the program; None where it does not make them all."""
        if keys not in self._places:
            own = list(self.program.sizes)
            self._places[keys] = tuple(map(own.index, keys)) if set(keys) <= set(own) else None
        return self._places[keys]


class WeightCache:
    """The forms of the weights of one `torch.compile` call, whose graphs share them: each form is held once.

    They live as long as the memory that a weight lies in: graphs may be called with the weights of another module, as
    the blocks of a model are where they share a graph.

    A change is a change of the tensor's version counter, which every in-place op of torch counts, or of its memory.
    Steps of optimisers are counted too, as fused ones write without it. Not seen are writes through `weight.data` or
    by kernels outside torch and outside optimisers; `torch.autograd.graph.increment_version(weight)` tells of these.
    """

    def __init__(self) -> None:
        # Whether new forms are written where the old ones lie, as CUDA graphs want.
        self.fixed = False
        self._entries: Any = WeakIdKeyDictionary()  # storage -> view of it -> list of _Entry
        count_optimizer_steps()

    def forms(self, program: Program, tensor: Tensor) -> tuple[Tensor, ...]:
        """The forms that a program makes of a tensor, of its present values."""
        storage = tensor.untyped_storage()
        by_view = self._entries.get(storage)
        if by_view is None:
            by_view = self._entries[storage] = {}
        # Parameters may be tied by a transpose: one memory, two matrices.
        view = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        keys = tuple(program.sizes)
        entry, places = _serving(by_view.setdefault(view, []), program, keys)
        state, captured = (tensor._version, storage.data_ptr(), _stream(tensor)), _is_captured(tensor)
        if entry.state != state or captured:
            entry.state = None  # in case the program fails
            self._make(entry, tensor)
            entry.state = None if captured else state  # what is captured has not run yet
        return tuple(entry.forms[place] for place in places)

    def _make(self, entry: _Entry, tensor: Tensor) -> None:
        """Run the program; old forms are overwritten, or freed before new ones are made."""
        if not self.fixed:
            entry.forms = ()
        # Forms of weights that training and inference share belong to neither.
        with torch.inference_mode(False), torch.no_grad():
            made = entry.program.module(tensor)
            if self.fixed and entry.forms:
                for old, new in zip(entry.forms, made, strict=True):
                    old.copy_(new)
            else:
                entry.forms = tuple(made)


def _serving(entries: list[_Entry], program: Program, keys: tuple[str, ...]) -> tuple[_Entry, tuple[int, ...]]:
    """The entry that holds forms of these keys, and where; a new one takes the place of those that hold fewer."""
    for entry in entries:
        places = entry.places(keys)
        if places is not None:
            return entry, places
    made = _Entry(program)
    entries[:] = [*(entry for entry in entries if made.places(tuple(entry.program.sizes)) is None), made]
    return made, tuple(range(len(keys)))


# `torch.compile` call -> its cache, which its graphs hold.
_CACHES: weakref.WeakKeyDictionary[Any, weakref.ref[WeightCache]] = weakref.WeakKeyDictionary()


def cache_of(session: object) -> WeightCache:
    """The cache of a `torch.compile` call; None stands for calls that share nothing."""
    known = _CACHES.get(session) if session is not None else None
    found = (known() if known else None) or WeightCache()
    if session is not None:
        _CACHES[session] = weakref.ref(found)
    return found


def _stream(tensor: Tensor) -> int:
    """What runs on one stream is not ordered behind what runs on another."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device())) if tensor.is_cuda else 0


def _is_captured(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured around the call: replays must make the forms themselves."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@cache
def count_optimizer_steps() -> None:
    """Have each step of an optimiser count as a write of its parameters, in this process from now on.

    Autograd counts with the same counter: it now notices, too, when a fused step writes what a backward still needs.
    """
    register_optimizer_step_post_hook(_count_writes)


@torch.compiler.disable  # where a step is compiled, what it calls outside of its graphs must still be counted
def _count_writes(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    written = [p for group in optimizer.param_groups for p in group["params"] if not p.is_inference()]
    torch.autograd.graph.increment_version(written)
