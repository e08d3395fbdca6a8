"""The codec against golden vectors, against the formats' definitions and against published error figures.

Unless a test says otherwise it runs the reference implementation of the ops, not the kernels of a backend.
"""

import dataclasses
import math
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp4compile
from fp4compile import codec, philox
from fp4compile.formats import E2M1, FORMATS, S1P2, ScaleLevel, register_format
from fp4compile.ops import OPS
from fp4compile.quantized import Quantized

DATA = Path(__file__).parent / "data"
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NAMES = ("hif4", "mxfp4", "nvfp4")
# Every rule once: aliases stand for another one.
RULES = [(f.name, rule) for f in FORMATS.values() for rule in f.scale_rules if rule not in f.aliases]
TRUNCATION_FREE = [(name, rule) for name, rule in RULES if FORMATS[name].is_truncation_free(rule)]
ONE_WORD = {"hif4": 48 << 2, "mxfp4": 127, "nvfp4": 7 << 3}  # the stored scale of value 1
NAN_WORD = {"hif4": 0xFF, "mxfp4": 0xFF, "nvfp4": 0x7F}
ZERO_WORD = {"hif4": 0x00, "mxfp4": 0x00, "nvfp4": 0x08}


def quantize(x: Tensor, format: str, axis: int = -1, tensor_scale: Tensor | bool | None = None, **options) -> Quantized:
    """`fp4compile.quantize` on the reference implementation, `stream` included."""
    rule = options.get("scale_rule")
    if tensor_scale is False or not FORMATS[format].is_scaled_per_tensor(rule):
        tensor_scale = None
    elif tensor_scale is None:
        tensor_scale = OPS["tensor_scale"].reference(x, format, scale_rule=rule)
    if isinstance(options.get("seed"), int):
        options["seed"] = torch.tensor(options["seed"])
    axis %= x.dim()
    codes, scales = OPS["quantize"].reference(x, format, axis, tensor_scale=tensor_scale, **options)
    return Quantized(codes, scales, tensor_scale, format, tuple(x.shape), axis, options.get("block_2d", False))


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    size = q.shape[q.axis]
    arguments = (q.codes, q.scales, q.tensor_scale, q.format, q.axis, size, q.block_2d, dtype)
    return OPS["dequantize"].reference(*arguments)


def fake_quantize(x: Tensor, format: str, axis: int = -1, **options) -> Tensor:
    return dequantize(quantize(x, format, axis, **options), x.dtype)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> np.ndarray:
    """Bit patterns: equal NaNs are equal, 0 and -0 are not."""
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(view).numpy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(bits(a), bits(b))


def multiplier(q: Quantized) -> Tensor:
    """What each element is multiplied by: the decoded value of a tensor of ones under the scales of q."""
    one = FORMATS[q.format].element.magnitudes.index(1.0)
    return dequantize(dataclasses.replace(q, codes=torch.full_like(q.codes, one * 0x11)))


def element_codes(q: Quantized) -> Tensor:
    """Codes 0..15 in the layout of the logical tensor."""
    return codec.unpack(q.codes)[..., : q.shape[q.axis]].movedim(-1, q.axis)


