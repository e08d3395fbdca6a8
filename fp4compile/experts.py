"""Experts of transformers models on packed weights.

transformers keeps the experts of a layer in one module, whose parameters are stacks:

    gate_up_proj [experts, 2 hidden, width], down_proj [experts, width, hidden]    # the last two axes swapped in some

Each becomes a `PackedStack` under the same name, and the module's forward one that sorts the tokens by expert and hands
them to the stacks. What else the module has (gate, biases, norm) is used as it is; the flags that say so are those of
transformers' `use_experts_implementation`; releases lack some of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fp4compile.errors import FP4TypeError
from fp4compile.packed import PackedStack, PackedWeight

STACKS = ("gate_up_proj", "up_proj", "down_proj")
_NEEDED = ("num_experts", "has_bias", "is_transposed")


def found_in(model: nn.Module) -> bool:
    """Whether a model has transformers' stacked experts."""
    return any(all(hasattr(module, flag) for flag in _NEEDED) for module in model.modules())


def refusal(module: nn.Module, name: str) -> str | None:
    """Why the module's parameter `name` is no stack that can be packed, or None."""
    lacking = [flag for flag in _NEEDED if not hasattr(module, flag)]
    if lacking:
        return f"a {type(module).__name__} is not one of transformers' stacked experts: it has no {', '.join(lacking)}"
    return None if name in STACKS else f"the stacks of experts are {', '.join(STACKS)}"


def _projected(module: Any, name: str, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
    """Each token times the matrix of its expert, its bias added."""
    stack = getattr(module, name)
    if isinstance(stack, PackedStack):
        out = stack(x, ends)
    else:  # kept in high precision
        matrices = stack if module.is_transposed else stack.mT
        out = torch.ops.fp4compile.grouped_mm(x.to(stack.dtype), matrices, ends)
    return out + getattr(module, f"{name}_bias")[expert] if module.has_bias else out


def _forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [T, width] through the experts [T, k] that the router chose, summed with its weights [T, k]."""
    chosen = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    ends = torch.searchsorted(
        expert, torch.arange(self.num_experts, device=expert.device, dtype=expert.dtype), right=True
    )
    gated = getattr(self, "has_gate", True)
    h = _projected(self, "gate_up_proj" if gated else "up_proj", hidden_states[order // chosen], ends, expert)
    h = self._apply_gate(h) if gated else self.act_fn(h)
    h = _projected(self, "down_proj", h, ends, expert)
    if getattr(self, "has_post_expert_norm", False):
        h = self.post_expert_norm(h)
    h = h * top_k_weights.reshape(-1)[order, None]
    in_order = torch.empty_like(h).index_copy(0, order, h)
    return in_order.unflatten(0, (-1, chosen)).sum(1).to(hidden_states.dtype)


def _reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
    """What pickle keeps: the class that was packed, for its own is found under no name, and the module's state."""
    return _unfilled, (type(self).__base__,), self.__dict__


def _unfilled(cls: type) -> Any:
    """A module of the class made from `cls`, without its state."""
    packed: Any = _class(cls)
    return packed.__new__(packed)


@cache
def _class(cls: type) -> type:
    """The class of experts that may be packed, made from that of others."""
    own = {"forward": _forward, "__reduce_ex__": _reduced, "__module__": __name__, "__doc__": _forward.__doc__}
    return type(f"Packed{cls.__name__}", (cls,), own)


def pack(module: nn.Module, name: str, packed: PackedWeight) -> PackedStack:
    """Put a `PackedStack`, its tensors on the meta device, in the place of a module's parameter.

    Raises:
        FP4TypeError: the module's parameter is no stack of experts of the shape that was packed.
    """
    reason = refusal(module, name)
    if reason is not None:
        raise FP4TypeError(reason)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != packed.shape:
        raise FP4TypeError(f"{type(module).__name__} has no {name} of shape {packed.shape}")
    stack = PackedStack(packed, packed.parts(), weight.dtype)
    delattr(module, name)
    setattr(module, name, stack)
    cls: Any = type(module)
    if cls.forward is not _forward:  # not yet, by its other stack
        module.__class__ = _class(cls)
    return stack
