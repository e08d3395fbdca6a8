"""CPU kernels of the codec ops: one C file, built once with the system's C compiler, called through ctypes.

    fp4compile.fake_quantize(x, "hif4", 0)  ->  a _Job: x as [batch, lanes, size]  ->  fp4_run(job)

The kernels are equal bit for bit to the reference. They run on torch's own OpenMP threads: the C code is
handed the fork-join function of the runtime that torch has loaded and links none, so that there is never a
second pool. Without a C compiler every kernel says so and the reference runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4compile.activations import activated
from fp4compile.backend import Answer, Kernel, No, Yes
from fp4compile.backends import checks
from fp4compile.codec import E4M3_MAX, e6m2_max, e8m0_up_from
from fp4compile.files import cache_folder
from fp4compile.formats import E2M1, FORMATS, Element, Format
from fp4compile.hadamard import SIGN_STREAM
from fp4compile.ops import OPS

# --- building -----------------------------------------------------------------------------------------------

SOURCE = Path(__file__).with_name("cpu_codec.c")
# No -ffast-math, no fused multiply-add: every operation is rounded as the reference rounds it.
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-strict-aliasing"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# The first that the compiler accepts.
_TARGETS = (("-march=native",), ("-mcpu=native",), ())


def find_compiler() -> list[str] | No:
    """The command of the system's C compiler: $CC, cc, gcc or clang."""
    asked = shlex.split(os.environ.get("CC", ""))
    for command in (asked, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    return No("no C compiler found: install gcc or clang, or set CC")


def _cpu() -> str:
    """What `-march=native` depends on: a cache folder may be shared by different machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return platform.processor()


def _library_path(compiler: Sequence[str]) -> Path:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    parts = (SOURCE.read_text(), *FLAGS, *compiler, version, platform.machine(), _cpu())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_folder() / f"cpu_codec-{key}.so"


def _compile(compiler: Sequence[str], out: Path) -> No | None:
    """Build into a temporary file and rename it, so that processes may race."""
    out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=out.parent, prefix="build-", suffix=".so")
    os.close(handle)
    message = ""
    try:
        for target in _TARGETS:
            command = [*compiler, *FLAGS, *target, "-o", name, str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.replace(name, out)
                return None
            message = message or done.stderr.strip()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    return No(f"{compiler[0]} could not build {SOURCE.name}: {message[:500]}")


def _torch_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP runtime that torch links, or None: one thread."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        # Looks the name up in libtorch_cpu and what it depends on, whatever the runtime's file is called.
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


_LOCK = threading.Lock()
_built: ctypes.CDLL | No | None = None


def _build() -> ctypes.CDLL | No:
    compiler = find_compiler()
    if isinstance(compiler, No):
        return compiler
    try:
        path = _library_path(compiler)
        refused = None if path.exists() else _compile(compiler, path)
        if refused:
            return refused
        loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        return No(f"the CPU kernels could not be built: {error}")
    loaded.fp4_run.argtypes = [ctypes.POINTER(_Job)]
    loaded.fp4_set_parallel.argtypes = [ctypes.c_void_p]
    loaded.fp4_set_parallel(_torch_parallel())
    return loaded


def library() -> ctypes.CDLL | No:
    """The built library, or why there is none; the first call of a process builds or loads it."""
    global _built
    if _built is None:
        with _LOCK:
            if _built is None:
                _built = _build()
    return _built


def prebuild() -> None:
    """Start building in the background, for a caller that will need the kernels soon."""
    if _built is None:
        threading.Thread(target=library, name="fp4compile-build", daemon=True).start()


# --- describing a call --------------------------------------------------------------------------------------

_POINTERS = ("x", "y", "scales", "scale_in", "scale_out", "seed", "sign_seed")
_INTEGERS = (
    *("op", "x_dtype", "y_dtype", "batch", "lanes", "size", "padded"),
    *("batch_stride", "lane_stride", "stride"),
    *("columns", "hadamard", "stream", "sign_stream", "scaling", "element", "block", "edge", "blocks"),
    *("truncation_free", "emax", "up_from", "k_max", "threads"),
)


class _Job(ctypes.Structure):
    """The struct of the same name in cpu_codec.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("top", "unit", "hadamard_scale", "scale_max")),
        ("magnitudes", ctypes.c_int64),
    )


