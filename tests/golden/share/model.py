"""Two projections of one input: forward and wgrad read it along two axes, each quantised once."""

import torch
from torch import Tensor, nn

RECIPE = "hif4-plain"
TRAIN = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 32, bias=False)
        self.k_proj = nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_proj(x), self.k_proj(x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(4, 64),)
