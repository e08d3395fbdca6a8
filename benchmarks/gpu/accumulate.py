"""Gradients accumulated over micro-batches: two Llama-3-8B-shaped blocks with and without cached weights, against BF16.

    for x in micro_batches: compiled(x).backward(gradient)    # 2048 tokens each; then the weights count as written

The optimiser, which FP4 does not change, is left out: its write of the weights is counted and not made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.llama import Stack, made, rotation
from benchmarks.gpu.options import Options
from benchmarks.gpu.sheet import Row, Sheet, middle, reason
from benchmarks.gpu.timing import turns
from benchmarks.gpu.train import BASE, SHAPE, compiled, peak_of

SEQUENCE = 2048
MICRO_BATCHES = (1, 4, 8)
CACHED = " cached"


def steps_of(model: Stack, name: str, device: str) -> dict[int, Callable[[], None]]:
    """Number of micro-batches -> a step of as many, which leaves gradients behind; `name` may end with `CACHED`."""
    options: dict[str, Any] = {"cache_weights": True} if name.endswith(CACHED) else {}
    forward = compiled(model, name.removesuffix(CACHED), **options)
    x, gradient = (torch.randn(1, SEQUENCE, SHAPE.dim, device=device).bfloat16() for _ in range(2))
    tables = rotation(torch.arange(SEQUENCE, device=device), SHAPE.head_dim)
    parameters = list(model.parameters())

    def step(count: int) -> None:
        model.zero_grad(set_to_none=True)
        for _ in range(count):
            given: Tensor = x.detach().requires_grad_()
            forward(given, *tables).backward(gradient)
        torch.autograd.graph.increment_version(parameters)

    return {count: lambda count=count: step(count) for count in MICRO_BATCHES}  # type: ignore[misc]


def run(options: Options) -> Sheet:
    """Measure the section."""
    sheet = Sheet("accumulate", f"a step of micro-batches of {SEQUENCE} tokens, two Llama-3-8B blocks", "to BF16's")
    model = made(Stack, SHAPE, options.device)
    runs: dict[tuple[str, int], Callable[[], None]] = {}
    peaks: dict[tuple[str, int], int] = {}
    names = [BASE, *(name + how for name in options.variants for how in ("", CACHED))]
    errors: dict[str, str] = {}
    start = torch.cuda.memory_allocated()
    with torch._dynamo.config.patch(recompile_limit=4 * len(names) + 8):
        for name in names:
            left = torch.cuda.memory_allocated() - start  # what earlier variants keep between calls
            try:
                steps = steps_of(model, name, options.device)
                steps[2 if 2 in steps else MICRO_BATCHES[-1]]()
                peaks |= {(name, count): peak_of(step) - left for count, step in steps.items()}
                runs |= {(name, count): step for count, step in steps.items()}
            except Exception as error:  # whatever a compiler raises; the others go on
                if name == BASE:
                    raise
                errors[name] = reason(error)
        times = turns(list(runs.values()), options.rounds, options.seconds)
    found = {case: middle(ms) for case, ms in zip(runs, times, strict=True)}
    for (name, count), (ms, spread) in found.items():
        ratio = ms / found[BASE, count][0]
        details = {"peak GB": peaks[name, count] / 1e9, "peak ratio": peaks[name, count] / peaks[BASE, count]}
        sheet.rows.append(Row(f"{name}, {count} micro-batches", ms, "ms", spread, ratio, details=details))
    sheet.rows += [Row(name, error=error) for name, error in errors.items()]
    return sheet
