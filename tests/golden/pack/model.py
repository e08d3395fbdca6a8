"""Where a kernel multiplies packed operands, each GEMM of the step reads codes and scales."""

import torch
from torch import Tensor, nn

from tests.claims import packed

RECIPE = "nvfp4-plain"
TRAIN = True
CLAIMS = {"mm": packed}


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(nn.Linear(64, 32, bias=False)), (torch.zeros(4, 64, requires_grad=True),)
