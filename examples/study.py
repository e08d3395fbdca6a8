"""The study: a language model pre-trained in BF16 and in FP4, in pairs of one seed, and what the difference is.

    python examples/study.py run --plan quick --out out/study               # every arm of a plan that is not done yet
    python examples/study.py train --arm hif4 --seed 0 1 --out out/study    # one arm
    python examples/study.py probe --out out/study                          # BF16 checkpoints, in FP4 without training
    python examples/study.py report --results out/study --out docs/study    # tables, figures, one page

With --branch 0.5 all arms of a seed share the first half of the steps, in BF16, and part there: the time at which the
loss falls fast differs from run to run, and hides in arms trained from scratch what a format costs.
Each arm leaves a small file, so a study can be made by many commands, on several machines. A command that was killed
goes on from its last checkpoint when it is given again, bit for bit. `--help` behind a verb lists its options. From a
bare checkout, with nothing installed: PYTHONPATH=. python examples/study.py ...
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lm.arms import PLANS, PROBED, Arm, check_widths, make_arm
from lm.commands import LINE, UNFINISHED, WORDS, Leave, bars, run_all
from lm.corpus import Corpus, check_length, load_corpus
from lm.machine import BadInput, check_folder, make_deterministic, pick_device, pick_dtype, positive
from lm.model import Shape
from lm.probe import Probe, load_checkpoint
from lm.report import markdown_table, write_report
from lm.results import read_study
from lm.tables import all_claims, loss_table
from lm.train import (
    Files,
    Settings,
    Trainer,
    describe,
    files_of_probe,
    files_of_run,
    files_of_trunk,
    finished,
    steps_done,
)
from rich.console import Console
from torch import nn

from fp4compile import Schedule
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.files import write_atomically

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Model -> sizes that --layers and the like may change. The two experts of a token do the work of one block of 1024.
MODELS: dict[str, dict[str, int]] = {
    "dense": {"layers": 6, "dim": 384, "heads": 6, "ff": 1024, "experts": 0},
    "moe": {"layers": 6, "dim": 384, "heads": 6, "ff": 512, "experts": 8},
}


# --- options ---------------------------------------------------------------------------------------------------------


def fraction(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def seed_number(text: str) -> int:
    """An argparse type: what seeds random numbers and stands in file names."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be in [0, 2**63), got {text}")
    return value


def _text_options(parser: argparse.ArgumentParser) -> None:
    count, number = positive(int), positive(float)
    add = parser.add_argument
    add("--text", type=Path, default=None, help="file (.xz too) or folder; without it, the installed Python packages")
    add("--max-mb", type=number, default=200.0, help="megabytes of text at most (%(default)s)")
    # The head stays in BF16. With 2048 tokens it has 7% of the FLOPs of the model below, as in a large model.
    add("--vocabulary", type=count, default=2048, help="tokens of the tokenizer that is trained on it (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="around FP4; bf16 where that is fast",
    )
    add("--backend", default="auto", help="backend of fp4compile (%(default)s)")
    add("--compile-mode", choices=MODES, default="default", help="mode of torch.compile")
    add("--allow-fallback", action="store_true", help="train also where a GEMM that the recipe names cannot be FP4")
    add("--micro", type=count, default=None, help="windows at a time; by default all of a step (gradients add up)")
    add(
        "--no-deterministic",
        dest="deterministic",
        action="store_false",
        help="other bits each time, on CUDA and on several threads of a CPU",
    )
    add("--out", type=Path, default=Path(__file__).parent / "out" / "study", help="folder of results and checkpoints")


