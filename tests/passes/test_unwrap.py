"""unwrap: the GEMMs of transformers' grouped op, its values and gradients, and ops that are left alone."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  # registers the op
from torch import Tensor, nn

from tests.helpers import Captured, capture, randn, trace

ENDS = torch.tensor([3, 3, 20], dtype=torch.int32)


class Experts(nn.Module):
    def __init__(self, transposed: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(randn(*((3, 24, 16) if transposed else (3, 16, 24)), dtype=dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        weight = self.weight.mT if self.transposed else self.weight
        return torch.ops.transformers.grouped_mm_fallback(x, weight, offs=ends)


def _captured(needs_grad: bool = True, **options: object) -> Captured:
    x = randn(23, 16, dtype=options.get("dtype", torch.float32))
    return capture(Experts(**options), (x.requires_grad_(needs_grad), ENDS), "hif4-plain")


def _inputs(captured: Captured) -> list[Tensor]:
    return [ENDS if not t.is_floating_point() else t for t in captured.inputs()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_values_gradients_and_their_layouts_are_those_of_the_op(transposed: bool, dtype: torch.dtype) -> None:
    captured = _captured(transposed=transposed, dtype=dtype)
    inputs = _inputs(captured)
    before = captured.execute(*inputs)
    assert captured.run("unwrap") == 2
    after = captured.execute(*inputs)
    assert [t.stride() for t in after] == [t.stride() for t in before]
    bound = 2.0**-10 if dtype is torch.float16 else 1e-6  # fp16: one rounding of the op's and one of ours
    assert all(torch.allclose(a, b, rtol=bound, atol=8 * bound) for a, b in zip(after, before, strict=True))
    assert len(captured.calls("grouped_mm")) == 3


def test_what_nothing_reads_is_not_computed() -> None:
    captured = _captured(needs_grad=False, transposed=True)
    captured.run("unwrap")
    assert len(captured.calls("grouped_mm")) == 2  # no dgrad


def test_a_second_run_changes_nothing() -> None:
    captured = _captured(transposed=True)
    captured.run("unwrap")
    text = captured.text
    assert captured.run("unwrap") == 0
    assert captured.text == text


def test_the_sites_are_grouped_and_in_every_role() -> None:
    captured = _captured(transposed=True).until("find_sites")
    assert [(s.kind, s.role, s.parameter) for s in captured.sites] == [
        ("grouped", role, "weight") for role in ("forward", "dgrad", "wgrad")
    ]


def test_other_ops_are_left() -> None:
    captured = trace(lambda x, w: torch._grouped_mm(x, w), randn(2, 4, 16).bfloat16(), randn(2, 16, 8).bfloat16())
    assert captured.run("unwrap") == 0
    assert captured.calls(torch.ops.aten._grouped_mm.default)
