"""A projection that becomes FP4 beside a head that does not, and one that the recipe has no rule for."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

_SPEC = Operand("hif4")
RECIPE = Recipe(
    "annotate",
    (Rule("forward", input=_SPEC, weight=_SPEC), Rule("dgrad", "layers.*", grad=_SPEC, weight=_SPEC)),
    keep=("layers.1.*",),
)
TRAIN = True


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(8, 64, requires_grad=True),)
