"""Which linear layers are routers: an expert is chosen by what they compute.

    linear -> softmax -> topk          Mixtral, Qwen3-MoE, OLMoE
    linear -> add bias -> topk         gpt-oss
    linear -> sigmoid -> add bias -> masked_fill -> topk    DeepSeek-V3
    linear -> argmax                   Switch

A rounding error there sends a token to another expert, and the GEMM is tiny. The rule is one of structure: elementwise
ops and views alone lie between the linear layer and the choice, and the forward reads the chosen indices (those of a
max-pooling are read by its backward alone).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from fp4compile.graph import MOVES, Site, is_backward

aten = torch.ops.aten

# Ops that choose, and where the chosen indices are among their results; None: they are the result.
CHOICES: dict[Any, int | None] = {
    aten.topk.default: 1,
    aten.sort.default: 1,
    aten.sort.stable: 1,
    aten.max.dim: 1,
    aten.argsort.default: None,
    aten.argsort.stable: None,
    aten.argmax.default: None,
}
# What leaves each score where it is, besides elementwise ops: casts, and softmax where it is not decomposed.
_KEEPING_SCORES = MOVES | {
    torch.ops.prims.convert_element_type.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten._softmax.default,
    aten._log_softmax.default,
    aten.softmax.int,
    aten.log_softmax.int,
}


def _keeps_scores(node: Node) -> bool:
    return node.target in _KEEPING_SCORES or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _chosen(choice: Node) -> Iterator[Node]:
    """What reads the indices that an op has chosen."""
    position = CHOICES[choice.target]
    if position is None:
        yield from choice.users
    for item in choice.users if position is not None else ():
        if item.target is operator.getitem and item.args[1] == position:
            yield from item.users


def _routes(node: Node) -> bool:
    """Whether what a GEMM computes ends in a choice that the forward reads."""
    pending, seen = list(node.users), set(node.users)
    while pending:
        user = pending.pop()
        if is_backward(user):
            continue
        if user.target in CHOICES and not all(map(is_backward, _chosen(user))):
            return True
        if _keeps_scores(user):
            new = user.users.keys() - seen
            seen |= new
            pending += new
    return False


def find_routers(sites: Iterable[Site]) -> set[str]:
    """Parameters of the linear layers that choose experts."""
    return {site.parameter for site in sites if site.role == "forward" and _routes(site.node)}
