"""What fake quantisation costs on this CPU, next to an elementwise pass, torchao and plain-torch HiFloat4.

    python benchmarks/cpu_codec.py [--json FILE]

Each of our rows is a compiled call on a bf16 matrix, along the last and the first axis; its ratio is to a
compiled `x * 2 + 1` over the same matrix. NVFP4 computes its own tensor scale, a second pass over memory. All
cases take turns in every round and medians are compared, so that a busy machine slows them alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fp4compile.dispatch import install_kernels
from fp4compile.formats import FORMATS

Run = Callable[[Tensor], Tensor]
ELEMENTWISE = "elementwise"
# The most that a pass over the last and over the first axis may cost, in elementwise passes.
AXIS_BARS = {-1: 6.0, 0: 10.0}
VERSIONS = ("eager", "compiled", "compiled exactly")
# The least speed-up over each peer and the versions of it that count: torchao's for MXFP4 and NVFP4, compiled where
# that runs; for HiF4 the published algorithm in torch as it is published, eager (compiled is shown without a bar).
PEER_BARS = {"mxfp4": (5.0, VERSIONS), "nvfp4": (5.0, VERSIONS), "hif4": (10.0, VERSIONS[:1])}


@dataclass(frozen=True)
class Case:
    """One thing to time. `bar` is against `over`: a largest ratio, or a least speed-up where `is_peer`."""

    name: str
    run: Run
    over: str = ELEMENTWISE
    bar: float | None = None
    is_peer: bool = False


@dataclass(frozen=True)
class Row:
    """A measured case: median milliseconds, the ratio its bar speaks of, and whether the bar holds."""

    name: str
    ms: float
    ratio: float
    bar: float | None
    holds: bool | None
    is_peer: bool


def ours(format: str, axis: int) -> Run:
    """Our fake quantisation, compiled; a format with a tensor scale computes it first."""
    ops, two_level = torch.ops.fp4compile, FORMATS[format].has_tensor_scale

    def run(x: Tensor) -> Tensor:
        scale = ops.tensor_scale(x, format) if two_level else None
        return ops.fake_quantize(x, format, axis, "nearest", None, False, scale)

    return torch.compile(run)


# --- peers --------------------------------------------------------------------------------------------------


def torchao_mxfp4(x: Tensor) -> Tensor:
    """torchao's MXFP4, blocks of 32 along the last axis."""
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32).dequantize(x.dtype)


