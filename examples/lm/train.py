"""Training of one arm, which can be stopped after any step and goes on bit for bit.

The arms of a seed may branch off one trunk: its first steps, in BF16, made once and shared by all of them. While the
loss falls fast, a small change moves the time of the fall, and that outweighs what a format costs; behind the fall,
arms that begin at the same weights, optimiser and batches stay close, and their differences can be told from noise.

A step is a function of its number, the seed and what the checkpoint holds (weights, optimiser): its batch and the
random numbers of its graphs (stochastic rounding draws its seed from torch's generator) are drawn from (seed, step).
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import fp4compile
from fp4compile import Schedule
from fp4compile.files import write_atomically
from lm.arms import Arm
from lm.corpus import Batches, Corpus, mixed, windows_at
from lm.machine import BadInput, machine_name, synchronise
from lm.model import Shape, learning_rate, make_model, make_optimizer

FLOOR = 0.05  # of the learning rate, at the end
HELD_OUT_WINDOWS = 1024
_READ = 20  # steps between two looks at the losses: each waits for the device


@dataclass(frozen=True)
class Settings:
    """What all arms of a study share. Two results can be compared where this is equal, the seed and the arm apart.

    Attributes:
        model: name of the model, "dense" or "moe".
        shape: its sizes.
        steps, batch: windows of `shape.sequence` tokens in a step.
        micro: windows at a time; a step adds up the gradients of batch / micro graphs.
        lr: peak learning rate.
        dtype: "bfloat16" (fp32 weights, bf16 autocast) or "float32".
        corpus: digest of the tokens.
        device: torch device.
        backend, mode, strict: options of `torch.compile(backend="fp4compile")`.
        deterministic: whether kernels without atomics were asked for.
        branch: fraction of the steps that all arms of a seed share, in BF16; 0 to train every arm from scratch.
    """

    model: str
    shape: Shape
    steps: int
    batch: int
    micro: int
    lr: float
    dtype: str
    corpus: str
    device: str
    backend: str = "auto"
    mode: str = "default"
    strict: bool = True
    deterministic: bool = False
    branch: float = 0.0

    @property
    def first(self) -> int:
        """The step at which the arms of a seed part."""
        return round(self.branch * self.steps)

    def to_json(self) -> str:
        """As text, to compare."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Files:
    """Where an arm's results lie: the numbers, the weights that the probe reads, and the state of an unfinished run."""

    folder: Path
    stem: str

    @property
    def result(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def weights(self) -> Path:
        return self.folder / f"{self.stem}.safetensors"

    @property
    def state(self) -> Path:
        return self.folder / f"{self.stem}.state"


def files_of_run(folder: Path, model: str, arm: Arm, seed: int) -> Files:
    """The files of one arm and seed."""
    return Files(folder, f"{model}-{arm.slug}-s{seed}")


def files_of_trunk(folder: Path, model: str, seed: int) -> Files:
    """The files of what the arms of a seed share: a state alone."""
    return Files(folder, f"{model}-trunk-s{seed}")


def files_of_probe(folder: Path, model: str, arm: Arm, seed: int) -> Files:
    """The file of a seed's BF16 checkpoint in one recipe: a result alone."""
    return Files(folder, f"probe-{model}-{arm.slug}-s{seed}")


def steps_done(files: Files, settings: Settings) -> int:
    """How many steps the checkpoint has behind it, 0 without one; one of other settings is an error."""
    if not files.state.exists():
        return 0
    with safetensors.safe_open(files.state, "pt") as file:
        about = file.metadata()
    _same(files.state, about["settings"], settings)
    return int(about["done"])


def describe(settings: Settings, corpus: Corpus, command: str) -> dict[str, Any]:
    """What every result file says of how it was made."""
    return {
        "settings": asdict(settings),
        "command": command,
        "text": {
            "source": corpus.source,
            "train_tokens": len(corpus.train),
            "held_out_tokens": len(corpus.held_out),
            "bytes_per_token": corpus.bytes_per_token,
        },
        "machine": {
            "device": machine_name(settings.device),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "fp4compile": fp4compile.__version__,
        },
    }


def finished(files: Files, settings: Settings) -> bool:
    """Whether the result is there; one of other settings is an error."""
    if not files.result.exists():
        return False
    made = json.loads(files.result.read_text())["settings"]
    _same(files.result, json.dumps(made, sort_keys=True), settings)
    return True


def _same(path: Path, made: str, settings: Settings) -> None:
    ours, theirs = json.loads(settings.to_json()), json.loads(made)
    changed = [f"{key} {theirs.get(key)} there, {ours[key]} now" for key in ours if ours[key] != theirs.get(key)]
    if changed:
        raise BadInput(f"{path} was made with other settings ({', '.join(changed)}); use another --out, or remove it")


def forward(compiled: Callable[..., Tensor], window: Tensor, settings: Settings) -> Tensor:
    """Loss of windows [batch, sequence + 1]: fp32 weights, the arithmetic that the settings name.

    What a graph returned before may be overwritten: modes with CUDA graphs keep their outputs in one place, and without
    the mark a forward that no backward follows would be recorded anew each time.
    """
    device = torch.device(settings.device)
    torch.compiler.cudagraph_mark_step_begin()
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        return compiled(window[:, :-1], window[:, 1:])


def compile_options(settings: Settings) -> dict[str, Any]:
    """`options` of `torch.compile(backend="fp4compile")`, without the recipe."""
    return {"backend": settings.backend, "mode": settings.mode, "strict": settings.strict}


class Trainer:
    """One arm's compiled model; trains it from scratch for any seed."""

    def __init__(self, arm: Arm, settings: Settings, corpus: Corpus, about: Mapping[str, Any]) -> None:
        self.arm, self.settings, self.about = arm, settings, about
        self.device = torch.device(settings.device)
        self.train_tokens, self.held_out_tokens = corpus.train.to(self.device), corpus.held_out.to(self.device)
        self.model = make_model(settings.shape, 0).to(self.device)
        # One graph, or an error: eager layers would be BF16 without a word.
        self.schedule = Schedule(
            self.model,
            arm.precisions,
            settings.steps,
            options=compile_options(settings),
            fullgraph=True,
            dynamic=False,
        )
        self.report: dict[str, Any] | None = None
        self.compile_seconds = self._compile()

    def _compile(self) -> float:
        """Run every precision once, so that no step of the training draws random numbers beside a compiler."""
        started = time.perf_counter()
        window = Batches(self.train_tokens, self.settings.shape.sequence, self.settings.micro, 0).at(0)
        for step, recipe in self.schedule.precisions.items():
            forward(self.schedule.at(step), window, self.settings).backward()
            report = fp4compile.last_report() if recipe else None
            if report:
                sites = {status: report.count(status) for status in ("fp4", "kept", "refused")}
                reasons = sorted({site.reason for site in report.sites if site.reason})
                self.report = {"fp4_share": report.fp4_share, "gemms": sites, "reasons": reasons, "notes": report.notes}
            self.model.zero_grad()  # under CUDA graphs gradients lie where the next precision's graphs write
        synchronise(self.device)
        return time.perf_counter() - started

    def train(
        self,
        seed: int,
        files: Files,
        advance: Callable[[int, float], None],
        save_every: int,
        stop: Callable[[int], bool],
        trunk: Files | None = None,
        last: int | None = None,
    ) -> bool:
        """Train one seed, or go on with it; whether it came to its end.

        Args:
            advance: is told the number of steps done and the latest loss.
            save_every: steps between two checkpoints.
            stop: is asked after each step, by its number of steps done, whether to save and leave.
            trunk: where to begin; without it, at the seed's initial weights.
            last: number of steps to end at with a checkpoint instead of a result, which makes a trunk.
        """
        run = _Run(self, seed, files)
        done = run.begin(trunk)
        end = last or self.settings.steps
        clock = time.perf_counter() - run.seconds
        while done < end:
            run.step(done)
            done += 1
            leave = done < end and stop(done)
            if done % _READ == 0 or done == end or leave:
                latest = run.losses[done - 1].item()
                advance(done, latest)
                if not math.isfinite(latest):
                    break
            if leave or done % save_every == 0 or done == last:
                run.seconds = time.perf_counter() - clock
                run.save(done)
            if leave:
                return False
        if last is not None:
            return True
        synchronise(self.device)
        run.seconds = time.perf_counter() - clock
        run.finish(done)
        return True


class _Run:
    """One seed of an arm: what changes from step to step."""

    def __init__(self, trainer: Trainer, seed: int, files: Files) -> None:
        self.trainer, self.seed, self.files, self.settings = trainer, seed, files, trainer.settings
        self.model = trainer.model
        self.model.load_state_dict(make_model(self.settings.shape, seed).state_dict())
        self.optimizer = make_optimizer(self.model, self.settings.lr)
        self.batches = Batches(trainer.train_tokens, self.settings.shape.sequence, self.settings.batch, seed)
        self.losses = torch.full((self.settings.steps,), math.nan, device=trainer.device)
        self.seconds, self.first = 0.0, 0
        # Gradients that add up over several graphs lie outside the graphs' memory, which the next one overwrites.
        self.adds_up = self.settings.micro < self.settings.batch
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if self.adds_up else None

    def begin(self, trunk: Files | None) -> int:
        """Go to the run's checkpoint, else to the trunk's, where there is one; the number of steps done."""
        if trunk is not None:
            self.first = self.settings.first
        if self.files.state.exists() or trunk is None:
            return self.load(self.files)
        done = self.load(trunk)
        if done != self.first:
            raise BadInput(f"{trunk.state}: {done} of {self.first} steps; train the bf16 arm with this --branch first")
        shared = self.losses[:done].tolist()
        for path in sorted(trunk.folder.glob(f"{self.settings.model}-*-s{self.seed}.json")):
            if json.loads(path.read_text())["losses"][:done] != shared:
                raise BadInput(
                    f"{path} branched off another trunk than {trunk.state}; use another --out, or remove one"
                )
        self.seconds = 0.0
        return done

    def step(self, step: int) -> None:
        """One optimiser step."""
        settings, share = self.settings, self.settings.micro / self.settings.batch
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * learning_rate(step, settings.steps, FLOOR)
        torch.manual_seed(mixed(self.seed, step))
        compiled = self.trainer.schedule.at(step)
        losses = []
        for window in self.batches.at(step).split(settings.micro):
            loss = forward(compiled, window, settings)
            (loss * share).backward()
            losses.append(loss.detach().clone())
        self.losses[step] = torch.stack(losses).mean()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.adds_up)

    def held_out(self) -> float:
        """Loss on evenly spaced windows of the held-out text, in the precision of the last step.

        Gradients stay enabled: the training graph runs without its backward half, and no other is compiled.
        """
        settings, tokens = self.settings, self.trainer.held_out_tokens
        sequence, micro = settings.shape.sequence, settings.micro
        wanted = min(HELD_OUT_WINDOWS, max(1, (len(tokens) - 1) // sequence))
        starts = torch.linspace(0, len(tokens) - sequence - 1, -(-wanted // micro) * micro).long().to(tokens.device)
        compiled = self.trainer.schedule.at(settings.steps - 1)
        torch.manual_seed(0)
        losses = [
            forward(compiled, windows_at(tokens, part, sequence), settings).detach().clone()
            for part in starts.split(micro)
        ]
        return torch.stack(losses).mean().item()

    def save(self, done: int) -> None:
        """Write everything that the next step depends on; tensors and plain text, nothing pickled."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        tensors["losses"] = self.losses
        about = {"settings": self.settings.to_json(), "done": str(done), "seconds": str(self.seconds)}
        write_atomically(self.files.state, safetensors.torch.save({k: v.cpu() for k, v in tensors.items()}, about))

    def load(self, files: Files) -> int:
        """Go back to a checkpoint, if there is one; the number of steps done."""
        done = steps_done(files, self.settings)
        if not done:
            return 0
        with safetensors.safe_open(files.state, "pt") as file:
            self.seconds = float(file.metadata()["seconds"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        self.losses.copy_(tensors["losses"])
        return done

    def finish(self, done: int) -> None:
        """Write the result, and the weights of a BF16 arm for the probe; the checkpoint goes."""
        trainer, settings = self.trainer, self.settings
        losses = self.losses[:done].tolist()
        per_step = settings.batch * settings.shape.sequence
        result = {
            "kind": "train",
            "model": settings.model,
            "arm": trainer.arm.name,
            "seed": self.seed,
            "recipe": trainer.arm.recipe.to_dict() if trainer.arm.recipe else None,
            "switch": trainer.arm.switch,
            **trainer.about,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "report": trainer.report,
            "seconds": self.seconds,
            "compile_seconds": trainer.compile_seconds,
            "tokens": done * per_step,
            "tokens_per_second": (done - self.first) * per_step / self.seconds,
            "diverged": not all(map(math.isfinite, losses)),
            "held_out_loss": _finite(self.held_out()),
            "losses": [_finite(loss) for loss in losses],
        }
        if trainer.arm.recipe is None:
            weights = {name: value.cpu() for name, value in self.model.state_dict().items()}
            about = {"settings": settings.to_json(), "seed": str(self.seed)}
            write_atomically(self.files.weights, safetensors.torch.save(weights, about))
        write_atomically(self.files.result, json.dumps(result, allow_nan=False).encode())
        self.files.state.unlink(missing_ok=True)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
