"""From a call of `mm` on a packed weight to launches: how the GEMM is cut, and where its parts of sums lie.

    mm(a [..., K], codes [N, K/2], b_scales, b_format="hif4")
        1 … 16 tokens      ->  few_tokens
        17 … 511           ->  arrange, many_tokens or, on Hopper, overlapped
        more, or not bf16  ->  dequantize, a dense GEMM
    grouped_mm_packed(a [T, K], codes [G, N, K/2], ends [G], …)
        up to 16 tokens an expert, on average  ->  few_tokens, a weight for each group
        more                                   ->  dequantize, torch's grouped GEMM

Past 511 tokens the weight is decoded once instead of in every tile. Where exactly the two cross was not measured.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fp4compile.activations import ACTIVATIONS, activated, columns
from fp4compile.backend import No
from fp4compile.backends import checks
from fp4compile.backends.triton import codec
from fp4compile.backends.triton.launch import (
    capturing,
    ceil_div,
    current,
    kernels,
    lasting_zeros,
    round_up,
    viewed,
)
from fp4compile.formats import E2M1, FORMATS, S1P2

_KERNELS = "packed_kernels"
MOST_TOKENS = 511  # of the kernels that read codes
_HOPPER_KERNELS = "packed_hopper_kernels"
_RUNS = {"many_tokens": 64, "overlapped": 128}  # columns that `arrange` reorders together
_OVERLAPS = (9, 0)  # the least capability of devices that overlap launches
_HOPPER = 9  # its major number
_GLUON = ("3.6", "3.7", "3.8")  # versions of Triton whose Gluon compiles `overlapped`
# The rows of `arrange` and its columns per program: a few microseconds at most, nothing to tune.
_ARRANGE = {"ROWS": 4, "BK": 512}


@dataclass(frozen=True)
class Cut:
    """How a GEMM is cut into programs.

    Attributes:
        kernel: of `packed_kernels` or, `overlapped`, of `packed_hopper_kernels`.
        rows: outputs per warp (`few_tokens`) or per program (the others; `overlapped`: 16 times its warps).
        tokens: tokens per program, those that fill up an instruction counted.
        k: elements of K per step, stages: steps in flight.
        warps: of a program; `slices` of them share its part of K, the others its outputs.
        parts: of K, each a program's.
    """

    kernel: Literal["few_tokens", "many_tokens", "overlapped"]
    rows: int
    tokens: int
    k: int
    stages: int
    warps: int = 4
    slices: int = 1
    parts: int = 1

    @property
    def outputs(self) -> int:
        """Outputs per program."""
        return self.rows * (self.warps // self.slices if self.kernel == "few_tokens" else 1)

    @property
    def tile(self) -> int:
        """Elements of a program's result."""
        return self.outputs * self.tokens

    @property
    def shared(self) -> int:
        """Bytes of shared memory that the codes, scales and tokens of all stages take at most."""
        rows = self.rows * (self.warps if self.kernel == "few_tokens" else 1)
        weights, tokens = self.stages * self.k * rows * 5 // 8, self.k * self.tokens * 2
        return weights + tokens * (2 if self.kernel == "overlapped" else self.stages * self.slices)

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Programs (`overlapped`: tiles) along outputs and tokens, in the order in which they share more, and parts."""
        outputs, tokens = ceil_div(n, self.outputs), ceil_div(m, self.tokens)
        return (outputs, tokens, self.parts) if self.kernel == "few_tokens" else (tokens, outputs, self.parts)

    def steps(self, columns: int) -> tuple[int, bool]:
        """Steps of each slice over so many columns, and whether the slices are all full."""
        run = self.k * self.slices * self.parts
        return ceil_div(columns, run), columns % run == 0


def _few(rows: int, tokens: int, stages: int, slices: int, parts: int = 1) -> Cut:
    return Cut("few_tokens", rows, tokens, 256, stages, slices=slices, parts=parts)


def _many(rows: int, tokens: int, k: int, stages: int, warps: int = 4, parts: int = 1) -> Cut:
    return Cut("many_tokens", rows, tokens, k, stages, warps, parts=parts)


def _overlapped(rows: int, tokens: int, stages: int) -> Cut:
    return Cut("overlapped", rows, tokens, 256, stages, warps=rows // 16)


# By the largest number of tokens: cuts, each with the programs per multiprocessor from which on it is taken; the first
# one that has as many and finds room in shared memory. Chosen by measurement on H100; benchmarks/NOTES.md holds the
# figures.
CUTS: Mapping[int, tuple[tuple[float, Cut], ...]] = {
    1: ((2.5, _few(16, 8, 3, 1)), (2.5, _few(16, 8, 3, 4)), (0.0, _few(16, 8, 5, 4)), (0.0, _few(16, 8, 3, 4))),
    8: ((2.5, _few(16, 8, 3, 1)), (0.0, _few(16, 8, 3, 4))),
    16: (
        (1.5, _few(32, 16, 3, 1)),
        (0.7, _few(16, 16, 4, 1)),
        (0.0, _few(16, 16, 4, 1, parts=4)),
        (0.0, _few(16, 16, 4, 1)),
    ),
    32: ((2.5, _many(64, 32, 128, 4)), (0.0, _many(64, 32, 128, 4, parts=4))),
    64: (
        (1.5, _overlapped(128, 64, 3)),
        (1.5, _many(128, 64, 64, 4)),
        (1.5, _many(128, 64, 128, 3, warps=8)),
        (2.5, _many(64, 64, 128, 3, parts=4)),
        (0.0, _many(64, 64, 128, 4, parts=4)),
    ),
    MOST_TOKENS: (
        (0.4, _overlapped(128, 128, 3)),
        (1.5, _many(128, 128, 64, 4, warps=8)),
        (1.5, _many(128, 128, 128, 3, warps=8)),
        (2.5, _many(64, 128, 64, 4, parts=2)),
        (0.0, _many(64, 128, 128, 3, parts=2)),
    ),
}


def bucket(m: int) -> int:
    """The row of `CUTS` for m tokens."""
    return next(most for most in CUTS if m <= most)


def cuts(m: int, k: int, format: str, on_hopper: bool) -> tuple[tuple[float, Cut], ...]:
    """The row of `CUTS` for m tokens, without cuts that cannot load the scales of a row of k columns.

    A step of fewer than four bytes of them could not run ahead, and `overlapped` copies whole words.

    Args:
        on_hopper: whether `overlapped` runs.
    """
    fmt = FORMATS[format]
    words = ceil_div(k, fmt.block) * fmt.scale_dtype.itemsize % 4 == 0

    def loads(cut: Cut) -> bool:
        return on_hopper and words if cut.kernel == "overlapped" else cut.k // fmt.block * fmt.scale_dtype.itemsize >= 4

    return tuple(row for row in CUTS[bucket(m)] if loads(row[1]))


def default(m: int, n: int, k: int, format: str, multiprocessors: int, shared: int, on_hopper: bool) -> Cut | None:
    """The first cut of the table that has enough programs for so many multiprocessors, of so much shared memory.

    One that could have more steps in flight than there are comes last: 4096 x 4096 took 7.5 instead of 7.0 us.
    """
    enough = [
        cut
        for least, cut in cuts(m, k, format, on_hopper)
        if math.prod(cut.grid(m, n)) >= least * multiprocessors and cut.shared <= shared
    ]
    return next((cut for cut in enough if cut.stages <= cut.steps(k)[0]), enough[0] if enough else None)


# --- constants of a format -------------------------------------------------------------------------------------------

# What `packed_kernels` leaves out of its factors, by element and scaling, as a power of two.
_LEFT_OUT = {("even", "e6m2"): 17, ("e2m1", "e4m3"): 8, ("e2m1", "e8m0"): 0}


@cache
def known(format: str) -> dict[str, Any] | No:
    """The constants of the kernels that the format's row decides, or why none reads it."""
    fmt, constants = FORMATS[format], codec.known(format)
    if isinstance(constants, No):
        return constants
    left_out = _LEFT_OUT.get((constants["ELEMENT"], constants["SCALING"]))
    magnitudes = (E2M1.magnitudes, S1P2.magnitudes)
    if left_out is None or fmt.block not in (16, 32, 64) or fmt.element.magnitudes not in magnitudes:
        return No(f"the packed GEMM reads S1P2 under E6M2 and E2M1 under E8M0 or E4M3, not format {format}")
    return {
        "BLOCK": fmt.block,
        "SCALING": constants["SCALING"],
        "ELEMENT": constants["ELEMENT"],
        "FACTOR": 2.0**left_out,
    }


