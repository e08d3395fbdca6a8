"""What every backend shares of AOTAutograd: the decompositions under which GEMMs stay GEMMs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.decomposition import select_decomp_table

aten = torch.ops.aten
# Inductor decomposes tiny matmuls into multiply-and-sum, where no pass would find them.
_GEMMS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv)


class _Table(dict[Any, Callable[..., Any]]):
    """Pickles by reference: Inductor's caches make it a part of their key, and its functions do not pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return decompositions, ()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions without those of GEMMs."""
    importlib.import_module("torch._inductor.lowering")  # max_pool2d's rule takes it for imported; it takes 0.7 s
    hidden = {getattr(op, overload) for op in _GEMMS for overload in op.overloads()}
    return _Table({op: rule for op, rule in select_decomp_table().items() if op not in hidden})
