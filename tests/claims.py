"""A backend that claims kernels for ops and runs their references: graphs as a device with those kernels would get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fp4compile.backend import _REGISTERED, Answer, Backend, Kernel, No, Yes, register_backend
from fp4compile.backends.reference import ReferenceBackend
from fp4compile.ops import OPS

Claim = Callable[[Mapping[str, Any]], Answer]


def everything(arguments: Mapping[str, Any]) -> Answer:
    return Yes()


def packed(arguments: Mapping[str, Any]) -> Answer:
    """A GEMM whose operands are both packed."""
    return Yes() if arguments["a_format"] and arguments["b_format"] else No("not packed")


class Claims(ReferenceBackend):
    """The reference backend under another name, with a table of kernels."""

    def __init__(self, **claims: Claim) -> None:
        self.name = f"claims-{'-'.join(claims)}"
        self.kernels = tuple(
            Kernel(f"claimed/{op}", op, "cpu", OPS[op].reference, claim, packed=True) for op, claim in claims.items()
        )


@contextmanager
def registered(backend: Backend) -> Iterator[str]:
    """The name of a backend that is known while this lasts."""
    register_backend(backend)
    try:
        yield backend.name
    finally:
        del _REGISTERED[backend.name]
