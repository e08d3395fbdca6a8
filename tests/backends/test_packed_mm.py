"""`mm` on a packed weight: on a GPU, in Triton's interpreter, and compiled for a GPU, against the op's reference."""

from __future__ import annotations

import inspect
import json
import math
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4compile.activations import ACTIVATIONS, columns
from fp4compile.backend import No, Yes
from fp4compile.backends import triton as table
from fp4compile.backends.triton import packed, tune
from fp4compile.backends.triton.launch import kernels
from fp4compile.backends.triton.packed import CUTS, Cut
from fp4compile.codec import tensor_scale
from fp4compile.formats import FORMATS
from fp4compile.ops import OPS
from tests.gpu import before_triton_3_8, interpret_apart, needs_gpu, needs_triton

NAMES = ("hif4", "mxfp4", "nvfp4")
(KERNEL,) = (kernel for kernel in table.KERNELS if kernel.name == "triton/packed_mm")
HOPPER = {"multiprocessors": 132, "shared": 227 * 1024, "on_hopper": True}
AMPERE = {"multiprocessors": 108, "shared": 163 * 1024, "on_hopper": False}
NAN = {"mxfp4": 0xFF, "nvfp4": 0x7F}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call(
    format: str,
    m: int,
    n: int,
    k: int,
    block_2d: bool = False,
    scaled: bool = False,
    biased: bool = False,
    activation: str = "",
    by_factor: bool = False,
) -> dict[str, Any]:
    """All arguments of a call: bf16 tokens, and a weight whose rows differ in range."""
    weight = randn(n, k, seed=1) * randn(n, 1, seed=2).mul(2).exp()
    scale = tensor_scale(weight, FORMATS[format]) if FORMATS[format].has_tensor_scale and scaled else None
    codes, scales = OPS["quantize"].reference(weight, format, -1, block_2d=block_2d, tensor_scale=scale)
    given = {
        "a": randn(m, k).bfloat16(),
        "b": codes,
        "b_scales": scales,
        "bias": randn(2 * n, seed=3).bfloat16()[::2] if biased else None,
        "a_tensor_scale": torch.tensor(0.37) if scaled else None,
        "b_tensor_scale": scale,
        "b_format": format,
        "b_block_2d": block_2d,
        "k": k,
        "activation": activation,
        "factor": randn(2 * m, columns(activation, n), seed=4).bfloat16()[::2] if by_factor else None,
    }
    bound = inspect.signature(OPS["mm"].reference).bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def exact(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The product in fp64, and how far fp32 sums may be from it."""
    weight = (
        OPS["dequantize"]
        .reference(
            given["b"], given["b_scales"], None, given["b_format"], -1, given["k"], given["b_block_2d"], torch.float32
        )
        .double()
    )
    a, factor = given["a"].double(), 1.0
    for name in ("a_tensor_scale", "b_tensor_scale"):
        factor *= 1.0 if given[name] is None else given[name].double().item()
    y, size = a @ weight.T * factor, a.abs() @ weight.abs().T * abs(factor)
    if given["bias"] is not None:
        y, size = y + given["bias"].double(), size + given["bias"].double().abs()
    y, slack = behind(given["activation"], y, size * 2.0**-20)
    factor = given["factor"]
    return (y, slack) if factor is None else (y * factor.double(), slack * factor.double().abs())


# No activation's slope exceeds that of GELU at sqrt(2).
_STEEPEST = 1.13


def behind(activation: str, sums: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """An activation of sums that may be off by `slack`, in fp64, and how far one in fp32 may be from it.

    Exponentials and error functions of fp32 are off by a few units of 2**-24, in GELU of numbers about one.
    """
    if not activation:
        return sums, slack
    row = ACTIVATIONS[activation]
    y = row.of(sums)
    if not row.gated:
        return y, _STEEPEST * slack + sums.abs() * 2.0**-20
    (gate, up), (of_gate, of_up) = sums.chunk(2, -1), slack.chunk(2, -1)
    function = ACTIVATIONS[row.function].of(gate)
    off = _STEEPEST * of_gate + gate.abs() * 2.0**-20
    return y, off * (up.abs() + of_up) + function.abs() * of_up


def assert_rounded_once(got: Tensor, given: dict[str, Any]) -> None:
    """The exact product, summed in fp32 and rounded once."""
    expected, slack = exact({n: v.cpu() if isinstance(v, Tensor) else v for n, v in given.items()})
    half_ulp = torch.finfo(got.dtype).eps / 2
    error = (got.cpu().double() - expected).abs()
    assert got.shape == expected.shape
    assert (error <= expected.abs() * half_ulp * 1.001 + slack).all()


def moved(given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cuda() if isinstance(v, Tensor) else v for n, v in given.items()}


def multiplied(given: dict[str, Any], cut: Cut, plain: bool, dtype: torch.dtype) -> Tensor:
    """The GEMM of a call, cut as given."""
    (m, k), format = given["a"].shape, given["b_format"]
    overlap = not plain and torch.cuda.get_device_capability() >= (9, 0)
    processors = 4 if plain else torch.cuda.get_device_properties(0).multi_processor_count
    n = given["b"].shape[0]
    planned = packed.plan(cut, m, n, k, format, given["b_block_2d"], overlap, plain, processors, given["activation"])
    parts = (given[n] for n in ("a", "b", "b_scales", "bias", "a_tensor_scale", "b_tensor_scale"))
    factor = None if given["factor"] is None else given["factor"].contiguous()
    return packed.multiply(*parts, planned, dtype, factor)


# Every kind of cut, small: slices in a program, parts among programs, both kernels.
SMALL = (
    Cut("few_tokens", 16, 8, 64, 2, warps=2, slices=1),
    Cut("few_tokens", 16, 8, 128, 2, warps=4, slices=2),
    Cut("few_tokens", 16, 16, 64, 2, warps=2, slices=2, parts=3),
    Cut("many_tokens", 64, 32, 64, 2, warps=4),
    Cut("many_tokens", 64, 16, 128, 2, warps=4, parts=2),
)
# For Hopper alone: programs in even shares of a whole tile, of several, of parts of one.
EVENLY = (
    Cut("overlapped", 64, 16, 256, 3, warps=4),
    Cut("overlapped", 128, 64, 256, 3, warps=8),
    Cut("overlapped", 128, 128, 256, 3, warps=8),
)
# Whole tiles; ragged in every direction; less than a block.
SHAPES = ((16, 128, 512), (7, 37, 500), (33, 65, 192), (1, 70, 1000), (3, 5, 9))


def calls(format: str) -> Iterator[dict[str, Any]]:
    """Shapes, and what else a call can hold."""
    for m, n, k in SHAPES:
        yield call(format, m, n, k)
    yield call(format, 5, 80, 200, biased=True, scaled=True)
    if FORMATS[format].block_2d:
        yield call(format, 5, 80, 200, block_2d=True)
    for activation, (m, n, k) in zip(ACTIVATIONS, ((5, 37, 200), *SHAPES, (17, 272, 320), (1, 2, 64)), strict=True):
        rows = n + n % 2 if ACTIVATIONS[activation].gated else n
        yield call(format, m, rows, k, biased=m != 5, scaled=m == 7, activation=activation)
    yield call(format, 7, 37, 500, activation="silu", by_factor=True)
    yield call(format, 18, 90, 200, activation="reglu", by_factor=True)


def one_hot(format: str) -> tuple[dict[str, Any], Tensor]:
    """A call that reads the weight [512, 256], and that weight: all codes, all scales that are finite, and one that is
    not in row 17, whose values are given as 0."""
    fmt, (n, k) = FORMATS[format], (512, 256)
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    if format == "hif4":
        scales = torch.randint(-(2**31), 2**31 - 1, (n, k // 64), generator=generator).to(torch.int32)
        scales[:, 0] = torch.arange(n) % 255 | (scales[:, 0] & ~0xFF)
        scales = torch.where(scales & 0xFF == 0xFF, scales - 1, scales)
        scales[17, 1] = -1  # NaN, and every level below doubles it
    else:
        scales = (torch.arange(n * k // fmt.block) % 256).to(torch.uint8).view(n, -1)
        finite = (scales & 0x7F != 0x7F) if format == "nvfp4" else scales < 253
        scales = torch.where(finite, scales, 3)
        scales[17, 1] = NAN[format]
    weight = OPS["dequantize"].reference(codes, scales, None, format, -1, k, False, torch.float32)
    assert weight[17].isnan().any()
    weight[17] = 0
    given = {**call(format, 1, n, k), "a": torch.eye(k, dtype=torch.bfloat16), "b": codes, "b_scales": scales}
    return given, weight


# Tokens of each expert: of several tiles, of one, of none; and behind the last of them.
GROUPS = ((11, 0, 1, 8, 0, 3), 2)


def grouped_call(format: str, n: int, k: int, **options: Any) -> tuple[dict[str, Any], Tensor]:
    """A call with the weights of all experts of `GROUPS` on top of one another, and where each expert's tokens end."""
    sizes, rest = GROUPS
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return call(format, sum(sizes) + rest, n * len(sizes), k, **options), ends


def multiplied_in_groups(given: dict[str, Any], ends: Tensor, cut: Cut, plain: bool, dtype: torch.dtype) -> Tensor:
    """The GEMMs of a call in groups, cut as given."""
    experts, (rows, width), k = ends.shape[0], given["b"].shape, given["k"]
    n, format = rows // experts, given["b_format"]
    planned = packed.plan_grouped(cut, experts, n, k, format, given["b_block_2d"], plain)
    codes = given["b"].view(experts, n, width)
    scales = given["b_scales"].view(experts, -1, given["b_scales"].shape[1])
    tensor_scales = (given["a_tensor_scale"], given["b_tensor_scale"])
    return packed.multiply_grouped(given["a"], codes, scales, ends, *tensor_scales, planned, dtype)


def assert_each_group_has_its_weight(got: Tensor, given: dict[str, Any], ends: Tensor) -> None:
    """The exact products, summed in fp32 and rounded once; zeros behind the last group."""
    y, slack = exact({n: v.cpu() if isinstance(v, Tensor) else v for n, v in given.items()})
    n = y.shape[1] // ends.shape[0]
    got, half_ulp, start = got.cpu().double(), torch.finfo(got.dtype).eps / 2, 0
    for expert, end in enumerate(ends.tolist()):
        columns = slice(n * expert, n * (expert + 1))
        expected, allowed = y[start:end, columns], slack[start:end, columns]
        error = (got[start:end] - expected).abs()
        assert (error <= expected.abs() * half_ulp * 1.001 + allowed).all()
        start = end
    assert torch.equal(got[start:], torch.zeros_like(got[start:]))


# --- without a GPU ---------------------------------------------------------------------------------------------------


def arranged(k: int) -> list[int]:
    """The columns of a run of 128 in the order in which `overlapped` contracts.

    A left operand of wgmma, 64 columns: of each 16, a thread of a row holds numbers 2 t, 2 t + 1, 2 t + 8, 2 t + 9. It
    fills them with elements j and j + 4 of two of its words, which are numbers 4 t … 4 t + 3 of the run.
    """
    order = [0] * 128
    for half in range(2):
        for j in range(4):
            for word in range(2):
                for t in range(4):
                    for element in range(2):
                        place = 64 * half + 16 * j + 8 * word + 2 * t + element
                        order[place] = 8 * (4 * t + 2 * half + word) + 4 * element + j
    return [run + column for run in range(0, k, 128) for column in order]


def assert_tokens_are_arranged() -> None:
    """In the order in which codes lie in registers."""
    planned = packed.plan(EVENLY[0], 3, 64, 300, "hif4", False, overlap=False, plain=True)
    x = torch.arange(900.0).view(3, 300)
    expected = torch.zeros(3, 384)
    expected[:, :300] = x
    assert torch.equal(packed._arrange(x, planned), expected[:, arranged(384)])


def assert_nan_is_kept() -> None:
    """A scale that is NaN makes its block NaN whatever the bits of the levels below it say."""
    given, weight = one_hot("hif4")
    some = {**given, "a": given["a"][64:72].float(), "b": given["b"][:32], "b_scales": given["b_scales"][:32]}
    got = multiplied(some, SMALL[0], plain=True, dtype=torch.float32)
    assert got[:, 17].isnan().all()
    got[:, 17] = 0
    assert torch.equal(got, weight.T[64:72, :32])


def displaced(x: Tensor) -> Tensor:
    """The same numbers, from the first whole element behind one byte more."""
    memory = torch.empty(x.nbytes + x.itemsize, dtype=torch.uint8, device=x.device)
    start = 1 if x.itemsize == 1 else x.itemsize
    return memory[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def assert_codes_may_begin_at_any_byte() -> None:
    """Read as 32-bit words, from a copy."""
    for format in ("mxfp4", "hif4"):
        given = call(format, 3, 16, 256)
        given["a"] = given["a"].float()
        moved_by_a_byte = {**given, "b": displaced(given["b"]), "b_scales": displaced(given["b_scales"])}
        assert moved_by_a_byte["b"].data_ptr() % 4
        expected = multiplied(given, SMALL[0], plain=True, dtype=torch.float32)
        assert torch.equal(multiplied(moved_by_a_byte, SMALL[0], plain=True, dtype=torch.float32), expected)


def assert_groups_agree(every: int) -> None:
    """Every n-th format, and squares."""
    cases = [(cut, grouped_call(n, 24, 136, scaled=n == "nvfp4")) for n, cut in zip(NAMES, SMALL, strict=False)]
    cases.append((SMALL[0], grouped_call("mxfp4", 32, 64, block_2d=True)))
    for cut, (given, ends) in cases[::every]:
        given["a"] = given["a"].float()  # the interpreter cuts fp32 to bf16 instead of rounding it
        got = multiplied_in_groups(given, ends, cut, plain=True, dtype=torch.float32)
        assert_each_group_has_its_weight(got, given, ends)


def assert_activations_of_many_tokens() -> None:
    """Of the result that the dense GEMM has rounded, and rounded again."""
    sums = randn(3, 2100).mul(4)
    sums[0, 7] = sums[1, 2000] = math.nan
    for activation in ACTIVATIONS:
        expected, slack = behind(activation, sums.double(), torch.zeros(3, 2100))
        got = packed.activate(sums, activation)
        missing = expected.isnan()
        assert torch.equal(got.isnan(), missing)
        assert ((got.double() - expected).abs() <= slack + expected.abs() * 2.0**-23)[~missing].all()
        factor = randn(*got.shape, seed=1)
        assert torch.equal(packed.activate(sums, activation, factor).nan_to_num(), (got * factor).nan_to_num())
    assert torch.equal(packed.activate(sums, "", sums).nan_to_num(), (sums * sums).nan_to_num())


def interpret(every: int) -> None:
    """Every n-th pair of a cut and a call, on CPU tensors; only where Triton was imported with TRITON_INTERPRET=1."""
    assert_tokens_are_arranged()
    assert_nan_is_kept()
    assert_codes_may_begin_at_any_byte()
    assert_groups_agree(every)
    assert_activations_of_many_tokens()
    pairs = [(cut, given) for format in NAMES for given in calls(format) for cut in SMALL]
    for cut, given in pairs[::every]:
        # The interpreter cuts fp32 to bf16 instead of rounding it: fp32 results.
        given["a"] = given["a"].float() if cut.kernel == "few_tokens" else given["a"]
        assert_rounded_once(multiplied(given, cut, plain=True, dtype=torch.float32), given)


@needs_triton
def test_the_interpreter_agrees_with_the_reference() -> None:
    interpret_apart(__name__, 11)


@needs_triton
@pytest.mark.slow
def test_the_interpreter_agrees_with_the_reference_on_every_cut() -> None:
    interpret_apart(__name__, 1)


_POINTERS = {
    "x_ptr": "*bf16",
    "codes_ptr": "*i32",
    "y_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "counts_ptr": "*i32",
    "ends_ptr": "*i32",
}


def compiled(cut: Cut, format: str, m: int, capability: int = 90, experts: int = 0, activation: str = "") -> Any:
    """What Triton makes of a cut for a compute capability, ten times its number; n and k multiples of 16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    planned = packed.plan(cut, m, 4096, 4096, format, False, True, False, 132, activation)
    if experts:
        planned = packed.plan_grouped(cut, experts, 4096, 4096, format, False, plain=False)
    evenly = cut.kernel == "overlapped"
    kernel = getattr(kernels("packed_hopper_kernels" if evenly else "packed_kernels"), cut.kernel)
    absent = [
        "bias_ptr",
        "a_ts_ptr",
        "b_ts_ptr",
        "factor_ptr",
        *(["ends_ptr"] if cut.kernel == "few_tokens" and not experts else []),
    ]
    constants = {**planned.constants, **dict.fromkeys(absent)}
    words = evenly or FORMATS[format].scale_dtype == torch.int32 or constants["UNIT"] > constants["BLOCK"]
    pointers = {**_POINTERS, "scales_ptr": "*i32" if words else "*u8"}
    tokens = f"tensordesc<bf16[{cut.tokens}, {cut.k}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
    types = {**pointers, "x_desc": tokens}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    aligned = (*pointers, "N", "K", "x_stride", "units", "words", "scale_words")
    # Of `overlapped` `units` are of a tile, and few.
    divisible = [n for n in aligned if n in signature and not (evenly and n == "units")]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    fixed = {(kernel.arg_names.index(n),): v for n, v in constants.items()}
    source = (GluonASTSource if evenly else ASTSource)(kernel, signature, fixed, attributes)
    options = {"num_warps": cut.warps, "launch_pdl": planned.overlap}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@before_triton_3_8
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("most", CUTS)
def test_codes_reach_the_tensor_cores_without_an_exchange(most: int, format: str) -> None:
    _, cut = packed.cuts(most, 4096, format, on_hopper=False)[0]
    result = compiled(cut, format, most)
    assert ("wgmma.mma_async" if cut.kernel == "many_tokens" else "mma.sync") in result.asm["ptx"]
    loop = result.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    # Nothing computed is put into shared memory, where another thread could read it.
    assert "ttg.local_alloc %" not in loop
    assert "ttg.local_store" not in loop
    assert "ttg.convert_layout" not in loop


@needs_triton
@before_triton_3_8
@pytest.mark.parametrize("format", NAMES)
def test_groups_take_no_exchange_either(format: str) -> None:
    _, cut = packed.cuts(8, 4096, format, on_hopper=False)[0]
    loop = compiled(cut, format, 8, experts=6).asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert "ttg.local_alloc %" not in loop
    assert "ttg.convert_layout" not in loop


@needs_triton
@pytest.mark.parametrize("most", [1, 64])
def test_both_halves_of_a_gate_are_sums_of_one_thread(most: int) -> None:
    """A gated activation exchanges no more than the results of any GEMM, which are put in order to be stored."""
    _, cut = packed.cuts(most, 4096, "hif4", on_hopper=False)[0]
    plain, gated = (compiled(cut, "hif4", most, activation=name) for name in ("", "swiglu"))
    exchanges = [code.asm["ttgir"].count("ttg.convert_layout") for code in (plain, gated)]
    assert exchanges[0] == exchanges[1]
    assert plain.metadata.shared == gated.metadata.shared


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_compile_in_even_shares(activation: str) -> None:
    plain, result = (compiled(EVENLY[1], "hif4", 64, activation=name) for name in ("", activation))
    assert result.asm["ttgir"].count("ttg.convert_layout") == plain.asm["ttgir"].count("ttg.convert_layout")


@needs_triton
@pytest.mark.parametrize("format", ["hif4", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_products_run_while_codes_are_decoded(format: str) -> None:
    """Four products of a unit; only after the last one does a thread wait for all of them."""
    cut = next(cut for _, cut in packed.cuts(64, 4096, format, on_hopper=True) if cut.kernel == "overlapped")
    result = compiled(cut, format, 64)
    loop = result.asm["ttgir"].split("scf.for")[1].split("scf.yield")[0]
    assert loop.count("isAsync = true") == loop.count("ttng.warp_group_dot ") == 4
    assert re.findall(r"warp_group_dot_wait .*pendings = (\d)", loop) == ["1", "1", "1", "0"]
    assert "ttg.local_store" not in loop
    # Each product is issued as four instructions, whose codes the thread itself has loaded.
    assert result.asm["ptx"].count("wgmma.mma_async") == 16


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("cut", EVENLY)
def test_every_cut_in_even_shares_compiles(cut: Cut, format: str) -> None:
    assert "wgmma.mma_async" in compiled(cut, format, cut.tokens).asm["ptx"]


@needs_triton
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("most", [1, 64])
def test_compiles_for_sm_100(most: int, format: str) -> None:
    """Compiled only: not run on hardware."""
    _, cut = packed.cuts(most, 4096, format, on_hopper=False)[0]
    result = compiled(cut, format, most, capability=100)
    assert ("tcgen05.mma" if cut.kernel == "many_tokens" else "mma.sync") in result.asm["ptx"]


def _half(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", (bits & 0xFFFF) << 16))[0]


def _product(a: int, b: int) -> int:
    """fma.rn.bf16x2 with -0: both products, which must be bf16 numbers."""
    bits = 0
    for at in (0, 16):
        value = _half(a >> at) * _half(b >> at)
        (single,) = struct.unpack("<I", struct.pack("<f", value))
        assert single & 0xFFFF == 0
        bits |= single >> 16 << at
    return bits


def _permuted(a: int, b: int, selection: int) -> int:
    bytes_ = (a | b << 32).to_bytes(8, "little")
    return int.from_bytes(bytes(bytes_[selection >> 4 * i & 7] for i in range(4)), "little")


_INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, n: a << n & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & 0xFFFFFFFF,
    "prmt.b32": _permuted,
    "fma.rn.bf16x2": lambda a, b, c: _product(a, b),
}


def executed(assembly: str, *operands: int) -> int:
    """What inline assembly puts into $0."""
    registers = {f"${i}": value for i, value in enumerate(operands, 1)}
    for statement in assembly.strip("{}").split(";"):
        name, _, arguments = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = (a.strip() for a in arguments.split(","))
        values = [registers[a] if a in registers else int(a, 0) for a in sources]
        registers[target] = _INSTRUCTIONS[name](*values)
    return registers["$0"]


def _twice(value: float) -> int:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return bits | bits >> 16


@needs_triton
@pytest.mark.parametrize("format", NAMES)
def test_the_assembly_of_a_pair(format: str) -> None:
    from fp4compile.backends.triton import packed_kernels

    fmt, constants = FORMATS[format], packed.known(format)
    assert not isinstance(constants, No)
    element = packed_kernels._E2M1.value if constants["ELEMENT"] == "e2m1" else packed_kernels._EVEN.value
    if constants["ELEMENT"] == "e2m1":
        element += (packed_kernels._TWO if constants["SCALING"] == "e8m0" else packed_kernels._ONE).value
    # The factor of scale 1: what the kernel leaves out of an operand comes back into the sum.
    factor = {"e6m2": 2.0**110, "e4m3": 2.0**118, "e8m0": 1.0}[constants["SCALING"]]
    for j, selection in enumerate(("0x4400", "0x5511", "0x6622", "0x7733")):
        for first in range(16):
            for second in range(16):
                word = first << 8 * j | second << 8 * j + 4 | 0x96C3A5F1 & ~(0xFF << 8 * j)
                bits = executed(packed_kernels._SPLIT.value + selection + element, word, _twice(factor))
                for code, got in ((first, _half(bits)), (second, _half(bits >> 16))):
                    expected = fmt.element.values[code]
                    assert got * constants["FACTOR"] == expected
                    assert math.copysign(1.0, got) == math.copysign(1.0, expected)


@needs_triton
@pytest.mark.parametrize("format", NAMES)
def test_the_assembly_of_two_halves_of_a_word(format: str) -> None:
    from fp4compile.backends.triton import packed_hopper_kernels

    fmt, constants = FORMATS[format], packed.known(format)
    assert not isinstance(constants, No)
    one = {"e6m2": 2.0**110, "e4m3": 2.0**118, "e8m0": 1.0}[constants["SCALING"]]
    factor = _twice(one) & 0xFFFF | _twice(4 * one) & 0xFFFF0000
    for j in range(4):
        assembly = packed_hopper_kernels._decoded.fn(j, constants["ELEMENT"], constants["SCALING"])
        for first in range(16):
            for second in range(16):
                places = 0xF << 4 * j | 0xF << 4 * j + 16
                word = first << 4 * j | second << 4 * j + 16 | 0x96C3A5F1 & ~places
                bits = executed(assembly, word, factor)
                for code, got, times in ((first, _half(bits), 1.0), (second, _half(bits >> 16), 4.0)):
                    expected = fmt.element.values[code]
                    assert got * constants["FACTOR"] == expected * times
                    assert math.copysign(1.0, got) == math.copysign(1.0, expected)


@needs_triton
def test_the_assembly_of_scales() -> None:
    from fp4compile.backends.triton import packed_kernels

    for code in range(256):
        if code & 0x7F != 0x7F:
            scale = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
            assert executed(packed_kernels._E4M3.value, code) == _twice(scale * 2.0**118)
    for bit, assembly in enumerate((packed_kernels._ADD_1, packed_kernels._ADD_2, packed_kernels._ADD_16)):
        mask = (1, 2, 16)[bit]
        for bits in (0, mask, 0xFFFFFFFF, 0xFFFFFFFF ^ mask):
            expected = _twice(3.0 * 2.0 ** bool(bits & mask))
            assert executed(assembly.value, _twice(3.0), bits) == expected


def test_every_cut_can_be_launched() -> None:
    for cuts in CUTS.values():
        for _, cut in cuts:
            assert cut.warps % cut.slices == 0
            assert cut.tokens >= 8
            assert cut.shared <= HOPPER["shared"]


@pytest.mark.parametrize("device", [HOPPER, AMPERE])
@pytest.mark.parametrize("format", NAMES)
@pytest.mark.parametrize("most", CUTS)
def test_every_size_has_a_default_cut(most: int, format: str, device: dict[str, Any]) -> None:
    rows = packed.cuts(most, 4096, format, device["on_hopper"])
    assert packed.default(most, 2**20, 4096, format, **device) == rows[0][1]
    smallest = packed.default(most, 64, 14336, format, **device)
    assert smallest == next(cut for least, cut in rows if least == 0.0)
    assert packed.default(most, 64, 4096, format, **{**device, "shared": 0}) is None


# Weights [n, k] of an 8-billion model, and what was fastest for them.
@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 28672, 4096, Cut("few_tokens", 16, 8, 256, 3, slices=1)),
        (1, 6144, 4096, Cut("few_tokens", 16, 8, 256, 3, slices=4)),
        (1, 4096, 14336, Cut("few_tokens", 16, 8, 256, 5, slices=4)),
        (1, 4096, 4096, Cut("few_tokens", 16, 8, 256, 3, slices=4)),
        (16, 28672, 4096, Cut("few_tokens", 32, 16, 256, 3, slices=1)),
        (16, 6144, 4096, Cut("few_tokens", 16, 16, 256, 4, slices=1)),
        (16, 4096, 14336, Cut("few_tokens", 16, 16, 256, 4, parts=4)),
        (32, 28672, 4096, Cut("many_tokens", 64, 32, 128, 4)),
        (32, 6144, 4096, Cut("many_tokens", 64, 32, 128, 4, parts=4)),
        (64, 28672, 4096, Cut("overlapped", 128, 64, 256, 3, warps=8)),
        (64, 6144, 4096, Cut("many_tokens", 64, 64, 128, 3, parts=4)),
        (64, 4096, 14336, Cut("many_tokens", 64, 64, 128, 4, parts=4)),
        (256, 28672, 4096, Cut("overlapped", 128, 128, 256, 3, warps=8)),
        (256, 6144, 4096, Cut("overlapped", 128, 128, 256, 3, warps=8)),
        (256, 4096, 14336, Cut("overlapped", 128, 128, 256, 3, warps=8)),
    ],
)
def test_the_default_cut_is_the_one_that_was_fastest(m: int, n: int, k: int, expected: Cut) -> None:
    assert packed.default(m, n, k, "hif4", **HOPPER) == expected


@pytest.mark.parametrize(
    ("format", "k", "words"),
    [("mxfp4", 128, True), ("mxfp4", 64, False), ("nvfp4", 64, True), ("nvfp4", 80, False), ("hif4", 64, True)],
)
def test_scales_that_are_no_words_are_left_to_other_cuts(format: str, k: int, words: bool) -> None:
    cut = packed.default(256, 28672, k, format, **HOPPER)
    assert cut is not None
    assert (cut.kernel == "overlapped") == words
    assert packed.default(256, 28672, k, format, **AMPERE) != cut or not words


def test_programs_share_all_units() -> None:
    cut, multiprocessors = EVENLY[1], 132
    planned = packed.plan(cut, 100, 6144, 4000, "hif4", False, True, False, multiprocessors)
    assert (planned.programs, planned.steps, cut.grid(100, 6144)) == (132, 16, (2, 48, 1))
    small = packed.plan(cut, 3, 60, 500, "hif4", False, True, False, multiprocessors)
    assert small.programs == small.steps == 2


@pytest.mark.parametrize("cut", SMALL)
@pytest.mark.parametrize("k", [64, 512, 4096, 4160])
def test_steps_cover_every_column(cut: Cut, k: int) -> None:
    steps, even = cut.steps(k)
    covered = steps * cut.k * cut.slices * cut.parts
    assert covered >= k
    assert even == (covered == k)


def test_counts_are_shared_by_the_launches_of_a_stream_alone() -> None:
    counts = object.__new__(packed._Counts)
    counts._zeros, counts._taken, counts._of_stream = torch.arange(counts.SIZE), 0, {}
    counts._lock = threading.Lock()
    first, again = counts.of(1, 100, False), counts.of(1, 200, False)
    assert first is not None
    assert first is again
    taken = [first, counts.of(2, 5000, False), counts.of(1, 300, True), counts.of(1, 300, True)]
    places = torch.cat([t for t in taken if t is not None])
    assert places.unique().numel() == places.numel() == 4096 + 5000 + 600
    assert counts.of(1, counts.SIZE, True) is None


@pytest.mark.parametrize("size", [8, 16])
def test_groups_never_take_more_tiles_than_there_are_programs(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for experts in (1, 3, 8):
        for tokens in (1, 7, 8, 40):
            most = packed._most_tiles(tokens, experts, size)
            for _ in range(20):
                cuts = torch.randint(0, tokens + 1, (experts - 1,), generator=generator).sort().values.tolist()
                sizes = [b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)]
                assert sum(-(-n // size) for n in sizes) <= most
    assert packed._most_tiles(8, 9, size) == 8
    assert packed._most_tiles(2 * size + 2, 2, size) == 4  # twice size + 1


def test_what_groups_are_declined() -> None:
    samples = [s for s in OPS["grouped_mm_packed"].samples() if s["a"].dtype == torch.bfloat16]
    good = {"a_tensor_scale": None, **samples[0]}
    assert packed.operands_of_groups(good) is None
    for change, why in (
        ({"a": good["a"].float()}, "bf16"),
        ({"b": good["b"][0]}, "no stack"),
        ({"b_scales": good["b_scales"][:, 1:]}, "do not hold the blocks"),
        ({"ends": good["ends"][1:]}, "groups of tokens"),
        ({"b_tensor_scale": torch.ones(2)}, "one fp32 number"),
    ):
        assert why in (packed.operands_of_groups({**good, **change}) or "")


# --- what it supports ------------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers as a machine with a GPU gives them."""
    monkeypatch.setattr(table, "available", lambda least=None: Yes())


def _answer(**changes: Any) -> str | None:
    given = {**call("hif4", 3, 16, 128), **changes}
    return packed.operands(given)


def test_declines_say_why() -> None:
    codes, scales = call("hif4", 3, 16, 128)["b"], call("hif4", 3, 16, 128)["b_scales"]
    assert _answer() is None
    cases: dict[str, dict[str, Any]] = {
        "not a dense operand": {"a_format": "hif4"},
        "times a packed one": {"b_format": ""},
        "is read": {"a": torch.zeros(3, 128, dtype=torch.float64)},
        "[..., 128]": {"a": torch.zeros(3, 127)},
        "no matrix": {"b": codes[None]},
        "with its scales": {"b_scales": None},
        "do not hold the blocks": {"b_scales": scales[:, :1]},
        "are written": {"dtype": torch.int8},
        "b_tensor_scale": {"b_tensor_scale": torch.ones(2)},
        "one number per row": {"bias": torch.ones(3, 16)},
        "no activation 'mish'": {"activation": "mish"},
        "the factor is torch.bfloat16 (3, 15)": {"factor": torch.ones(3, 15).bfloat16()},
        "not fp32, bf16 or fp16 (3, 8)": {"factor": torch.ones(3, 8).double(), "activation": "geglu"},
        "of 15 rows": {"activation": "swiglu", "b": codes[:15], "b_scales": scales[:15]},
    }
    for word, changes in cases.items():
        reason = _answer(**changes)
        assert reason is not None
        assert word in reason


def test_every_built_in_format_is_read() -> None:
    for format in NAMES:
        assert not isinstance(packed.known(format), No)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("format", NAMES)
def test_many_tokens_are_multiplied_by_a_decoded_weight(format: str, dtype: torch.dtype) -> None:
    given = call(format, packed.MOST_TOKENS + 1, 40, 200, biased=True, scaled=True)
    given["a"] = given["a"].to(dtype)
    assert_rounded_once(packed.mm(**given), given)


def test_no_tokens_make_no_outputs_and_no_columns_make_the_bias() -> None:
    given = call("hif4", 0, 40, 200, biased=True)
    assert packed.mm(**given).shape == (0, 40)
    assert packed.mm(**{**given, "a": given["a"].view(2, 0, 200)}).shape == (2, 0, 40)
    empty = {"a": torch.zeros(3, 0, dtype=torch.bfloat16), "b": given["b"][:, :0], "b_scales": given["b_scales"][:, :0]}
    assert torch.equal(packed.mm(**{**given, **empty, "k": 0}), given["bias"].expand(3, 40))


# --- measured cuts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, on a machine whose name is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "_place", lambda index: "here")
    tune._stored.cache_clear()
    yield tmp_path / "fp4compile"
    tune._stored.cache_clear()


def _keep(folder: Path, row: Any) -> Cut | None:
    folder.mkdir(exist_ok=True)
    (folder / "packed_mm.json").write_text(json.dumps({"here": {"hif4 6144x4096 up to 16": row}}))
    tune._stored.cache_clear()
    return tune.stored(0, "hif4", 12, 6144, 4096)


def test_a_stored_cut_is_found(folder: Path) -> None:
    assert tune.stored(0, "hif4", 12, 6144, 4096) is None
    _, cut = CUTS[16][-1]
    assert _keep(folder, asdict(cut)) == cut
    assert tune.stored(0, "hif4", 17, 6144, 4096) is None
    assert tune.stored(0, "mxfp4", 12, 6144, 4096) is None


def test_what_is_no_cut_of_the_table_is_not_taken(folder: Path) -> None:
    assert _keep(folder, asdict(replace(CUTS[16][0][1], stages=99))) is None
    assert _keep(folder, {"kernel": "few_tokens"}) is None
    assert _keep(folder, 7) is None
    (folder / "packed_mm.json").write_text("{")
    tune._stored.cache_clear()
    assert tune.stored(0, "hif4", 12, 6144, 4096) is None


# --- on a GPU --------------------------------------------------------------------------------------------------------


class TestOnGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("cut", SMALL)
    def test_every_kind_of_cut(self, cut: Cut, format: str) -> None:
        for given in calls(format):
            assert_rounded_once(multiplied(moved(given), cut, plain=False, dtype=torch.bfloat16), given)

    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("cut", EVENLY)
    def test_even_shares(self, cut: Cut, format: str) -> None:
        if not packed.on_hopper(0):
            pytest.skip("not a Hopper GPU")
        more = [call(format, m, 4096 + 48, 4096, scaled=m == 5) for m in (5, 150)]
        for given in (*calls(format), *more):
            if given["b_scales"].shape[1] * given["b_scales"].itemsize % 4 == 0:
                for dtype in (torch.bfloat16, torch.float32):
                    assert_rounded_once(multiplied(moved(given), cut, plain=False, dtype=dtype), given)

    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("cut", EVENLY)
    def test_even_shares_read_every_code_exactly(self, cut: Cut, format: str) -> None:
        if not packed.on_hopper(0):
            pytest.skip("not a Hopper GPU")
        given, weight = one_hot(format)
        got = multiplied(moved(given), cut, plain=False, dtype=torch.float32).cpu()
        assert got[:, 17].isnan().all()
        got[:, 17] = 0
        assert torch.equal(got, weight.T)

    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("most", CUTS)
    def test_every_cut_of_the_table(self, most: int, format: str) -> None:
        given = call(format, most, 528, 4096)
        for _, cut in packed.cuts(most, 4096, format, packed.on_hopper(0)):
            assert_rounded_once(multiplied(moved(given), cut, plain=False, dtype=torch.bfloat16), given)

    @pytest.mark.parametrize("format", NAMES)
    def test_the_op_at_any_number_of_tokens(self, format: str) -> None:
        import fp4compile  # noqa: F401 - installs the kernels

        for m in (0, 1, 2, 17, 65, 300, 600):
            given = call(format, m, 72, 264, biased=m % 2 == 0, scaled=m > 16)
            on_gpu = moved(given)
            assert KERNEL.supports(on_gpu) == Yes()
            assert_rounded_once(KERNEL.run(**on_gpu), given)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activations_at_any_number_of_tokens(self, activation: str) -> None:
        """Sums of more tokens than the packed kernels take are rounded in front of the activation, too."""
        for m in (0, 1, 2, 16, 33, 65, 300):
            given = call("hif4", m, 1072, 1024, biased=m % 2 == 0, activation=activation, by_factor=m > 16)
            assert_rounded_once(KERNEL.run(**moved(given)), given)
        given = call("hif4", 600, 1072, 264, activation=activation)
        sums = KERNEL.run(**moved({**given, "activation": ""}))
        expected = packed.activate(sums, activation)
        assert torch.equal(KERNEL.run(**moved(given)), expected)
        exact_of_sums, slack = behind(activation, sums.double(), torch.zeros_like(sums, dtype=torch.float64))
        error = (expected.double() - exact_of_sums).abs()
        assert (error <= exact_of_sums.abs() * torch.finfo(torch.bfloat16).eps / 2 * 1.001 + slack).all()

    @pytest.mark.parametrize("activation", ["silu", "geglu"])
    @pytest.mark.parametrize("cut", EVENLY)
    def test_activations_in_even_shares(self, cut: Cut, activation: str) -> None:
        if not packed.on_hopper(0):
            pytest.skip("not a Hopper GPU")
        for m, n in ((5, 4144), (150, 4144), (33, 74)):
            given = call("hif4", m, n, 4096, biased=True, activation=activation, by_factor=m != 5)
            for dtype in (torch.bfloat16, torch.float32):
                assert_rounded_once(multiplied(moved(given), cut, plain=False, dtype=dtype), given)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        given = {**call("hif4", 5, 72, 264), "a": randn(5, 264).to(dtype)}
        assert_rounded_once(KERNEL.run(**moved(given)), given)

    def test_three_dimensions_and_strides(self) -> None:
        given = call("hif4", 6, 72, 264, biased=True)
        on_gpu = moved(given)
        expected = KERNEL.run(**on_gpu)
        assert_rounded_once(expected, given)
        batched = KERNEL.run(**{**on_gpu, "a": on_gpu["a"].view(2, 3, 264)})
        assert torch.equal(batched.view(6, 72), expected)
        for strided in (on_gpu["a"].t().contiguous().t(), torch.cat([on_gpu["a"]] * 2, dim=1)[:, :264]):
            assert torch.equal(KERNEL.run(**{**on_gpu, "a": strided}), expected)

    @pytest.mark.parametrize("format", NAMES)
    @pytest.mark.parametrize("most", CUTS)
    def test_every_code_under_every_scale_is_exact(self, most: int, format: str) -> None:
        given, weight = one_hot(format)
        for start in range(0, given["k"], most):
            some = {**given, "a": given["a"][start : start + most]}
            for _, cut in packed.cuts(most, given["k"], format, packed.on_hopper(0)):
                got = multiplied(moved(some), cut, plain=False, dtype=torch.float32).cpu()
                assert got[:, 17].isnan().all()
                got[:, 17] = 0
                assert torch.equal(got, weight.T[start : start + most])

    @pytest.mark.parametrize("m", [1, 16, 64, 200])
    def test_captured_calls_repeat_and_share_nothing(self, m: int) -> None:
        on_gpu = moved(call("hif4", m, 160, 8192))
        expected = KERNEL.run(**on_gpu)
        torch.cuda.synchronize()
        graphs, results = [], []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results.append([KERNEL.run(**on_gpu) for _ in range(3)])
            graphs.append(graph)
        for _ in range(5):
            for graph in graphs:
                with torch.cuda.stream(torch.cuda.Stream()):
                    graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for each in results for y in each)

    @pytest.mark.parametrize("m", [1, 64, 300])
    def test_codes_may_begin_at_any_byte(self, m: int) -> None:
        on_gpu = moved(call("mxfp4", m, 528, 1024))
        displaced_ = {**on_gpu, "b": displaced(on_gpu["b"]), "b_scales": displaced(on_gpu["b_scales"])}
        assert torch.equal(KERNEL.run(**displaced_), KERNEL.run(**on_gpu))

    @pytest.mark.parametrize("format", NAMES)
    def test_groups(self, format: str) -> None:
        options = {"scaled": True} if FORMATS[format].has_tensor_scale else {}
        given, ends = grouped_call(format, 528, 4096, **options)
        on_gpu = moved(given)
        for cut in SMALL[:3]:
            got = multiplied_in_groups(on_gpu, ends.cuda(), cut, plain=False, dtype=torch.bfloat16)
            assert_each_group_has_its_weight(got, given, ends)

    def test_every_sample_of_groups(self) -> None:
        for sample in OPS["grouped_mm_packed"].samples():
            got = OPS["grouped_mm_packed"].overload(**moved(dict(sample))).cpu()
            expected = OPS["grouped_mm_packed"].reference(**sample)
            # A tensor scale behind torch's grouped GEMM is a second rounding.
            rtol = 2**-7 if expected.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, expected, rtol=2 * rtol, atol=1e-3)

    def test_captured_groups_follow_their_ends(self) -> None:
        given, ends = grouped_call("hif4", 160, 1024)
        on_gpu, on_device = moved(given), ends.cuda()
        codes, scales = (on_gpu[n].view(6, 160, -1) for n in ("b", "b_scales"))

        def run() -> Tensor:
            return packed.grouped_mm(on_gpu["a"], codes, scales, on_device, "hif4", 1024, False, None, None)

        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for sizes in ((25, 0, 0, 0, 0, 0), (0, 2, 9, 0, 14, 0), GROUPS[0]):
            other = torch.tensor(sizes).cumsum(0).to(torch.int32)
            on_device.copy_(other)
            graph.replay()
            torch.cuda.synchronize()
            assert_each_group_has_its_weight(y, given, other)

    def test_a_tuned_cut_is_used(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        tune._stored.cache_clear()
        chosen = tune.tune("hif4", 512, 1024, tokens=(1,))
        assert tune.stored(0, "hif4", 1, 512, 1024) == chosen[1]
        planned = packed._chosen(1, 512, 1024, "hif4", False, 0)
        assert planned is not None
        assert planned.cut == chosen[1]
        given = call("hif4", 1, 512, 1024)
        assert_rounded_once(KERNEL.run(**moved(given)), given)
        tune._stored.cache_clear()
        packed.forget()
