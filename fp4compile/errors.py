"""The errors that fp4compile raises.

Each is a `ValueError` or a `TypeError`, so that callers catch what they expect, and a `ShortenTraceback`, so that
Dynamo hands it to the caller of a compiled model as it is instead of wrapping it in `BackendCompilerFailed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch._dynamo.exc import ShortenTraceback


class FP4ValueError(ShortenTraceback, ValueError):
    """An argument, an option or a file holds something that is not allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class FP4TypeError(ShortenTraceback, TypeError):
    """An argument has the wrong type or the wrong dtype."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class RewriteError(FP4ValueError):
    """A GEMM that the recipe asked for could not be brought to FP4, or a pass broke the graph."""


class FP4Warning(UserWarning):
    """A recipe asks for something legal that is probably not what its author meant."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> FP4ValueError:
    """The error for a name that no table holds: it says what is allowed and what is nearest."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return FP4ValueError(f"unknown {kind} {name!r}; allowed: {', '.join(names)}.{hint}")
