"""Timing on a CUDA device: cases that take turns, events around work enqueued ahead, graphs of small kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu.sheet import reason

Run = Callable[[], object]
# Milliseconds. What takes longer is not a kernel but a reference in many of them: named, and not waited for.
SLOWEST_CALL = 10.0
_LEAST_ROUNDS = 3


def turns(runs: Sequence[Run], rounds: int, seconds: float) -> list[list[float]]:
    """Milliseconds of every run in every round.

    The runs take turns, each round begins with another one, and nothing is waited for within a round, so that the
    host is ahead of the device. The run that starts a round is made once more before it, untimed: it finds the device
    idle, and its time would be that of its launches.

    Args:
        seconds: no round begins after them, once there were three.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    if not runs:
        return times
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        order = [(number + i) % len(runs) for i in range(len(runs))]
        runs[order[0]]()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        marks[0].record()
        for index, mark in zip(order, marks[1:], strict=True):
            runs[index]()
            mark.record()
        torch.cuda.synchronize()
        for index, before, after in zip(order, marks, marks[1:], strict=False):
            times[index].append(before.elapsed_time(after))
    return times


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