_OPS = {"fake_quantize": 0, "quantize": 1, "dequantize": 2, "tensor_scale": 3, "hadamard": 4}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCALINGS = {"e6m2": 0, "e8m0": 1, "e4m3": 2}


def _element(element: Element) -> int | No:
    """The rounding that cpu_codec.c has for the element: E2M1 ties to even, evenly spaced ties away."""
    step = element.magnitudes[1]
    if (element.magnitudes, element.tie) == (E2M1.magnitudes, "even"):
        return 0
    even_steps = element.magnitudes == tuple(step * i for i in range(8))
    if even_steps and math.frexp(step)[0] == 0.5 and element.tie == "away":
        return 1
    return No(f"the CPU kernels round E2M1 (ties to even) and evenly spaced elements, not {element.name}")


def _format_fields(fmt: Format) -> dict[str, Any] | No:
    """What of a _Job the format alone decides."""
    element = _element(fmt.element)
    if isinstance(element, No):
        return element
    blocks = tuple(level.block for level in fmt.levels if level.block is not None)
    first, block = fmt.levels[0].dtype, fmt.block
    if (first == "e6m2") != (len(blocks) > 1) or (first == "e6m2" and (blocks, element) != ((64, 8, 4), 1)):
        return No(f"the CPU kernels know one block scale, or E6M2 over 64, 8 and 4, not {blocks}")
    if block & (block - 1) or (fmt.block_2d or block) != block:
        return No(f"the CPU kernels need blocks of a power of two, 2-D blocks as long: {block}")
    unit = fmt.element.magnitudes[1]
    nibbles = sum(int(m / unit) << 4 * i for i, m in enumerate(fmt.element.magnitudes))
    top = fmt.element.max
    return {
        "scaling": _SCALINGS[first],
        "element": element,
        "block": block,
        "top": top,
        "unit": unit,
        "magnitudes": nibbles,
    }


def _rule_fields(fmt: Format, rule: str, dtype: torch.dtype) -> dict[str, Any]:
    """The scale rule; for E8M0 the fraction of amax (23 bits) from which the exponent moves up, its cap."""
    largest = torch.finfo(dtype).max
    if fmt.levels[0].dtype != "e8m0":
        return {"truncation_free": int(rule == "truncation-free"), "scale_max": e6m2_max(largest)}
    top = fmt.element.max
    return {
        "emax": math.floor(math.log2(top)),
        "up_from": e8m0_up_from(fmt.element, rule),
        "k_max": min(math.floor(math.log2(largest / top)), 127),
    }


@cache
def _known(format: str) -> dict[str, Any] | No:
    return _format_fields(FORMATS[format])


@cache
def _fields(format: str, scale_rule: str | None, dtype: torch.dtype) -> dict[str, Any]:
    fmt, known = FORMATS[format], _known(format)
    assert not isinstance(known, No)
    return {**known, **_rule_fields(fmt, fmt.rule(scale_rule), dtype)}