# --- counts ----------------------------------------------------------------------------------------------------------


class _Counts:
    """Zeros in device memory that programs count parts of a tile in; each launch leaves zeros behind.

    Launches that may run at the same time must not share them. Those of one stream follow each other; a captured
    one is replayed whenever its graph is, so that it keeps counts of its own.
    """

    SIZE = 1 << 21
    LEAST = 1 << 12

    def __init__(self, device: torch.device) -> None:
        self._zeros = lasting_zeros(self.SIZE, torch.int32, device)
        self._lock, self._taken = threading.Lock(), 0
        self._of_stream: dict[int, Tensor] = {}

    def _take(self, size: int) -> Tensor | None:
        with self._lock:
            start, end = self._taken, self._taken + size
            if end > self.SIZE:
                return None
            self._taken = end
        return self._zeros[start:end]

    def of(self, stream: int, size: int, capturing: bool) -> Tensor | None:
        """Zeros for a launch, or None where none are left."""
        if capturing:
            return self._take(size)
        found = self._of_stream.get(stream)
        if found is None or found.numel() < size:
            found = self._take(max(size, self.LEAST))
            if found is not None:
                self._of_stream[stream] = found
        return found


_COUNTS: dict[torch.device, _Counts] = {}


def counts(device: torch.device, size: int) -> Tensor:
    """Zeros that no other launch uses at the same time."""
    if device.type != "cuda":
        return torch.zeros(size, dtype=torch.int32, device=device)
    captured, found = capturing(device), None
    if device not in _COUNTS and not captured:
        _COUNTS.setdefault(device, _Counts(device))  # whichever thread is first: graphs may hold parts of it
    if device in _COUNTS:
        found = _COUNTS[device].of(torch.cuda.current_stream(device).cuda_stream, size, captured)
    return torch.zeros(size, dtype=torch.int32, device=device) if found is None else found


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What calls of one shape share: a cut, the kernel's constants, whether launches overlap.

    Attributes:
        columns: of x as the kernel reads it.
        steps: of each slice of K, or units of a tile (`overlapped`).
        overlap: whether launches may start before those in front of them are done (sm_90).
        programs: that share all units evenly (`overlapped`).
        activation: of the sums.
    """

    cut: Cut
    constants: Mapping[str, Any]
    columns: int
    steps: int
    overlap: bool
    programs: int = 0
    activation: str = ""


def activating(activation: str, module: str = "activation_kernels") -> dict[str, Any]:
    """The constants of a kernel that applies an activation, "" for none, by the functions of a module."""
    if not activation:
        return {"ACTIVATE": None, "GATED": False}
    row = ACTIVATIONS[activation]
    return {"ACTIVATE": kernels(module).FUNCTIONS[row.function], "GATED": row.gated}


def _places(n: int, activation: str) -> int:
    """Rows of tiles that n rows of a weight take: of a gated activation in sixteens, half of its either part."""
    return 16 * ceil_div(n // 2, 8) if activation and ACTIVATIONS[activation].gated else n


def plan(
    cut: Cut,
    m: int,
    n: int,
    k: int,
    format: str,
    block_2d: bool,
    overlap: bool,
    plain: bool,
    multiprocessors: int = 1,
    activation: str = "",
) -> Plan:
    """The plan of a GEMM of m tokens with a weight of n rows and k columns, cut as given.

    Args:
        overlap: whether the device can overlap launches.
        plain: for Triton's interpreter, which has no inline assembly.
        multiprocessors: of the device, one program of `overlapped` for each.
    """
    constants = known(format)
    assert not isinstance(constants, No)
    block = constants["BLOCK"]
    padded = round_up(k, block)
    width = round_up(k, _RUNS[cut.kernel]) if cut.kernel in _RUNS else k
    steps, even = cut.steps(padded)
    edge = block if block_2d else 1
    if cut.kernel == "overlapped":
        tile = {"BN": cut.rows, "BM": cut.tokens, "WARPS": cut.warps, "STAGES": cut.stages}
        programs = min(multiprocessors, math.prod(cut.grid(m, _places(n, activation))) * steps)
        own = {**activating(activation, _HOPPER_KERNELS), "EVEN": even, "EDGE": edge}
        return Plan(cut, {**constants, **tile, **own}, width, steps, overlap, programs, activation)
    own = {"OVERLAP": overlap} if cut.kernel == "many_tokens" else {
        "GROUPS": cut.warps // cut.slices,
        "SLICES": cut.slices,
        "TOKENS": 1 if m == 1 else cut.tokens,
        "EXPERTS": 0,
    }  # fmt: skip
    tile = {"BN": cut.rows, "BM": cut.tokens, "BK": cut.k, "STAGES": cut.stages, "PARTS": cut.parts}
    whole = even and width == padded
    # Four scales of a byte in a load, where rows of them and steps are whole words.
    in_words = constants["SCALING"] != "e6m2" and padded % (4 * block) == 0 and cut.k % (4 * block) == 0
    unit = 4 * block if in_words else block
    own |= {"UNIT": unit, "EDGE": edge, "EVEN": whole, "PLAIN": plain, **activating(activation)}
    overlap = overlap and cut.kernel == "many_tokens"
    return Plan(cut, {**constants, **tile, **own}, width, steps, overlap, activation=activation)


def on_hopper(index: int) -> bool:
    """Whether `overlapped` runs on CUDA device number `index`: it is Hopper's, and Gluon's names change."""
    import triton

    return torch.cuda.get_device_capability(index)[0] == _HOPPER and triton.__version__.startswith(_GLUON)


def planned(cut: Cut, m: int, n: int, k: int, format: str, block_2d: bool, index: int, activation: str = "") -> Plan:
    """The plan of a GEMM on CUDA device number `index`."""
    overlap = torch.cuda.get_device_capability(index) >= _OVERLAPS
    multiprocessors = torch.cuda.get_device_properties(index).multi_processor_count
    return plan(cut, m, n, k, format, block_2d, overlap, False, multiprocessors, activation)


@lru_cache(maxsize=4096)
def _chosen(m: int, n: int, k: int, format: str, block_2d: bool, index: int, activation: str = "") -> Plan | None:
    """The plan that a CUDA device runs: a measured cut where there is one, else the table's, if it has one."""
    from fp4compile.backends.triton import tune  # which measures with what is above

    cut = tune.stored(index, format, m, n, k)
    if cut is None:
        device = torch.cuda.get_device_properties(index)
        shared = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
        cut = default(m, n, k, format, device.multi_processor_count, shared, on_hopper(index))
    if cut is None:
        return None
    return planned(cut, m, n, k, format, block_2d, index, activation)


