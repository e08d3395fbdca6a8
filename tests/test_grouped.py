"""`pad_groups` and `grouped_mm` against loops over the groups."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fp4compile.errors import FP4ValueError
from fp4compile.grouped import grouped_mm, pad_groups
from fp4compile.ops import OPS

ENDS = {
    "uneven": (3, 20, 33, 40),
    "empty ones": (0, 0, 7, 7, 40, 40),
    "none of a group": (0, 0),
    "rows behind the last": (5, 5, 31),
    "one": (40,),
}
_named = pytest.mark.parametrize("ends", [torch.tensor(e, dtype=torch.int32) for e in ENDS.values()], ids=ENDS)


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    return list(pairwise([0, *ends.tolist()]))


@_named
@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_each_group_starts_at_a_multiple_and_zeros_fill_the_rest(ends: Tensor, multiple: int) -> None:
    x = torch.randn(40, 6)
    x[int(ends[-1]) :] = float("nan")  # belongs to no group
    padded, padded_ends = pad_groups(x, ends, multiple)
    assert padded.shape[0] % multiple == 0
    assert padded_ends.dtype == ends.dtype
    left = padded.clone()
    for (start, end), (first, last) in zip(_spans(ends), _spans(padded_ends), strict=True):
        assert first % multiple == 0
        assert last - first == -(-(end - start) // multiple) * multiple
        assert torch.equal(padded[first : first + end - start], x[start:end])
        left[first : first + end - start] = 0
    assert not left.any()


def test_the_worst_routing_just_fits() -> None:
    """Every group one row over a multiple."""
    ends = torch.arange(17, 17 * 5, 17, dtype=torch.int32)
    padded, padded_ends = pad_groups(torch.ones(17 * 4, 2), ends, 16)
    assert padded_ends[-1] == len(padded) == 32 * 4


def _matrices(kind: str, ends: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    tokens, stack = torch.randn(40, 24).to(dtype), torch.randn(len(ends), 16, 24).to(dtype)
    return {
        "forward": (tokens, stack.mT),
        "weight first": (stack, tokens.T),
        "wgrad": (tokens.T, torch.randn(40, 8).to(dtype)),
    }[kind]


@_named
@pytest.mark.parametrize("kind", ["forward", "weight first", "wgrad"])
def test_grouped_mm_is_a_loop(ends: Tensor, kind: str) -> None:
    a, b = _matrices(kind, ends, torch.float32)
    out = grouped_mm(a, b, ends)
    rest = torch.ones(40, dtype=torch.bool)
    for group, (start, end) in enumerate(_spans(ends)):
        rest[start:end] = False
        rows = slice(start, end)
        if kind == "forward":
            got, expected = out[rows], a[rows] @ b[group]
        elif kind == "weight first":
            got, expected = out[:, rows], a[group] @ b[:, rows]
        else:
            got, expected = out[group], a[:, rows] @ b[rows]
        assert torch.equal(got, expected)
    if kind != "wgrad":
        assert not (out if kind == "forward" else out.T)[rest].any()


def test_padded_groups_have_the_same_wgrad() -> None:
    grad, x, ends = torch.randn(40, 8), torch.randn(40, 24), torch.tensor((5, 5, 31), dtype=torch.int32)
    rows, padded_ends = pad_groups(grad, ends, 32)
    columns, _ = pad_groups(x, ends, 32)
    torch.testing.assert_close(grouped_mm(rows.T, columns, padded_ends), grouped_mm(grad.T, x, ends))


def test_tensor_scales_multiply_before_the_one_rounding() -> None:
    a, b = _matrices("forward", ends := torch.tensor((7, 40)), torch.bfloat16)
    scale = torch.tensor(0.37)
    exact = grouped_mm(a.float(), b.float(), ends) * scale * scale
    assert torch.equal(grouped_mm(a, b, ends, scale, scale), exact.bfloat16())


def test_fp64_stays_fp64() -> None:
    a, b = _matrices("forward", ends := torch.tensor((40,)), torch.float64)
    assert torch.equal(grouped_mm(a, b, ends), a @ b[0])


def test_two_stacks_are_no_grouped_gemm() -> None:
    with pytest.raises(FP4ValueError, match="not 3-D and 3-D"):
        OPS["grouped_mm"].overload(torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.tensor([2]))
