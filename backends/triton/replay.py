"""Calls that repeat: what an op's plan allocates and launches, found once and then done again without the plan.

    plan(x [64, 128], format="hif4", …)  ->  [(launch, {x_ptr: x, y_ptr: y})], y
    ->
    call(x, "hif4", …):  y = x.new_empty([64, 128]);  start(address of x, address of y, 64, …);  return y

A plan is asked with stand-ins for the tensors of a call, so that it is seen which pointer is which of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from fp4compile.backends.triton.launch import Launch, is_current, run, viewed

# Launches with their arguments, in order.
Launches = Sequence[tuple[Launch, Mapping[str, Any]]]
# From an op's arguments by name, contiguous tensors, to its launches and its results; to none where it writes into an
# argument.
# A plan computes nothing: a tensor in what it returns is one that it was given or has allocated, or the same memory
# seen as another dtype.
Plan = Callable[..., tuple[Launches, Tensor | tuple[Tensor, ...]]]

_ALIGNED = 16  # bytes; Triton compiles for pointers that are multiples of it


def contiguous(x: Tensor) -> Tensor:
    """x, or a contiguous copy."""
    return x if x.is_contiguous() else x.detach().contiguous()


@dataclass(frozen=True)
class _Step:
    """A launch: arguments that are the same in every call, and the number of a tensor and its dtype for the others."""

    launch: Launch
    given: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, torch.dtype]]

    def filled(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments of a call."""
        seen = {name: viewed(tensors[n], dtype) for name, (n, dtype) in self.tensors.items()}
        return {**self.given, **seen}


class Replay:
    """A function of an op's arguments in order, for calls with the options of the first one and tensors like its own.

    Tensors of a call have the shapes, strides, dtypes and devices of the first call's; they may lie anywhere.
    """

    def __init__(
        self, plan: Plan, arguments: Mapping[str, Any], laid_out: Callable[[Tensor], Tensor] = contiguous
    ) -> None:
        """Ask the plan.

        Args:
            arguments: of the first call by name, in the op's order; one is a tensor at least.
            laid_out: makes a tensor what the plan reads.
        """
        given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        self._inputs = [i for i, value in enumerate(arguments.values()) if isinstance(value, Tensor)]
        self._device = next(iter(given.values())).device
        self._laid_out = laid_out
        like = {n: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for n, x in given.items()}
        read = {name: laid_out(x) for name, x in like.items()}
        launches, results = plan(**{**arguments, **read})
        self._copied = [n for n, name in enumerate(read) if read[name] is not like[name]]
        self._one = isinstance(results, Tensor)
        # Tensors by number: those of a call, then the results, then the others that the plan has allocated.
        known: list[Tensor] = list(read.values())
        flat = (results,) if isinstance(results, Tensor) else results
        known += flat
        work = not flat or any(x.numel() for x in flat)
        self._steps = [_step(launch, by_name, known) for launch, by_name in launches] if work else []
        self._results = slice(len(read), len(read) + len(flat))
        self._made = [(x.shape, x.dtype) for x in known[len(read) :]]
        self._ready: list[tuple[Callable[..., Any], list[Any], list[tuple[int, int]]]] | None = None

    def __call__(self, *args: Any) -> Any:
        """The op's results."""
        tensors = [args[i] for i in self._inputs]
        for n in self._copied:
            tensors[n] = self._laid_out(tensors[n])
        allocate = tensors[0].new_empty
        for shape, dtype in self._made:
            tensors.append(allocate(shape, dtype=dtype))
        addresses = [x.data_ptr() for x in tensors]
        usual = reduce(or_, addresses) % _ALIGNED == 0 and is_current(self._device)
        if usual and self._ready is not None:
            for start, arguments, pointers in self._ready:
                arguments = arguments.copy()
                for position, n in pointers:
                    arguments[position] = addresses[n]
                start(*arguments)
        else:
            self._run(tensors, usual)
        results = tensors[self._results]
        return results[0] if self._one else tuple(results)

    def _run(self, tensors: list[Tensor], usual: bool) -> None:
        """Launch, and remember how to where pointers are aligned as they usually are."""
        ready = []
        for step in self._steps:
            given = step.filled(tensors)
            run(step.launch, given, self._device)
            compiled = step.launch.ready(given, self._device)
            if compiled is not None:  # Triton's interpreter compiles nothing
                positions = dict(zip(given, compiled.given, strict=True))
                pointers = [(positions[name], n) for name, (n, _) in step.tensors.items()]
                ready.append((compiled.start, compiled.filled(given), pointers))
        if usual and len(ready) == len(self._steps):
            self._ready = ready


def _step(launch: Launch, given: Mapping[str, Any], known: list[Tensor]) -> _Step:
    """A launch with its tensors by number; one that is not known is the plan's own and becomes so."""
    tensors: dict[str, tuple[int, torch.dtype]] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            memory = value.untyped_storage()
            number = next((n for n, x in enumerate(known) if x.untyped_storage() is memory), len(known))
            if number == len(known):
                known.append(value)
            tensors[name] = number, value.dtype
    return _Step(launch, given, tensors)