def _training_options(parser: argparse.ArgumentParser) -> None:
    _text_options(parser)
    count, number = positive(int), positive(float)
    add = parser.add_argument
    for name in ("layers", "dim", "heads", "ff"):
        add(f"--{name}", type=count, default=None, help="of the model; by default as --model says")
    add("--sequence", type=count, default=512, help="tokens of a window (%(default)s)")
    add("--lr", type=number, default=1e-3, help="peak learning rate (%(default)s)")
    add(
        "--branch",
        type=fraction,
        default=None,
        help="fraction of the steps that all arms share, in BF16 (the plan's, or 0)",
    )
    add("--save-every", type=count, default=250, help="steps between two checkpoints (%(default)s)")
    add("--minutes", type=number, default=None, help="save and leave after so long; the same command goes on")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="train | run | probe | report")

    train = verbs.add_parser("train", help="one arm, one seed or several", allow_abbrev=False)
    train.add_argument(
        "--arm", required=True, help="bf16, a recipe, a TOML file; +rht, +sr, +tf, +2d, +nopts change it"
    )
    train.add_argument("--switch", type=float, default=None, help="BF16 from this fraction of the steps on")
    train.add_argument(
        "--seed", type=seed_number, nargs="+", default=[0], help="of weights, batches and stochastic rounding"
    )
    train.add_argument("--model", choices=MODELS, default="dense", help="what is trained (%(default)s)")
    train.add_argument("--steps", type=positive(int), default=3000, help="optimiser steps (%(default)s)")
    train.add_argument("--batch", type=positive(int), default=128, help="windows of a step (%(default)s)")
    train.add_argument("--wait", action="store_true", help="for the bf16 arm, which makes what --branch shares")
    _training_options(train)

    run = verbs.add_parser("run", help="every arm of a plan that is not done yet", allow_abbrev=False)
    plans = "; ".join(
        f"{name}: {plan.about}, {plan.steps} steps of {plan.batch} windows"
        + (f", the first {plan.branch:.0%} shared" if plan.branch else "")
        for name, plan in PLANS.items()
    )
    run.add_argument("--plan", choices=PLANS, default="quick", help=plans.replace("%", "%%"))
    run.add_argument("--arms", nargs="+", default=None, help="these arms only, of the plan or not")
    run.add_argument("--seeds", type=seed_number, nargs="+", default=None, help="these seeds instead of the plan's")
    run.add_argument("--models", nargs="+", choices=MODELS, default=None, help="these models of the plan only")
    run.add_argument("--steps", type=positive(int), default=None, help="optimiser steps instead of the plan's")
    run.add_argument("--batch", type=positive(int), default=None, help="windows of a step instead of the plan's")
    run.add_argument("--jobs", type=positive(int), default=1, help="arms that are trained at a time (%(default)s)")
    _training_options(run)

    probe = verbs.add_parser("probe", help="trained BF16 checkpoints in FP4, without training", allow_abbrev=False)
    probe.add_argument("--checkpoint", type=Path, nargs="+", default=None, help="by default every BF16 one in --out")
    probe.add_argument("--arms", nargs="+", default=[*PROBED], help="recipes; :forward, :dgrad, :wgrad for one role")
    probe.add_argument("--batches", type=positive(int), default=8, help="of the held-out text (%(default)s)")
    probe.add_argument("--jobs", type=positive(int), default=1, help="processes that share the arms (%(default)s)")
    probe.add_argument("--minutes", type=positive(float), default=None, help="leave after so long")
    _text_options(probe)

    report = verbs.add_parser("report", help="tables, figures and a page from results", allow_abbrev=False)
    results = Path(__file__).parent / "out" / "study"
    report.add_argument("--results", type=Path, default=results, help="folder of result files (%(default)s)")
    report.add_argument("--out", type=Path, default=Path("docs") / "study", help="folder of the pages (%(default)s)")
    return parser.parse_args(arguments)


def command_line(arguments: Sequence[str] | None) -> str:
    """The command as it can be given again."""
    return shlex.join(["python", "examples/study.py", *(sys.argv[1:] if arguments is None else arguments)])


def fill(options: argparse.Namespace) -> None:
    """Put what the options leave open in its place."""
    device = pick_device(options.device)
    options.device, options.dtype = str(device), pick_dtype(options.dtype, device)


def fill_training(options: argparse.Namespace) -> None:
    """The same for training."""
    fill(options)
    for name, size in MODELS[options.model].items():
        if getattr(options, name, None) is None:
            setattr(options, name, size)
    options.micro, options.branch = options.micro or options.batch, options.branch or 0.0
    if options.branch and not 0 < round(options.branch * options.steps) < options.steps:
        raise BadInput(f"--branch {options.branch:g} of --steps {options.steps} leaves no step to one of both parts")
    if options.batch % options.micro:
        raise BadInput(f"--micro {options.micro} does not divide --batch {options.batch}")


