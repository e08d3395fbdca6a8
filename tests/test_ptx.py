"""The interpreter of PTX against exact arithmetic, and on kernels written by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import ptx


def bits(count: int, seed: int) -> np.ndarray[Any, Any]:
    """fp32 from all of its range, many of them near each other in size, zeros and subnormal numbers among them."""
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 2**32, count, dtype="u4")
    near = (words & 0x807FFFFF) | generator.integers(110, 140, count, dtype="u4") << 23
    words = np.where(generator.random(count) < 0.7, near, words)
    words[: count // 50] &= 0x807FFFFF
    words[: count // 100] &= 0x80000000
    return np.where(words & 0x7F800000 == 0x7F800000, words & 0xBFFFFFFF, words)


def exact(*operands: np.ndarray[Any, Any]) -> list[Fraction]:
    """a b + c."""
    return [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(*(x.tolist() for x in operands), strict=True)]


def test_fused_multiply_add_rounds_once() -> None:
    a, b, c = (bits(4000, seed).view("f4") for seed in range(3))
    with np.errstate(over="ignore"):
        c[2000:] = -(a * b)[2000:]  # what is left is the error of the product
    assert np.isfinite(c).sum() > 3500
    a, b, c = (x[np.isfinite(c)] for x in (a, b, c))
    near, up = (
        ptx.assembly(f"{{ fma.{rounding}.f32 $0, $1, $2, $3; }}", a, b, c).view("f4") for rounding in ("rn", "rp")
    )
    largest, infinity = np.float32(np.finfo("f4").max), np.float32(np.inf)
    for value, n, u in zip(exact(a, b, c), near, up, strict=True):
        if abs(value) >= Fraction(float(largest)):
            assert n == u == infinity or value < 0
            continue
        below, above = np.nextafter(n, -infinity), np.nextafter(n, infinity)
        error = abs(value - Fraction(float(n)))
        others = [abs(value - Fraction(float(x))) for x in (below, above)]
        assert error < min(others) or (error == min(others) and not int(n.view("u4")) & 1)
        assert Fraction(float(u)) >= value > Fraction(float(np.nextafter(u, -infinity)))


@pytest.mark.parametrize(("operation", "of"), [("add", torch.add), ("sub", torch.sub), ("mul", torch.mul)])
def test_pairs_of_bf16_are_rounded_as_torch_rounds(operation: str, of: Callable[..., Tensor]) -> None:
    words = np.stack([bits(3000, seed) for seed in (3, 4)])
    got = ptx.assembly(f"{operation}.rn.bf16x2 $0, $1, $2;", *words)
    halves = torch.from_numpy(words.view("i2")).view(torch.bfloat16)
    expected = of(halves[0], halves[1])
    result = torch.from_numpy(got.view("i2")).view(torch.bfloat16)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result[~result.isnan()], expected[~result.isnan()])


@pytest.mark.parametrize(
    ("code", "operands", "expected"),
    [
        ("max.f32 $0, $1, $2;", (0x7FC00000, 0xBF800000), 0xBF800000),
        ("max.f32 $0, $1, $2;", (0x80000000, 0x00000000), 0x00000000),
        ("min.f32 $0, $1, $2;", (0x80000000, 0x00000000), 0x80000000),
        ("max.NaN.f32 $0, $1, $2;", (0x7FC00123, 0xBF800000), 0x7FFFFFFF),
        ("prmt.b32 $0, $1, $2, 0x5410U;", (0x33221100, 0x77665544), 0x55441100),
        ("prmt.b32 $0, $1, $2, 0x4210U;", (0x33221100, 0x77665544), 0x44221100),
        ("bfe.u32 $0, $1, 4, 8;", (0x00000AB0,), 0xAB),
        ("bfe.s32 $0, $1, 4, 8;", (0x00000AB0,), 0xFFFFFFAB),
        ("lop3.b32 $0, $1, $2, 0xFF00FF00, 0xF8;", (0x0F0F0F0F, 0x00FFFF00), 0x0F0FFF0F),
        ("shl.b32 $0, $1, 32;", (0xFFFFFFFF,), 0),
        ("shr.s32 $0, $1, 40;", (0x80000000,), 0xFFFFFFFF),
        ("mul.hi.u32 $0, $1, $2;", (0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFE),
        ("mul.hi.s32 $0, $1, $2;", (0xFFFFFFFF, 0x00000002), 0xFFFFFFFF),
        ("div.s32 $0, $1, $2;", (0xFFFFFFF9, 0x00000002), 0xFFFFFFFD),
        ("cvt.rn.bf16x2.f32 $0, $1, $2;", (0x3F808000, 0x3F818000), 0x3F803F82),
        ("cvt.rmi.ftz.f32.f32 $0, $1;", (0xC0200000,), 0xC0400000),
        ("cvt.rmi.ftz.f32.f32 $0, $1;", (0x80000001,), 0x80000000),
    ],
)
def test_operations(code: str, operands: tuple[int, ...], expected: int) -> None:
    (got,) = ptx.assembly(code, *(np.array([word], "u4") for word in operands))
    assert hex(got) == hex(expected)


def kernel(body: str) -> str:
    return f".visible .entry k(\n)\n{{\n{body}\n$L__func_end0:\n"


# y[i] = 1 + ... + x[i], in as many rounds for each thread as it asks for, then rows of a warp turned around.
SUMS = kernel("""
    ld.param.b64 %rd1, [k_param_0];
    ld.param.b64 %rd2, [k_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r2, 6;
    or.b32 %r4, %r3, %r1;
    mad.wide.u32 %rd3, %r4, 4, %rd1;
    mad.wide.u32 %rd4, %r4, 4, %rd2;
    ld.global.b32 { %r5 }, [ %rd3 + 0 ];
    mov.b32 %r6, 0;
    setp.eq.b32 %p1, %r5, 0;
    @%p1 bra $L__BB0_2;
$L__BB0_1:
    add.s32 %r6, %r6, %r5;
    add.s32 %r5, %r5, -1;
    setp.ne.b32 %p1, %r5, 0;
    @%p1 bra $L__BB0_1;
$L__BB0_2:
    shfl.sync.bfly.b32 %r7, %r6, 31, 31, -1;
    mov.b32 %r8, global_smem;
    shl.b32 %r9, %r1, 2;
    add.s32 %r10, %r8, %r9;
    st.shared.b32 [ %r10 + 0 ], %r7;
    bar.sync 0;
    ld.shared.b32 %r11, [%r10];
    st.global.b32 [ %rd4 + 0 ], { %r11 };
    ret;
""")


def test_threads_part_and_meet_again() -> None:
    x = torch.arange(192, dtype=torch.int32) * 7 % 13
    y = torch.full_like(x, -1)
    ptx.run(SUMS, 3, 2, [x, y])
    assert torch.equal(y, (x * (x + 1) // 2).view(-1, 32).flip(1).flatten())


def test_every_access_is_checked() -> None:
    x = torch.zeros(192, dtype=torch.int32)
    with pytest.raises(IndexError, match="past the end"):
        ptx.run(SUMS, 3, 2, [x, torch.zeros(191, dtype=torch.int32)])
    with pytest.raises(IndexError, match="no multiple of 16 bytes"):
        body = "ld.param.b64 %rd1, [k_param_0]; ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 8 ]; ret;"
        ptx.run(kernel(body), 1, 1, [x])
    with pytest.raises(IndexError, match="outside of every tensor"):
        ptx.run(kernel("mov.b64 %rd1, 64; st.global.b32 [ %rd1 + 0 ], { %r1 }; ret;"), 1, 1, [x])


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"ex2\.approx\.f32"):
        ptx.assembly("ex2.approx.f32 $0, $1;", np.zeros(1, "u4"))
