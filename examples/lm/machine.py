"""The command line's common parts: bad input, numbers, devices."""

from __future__ import annotations

import argparse
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class BadInput(Exception):
    """Something that the user can put right; the message says how."""


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a number above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def make_deterministic() -> None:
    """Ask for kernels without atomic additions, whose order is another each time: threads of a CPU make them too, for
    the gradient of an embedding."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


def pick_device(name: str) -> torch.device:
    """The device that --device names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that torch can use")
    return device


def pick_dtype(name: str, device: torch.device) -> str:
    """The arithmetic that --dtype names; auto avoids bf16 on CPUs where it is hundreds of times slower."""
    if name != "auto":
        return name
    fast = device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "SVE"))
    return "bfloat16" if fast else "float32"


def machine_name(device: str) -> str:
    """What the arms run on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock reads finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_folder(folder: Path) -> None:
    """Make sure that the results can be written before there are any."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise BadInput(f"--out {folder}: not writable")
