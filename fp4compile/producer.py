"""Elementwise arithmetic in front of a quantisation, as data that an op can carry and any backend can run.

    silu(gate) * up, all of it bf16:
    "full full: t0 = cast.float32(a0); t1 = neg.float32(t0); t2 = exp.float32(t1); t3 = add.float32(t2, 1.0);
     t4 = div.float32(t0, t3); t5 = cast.bfloat16(t4); t6 = mul.bfloat16(t5, a1)"

The head names the layout of each operand against the result [M, K]: `full` [M, K], `row` [M, 1], `column` [1, K],
`scalar` [1, 1]. Every step computes in fp32 and rounds once to the dtype that it names, as eager torch does on fp32,
bf16 and fp16; the last step is the result. A producer of several tensors, all of one dtype, names the steps that make
them: `… -> t9 t6`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fp4compile.errors import FP4ValueError, unknown

aten = torch.ops.aten

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
LAYOUTS = ("full", "row", "column", "scalar")
# What an op that carries a producer takes: x, and p1 to p4.
MOST_OPERANDS = 5
# What an op of several tensors makes: two or three.
MOST_RESULTS = 3


@dataclass(frozen=True)
class Function:
    """One elementwise function.

    Attributes:
        name: in the text of a producer.
        arity: number of operands.
        run: on fp32 tensors (and Python floats).
        targets: the graph ops that it stands for.
    """

    name: str
    arity: int
    run: Callable[..., Tensor]
    targets: tuple[Any, ...]


FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        f.name: f
        for f in (
            Function("cast", 1, lambda a: a, (torch.ops.prims.convert_element_type.default, aten._to_copy.default)),
            Function("neg", 1, torch.neg, (aten.neg.default,)),
            Function("abs", 1, torch.abs, (aten.abs.default,)),
            Function("exp", 1, torch.exp, (aten.exp.default,)),
            Function("erf", 1, torch.erf, (aten.erf.default,)),
            Function("sqrt", 1, torch.sqrt, (aten.sqrt.default,)),
            Function("rsqrt", 1, torch.rsqrt, (aten.rsqrt.default,)),
            Function("reciprocal", 1, torch.reciprocal, (aten.reciprocal.default,)),
            Function("sigmoid", 1, torch.sigmoid, (aten.sigmoid.default,)),
            Function("relu", 1, torch.relu, (aten.relu.default,)),
            Function("add", 2, operator.add, (aten.add.Tensor, aten.add.Scalar)),
            Function("sub", 2, operator.sub, (aten.sub.Tensor, aten.sub.Scalar)),
            Function("mul", 2, operator.mul, (aten.mul.Tensor, aten.mul.Scalar)),
            Function("div", 2, operator.truediv, (aten.div.Tensor, aten.div.Scalar)),
        )
    }
)

_BY_TARGET = {target: function for function in FUNCTIONS.values() for target in function.targets}


def function_of(node: Node) -> Function | None:
    """The elementwise function that a graph node applies to tensors and numbers, or None."""
    known = _BY_TARGET.get(node.target) if node.op == "call_function" else None
    if known is None or node.meta["val"].dtype not in DTYPES.values():
        return None
    scaled = "alpha" in node.kwargs or len(node.args) > 2  # add and sub take a factor
    return known if not scaled and all(map(_is_value, node.args[: known.arity])) else None


def _is_value(argument: Any) -> bool:
    """Whether an argument is a tensor or a finite number; a symbolic one is known only when the graph runs."""
    if isinstance(argument, Node):
        return isinstance(argument.meta["val"], Tensor)
    return isinstance(argument, int | float) and math.isfinite(argument)


# An operand of a step: the name of an input (a0, a1, …) or of an earlier step (t0, t1, …), or a number.
Value = str | float


@dataclass(frozen=True)
class Step:
    """`function` of `values`, rounded to `dtype`."""

    function: str
    dtype: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Producer:
    """A parsed text.

    Attributes:
        layouts: of the operands, in order.
        steps: in order of evaluation.
        chosen: the numbers of the steps that are the results; the last one alone where it is empty.
    """

    layouts: tuple[str, ...]
    steps: tuple[Step, ...]
    chosen: tuple[int, ...] = ()

    @property
    def results(self) -> tuple[int, ...]:
        """The numbers of the steps that are the results."""
        return self.chosen or (len(self.steps) - 1,)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the results."""
        return DTYPES[self.steps[self.results[0]].dtype]

    def __str__(self) -> str:
        steps = (f"t{i} = {s.function}.{s.dtype}({', '.join(map(str, s.values))})" for i, s in enumerate(self.steps))
        chosen = f" -> {' '.join(f't{i}' for i in self.chosen)}" if self.chosen else ""
        return f"{' '.join(self.layouts)}: {'; '.join(steps)}{chosen}"