def settings_of(options: argparse.Namespace, corpus: Corpus) -> Settings:
    """What the results of all arms must agree in."""
    names = ("layers", "dim", "heads", "ff", "sequence", "experts")
    return Settings(
        options.model,
        Shape(options.vocabulary, **{name: getattr(options, name) for name in names}),
        options.steps,
        options.batch,
        options.micro,
        options.lr,
        options.dtype,
        corpus.digest,
        options.device,
        options.backend,
        options.compile_mode,
        not options.allow_fallback,
        options.deterministic,
        options.branch,
    )


# --- train -----------------------------------------------------------------------------------------------------------


def checked_arm(options: argparse.Namespace) -> Arm:
    """The arm that a `train` command names, once its options are filled in and all that needs no text is checked."""
    arm = make_arm(options.arm, options.switch)
    if len(set(options.seed)) < len(options.seed):
        raise BadInput(f"--seed {' '.join(map(str, options.seed))} names a seed twice")
    fill_training(options)
    check_widths(options, [arm.recipe] if arm.recipe else [])
    Schedule(nn.Identity(), arm.precisions, options.steps, options={"backend": options.backend})
    return arm


def train(options: argparse.Namespace, command: str, console: Console) -> int:
    """Train the seeds of one arm that are not done yet."""
    arm = checked_arm(options)
    check_folder(options.out)
    corpus = load_corpus(options.text, options.max_mb, options.vocabulary, options.out)
    check_length(corpus, options.sequence, options.batch, options.steps)
    settings = settings_of(options, corpus)
    legs = legs_of(options, arm, settings)
    for seed in options.seed:
        if all(leg.seed != seed for leg in legs):
            console.print(f"{arm.name}, seed {seed}: done already", highlight=False)
    if not legs:
        return 0
    if options.deterministic:
        make_deterministic()
    total = sum(leg.last - leg.first for leg in legs)
    with bars(console) as progress, Leave(options.minutes) as leave:
        task = progress.add_task(f"{options.model} {arm.name}", total=total, note="compiling")
        trainer = Trainer(arm, settings, corpus, describe(settings, corpus, command))
        before = 0  # steps of the legs that are done
        for leg in legs:

            def advance(done: int, loss: float, offset: int = before - leg.first, seed: int = leg.seed) -> None:
                progress.update(task, completed=offset + done, note=f"seed {seed} loss {loss:.3f}")
                if not console.is_terminal:
                    print(LINE.format(offset + done, total, loss), flush=True)

            if options.wait and not wait_for(leg, settings, leave):
                return UNFINISHED
            last = leg.last if leg.last < settings.steps else None
            if not trainer.train(leg.seed, leg.files, advance, options.save_every, leave, leg.trunk, last):
                console.print(f"{arm.name}, seed {leg.seed}: saved; the same command goes on", highlight=False)
                return UNFINISHED
            before += leg.last - leg.first
    return 0


@dataclass(frozen=True)
class Leg:
    """What is left to do of a seed, from step `first` to step `last`: a trunk, or what branches off one."""

    seed: int
    files: Files
    trunk: Files | None
    first: int
    last: int


def legs_of(options: argparse.Namespace, arm: Arm, settings: Settings) -> list[Leg]:
    """The trunks of all seeds, for which others may wait, then the arm's own steps; BF16 makes trunks.

    Raises:
        BadInput: there is no trunk to branch off, and nobody to wait for.
    """
    first, trunks, arms = settings.first, [], []
    for seed in options.seed:
        files, trunk = files_of_run(options.out, options.model, arm, seed), None
        if first:
            trunk = files_of_trunk(options.out, options.model, seed)
            missing = steps_done(trunk, settings) < first
            if missing and arm.recipe is None:
                trunks.append(Leg(seed, trunk, None, 0, first))
            elif missing and not options.wait:
                raise BadInput(
                    f"{trunk.state}: no checkpoint of {first} steps to branch off; train --arm bf16 first, or --wait"
                )
        if not finished(files, settings):
            arms.append(Leg(seed, files, trunk, first, settings.steps))
    return [*trunks, *arms]


