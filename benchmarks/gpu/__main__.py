"""The command line of the GPU benchmarks: sections to run, each to a table and a CSV file.

Several sections run in a process each: what a kernel breaks on the device would otherwise break the rest.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.gpu.options import RECIPES, RESULTS, Options
from benchmarks.gpu.sheet import show, versions, write

SECTIONS = {
    "codec": "the codec kernels against a device copy",
    "decode": "linear layers on packed weights against bf16",
    "train": "a training step of two Llama-3-8B blocks against BF16",
    "accumulate": "micro-batches of such a step, with and without cached weights, against BF16",
    "generate": "decoding of a Llama-3-8B-shaped model against BF16",
}
_WIDTH = 170


def _recipes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    wrong = [name for name in names if name not in RECIPES]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: the recipes are {', '.join(RECIPES)}")
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    listed = "; ".join(f"{name}: {about}" for name, about in SECTIONS.items())
    made = argparse.ArgumentParser("python -m benchmarks.gpu", description=f"Benchmarks on one CUDA GPU. {listed}.")
    made.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; all by default")
    made.add_argument("--rounds", type=_positive, default=Options.rounds, help="timed rounds (%(default)s)")
    made.add_argument(
        "--seconds", type=float, default=Options.seconds, help="stop timing a comparison after so long (%(default)s)"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV files")
    made.add_argument(
        "--variants", type=_recipes, default=RECIPES, help=f"train: recipes, by default {','.join(RECIPES)}"
    )
    made.add_argument("--profile", action="store_true", help="train: write the kernels of a step too")
    return made


def run_section(name: str, options: Options, console: Console) -> bool:
    """Run a section in this process; whether all of it could be measured."""
    try:
        torch.manual_seed(0)
        sheet = importlib.import_module(f"benchmarks.gpu.{name}").run(options)
        of = versions()
        show(sheet, of, console)
        console.print(f"written to {write(sheet, of, options.out)}", highlight=False)
    except Exception:  # whatever stops a section must not stop the others
        console.print(f"section {name} failed:\n{traceback.format_exc()}", markup=False)
        return False
    return not sheet.failed


def run_apart(name: str, options: Options) -> bool:
    """Run a section in a process of its own."""
    flags = ["--rounds", str(options.rounds), "--seconds", str(options.seconds), "--out", str(options.out)]
    flags += ["--variants", ",".join(options.variants), *(["--profile"] if options.profile else [])]
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu", name, *flags], check=False).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 1 if something could not be measured, 2 for wrong arguments."""
    made = parser()
    args = made.parse_args(arguments)
    wrong = [name for name in args.sections if name not in SECTIONS]
    if wrong:
        made.error(f"no section {', '.join(wrong)}; there are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        made.error("torch sees no CUDA device: these benchmarks measure GPU kernels")
    options = Options(args.rounds, args.seconds, args.out, args.variants, args.profile)
    sections = list(dict.fromkeys(args.sections)) or list(SECTIONS)
    if len(sections) == 1:
        return 0 if run_section(sections[0], options, Console(width=_WIDTH)) else 1
    return 1 if [name for name in sections if not run_apart(name, options)] else 0


if __name__ == "__main__":
    raise SystemExit(main())
