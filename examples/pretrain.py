"""Pre-train a small byte-level language model in BF16 and in FP4, and put the loss curves side by side.

    python examples/pretrain.py                      # BF16, HiF4, MXFP4, NVFP4: minutes on two CPU cores
    python examples/pretrain.py --device cuda --layers 12 --dim 768 --heads 12 --ff 2048 \\
        --sequence 1024 --batch 64 --steps 20000 --text my_corpus/

The model (lm/model.py) is ordinary PyTorch and knows nothing of FP4: the arms differ in the call of `torch.compile`
alone. Every arm starts from the same weights and reads the same batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from lm.arms import check_widths
from lm.files import files_of, python_sources, read_file, shuffled
from lm.machine import (
    BadInput,
    check_folder,
    machine_name,
    make_deterministic,
    pick_device,
    pick_dtype,
    positive,
    synchronise,
)
from lm.model import Llama, Shape, learning_rate, make_model, make_optimizer
from lm.plot import COLOURS, Curve, gap, loss_and_gap
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.files import write_atomically
from fp4compile.recipe import Recipe, resolve
from fp4compile.report import Report

VOCABULARY = 256  # bytes
WIDTH = 120  # of what goes to a file or a pipe

# --- options ------------------------------------------------------------------------------------------------

DTYPES = {"bfloat16": "BF16", "float32": "FP32"}
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; the defaults fit two CPU cores and a few minutes."""
    parser = argparse.ArgumentParser(
        description="Pre-train a small language model in BF16 and in FP4, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, number = positive(int), positive(float)
    add = parser.add_argument
    add(
        "--recipes",
        nargs="+",
        default=["hif4", "mxfp4", "nvfp4"],
        help="names or TOML files; bf16 is always there",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="around FP4; auto is bf16 where it is fast",
    )
    add("--layers", type=count, default=4, help="blocks of the model")
    add("--dim", type=count, default=128, help="width of the model")
    add("--heads", type=count, default=2, help="attention heads of a block")
    add("--ff", type=count, default=384, help="width of the feed-forward blocks")
    add("--sequence", type=count, default=256, help="bytes per window")
    add("--batch", type=count, default=4, help="windows per step")
    add("--steps", type=count, default=600, help="optimiser steps of each arm")
    add("--lr", type=number, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=0, help="of the weights, the batches and stochastic rounding")
    add("--text", type=Path, default=None, help="file or folder; without it, Python's standard library")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent / "out",
        help="folder for pretrain.png and pretrain.json",
    )
    add("--compile-mode", choices=MODES, default="default", help="mode of torch.compile")
    return parser.parse_args(arguments)


def resolve_recipes(names: Sequence[str]) -> list[Recipe]:
    """The FP4 recipes by name or TOML file, each once."""
    found: dict[str, Recipe] = {}
    for name in names:
        if name == "bf16":
            continue
        recipe = resolve(name)
        if found.setdefault(recipe.name, recipe) != recipe:
            raise BadInput(f"--recipes: two different recipes are named {recipe.name!r}")
    return list(found.values())


# --- the text -----------------------------------------------------------------------------------------------

HELD_OUT = 0.05
HELD_OUT_WINDOWS = 64


@dataclass(frozen=True)
class Text:
    """A text as bytes: the first part is trained on, the rest held out."""

    source: str
    train: Tensor
    held_out: Tensor
    sha256: str


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # Not in every installation, or no part of it.
    return python_sources(root, ("site-packages", "dist-packages", "test", "tests", "idle_test"))


def read_text(path: Path | None, sequence: int) -> Text:
    """The bytes to learn from, in an order that does not depend on the machine."""
    source = str(path) if path else f"sources of Python {platform.python_version()}'s standard library"
    data = b"\n".join(filter(None, map(read_file, shuffled(files_of(path) if path else _standard_library()))))
    needed = math.ceil((sequence + 1) / HELD_OUT)
    if len(data) < needed:
        raise BadInput(
            f"the text ({source}) holds {len(data):,} bytes; --sequence {sequence} needs {needed:,} or more, "
            f"because the last {HELD_OUT:.0%} are held out and must fill a window. "
            "Use a larger text (--text) or a shorter --sequence."
        )
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    first_held_out = len(data) - math.ceil(len(data) * HELD_OUT)
    return Text(source, tokens[:first_held_out], tokens[first_held_out:], hashlib.sha256(data).hexdigest())


