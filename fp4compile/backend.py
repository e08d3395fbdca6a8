"""What a backend is: a table of kernels, a way to compile a captured graph, found by entry point.

A backend is an object named by an entry point of group `fp4compile.backends`:

    [project.entry-points."fp4compile.backends"]
    mine = "my_package:BACKEND"
"""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from fp4compile.errors import FP4TypeError, FP4ValueError, unknown

if TYPE_CHECKING:
    from fp4compile.pipeline import Context
    from fp4compile.report import Report

GROUP = "fp4compile.backends"


@dataclass(frozen=True)
class Yes:
    """A kernel or a backend can do it."""


@dataclass(frozen=True)
class No:
    """It cannot, and this is why."""

    reason: str


Answer = Yes | No


@dataclass(frozen=True)
class Kernel:
    """One implementation of one op on one device type.

    Attributes:
        name: what the report prints.
        op: the row of `OPS` it implements.
        device: torch device type, "cpu" or "cuda".
        run: takes the op's arguments by name; must agree with the op's reference bit for bit where it quantises.
        supports: reads the same arguments (tensors may be fake: shapes, strides, dtypes and devices only) and answers.
        packed: whether it multiplies packed operands as they are, so that packing for it is worth while.
        available: whether this machine runs it at all, whatever the call; `supports` says no where it does not.
        bind: does what calls with the same options and tensors of the same shapes, strides, dtypes and devices share:
            from the arguments of the first of them, by name, to a function of the op's arguments in order, which must
            not keep the first call's tensors. Without it every call is `run`.
    """

    name: str
    op: str
    device: str
    run: Callable[..., Any]
    supports: Callable[[Mapping[str, Any]], Answer]
    packed: bool = False
    available: Callable[[], Answer] = Yes
    bind: Callable[[Mapping[str, Any]], Callable[..., Any]] | None = None


class Backend(ABC):
    """A target that graphs are lowered to."""

    name: str
    doc: str
    kernels: tuple[Kernel, ...] = ()
    # Whether `compile` knows `cached_weight` (fp4compile.weight_cache).
    caches_weights: bool = False

    def available(self) -> Answer:
        """Whether this machine can run the backend."""
        return Yes()

    def supports_format(self, name: str, device: str) -> Answer:
        """Whether GEMMs of the named format run on the device type."""
        return Yes()

    @abstractmethod
    def compile(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        rewrite: Rewrite,
        context: Context,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile a Dynamo graph. Must call `rewrite` once on its joint (or inference) graph before lowering it.

        Args:
            graph_module, example_inputs: as Dynamo hands them to a backend of `torch.compile`.
            rewrite: takes the graph that AOTAutograd made, and puts FP4 into it in place.
            context: what the user asked for, and after `rewrite` what became of each GEMM.
            mode: of Inductor, None for its default; a backend that has no modes takes no notice.

        Returns:
            What runs in the place of the Dynamo graph.
        """

    def without_fp4(self, mode: str | None) -> dict[str, Any]:
        """Arguments of `torch.compile` that lower a graph as this backend does, with no GEMM in FP4."""
        return {"backend": "inductor", "mode": mode}

    def runtime_notes(self, report: Report) -> list[str]:
        """What kernels that a report names have to say of their runs in this process; may wait for the device."""
        return []

    def kernel_for(self, op: str, arguments: Mapping[str, Any], device: str) -> tuple[str, list[str]]:
        """The name of the kernel that will run `op`, and why each earlier one declined."""
        declined: list[str] = []
        for kernel in self.kernels:
            if kernel.op == op and kernel.device == device:
                answer = kernel.supports(arguments)
                if isinstance(answer, Yes):
                    return kernel.name, declined
                declined.append(f"{kernel.name}: {answer.reason}")
        return f"reference/{op}", declined


# Rewrites the graph in place; the backend hands over what its capture produced.
Rewrite = Callable[[torch.fx.Graph], None]


_REGISTERED: dict[str, Backend] = {}


def register_backend(backend: Backend) -> Backend:
    """Add a backend by hand, for one that has no entry point (a test, a notebook); it replaces one of its name.

    Returns:
        The backend, so that the call can stand in an assignment.

    Raises:
        FP4TypeError: not a `Backend`.
    """
    if not isinstance(backend, Backend):
        raise FP4TypeError(f"register_backend needs a Backend, got {type(backend).__name__}")
    _REGISTERED[backend.name] = backend
    return backend


@cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}


# A bare checkout on PYTHONPATH has no entry points; these are the package's own.
_OWN = {
    "inductor": importlib.metadata.EntryPoint("inductor", "fp4compile.backends.inductor:BACKEND", GROUP),
    "reference": importlib.metadata.EntryPoint("reference", "fp4compile.backends.reference:BACKEND", GROUP),
}


def backend_names() -> list[str]:
    """Names of every backend that can be asked for."""
    return sorted({*_OWN, *_entry_points(), *_REGISTERED})


@cache
def _load(name: str) -> Backend:
    entry = _entry_points().get(name) or _OWN[name]
    try:
        backend = entry.load()
    except Exception as error:  # a plugin may raise anything
        raise FP4ValueError(
            f"backend {name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(backend, Backend):
        raise FP4ValueError(f"entry point {name!r} of group {GROUP} is a {type(backend).__name__}, not a Backend")
    return backend


def get_backend(name: str) -> Backend:
    """The backend of that name; "auto" is the default one, `inductor`.

    Raises:
        FP4ValueError: an unknown name, or a plugin that cannot be loaded.
    """
    name = "inductor" if name == "auto" else name
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in backend_names():
        raise unknown("backend", name, ["auto", *backend_names()])
    return _load(name)
