"""The arithmetic of published training recipes: scale rules, corrected scales, clip masks, each written out again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fp4compile
from fp4compile import codec
from fp4compile.formats import FORMATS
from fp4compile.hadamard import hadamard, inverse_hadamard
from fp4compile.ops import OPS

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
_E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(x: Tensor, grid: Tensor) -> Tensor:
    """The value of a rising grid that is nearest to each x >= 0; the larger one in the middle."""
    above = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2, right=True)
    return grid[above]


def scales_of(x: Tensor, rule: str, **options: object) -> tuple[Tensor, Tensor]:
    """Block scales and tensor scale of rows of NVFP4, decoded."""
    q = fp4compile.quantize(x, "nvfp4", scale_rule=rule, **options)
    assert q.tensor_scale is not None
    return q.scales.view(torch.float8_e4m3fn).double(), q.tensor_scale.double()


# --- scale rules -----------------------------------------------------------------------------------------------------

PEAKS = {"nearest": (448.0, 6.0), "17/16": (448.0, 6 * 16 / 17), "eden": (255.99, 6 / (17 / 16 * 0.93))}


@pytest.mark.parametrize(("rule", "most", "peak"), [(rule, *row) for rule, row in PEAKS.items()])
def test_nvfp4_scales_bring_the_largest_of_a_block_to_a_peak(rule: str, most: float, peak: float) -> None:
    x = randn(64, 160)
    scales, tensor_scale = scales_of(x, rule)
    amax = x.double().unflatten(1, (-1, 16)).abs().amax(-1)
    assert tensor_scale / (x.abs().amax().double() / (most * peak)) == pytest.approx(1, abs=2.0**-22)
    exact = amax / peak / tensor_scale
    # Where fp32 rounding cannot reach the middle of two scales.
    between = (_E4M3[1:] + _E4M3[:-1]) / 2
    clear = ((exact.unsqueeze(-1) - between).abs() > 2.0**-20 * exact.unsqueeze(-1)).all(-1)
    assert clear.float().mean() > 0.99
    assert torch.equal(scales[clear], nearest(exact, _E4M3)[clear])
    assert scales.max() <= max(most, 256)


def test_four_over_six_takes_the_smaller_error_of_each_block() -> None:
    x = randn(64, 160)
    scales, tensor_scale = scales_of(x, "4over6")
    assert tensor_scale == x.abs().amax() / 1536
    blocks = x.double().unflatten(1, (-1, 16)) / tensor_scale
    tried = [nearest(blocks.abs().amax(-1) / peak, _E4M3) for peak in (6, 4)]
    errors = []
    for scale in tried:
        t = blocks.abs() / scale.unsqueeze(-1)
        errors.append(((nearest(t.clamp(max=6), E2M1) - t) * scale.unsqueeze(-1)).square().sum(-1))
    clear = (errors[0] - errors[1]).abs() > 1e-5 * errors[0]
    assert clear.float().mean() > 0.99
    smaller = errors[1] < errors[0]
    assert 0.2 < smaller.float().mean() < 0.8
    assert torch.equal(scales[clear], torch.where(smaller, tried[1], tried[0])[clear])


@pytest.mark.parametrize("axis", [0, 1])
def test_four_over_six_chooses_for_whole_tiles(axis: int) -> None:
    x = randn(64, 80)
    options = {"scale_rule": "4over6", "block_2d": True}
    q = fp4compile.quantize(x, "nvfp4", axis, **options)
    other = fp4compile.quantize(x.T, "nvfp4", 1 - axis, **options)
    assert q.scales.shape == ((4, 5) if axis else (5, 4))
    assert torch.equal(q.scales, other.scales) and torch.equal(q.codes, other.codes)
    stock = fp4compile.fake_quantize(x, "nvfp4", axis, block_2d=True)
    chosen = fp4compile.dequantize(q)
    assert (chosen - x).square().sum() < (stock - x).square().sum()


def test_four_over_six_error_of_a_gemm() -> None:
    """recipes.md: .123 on normal operands with K = 1024, where NVFP4 has .134."""
    a, b = randn(256, 1024), randn(256, 1024, seed=1)
    exact = a @ b.T
    for rule, published in (("4over6", 0.123), ("nearest", 0.134)):
        x, y = (fp4compile.fake_quantize(t, "nvfp4", scale_rule=rule) for t in (a, b))
        # 2**16 outputs, each the sum of 1024 independent errors: the figure varies by less than 0.3%.
        assert ((x @ y.T - exact).norm() / exact.norm()).item() == pytest.approx(published, abs=0.001)


def test_three_quarters_of_the_ocp_scale() -> None:
    x = randn(64, 96)
    q = fp4compile.quantize(x, "mxfp4", scale_rule="floor-3/4")
    assert torch.equal(q.scales, fp4compile.quantize(x, "mxfp4").scales)
    assert q.tensor_scale == torch.tensor(4 / 3)
    scale = torch.exp2(q.scales.double() - 127).unsqueeze(-1)
    t = x.double().abs().unflatten(1, (-1, 32)) * 0.75 / scale
    assert 5 < t.max() < 6
    expected = (nearest(t, E2M1) * scale).flatten(1).float() * torch.tensor(4 / 3)
    assert torch.equal(fp4compile.dequantize(q).abs(), expected)


def gaussian_exponents(x: Tensor) -> Tensor:
    """log2 of the scales of blocks of 32 along the last axis: least error of normal values, rounded down."""
    rms = x.double().unflatten(-1, (-1, 32)).square().mean(-1).sqrt()
    return (rms * 2.92247856 / 6).log2().floor()


@pytest.mark.parametrize("power", [-60, 0, 60])
def test_gaussian_scales_follow_the_root_mean_square(power: int) -> None:
    x = randn(256, 96) * torch.exp2(randn(256, 1, seed=1)) * 2.0**power
    q = fp4compile.quantize(x, "mxfp4", scale_rule="gaussian")
    assert torch.equal(q.scales.double() - 127, gaussian_exponents(x))
    assert q.tensor_scale is None


# --- clip masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [0, 32])
@pytest.mark.parametrize("transformed", [False, True])
def test_a_gradient_comes_back_clipped_and_untransformed(size: int, transformed: bool, axis: int) -> None:
    x, grad = randn(64, 96), randn(64, 96, seed=1)
    if transformed and not size:
        pytest.skip("nothing to undo")
    rotated = hadamard(x, axis, size) if size else x
    scales = torch.exp2(gaussian_exponents(rotated.movedim(axis, -1))).repeat_interleave(32, -1)
    kept = (rotated.movedim(axis, -1).double().abs() <= 6 * scales).movedim(-1, axis)
    assert 0.8 < kept.float().mean() < 0.999
    inner = hadamard(grad, axis, size) if size and not transformed else grad
    wanted = torch.where(kept, inner, 0.0)
    wanted = inverse_hadamard(wanted, axis, size) if size else wanted
    options = {"scale_rule": "gaussian", "hadamard": size, "transformed": transformed}
    assert torch.equal(torch.ops.fp4compile.quantize_backward(grad, x, "mxfp4", axis, **options), wanted)
    back = torch.ops.fp4compile.quantize_backward(grad, None, "mxfp4", axis, **options)
    if not transformed:
        torch.testing.assert_close(back, grad)  # there and back
    elif size:
        assert torch.equal(back, inverse_hadamard(grad, axis, size))


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncation_free_rule_clips_no_gradient(format: str) -> None:
    x = randn(40, 70)
    back = torch.ops.fp4compile.quantize_backward(torch.ones(40, 70), x, format, 1, scale_rule="truncation-free")
    assert back.all()
    assert not torch.ops.fp4compile.quantize_backward(torch.ones(40, 70), x, format, 1).all() or format == "nvfp4"


def test_the_inverse_transform_undoes_the_transform() -> None:
    x, seed = randn(8, 128), torch.tensor(77)
    torch.testing.assert_close(inverse_hadamard(hadamard(x, 1, 64, seed), 1, 64, seed), x)
    torch.testing.assert_close(hadamard(inverse_hadamard(x, 0, 8, seed), 0, 8, seed), x)
    assert not torch.allclose(inverse_hadamard(hadamard(x, 1, 64, seed), 1, 64), x, atol=0.1)


# --- corrected scales ------------------------------------------------------------------------------------------------


def eden(x: Tensor, seed: int, stream: int = 0) -> Tensor:
    """MS-EDEN of rows, rotated: values with their tensor scale."""
    options = {"rounding": "eden", "scale_rule": "eden", "seed": torch.tensor(seed), "stream": stream}
    scale = OPS["tensor_scale"].reference(x, "nvfp4", scale_rule="eden")
    return OPS["fake_quantize"].reference(x, "nvfp4", 1, tensor_scale=scale, **options)


def test_corrections_make_the_projection_exact_before_scales_are_rounded() -> None:
    """<x, S Q(x)> = <x, x> in each group of 128, a last one of less too."""
    t = randn(6, 10, 16).abs() * 3
    scale = torch.rand(6, 10, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    code = codec.round_nearest(t, FORMATS["nvfp4"].element)
    corrected = codec.corrected_scales(t, code, scale, FORMATS["nvfp4"].element).double()
    x, rounded = (t * scale).double(), E2M1[code] * corrected
    for group in (slice(0, 8), slice(8, 10)):
        projection = (x * rounded)[:, group].sum((1, 2)) / (x * x)[:, group].sum((1, 2))
        torch.testing.assert_close(projection, torch.ones_like(projection), rtol=1e-6, atol=0)
        factors = (corrected / scale)[:, group]
        torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert (corrected != scale).all()


def test_eden_rounds_nearest_and_corrected_scales_without_bias() -> None:
    x = randn(16, 256)
    stock = fp4compile.quantize(x, "nvfp4", scale_rule="eden")
    drawn = [fp4compile.quantize(x, "nvfp4", scale_rule="eden", rounding="eden", seed=seed) for seed in range(400)]
    assert all(torch.equal(q.codes, stock.codes) for q in drawn)
    scales = torch.stack([q.scales.view(torch.float8_e4m3fn).double() for q in drawn])
    low, high = scales.amin(0), scales.amax(0)
    at = (low.unsqueeze(-1) >= _E4M3).sum(-1)
    assert ((high == low) | (high == _E4M3[at.clamp(max=126)])).all()  # two neighbours at most
    grid = FORMATS["nvfp4"].element
    before = stock.scales.view(torch.float8_e4m3fn).float().unsqueeze(-1)
    assert stock.tensor_scale is not None
    t = x.abs().unflatten(1, (-1, 16)) * ((1.0 / stock.tensor_scale) / before)
    wanted = codec.corrected_scales(t, codec.round_nearest(t, grid), before, grid).squeeze(-1).double()
    variance = ((high - wanted) * (wanted - low)).clamp(min=0) / len(drawn)
    moving = variance > 1e-9
    z = ((scales.mean(0) - wanted) / variance.sqrt())[moving]
    # 256 means of 400 draws of two values: |z| > 5.5 has probability 4e-8 each.
    assert moving.float().mean() > 0.9 and z.abs().max() < 5.5
    assert (z.square().mean() - 1).abs() < 5 * math.sqrt(2 / len(z))


def test_ms_eden_is_unbiased_over_rotations_and_halves_the_error_of_stochastic_rounding() -> None:
    x = randn(4, 512) * torch.exp2(randn(4, 512, seed=1))  # heavier than normal
    power = x.square().sum()
    estimates, stochastic = [], []
    for step in range(200):
        signs = torch.tensor(step << 32)
        rotated = hadamard(x, 1, 128, signs)
        estimates.append(inverse_hadamard(eden(rotated, step), 1, 128, signs))
        if step < 20:
            y = fp4compile.fake_quantize(rotated, "nvfp4", rounding="stochastic", seed=step, scale_rule="17/16")
            stochastic.append((y - rotated).square().sum() / power)
    projections = torch.stack([(y * x).sum() / power for y in estimates]).double()
    deviation = projections.std() / math.sqrt(len(projections))
    assert (projections.mean() - 1).abs() < 5 * deviation  # probability of a false alarm: 6e-7
    error = torch.stack([(y - x).square().sum() / power for y in estimates])
    mean_error = (torch.stack(estimates).mean(0) - x).square().sum() / power
    assert mean_error * len(estimates) < 1.3 * error.mean()  # errors of steps are independent
    assert torch.stack(stochastic).mean() > 2 * error.mean()  # the paper: "more than 2x lower"


def test_nearest_rounding_alone_is_biased_where_eden_is_not() -> None:
    x = randn(64, 512)
    power, rule = x.square().sum(), "eden"
    plain = fp4compile.fake_quantize(x, "nvfp4", scale_rule=rule)
    corrected = fp4compile.fake_quantize(x, "nvfp4", scale_rule=rule, rounding="eden", seed=1)
    assert abs((plain * x).sum() / power - 1) > 5 * abs((corrected * x).sum() / power - 1)


def test_eden_at_the_end_of_the_range_stays_finite_and_of_zeros_is_zero() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = (randn(16, 256).clamp(-1, 1) * torch.finfo(dtype).max).to(dtype)
        assert fp4compile.fake_quantize(x, "nvfp4", rounding="eden", scale_rule="eden", seed=1).isfinite().all()
    x = torch.zeros(2, 256)
    x[0, :16] = 1.0
    q = fp4compile.quantize(x, "nvfp4", rounding="eden", scale_rule="eden", seed=1)
    assert torch.equal(fp4compile.dequantize(q) == 0, x == 0)
    assert (q.scales[1] == 0x08).all()