def windows(tokens: Tensor, starts: Tensor, sequence: int) -> Tensor:
    """Windows of sequence + 1 bytes, [len(starts), sequence + 1]."""
    return tokens[starts[:, None] + torch.arange(sequence + 1)]


def batches(tokens: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """The training batches: random windows, a function of the text and the seed alone."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        starts = torch.randint(len(tokens) - options.sequence, (options.batch,), generator=generator)
        yield windows(tokens, starts, options.sequence)


# --- training -----------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """One precision and what became of it.

    Attributes:
        label: how the table and the figure call it.
        recipe: None for BF16.
        losses: training loss of each step, in nats per byte; shorter than the run if it diverged.
        held_out: loss on the held-out text, in the arm's own precision.
        data: digest of every batch that it read.
        first_seconds, step_seconds: the first step, with compilation, and the mean of the others.
    """

    label: str
    recipe: Recipe | None
    losses: list[float] = field(default_factory=list)
    held_out: float = math.nan
    data: str = ""
    seconds: float = 0.0
    first_seconds: float = 0.0
    step_seconds: float = 0.0
    report: Report | None = None

    @property
    def diverged(self) -> bool:
        """Whether a loss was not a number."""
        return not all(map(math.isfinite, self.losses))

    @property
    def final(self) -> float:
        """Mean training loss of the last tenth of the steps."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(tail) / len(tail)


NAMES = {"hif4": "HiF4", "mxfp4": "MXFP4", "nvfp4": "NVFP4"}


def make_arms(recipes: Sequence[Recipe], dtype: str) -> list[Arm]:
    """BF16 first: the others are compared with it."""
    return [
        Arm(DTYPES[dtype], None),
        *(Arm(NAMES.get(recipe.name, recipe.name), recipe) for recipe in recipes),
    ]


def make_llama(options: argparse.Namespace) -> Llama:
    """The model with the seed's weights."""
    shape = Shape(VOCABULARY, options.layers, options.dim, options.heads, options.ff, options.sequence)
    return make_model(shape, options.seed)


def compile_model(model: nn.Module, recipe: Recipe | None, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The one place where the arms differ."""
    if recipe is None:
        return torch.compile(model, mode=mode)
    fp4_options: dict[str, Any] = {"recipe": recipe, "mode": mode}
    return torch.compile(model, backend="fp4compile", options=fp4_options)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step; it ends at 10%."""
    return learning_rate(step, steps, floor=0.1)


@dataclass
class Trainer:
    """Trains one arm."""

    arm: Arm
    options: argparse.Namespace
    text: Text

    def __post_init__(self) -> None:
        self.device = torch.device(self.options.device)
        torch.compiler.reset()  # each arm compiles for itself
        self.model = make_llama(self.options).to(self.device)
        self.compiled = compile_model(self.model, self.arm.recipe, self.options.compile_mode)
        self.optimizer = make_optimizer(self.model, self.options.lr)

    def loss(self, window: Tensor) -> Tensor:
        """Loss of a batch: fp32 weights, bf16 arithmetic."""
        tokens = window.to(self.device, torch.long)
        torch.compiler.cudagraph_mark_step_begin()  # what a CUDA graph returned before may be overwritten
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16"):
            return self.compiled(tokens[:, :-1], tokens[:, 1:])

    def step(self, window: Tensor, step: int) -> Tensor:
        """One optimiser step; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * schedule(step, self.options.steps)
        loss = self.loss(window)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().clone()

    def run(self, advance: Callable[[Arm], None]) -> None:
        """Train, then measure the held-out loss; `advance` is called whenever losses have come in."""
        arm, digest, pending = self.arm, hashlib.sha256(), []
        started = time.perf_counter()
        for step, window in enumerate(batches(self.text.train, self.options)):
            digest.update(window.numpy().tobytes())
            pending.append(self.step(window, step))
            if step == 0:
                synchronise(self.device)
                arm.first_seconds = time.perf_counter() - started
            # Reading a loss waits for the device, so a few are read at once.
            if step % 5 == 0 or step == self.options.steps - 1:
                arm.losses += torch.stack(pending).tolist()
                pending.clear()
                advance(arm)
                if arm.diverged:
                    break
        synchronise(self.device)
        arm.seconds = time.perf_counter() - started
        arm.step_seconds = (arm.seconds - arm.first_seconds) / max(1, len(arm.losses) - 1)
        arm.data = digest.hexdigest()
        arm.report = fp4compile.last_report() if arm.recipe else None
        arm.held_out = self.held_out()

    def held_out(self) -> float:
        """Loss on evenly spaced windows of the held-out text.

        Gradients stay enabled: the training graph runs without its backward half, and no other is compiled.
        """
        batch, sequence = self.options.batch, self.options.sequence
        count = -(-HELD_OUT_WINDOWS // batch) * batch
        starts = torch.linspace(0, len(self.text.held_out) - sequence - 1, count).long()
        losses = [
            self.loss(windows(self.text.held_out, part, sequence)).detach().clone() for part in starts.split(batch)
        ]
        return torch.stack(losses).mean().item()


def train(arms: Sequence[Arm], options: argparse.Namespace, text: Text, console: Console) -> None:
    """Train all arms, one after the other, with a bar for each; a log gets a line now and then instead."""
    columns = (
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("steps  {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    shown = console.is_terminal
    lines = set(range(1, options.steps, 5 * max(1, options.steps // 25)))  # losses come in after every fifth step
    with Progress(*columns, console=console, refresh_per_second=4, disable=not shown) as progress:
        for arm in arms:
            task = progress.add_task(arm.label, total=options.steps, loss="compiling")

            def advance(arm: Arm, task: Any = task) -> None:
                progress.update(task, completed=len(arm.losses), loss=f"loss {arm.losses[-1]:.3f}")
                if not shown and len(arm.losses) in lines:
                    told = f"{len(arm.losses)} of {options.steps} steps, loss {arm.losses[-1]:.3f}"
                    console.print(f"{arm.label}: {told}", highlight=False)

            Trainer(arm, options, text).run(advance)
            progress.update(task, loss="diverged" if arm.diverged else f"loss {arm.final:.3f}")
            if not shown:
                console.print(f"{arm.label}: {len(arm.losses)} steps in {arm.seconds:.0f} s", highlight=False)


# --- results ------------------------------------------------------------------------------------------------

HOW_TO_READ = (
    "How to read it: this is one seed of a small model, so the gaps are noisy and do not rank the formats, "
    "and FP4 is emulated here, bit for bit, so the seconds say nothing about hardware with FP4 units."
)


def _number(value: float, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "diverged"


def result_table(arms: Sequence[Arm]) -> Table:
    """The table at the end, one row per arm: FLOPs of all linear GEMMs, weights of those in FP4, before and after."""
    title = "Loss in nats per byte; train loss: mean of the last 10% of the steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("precision", no_wrap=True, vertical="bottom")
    versus = arms[0].label
    heads = ("train\nloss", "held-out\nloss", f"gap to\n{versus}", "FLOPs\nin FP4", "weights\nin MiB", "seconds")
    for name in (*heads, f"a step\nvs {versus}"):
        table.add_column(name, justify="right", no_wrap=True)
    reference = arms[0]
    for arm in arms:
        report = arm.report
        table.add_row(
            arm.label,
            _number(arm.final, ".4f"),
            _number(arm.held_out, ".4f"),
            _number(100 * gap(arm.final, reference.final), "+.2f", "%") if arm.recipe else "–",
            f"{report.fp4_share:.1%}" if report else "–",
            " → ".join(f"{count / 2**20:.2f}" for count in report.weight_bytes) if report else "–",
            f"{arm.seconds:.0f}",
            f"{arm.step_seconds / reference.step_seconds:.2f}×" if arm.recipe and reference.step_seconds else "–",
        )
    return table


def kept(arm: Arm) -> str:
    """What an arm leaves in high precision, and why: the rest of its GEMM FLOPs."""
    sites = arm.report.sites if arm.report else []
    reasons = Counter(site.reason for site in sites if site.status != "fp4")
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"{arm.label} keeps {reasons.total()} of {len(sites)} GEMMs in high precision: {listed or '–'}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _arm_data(arm: Arm, reference: Arm) -> dict[str, Any]:
    report = arm.report
    return {
        "precision": arm.label,
        "recipe": arm.recipe.to_dict() if arm.recipe else None,
        "train_loss": _finite(arm.final),
        "held_out_loss": _finite(arm.held_out),
        "gap": _finite(gap(arm.final, reference.final)),
        "held_out_gap": _finite(gap(arm.held_out, reference.held_out)),
        "diverged": arm.diverged,
        "fp4_share": report.fp4_share if report else 0.0,
        "weight_bytes": list(report.weight_bytes) if report else None,
        "gemms": {status: report.count(status) for status in ("fp4", "kept", "refused")} if report else None,
        "seconds": arm.seconds,
        "first_step_seconds": arm.first_seconds,
        "step_seconds": arm.step_seconds,
        "data_sha256": arm.data,
        "losses": [_finite(loss) for loss in arm.losses],
    }


def results(arms: Sequence[Arm], options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Everything that was set and measured, as plain data."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    return {
        "config": config,
        "model": {"parameters": sum(p.numel() for p in make_llama(options).parameters())},
        "text": {
            "source": text.source,
            "train_bytes": len(text.train),
            "held_out_bytes": len(text.held_out),
            "sha256": text.sha256,
        },
        "machine": {
            "device": machine_name(options.device),
            "torch": torch.__version__,
            "fp4compile": fp4compile.__version__,
        },
        "how_to_read": HOW_TO_READ,
        "arms": [_arm_data(arm, arms[0]) for arm in arms],
    }


# --- the figure ---------------------------------------------------------------------------------------------


def draw(arms: Sequence[Arm], options: argparse.Namespace) -> bytes:
    """The figure as PNG: loss curves left, their gap to BF16 right."""
    curves = [Curve(arm.label, colour, arm.losses) for arm, colour in zip(arms, cycle(COLOURS), strict=False)]
    return loss_and_gap(curves, "nats per byte", options.steps)


# --- main ---------------------------------------------------------------------------------------------------


def print_header(arms: Sequence[Arm], options: argparse.Namespace, text: Text, console: Console) -> None:
    """What is compared, and on what."""
    parameters = sum(p.numel() for p in make_llama(options).parameters())
    seen = options.steps * options.batch * options.sequence
    precision = "fp32 weights under bf16 autocast" if options.dtype == "bfloat16" else "all in fp32"
    console.print(
        f"[bold]Pre-training in {', '.join(arm.label for arm in arms)}[/]\n"
        "same   initial weights, batches, optimiser; only the backend of torch.compile differs\n"
        f"model  Llama, {options.layers} layers, width {options.dim}, {parameters / 1e6:.2f} M parameters, "
        f"{precision}\n"
        f"text   {text.source}, {len(text.train) / 1e6:.1f} MB\n"
        f"run    {options.steps} steps of {options.batch} × {options.sequence} bytes: {seen / 1e6:.2f} M "
        f"bytes, {seen / len(text.train):.2g} epochs\n"
        f"on     {machine_name(options.device)}\n",
        highlight=False,
    )


def compare(options: argparse.Namespace, console: Console) -> None:
    """Check everything, train every arm, print and write the results."""
    device = pick_device(options.device)
    options.device, options.dtype = str(device), pick_dtype(options.dtype, device)
    if device.type == "cpu":
        make_deterministic()  # on CUDA it costs time, and CUDA graphs refuse some of its kernels
    recipes = resolve_recipes(options.recipes)
    check_widths(options, recipes)
    text = read_text(options.text, options.sequence)
    check_folder(options.out)
    arms = make_arms(recipes, options.dtype)
    print_header(arms, options, text, console)
    train(arms, options, text, console)
    console.print()
    console.print(result_table(arms))
    for arm in arms[1:]:
        console.print(kept(arm), highlight=False)
    console.print(HOW_TO_READ)
    figure, data = draw(arms, options), results(arms, options, text)
    write_atomically(options.out / "pretrain.json", json.dumps(data, indent=1, allow_nan=False).encode())
    write_atomically(options.out / "pretrain.png", figure)
    console.print(f"wrote {options.out}/pretrain.png and pretrain.json", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse_options(arguments)
    try:
        console = Console()
        compare(options, console if console.is_terminal else Console(width=WIDTH))
    except (BadInput, FP4ValueError, FP4TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
