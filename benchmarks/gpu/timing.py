"""Timing on a CUDA device: cases that take turns, events around work enqueued ahead, graphs of small kernels."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu.sheet import reason

Run = Callable[[], object]
# Milliseconds. What takes longer is not a kernel but a reference in many of them: named, and not waited for.
SLOWEST_CALL = 10.0
_LEAST_ROUNDS = 3


def turns(runs: Sequence[Run], rounds: int, seconds: float, calls: int = 1) -> list[list[float]]:
    """Milliseconds of a call of every run in every round.

    In a turn a run is called `calls` times untimed, then as often timed, back to back. A device under load lowers its
    clock to keep to its power and temperature, and takes about a tenth of a second to settle: what follows a hungry
    neighbour at once is timed at the neighbour's clock. (One call a turn in a fixed order made the training step behind
    BF16's 5 ms longer than its kernels.) The order is drawn anew for every round, from a fixed seed, so that what is
    left of the neighbour's influence falls on everybody.

    Nothing is waited for within a round, so that the host is ahead of the device, and the untimed calls hide the first
    launches on an idle device.

    Args:
        seconds: no round begins after them, once there were three.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    shuffled = random.Random(0)
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        marks: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        for index in shuffled.sample(range(len(runs)), len(runs)):
            _called(runs[index], calls)
            marks[index] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            marks[index][0].record()
            _called(runs[index], calls)
            marks[index][1].record()
        torch.cuda.synchronize()
        for index, (before, after) in marks.items():
            times[index].append(before.elapsed_time(after) / calls)
    return times


def _called(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()


def once(run: Run) -> float:
    """Milliseconds of one call that starts on an idle device, the host's share included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def graphed(runs: Sequence[Run], calls: int, pool: Any = None) -> Run:
    """`calls` calls, taking the runs in turn, as one CUDA graph; returns its replay.

    Args:
        pool: memory that it shares with other graphs, where nobody reads what one leaves behind.
    """
    ahead = torch.cuda.Stream()
    ahead.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(ahead):
        for _ in range(2):  # compiles, chooses a configuration, fills caches
            runs[0]()
    torch.cuda.current_stream().wait_stream(ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for number in range(calls):
            runs[number % len(runs)]()
    return graph.replay


def _refuse_slow(run: Run) -> None:
    run()
    spent = once(run)
    if spent > SLOWEST_CALL:
        raise TimeoutError(f"one call takes {spent:.0f} ms, more than {SLOWEST_CALL:.0f}: no kernel of its own runs it")


def compare(
    cases: Mapping[str, Sequence[Run]], calls: int, rounds: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time cases against each other in graphs of `calls` calls.

    Returns:
        Milliseconds of a call in every round, by case; and why the other cases did not run.
    """
    replays: dict[str, Run] = {}
    errors: dict[str, str] = {}
    pool = torch.cuda.graph_pool_handle()
    for name, runs in cases.items():
        try:
            _refuse_slow(runs[0])
            replays[name] = graphed(runs, calls, pool)
        except Exception as error:  # a kernel or a peer may fail in any way; the table says how
            errors[name] = reason(error)
    times = turns(list(replays.values()), rounds, seconds)
    return {name: [ms / calls for ms in found] for name, found in zip(replays, times, strict=True)}, errors


def host_microseconds(run: Run, calls: int = 200) -> float:
    """What one call costs the host, nothing waited for."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / calls * 1e6
