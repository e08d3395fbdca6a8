"""Operands without and with a per-tensor scale."""

import torch
from torch import Tensor, nn

from fp4compile.recipe import Operand, Recipe, Rule

RECIPE = Recipe(
    "insert_qdq",
    (
        Rule("forward", "plain", input=Operand("hif4"), weight=Operand("hif4")),
        Rule("forward", "scaled", input=Operand("nvfp4"), weight=Operand("nvfp4")),
        Rule("forward", "weight_only", weight=Operand("mxfp4", scale_rule="ceil")),
    ),
)
TRAIN = False


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(64, 32, bias=False)
        self.scaled = nn.Linear(32, 64)
        self.weight_only = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_only(self.scaled(self.plain(x)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model().bfloat16(), (torch.zeros(4, 64, dtype=torch.bfloat16),)
