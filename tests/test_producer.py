"""Producers: their text, their arithmetic, and what is malformed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from fp4compile.errors import FP4ValueError
from fp4compile.producer import DTYPES, FUNCTIONS, LAYOUTS, Producer, Step, parse, produce, produce_each
from tests.helpers import randn

SWIGLU = (
    "full full: t0 = cast.float32(a0); t1 = neg.float32(t0); t2 = exp.float32(t1); t3 = add.float32(t2, 1.0); "
    "t4 = div.float32(t0, t3); t5 = cast.bfloat16(t4); t6 = mul.bfloat16(t5, a1)"
)
NORM = (
    "full row column: t0 = cast.float32(a0); t1 = mul.float32(t0, a1); t2 = mul.float32(t1, a2); t3 = cast.bfloat16(t2)"
)


def test_swiglu_is_that_of_torch() -> None:
    gate, up = randn(5, 64, dtype=torch.bfloat16), randn(5, 64, dtype=torch.bfloat16, seed=1)
    assert torch.equal(produce(gate, [up], SWIGLU), F.silu(gate) * up)


def test_rms_norm_is_that_of_torch() -> None:
    x, weight = randn(5, 64, dtype=torch.bfloat16), randn(64, dtype=torch.bfloat16, seed=1)
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    expected = (x.float() * scale * weight.float()).bfloat16()
    assert torch.equal(produce(x, [scale, weight[None]], NORM), expected)


def test_every_step_rounds_to_its_dtype() -> None:
    x = randn(4, 64, dtype=torch.bfloat16)
    got = produce(x, [], "full: t0 = mul.bfloat16(a0, a0); t1 = mul.bfloat16(t0, a0)")
    assert torch.equal(got, x * x * x)
    assert not torch.equal(got, (x.float() ** 3).bfloat16())


def test_several_results_are_those_of_their_steps() -> None:
    gate, up = randn(5, 64, dtype=torch.bfloat16), randn(5, 64, dtype=torch.bfloat16, seed=1)
    h, silu, again = produce_each(gate, [up], f"{SWIGLU} -> t6 t5 t6")
    assert torch.equal(silu, F.silu(gate))
    assert torch.equal(h, F.silu(gate) * up)
    assert torch.equal(again, h)
    with pytest.raises(FP4ValueError, match="of one tensor is needed, not of 2"):
        produce(gate, [up], f"{SWIGLU} -> t6 t5")


def test_no_producer_is_the_tensor_itself() -> None:
    x = randn(2, 3)
    assert produce(x, [], "") is x


@given(st.data())
def test_text_is_read_back(data: st.DataObject) -> None:
    layouts = tuple(data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=4)))
    steps: list[Step] = []
    for _ in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.sampled_from(sorted(FUNCTIONS)))
        names = [f"a{i}" for i in range(len(layouts))] + [f"t{i}" for i in range(len(steps))]
        value = st.one_of(st.sampled_from(names), st.floats(allow_nan=False, width=32))
        values = tuple(data.draw(value) for _ in range(FUNCTIONS[name].arity))
        steps.append(Step(name, data.draw(st.sampled_from(sorted(DTYPES))), values))
    numbers = [i for i, step in enumerate(steps) if step.dtype == steps[-1].dtype]
    chosen = tuple(data.draw(st.lists(st.sampled_from(numbers), max_size=3)))
    producer = Producer(layouts, tuple(steps), chosen)
    assert parse(str(producer)) == producer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "layout|expected"),
        ("full", "expected"),
        ("whole: t0 = neg.float32(a0)", "layout"),
        ("full: t0 = negate.float32(a0)", "function"),
        ("full: t0 = neg.float64(a0)", "dtype"),
        ("full: t0 = neg.float32(a1)", "a1 is not defined"),
        ("full: t0 = neg.float32(t0)", "t0 is not defined"),
        ("full: t1 = neg.float32(a0)", "expected 't0"),
        ("full: t0 = add.float32(a0)", "takes 2 operands, got 1"),
        ("full: t0 = add.float32(a0, one)", "could not convert"),
        ("full: t0 = neg.float32(a0) -> ", "'' is no step"),
        ("full: t0 = neg.float32(a0) -> t1", "'t1' is no step"),
        ("full: t0 = neg.float32(a0) -> a0", "'a0' is no step"),
        ("full: t0 = neg.float32(a0); t1 = cast.bfloat16(t0) -> t0 t1", "different dtypes"),
    ],
)
def test_malformed_text(text: str, reason: str) -> None:
    with pytest.raises(FP4ValueError, match=reason):
        parse(text)