_STEP = re.compile(r"t(\d+) = (\w+)\.(\w+)\(([^)]*)\)")
_NAME = re.compile(r"([at])(\d+)")


def _value(text: str, inputs: int, steps: int) -> Value:
    name = _NAME.fullmatch(text)
    if name is None:
        return float(text)
    if int(name[2]) >= {"a": inputs, "t": steps}[name[1]]:
        raise ValueError(f"{text} is not defined")
    return text


def _step(text: str, inputs: int, number: int) -> Step:
    found = _STEP.fullmatch(text)
    if found is None or int(found[1]) != number:
        raise ValueError(f"expected 't{number} = function.dtype(…)', got {text!r}")
    values = tuple(_value(v, inputs, number) for v in found[4].split(", "))
    for what, name, table in (("function", found[2], FUNCTIONS), ("dtype", found[3], DTYPES)):
        if name not in table:
            raise unknown(what, name, table)
    if len(values) != FUNCTIONS[found[2]].arity:
        raise ValueError(f"{found[2]} takes {FUNCTIONS[found[2]].arity} operands, got {len(values)}")
    return Step(found[2], found[3], values)


@cache
def parse(text: str) -> Producer:
    """Read the text of a producer.

    Raises:
        FP4ValueError: it is malformed.
    """
    head, _, rest = text.partition(": ")
    body, arrow, names = rest.partition(" -> ")
    layouts = tuple(head.split())
    try:
        for layout in layouts:
            if layout not in LAYOUTS:
                raise unknown("layout", layout, LAYOUTS)
        steps = tuple(_step(part, len(layouts), i) for i, part in enumerate(body.split("; ")))
        chosen = tuple(_result(name, len(steps)) for name in names.split(" ")) if arrow else ()
        if len({steps[i].dtype for i in chosen}) > 1:
            raise ValueError("the results have different dtypes")
    except ValueError as error:
        raise FP4ValueError(f"malformed producer {text!r}: {error}") from error
    return Producer(layouts, steps, chosen)


def _result(text: str, steps: int) -> int:
    name = _NAME.fullmatch(text)
    if name is None or name[1] != "t" or int(name[2]) >= steps:
        raise ValueError(f"{text!r} is no step")
    return int(name[2])


def produced_dtype(x: Tensor, text: str) -> torch.dtype:
    """The dtype of all that a producer makes of x and other operands; that of x where there is none."""
    return parse(text).dtype if text else x.dtype


def produce(x: Tensor, operands: Sequence[Tensor | None], text: str) -> Tensor:
    """The one tensor that a producer makes of its operands; x itself where there is none.

    Args:
        x: the first operand, [M, K].
        operands: the others, of any shape with as many elements as their layout has; None behind the last.
        text: the producer, or "".

    Returns:
        [M, K] in the producer's dtype.

    Raises:
        FP4ValueError: the producer makes several.
    """
    made = produce_each(x, operands, text) if text else [x]
    if len(made) > 1:
        raise FP4ValueError(f"a producer of one tensor is needed, not of {len(made)}: {text!r}")
    return made[0]


def produce_each(x: Tensor, operands: Sequence[Tensor | None], text: str) -> list[Tensor]:
    """All tensors that a producer makes; arguments and each result as those of `produce`."""
    producer = parse(text)
    rows, columns = x.shape
    shapes = {"full": (rows, columns), "row": (rows, 1), "column": (1, columns), "scalar": (1, 1)}
    given = zip(producer.layouts, (x, *operands), strict=False)
    values: dict[Value, Tensor] = {}
    for i, (layout, operand) in enumerate(given):
        assert operand is not None
        values[f"a{i}"] = operand.to(torch.float32).reshape(shapes[layout])
    for i, step in enumerate(producer.steps):
        result = FUNCTIONS[step.function].run(*(values.get(v, v) for v in step.values))
        values[f"t{i}"] = result.to(DTYPES[step.dtype]).to(torch.float32)
    return [values[f"t{i}"].expand(x.shape).to(producer.dtype) for i in producer.results]
