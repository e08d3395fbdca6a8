"""Experts that transformers runs through an op of its own: three GEMMs become visible."""

import torch
import transformers.integrations.moe  # noqa: F401  # registers the op
from torch import Tensor, nn

RECIPE = "hif4-plain"
TRAIN = True


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.zeros(4, 128, 64))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.up_proj.mT, offs=ends)


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Model(), (torch.zeros(40, 64, requires_grad=True), torch.full((4,), 40, dtype=torch.int32))
