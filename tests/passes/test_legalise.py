"""The backend's kernels are asked for every op of an FP4 site; the answer stands on the site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fp4compile.backend import Answer, Backend, Kernel, No, Yes
from fp4compile.packed import PackedLinear, PackedWeight
from fp4compile.recipe import Operand
from tests.helpers import Captured, capture, export, randn

ASKED: list[Mapping[str, Any]] = []


def _never(**arguments: Any) -> Tensor:
    raise AssertionError("legalise runs no kernel")


def _wide(arguments: Mapping[str, Any]) -> Answer:
    ASKED.append(arguments)
    return Yes() if arguments["x"].shape[-1] >= 64 else No("narrower than 64")


class Machine(Backend):
    name = "machine"
    kernels = (
        Kernel("elsewhere/fake_quantize", "fake_quantize", "cuda", _never, lambda arguments: Yes()),
        Kernel("wide/fake_quantize", "fake_quantize", "cpu", _never, _wide),
        Kernel("packed/mm", "mm", "cpu", _never, lambda a: Yes() if a["b_format"] else No("not packed")),
    )

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError


def legal(captured: Captured) -> Captured:
    ASKED.clear()
    captured.context.backend = Machine()
    captured.run("legalise")
    return captured


def kernels(captured: Captured) -> dict[str, list[str]]:
    return {site.role: site.kernels for site in captured.sites}


def test_records_the_first_kernel_that_supports_the_op() -> None:
    captured = legal(capture(nn.Linear(64, 64), [randn(8, 64).requires_grad_()], "hif4-plain").until("fuse"))
    assert kernels(captured) == {
        "forward": ["wide/fake_quantize", "machine/aten.addmm"],
        "dgrad": ["wide/fake_quantize", "machine/aten.mm"],
        "wgrad": ["wide/fake_quantize", "machine/aten.mm"],
    }
    assert captured.context.notes == []


def test_notes_what_runs_weights_that_a_model_holds_packed() -> None:
    row = PackedWeight((64, 64), 1, Operand("mxfp4"))
    layers = [PackedLinear(row, row.pack(randn(64, 64)), None, torch.float32) for _ in range(2)]
    captured = legal(capture(nn.Sequential(*layers), [randn(8, 64)], "mxfp4-w4a16", train=False).until("fuse"))
    assert captured.context.notes == ["2 GEMMs with weights that the model holds packed: packed/mm"]


def test_says_once_why_a_kernel_declined() -> None:
    captured = legal(capture(nn.Linear(64, 32), [randn(8, 64).requires_grad_()], "nvfp4-plain").until("fuse"))
    assert kernels(captured)["dgrad"] == ["reference/fake_quantize", "wide/fake_quantize", "reference/mm"]
    assert sorted(captured.context.notes) == ["packed/mm: not packed", "wide/fake_quantize: narrower than 64"]


def test_asks_with_the_arguments_by_name_and_defaults() -> None:
    legal(capture(nn.Linear(64, 64), [randn(40, 64)], "hif4").until("fuse"))
    transformed = [arguments for arguments in ASKED if arguments["hadamard"]]
    assert len(transformed) == 2
    for arguments in transformed:
        assert isinstance(arguments["x"], FakeTensor)
        assert (arguments["format"], arguments["axis"], arguments["rounding"]) == ("hif4", 0, "nearest")


@pytest.mark.parametrize("recipe", ["hif4-w4a16", "nvfp4-w4a4"])
def test_constants_are_no_kernels(recipe: str) -> None:
    captured = legal(export(nn.Linear(64, 32), [randn(8, 64)], recipe).until("fuse"))
    own = ["wide/fake_quantize"] if recipe.endswith("4a4") else []
    assert kernels(captured) == {"forward": [*own, "packed/mm"]}


def test_kept_sites_run_on_the_backend() -> None:
    model = nn.Sequential()
    model.add_module("lm_head", nn.Linear(64, 32))
    captured = legal(capture(model, [randn(8, 64)], "hif4-plain").until("fuse"))
    assert kernels(captured) == {"forward": ["machine/aten.addmm"], "wgrad": ["machine/aten.mm"]}
    assert ASKED == []


def test_leaves_the_graph_and_answers_the_same_again() -> None:
    captured = capture(nn.Linear(64, 32), [randn(8, 64)], "nvfp4").until("fuse")
    text = captured.text
    first = kernels(legal(captured))
    assert captured.run("legalise") == 0
    assert captured.text == text
    assert kernels(captured) == first
