"""Under autocast a weight is cast, scaled and quantised along both axes outside of the graph: see the end."""

import torch
from torch import Tensor, nn

RECIPE = "nvfp4-plain"
TRAIN = True
CACHE = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.proj(x)
        return y


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(4, 64, requires_grad=True),)
