"""Where a kernel applies activations, packed GEMMs apply the SwiGLU and the GELU behind them."""

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
        self.gate_up, self.down, self.head = _packed(64, 256), _packed(128, 64), _packed(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return F.gelu(self.head(x + self.down(F.silu(gate) * up)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(2, 4, 64, dtype=torch.bfloat16),)
