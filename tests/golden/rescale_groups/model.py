"""Where a kernel multiplies groups of FP8 rows, forward and dgrad of MXFP4 experts become such; their wgrad stays."""

import torch
from torch import Tensor, nn

from tests.claims import everything

RECIPE = "mxfp4"
TRAIN = True
CLAIMS = {"quantize_rowwise": everything, "grouped_mm_rowwise": everything}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 128, 64, dtype=torch.bfloat16))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.up_proj.mT, offs=ends)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x = torch.zeros(40, 64, dtype=torch.bfloat16, requires_grad=True)
    return Model(), (x, torch.full((4,), 40, dtype=torch.int32))
