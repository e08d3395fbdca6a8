"""What the codec kernels cost on this GPU, next to a copy in the same run and plain-torch HiFloat4 under torch.compile.

    python benchmarks/gpu_codec.py [--size 8192] [--csv FILE]

N(0, 1) data in bf16. Kernels are timed in CUDA graphs, so that what a launch costs the host plays no part; that is
measured apart, on a small matrix. All cases take turns in every round and medians are compared. GB/s counts bytes
read and written (far more than the L2 cache holds); the share is of the copy's.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from cpu_codec import plain_hif4
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fp4compile.backend import install_kernels
from fp4compile.formats import FORMATS

COPY = "device-to-device copy"
# The least share of the copy's GB/s, for rounding to nearest along either axis.
BAR = 0.92
AXES = {1: "rows", 0: "columns"}
NAMES = ("hif4", "mxfp4", "nvfp4")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One thing to time, and the bytes it has to move."""

    name: str
    run: Callable[[], object]
    bytes: float
    bar: float | None = None


@dataclass(frozen=True)
class Row:
    """A measured case."""

    device: str
    torch: str
    triton: str
    case: str
    ms: float
    gbps: float
    share: float
    bar: float | None
    host_us: float


def fake_quantize_cases(x: Tensor, format: str, axis: int) -> list[Case]:
    """To nearest; without truncation; stochastic; behind a Hadamard transform; in squares."""
    fmt, ops = FORMATS[format], torch.ops.fp4compile
    scale = ops.tensor_scale(x, format) if fmt.has_tensor_scale else None
    seed = torch.tensor(1234, device=x.device)

    def case(label: str, bar: float | None = None, block_2d: bool = False, **options: object) -> Case:
        rounding, rule = options.pop("rounding", "nearest"), options.pop("scale_rule", None)

        def run() -> Tensor:
            return ops.fake_quantize(x, format, axis, rounding, rule, block_2d, scale, seed, 0, **options)

        return Case(f"{format} {AXES[axis]}{label}", run, 2 * x.nbytes, bar)

    free = {"scale_rule": "truncation-free"}
    cases = [
        case("", BAR),
        case(", truncation-free", **free),
        case(", stochastic", rounding="stochastic", **free),
        case(", Hadamard 16", hadamard=16, sign_seed=seed),
        case(", Hadamard 128", hadamard=128, sign_seed=seed),
    ]
    return [*cases, case(", squares", block_2d=True)] if fmt.block_2d else cases


def packing_cases(x: Tensor, format: str, axis: int) -> list[Case]:
    """`quantize` and `dequantize`."""
    ops, fmt = torch.ops.fp4compile, FORMATS[format]
    scale = ops.tensor_scale(x, format) if fmt.has_tensor_scale else None
    codes, scales = ops.quantize(x, format, axis, "nearest", None, False, scale)
    size, moved = x.shape[axis], x.nbytes + codes.nbytes + scales.nbytes

    def pack() -> object:
        return ops.quantize(x, format, axis, "nearest", None, False, scale)

    def unpack() -> Tensor:
        return ops.dequantize(codes, scales, scale, format, axis, size, False, x.dtype)

    name = f"{format} {AXES[axis]}"
    return [Case(f"{name}, quantize", pack, moved), Case(f"{name}, dequantize", unpack, moved)]


def all_cases(x: Tensor) -> list[Case]:
    """The copy, ours, the peer."""
    target, compiled = torch.empty_like(x), torch.compile(plain_hif4)
    cases = [Case(COPY, lambda: target.copy_(x), 2 * x.nbytes)]
    for format in NAMES:
        for axis in AXES:
            cases += fake_quantize_cases(x, format, axis)
            cases += packing_cases(x, format, axis)
    cases.append(Case("nvfp4 tensor scale", lambda: torch.ops.fp4compile.tensor_scale(x, "nvfp4"), x.nbytes))
    cases.append(Case("plain-torch HiF4 rows, torch.compile", lambda: compiled(x), 2 * x.nbytes))
    return cases


def measure(cases: Sequence[Case], rounds: int) -> list[float]:
    """Median milliseconds of each case on the device; the cases take turns."""
    from triton.testing import do_bench_cudagraph

    times: list[list[float]] = [[] for _ in cases]
    for _ in range(rounds):
        for case, ms in zip(cases, times, strict=True):
            ms.append(do_bench_cudagraph(case.run, rep=10, return_mode="median"))
    return [statistics.median(ms) for ms in times]


def host_microseconds(case: Case, calls: int = 200) -> float:
    """What one call costs the host, nothing waited for."""
    case.run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        case.run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def rows(cases: Sequence[Case], times: Sequence[float], host: Sequence[float]) -> list[Row]:
    """Speeds, and shares of the copy's."""
    import triton

    device = torch.cuda.get_device_name()
    speeds = [case.bytes / ms / 1e6 for case, ms in zip(cases, times, strict=True)]
    return [
        Row(device, torch.__version__, triton.__version__, case.name, ms, gbps, gbps / speeds[0], case.bar, us)
        for case, ms, gbps, us in zip(cases, times, speeds, host, strict=True)
    ]


def show(found: Sequence[Row], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("case", "ms", "GB/s", "of copy", "bar", "host µs"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in found:
        verdict = "" if row.bar is None else f"{'[green]' if row.share >= row.bar else '[red]'}≥ {row.bar:g}[/]"
        table.add_row(row.case, f"{row.ms:.4f}", f"{row.gbps:.0f}", f"{row.share:.3f}", verdict, f"{row.host_us:.0f}")
    Console(width=110).print(table)


def write(found: Sequence[Row], path: Path) -> None:
    """Write the rows, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in found)
    os.replace(temporary, path)


def main() -> None:
    """Measure, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=8192, help="edge of the square matrix")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds")
    parser.add_argument("--csv", type=Path, help="where to write the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark measures GPU kernels")
    install_kernels()
    torch.manual_seed(0)
    x = torch.randn(options.size, options.size, dtype=torch.bfloat16, device="cuda")
    cases = all_cases(x)
    host = [host_microseconds(case) for case in all_cases(x[:128, :128].contiguous())]
    found = rows(cases, measure(cases, options.rounds), host)
    first = found[0]
    show(found, f"{options.size} x {options.size} bf16, {first.device}, torch {first.torch}, Triton {first.triton}")
    name = re.sub(r"\W+", "-", first.device.lower()).strip("-")
    write(found, options.csv or RESULTS / f"gpu_codec-{name}.csv")


if __name__ == "__main__":
    main()
