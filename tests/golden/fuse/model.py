"""A packed weight moves into the GEMM; the activation's transform, quantisation and decoding become one op."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

_SPEC = Operand("mxfp4", hadamard=32)
RECIPE = Recipe("fuse", (Rule("forward", input=_SPEC, weight=_SPEC),))
TRAIN = False
EXPORT = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32, bias=False)
        self.down = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(4, 64),)
