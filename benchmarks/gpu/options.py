"""What the command line decides, handed to every section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
RECIPES = ("hif4-plain", "nvfp4-plain", "mxfp4-plain", "hif4", "nvfp4", "mxfp4")


@dataclass(frozen=True)
class Options:
    """Options of the benchmarks.

    Attributes:
        rounds: timed rounds; every case is timed once in each.
        seconds: no round of a comparison begins later, once there were three.
        out: the folder of the CSV files.
        variants: recipes of the training section.
        profile: write the longest kernels of a training step too.
        device: where tensors are made.
    """

    rounds: int = 20
    seconds: float = 20.0
    out: Path = RESULTS
    variants: tuple[str, ...] = RECIPES
    profile: bool = False
    device: str = "cuda"
