"""Greedy decoding of a Llama-3-8B-shaped model: packed HiF4 weights against BF16.

    tokens, position -> 32 blocks on a static KV cache -> argmax -> tokens, position + 1

Everything is compiled, the blocks once for all of them, q, k and v are one GEMM, so are gate and up, and the whole step
is one CUDA graph, for both models alike. Inductor compiles both, the packed one behind our passes, which let the GEMM
of gate and up apply the SwiGLU. Random weights, embedding and output head shared and in BF16; 128 tokens after a prompt
of 128, whose keys and values are random: nothing but decoding is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.llama import Llama, Shape, made
from benchmarks.gpu.options import Options
from benchmarks.gpu.sheet import Bar, Row, Sheet, middle, reason
from benchmarks.gpu.timing import Run, graphed, turns
from fp4compile.dynamo import fp4compile_backend
from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import HEADS, RECIPES, Recipe

SHAPE = Shape(joined=True)
BASE, RECIPE = "bf16", "hif4-w4a16"
PROMPT, TOKENS = 128, 128
BATCHES = (1, 16)
SPEED = Bar("≥", 2.2)
BYTES = Bar("≤", 0.285)


def _packed(linear: nn.Linear, recipe: Recipe, path: str) -> nn.Module:
    """The layer with its weight packed as the recipe says; the layer itself where the recipe keeps it."""
    rule = recipe.rule_for(path, "forward")
    spec = rule.weight if rule else None
    if spec is None or path.rpartition(".")[2] in HEADS:
        return linear
    row = PackedWeight((linear.out_features, linear.in_features), 1, spec)
    return PackedLinear(row, row.pack(linear.weight.detach()), linear.bias, linear.weight.dtype)


def packed(model: Llama, recipe: str) -> Llama:
    """A copy of the model on packed weights; embedding and output head are shared with it."""
    chosen = RECIPES.get(recipe)
    named = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    # What deepcopy finds here it takes for already copied.
    memo: dict[int, nn.Module] = {id(linear): _packed(linear, chosen, path) for path, linear in named}
    memo[id(model.entry.embedding)] = model.entry.embedding
    return copy.deepcopy(model, memo)


def linear_bytes(model: Llama) -> int:
    """Bytes of the weights of the blocks' linear layers, scales included."""
    layers = [m for m in model.layers.modules() if isinstance(m, nn.Linear | PackedLinear)]
    return sum(t.nbytes for m in layers for t in (*m.parameters(), *m.buffers()))


def compile_parts(model: Llama, **options: Any) -> None:
    """Compile the blocks, which share one graph, and what is in front of and behind them, in place.

    Args:
        options: of `torch.compile` for the blocks.
    """
    for block in model.layers:
        block.compile(fullgraph=True, dynamic=False, **options)
    for part in (model.entry, model.head, model.greedy):
        part.compile(fullgraph=True, dynamic=False)


class Decoder:
    """Greedy decoding with all state on the device: `step` reads and advances it.

    Attributes:
        tokens: [batch, 1], the last token of each sequence.
        position: [1], where it stands.
    """

    def __init__(self, model: Llama, batch: int) -> None:
        device = model.entry.embedding.weight.device
        self.model = model
        self.caches = model.caches(batch, PROMPT + TOKENS)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Stand behind the prompt."""
        self.tokens.fill_(1)
        self.position.fill_(PROMPT)

    @torch.no_grad()
    def step(self) -> None:
        """Decode one token of each sequence."""
        logits = self.model(self.tokens, self.position, self.caches)
        self.tokens.copy_(self.model.greedy(logits))
        self.position.add_(1)


def generation(decoder: Decoder) -> Run:
    """What decodes all the tokens: one replay of the step's graph for each."""
    replay = graphed([decoder.step], 1)

    def run() -> None:
        decoder.reset()
        for _ in range(TOKENS):
            replay()

    return run


def all_finite(decoder: Decoder) -> bool:
    """Whether a step gives finite logits."""
    decoder.reset()
    with torch.no_grad():
        return bool(decoder.model(decoder.tokens, decoder.position, decoder.caches).isfinite().all())


def rows_of(models: dict[str, Llama], batch: int, options: Options) -> Iterator[Row]:
    """Tokens per second of every model, BF16 first; a model that does not run has a row that says why."""
    decoders = {name: Decoder(model, batch) for name, model in models.items()}
    runs: dict[str, Run] = {}
    errors: dict[str, str] = {}
    for name, decoder in decoders.items():
        try:
            runs[name] = generation(decoder)
        except Exception as problem:  # whatever a compiler or a kernel raises
            if name == BASE:
                raise
            errors[name] = reason(problem)
    times = dict(zip(runs, turns(list(runs.values()), options.rounds, options.seconds), strict=True))
    base = middle(times[BASE])[0]
    for name, decoder in decoders.items():
        case, bar = f"batch {batch}, {name}", SPEED if name == RECIPE else None
        if name in errors:
            yield Row(case, unit="tokens/s", bar=bar, error=errors[name])
            continue
        ms, spread = middle(times[name])
        error = "" if all_finite(decoder) else "its logits are not finite"
        yield Row(case, batch * TOKENS / ms * 1e3, "tokens/s", spread, base / ms, bar, {"ms/token": ms / TOKENS}, error)


def run(options: Options) -> Sheet:
    """Measure the section."""
    title = f"Llama-3-8B shape, greedy decoding of {TOKENS} tokens after {PROMPT}"
    sheet = Sheet("generate", title, "tokens/s over BF16's; bytes over BF16's")
    model = made(Llama, SHAPE, options.device).eval()
    models = {BASE: model, RECIPE: packed(model, RECIPE)}
    sizes = {name: linear_bytes(m) for name, m in models.items()}
    compile_parts(model)
    compile_parts(models[RECIPE], backend=fp4compile_backend, options={"recipe": RECIPE})
    for batch in BATCHES:
        sheet.rows += rows_of(models, batch, options)
    for name, size in sizes.items():
        bar = BYTES if name == RECIPE else None
        sheet.rows.append(Row(f"linear weights, {name}", size / 1e9, "GB", None, size / sizes[BASE], bar))
    return sheet
