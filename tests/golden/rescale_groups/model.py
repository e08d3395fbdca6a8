"""Where a kernel multiplies groups of FP8 rows, the forward of MXFP4 experts with many tokens becomes such."""

import torch
from torch import Tensor, nn

from tests.claims import everything

RECIPE = "mxfp4"
TRAIN = True
CLAIMS = {"quantize_rowwise": everything, "grouped_mm_rowwise": everything}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(2, 128, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.up_proj.mT, offs=ends)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x = torch.zeros(2048, 64, dtype=torch.bfloat16, requires_grad=True)
    return Model(), (x, torch.full((2,), 2048, dtype=torch.int32))
