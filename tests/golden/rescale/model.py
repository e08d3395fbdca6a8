"""Where a kernel multiplies FP8 with a scale per row, MXFP4 GEMMs become such; the gradient is read once for two."""

import torch
from torch import Tensor, nn

from tests.claims import everything

RECIPE = "mxfp4"
TRAIN = True
CLAIMS = {"quantize_rowwise": everything, "quantize_rowwise_both": everything, "mm_rowwise": everything}


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(nn.Linear(64, 32)), (torch.zeros(4, 64, requires_grad=True),)
