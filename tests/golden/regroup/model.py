"""Tokens that each multiply a copy of their expert's weight, forward and backward."""

import torch
from torch import Tensor, nn

RECIPE = "hif4-plain"
TRAIN = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 128, 64))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return torch.bmm(self.up_proj[expert], x.unsqueeze(-1)).squeeze(-1)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(40, 64, requires_grad=True), torch.zeros(40, dtype=torch.int64))
