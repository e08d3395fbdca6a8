"""One training step of two Llama-3-8B-shaped blocks: FP4 recipes against BF16, both under `torch.compile`.

    y = compiled(x); y.backward(gradient)    # N(0, 1) x and gradient, bf16 parameters, 8192 tokens

All variants share one model and take turns of a few steps; the optimiser, which FP4 does not change, is left out.
"""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fp4compile
from benchmarks.gpu.llama import Shape, Stack, made, rotation
from benchmarks.gpu.options import Options
from benchmarks.gpu.sheet import Bar, Row, Sheet, middle, path_of, reason, versions, write_csv
from benchmarks.gpu.timing import host_microseconds, turns
from fp4compile.dynamo import fp4compile_backend

SHAPE = Shape(kv_heads=32, layers=2)
BATCH, SEQUENCE = 4, 2048
STEPS = 3  # timed in a turn, behind as many untimed
# The largest ratio of a step's time to BF16's; the other recipes may take this much more than their plain form.
BARS = {"hif4-plain": 1.04, "nvfp4-plain": 1.04, "mxfp4-plain": 0.72}
STABILISERS = 0.05
MEMORY = Bar("≤", 1.0)
BASE = "bf16"
_HOST_SHARE = 0.9  # of a step's time; above it the host is not safely ahead
# Kernel name -> its class, the first that matches. What Inductor makes is named after every op that it holds.
CLASSES = (
    ("rest", r"^triton_"),
    ("attention", r"flash|fmha|attention"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|cublas|splitK|^exact"),
    ("quantise", r"quanti|^amax|^tensor_scale|^hadamard|^window"),
    ("rest", ""),
)


@dataclass
class Variant:
    """One way to run the step.

    Attributes:
        name: "bf16" or a recipe's name.
        step: forward and backward.
        peak: bytes that were allocated at most during a step.
        host_ms: what enqueuing a step costs the host; above the step's time the host is what is measured.
        kernels: kernel name -> microseconds on the device in one step.
        fp4: how many GEMMs became FP4.
        kernel_names: what runs them, as the report says.
        notes: the report's notes.
    """

    name: str
    step: Callable[[], None]
    peak: int = 0
    host_ms: float = 0.0
    kernels: Mapping[str, float] = field(default_factory=dict)
    fp4: int = 0
    kernel_names: str = ""
    notes: list[str] = field(default_factory=list)


def kernel_class(name: str) -> str:
    """What a kernel does, by its name: GEMM, attention, quantise or rest."""
    return next(kind for kind, pattern in CLASSES if re.search(pattern, name))


def compiled(model: Stack, name: str, **others: Any) -> Callable[..., Tensor]:
    """The model under `torch.compile`, in BF16 or by a recipe with other options."""
    # The function behind the name "fp4compile": a bare checkout has no entry point that torch could find it by.
    fp4: dict[str, Any] = {"backend": fp4compile_backend, "options": {"recipe": name, **others}}
    options = {} if name == BASE else fp4
    made: Callable[..., Tensor] = torch.compile(model, fullgraph=True, dynamic=False, **options)
    return made


def step_of(model: Stack, name: str, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A step that leaves new gradients behind and drops the old ones first."""
    forward = compiled(model, name)
    tables = rotation(torch.arange(x.shape[1], device=x.device), SHAPE.head_dim)  # once, as Llama's own code has it

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        forward(x, *tables).backward(gradient)

    return step


def kernels_of(step: Callable[[], None]) -> dict[str, float]:
    """Microseconds on the device by kernel name in one step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profile.key_averages():
        found[event.key] += event.self_device_time_total
    return {name: us for name, us in found.most_common() if us}


def peak_of(step: Callable[[], None]) -> int:
    """Bytes allocated at most during a step."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def prepare(model: Stack, name: str, x: Tensor, gradient: Tensor) -> Variant:
    """Compile the variant, run it, and look at what one step does."""
    variant = Variant(name, step_of(model, name, x, gradient))
    for _ in range(2):
        variant.step()
    report = fp4compile.last_report()
    if name != BASE and report:
        done = [site for site in report.sites if site.status == "fp4"]
        variant.fp4, variant.notes = len(done), list(report.notes)
        variant.kernel_names = ", ".join(sorted({site.kernel for site in done}))
    variant.peak = peak_of(variant.step)
    variant.host_ms = host_microseconds(variant.step, calls=1) / 1e3
    variant.kernels = kernels_of(variant.step)
    return variant


def share(kernels: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by kernel class."""
    spent = dict.fromkeys(("GEMM", "quantise", "attention", "rest"), 0.0)
    for name, us in kernels.items():
        spent[kernel_class(name)] += us / 1e3
    return {f"{kind} ms": ms for kind, ms in spent.items()}


def bar_of(name: str, ratios: Mapping[str, float]) -> Bar | None:
    """The bar of a recipe: its own, or its plain form's ratio and a little; None without either."""
    if name in BARS:
        return Bar("≤", BARS[name])
    plain = ratios.get(f"{name}-plain")
    return Bar("≤", plain + STABILISERS) if plain else None


def rows_of(variants: list[Variant], times: list[list[float]]) -> list[Row]:
    """Step time and peak memory of every variant, BF16 first."""
    found = {variant.name: middle(ms) for variant, ms in zip(variants, times, strict=True)}
    base_ms, base_peak = found[BASE][0], variants[0].peak
    ratios = {name: ms / base_ms for name, (ms, _) in found.items()}
    rows = []
    for variant in variants:
        name, (ms, spread) = variant.name, found[variant.name]
        details: dict[str, float | int | str] = {
            "FP4 GEMMs": variant.fp4,
            **share(variant.kernels),
            "host ms": variant.host_ms,
        }
        rows.append(Row(f"{name}, step", ms, "ms", spread, ratios[name], bar_of(name, ratios), details))
    for variant in variants:
        bar = None if variant.name == BASE else MEMORY
        rows.append(Row(f"{variant.name}, peak memory", variant.peak / 1e9, "GB", None, variant.peak / base_peak, bar))
    return rows


def host_bound(rows: list[Row]) -> list[str]:
    """Whose time may be the host's: enqueuing a step takes nearly as long as the device takes for it."""
    return [
        f"{row.case}: enqueued in {row.details['host ms']:.1f} ms, the host may be what was measured"
        for row in rows
        if row.value and "host ms" in row.details and float(row.details["host ms"]) > _HOST_SHARE * row.value
    ]


def write_kernels(sheet: Sheet, variants: list[Variant], options: Options) -> None:
    """Write every kernel of a step of every variant beside the section's file."""
    of = versions()
    path = path_of(sheet, of, options.out)
    rows = [
        {"variant": variant.name, "class": kernel_class(name), "us": f"{us:.1f}", "kernel": name}
        for variant in variants
        for name, us in variant.kernels.items()
    ]
    write_csv(path.with_stem(f"{path.stem}-kernels"), ["variant", "class", "us", "kernel"], rows)


def run(options: Options) -> Sheet:
    """Measure the section."""
    sheet = Sheet("train", f"a training step of two Llama-3-8B blocks, {BATCH} × {SEQUENCE} tokens", "to BF16's")
    model = made(Stack, SHAPE, options.device)
    x, gradient = (torch.randn(BATCH, SEQUENCE, SHAPE.dim, device=options.device).bfloat16() for _ in range(2))
    x.requires_grad_()
    variants, errors = [], {}
    # Variants are graphs of one function: more of them than Dynamo keeps of a function that recompiles.
    with torch._dynamo.config.patch(recompile_limit=4 * len(options.variants) + 8):
        for name in (BASE, *options.variants):
            try:
                variants.append(prepare(model, name, x, gradient))
            except Exception as error:  # whatever a compiler raises; the others go on
                if name == BASE:
                    raise
                errors[name] = reason(error)
        times = turns([variant.step for variant in variants], options.rounds, options.seconds, STEPS)
    sheet.rows = rows_of(variants, times)
    sheet.rows += [Row(f"{name}, step", error=error) for name, error in errors.items()]
    sheet.notes += host_bound(sheet.rows)
    for variant in variants[1:]:
        sheet.notes.append(f"{variant.name}: {variant.kernel_names}")
        sheet.notes += [f"{variant.name}: {note}" for note in variant.notes]
    if options.profile:
        write_kernels(sheet, variants, options)
    return sheet
