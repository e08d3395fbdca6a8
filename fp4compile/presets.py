"""The preset recipes: data, each with its source and with what was decided here where that leaves something open."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fp4compile.recipe import Operand, Recipe, Rule


def _training(
    input: Operand, weight: Operand, dgrad: tuple[Operand, Operand], wgrad: tuple[Operand, Operand]
) -> tuple[Rule, ...]:
    """Rules for all three roles; pairs are (grad, weight) and (grad, input)."""
    return (
        Rule("forward", input=input, weight=weight),
        Rule("dgrad", grad=dgrad[0], weight=dgrad[1]),
        Rule("wgrad", grad=wgrad[0], input=wgrad[1]),
    )


def _plain(format: str) -> Recipe:
    spec = Operand(format)
    return Recipe(
        f"{format}-plain",
        _training(spec, spec, (spec, spec), (spec, spec)),
        source="every GEMM in every role, round to nearest, no stabiliser: arithmetic that can be re-derived by hand",
    )


def _inference(format: str, activations: bool) -> Recipe:
    spec = Operand(format)
    return Recipe(
        f"{format}-w4a{4 if activations else 16}",
        (Rule("forward", input=spec if activations else None, weight=spec),),
        source="weights" + (" and activations" if activations else " only") + ", round to nearest",
    )


def _hif4() -> Recipe:
    spec = Operand("hif4")
    rht = replace(spec, hadamard=64)
    return Recipe(
        "hif4",
        _training(spec, spec, (rht, rht), (rht, rht)),
        source="HiFloat4 Format for Language Model Pre-training on Ascend NPUs: RTN, RHT-64 on backward GEMMs, no SR",
        inferred="the RHT sits on both operands of dgrad and wgrad, with one fixed sign vector",
    )


def _mxfp4() -> Recipe:
    spec = Operand("mxfp4", scale_rule="truncation-free")
    rht = replace(spec, hadamard=32)
    grad = replace(rht, rounding="stochastic")
    return Recipe(
        "mxfp4",
        _training(spec, spec, (grad, rht), (grad, rht)),
        source="the same paper's MXFP4 baseline: SR on gradients, RHT, truncation-free scales",
        inferred="RHT size 32, on both operands of dgrad and wgrad, with one fixed sign vector",
    )


def _nvfp4() -> Recipe:
    x, w = Operand("nvfp4"), Operand("nvfp4", block_2d=True)
    sr = replace(x, rounding="stochastic")
    return Recipe(
        "nvfp4",
        _training(x, w, (sr, w), (replace(sr, hadamard=16), replace(x, hadamard=16))),
        keep_last=0.15,
        source="Pretraining Large Language Models with NVFP4 (NVIDIA, 2025): 2-D weight blocks, SR on gradients, "
        "RHT-16 on wgrad, tensor scales, about 15% of the linear layers in high precision",
        inferred="the layers in high precision are the last 15% of the blocks",
    )


def _mxfp4_tseng() -> Recipe:
    spec = Operand("mxfp4", "stochastic", "floor-3/4", hadamard=64, signs="fresh")
    return Recipe(
        "mxfp4-tseng",
        (Rule("dgrad", grad=spec, weight=spec), Rule("wgrad", grad=spec, input=spec)),
        source="Training LLMs with MXFP4 (Tseng, Yu, Park, 2025, arXiv:2502.20586): forward in BF16; SR of 3/4 of the "
        "values and RHT-64 on both operands of dgrad and wgrad, signs drawn for each GEMM",
        inferred="each operand gives 4/3 to the fp32 accumulator, where the paper multiplies the product by 16/9",
    )


def _quartet() -> Recipe:
    forward = Operand("mxfp4", scale_rule="gaussian", hadamard=32, clip_mask=True)
    grad = Operand("mxfp4", "stochastic", "floor-3/4", hadamard=32, signs="fresh")
    again = replace(grad, requantise=True)
    return Recipe(
        "quartet",
        _training(forward, forward, (grad, again), (grad, again)),
        source="Quartet: Native FP4 Training Can Be Optimal for Large Language Models (Castro, Panferov et al., 2025, "
        "arXiv:2505.14669): Hadamard-32 on all operands, QuEST's scale for normal values and clip masks in the "
        "forward, SR of 3/4 of the values in the backward, which requantises the forward's X and W",
        inferred="the scale follows from the root mean square, where the authors' code subtracts the mean of a block, "
        "and is rounded down to a power of two as there; an element that is exactly the largest is not clipped; the "
        "forward transform has one fixed sign vector",
    )


def _fp4_all_the_way() -> Recipe:
    nearest = Operand("nvfp4")
    sr = replace(nearest, rounding="stochastic")
    return Recipe(
        "fp4-all-the-way",
        _training(nearest, nearest, (sr, nearest), (sr, sr)),
        source="FP4 All the Way: Fully Quantized Training of LLMs (Chmiel, Fishman et al., 2025, arXiv:2505.19115): "
        "NVFP4, nearest in the forward, SR of the gradient in the backward and of gradient and input in the update",
        inferred="a tensor scale, as NVFP4 has it; scales rounded to nearest; W is quantised anew along dgrad's axis",
    )


def _tetrajet() -> Recipe:
    nearest = Operand("mxfp4", scale_rule="truncation-free")
    sr = replace(nearest, rounding="stochastic")
    again = replace(sr, requantise=True)
    return Recipe(
        "tetrajet",
        _training(nearest, nearest, (sr, again), (sr, again)),
        source="Oscillation-Reduced MXFP4 Training for Vision Transformers (Chen, Xi, Zhu, Chen, 2025, "
        "arXiv:2502.20853): truncation-free scales, nearest in the forward, SR of the gradient and of the forward's "
        "quantised X and W in the backward",
        inferred="Q-EMA and Q-Ramping are left out: they need weights of earlier steps, or change the optimiser",
    )


def _tetrajet_v2() -> Recipe:
    forward = Operand("nvfp4")
    grad = Operand("nvfp4", "stochastic", "17/16", hadamard=32, signs="fresh")
    again = replace(grad, requantise=True)
    return Recipe(
        "tetrajet-v2",
        _training(forward, forward, (grad, again), (grad, again)),
        source="TetraJet-v2: Accurate NVFP4 Training for Large Language Models (Chen et al., 2025, arXiv:2510.27527): "
        "nearest in the forward; SR under scales 17/16 as large, RHT-32 on all four operands of the backward, which "
        "requantises the forward's X and W",
        inferred="the outer scale belongs to the tensor, not to 128 values; signs are drawn for each GEMM; OsciReset "
        "and OutControl are left out: they need a history of weights, and columns in higher precision",
    )


def _quartet2() -> Recipe:
    forward = Operand("nvfp4", scale_rule="4over6")
    grad = Operand("nvfp4", "eden", "eden", hadamard=128, signs="fresh")
    again = replace(grad, requantise=True)
    return Recipe(
        "quartet2",
        _training(forward, forward, (grad, again), (grad, again)),
        source="Quartet II: Accurate LLM Pre-Training in NVFP4 by Improved Unbiased Gradient Estimation (Panferov, "
        "Schultheis, Tabesh, Alistarh, 2026, arXiv:2601.22813): 4 over 6 in the forward; MS-EDEN with re-signed "
        "RHT-128, scales 17/16 * 0.93 as large and E4M3 capped at 255.99 in the backward, which requantises X and W",
        inferred="corrections belong to 128 values and weigh them with their block scales, as the paper's formula does "
        "(the authors' first code does not, the paper's second version corrects each 16); 4 over 6, an option of the "
        "authors' code, is on; signs are drawn for each GEMM",
    )


def _nvfp4_4over6() -> Recipe:
    stock = _nvfp4()
    x = Operand("nvfp4", scale_rule="4over6")
    w = replace(x, block_2d=True)
    _, dgrad, wgrad = stock.rules
    return replace(
        stock,
        name="nvfp4-4over6",
        rules=(Rule("forward", input=x, weight=w), replace(dgrad, weight=w), wgrad),
        source="Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling (Cook et al., 2025, "
        "arXiv:2512.02010), E4M3 capped at 256, on top of the recipe nvfp4",
        inferred="4 over 6 on X and W of the forward and on the same W in dgrad; gradients and wgrad as in nvfp4: a "
        "choice after SR biases it; " + stock.inferred,
    )


def presets() -> Iterator[Recipe]:
    """Every preset."""
    yield from (_hif4(), _mxfp4(), _nvfp4())
    yield from (_mxfp4_tseng(), _quartet(), _fp4_all_the_way(), _tetrajet(), _tetrajet_v2(), _quartet2())
    yield _nvfp4_4over6()
    for format in ("hif4", "mxfp4", "nvfp4"):
        yield _plain(format)
        yield _inference(format, activations=False)
        yield _inference(format, activations=True)
