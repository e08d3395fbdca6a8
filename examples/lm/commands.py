"""Commands that run for long: left by a signal or in time, run side by side, and watched through their logs."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

UNFINISHED = 3  # exit status of a command that saved and left
PATIENCE = 3.0  # seconds after which a second signal ends a command at once; one Ctrl-C may come as two
WORDS = {0: "done", UNFINISHED: "not finished"}
LINE = "step {}/{} loss {:.4f}"  # what a child tells the command that watches it


class Leave:
    """Whether to save and leave: after --minutes, or when asked to by a signal while in its context."""

    def __init__(self, minutes: float | None) -> None:
        self.deadline = time.monotonic() + 60 * minutes if minutes else None
        self.asked, self._first = False, 0.0

    def __enter__(self) -> Leave:
        self._before = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, *_: object) -> None:
        if self.asked and time.monotonic() > self._first + PATIENCE:  # while something compiles, nobody looks
            sys.exit(UNFINISHED)
        if not self.asked:
            self.asked, self._first = True, time.monotonic()

    @property
    def minutes_left(self) -> float:
        """Until the deadline, if there is one."""
        return math.inf if self.deadline is None else max(0.01, (self.deadline - time.monotonic()) / 60)

    def __call__(self, step: int) -> bool:
        return self.asked or (self.deadline is not None and time.monotonic() > self.deadline)


def bars(console: Console) -> Progress:
    """Progress bars, one per arm; a log gets lines instead."""
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        disable=not console.is_terminal,
    )


def run_all(
    commands: Mapping[str, list[str]],
    out: Path,
    jobs: int,
    minutes: float | None,
    console: Console,
    first: Container[str] = (),
) -> dict[str, int]:
    """Run commands in processes of their own.

    Args:
        commands: name -> command, in the order in which they begin; each takes --minutes.
        out: folder of their logs.
        jobs: how many run at a time.
        minutes: when to ask all of them to leave.
        console: where bars, or lines, say how far they are.
        first: names of commands without which the others are worth nothing, and which they may wait for.

    Returns:
        The exit status of each by its name.
    """
    with bars(console) as progress, Leave(minutes) as ended, ThreadPoolExecutor(jobs) as pool:
        tasks = {name: progress.add_task(name, total=None, note="waiting") for name in commands}

        def one(name: str) -> int:
            if ended(0):
                return UNFINISHED
            left = ["--minutes", f"{ended.minutes_left:.2f}"] if minutes else []
            started = time.monotonic()
            status = watch(commands[name] + left, out / log_name(name), partial(progress.update, tasks[name]), ended)
            if status and name in first:
                ended.asked = True
            word = WORDS.get(status, "failed")
            progress.update(tasks[name], note=word)
            if not console.is_terminal:
                console.print(f"{name}: {word} in {time.monotonic() - started:.0f} s", highlight=False)
            return status

        statuses = dict(zip(commands, pool.map(one, commands), strict=True))
    for name, status in statuses.items():
        if status not in WORDS:
            console.print(f"{name} failed: see {out / log_name(name)}", highlight=False, soft_wrap=True)
    return statuses


def log_name(name: str) -> str:
    """The log of a child."""
    return re.sub(r"[^\w.-]", "_", name) + ".log"


def watch(command: list[str], path: Path, update: Callable[..., None], ended: Leave) -> int:
    """Run a command with its output in a log, and show the steps that it writes there; its exit status.

    The log is a file and no pipe: a compiler's worker that outlives a killed command would keep a pipe open.
    """
    asked = False
    with path.open("w") as log, path.open() as lines:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        update(note="starting")
        while True:
            status = child.poll()  # first, so that the last lines are read as well
            for line in lines:
                match = re.match(r"step (\d+)/(\d+) loss (\S+)\n", line)
                if match:
                    update(completed=int(match[1]), total=int(match[2]), note=f"loss {match[3]}")
            if status is not None:
                return status
            if ended.asked and not asked:
                asked = True
                child.terminate()  # it saves and leaves
            time.sleep(0.2)
