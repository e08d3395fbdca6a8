"""Every spelling of a GEMM that the pass knows, and views and permutes that are one."""

import torch
from torch import Tensor, nn

RECIPE = "hif4-w4a16"
TRAIN = False
EXPORT = True  # torch.export keeps the ops of the model, where AOTAutograd would take them apart


class Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 32)
        self.addmm_weight = nn.Parameter(torch.zeros(64, 32))
        self.baddbmm_weight = nn.Parameter(torch.zeros(2, 64, 32))
        self.mv_weight = nn.Parameter(torch.zeros(64, 64))

    def forward(self, x: Tensor, vector: Tensor) -> tuple[Tensor, ...]:
        flat = x.view(8, 64)
        bias = self.linear.bias
        there_and_back = flat.permute(1, 0).permute(1, 0)
        return (
            self.linear(x),
            torch.addmm(bias, flat, self.addmm_weight, beta=2, alpha=0.5),
            torch.baddbmm(bias, x, self.baddbmm_weight),
            torch.mv(self.mv_weight, vector),
            there_and_back,
            x.permute(0, 2, 1).permute(1, 0, 2),
            x.view(8, 64) + flat,
        )


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Spellings(), (torch.zeros(2, 4, 64), torch.zeros(64))