def _merged(sizes: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(size, stride) of the axes, those that follow one another in memory joined, those of size 1 dropped."""
    if 0 in sizes:
        return [(0, 0)]
    runs: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


def _layout(x: Tensor, axis: int, block_2d: bool) -> dict[str, int] | None:
    """x as [batch, lanes, size] or, in columns, [batch, size, lanes]; None where its strides do not fold."""
    shape, strides = x.shape, x.stride()
    columns = math.prod(shape[axis + 1 :]) > 1 or (block_2d and axis == x.dim() - 2)
    outer = axis if columns or not block_2d else max(axis - 1, 0)
    across = slice(axis + 1, None) if columns else slice(outer, axis)
    batch, lanes = _merged(shape[:outer], strides[:outer]), _merged(shape[across], strides[across])
    if not columns and not block_2d and batch:
        lanes = [batch.pop()]
    if len(batch) > 1 or len(lanes) > 1:
        return None
    (batches, batch_stride), (count, lane_stride) = (batch or [(1, 0)])[0], (lanes or [(1, 0)])[0]
    return {
        "batch": batches,
        "batch_stride": batch_stride,
        "lanes": count,
        "lane_stride": lane_stride,
        "size": shape[axis],
        "stride": strides[axis],
        "columns": columns,
    }


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _transform_fields(size: int, hadamard: int, sign_seed: Tensor | None) -> dict[str, Any]:
    """The Hadamard transform in front, and the length it leaves."""
    if not hadamard:
        return {"padded": size}
    return {
        "padded": -(-size // hadamard) * hadamard,
        "hadamard": hadamard,
        "hadamard_scale": 1.0 / math.sqrt(hadamard),
        "sign_seed": _pointer(sign_seed),
        "sign_stream": SIGN_STREAM,
    }


def _call(op: str, **fields: Any) -> bool:
    """Run a job; False where the C code asks for the reference."""
    loaded = library()
    assert not isinstance(loaded, No)
    return loaded.fp4_run(_Job(op=_OPS[op], threads=torch.get_num_threads(), **fields)) == 0


# --- the kernels --------------------------------------------------------------------------------------------


def _source(x: Tensor, axis: int, block_2d: bool) -> tuple[Tensor, int, dict[str, int]]:
    """x (copied where its strides are too odd), its axis counted from 0, its layout."""
    axis %= x.dim()
    layout = _layout(x, axis, block_2d)
    if layout is None:
        # A tensor without elements is contiguous whatever its strides.
        x = x.contiguous() if x.numel() else torch.empty(x.shape, dtype=x.dtype)
        layout = _layout(x, axis, block_2d)
        assert layout is not None
    return x, axis, layout


def _shape(x: Tensor, axis: int, size: int) -> list[int]:
    return [*x.shape[:axis], size, *x.shape[axis + 1 :]]


def _quantizing(x: Tensor, arguments: Mapping[str, Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """What `fake_quantize` and `quantize` share: x, its axis, the fields of the job but for its results."""
    x, axis, layout = _source(x, arguments["axis"], arguments["block_2d"])
    fields = {
        **_fields(arguments["format"], arguments["scale_rule"], dtype),
        **layout,
        **_transform_fields(layout["size"], arguments["hadamard"], arguments["sign_seed"]),
    }
    fields["blocks"] = -(-fields["padded"] // fields["block"])
    fields["edge"] = fields["block"] if arguments["block_2d"] else 0
    fields["scale_in"] = _pointer(arguments["tensor_scale"])
    if arguments["rounding"] == "stochastic":
        fields["seed"], fields["stream"] = _pointer(arguments["seed"]), arguments["stream"] & 0xFFFFFFFF
    return x, axis, {**fields, "x": x.data_ptr(), "x_dtype": _DTYPES[x.dtype]}


def fake_quantize(x: Tensor, fold: bool, **arguments: Any) -> Tensor:
    """The op `fake_quantize`."""
    source, axis, fields = _quantizing(x, arguments, x.dtype)
    y = torch.empty(_shape(x, axis, fields["padded"]), dtype=x.dtype)
    scale_out = _pointer(arguments["tensor_scale"]) if fold else None
    if not y.numel() or _call("fake_quantize", **fields, y=y.data_ptr(), y_dtype=_DTYPES[y.dtype], scale_out=scale_out):
        return y
    return OPS["fake_quantize"].reference(x=source, fold=fold, **arguments)


def quantize(x: Tensor, dtype: torch.dtype | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `quantize`."""
    source, axis, fields = _quantizing(x, arguments, dtype or x.dtype)
    shape = [*x.shape[:axis], *x.shape[axis + 1 :]]
    codes = torch.empty([*shape, fields["blocks"] * fields["block"] // 2], dtype=torch.uint8)
    if fields["edge"]:
        shape[-1] = -(-shape[-1] // fields["edge"])
    scales = torch.empty([*shape, fields["blocks"]], dtype=FORMATS[arguments["format"]].scale_dtype)
    if not codes.numel() or _call("quantize", **fields, y=codes.data_ptr(), scales=scales.data_ptr()):
        return codes, scales
    return OPS["quantize"].reference(x=source, dtype=dtype, **arguments)


def dequantize(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    axis: int,
    size: int,
    block_2d: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The op `dequantize`."""
    codes, scales = codes.contiguous(), scales.contiguous()
    axis %= codes.dim()
    shape = list(codes.shape[:-1])
    shape.insert(axis, size)
    y = torch.empty(shape, dtype=dtype)
    if not y.numel():
        return y
    fields: dict[str, Any] = {**_fields(format, None, torch.float32), **(_layout(y, axis, block_2d) or {})}
    fields |= {"stride": 1, "padded": size, "blocks": codes.shape[-1] * 2 // fields["block"]}
    fields["edge"] = fields["block"] if block_2d else 0
    fields |= {"x": codes.data_ptr(), "scales": scales.data_ptr(), "scale_out": _pointer(tensor_scale)}
    if _call("dequantize", **fields, y=y.data_ptr(), y_dtype=_DTYPES[dtype]):
        return y
    return OPS["dequantize"].reference(codes, scales, tensor_scale, format, axis, size, block_2d, dtype)


def _dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps or overlaps, in any order of its axes."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.is_contiguous() or x.permute(order).is_contiguous()


def tensor_scale(x: Tensor, format: str, axis: int, hadamard: int, sign_seed: Tensor | None, **unused: Any) -> Tensor:
    """The op `tensor_scale`."""
    y = torch.ones((), dtype=torch.float32)
    if not x.numel():
        return y
    top = E4M3_MAX * FORMATS[format].element.max
    if hadamard:
        x, _, layout = _source(x, axis, False)
        fields: dict[str, Any] = {**layout, **_transform_fields(layout["size"], hadamard, sign_seed)}
    else:
        x = x if _dense(x) else x.contiguous()
        fields = {"batch": 1, "lanes": 1, "size": x.numel(), "padded": x.numel(), "stride": 1}
    fields |= {"x": x.data_ptr(), "x_dtype": _DTYPES[x.dtype], "block": 1, "top": top}
    if _call("tensor_scale", **fields, y=y.data_ptr()):
        return y
    return OPS["tensor_scale"].reference(x, format, axis, hadamard, sign_seed)


def hadamard(x: Tensor, axis: int, size: int, seed: Tensor | None) -> Tensor:
    """The op `hadamard`."""
    source, axis, layout = _source(x, axis, False)
    fields: dict[str, Any] = {**layout, **_transform_fields(layout["size"], size, seed)}
    y = torch.empty(_shape(x, axis, fields["padded"]), dtype=torch.float32)
    fields |= {"x": source.data_ptr(), "x_dtype": _DTYPES[x.dtype], "block": 1}
    if not y.numel() or _call("hadamard", **fields, y=y.data_ptr(), y_dtype=_DTYPES[y.dtype]):
        return y
    return OPS["hadamard"].reference(x, axis, size, seed)


# Rows of a packed weight that are decoded at a time for a GEMM of few rows: they stay in cache between both.
_CHUNK_ELEMENTS = 1 << 20
_FEW_ROWS = 16


def _operand(values: Tensor, scales: Tensor | None, format: str, k: int, block_2d: bool) -> Tensor:
    if not format:
        return values.to(torch.float32)
    assert scales is not None
    return dequantize(values, scales, None, format, -1, k, block_2d, torch.float32)


def _product(left: Tensor, b: Tensor, b_scales: Tensor | None, b_format: str, b_block_2d: bool, k: int) -> Tensor:
    """left @ b in fp32; the weight of a GEMM of few rows is decoded and read in pieces that fit the cache."""
    rows = math.prod(left.shape[:-1])
    step = max(_CHUNK_ELEMENTS // max(k, 1) // 64, 1) * 64  # whole 2-D blocks
    if not b_format or b.dim() != 2 or rows > _FEW_ROWS or b.shape[0] <= step:
        right = _operand(b, b_scales, b_format, k, b_block_2d)
        return left @ (right.mT if b_format else right)
    assert b_scales is not None
    out = left.new_empty((*left.shape[:-1], b.shape[0]))
    edge = FORMATS[b_format].block if b_block_2d else 1
    for first in range(0, b.shape[0], step):
        last = min(first + step, b.shape[0])
        scales = b_scales[first // edge : -(-last // edge)]
        out[..., first:last] = left @ _operand(b[first:last], scales, b_format, k, b_block_2d).mT
    return out


def mm(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    a_tensor_scale: Tensor | None,
    b_tensor_scale: Tensor | None,
    a_format: str,
    b_format: str,
    b_block_2d: bool,
    k: int,
    dtype: torch.dtype | None,
    activation: str = "",
    factor: Tensor | None = None,
    a_holds: str = "",
) -> Tensor:
    """The op `mm`: operands decoded to fp32, scales, bias, activation and factor on the fp32 product, one rounding at
    the end."""
    out = _product(_operand(a, a_scales, a_format, k, False), b, b_scales, b_format, b_block_2d, k)
    for scale in (a_tensor_scale, b_tensor_scale):
        out = out if scale is None else out * scale
    if bias is not None:
        out = out + bias.to(torch.float32)
    out = activated(out, activation)
    if factor is not None:
        out = out * factor.to(torch.float32)
    return out.to(dtype or a.dtype)


def grouped_mm_packed(
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
    """The op `grouped_mm_packed`: experts without a token are not decoded."""
    out = a.new_zeros((a.shape[0], b.shape[1]))
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            weight = b[group], None, None, b_scales[group], a_tensor_scale, b_tensor_scale
            out[start:end] = mm(a[start:end], *weight, "", b_format, b_block_2d, k, None)
        start = end
    return out


# --- what they support --------------------------------------------------------------------------------------


def _on_cpu(arguments: Mapping[str, Any]) -> str | None:
    other = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.device.type != "cpu"]
    return f"{', '.join(other)} not on the CPU" if other else None


def _format_known(name: str = "format") -> checks.Check:
    """A check of the argument that names a format."""

    def known(arguments: Mapping[str, Any]) -> str | None:
        answer = _known(arguments[name])
        return answer.reason if isinstance(answer, No) else None

    return known


def _transform_size(arguments: Mapping[str, Any]) -> str | None:
    size = arguments["hadamard"] if "hadamard" in arguments else arguments["size"]
    good = (size == 0 and "hadamard" in arguments) or (2 <= size <= 4096 and not size & (size - 1))
    return None if good else f"Hadamard size {size} is not a power of two from 2 to 4096"


def _operands(arguments: Mapping[str, Any]) -> str | None:
    formats = [f for f in (arguments["a_format"], arguments["b_format"]) if f]
    if not formats:
        return "no operand is packed"
    return next((known.reason for known in map(_known, formats) if isinstance(known, No)), None)


def _supports(*required: checks.Check) -> Callable[[Mapping[str, Any]], Answer]:
    """The answer of the first check that objects; a machine without a compiler objects to everything."""

    def answer(arguments: Mapping[str, Any]) -> Answer:
        built = library()
        if isinstance(built, No):
            return built
        for check in required:
            reason = check(arguments)
            if reason is not None:
                return No(reason)
        return Yes()

    return answer


_QUANTIZING = (
    *(_on_cpu, checks.input, _format_known(), checks.scale_rule, checks.scalars),
    *(_transform_size, checks.rounding, checks.square),
)

KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(f"cpu/{op}", op, "cpu", run, _supports(*required))
    for op, run, required in (
        ("fake_quantize", fake_quantize, (*_QUANTIZING, checks.unproduced)),
        ("quantize", quantize, _QUANTIZING),
        ("dequantize", dequantize, (_on_cpu, _format_known(), checks.scalars, checks.square, checks.packed)),
        (
            *("tensor_scale", tensor_scale),
            (_on_cpu, checks.input, checks.scale_rule, checks.scalars, _transform_size, checks.unproduced),
        ),
        ("hadamard", hadamard, (_on_cpu, checks.input, checks.scalars, _transform_size)),
        ("mm", mm, (_on_cpu, _operands)),
        ("grouped_mm_packed", grouped_mm_packed, (_on_cpu, _format_known("b_format"))),
    )
)