def wait_for(leg: Leg, settings: Settings, leave: Leave) -> bool:
    """Wait for the leg's trunk; False if it is time to leave."""
    while leg.trunk is not None and steps_done(leg.trunk, settings) < leg.first:
        if leave(0):
            return False
        time.sleep(0.5)
    return True


# --- run -------------------------------------------------------------------------------------------------------------


def children(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name and words of each `train` command of a plan; an arm of two parts has the seeds of the first."""
    plan = PLANS[options.plan]
    shared = ["--steps", str(options.steps), "--batch", str(options.batch), "--out", str(options.out)]
    shared += _text_flags(options)
    for name in ("layers", "dim", "heads", "ff", "sequence", "lr", "branch", "save_every"):
        shared += _flag(options, name)
    found: dict[str, list[str]] = {}
    for part in plan.parts:
        if options.models is None or part.model in options.models:
            arms = sorted(options.arms or part.arms, key=lambda arm: arm != "bf16")  # makes what others wait for
            for arm in arms:
                seeds = map(str, options.seeds or part.seeds)
                what = ["train", "--model", part.model, "--arm", arm, "--seed", *seeds]
                wait = ["--wait"] if options.branch and f"{part.model} bf16" in found else []
                found.setdefault(f"{part.model} {arm}", [sys.executable, __file__, *what, *shared, *wait])
    return found


def _text_flags(options: argparse.Namespace) -> list[str]:
    names = ("text", "max_mb", "vocabulary", "device", "dtype", "backend", "compile_mode", "micro")
    flags = [flag for name in names for flag in _flag(options, name)]
    return flags + ["--allow-fallback"] * options.allow_fallback + ["--no-deterministic"] * (not options.deterministic)


def _flag(options: argparse.Namespace, name: str) -> list[str]:
    value = getattr(options, name)
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def run(options: argparse.Namespace, console: Console) -> int:
    """Train every arm of a plan, each in a process of its own."""
    plan = PLANS[options.plan]
    options.steps, options.batch = options.steps or plan.steps, options.batch or plan.batch
    options.branch = plan.branch if options.branch is None else options.branch
    found = children(options)
    for command in found.values():
        checked_arm(parse_options(command[2:]))
    check_folder(options.out)
    with console.status("reading and tokenising the text"):
        corpus = load_corpus(options.text, options.max_mb, options.vocabulary, options.out)
    check_length(corpus, options.sequence, options.batch, options.steps)
    console.print(
        f"{corpus.source}: {len(corpus.train) / 1e6:.1f} M training tokens, {corpus.bytes_per_token:.2f} bytes each",
        highlight=False,
    )
    first = {f"{model} bf16" for model in MODELS}
    statuses = run_all(found, options.out, options.jobs, options.minutes, console, first)
    console.print(f"{sum(not s for s in statuses.values())} of {len(statuses)} arms are done", highlight=False)
    return 1 if set(statuses.values()) - WORDS.keys() else max(statuses.values())


# --- probe and report ------------------------------------------------------------------------------------------------


def probe(options: argparse.Namespace, command: str, console: Console) -> int:
    """Measure BF16 checkpoints in each recipe that they were not measured in yet."""
    options.arms = list(dict.fromkeys(options.arms))
    arms = [make_arm(name) for name in options.arms]
    if any(arm.recipe is None or arm.switch is not None for arm in arms):
        raise BadInput("the probe compares recipes with BF16: --arms takes neither bf16 nor a switch")
    fill(options)
    paths = options.checkpoint or sorted(options.out.glob("*-bf16-s*.safetensors"))
    if not paths:
        raise BadInput(f"--out {options.out}: no checkpoint of a bf16 arm there; train one, or name it by --checkpoint")
    check_folder(options.out)
    loaded = {path: load_checkpoint(path) for path in paths}
    corpora, known = {}, {}
    for path, (_, trained, seed) in loaded.items():
        other = known.setdefault((trained.model, seed), path)
        if other != path:
            raise BadInput(
                f"{path} and {other} are both checkpoints of {trained.model}, seed {seed}; probe one of them"
            )
        corpora[path] = load_corpus(options.text, options.max_mb, trained.shape.vocabulary, options.out)
        if corpora[path].digest != trained.corpus:
            raise BadInput(f"{path} was trained on another text; give the --text, --max-mb and --out of its training")
    if min(options.jobs, len(arms)) > 1:
        return probe_in_shares(options, console)
    if options.deterministic:
        make_deterministic()
    probes: dict[tuple[str, ...], Probe] = {}
    with Leave(options.minutes) as leave:
        for path, (state, trained, seed) in loaded.items():
            settings, corpus = probe_settings(options, trained), corpora[path]
            files = {arm.name: files_of_probe(options.out, settings.model, arm, seed) for arm in arms}
            todo = [arm for arm in arms if not finished(files[arm.name], settings)]
            total, started = options.batches * len(todo), time.monotonic()
            with bars(console) as progress:
                task = progress.add_task(path.stem, total=total, note=f"{len(todo)} recipes")

                def advance(done: int, loss: float, total: int = total, task: Any = task) -> None:
                    progress.update(task, completed=done, note=f"loss {loss:.3f}")
                    if not console.is_terminal:
                        print(LINE.format(done, total, loss), flush=True)

                key = (settings.to_json(), *(arm.name for arm in todo))  # checkpoints of one model share its graphs
                if todo and key not in probes:
                    probes[key] = Probe(todo, corpus, settings, options.batches)
                found = probes[key].measure(state, advance, leave) if todo else {}
            if found is None:
                return UNFINISHED
            for name, rows in found.items():
                result = {"kind": "probe", "model": settings.model, "seed": seed, "arms": {name: rows}}
                result |= {**describe(settings, corpus, command), "seconds": time.monotonic() - started}
                write_atomically(files[name].result, json.dumps(result).encode())
            console.print(f"{path.stem}: {len(todo)} of {len(arms)} recipes measured", highlight=False, soft_wrap=True)
    return 0


def probe_in_shares(options: argparse.Namespace, console: Console) -> int:
    """Measure the arms in --jobs processes, each with every n-th of them."""
    shared = ["--batches", str(options.batches), "--out", str(options.out), *_text_flags(options)]
    if options.checkpoint:
        shared += ["--checkpoint", *map(str, options.checkpoint)]
    shares = [options.arms[first :: options.jobs] for first in range(min(options.jobs, len(options.arms)))]
    found = {f"probe {share[0]}": [sys.executable, __file__, "probe", "--arms", *share, *shared] for share in shares}
    statuses = run_all(found, options.out, options.jobs, options.minutes, console)
    return 1 if set(statuses.values()) - WORDS.keys() else max(statuses.values())


def probe_settings(options: argparse.Namespace, trained: Settings) -> Settings:
    """The settings of the training, on this device and with these options of compilation; steps are batches."""
    return replace(
        trained,
        steps=options.batches,
        batch=options.micro or min(trained.batch, 16),
        micro=options.micro or min(trained.batch, 16),
        dtype=options.dtype,
        device=options.device,
        backend=options.backend,
        mode=options.compile_mode,
        strict=not options.allow_fallback,
        deterministic=options.deterministic,
    )


def report(options: argparse.Namespace, console: Console) -> int:
    """Write the report, and print its tables."""
    study = read_study(options.results)
    check_folder(options.out)
    for model in study.models:
        if study.arms(model):
            console.print(markdown_table(loss_table(study, model)), highlight=False, soft_wrap=True)
        for claim in all_claims(study, model):
            console.print(f"- {model}, {claim.measure}: {claim.text}: {claim.answer}", highlight=False, soft_wrap=True)
    for path in write_report(study, options.out):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options, command = parse_options(arguments), command_line(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic kernels ask for
    console = Console()
    verbs = {
        "train": lambda: train(options, command, console),
        "run": lambda: run(options, console),
        "probe": lambda: probe(options, command, console),
        "report": lambda: report(options, console),
    }
    try:
        return verbs[options.verb]()
    except (BadInput, FP4ValueError, FP4TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