def torchao_nvfp4(x: Tensor) -> Tensor:
    """torchao's NVFP4, with the tensor scale of x."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    scale = per_tensor_amax_to_scale(x.abs().amax())
    return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)


def plain_hif4(x: Tensor) -> Tensor:
    """HiFloat4 as its authors publish it, in torch ops: bf16 scale and reciprocal, fp32 products."""
    groups = x.float().reshape(-1, 16, 4)
    mag = groups.abs()
    v16 = mag.amax(-1)
    v8 = v16.reshape(-1, 8, 2).amax(-1)
    v = v8.amax(-1, keepdim=True)
    s = (v.bfloat16() * torch.tensor(1 / 7, dtype=torch.bfloat16)).float().clamp(2.0**-48, 49152.0)
    exponent = torch.floor(torch.log2(s))
    scale = torch.exp2(exponent) * torch.round(s / torch.exp2(exponent) * 4) / 4
    reciprocal = (1 / scale).bfloat16().float()
    e8 = (v8 * reciprocal >= 4).float().repeat_interleave(2, -1)
    e16 = (v16 * reciprocal * torch.exp2(-e8) >= 2).float()
    levels = torch.exp2(e8 + e16).unsqueeze(-1)
    code = torch.floor(mag * reciprocal.unsqueeze(-1) / levels * 4 + 0.5).clamp(max=7)
    return torch.copysign(code * 0.25 * levels * scale.unsqueeze(-1), groups).reshape(x.shape).to(x.dtype)


PEERS = {
    "mxfp4": ("torchao MXFP4", torchao_mxfp4),
    "nvfp4": ("torchao NVFP4", torchao_nvfp4),
    "hif4": ("plain-torch HiF4", plain_hif4),
}


def versions(run: Run) -> dict[str, Run]:
    """A peer eager and compiled; Inductor drops bf16 roundings when it fuses, unless told to keep them."""
    exact = {"emulate_precision_casts": True}
    return dict(zip(VERSIONS, (run, torch.compile(run), torch.compile(run, options=exact)), strict=True))


def runnable(run: Run, x: Tensor) -> str | None:
    """Why a peer cannot run here, or None."""
    logging.disable(logging.CRITICAL)  # Inductor prints the whole loop it cannot lower
    torch._dynamo.reset()  # versions of one function with different options do not share graphs
    try:
        run(x)
    except Exception as error:  # a peer may fail in any way; the table says how
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    finally:
        logging.disable(logging.NOTSET)
    return None


def peer_cases(x: Tensor, note: Callable[[str], None]) -> list[Case]:
    """Each peer eager and compiled, as far as it runs. A bar stands only against values that equal ours."""
    cases = []
    for format, (name, run) in PEERS.items():
        for label, version in versions(run).items():
            reason = runnable(version, x)
            if reason:
                note(f"{name}, {label}: not measured ({reason})")
                continue
            equal = (version(x) == ours(format, -1)(x)).double().mean().item()
            speedup, counting = PEER_BARS[format]
            note(f"{name}, {label}: {equal:.2%} of its values equal ours")
            bar = speedup if label in counting and equal > 0.999 else None
            cases.append(Case(f"{name}, {label}", version, f"{format}, last axis", bar, is_peer=True))
    return cases


# --- measuring ----------------------------------------------------------------------------------------------


def our_cases() -> list[Case]:
    """Every format along both axes."""
    axes = {-1: "last axis", 0: "first axis"}
    names = [name for name in FORMATS if name in PEERS]
    return [Case(f"{n}, {axes[a]}", ours(n, a), bar=AXIS_BARS[a]) for n in names for a in axes]


def measure(cases: Sequence[Case], x: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each case; the cases take turns."""
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases:
            start = time.perf_counter()
            case.run(x)
            if number:  # the first round compiles and warms up
                times[case.name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def rows(cases: Sequence[Case], ms: dict[str, float]) -> list[Row]:
    """Compare each case with what its bar speaks of."""
    result = []
    for case in cases:
        ratio = ms[case.name] / ms[case.over]
        holds = None if case.bar is None else (ratio >= case.bar if case.is_peer else ratio <= case.bar)
        result.append(Row(case.name, ms[case.name], ratio, case.bar, holds, case.is_peer))
    return result


def cpu_name() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def show(found: Sequence[Row], title: str, notes: Sequence[str]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("case", "ms", "ratio", "bar", "holds"):
        table.add_column(column, justify="left" if column in ("case", "holds") else "right")
    for row in found:
        bar = "" if row.bar is None else f"{'≥' if row.is_peer else '≤'} {row.bar:g}×"
        meaning = "as fast as it" if row.is_peer else "of elementwise"
        verdict = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[row.holds]
        table.add_row(row.name, f"{row.ms:.1f}", f"{row.ratio:.2f}× {meaning}", bar, verdict)
    console = Console()
    console.print(table)
    for line in notes:
        console.print(line, markup=False)


def main() -> None:
    """Measure, print the table and write the results."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--size", type=int, default=4096, help="edge of the square matrix")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    install_kernels()
    x = torch.randn(options.size, options.size, dtype=torch.bfloat16)
    notes: list[str] = []
    elementwise = Case(ELEMENTWISE, torch.compile(lambda t: t * 2 + 1))
    cases = [elementwise, *our_cases(), *peer_cases(x, notes.append)]
    found = rows(cases, measure(cases, x, options.rounds))
    shape, device = f"{options.size} x {options.size} bf16", cpu_name()
    show(found, f"{shape}, {device}, {options.threads} threads, torch {torch.__version__}", notes)
    if options.json:
        result: dict[str, Any] = {
            "device": device,
            "threads": options.threads,
            "torch": torch.__version__,
            "shape": shape,
            "rows": [asdict(row) for row in found],
            "notes": notes,
        }
        temporary = options.json.with_name(options.json.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