@st.composite
def tensors(draw, least_exponent: int = -135, greatest_exponent: int = 118) -> Tensor:
    """Finite fp32 matrices of ragged sizes and any magnitude, with zeros of both signs and ties."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 140))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponent = draw(st.integers(least_exponent, greatest_exponent))
    spread = draw(st.sampled_from([0, 1, 4, 8]))
    shifts = torch.randint(-spread, spread + 1, (rows, columns), generator=generator)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        values = (values * 8).round() / 8
    special = torch.tensor(draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 6.0, 7.0]), max_size=8)))
    at = torch.randint(0, rows * columns, special.shape, generator=generator)
    values = torch.ldexp(values, exponent + shifts).flatten()
    values[at] = torch.ldexp(special.double(), torch.tensor(exponent))
    return values.reshape(rows, columns).float()


# --- golden vectors -----------------------------------------------------------------------------------------

PATHS = {
    "reference": SimpleNamespace(quantize=quantize, dequantize=dequantize, fake_quantize=fake_quantize),
    "public": fp4compile,
}

GOLDEN = [
    # file, options, then the names of the input, the codes, the stored scales and the decoded values
    ("hif4", {}, "x", "codes", "scale_word", "y"),
    ("hif4", {}, "special_x", "special_codes", "special_scale_word", None),
    *(
        ("mxfp4", {"scale_rule": r}, "x", f"codes_{r}", f"scale_{r}", f"y_{r}")
        for r in ("floor", "ceil", "even", "rceil")
    ),
    ("nvfp4", {}, "x", "codes", "scale", "y"),
    ("nvfp4", {"tensor_scale": False}, "x", "codes_single", "scale_single", None),
]


@cache
def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.mark.parametrize("name", NAMES)
def test_every_golden_array_is_compared(name):
    read = {key for file, _, *keys in GOLDEN if file == name for key in keys if key}
    described = {"kind"} | ({"tensor_scale"} if name == "nvfp4" else set())  # tensor_scale: test_golden_tensor_scale
    assert set(load(name)) == read | described


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["last axis", "first axis", "first axis, strided"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "options", "x", "codes", "scales", "y"), GOLDEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_golden(name, options, x, codes, scales, y, path, layout, dtype):
    data, api = load(name), PATHS[path]
    value = torch.from_numpy(data[x])
    if value.dtype != torch.float32:
        value = torch.from_numpy(data[x].view(np.int16)).view(torch.bfloat16).to(dtype)
    axis = -1
    if layout != "last axis":
        axis, value = 0, value.t() if layout.endswith("strided") else value.t().contiguous()
    q = api.quantize(value, name, axis, **options)
    assert np.array_equal(q.codes.numpy(), data[codes])
    stored = data[scales].reshape(len(data[codes]), -1)
    assert np.array_equal(q.scales.numpy().view(stored.dtype), stored)
    if y is None:
        return
    decoded = api.dequantize(q, torch.bfloat16)
    faked = api.fake_quantize(value, name, axis, **options).to(torch.bfloat16)
    for result in (decoded, faked):
        rows = result if axis == -1 else result.t()
        assert np.array_equal(bits(rows).view(np.uint16), data[y])


@pytest.mark.parametrize("path", PATHS)
def test_golden_tensor_scale(path):
    data = load("nvfp4")
    x = torch.from_numpy(data["x"].view(np.int16)).view(torch.bfloat16)
    assert PATHS[path].quantize(x, "nvfp4").tensor_scale.numpy().tobytes() == data["tensor_scale"].tobytes()


# --- decoding, exhaustively ---------------------------------------------------------------------------------


def blocks_of(name: str, words: list[int], code: int) -> Quantized:
    """One block per stored scale, every element of one code."""
    fmt = FORMATS[name]
    codes = torch.full((len(words), fmt.block // 2), code * 0x11, dtype=torch.uint8)
    scales = torch.tensor(words, dtype=torch.int64).to(fmt.scale_dtype).unsqueeze(-1)
    return Quantized(codes, scales, None, name, (len(words), fmt.block), 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("code", range(16))
def test_all_codes_decode_to_the_table(name, code):
    y = dequantize(blocks_of(name, [ONE_WORD[name]], code))
    expected = torch.tensor(FORMATS[name].element.values[code]).expand_as(y)
    assert same_bits(y, expected)


SCALE_VALUES = {
    "hif4": [2.0 ** ((b >> 2) - 48) * (1 + (b & 3) / 4) for b in range(255)],
    "mxfp4": [2.0 ** (b - 127) for b in range(255)],
    # Sign clear; exponent 0 is subnormal.
    "nvfp4": [2.0 ** (max(b >> 3, 1) - 7) * ((b >> 3 > 0) + (b & 7) / 8) for b in range(127)],
}


@pytest.mark.parametrize("name", NAMES)
def test_all_stored_scales_decode_to_their_value(name):
    expected = SCALE_VALUES[name]
    y = multiplier(blocks_of(name, [*range(len(expected)), NAN_WORD[name]], 0))
    assert y[:-1, 0].tolist() == expected
    assert y[-1].isnan().all()


@pytest.mark.parametrize("bit", range(8, 32))
def test_each_level_bit_of_hif4_doubles_its_group(bit):
    element = torch.arange(64)
    doubled = element // 8 == bit - 8 if bit < 16 else element // 4 == bit - 16
    word = ONE_WORD["hif4"] | 1 << bit
    assert torch.equal(multiplier(blocks_of("hif4", [word], 0))[0], 1.0 + doubled)


def test_pack_and_unpack_invert():
    every_byte = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    assert torch.equal(codec.pack(codec.unpack(every_byte)), every_byte)
    assert codec.unpack(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]  # even element low


# --- rounding -----------------------------------------------------------------------------------------------

TIES = {  # value: the code that a tie rounds to
    E2M1: {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6},
    S1P2: {(i + 0.5) / 4: i + 1 for i in range(7)},
    dataclasses.replace(S1P2, tie="even"): {(i + 0.5) / 4: i + i % 2 for i in range(7)},
}


@pytest.mark.parametrize("element", TIES, ids=lambda e: f"{e.name}-{e.tie}")
def test_ties_and_their_neighbours(element):
    for value, code in TIES[element].items():
        t = torch.tensor(value)
        # Far enough to survive the fp32 sum of the published S1P2 arithmetic.
        below, above = t * (1 - 2.0**-20), t * (1 + 2.0**-20)
        lower = max(c for c, m in enumerate(element.magnitudes) if m < value)
        got = codec.round_nearest(torch.stack((below, t, above)), element).tolist()
        assert got == [lower, code, lower + 1], value
    grid = torch.tensor(element.magnitudes)
    assert codec.round_nearest(grid, element).tolist() == list(range(8))
    assert codec.round_nearest(torch.tensor([element.max * 1.001, 1e30, math.inf]), element).tolist() == [
        7,
        7,
        7,
    ]


# The relative error of t = |x| / scale before it is rounded. hif4, the authors' rule: the reciprocal is
# rounded to bf16 (2**-9). nvfp4: 1/ts, /s, the product and the decoded grid itself each round to fp32. hif4:
# the quotient, or the sum in floor(4t + 0.5). mxfp4 multiplies by powers of two only; by 3/4, and by 4/3 in the grid.
T_ERROR = {
    ("hif4", "authors"): 2.0**-9 + 2.0**-21,
    ("hif4", "truncation-free"): 2.0**-22,
    ("mxfp4", "floor-3/4"): 2.0**-22,
    **{("nvfp4", rule): 2.0**-21 for rule in FORMATS["nvfp4"].scale_rules},
}
SMALLEST = 2.0**-148  # decoded values and nvfp4 grids may be subnormal: two roundings of half of 2**-149


@pytest.mark.parametrize(("name", "rule"), RULES)
@EXAMPLES
@given(x=tensors())
def test_decoded_value_is_the_nearest_of_the_chosen_scale(name, rule, x):
    q = quantize(x, name, scale_rule=rule)
    scale = multiplier(q).double()
    grid = scale.unsqueeze(-1) * torch.tensor(FORMATS[name].element.values, dtype=torch.float64)
    distance = (x.double().unsqueeze(-1) - grid).abs().amin(-1)
    error = (dequantize(q).double() - x).abs()
    # A relative error d of t moves the decision, and so the distance of the chosen value, by at most 2 d |x|.
    d = T_ERROR.get((name, rule), 0.0)
    assert (error <= distance + 2 * d * x.abs().double() + (SMALLEST if d else 0.0)).all()
    assert (element_codes(q) >= 8).equal(x.signbit())


@pytest.mark.parametrize(("name", "rule"), [("mxfp4", rule) for rule in ("floor", "ceil", "even", "rceil")])
@EXAMPLES
@given(x=tensors())
def test_mxfp4_is_idempotent_in_value(name, rule, x):
    y = fake_quantize(x, name, scale_rule=rule)
    assert same_bits(fake_quantize(y, name, scale_rule=rule), y)


@pytest.mark.parametrize(
    ("rule", "scale"),
    # With a tensor scale that is no power of two, the smallest E4M3 above a rounded quotient can be the next
    # one.
    [("nearest", None), ("nearest", False), ("truncation-free", False)],
)
@EXAMPLES
@given(x=tensors(least_exponent=-40, greatest_exponent=100))
def test_nvfp4_is_idempotent_in_value_under_a_given_tensor_scale(rule, scale, x):
    options = {
        "scale_rule": rule,
        "tensor_scale": False if scale is False else codec.tensor_scale(x, FORMATS["nvfp4"]),
    }
    y = fake_quantize(x, "nvfp4", **options)
    assert same_bits(fake_quantize(y, "nvfp4", **options), y)


def test_hif4_is_not_idempotent():
    ones = torch.ones(64)
    once = fake_quantize(ones, "hif4")
    assert once.unique().tolist() == [0.9375]
    assert fake_quantize(once, "hif4").unique().tolist() == [0.875]


# --- special values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "rule"), RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_poisons_its_block_only(name, rule, bad):
    n = FORMATS[name].block
    x = randn(3 * n)
    clean = quantize(x, name, scale_rule=rule, tensor_scale=False)
    x[n + 3] = bad
    q = quantize(x, name, scale_rule=rule, tensor_scale=False)
    y = dequantize(q)
    assert q.scales[1] == NAN_WORD[name]
    assert not q.codes[n // 2 : n].any()
    assert y[n : 2 * n].isnan().all()
    kept = torch.tensor([True, False, True]).repeat_interleave(n)
    assert same_bits(y[kept], dequantize(clean)[kept])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_stays_out_of_the_tensor_scale(bad):
    x = torch.tensor([bad, 0.5, -2.0, 1.0])
    assert codec.tensor_scale(x, FORMATS["nvfp4"]) == torch.tensor(2.0) / 2688
    assert codec.tensor_scale(x[:1], FORMATS["nvfp4"]) == 1.0


@pytest.mark.parametrize(("name", "rule"), RULES)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_blocks(name, rule, zero):
    x = torch.full((2 * FORMATS[name].block,), zero)
    q = quantize(x, name, scale_rule=rule)
    assert (q.scales == ZERO_WORD[name]).all()
    assert (element_codes(q) == (8 if math.copysign(1, zero) < 0 else 0)).all()
    assert same_bits(dequantize(q), x)
    assert q.tensor_scale is None or q.tensor_scale in (1.0, torch.tensor(4 / 3))


@pytest.mark.parametrize(("name", "rule"), RULES)
def test_a_negative_value_that_rounds_to_zero_keeps_its_sign(name, rule):
    x = torch.zeros(FORMATS[name].block)
    x[0], x[1], x[2], x[8] = 1.0, -1e-3, 1e-3, -0.0
    codes = element_codes(quantize(x, name, scale_rule=rule)).tolist()
    assert codes[1:4] == [8, 0, 0]
    assert codes[8] == 8


@pytest.mark.parametrize(("name", "rule"), RULES)
@EXAMPLES
@given(value=st.floats(2.0**-40, 2.0**15, width=32), sign=st.sampled_from([1.0, -1.0]))
def test_equal_values_stay_equal(name, rule, value, sign):
    y = fake_quantize(torch.full((FORMATS[name].block,), sign * value), name, scale_rule=rule)
    assert y.unique().numel() == 1
    # No scale rule puts the block's maximum in the lower half of the grid, nor saturates it below two thirds.
    assert 2 / 3 * value <= sign * y[0] <= 4 / 3 * value


@pytest.mark.parametrize("name", NAMES)
def test_values_below_and_beyond_the_range(name):
    fmt = FORMATS[name]
    x = torch.zeros(fmt.block)
    x[0], x[-1] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    largest = {"hif4": 344064.0, "mxfp4": 6 * 2.0**125, "nvfp4": 2688.0}[name]
    y = fake_quantize(x, name, tensor_scale=False)
    assert [y[0].item(), y[-1].item()] == [largest, -largest]
    least = torch.full((fmt.block,), 2.0**-149)
    assert not fake_quantize(least, name, tensor_scale=False).any()
    assert torch.isfinite(fake_quantize(least, name)).all()


@pytest.mark.parametrize("exponent", range(-149, -110))
def test_nvfp4_scales_of_tiny_tensors_have_finite_reciprocals(exponent):
    # 1 / ts / s must not overflow: it would send every value of the block to the top of the grid.
    x = torch.zeros(32)
    x[0], x[16] = 2.0**exponent, 2.0**exponent / 4
    y = fake_quantize(x, "nvfp4")
    ts = codec.tensor_scale(x, FORMATS["nvfp4"])
    assert (1 / ts / 2.0**-6).isfinite()
    # Half a step of the smallest grid, or half a step at the top of the block.
    assert ((y - x).abs() <= torch.maximum(x / 6, 2.0**-8 * ts)).all()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "rule"), RULES)
def test_finite_inputs_give_finite_outputs(name, rule, dtype, rounding):
    top = torch.finfo(dtype).max
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(256, 128, generator=generator, dtype=torch.float64) * 2 - 1
    x[:, ::16] = x[:, ::16].sign() * (0.4 + 0.6 * x[:, ::16].abs())  # every block reaches the top binades
    x[0] = 1.0
    x = (x * top).to(dtype).clamp(-top, top)
    y = fake_quantize(x, name, scale_rule=rule, rounding=rounding, seed=1)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert (y[0] >= (344064 if name == "hif4" and dtype != torch.float16 else top / 2)).all()


# --- layout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(data=st.data())
def test_any_axis_is_the_last_axis_moved(name, data):
    shape = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = randn(*shape, seed=len(shape))
    moved = x.movedim(axis, -1).contiguous()
    q, last = quantize(x, name, axis), quantize(moved, name)
    assert torch.equal(q.codes, last.codes)
    assert torch.equal(q.scales, last.scales)
    assert same_bits(dequantize(q), dequantize(last).movedim(-1, axis))


@pytest.mark.parametrize("block_2d", [False, True])
@pytest.mark.parametrize("name", NAMES)
@EXAMPLES
@given(x=tensors(), axis=st.integers(0, 1))
def test_padding_is_invisible(name, block_2d, x, axis):
    if block_2d and FORMATS[name].block_2d is None:
        return
    q = quantize(x, name, axis, block_2d=block_2d)
    rows, columns = (-(-size // 64) * 64 for size in x.shape)
    padded = torch.zeros(rows, columns)
    padded[: x.shape[0], : x.shape[1]] = x
    p = quantize(padded, name, axis, block_2d=block_2d)
    same = p.codes.movedim(-1, axis)[: q.codes.movedim(-1, axis).shape[0], : q.codes.movedim(-1, axis).shape[1]]
    assert torch.equal(q.codes, same.movedim(axis, -1))
    assert same_bits(dequantize(q), dequantize(p)[: x.shape[0], : x.shape[1]].contiguous())
    # What pads the blocks holds code 0.
    assert not codec.unpack(q.codes)[..., x.shape[axis] :].any()


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.block_2d])
@pytest.mark.parametrize("shape", [(64, 96), (50, 70), (1, 33), (3, 40, 17)])
def test_2d_blocks_commute_with_transposition(name, shape):
    edge = FORMATS[name].block_2d
    w = randn(*shape, seed=3)
    forward = quantize(w, name, -1, block_2d=True)
    y = dequantize(forward)
    for x, axis in ((w.mT, -1), (w.mT.contiguous(), -2), (w, -2)):
        other = dequantize(quantize(x, name, axis, block_2d=True))
        assert same_bits(other if x is w else other.mT.contiguous(), y)
    assert forward.scales.shape == (*shape[:-2], -(-shape[-2] // edge), -(-shape[-1] // edge))
    # One scale per tile: the tile as one long block has the same scale.
    tile = w.reshape(-1, *shape[-2:])[0, :edge, :edge]
    long = torch.cat((tile.flatten(), torch.zeros(-tile.numel() % FORMATS[name].block)))
    top = torch.zeros(FORMATS[name].block)
    top[0] = long[long.abs().argmax()]
    assert forward.scales.flatten()[0] == quantize(top, name, tensor_scale=forward.tensor_scale).scales[0]


# --- scale rules --------------------------------------------------------------------------------------------

_UP = 2.0**-23  # to the next fp32 number
MXFP4_RULES = ("floor", "ceil", "even", "rceil")
MXFP4_STEPS = [
    # amax / 2**F, then what floor, ceil, even and rceil add to F - 2
    (1.0, 0, 0, 0, 0),
    (1.0 + _UP, 0, 1, 0, 0),
    (1.5, 0, 1, 0, 0),
    (1.5 + _UP, 0, 1, 0, 1),
    (1.75 - _UP, 0, 1, 0, 1),
    (1.75, 0, 1, 1, 1),
    (2.0 - _UP, 0, 1, 1, 1),
]


@pytest.mark.parametrize("exponent", [-120, -1, 0, 3, 90])
@pytest.mark.parametrize(("mantissa", *MXFP4_RULES), MXFP4_STEPS)
def test_mxfp4_scale_rules_beside_their_thresholds(mantissa, exponent, floor, ceil, even, rceil):
    x = torch.zeros(32)
    x[5] = -mantissa * 2.0**exponent
    added = {r: quantize(x, "mxfp4", scale_rule=r).scales.item() - 127 - (exponent - 2) for r in MXFP4_RULES}
    assert added == {"floor": floor, "ceil": ceil, "even": even, "rceil": rceil}
    assert torch.equal(
        quantize(x, "mxfp4", scale_rule="truncation-free").scales,
        quantize(x, "mxfp4", scale_rule="rceil").scales,
    )


@pytest.mark.parametrize(("name", "rule"), [(name, FORMATS[name].rule("truncation-free")) for name in NAMES])
@EXAMPLES
@given(x=tensors(least_exponent=-30, greatest_exponent=10))
def test_truncation_free_scales_are_the_smallest_that_do_not_saturate(name, rule, x):
    fmt = FORMATS[name]
    q = quantize(x, name, scale_rule=rule, tensor_scale=False)
    amax = codec._to_blocks(x, fmt.block, None).abs().amax(-1).double()
    values = torch.tensor(SCALE_VALUES[name], dtype=torch.float64)
    byte = q.scales.to(torch.int64) & 0xFF
    # The largest magnitude under scale 1; hif4's level bits reach four times its element's maximum.
    top = 7.0 if name == "hif4" else fmt.element.max
    limits = {"hif4": (values[0], values[-1]), "mxfp4": (values[0], values[-1]), "nvfp4": (2.0**-6, 448.0)}[name]
    fits, below = amax <= top * values[byte], amax > top * values[(byte - 1).clamp(min=0)]
    assert (fits | (values[byte] == limits[1])).all()
    assert (below | (values[byte] == limits[0])).all()


@pytest.mark.parametrize(("name", "rule"), TRUNCATION_FREE)
@EXAMPLES
@given(x=tensors(least_exponent=-30, greatest_exponent=10))
def test_truncation_free_rules_never_saturate(name, rule, x):
    q = quantize(x, name, scale_rule=rule)
    t = x.abs().double() / multiplier(q).double()
    # hif4: every sub-group fits as well. nvfp4: beside one tensor scale the quotients round, see T_ERROR.
    assert (t <= FORMATS[name].element.max * (1 + T_ERROR.get((name, rule), 0.0) * (name == "nvfp4"))).all()


HIF4_LEVEL_BITS = [
    # authors' rule or not, largest of a group of 8 (S = 1), of its first 4, then the level-2 and level-3 bits
    (True, 4.0, 4.0, 1, 1),
    (True, 4.0 - 2**-21, 4.0 - 2**-21, 0, 1),
    (True, 2.0, 2.0, 0, 1),
    (True, 2.0 - 2**-22, 2.0 - 2**-22, 0, 0),
    (True, 4.0, 4.0 - 2**-21, 1, 0),
    (False, 3.5 + 2**-21, 3.5 + 2**-21, 1, 1),
    (False, 3.5, 3.5, 0, 1),
    (False, 1.75 + 2**-22, 1.75 + 2**-22, 0, 1),
    (False, 1.75, 1.75, 0, 0),
    (False, 7.0, 3.5 + 2**-21, 1, 1),
    (False, 7.0, 3.5, 1, 0),
]


@pytest.mark.parametrize(("authors", "of_8", "of_4", "level_2", "level_3"), HIF4_LEVEL_BITS)
def test_hif4_level_bits_beside_their_thresholds(authors, of_8, of_4, level_2, level_3):
    x = torch.zeros(64)
    x[0] = 7.0  # S = 1 under both rules
    x[17], x[21] = -of_4, of_8  # groups 2 of 8, 4 and 5 of 4
    word = quantize(x, "hif4", scale_rule="authors" if authors else "truncation-free").scales.item()
    assert word & 0xFF == ONE_WORD["hif4"]
    assert (word >> (8 + 2)) & 1 == level_2
    assert (word >> (16 + 4)) & 1 == level_3


@pytest.mark.parametrize("ulps", range(-3, 4))
def test_nvfp4_block_scales_divide_in_the_defined_order(ulps):
    # Block maxima whose scale lies beside the midpoint of two E4M3 numbers: another order of operations, or a
    # reciprocal, rounds some of them the other way. torch's cast rounds to nearest even as well.
    values = np.array(SCALE_VALUES["nvfp4"][8:], dtype=np.float64)
    middles = (values[1:] + values[:-1]) / 2
    for i in range(200):
        ts = np.float32(2.0**-9 * (1 + (i * 0.6180339887) % 1))
        top = (middles * 6 * float(ts)).astype(np.float32)
        top = (top.view(np.int32) + ulps).view(np.float32)
        x = torch.zeros(len(top), 16)
        x[:, 7] = torch.from_numpy(top)
        scale = torch.from_numpy(top / np.float32(6) / ts).clamp(2.0**-6, 448.0)
        expected = scale.to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(quantize(x, "nvfp4", tensor_scale=torch.tensor(ts)).scales[:, 0], expected)


# --- stochastic rounding ------------------------------------------------------------------------------------

STOCHASTIC = {"rounding": "stochastic", "seed": 11}


def test_stochastic_rounding_is_the_published_formula():
    # S1P2 code = floor(4t) + [u < 4t - floor(4t)]; E2M1 magnitude = h (j + [u < t/h - j]), j = floor(t/h).
    t, u = (torch.rand(1 << 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    tau = t * 7
    expected = tau.floor() + (u < tau - tau.floor())
    assert torch.equal(codec.round_stochastic(tau / 4, S1P2, u).float(), expected)
    t = t * 6
    h = torch.where(t < 2, 0.5, torch.where(t < 4, 1.0, 2.0))
    j = (t / h).floor()
    codes = codec.round_stochastic(t, E2M1, u)
    assert torch.equal(torch.tensor(E2M1.magnitudes)[codes], h * (j + (u < t / h - j)))


@pytest.mark.parametrize("element", [E2M1, S1P2], ids=lambda e: e.name)
def test_stochastic_rounding_keeps_grid_values_and_never_overruns(element):
    grid = torch.tensor(element.magnitudes)
    for u in (0.0, 1 - 2.0**-24):
        assert codec.round_stochastic(grid, element, torch.tensor(u)).tolist() == list(range(8))
        assert codec.round_stochastic(torch.tensor([element.max * 2]), element, torch.tensor(u)).item() == 7
    just_below = grid[1:] * (1 - 2.0**-24)
    assert codec.round_stochastic(just_below, element, torch.tensor(1 - 2.0**-24)).le(torch.arange(1, 8)).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_and_the_stream_choose_the_bits(name):
    x = randn(16, 192)
    runs = [
        quantize(x, name, rounding="stochastic", seed=seed, stream=stream)
        for seed, stream in ((1, 0), (1, 0), (2, 0), (1, 1), (1 + 2**32, 0))
    ]
    assert torch.equal(runs[0].codes, runs[1].codes)
    assert all(torch.equal(runs[0].scales, run.scales) for run in runs)
    # A quarter or more of the codes change when the draw does; a few shared bytes are chance.
    for i, a in enumerate(runs[1:]):
        for b in runs[i + 2 :]:
            assert (a.codes != b.codes).float().mean() > 0.25


@pytest.mark.parametrize("name", NAMES)
def test_the_draw_belongs_to_the_logical_element(name):
    # Element (i, j) of the row-major tensor takes draw i * columns + j along either axis and from any
    # strides.
    x = randn(70, 70)
    x[:] = x.abs().clamp(0.1, 1.0)
    x[0], x[:, 0] = 1.0, 1.0
    options = {**STOCHASTIC, "tensor_scale": False}
    q = quantize(x, name, 0, **options)
    strided = quantize(x.t().contiguous().t(), name, 0, **options)
    assert torch.equal(q.codes, strided.codes)
    u = philox.uniform((70, 70), torch.tensor(11), 0, x.device)
    t = x / multiplier(q)
    if name != "hif4":  # whose default rule multiplies by a rounded reciprocal: t is not the exact quotient
        expected = codec.round_stochastic(t, FORMATS[name].element, u)
        off_grid = (t - t.mul(8).round() / 8).abs() > 1e-6
        assert torch.equal(element_codes(q)[off_grid].long(), expected[off_grid])


@pytest.mark.parametrize(("name", "rule"), RULES)
@EXAMPLES
@given(x=tensors(), seed=st.integers(0, 2**63 - 1))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(name, rule, x, seed):
    q = quantize(x, name, scale_rule=rule, rounding="stochastic", seed=seed)
    grid = torch.tensor(FORMATS[name].element.magnitudes, dtype=torch.float64)
    d = T_ERROR.get((name, rule), 0.0)
    t = x.abs().double() / multiplier(q).double()
    lowest, highest = (torch.bucketize(t * f, grid, right=True) - 1 for f in (1 - d, 1 + d))
    highest = torch.where(grid[highest] == t, highest, highest + 1).clamp(max=7)
    code = (element_codes(q) & 7).long()
    assert (lowest <= code).all()
    assert (code <= highest).all()
    assert (element_codes(q) >= 8).equal(x.signbit())


@pytest.mark.parametrize(("name", "rule"), TRUNCATION_FREE)
def test_stochastic_rounding_is_unbiased_under_truncation_free_rules(name, rule):
    x = randn(1 << 9, 1 << 9, seed=4)
    q = quantize(x, name, scale_rule=rule, **STOCHASTIC)
    grid, scale, x = (
        torch.tensor(FORMATS[name].element.magnitudes).double(),
        multiplier(q).double(),
        x.double(),
    )
    t = (x.abs() / scale).clamp(max=grid[-1])
    lower = (torch.bucketize(t, grid, right=True) - 1).clamp(max=6)
    gap = grid[lower + 1] - grid[lower]
    p = (t - grid[lower]) / gap  # the probability of rounding up
    error = dequantize(q).double() - x
    variance = (scale * gap).square() * (p * (1 - p)).clamp(min=0)
    # Independent Bernoulli draws of known p: each sum over its exact standard deviation is standard normal,
    # up to the 2**-24 grain of u (1e-4 deviations here). |z| > 5 has probability 6e-7 per score, 1e-5 for all
    # of them.
    sixteenth = (p * 16).floor().clamp(max=15).long().flatten()
    sums = [torch.bincount(sixteenth, weights=w.flatten()) for w in (x.sign() * error, variance)]
    z = [
        (sums[0] / sums[1].sqrt()),
        *((w * error).sum() / (w * w * variance).sum().sqrt() for w in (x, x.sign(), torch.ones_like(x))),
    ]
    assert torch.cat([v.reshape(-1) for v in z]).abs().max() < 5, z


@pytest.mark.parametrize(("name", "rule"), TRUNCATION_FREE)
@EXAMPLES
@given(x=tensors(least_exponent=-20, greatest_exponent=8), seed=st.integers(0, 2**32))
def test_stochastic_rounding_never_zeroes_a_block(name, rule, x, seed):
    # The largest value of a block lies above the second grid value under the smallest scale that holds it.
    n = FORMATS[name].block
    q = quantize(x, name, scale_rule=rule, tensor_scale=False, rounding="stochastic", seed=seed)
    held = codec._to_blocks(x, n, None).abs().amax(-1) >= 2.0**-6 * FORMATS[name].element.max
    assert (dequantize(q) != 0).logical_or(x == 0).any() or not held.any()
    codes = codec.unpack(q.codes).unflatten(-1, (-1, n)) & 7
    assert codes.amax(-1)[held].gt(0).all()


# --- published error figures --------------------------------------------------------------------------------

SAMPLES = 1 << 20
# Quantisation signal-to-noise ratio in dB, as published with two decimals.
QSNR = [
    # format, scale rule, then Gauss, Laplace and Student's t with 3 degrees of freedom
    ("hif4", None, 21.63, 20.99, 20.51),
    ("mxfp4", "floor", 18.79, 17.95, 16.99),
    ("mxfp4", "rceil", 18.75, 17.58, 16.42),
    ("mxfp4", "ceil", 16.83, 15.40, 14.18),
    ("mxfp4", "even", 19.01, 18.13, 17.11),
    ("nvfp4", None, 20.44, 20.66, 20.82),
    ("nvfp4", "4over6", 21.21, 21.20, 21.18),
]


def laplace(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.empty(SAMPLES // 1024, 1024).exponential_(generator=generator)
    return magnitude * torch.randn(magnitude.shape, generator=generator).sign()


def student(seed: int) -> Tensor:
    z = randn(4, SAMPLES // 1024, 1024, seed=seed)
    return z[0] / (z[1:].square().sum(0) / 3).sqrt()


@pytest.fixture(scope="module")
def draws() -> dict[str, list[Tensor]]:
    return {
        "gauss": [randn(SAMPLES // 1024, 1024)],
        "laplace": [laplace(0)],
        "student": [student(seed) for seed in range(8)],
    }


def decibel(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(x.square().sum(dtype=torch.float64) / (x - y).square().sum(dtype=torch.float64))


@pytest.mark.parametrize("column", ["gauss", "laplace", "student"])
@pytest.mark.parametrize(("name", "rule", "gauss", "laplace", "student"), QSNR)
def test_published_qsnr(draws, name, rule, gauss, laplace, student, column):
    expected = {"gauss": gauss, "laplace": laplace, "student": student}[column]
    options = {} if rule is None else {"scale_rule": rule}
    figures = [decibel(x, fake_quantize(x, name, **options)) for x in draws[column]]
    # 2**20 draws of the first two deviate by 0.01 dB. Student's t(3) has no fourth moment: a single outlier
    # can carry a draw's signal and add 0.7 dB, and the published figure is of one draw (its deviation: 0.08
    # dB), so the typical draw is compared, not the mean.
    assert abs(float(np.median(figures)) - expected) <= 0.1


SR_BIAS = [
    # format, scale rule, the published sum(yx)/sum(xx) - 1 in percent on N(0, 1), half its last digit
    ("hif4", None, -0.65, 0.005),
    ("mxfp4", "floor", -1.0, 0.05),
    ("mxfp4", "even", -0.2, 0.05),
    ("nvfp4", None, -0.35, 0.005),
    *((name, rule, 0.0, 0.0) for name, rule in TRUNCATION_FREE),
]


@pytest.mark.parametrize(("name", "rule", "percent", "grain"), SR_BIAS)
def test_published_bias_of_stochastic_rounding(draws, name, rule, percent, grain):
    (x,) = draws["gauss"]
    y = fake_quantize(x, name, **STOCHASTIC, **({} if rule is None else {"scale_rule": rule})).double()
    power = x.double().square().sum()
    bias = 100 * ((y - x) * x).sum() / power
    # The variance of the sum is at most that of the errors themselves; 5 of its deviations and the figure's
    # grain.
    deviation = 100 * ((y - x) * x).square().sum().sqrt() / power
    assert abs(bias - percent) <= 5 * deviation + grain


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rounding": "nearest"}, 21.62),
        ({"rounding": "nearest", "scale_rule": "truncation-free"}, 20.85),
        (STOCHASTIC, 18.78),
        ({**STOCHASTIC, "scale_rule": "truncation-free"}, 17.84),
    ],
)
def test_published_price_of_unbiased_rounding_on_hif4(draws, options, expected):
    (x,) = draws["gauss"]
    assert abs(decibel(x, fake_quantize(x, "hif4", **options)) - expected) <= 0.1  # as in test_published_qsnr


# --- formats that a user adds -------------------------------------------------------------------------------

ADDED = {
    # A row, and the built-in computation that it must equal block by block.
    "mxfp4-16": ("mxfp4", {"levels": (ScaleLevel("e8m0", 16),), "block_2d": 16}),
    "nvfp4-flat": ("nvfp4", {"levels": (ScaleLevel("e4m3", 16),)}),
    "hif4-even": ("hif4", {"element": dataclasses.replace(S1P2, tie="even")}),
}


@pytest.fixture
def added(request):
    base, changes = ADDED[request.param]
    yield register_format(dataclasses.replace(FORMATS[base], name=request.param, **changes))
    del FORMATS._rows[request.param]


@pytest.mark.parametrize("added", ADDED, indirect=True)
@pytest.mark.parametrize("path", PATHS)
def test_a_registered_format_quantises(added, path):
    api, (base, _) = PATHS[path], ADDED[added.name]
    x = randn(24, 80)
    q = api.quantize(x, added.name)
    y = api.dequantize(q)
    assert q.codes.shape == (24, -(-80 // added.block) * added.block // 2)
    assert q.scales.shape == (24, -(-80 // added.block))
    assert (q.tensor_scale is not None) == added.has_tensor_scale
    # Blocks of 16 are blocks of 32 whose second half is zero.
    blocks = codec._to_blocks(x, added.block, None)
    alone = torch.nn.functional.pad(blocks, (0, FORMATS[base].block - added.block))
    expected = fake_quantize(alone, base, tensor_scale=False)[..., : added.block]
    assert same_bits(y, expected.flatten(-2)[:, :80].contiguous())
    assert same_bits(api.fake_quantize(x, added.name), y)
    if added.block_2d:
        w = api.fake_quantize(x, added.name, block_2d=True)
        assert same_bits(api.fake_quantize(x.t(), added.name, block_2d=True), w.t().contiguous())
