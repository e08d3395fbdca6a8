"""Requantised operands of a transformed forward, and a clip mask on the input's gradient alone."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

_FORWARD = Operand("mxfp4", scale_rule="gaussian", hadamard=32)
_MASKED = Operand("mxfp4", scale_rule="gaussian", hadamard=32, clip_mask=True)
_AGAIN = Operand("mxfp4", scale_rule="truncation-free", requantise=True)
_GRAD = Operand("mxfp4", scale_rule="truncation-free")
RECIPE = Recipe(
    "pull_back",
    (
        Rule("forward", input=_MASKED, weight=_FORWARD),
        Rule("dgrad", grad=_GRAD, weight=_AGAIN),
        Rule("wgrad", grad=_GRAD, input=_AGAIN),
    ),
)
TRAIN = True


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    linear = nn.Linear(64, 32, bias=False)
    return linear.bfloat16(), (torch.zeros(40, 64, dtype=torch.bfloat16).requires_grad_(),)
