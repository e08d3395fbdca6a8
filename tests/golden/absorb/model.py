"""The norm in front of two projections and the SwiGLU behind them are computed where they are quantised."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.claims import everything

RECIPE = "hif4-plain"
TRAIN = True
CLAIMS = {"fake_quantize": everything, "fake_quantize_both": everything}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.gate, self.up = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model().bfloat16(), (torch.zeros(2, 4, 64, dtype=torch.bfloat16, requires_grad=True),)
