"""A Llama in plain PyTorch, shared by the training and the generation benchmark; it knows nothing of FP4.

    x, delta = block(x, delta, …)    # x + delta is the residual stream

A block leaves the last sum of the residual stream to whoever reads it, so that the sum lies in front of a norm also
where blocks are compiled one by one: no fusion is lost against compiling the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
_THETA = 500_000.0
_RUN = 256  # logits that are looked through at once; divides the vocabulary


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the defaults are those of Llama 3 8B.

    Attributes:
        joined: whether layers that read one input are one GEMM, as inference engines have them.
    """

    dim: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 32
    vocabulary: int = 128_256
    joined: bool = False

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.heads


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias: Llama has none."""
    return nn.Linear(inputs, outputs, bias=False)


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2] in fp32 of the rotary embedding at positions [T]."""
    powers = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angles = positions[:, None] * _THETA**-powers
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head of x [B, heads, T, head_dim]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Projections(nn.Module):
    """Linear layers that read one input, one by one or joined to one GEMM: x -> a tensor for each."""

    def __init__(self, inputs: int, outputs: Mapping[str, int], joined: bool) -> None:
        super().__init__()
        self.sizes = list(outputs.values())
        layers = {"_".join(outputs): sum(self.sizes)} if joined else outputs
        self.layers = nn.ModuleDict({name: linear(inputs, size) for name, size in layers.items()})

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        found = [layer(x) for layer in self.layers.values()]
        return found if len(found) > 1 else found[0].split(self.sizes, -1)


class Attention(nn.Module):
    """Grouped-query attention, causal, or over a cache of fixed length."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        keys = shape.kv_heads * shape.head_dim
        self.inputs = Projections(
            shape.dim, {"q_proj": shape.heads * shape.head_dim, "k_proj": keys, "v_proj": keys}, shape.joined
        )
        self.o_proj = linear(shape.heads * shape.head_dim, shape.dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None) -> Tensor:
        q, k, v = map(self._heads, self.inputs(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        else:
            out = cached_attention(q, k, v, positions, cache)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def cached_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
    """Write k and v [B, kv_heads, T, D] at `positions` [T] and attend over the whole cache.

    Products and a softmax: for one query in a short cache `scaled_dot_product_attention` took 18 us a layer on an H100
    with its mask and its gap, these three kernels 8. The query heads that share a key head are rows of one query, so
    that nothing is repeated.

    Args:
        cache: [2, B, kv_heads, length, D], keys and values.
    """
    cache[:, :, :, positions] = torch.stack([k, v])
    keys, values = cache
    group = q.shape[1] // k.shape[1]
    hidden = torch.arange(keys.shape[2], device=q.device) > positions[:, None]
    rows = q.unflatten(1, (-1, group)).flatten(2, 3)
    scores = (rows @ keys.mT).float() * q.shape[-1] ** -0.5
    shares = scores.masked_fill(hidden.repeat(group, 1), -torch.inf).softmax(-1)
    return (shares.to(q.dtype) @ values).unflatten(2, (group, -1)).flatten(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.inputs = Projections(shape.dim, {"gate_proj": shape.hidden, "up_proj": shape.hidden}, shape.joined)
        self.down_proj = linear(shape.hidden, shape.dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.inputs(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and MLP, each behind a norm; takes and returns x, delta with x + delta the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, delta: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = x + delta
        x = x + self.attention(self.attention_norm(x), positions, cos, sin, cache)
        return x, self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """The blocks alone: x [B, T, dim] and the rotary embedding's cosines and sines -> [B, T, dim]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        delta = torch.zeros_like(x)
        for block in self.layers:
            x, delta = block(x, delta, positions, cos, sin)
        return x + delta


class Entry(nn.Module):
    """The embedding, and the rotary embedding at positions [T]: tokens [B, T] -> [B, T, dim], cosines, sines."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.embedding = nn.Embedding(shape.vocabulary, shape.dim)

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding(tokens), *rotation(positions, self.head_dim)


class Head(nn.Module):
    """The last norm and the output head, at the last position: [B, T, dim] twice -> logits [B, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(shape.dim, eps=1e-5)
        self.lm_head = linear(shape.dim, shape.vocabulary)

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(x[:, -1] + delta[:, -1]))
        return logits


class Greedy(nn.Module):
    """The token of the largest logit: [B, vocabulary] -> [B, 1].

    The largest of runs, the first run that has it, its place in there: one reduction over a row of logits would keep a
    single multiprocessor busy.
    """

    def forward(self, logits: Tensor) -> Tensor:
        runs = logits.unflatten(-1, (-1, _RUN))
        best = runs.amax(-1).argmax(-1, keepdim=True)
        return best * _RUN + runs.take_along_dim(best[..., None], 1).argmax(-1)


class Llama(nn.Module):
    """The language model on a cache: tokens [B, T] at positions [T] -> logits [B, vocabulary] of the last one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.entry = Entry(shape)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = Head(shape)
        self.greedy = Greedy()

    def caches(self, batch: int, length: int) -> list[Tensor]:
        """Keys and values [2, batch, kv_heads, length, head_dim] of every block, N(0, 1) as behind a prompt."""
        size = (2, batch, self.shape.kv_heads, length, self.shape.head_dim)
        like = self.entry.embedding.weight
        return [torch.randn(size, dtype=like.dtype, device=like.device) for _ in self.layers]

    def forward(self, tokens: Tensor, positions: Tensor, caches: Sequence[Tensor]) -> Tensor:
        x, cos, sin = self.entry(tokens, positions)
        delta = torch.zeros_like(x)
        for block, cache in zip(self.layers, caches, strict=True):
            x, delta = block(x, delta, positions, cos, sin, cache)
        logits: Tensor = self.head(x, delta)
        return logits


def made(kind: type[Model], shape: Shape, device: str) -> Model:
    """A model in bf16 with weights N(0, 0.02²), made on the device; norms stay at one."""
    with torch.device("meta"):
        model = kind(shape).bfloat16()
    model.to_empty(device=device)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.ones_(parameter)
    return model