def forget() -> None:
    """Choose anew: measured cuts have changed."""
    _chosen.cache_clear()


def _arrange(x: Tensor, planned: Plan) -> Tensor:
    """x in the order in which the kernel contracts, padded to whole runs."""
    m, k = x.shape
    out = x.new_empty((m, planned.columns))
    grid = (ceil_div(planned.columns, _ARRANGE["BK"]), ceil_div(m, _ARRANGE["ROWS"]))
    early = planned.overlap and planned.cut.kernel == "overlapped"  # which lets what follows it start
    kernels(_KERNELS).arrange[grid](
        x, out, m, k, x.stride(0), planned.columns, **_ARRANGE, RUN=_RUNS[planned.cut.kernel], OVERLAP=planned.overlap,
        EARLY=early, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def _options(planned: Plan) -> dict[str, Any]:
    return {"launch_pdl": True} if planned.overlap else {}


def multiply(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    planned: Plan,
    dtype: torch.dtype,
    factor: Tensor | None = None,
) -> Tensor:
    """The GEMM of x [M, K], rows contiguous, with a contiguous packed weight: [M, outputs] in `dtype`.

    Args:
        factor: [M, outputs], contiguous.
    """
    (m, _), n, cut = x.shape, codes.shape[0], planned.cut
    y = x.new_empty((m, columns(planned.activation, n)), dtype=dtype)
    if cut.kernel in _RUNS:
        x = _arrange(x, planned)
    bias = None if bias is None else bias.contiguous()
    run = _multiply_in_shares if cut.kernel == "overlapped" else _multiply_in_parts
    run(x, codes, scales, y, bias, a_tensor_scale, b_tensor_scale, factor, planned)
    return y


def _multiply_in_shares(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    y: Tensor,
    bias: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    factor: Tensor | None,
    planned: Plan,
) -> None:
    (m, n), cut, programs = (y.shape[0], codes.shape[0]), planned.cut, planned.programs
    module = kernels(_HOPPER_KERNELS)
    tiles = math.prod(cut.grid(m, _places(n, planned.activation)))
    partial = counted = None
    if tiles % programs != 0:  # some are shared: each program leaves parts of two tiles at most
        partial = x.new_empty((2 * programs * cut.tile,), dtype=torch.float32)
        counted = counts(x.device, tiles)
    words, scale_words = viewed(codes, torch.int32), viewed(scales, torch.int32)
    module.overlapped[(programs,)](
        module.described(x, cut.tokens), words, scale_words, y, bias, a_tensor_scale, b_tensor_scale, factor,
        partial, counted, m, n, words.shape[1], scale_words.shape[1], planned.steps, tiles * planned.steps,
        **planned.constants, num_warps=cut.warps, **_options(planned),
    )  # fmt: skip


def _multiply_in_parts(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    y: Tensor,
    bias: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    factor: Tensor | None,
    planned: Plan,
    ends: Tensor | None = None,
) -> None:
    (m, n), cut = (y.shape[0], codes.shape[-2]), planned.cut
    places = _places(n, planned.activation)
    grid = cut.grid(m if ends is None else _most_tiles(m, ends.shape[0], cut.tokens) * cut.tokens, places)
    partial = counted = None
    if cut.parts > 1:
        tiles = grid[0] * grid[1]
        partial = x.new_empty((cut.parts * tiles * cut.tile,), dtype=torch.float32)
        counted = counts(x.device, tiles)
    steps: Any = planned.steps
    if x.device.type != "cuda":
        import triton.language as tl

        steps = tl.constexpr(steps)  # the interpreter counts no loop to a number it has wrapped
    kernel = getattr(kernels(_KERNELS), cut.kernel)[grid]
    unit = planned.constants["UNIT"]
    units, words = codes.shape[-1] * 2 // unit, viewed(codes, torch.int32)
    if unit > planned.constants["BLOCK"]:
        scales = viewed(scales, torch.int32)
    kernel(
        x, words, scales, y, bias, a_tensor_scale, b_tensor_scale, factor, partial, counted,
        M=m, N=n, K=planned.columns, x_stride=x.stride(0), units=units, steps=steps,
        **({"ends_ptr": ends} if cut.kernel == "few_tokens" else {}),
        **planned.constants, num_warps=cut.warps, **_options(planned),
    )  # fmt: skip


# --- groups ----------------------------------------------------------------------------------------------------------


def _most_tiles(tokens: int, experts: int, size: int) -> int:
    """The most tiles of so many tokens that groups of them can take: each of these begins a tile."""
    return min(tokens, (tokens + experts * (size - 1)) // size)


def plan_grouped(cut: Cut, experts: int, n: int, k: int, format: str, block_2d: bool, plain: bool) -> Plan:
    """The plan of GEMMs of groups of tokens, a weight [n, k] each, by `few_tokens`."""
    planned = plan(cut, cut.tokens, n, k, format, block_2d, overlap=False, plain=plain)
    return replace(planned, constants={**planned.constants, "EXPERTS": experts})


@lru_cache(maxsize=4096)
def _chosen_grouped(m: int, experts: int, n: int, k: int, format: str, block_2d: bool, index: int) -> Plan | None:
    """The table's first cut for the mean number of tokens of an expert, 16 at most, with enough programs."""
    device = torch.cuda.get_device_properties(index)
    shared = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    mean = min(max(ceil_div(m, experts), 2), 16)  # 1 has cuts for a single token in all
    busy = min(m, experts)
    cut = default(mean, n * busy, k, format, device.multi_processor_count, shared, on_hopper=False)
    return None if cut is None else plan_grouped(cut, experts, n, k, format, block_2d, plain=False)


def multiply_grouped(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    ends: Tensor,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    planned: Plan,
    dtype: torch.dtype,
) -> Tensor:
    """As `grouped_mm`, of contiguous operands and cut as given."""
    y = x.new_zeros((x.shape[0], codes.shape[1]), dtype=dtype)
    _multiply_in_parts(x, codes, scales, y, None, a_tensor_scale, b_tensor_scale, None, planned, ends)
    return y


def operands_of_groups(arguments: Mapping[str, Any]) -> str | None:
    """What is asked of a call with groups: tokens in bf16, and a stack whose codes and scales belong together."""
    a, b, scales, ends, k = (arguments[name] for name in ("a", "b", "b_scales", "ends", "k"))
    reason = known(arguments["b_format"])
    if isinstance(reason, No):
        return reason.reason
    fmt = FORMATS[arguments["b_format"]]
    if a.dtype != torch.bfloat16 or a.dim() != 2 or a.shape[1] != k:
        return f"a is {a.dtype} {tuple(a.shape)}; bf16 [tokens, {k}] is read"
    if b.dim() != 3 or b.dtype != torch.uint8 or scales.dtype != fmt.scale_dtype or ends.dim() != 1:
        return "the weights are no stack of uint8 codes with their scales and the ends of their tokens"
    edge = fmt.block if arguments["b_block_2d"] else 1
    (experts, n, width), blocks = b.shape, ceil_div(k, fmt.block)
    if width * 2 != blocks * fmt.block or tuple(scales.shape) != (experts, ceil_div(n, edge), blocks):
        return f"codes {tuple(b.shape)} and scales {tuple(scales.shape)} do not hold the blocks of {k} columns"
    if len(ends) != experts or not all((experts, n, k)):
        return f"{len(ends)} groups of tokens for a stack {[experts, n, k]}"
    return checks.tensor_scales(arguments)


# Tokens of an expert, on average, up to which its weight is decoded in the GEMM. Not measured.
_FEW_OF_EXPERT = 16


def grouped_mm(
    a: Tensor,
    b: Tensor,
    b_scales: Tensor,
    ends: Tensor,
    b_format: str,
    k: int,
    b_block_2d: bool,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
) -> Tensor:
    """The op `grouped_mm_packed`. Nothing is read on the host.

    With few tokens an expert, as in decoding, `few_tokens` decodes what its tiles read; with more the stack is decoded
    first, exactly, for torch's grouped GEMM.
    """
    (m, _), (experts, n, _) = a.shape, b.shape
    if m == 0:
        return a.new_zeros((m, n))
    b_scales, ends = b_scales.contiguous(), ends.to(torch.int32)
    with current(a.device):
        few = m <= _FEW_OF_EXPERT * experts
        planned = _chosen_grouped(m, experts, n, k, b_format, b_block_2d, a.device.index) if few else None
        if planned is not None:
            x = a.detach() if a.stride(1) == 1 else a.contiguous()
            parts = (b.contiguous(), b_scales, ends, a_tensor_scale, b_tensor_scale)
            return multiply_grouped(x, *parts, planned, a.dtype)
        ops = torch.ops.fp4compile
        stack = ops.dequantize(b, b_scales, None, b_format, -1, k, b_block_2d, torch.bfloat16)
        out: Tensor = ops.grouped_mm(a.detach().contiguous(), stack.mT, ends, a_tensor_scale, b_tensor_scale)
        return out


# --- the op ----------------------------------------------------------------------------------------------------------


def operands(arguments: Mapping[str, Any]) -> str | None:
    """What is asked of a call: a dense operand, and a weight whose codes and scales belong together."""
    a, b, scales, k = arguments["a"], arguments["b"], arguments["b_scales"], arguments["k"]
    if arguments["a_format"] or not arguments["b_format"]:
        return "not a dense operand times a packed one"
    reason = known(arguments["b_format"])
    if isinstance(reason, No):
        return reason.reason
    fmt = FORMATS[arguments["b_format"]]
    if a.dtype not in codec.DTYPES or a.dim() < 1 or a.shape[-1] != k:
        return f"a is {a.dtype} {tuple(a.shape)}; fp32, bf16 or fp16 [..., {k}] is read"
    if b.dim() != 2 or b.dtype != torch.uint8 or scales is None or scales.dtype != fmt.scale_dtype:
        return "the weight is no matrix of uint8 codes with its scales"
    edge = fmt.block if arguments["b_block_2d"] else 1
    blocks = ceil_div(k, fmt.block)
    if tuple(b.shape[1:]) != (blocks * fmt.block // 2,) or tuple(scales.shape) != (ceil_div(b.shape[0], edge), blocks):
        return f"codes {tuple(b.shape)} and scales {tuple(scales.shape)} do not hold the blocks of {k} columns"
    if arguments["dtype"] not in (None, *codec.DTYPES):
        return f"the result is {arguments['dtype']}; fp32, bf16 and fp16 are written"
    bias = arguments["bias"]
    if bias is not None and tuple(bias.shape) != (b.shape[0],):
        return f"the bias is {tuple(bias.shape)}, not one number per row of the weight"
    activation = arguments["activation"]
    if activation and (activation not in ACTIVATIONS or (ACTIVATIONS[activation].gated and b.shape[0] % 2)):
        return f"there is no activation {activation!r} of {b.shape[0]} rows"
    factor, shape = arguments["factor"], (*a.shape[:-1], columns(activation, b.shape[0]))
    if factor is not None and (factor.dtype not in codec.DTYPES or tuple(factor.shape) != shape):
        return f"the factor is {factor.dtype} {tuple(factor.shape)}, not fp32, bf16 or fp16 {shape}"
    return checks.tensor_scales(arguments)


_ACTIVATED = {"BLOCK": 1024}  # outputs of a program: bound by memory, nothing to tune


def activate(x: Tensor, activation: str, factor: Tensor | None = None) -> Tensor:
    """x [M, N], contiguous, or what the activation makes of it, times the factor, in its dtype: one launch."""
    if not activation and factor is None:
        return x
    y = x.new_empty((x.shape[0], columns(activation, x.shape[1])))
    grid = (x.shape[0], ceil_div(y.shape[1], _ACTIVATED["BLOCK"]))
    kernels(_KERNELS).activate[grid](x, factor, y, y.shape[1], x.stride(0), **_ACTIVATED, **activating(activation))
    return y


def _dense(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    format: str,
    block_2d: bool,
    dtype: torch.dtype,
    activation: str,
    factor: Tensor | None,
) -> Tensor:
    """The GEMM with the weight decoded first: exactly, to bf16 for bf16 operands and to fp32 for others.

    Activation and factor are a launch of their own, of the result in `dtype`, as in eager PyTorch.
    """
    exact = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    ops = torch.ops.fp4compile
    weight = ops.dequantize(codes, scales, None, format, -1, x.shape[1], block_2d, exact)
    # The op again: its kernel for dense operands adds split sums in fp32, where torch's own may add them in bf16.
    y: Tensor = ops.mm(x.to(exact), weight.t(), bias, None, None, a_tensor_scale, b_tensor_scale, dtype=dtype)
    return activate(y, activation, factor)


def mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    a_scales: None,
    b_scales: Tensor,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    a_format: str,
    b_format: str,
    b_block_2d: bool,
    k: int,
    dtype: torch.dtype | None,
    activation: str,
    factor: Tensor | None,
    a_holds: str,
) -> Tensor:
    """The op `mm` on a packed weight: fp32 accumulation, scales, bias, activation, factor, one rounding.

    With more than `MOST_TOKENS` tokens, or not in bf16, sums are rounded in front of an activation, too.
    """
    dtype = dtype or a.dtype
    shape = (*a.shape[:-1], columns(activation, b.shape[0]))
    m, n = math.prod(a.shape[:-1]), b.shape[0]
    x = a.detach().reshape(m, k)
    if m == 0 or n == 0 or k == 0:
        y = a.new_zeros((m, n), dtype=torch.float32)
        y = activated(y if bias is None else y + bias, activation).view(shape)
        return (y if factor is None else y * factor).to(dtype)
    codes, scales = b.contiguous(), b_scales.contiguous()
    if factor is not None:
        factor = factor.contiguous().view(m, -1)
    with current(a.device):
        planned = None
        if m <= MOST_TOKENS and x.dtype == torch.bfloat16:
            planned = _chosen(m, n, k, b_format, b_block_2d, a.device.index, activation)
        if planned is None:
            more = (b_format, b_block_2d, dtype, activation, factor)
            y = _dense(x, codes, scales, bias, a_tensor_scale, b_tensor_scale, *more)
        else:
            x = x if x.stride(1) == 1 else x.contiguous()
            y = multiply(x, codes, scales, bias, a_tensor_scale, b_tensor_scale, planned, dtype, factor)
    return y.view(shape)
