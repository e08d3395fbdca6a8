"""The gradient of a layer inside: read once for dgrad and wgrad, each with its tensor scale and its transform."""

import torch
from torch import Tensor, nn

from tests.claims import everything

RECIPE = "nvfp4"
TRAIN = True
CLAIMS = {"fake_quantize_both": everything, "tensor_scale_both": everything}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.relu())


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(16, 64, requires_grad=True),)
