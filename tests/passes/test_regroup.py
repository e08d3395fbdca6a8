"""regroup: products with gathered weights and their gradients, in either order, and look-alikes that stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import Captured, capture, randn

EXPERT = torch.tensor([2, 0, 2, 2, -1, 0, 3, 2, 0, 2])  # none for expert 1, and an index from the end
Run = Callable[[Tensor, Tensor, Tensor], Tensor]

SPELLINGS: dict[str, Run] = {
    "matrix on the left": lambda w, x, e: torch.bmm(w[e], x.unsqueeze(-1)).squeeze(-1),
    "matrix on the right": lambda w, x, e: torch.bmm(x.unsqueeze(1), w[e].mT).squeeze(1),
    "matmul": lambda w, x, e: torch.matmul(w[e], x[..., None])[..., 0],
    "a cast weight": lambda w, x, e: torch.bmm(w.bfloat16()[e], x.bfloat16().unsqueeze(-1)).squeeze(-1).float(),
    "two products": lambda w, x, e: torch.bmm(w[e], torch.bmm(w[e], x[..., None]).tanh())[..., 0],
}
LOOK_ALIKES: dict[str, Run] = {
    "several tokens per matrix": lambda w, x, e: torch.bmm(w[e], x.view(10, 16, 1).expand(10, 16, 2)).sum(-1),
    "gathered activations": lambda w, x, e: torch.bmm((x @ w[0]).view(5, 2, 16)[e.clamp(0, 4)], x[..., None])[..., 0],
    "rows of a matrix": lambda w, x, e: torch.bmm(w[0][e.view(10, 1).expand(10, 16)], x[..., None])[..., 0],
}


class Model(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.weight = nn.Parameter(randn(4, 16, 16))

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self.run(self.weight, x, expert)


def _captured(run: Run) -> Captured:
    inputs = (randn(10, 16).requires_grad_(), EXPERT)
    return capture(Model(run), inputs, "hif4-plain").until("canonicalise")


def _inputs(captured: Captured) -> list[Tensor]:
    return [EXPERT if not t.is_floating_point() else t for t in captured.inputs()]


@pytest.mark.parametrize("run", SPELLINGS.values(), ids=SPELLINGS)
def test_values_and_gradients_are_the_same(run: Run) -> None:
    captured = _captured(run)
    inputs = _inputs(captured)
    before = captured.execute(*inputs)
    assert captured.run("regroup") in (3, 6)
    assert not captured.calls(torch.ops.aten.bmm.default)
    after = captured.execute(*inputs)
    bound = 2.0**-6 if run is SPELLINGS["a cast weight"] else 1e-5  # bf16 sums of outer products round each term
    for got, wanted in zip(after, before, strict=True):
        torch.testing.assert_close(got, wanted, rtol=bound, atol=bound * 8)


def test_the_sites_are_grouped_and_in_every_role() -> None:
    captured = _captured(SPELLINGS["matrix on the left"])
    captured.run("regroup", "find_sites")
    assert [(s.kind, s.role, s.parameter) for s in captured.sites] == [
        ("grouped", role, "weight") for role in ("forward", "dgrad", "wgrad")
    ]
    assert len(captured.calls(torch.ops.aten.sort.stable)) == 1  # one order for all


def test_a_weight_is_quantised_once_and_not_once_per_token() -> None:
    captured = _captured(SPELLINGS["matrix on the left"]).after("canonicalise")
    shapes = {tuple(node.args[0].meta["val"].shape) for node in captured.calls("fake_quantize")}
    assert (4, 16, 16) in shapes
    assert (10, 16, 16) not in shapes


@pytest.mark.parametrize("run", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_look_alikes_are_left(run: Run) -> None:
    assert _captured(run).run("regroup") == 0


def test_a_second_run_changes_nothing() -> None:
    captured = _captured(SPELLINGS["matrix on the right"])
    captured.run("regroup")
    text = captured.text
    assert captured.run("regroup") == 0
    assert captured.text == text
