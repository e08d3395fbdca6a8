"""A wgrad over the tokens of each expert: both operands are padded to the Hadamard size, 64."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

_SPEC = Operand("mxfp4", hadamard=64)
RECIPE = Recipe("pad_groups", (Rule("wgrad", grad=_SPEC, input=_SPEC),))
TRAIN = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 128, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.up_proj.mT, offs=ends)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(40, 64, dtype=torch.bfloat16), torch.full((4,), 40, dtype=torch.int32))
