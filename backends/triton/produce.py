"""A producer as a Triton function that a kernel calls where it would load its input.

    full row: t0 = mul.bfloat16(a0, a1)
    ->
    def produce(p0, p1, p2, p3, p4, index, row, column, in_row, in_column, EVEN: tl.constexpr):
        a0 = tl.load(p0 + index, in_row & in_column, 0.0).to(tl.float32)
        a1 = tl.load(p1 + row, in_row, 0.0).to(tl.float32)
        t0 = rounded((a0 * a1), tl.bfloat16)
        if not EVEN:
            t0 = tl.where(in_row & in_column, t0, 0.0)
        return (t0,)

Exponentials and divisions are those that Inductor's own kernels use, not the correctly rounded ones.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Collection
from functools import cache
from typing import Any

from fp4compile.producer import MOST_OPERANDS, Step, parse

# What Triton's language spells for each function; one that is missing here has no kernel.
SPELLINGS = {
    "cast": "{0}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "erf": "tl.erf({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "(1.0 / {0})",
    "sigmoid": "tl.sigmoid({0})",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
}

# Where each layout lies, and which of its elements exist.
_ADDRESSES = {
    "full": ("index", "in_row & in_column"),
    "row": ("row", "in_row"),
    "column": ("column", "in_column"),
    "scalar": ("", ""),
}
_ROUNDED = {"float32": "{}", "bfloat16": "rounded({}, tl.bfloat16)", "float16": "rounded({}, tl.float16)"}


def _load(number: int, layout: str) -> list[str]:
    offset, mask = _ADDRESSES[layout]
    name, pointer = f"a{number}", f"p{number} + {offset}" if offset else f"p{number}"
    if not mask:
        return [f"{name} = tl.load({pointer}).to(tl.float32)"]
    return [
        "if EVEN:",
        f"    {name} = tl.load({pointer}).to(tl.float32)",
        "else:",
        f"    {name} = tl.load({pointer}, {mask}, 0.0).to(tl.float32)",
    ]


def _line(number: int, step: Step) -> str:
    return f"t{number} = {_ROUNDED[step.dtype].format(SPELLINGS[step.function].format(*step.values))}"


def refusal(text: str, wanted: Collection[int] = (1,)) -> str | None:
    """Why no kernel computes a producer of one of the wanted numbers of tensors, or None."""
    if not text:
        return None if 1 in wanted else "without a producer there is one tensor"
    producer = parse(text)
    if len(producer.results) not in wanted:
        return f"tensors that the producer makes: {len(producer.results)}, not {' or '.join(map(str, wanted))}"
    if len(producer.layouts) > MOST_OPERANDS or producer.layouts[0] != "full":
        return f"it computes what it quantises from {MOST_OPERANDS} operands at most, the first of full size"
    unknown = {step.function for step in producer.steps} - SPELLINGS.keys()
    return f"it does not compute {', '.join(sorted(unknown))}" if unknown else None


def source(text: str, name: str = "produce") -> str:
    """The source of the Triton function of a producer."""
    producer = parse(text)
    body = [line for i, layout in enumerate(producer.layouts) for line in _load(i, layout)]
    body += [_line(i, step) for i, step in enumerate(producer.steps)]
    body += ["if not EVEN:", *(f"    t{i} = tl.where(in_row & in_column, t{i}, 0.0)" for i in producer.results)]
    body.append(f"return ({' '.join(f't{i},' for i in producer.results)})")
    pointers = ", ".join(f"p{i}" for i in range(MOST_OPERANDS))
    head = f"def {name}({pointers}, index, row, column, in_row, in_column, EVEN: tl.constexpr):"
    return "\n".join([head, *(f"    {line}" for line in body)]) + "\n"


@cache
def function(text: str) -> Any:
    """The compiled-on-use Triton function of a producer, whose results it returns as a tuple; None where there is none.

    It takes pointers to the operands, the linear index, row and column of every element, and which of them exist.
    """
    if not text:
        return None
    import triton
    import triton.language as tl

    from fp4compile.backends.triton.arithmetic import rounded

    name = f"produce_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    code, file = source(text, name), f"<{name}>"
    # Triton reads a function's source back through linecache.
    linecache.cache[file] = (len(code), None, code.splitlines(True), file)
    scope: dict[str, Any] = {"tl": tl, "rounded": rounded, "__name__": "fp4compile.backends.triton.produce"}
    exec(compile(code, file, "exec"), scope)
    return triton.jit(scope[name])
