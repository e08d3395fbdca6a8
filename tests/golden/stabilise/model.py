"""2-D weight blocks, stochastic rounding of the gradient, and a Hadamard transform along the tokens."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

_NEAREST = Operand("mxfp4", scale_rule="truncation-free")
_TILES = Operand("mxfp4", scale_rule="truncation-free", block_2d=True)
_RHT = Operand("mxfp4", scale_rule="truncation-free", hadamard=32)
_SR_RHT = Operand("mxfp4", scale_rule="truncation-free", hadamard=32, rounding="stochastic")
RECIPE = Recipe(
    "stabilise",
    (Rule("forward", input=_NEAREST, weight=_TILES), Rule("wgrad", grad=_SR_RHT, input=_RHT)),
)
TRAIN = True


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    linear = nn.Linear(64, 64, bias=False)
    return linear.bfloat16(), (torch.zeros(40, 64, dtype=torch.bfloat16),)
