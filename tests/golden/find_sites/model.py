"""Attention: the projections read a weight and are sites, the products of activations are none."""

import torch
from torch import Tensor, nn

RECIPE = "hif4-plain"
TRAIN = True


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 32, bias=False)
        self.k_proj = nn.Linear(64, 32, bias=False)
        self.o_proj = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).T
        return self.o_proj(scores @ x)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Attention(), (torch.zeros(8, 64),)
