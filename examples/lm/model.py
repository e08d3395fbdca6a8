"""Llama-style language models in plain PyTorch, dense or with experts. Nothing here has heard of FP4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        vocabulary: tokens.
        layers, dim, heads: blocks, their width and their attention heads.
        ff: width of a feed-forward block, or of one expert.
        sequence: the longest window, in tokens.
        experts: feed-forward blocks to choose from in each layer; 0 for a dense model.
        chosen: experts that a token goes through.
    """

    vocabulary: int
    layers: int
    dim: int
    heads: int
    ff: int
    sequence: int
    experts: int = 0
    chosen: int = 2


def rope_tables(sequence: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [sequence, head_dim / 2] of the rotary position embedding."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(sequence).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of x [batch, heads, sequence, head_dim] by their position."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """The gated feed-forward block of Llama."""

    def __init__(self, dim: int, ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ff, bias=False)
        self.up_proj = nn.Linear(dim, ff, bias=False)
        self.down_proj = nn.Linear(ff, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """SwiGLU experts, of which the router chooses some for each token.

    The copies of the tokens are sorted by expert, so that all experts are three grouped GEMMs with the groups' ends as
    offsets. Each row is read and written once: the gradients do not depend on the order of atomic additions.
    """

    def __init__(self, dim: int, ff: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, dim, ff))
        self.up_proj = nn.Parameter(torch.empty(experts, dim, ff))
        self.down_proj = nn.Parameter(torch.empty(experts, ff, dim))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x).flatten(0, -2)
        weights, experts = logits.float().softmax(-1).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        ends = (chosen[:, None] == torch.arange(logits.shape[-1], device=x.device)).sum(0).cumsum(0).int()
        dtype = logits.dtype  # what linear layers compute in: autocast leaves grouped GEMMs alone
        rows = x.to(dtype).flatten(0, -2).repeat_interleave(self.chosen, dim=0)[order]
        gate, up, down = (w.to(dtype) for w in (self.gate_proj, self.up_proj, self.down_proj))
        hidden = F.silu(torch._grouped_mm(rows, gate, offs=ends)) * torch._grouped_mm(rows, up, offs=ends)
        out = torch._grouped_mm(hidden, down, offs=ends)[order.argsort()]
        mixed = (out.unflatten(0, (-1, self.chosen)) * weights[..., None]).sum(1)
        return mixed.to(dtype).view(x.shape)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim)
        self.attention = Attention(shape.dim, shape.heads)
        self.mlp_norm = nn.RMSNorm(shape.dim)
        self.mlp = (
            Experts(shape.dim, shape.ff, shape.experts, shape.chosen) if shape.experts else SwiGLU(shape.dim, shape.ff)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """A Llama-style language model; returns the mean loss in nats per token."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.dim)
        self.lm_head = nn.Linear(shape.dim, shape.vocabulary, bias=False)
        cos, sin = rope_tables(shape.sequence, shape.dim // shape.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                into_residual = name.removesuffix(".weight").endswith(("o_proj", "down_proj"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if into_residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_model(shape: Shape, seed: int) -> Llama:
    """The model with the seed's weights, on the CPU so that they are the same for every device."""
    torch.manual_seed(seed)
    return Llama(shape)


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int, floor: float) -> float:
    """Share of the peak learning rate: linear warm-up over 5% of the steps, then a cosine down to `floor`."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
