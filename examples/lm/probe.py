"""The frozen probe: a trained BF16 checkpoint, its forward and its gradients in FP4, without an optimiser step.

For each batch: loss and gradients in BF16, then in each recipe, at the same weights. Reported are the relative loss
error and the cosine between both gradients of every weight matrix (made by wgrad, from what the dgrads behind it
passed down) and of every block's input (made by dgrads).

A batch's cosine counts bias and noise alike. The cosine of the mean gradients of all batches tells them apart: noise
averages out over n batches, as it does over the steps of a training, and bias stays.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from fp4compile import Schedule
from lm.arms import Arm
from lm.corpus import Corpus, windows_at
from lm.machine import BadInput
from lm.model import Llama, Shape, make_model
from lm.train import Settings, compile_options, forward

Gradients = dict[str, Tensor]


class _Tapped(nn.Module):
    """A block whose input goes through a parameter of zeros: its gradient is the gradient of the input."""

    def __init__(self, block: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.block = block
        self.tap = nn.Parameter(torch.zeros_like(like))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.block(x + self.tap, cos, sin)


def tapped(model: Llama, batch: int, sequence: int) -> Llama:
    """The model with a tap before each block; x + 0 is x."""
    like = model.embedding.weight.new_zeros(batch, sequence, model.embedding.embedding_dim)
    model.layers = nn.ModuleList(_Tapped(block, like) for block in model.layers)
    return model


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], Settings, int]:
    """The weights that a BF16 arm left behind, the settings that it was trained with, and its seed."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--checkpoint {path}: {error}") from error
    if not {"settings", "seed"} <= about.keys():
        raise BadInput(f"--checkpoint {path}: not the weights of a bf16 arm of this study")
    settings = json.loads(about["settings"])
    return state, Settings(**settings | {"shape": Shape(**settings["shape"])}), int(about["seed"])


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two gradients; 0 where one vanished, which tells no direction."""
    a, b = a.double().flatten(), b.double().flatten()
    norms = a.norm() * b.norm()
    return 0.0 if norms == 0 else ((a @ b) / norms).item()


def gradients(
    compiled: Callable[..., Tensor], model: nn.Module, window: Tensor, settings: Settings, seed: int
) -> tuple[float, Gradients]:
    """Loss and gradient of every parameter on one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = forward(compiled, window, settings)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def place(name: str) -> str | None:
    """Where a parameter's gradient belongs: `layers.3.attention.q_proj`, `layers.3` for a tap; None without a GEMM."""
    name = name.replace(".block.", ".").removesuffix(".weight")
    if name.endswith(".tap"):
        return name.removesuffix(".tap")
    return name if name.endswith("_proj") else None


class Probe:
    """Recipes compiled over one model, to be measured at the weights of any checkpoint of its shape."""

    def __init__(self, arms: Sequence[Arm], corpus: Corpus, settings: Settings, batches: int) -> None:
        """Windows of a batch lie far apart in the held-out text, so that batches are alike."""
        self.arms, self.settings = arms, settings
        device, sequence = torch.device(settings.device), settings.shape.sequence
        self.model = tapped(make_model(settings.shape, 0), settings.micro, sequence).to(device)
        tokens = corpus.held_out.to(device)
        starts = torch.linspace(0, len(tokens) - sequence - 1, batches * settings.micro).long().to(device)
        self.windows = [windows_at(tokens, part, sequence) for part in starts.view(settings.micro, batches).t()]
        self.reference = self._compiled(Arm("bf16", None))
        self.subjects = [self._compiled(arm) for arm in arms]

    def _compiled(self, arm: Arm) -> Callable[..., Tensor]:
        options = compile_options(self.settings)
        return Schedule(self.model, arm.precisions, 1, options=options, fullgraph=True, dynamic=False).at(0)

    def measure(
        self, state: Mapping[str, Tensor], advance: Callable[[int, float], None], stop: Callable[[int], bool]
    ) -> dict[str, Any] | None:
        """What each arm does to a checkpoint.

        Args:
            state: the checkpoint's weights.
            advance: is told how many batches of how many arms are done, and the latest loss.
            stop: is asked after each batch whether to leave.

        Returns:
            Arm -> its losses and BF16's, and the cosine of every place, of each batch; "mean_cosines", of the mean
            gradients of all batches. None if it was to leave.
        """
        ours = {name: value for name, value in self.model.named_parameters() if not name.endswith(".tap")}
        with torch.no_grad():
            for name, value in ours.items():
                value.copy_(state[name.replace(".block.", ".")])
        arms = {arm.name: subject for arm, subject in zip(self.arms, self.subjects, strict=True)}
        rows: dict[str, Any] = {
            name: {"bf16_losses": [], "losses": [], "cosines": defaultdict(list), "mean_cosines": {}} for name in arms
        }
        base_sum: Gradients = {}
        sums: dict[str, Gradients] = {name: {} for name in arms}
        # Arms are graphs of one function: more of them than Dynamo keeps of a function that recompiles.
        with torch._dynamo.config.patch(recompile_limit=len(arms) + 8):
            for index, window in enumerate(self.windows):
                base_loss, base = gradients(self.reference, self.model, window, self.settings, index)
                _add(base_sum, base)
                for number, (name, subject) in enumerate(arms.items()):
                    loss, found = gradients(subject, self.model, window, self.settings, index)
                    _add(sums[name], found)
                    rows[name]["bf16_losses"].append(base_loss)
                    rows[name]["losses"].append(loss)
                    for where, value in cosines(base, found).items():
                        rows[name]["cosines"][where].append(value)
                    advance(index * len(arms) + number + 1, loss)
                    if stop(index):
                        return None
        for name in arms:
            rows[name]["mean_cosines"] = cosines(base_sum, sums[name])
        return rows


def _add(total: Gradients, more: Mapping[str, Tensor]) -> None:
    """Add the weights' gradients; those of the taps are of other tokens in each batch."""
    for name, value in more.items():
        if not name.endswith(".tap"):
            total[name] = total[name] + value if name in total else value


def cosines(base: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """Place -> cosine; "weights" for all weight matrices that FP4 GEMMs made, taken as one vector."""
    found = {where: cosine(base[name], ours[name]) for name in base if (where := place(name))}
    joined = [
        torch.cat([grads[name].flatten() for name in base if (place(name) or "").endswith("_proj")])
        for grads in (base, ours)
    ]
    return {"weights": cosine(*joined), **found}
