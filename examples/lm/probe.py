"""The frozen probe: a trained BF16 checkpoint, its forward and its gradients in FP4, without an optimiser step.

For each batch: loss and gradients in BF16, then in each recipe, at the same weights. Reported are the relative loss
error and the cosine between both gradients of every weight matrix (made by wgrad, from what the dgrads behind it
passed down) and of every block's input (made by dgrads).
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

import fp4compile
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


def load_checkpoint(path: Path) -> tuple[Llama, dict[str, Any], int]:
    """The model that a BF16 arm left behind, the settings that it was trained with, and its seed."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise BadInput(f"--checkpoint {path}: {error}") from error
    if not {"settings", "seed"} <= about.keys():
        raise BadInput(f"--checkpoint {path}: not the weights of a bf16 arm of this study")
    settings = json.loads(about["settings"])
    model = make_model(Shape(**settings["shape"]), 0)
    model.load_state_dict(state)
    return model, settings, int(about["seed"])


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine between two gradients; NaN where one is zero."""
    a, b = a.double().flatten(), b.double().flatten()
    return ((a @ b) / (a.norm() * b.norm())).item()


def gradients(
    compiled: Callable[..., Tensor], model: nn.Module, window: Tensor, settings: Settings, seed: int
) -> tuple[float, Gradients]:
    """Loss and gradient of every parameter on one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = forward(compiled, window, settings)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def place(name: str) -> str | None:
    """Where a parameter's gradient belongs: `layers.3.attention.q_proj`, `layers.3` for a tap; None without a GEMM."""
    name = name.replace(".block.", ".").removesuffix(".weight")
    if name.endswith(".tap"):
        return name.removesuffix(".tap")
    return name if name.endswith("_proj") else None


def measure(
    model: Llama,
    arms: Sequence[Arm],
    corpus: Corpus,
    settings: Settings,
    batches: int,
    advance: Callable[[str, int], None],
) -> dict[str, Any]:
    """Arm -> its losses and BF16's, and the cosine of every place, of each batch of the held-out text."""
    device, sequence = torch.device(settings.device), settings.shape.sequence
    model = tapped(model, settings.micro, sequence).to(device)
    tokens = corpus.held_out.to(device)
    starts = torch.linspace(0, len(tokens) - sequence - 1, batches * settings.micro).long().to(device)
    options = compile_options(settings)

    def compiled(arm: Arm) -> Callable[..., Tensor]:
        return Schedule(model, arm.precisions, 1, options=options, fullgraph=True, dynamic=False).at(0)

    reference = compiled(Arm("bf16", None))
    found: dict[str, Any] = {}
    # Arms are graphs of one function: more of them than Dynamo keeps of a function that recompiles.
    with torch._dynamo.config.patch(recompile_limit=len(arms) + 8):
        for arm in arms:
            subject = compiled(arm)
            rows: dict[str, Any] = {"bf16_losses": [], "losses": [], "cosines": defaultdict(list)}
            # Windows of a batch lie far apart, so that batches are alike.
            for index, part in enumerate(starts.view(settings.micro, batches).t()):
                window = windows_at(tokens, part, sequence)
                base_loss, base = gradients(reference, model, window, settings, index)
                loss, ours = gradients(subject, model, window, settings, index)
                rows["bf16_losses"].append(base_loss)
                rows["losses"].append(loss)
                for name, value in _cosines(base, ours).items():
                    rows["cosines"][name].append(value)
                advance(arm.name, index + 1)
            report = fp4compile.last_report()
            found[arm.name] = rows | {"fp4_share": report.fp4_share if report and arm.recipe else 0.0}
    return found


def _cosines(base: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, float]:
    """Place -> cosine; "weights" for all weight matrices that FP4 GEMMs made, taken as one vector."""
    found = {where: cosine(base[name], ours[name]) for name in base if (where := place(name))}
    joined = [
        torch.cat([grads[name].flatten() for name in base if (place(name) or "").endswith("_proj")])
        for grads in (base, ours)
    ]
    return {"weights": cosine(*joined), **found}
