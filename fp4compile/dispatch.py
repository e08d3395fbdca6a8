"""How a call of an op reaches a kernel: through torch's dispatcher, or straight from code that Inductor has written.

    torch.ops.fp4compile.quantize(x, "hif4", -1)  ->  Dispatch("quantize")  ->  the first kernel that supports it

What the choice needs is found once for all calls that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fp4compile.backend import Backend, Kernel, Yes, get_backend
from fp4compile.ops import LIBRARY, OPS

_MOST_BOUND = 4096


def _facts(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that the choice of a kernel and what it prepares may depend on."""
    facts: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            facts += value.shape, value.stride(), value.dtype, value.device
        else:
            facts.append(tuple(value) if isinstance(value, list) else value)
    return tuple(facts)


class Dispatch:
    """An op on one type of device: a call runs the first kernel that supports it, else the reference.

    Which one, and what it prepares, is found once for all calls with the same options and tensors of the same shapes,
    strides, dtypes and devices.
    """

    def __init__(self, op: str) -> None:
        parameters = OPS[op].signature.parameters
        self._reference, self._names = OPS[op].reference, tuple(parameters)
        self._defaults = tuple(p.default for p in parameters.values())
        self._kernels: list[Kernel] = []
        self._bound: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def put_first(self, kernels: Sequence[Kernel]) -> None:
        """Try these kernels ahead of the others."""
        self._kernels[:0] = kernels
        self._bound.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The op's results; torch or Inductor has checked the arguments against the schema."""
        args += self._defaults[len(args) :]
        if kwargs:
            args = tuple(map(kwargs.get, self._names, args))
        return self.bound(args)(*args)

    def bound(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What runs calls like this one; takes all arguments in order."""
        facts = _facts(args)
        found = self._bound.get(facts)
        if found is None:
            if len(self._bound) >= _MOST_BOUND:
                self._bound.clear()
            found = self._bound[facts] = self._bind(dict(zip(self._names, args, strict=True)))
        return found

    def _bind(self, arguments: Mapping[str, Any]) -> Callable[..., Any]:
        for kernel in self._kernels:
            if isinstance(kernel.supports(arguments), Yes):
                return kernel.bind(arguments) if kernel.bind else self._named(kernel.run)
        return self._reference

    def _named(self, run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: run(**dict(zip(self._names, args, strict=True)))


# (op, device) -> what torch's dispatcher calls. torch has one dispatcher per process, so there is one table.
_INSTALLED: dict[tuple[str, str], Dispatch] = {}


@cache
def _install(backend: Backend) -> None:
    for op, device in sorted({(k.op, k.device) for k in backend.kernels}):
        if (op, device) not in _INSTALLED:
            _INSTALLED[op, device] = Dispatch(op)
            LIBRARY.impl(op, _INSTALLED[op, device], device.upper())
        _INSTALLED[op, device].put_first([k for k in backend.kernels if (k.op, k.device) == (op, device)])


# Files that Inductor has written and keeps in its cache call the next two by these names.


def installed(op: str, device: str) -> Callable[..., Any]:
    """What runs an op on tensors of a type of device, past torch's dispatcher: below autograd, on plain tensors."""
    return _INSTALLED.get((op, device)) or OPS[op].overload


class Place:
    """A place in a program whose calls differ in where their tensors lie and in nothing else.

    Attributes:
        run: the op as `installed` runs it, of all arguments in order; the first call decides what all others do.
    """

    def __init__(self, op: str, device: str) -> None:
        self._op, self._device = op, device
        self.run: Callable[..., Any] = self._first

    def _first(self, *args: Any) -> Any:
        found = installed(self._op, self._device)
        self.run = found.bound(args) if isinstance(found, Dispatch) else found
        return self.run(*args)


def install_kernels(backend_name: str = "inductor") -> None:
    """Hand a backend's kernels to torch's dispatcher, ahead of those of other backends.

    Kernels and references give the same bits, so which of them runs is a matter of speed.
    """
    _install(get_backend(backend_name))


def install_default_kernels() -> bool:
    """Install the default backend's kernels unless some backend's are; whether that was done."""
    if _INSTALLED:
        return False
    install_kernels()
    return bool(_INSTALLED)
