"""Compiled kernels without a GPU: an interpreter of PTX on NumPy.

    mul.rn.f32 %r3, %r1, %r2;   ->   registers["%r3"] = registers["%r1"] * registers["%r2"], of all threads at once

It knows the instructions that Triton compiles this project's quantisation to, as the PTX ISA 8.7 defines them; another
one is an error, as are a read or write outside of a tensor and a misaligned one. Registers are untyped bits. What it
cannot show: races (threads go in step), speed, and what ptxas makes of the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]

_WARP = 32
_SHARED = 227 * 2**10  # bytes a program of sm_90 can have
_BASE = 40  # bits of an address inside a tensor; the number of the tensor, from one on, is above
_THREADS = 2**15  # at once
_TINY, _ONE = np.finfo("f4").tiny, np.float64(1)

# Of a pair, which is one register, those of the halves.
_DTYPES = {
    f"{kind}{bits}": f"{code}{bits // 8}"
    for kind, code in (("b", "u"), ("s", "i"), ("u", "u"))
    for bits in (8, 16, 32, 64)
}
_DTYPES |= {"pred": "?", "f16": "f2", "f32": "f4", "bf16": "u2", "bf16x2": "u2"}
_DTYPES |= {"s16x2": "i2", "u16x2": "u2", "f16x2": "f2"}


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _odd(near: Array, error: Array) -> Array:
    """near + error rounded to odd, for near the nearest: rounded once more to two bits less it is as if once."""
    bits = near.view(f"i{near.itemsize}")
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(near)
    return np.where(inexact, np.nextafter(near, np.copysign(np.inf, error).astype(near.dtype)), near)


def _sum(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """a b + c of fp32, in fp64 to nearest, and what that leaves out (Knuth's two-sum; the product is exact)."""
    product, c = a.astype("f8") * b, c.astype("f8")
    near = product + c
    other = near - product
    return near, (product - (near - other)) + (c - other)


def _fma(a: Array, b: Array, c: Array) -> Array:
    return _odd(*_sum(a, b, c)).astype("f4")


def _fma_up(a: Array, b: Array, c: Array) -> Array:
    """Rounded towards positive infinity."""
    near, error = _sum(a, b, c)
    result = near.astype("f4")
    below = (result < near) | ((result == near) & (error > 0))
    return np.where(below, np.nextafter(result, np.float32(np.inf)), result)


def _float(bf16: Array) -> Array:
    return (bf16.astype("u4") << 16).view("f4")


def _bf16(x: Array) -> Array:
    """fp64 or fp32, rounded once to nearest, ties to even."""
    near = x.astype("f4")
    bits = _odd(near, x.astype("f8") - near).view("u4").astype("u8")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _on_bf16(function: Callable[..., Array]) -> Callable[..., Array]:
    """A function of numbers in fp64, whose result is rounded."""
    return lambda *words: _bf16(function(*(_float(word).astype("f8") for word in words)))


def _extreme(function: Callable[..., Array], joined: Callable[..., Array]) -> Callable[..., Array]:
    """A minimum or maximum that leaves NaN out; of zeros it is told apart by the sign, with `joined` of the bits."""

    def extreme(a: Array, b: Array) -> Array:
        if a.dtype.kind != "f":
            return function(a, b)
        bits, result = f"u{a.itemsize}", function(a, b)
        result = np.where(a == b, joined(a.view(bits), b.view(bits)).view(a.dtype), result)
        return np.where(np.isnan(result), np.array(2 ** (8 * a.itemsize - 1) - 1, bits).view(a.dtype), result)

    return extreme


_MIN, _MAX = _extreme(np.fmin, np.bitwise_or), _extreme(np.fmax, np.bitwise_and)
_MAX_NAN = _extreme(np.maximum, np.bitwise_and)


def _fp8(dtype: torch.dtype) -> Callable[..., Array]:
    """Two numbers, the first of which goes to the upper half; what is too large becomes the largest."""
    top = torch.finfo(dtype).max

    def half(x: Array) -> Array:
        bits: Array = torch.from_numpy(np.array(x)).clamp(-top, top).to(dtype).view(torch.uint8).numpy()
        return bits.astype("u2")

    return lambda high, low: half(low) | half(high) << 8


def _fp8_of_pair(dtype: torch.dtype) -> Callable[..., Array]:
    return lambda pair: _fp8(dtype)(pair[1::2], pair[::2])


def _shifted(shift: Callable[..., Array]) -> Callable[[Array, Array], Array]:
    """A shift by at least the width leaves nothing, or the sign."""

    def shifted(a: Array, by: Array) -> Array:
        width = 8 * a.itemsize
        if shift is np.right_shift and a.dtype.kind == "i":
            return shift(a, np.minimum(by, width - 1).astype(a.dtype))
        return np.where(by < width, shift(a, np.minimum(by, width - 1).astype(a.dtype)), a.dtype.type(0))

    return shifted


def _bit_field(a: Array, at: Array, length: Array) -> Array:
    width = 8 * a.itemsize
    if (at + length > width).any() or (length < 1).any():
        raise NotImplementedError("a bit field that goes past its word")
    left = (width - at - length).astype(a.dtype)
    return (a << left) >> (width - length).astype(a.dtype)


def _permuted(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of the pair a, b by the numbers in the selector's hexadecimal digits."""
    if (selector & 0x8888).any():
        raise NotImplementedError("prmt that repeats a sign")
    pair, result = a.astype("u8") | (b.astype("u8") << np.uint64(32)), np.uint32(0)
    for byte in range(4):
        at = ((selector >> np.uint32(4 * byte)) & np.uint32(7)).astype("u8") * np.uint64(8)
        result = result | (((pair >> at) & np.uint64(255)).astype("u4") << np.uint32(8 * byte))
    return result


def _high(a: Array, b: Array) -> Array:
    """The upper half of a product."""
    wide = f"{a.dtype.kind}8"
    return (a.astype(wide) * b.astype(wide) >> np.array(32, wide)).astype(a.dtype)


def _lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Bit n of the table is the result where the bits of a, b and c are n."""
    result = np.zeros_like(a)
    for n in range(8):
        if int(table.flat[0]) >> n & 1:
            result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return result


def _selected(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


# Operations by name without a type, or whole; with them the types of their operands: t the instruction's, w the one
# twice as wide, others as named.
_NAMED = {"p": "pred", "u": "u32", "h": "u16", "f": "f32"}
_OPERATIONS: dict[str, tuple[str, Callable[..., Array]]] = {
    "abs": ("t", np.abs),
    "neg": ("t", np.negative),
    "not": ("t", np.invert),
    "add": ("tt", np.add),
    "sub": ("tt", np.subtract),
    "and": ("tt", np.bitwise_and),
    "or": ("tt", np.bitwise_or),
    "xor": ("tt", np.bitwise_xor),
    "add.rn": ("tt", np.add),
    "sub.rn": ("tt", np.subtract),
    "mul.rn": ("tt", np.multiply),
    "div.rn": ("tt", np.divide),
    "fma.rn": ("ttt", _fma),
    "fma.rp": ("ttt", _fma_up),
    "mul.lo": ("tt", np.multiply),
    "mul.hi": ("tt", _high),
    "mul.wide": ("tt", lambda a, b: a.astype(f"{a.dtype.kind}8") * b),
    "mad.lo": ("ttt", lambda a, b, c: a * b + c),
    "mad.wide": ("ttw", lambda a, b, c: a.astype(c.dtype) * b + c),
    # towards zero, of numbers that fp64 holds
    "div": ("tt", lambda a, b: np.trunc(a / b).astype(a.dtype)),
    "rem": ("tt", np.fmod),
    "min": ("tt", _MIN),
    "max": ("tt", _MAX),
    "max.NaN": ("tt", _MAX_NAN),
    "shl": ("tu", _shifted(np.left_shift)),
    "shr": ("tu", _shifted(np.right_shift)),
    "bfe": ("tuu", _bit_field),
    "prmt": ("ttt", _permuted),
    "lop3": ("tttu", _lop3),
    "selp": ("ttp", _selected),
    "setp.eq": ("tt", np.equal),
    "setp.ne": ("tt", lambda a, b: (a < b) | (a > b)),
    "setp.neu": ("tt", np.not_equal),
    "setp.lt": ("tt", np.less),
    "setp.le": ("tt", np.less_equal),
    "setp.gt": ("tt", np.greater),
    "setp.ge": ("tt", np.greater_equal),
    "setp.ltu": ("tt", lambda a, b: ~(a >= b)),
    "setp.leu": ("tt", lambda a, b: ~(a > b)),
    "setp.gtu": ("tt", lambda a, b: ~(a <= b)),
    "setp.geu": ("tt", lambda a, b: ~(a < b)),
    "setp.nan": ("tt", lambda a, b: np.isnan(a) | np.isnan(b)),
    "cvt.f32.bf16": ("h", _float),
    "cvt.f32.f16": ("h", lambda a: a.view("f2").astype("f4")),
    "cvt.rn.bf16.f32": ("f", _bf16),
    "cvt.rn.f16.f32": ("f", lambda a: a.astype("f2")),
    "cvt.rn.f16x2.f32": ("ff", lambda high, low: np.stack((low, high), 1).astype("f2").reshape(-1)),
    "cvt.rn.bf16x2.f32": ("ff", lambda high, low: _bf16(low).astype("u4") | _bf16(high).astype("u4") << 16),
    "cvt.rn.satfinite.e4m3x2.f32": ("ff", _fp8(torch.float8_e4m3fn)),
    "cvt.rn.satfinite.e5m2x2.f32": ("ff", _fp8(torch.float8_e5m2)),
    "cvt.rn.satfinite.e4m3x2.f16x2": ("t", _fp8_of_pair(torch.float8_e4m3fn)),
    "cvt.rn.satfinite.e5m2x2.f16x2": ("t", _fp8_of_pair(torch.float8_e5m2)),
    "cvt.rn.f32.u32": ("u", lambda a: a.astype("f4")),
    "cvt.rn.f32.s32": ("u", lambda a: a.view("i4").astype("f4")),
    "cvt.rzi.s32.f32": ("f", lambda a: np.trunc(a).astype("i4")),
    "cvt.rmi.f32.f32": ("f", np.floor),
    "cvt.rmi.ftz.f32.f32": ("f", lambda a: np.floor(np.where(np.abs(a) < _TINY, np.copysign(np.float32(0), a), a))),
}
# The same of bf16, alone or in pairs.
_OPERATIONS_BF16: dict[str, tuple[str, Callable[..., Array]]] = {
    "abs": ("t", lambda a: a & np.uint16(0x7FFF)),
    "neg": ("t", lambda a: a ^ np.uint16(0x8000)),
    "add.rn": ("tt", _on_bf16(lambda a, b: _odd(*_sum(a, _ONE, b)))),
    "sub.rn": ("tt", _on_bf16(lambda a, b: _odd(*_sum(b, -_ONE, a)))),
    "mul.rn": ("tt", _on_bf16(np.multiply)),
    "fma.rn": ("ttt", _on_bf16(lambda a, b, c: _odd(*_sum(a, b, c)))),
    "min": ("tt", _on_bf16(_MIN)),
    "max": ("tt", _on_bf16(_MAX)),
    "max.NaN": ("tt", _on_bf16(_MAX_NAN)),
}
# Of fp16 only what rounds nothing.
_OF_TYPES = {
    "bf16": _OPERATIONS_BF16,
    "f16": {name: _OPERATIONS[name] for name in ("abs", "neg", "min", "max", "max.NaN")},
}


# --- a program -------------------------------------------------------------------------------------------------------


class _Threads:
    """The registers, memory and places of the threads of some programs."""

    def __init__(
        self, programs: Array, grid: int, threads: int, memory: Sequence[Array], parameters: Sequence[Array]
    ) -> None:
        self.count = len(programs) * threads
        self.chosen = np.ones(self.count, bool)  # those that take the step
        self.memory, self.parameters = memory, parameters
        self.shared = np.zeros(len(programs) * _SHARED, "u1")
        thread = np.arange(self.count, dtype="u4")
        self.program = thread // threads
        self.lane, self.warp = thread % _WARP, thread // _WARP * _WARP
        self.registers: dict[str, Array] = {
            "%tid.x": thread % threads,
            "%ctaid.x": programs.astype("u4").repeat(threads),
            "%nctaid.x": np.full(self.count, grid, "u4"),
            "global_smem": np.zeros(self.count, "u4"),
        }

    def read(self, operand: str, type: str) -> Array:
        """A register or a number, of every thread; of a pair both halves of one thread after the other."""
        dtype = np.dtype(_DTYPES[type])
        size = dtype.itemsize * (2 if type.endswith("x2") else 1)
        value = self.registers.get(operand)
        if value is None:
            value = np.broadcast_to(_number(operand, dtype, size), self.count)
        if dtype.kind == "b":
            return value
        # The smallest registers have 16 bits.
        return np.ascontiguousarray(value.astype(f"u{size}", copy=False)).view(dtype)

    def write(self, register: str, value: Array) -> None:
        if value.dtype.kind != "b":
            value = np.ascontiguousarray(value)
            value = value.view(f"u{value.nbytes // self.count}")
            value = value.astype("u2") if value.itemsize == 1 else value
        if not self.chosen.all():
            value = np.where(self.chosen, value, self.registers.get(register, value.dtype.type(0)))
        self.registers[register] = value


@cache
def _number(text: str, dtype: np.dtype[Any], size: int) -> Array:
    """The bits of a literal, or the truth of a predicate."""
    if dtype.kind == "b":
        return np.array(bool(int(text)))
    if text.startswith("%"):  # a register that nothing has written: compilers leave undefined what has no effect
        return np.frombuffer(b"\xa5" * size, f"u{size}")[0]
    number = int(text[2:], 16) if text.startswith("0f") else int(text.rstrip("U"), 0)
    if dtype.kind == "f" and not text.startswith("0f"):
        raise ValueError(f"{text} is no register and no number of {dtype}")
    return np.array(number % 2 ** (8 * size), f"u{size}")


Step = Callable[[_Threads], None]


def _operation(name: str, operands: Sequence[str]) -> Step:
    base, _, type = name.rpartition(".")
    known = _OF_TYPES.get(type.removesuffix("x2"), _OPERATIONS)
    found = known.get(base) or _OPERATIONS.get(name)
    if found is None:
        return _conversion(name, operands)
    reads, function = found
    wide = f"{type[0]}{2 * int(type[1:])}" if type[1:].isdigit() else ""
    types = [{"t": type, "w": wide, **_NAMED}[each] for each in reads]
    target, *sources = operands
    assert len(sources) == len(types), (name, operands)

    def step(threads: _Threads) -> None:
        threads.write(target, function(*map(threads.read, sources, types)))

    return step


def _conversion(name: str, operands: Sequence[str]) -> Step:
    """Of integers, whose lower bits stay."""
    found = re.fullmatch(r"cvt\.([su])(8|16|32|64)\.([su](?:8|16|32|64))", name)
    if not found:
        raise NotImplementedError(f"PTX instruction {name}")
    kind, bits, source = found.groups()
    return lambda threads: threads.write(
        operands[0], threads.read(operands[1], source).astype(_DTYPES[f"{kind}{bits}"])
    )


def _parts(operand: str) -> list[str]:
    """The registers of a vector, or the one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def _move(name: str, operands: Sequence[str]) -> Step:
    """Also between a register and its two halves, the lower first."""
    (target, *other), (source, *second) = map(_parts, operands)
    type = name.rpartition(".")[2]
    if not other and not second:
        return lambda threads: threads.write(target, threads.read(source, type))
    bits = int(type[1:]) // 2
    half = f"b{bits}"

    def step(threads: _Threads) -> None:
        if second:
            low, high = (threads.read(part, half).astype(_DTYPES[type]) for part in (source, *second))
            threads.write(target, low | high << bits)
        else:
            value = threads.read(source, type)
            for at, register in enumerate((target, *other)):
                threads.write(register, (value >> at * bits).astype(_DTYPES[half]))

    return step


def _parameter(name: str, operands: Sequence[str]) -> Step:
    type, number = name.rpartition(".")[2], int(operands[1].strip("[]").rpartition("_")[2])

    def step(threads: _Threads) -> None:
        threads.write(operands[0], np.broadcast_to(threads.parameters[number].view(_DTYPES[type]), threads.count))

    return step


def _address(threads: _Threads, operand: str, type: str) -> Array:
    register, _, offset = operand.strip("[] ").partition("+")
    return threads.read(register.strip(), type) + np.array(int(offset or 0), _DTYPES[type])


def _shared(threads: _Threads, address: str) -> Iterator[tuple[Array, Array, Array, int, Array]]:
    """Bytes, where in its part of them each thread reads or writes, where that part begins, its size, and who does."""
    at = _address(threads, address, "b32").astype("i8")
    yield threads.shared, at, threads.program * np.int64(_SHARED), _SHARED, threads.chosen


def _global(threads: _Threads, address: str) -> Iterator[tuple[Array, Array, Array, int, Array]]:
    """The same of each tensor that a thread reads or writes."""
    addresses = _address(threads, address, "b64").astype("i8")
    tensors = addresses >> _BASE
    for number in np.unique(tensors[threads.chosen]):
        if not 1 <= number <= len(threads.memory):
            raise IndexError("outside of every tensor")
        memory = threads.memory[number - 1]
        at = addresses - (number << _BASE)
        yield memory, at, np.zeros_like(at), memory.size, threads.chosen & (tensors == number)


_SPACES = {"shared": _shared, "global": _global}


def _memory(name: str, operands: Sequence[str]) -> Step:
    verb, space, *vector, type = name.split(".")
    address, registers = operands if verb == "st" else reversed(operands)
    parts, dtype = _parts(registers), np.dtype(_DTYPES[type])
    assert [f"v{len(parts)}"] * (len(parts) > 1) == vector, (name, operands)
    size = dtype.itemsize * len(parts)

    def step(threads: _Threads) -> None:
        values = [threads.read(part, type) if verb == "st" else np.zeros(threads.count, dtype) for part in parts]
        for memory, at, first, held, chosen in _SPACES[space](threads, address):
            at, first = at[chosen], first[chosen]
            if (at % size).any():
                raise IndexError(f"{name} at an address that is no multiple of {size} bytes")
            if (at < 0).any() or at.max(initial=0) + size > held:
                raise IndexError(f"{name} past the end")
            at = (first + at) // dtype.itemsize
            memory = memory[: memory.size // dtype.itemsize * dtype.itemsize].view(dtype)
            for number, value in enumerate(values):
                if verb == "st":
                    memory[at + number] = value[chosen]
                else:
                    value[chosen] = memory[at + number]
        if verb == "ld":
            for part, value in zip(parts, values, strict=True):
                threads.write(part, value)

    return step


def _exchange(name: str, operands: Sequence[str]) -> Step:
    """A number of another thread of the warp."""
    target, source, other, clamp, members = operands
    if (clamp, members) != ("31", "-1"):
        raise NotImplementedError(f"{name} of a part of a warp")

    def step(threads: _Threads) -> None:
        by = threads.read(other, "b32")
        lane = (threads.lane ^ by if ".bfly" in name else by) % _WARP
        threads.write(target, threads.read(source, "b32")[threads.warp + lane])

    return step


def _reduce(name: str, operands: Sequence[str]) -> Step:
    """The largest among the threads of a warp that the mask names."""
    target, source, mask = operands
    assert name == "redux.sync.max.s32", name

    def step(threads: _Threads) -> None:
        values = threads.read(source, "s32").reshape(-1, 1, _WARP)
        members = threads.read(mask, "b32").reshape(-1, _WARP, 1) >> np.arange(_WARP, dtype="u4") & 1
        threads.write(target, np.where(members, values, np.iinfo("i4").min).max(2).reshape(-1))

    return step


def _matrices(name: str, operands: Sequence[str]) -> Step:
    """Of an 8 x 8 matrix of 16-bit numbers thread n has two neighbours of row n / 4, or of column n / 4; the threads
    8 i to 8 i + 7 give the addresses of the rows of matrix i."""
    address, registers = operands if name.startswith("st") else reversed(operands)
    parts = _parts(registers)
    found = re.fullmatch(rf"(ld|st)matrix\.sync\.aligned\.m8n8\.x{len(parts)}(\.trans)?\.shared\.b16", name)
    if not found:
        raise NotImplementedError(f"PTX instruction {name}")
    verb, turned = found.groups()

    def step(threads: _Threads) -> None:
        addresses = _address(threads, address, "b32") + threads.program * np.int64(_SHARED)
        memory = threads.shared.view("u2")
        line, pair = threads.lane // 4, threads.lane % 4 * 2
        for number, register in enumerate(parts):
            first = threads.warp + 8 * number
            at = [
                addresses[first + (pair + i if turned else line)] // 2 + (line if turned else pair + i) for i in (0, 1)
            ]
            if verb == "st":
                words = threads.read(register, "b32")
                memory[at[0]], memory[at[1]] = words & 0xFFFF, words >> 16
            else:
                threads.write(register, memory[at[0]] | memory[at[1]].astype("u4") << 16)

    return step


def _nothing(name: str, operands: Sequence[str]) -> Step:
    """Barriers: the threads go in step."""
    return lambda threads: None


_KINDS: dict[str, Callable[[str, Sequence[str]], Step]] = {
    "mov": _move,
    "ld.param": _parameter,
    "ld": _memory,
    "st": _memory,
    "shfl": _exchange,
    "redux": _reduce,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
    "bar": _nothing,
}


@lru_cache(maxsize=64)
def _parsed(code: str) -> tuple[list[tuple[str, bool, Step | str | None]], dict[str, int]]:
    """Steps with their predicates, negated or not, where a branch is its label and a return None; places of labels."""
    code = re.sub(r"//[^\n]*|\.(reg|loc|pragma)\b[^;\n]*;?", "", code)
    steps: list[tuple[str, bool, Step | str | None]] = []
    labels: dict[str, int] = {}
    for statement in re.findall(r"\$\w+:|[^;{}\s][^;]*;", code):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(steps)
            continue
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*);", statement, re.DOTALL)
        assert found, statement
        negated, predicate, name, rest = found.groups()
        name = name.replace("::cta", "")
        operands = [operand.strip() for operand in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", rest)]
        steps.append((predicate or "", bool(negated), _step(name, operands)))
    return steps, labels


def _step(name: str, operands: Sequence[str]) -> Step | str | None:
    if name == "ret":
        return None
    if name.startswith("bra"):
        return operands[0]
    make = next((make for kind, make in _KINDS.items() if name.startswith(kind + ".")), _operation)
    return make(name, operands)


def _run(code: str, threads: _Threads) -> None:
    """Those threads go on that are furthest behind, so that all meet again after a branch."""
    steps, labels = _parsed(code)
    places = np.zeros(threads.count, "i8")
    place, alike = 0, True  # whether all threads are at that place, and `places` out of date
    while place < len(steps):
        predicate, negated, step = steps[place]
        chosen = np.ones(threads.count, bool) if alike else places == place
        if predicate:
            chosen = chosen & (threads.read(predicate, "pred") ^ negated)
        if callable(step):
            if chosen.any():
                threads.chosen = chosen
                step(threads)
            if alike:
                place += 1
                continue
        places = np.where(alike | (places == place), place + 1, places)
        if not callable(step):
            places[chosen] = len(steps) if step is None else labels[step]
        place = int(places.min())
        alike = bool((places == place).all())


def run(ptx: str, programs: int, warps: int, arguments: Sequence[Tensor | int | float]) -> None:
    """Run a kernel on contiguous CPU tensors, which it writes into.

    Args:
        programs: their number along the one axis of the grid.
        warps: per program.
        arguments: of the kernel, without those of compile time.

    Raises:
        IndexError: an access is misaligned, or outside of every tensor.
        NotImplementedError: of an instruction that is not known.
    """
    memory: list[Array] = []
    parameters: list[Array] = []
    for value in arguments:
        if isinstance(value, Tensor):
            memory.append(value.view(-1).view(torch.uint8).numpy())
            parameters.append(np.array(len(memory) << _BASE, "u8"))
        else:
            parameters.append(np.array(value, "f4" if isinstance(value, float) else "i4"))
    code = ptx[ptx.index("\n{\n") : ptx.index("$L__func_end0:")]
    threads = _WARP * warps
    at_once = max(_THREADS // threads, 1)
    with np.errstate(all="ignore"):
        for first in range(0, programs, at_once):
            numbers = np.arange(first, min(first + at_once, programs))
            _run(code, _Threads(numbers, programs, threads, memory, parameters))


def assembly(code: str, *operands: Array) -> Array:
    """The result, 32 bits, of a block of inline assembly on operands of 32 bits each, all of one size."""
    threads = _Threads(np.zeros(1, int), 1, operands[0].size, (), ())
    threads.registers |= {f"${n}": operand.view("u4") for n, operand in enumerate(operands, 1)}
    with np.errstate(all="ignore"):
        _run(code, threads)
    return threads.registers["$0"]
