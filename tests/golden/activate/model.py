"""Where a kernel applies activations, packed GEMMs apply SwiGLU behind them, of one weight or of two, and GELU."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import Operand
from tests.claims import everything

RECIPE = "hif4-w4a16"
TRAIN = False
CLAIMS = {"mm": everything}


def _packed(inputs: int, outputs: int) -> PackedLinear:
    row = PackedWeight((outputs, inputs), 1, Operand("hif4"))
    return PackedLinear(row, row.pack(torch.zeros(outputs, inputs)), None, torch.bfloat16)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = _packed(64, 256), _packed(128, 64)
        self.gate, self.up, self.head = _packed(64, 32), _packed(64, 32), _packed(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return F.gelu(self.head(F.silu(self.gate(x)) * self.up(x)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(2, 4, 64, dtype=torch.bfloat16),)
