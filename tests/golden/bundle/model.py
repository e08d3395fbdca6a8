"""The backward of a SwiGLU: the gradients of both its inputs and its output are made from the same three tensors."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.claims import everything

RECIPE = "hif4-plain"
TRAIN = True
CLAIMS = {"fake_quantize": everything, "fake_quantize_both": everything, "fake_quantize_each": everything}


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    return SwiGLU().bfloat16(), (torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True),)
