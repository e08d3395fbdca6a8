"""A weight becomes packed constants; the activation is quantised at run time."""

import torch
from torch import Tensor, nn

RECIPE = "nvfp4-w4a4"
TRAIN = False
EXPORT = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(4, 64),)
