"""The command line: `fp4compile explain | convert | opt | formats | recipes | backends`.

Results go to stdout; progress, warnings and errors to stderr. A wrong argument or file, or one that cannot be read or
written, is one red line and exit code 2; `--debug` shows the traceback behind it.
"""

from __future__ import annotations

import inspect
import io
import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # each command imports what it runs
    from fp4compile.backend import Backend
    from fp4compile.formats import Format
    from fp4compile.recipe import Operand, Recipe
    from fp4compile.report import Report
    from fp4compile.source import Source

WIDTH = 140  # of tables that go to a file or a pipe

app = typer.Typer(
    name="fp4compile",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    stopped: list[int] = []

    def stop(number: int, _: object) -> None:
        stopped.append(number)
        raise SystemExit(128 + number)

    # Stopped from outside, a command removes what it has begun to write, as after Ctrl-C; nohup's choice stands.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # tables hold signs that an ASCII terminal lacks
    try:
        app(prog_name="fp4compile")
    except Exception as error:
        if stopped:  # code in C that was stopped raises an error of its own
            raise SystemExit(128 + stopped[0]) from error
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        import torch

        from fp4compile import __version__

        print(f"fp4compile {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions and stop.")
    ] = False,
) -> None:
    """Train and run unchanged PyTorch models with 4-bit floating point GEMMs."""


# --- what all commands share: errors, warnings, consoles ----------------------------------------------------


def _stdout() -> Console:
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=WIDTH, emoji=False)


def _stderr() -> Console:
    return Console(stderr=True, emoji=False)  # or line 100 of a file, written `:100:`, becomes a picture


@contextmanager
def _readable(debug: bool) -> Iterator[None]:
    """Print an error of ours on one line and exit with code 2; print each warning once, on one line."""
    seen: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).strip().partition("\n\n")[0].split())
        if line not in seen:
            seen.add(line)
            _stderr().print(f"[yellow]warning:[/] {escape(line)}", soft_wrap=True, highlight=False)

    from fp4compile.errors import FP4TypeError, FP4ValueError, FP4Warning

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("always", FP4Warning)
        try:
            yield
        except BrokenPipeError:
            raise  # who read the output has seen enough
        except (FP4ValueError, FP4TypeError, OSError) as error:
            if debug:
                _stderr().print_exception()
            _stderr().print(f"[red]error: {escape(_message(error))}[/]", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from error


# What messages call an option in Python, and its flag here.
_FLAGS = {"overwrite=True": "--overwrite", "strict=False": "--allow-fallback"}


def _message(error: Exception) -> str:
    text = str(error).strip().partition("\n\n")[0]  # Dynamo adds paragraphs of advice about itself
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {str(error.filename)!r}"
    for option, flag in _FLAGS.items():
        text = text.replace(option, flag)
    return text


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command of its name, with `--debug`, readable errors and an example."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        @wraps(run)
        def guarded(*, debug: bool, **arguments: Any) -> None:
            with _readable(debug):
                run(**arguments)

        signature = inspect.signature(run, eval_str=True)
        option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        parameters = [*signature.parameters.values(), option]
        guarded.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        app.command(run.__name__, epilog=f"Example: {example}")(guarded)
        return run

    return register


@contextmanager
def _busy(what: str) -> Iterator[None]:
    """A spinner on stderr, when that is a terminal."""
    console = _stderr()
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


# --- arguments that several commands take -------------------------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:function that returns (module, example_inputs), a transformers directory or "
        "config.json (no weights needed), or a .pt2 file with --trust-pickle.",
        show_default=False,
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A preset (see `fp4compile recipes`) or a .toml file.")]
Train = Annotated[bool, typer.Option("--train", help="Capture forward and backward; inference otherwise.")]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="GLOB", help="Modules that stay in high precision; may be repeated."),
]
BackendName = Annotated[str, typer.Option("--backend", "-b", help="See `fp4compile backends`.")]
Batch = Annotated[
    int | None, typer.Option("--batch", min=1, help="Batch size of a transformers model.", show_default="1")
]
Sequence_ = Annotated[
    int | None, typer.Option("--sequence", min=1, help="Tokens of a transformers model.", show_default="128")
]
Trust = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a .pt2 file, which can run code that the file contains.")
]


def _load(model: str, **request: Any) -> Source:
    from fp4compile.source import Request, load

    with _busy(f"loading {escape(model)}"):
        return load(model, Request(**request))


@contextmanager
def _capturing(model: str) -> Iterator[None]:
    """Blame the model for what its own code raises on its example inputs, but not for what a pass does."""
    from torch._dynamo.exc import BackendCompilerFailed

    from fp4compile.errors import FP4TypeError, FP4ValueError
    from fp4compile.explain import failure

    try:
        with _busy("capturing the model"):
            yield
    except (FP4ValueError, FP4TypeError, BackendCompilerFailed):
        raise
    except Exception as error:
        raise FP4ValueError(f"{model} does not run on its example inputs: {failure(error)}") from error


def _check_names(recipe: str, backend: str) -> None:
    """Fail on a wrong name before a model is built."""
    from fp4compile.backend import get_backend
    from fp4compile.recipe import resolve

    resolve(recipe)
    get_backend(backend)


# --- explain ------------------------------------------------------------------------------------------------


@command("fp4compile explain llama-8b/config.json --recipe hif4 --train")
def explain(
    model: Model,
    recipe: RecipeName = "hif4",
    train: Train = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    keep: Keep = None,
    backend: BackendName = "auto",
    batch: Batch = None,
    sequence: Sequence_ = None,
    trust_pickle: Trust = False,
) -> None:
    """Show what each GEMM of a model would become, and why. The model is captured and not changed."""
    from fp4compile.explain import explain as explain_model

    _check_names(recipe, backend)
    source = _load(model, batch=batch, sequence=sequence, train=train, trust_pickle=trust_pickle)
    with _capturing(model):
        report = explain_model(
            source.module, source.example_inputs, recipe, train=train, backend=backend, keep=keep or ()
        )
    if as_json:
        print(report.to_json())
    else:
        _print_report(report)


def _print_report(report: Report) -> None:
    console = _stdout()
    console.print(report.table())
    for note in report.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    console.print(escape(report.summary()), highlight=False)


# --- convert ------------------------------------------------------------------------------------------------


@command("fp4compile convert llama-8b/ --recipe hif4-w4a16 --to safetensors -o llama-8b-hif4/")
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A transformers directory with weights, or file.py:function that returns "
            "(transformers model, example_inputs).",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.", show_default=False)],
    recipe: RecipeName = "hif4-w4a16",
    to: Annotated[str, typer.Option("--to", help="What to write: safetensors.")] = "safetensors",
    keep: Keep = None,
    fallback: Annotated[
        bool, typer.Option("--allow-fallback", help="Keep GEMMs that cannot be done, instead of an error.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files in the folder.")] = False,
) -> None:
    """Pack a model's weights to FP4 and write them, for `fp4compile.load` to run."""
    from fp4compile.convert import TARGETS
    from fp4compile.convert import convert as convert_model
    from fp4compile.errors import unknown

    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    _check_names(recipe, "auto")
    subject, inputs = _to_convert(model)
    artifact = convert_model(
        subject,
        recipe,
        to,
        output,
        keep=keep or (),
        example_inputs=inputs,
        strict=not fallback,
        overwrite=overwrite,
    )
    _print_report(artifact.report)
    print(f"{artifact.path}: {artifact.bytes_after:,} bytes, of {artifact.bytes_before:,} before")


def _to_convert(model: str) -> tuple[Any, Any]:
    """The folder or the model in memory, with the inputs to capture it; `convert` judges anything else."""
    from fp4compile.source import FUNCTION

    if Path(model).is_dir():
        return model, _load(model).example_inputs
    if FUNCTION.fullmatch(model):
        source = _load(model)
        return source.module, source.example_inputs
    return model, None


# --- opt ----------------------------------------------------------------------------------------------------


@command(
    "fp4compile opt models.py:build --passes canonicalise,find_sites,annotate,pad_groups,insert_qdq --recipe mxfp4"
)
def opt(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="As for explain.", show_default=False)] = None,
    passes: Annotated[
        str | None,
        typer.Option("--passes", "-p", metavar="A,B,C", help="Passes in order.", show_default="the whole pipeline"),
    ] = None,
    recipe: RecipeName = "hif4",
    train: Train = False,
    print_between: Annotated[
        bool,
        typer.Option("--print-between", help="Print the graph after every pass, not only after the last."),
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Print seconds per pass to stderr.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the graphs to a file.", show_default=False)
    ] = None,
    list_passes: Annotated[bool, typer.Option("--list", help="List the passes and stop.")] = False,
    backend: BackendName = "auto",
    batch: Batch = None,
    sequence: Sequence_ = None,
    trust_pickle: Trust = False,
) -> None:
    """Print a model's captured graph before and after passes."""
    if list_passes:
        _list_passes()
        return
    from fp4compile.errors import FP4ValueError
    from fp4compile.explain import explain as explain_model
    from fp4compile.files import check_writable, write_atomically
    from fp4compile.pipeline import default_pipeline

    if model is None:
        raise FP4ValueError("name a MODEL, or list the passes with --list")
    if output:
        check_writable(output)
        if output.is_dir():
            raise FP4ValueError(f"output {str(output)!r} is a folder; name a file")
    pipeline = default_pipeline()
    names = [p.name for p in pipeline.passes] if passes is None else _split(passes)
    pipeline.select(names)
    _check_names(recipe, backend)
    printer = _Printer(names, print_between)
    source = _load(model, batch=batch, sequence=sequence, train=train, trust_pickle=trust_pickle)
    with _capturing(model):
        report = explain_model(
            source.module,
            source.example_inputs,
            recipe,
            train=train,
            backend=backend,
            passes=names,
            observe=printer,
        )
    if output:
        write_atomically(output, printer.text().encode())
    else:
        print(printer.text(), end="")
    if time_passes:
        _stderr().print(_times(report.pass_seconds))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


class _Printer:
    """Collects the text of each graph: as captured, after the last pass, and between if asked."""

    def __init__(self, names: Sequence[str], between: bool) -> None:
        self._last, self._between = names[-1] if names else None, between
        self._graphs, self._parts = 0, list[str]()

    def __call__(self, step: Any, graph: Any, context: Any) -> None:
        from fp4compile.graph import text

        if step is None:
            self._graphs += 1
        elif not self._between and step.name != self._last:
            return
        what = "captured" if step is None else f"after {step.name}"
        self._parts.append(f"# graph {self._graphs}, {what}\n{text(graph, context.sites, context.parameters)}")

    def text(self) -> str:
        return "\n".join(self._parts)


def _times(seconds: dict[str, float]) -> Table:
    rows = [(name, f"{1e3 * spent:.1f}") for name, spent in seconds.items()]
    return _table("time per pass", ("pass", "ms"), [*rows, ("all", f"{1e3 * sum(seconds.values()):.1f}")])


def _list_passes() -> None:
    from fp4compile.pipeline import default_pipeline

    rows = [
        (p.name, (inspect.getdoc(p) or "").partition("\n")[0], ", ".join(p.needs), ", ".join(p.gives))
        for p in default_pipeline().passes
    ]
    _stdout().print(_table("passes, in the order of the default pipeline", ("pass", "does", "needs", "gives"), rows))


# --- tables -------------------------------------------------------------------------------------------------


@command("fp4compile formats --json")
def formats(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the FP4 formats."""
    from fp4compile.formats import FORMATS

    rows = [_format_row(fmt) for fmt in FORMATS.values()]
    if as_json:
        _print_json(rows)
        return
    columns = ("format", "block", "element", "scale levels", "bits/value", "scale rules", "roundings", "2-D", "about")
    _stdout().print(_table("formats", columns, [[_cell(v) for v in row.values()] for row in rows]))


def _format_row(fmt: Format) -> dict[str, Any]:
    return {
        "name": fmt.name,
        "block": fmt.block,
        "element": fmt.element.name,
        "levels": [f"{v.dtype} per {v.block or 'tensor'}" for v in fmt.levels],
        "bits_per_value": fmt.bits_per_value,
        "scale_rules": list(fmt.scale_rules),
        "roundings": list(fmt.roundings),
        "block_2d": fmt.block_2d,
        "doc": fmt.doc,
    }


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "-" if value is None else str(value)


@command("fp4compile recipes hif4 --toml > mine.toml")
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this recipe's rules.", show_default=False)
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the recipe as TOML, to edit.")] = False,
) -> None:
    """List the recipes, or show one: what each operand of each GEMM gets."""
    from fp4compile.errors import FP4ValueError
    from fp4compile.recipe import RECIPES, resolve

    if name is None:
        if toml:
            raise FP4ValueError("--toml prints one recipe: name it")
        rows = [(n, RECIPES.get(n).source, RECIPES.get(n).inferred) for n in RECIPES.names()]
        _stdout().print(_table("recipes", ("recipe", "source", "inferred"), rows))
        return
    recipe = resolve(name)
    if toml:
        import tomli_w

        print(tomli_w.dumps(recipe.to_dict()), end="")
        return
    _print_recipe(recipe)


def _print_recipe(recipe: Recipe) -> None:
    columns = ("role", "modules", "operand", "format", "rounding", "scale rule", "Hadamard", "2-D blocks", "also")
    rows = [
        (rule.role, rule.modules, operand, *_operand_cells(spec))
        for rule in recipe.rules
        for operand, spec in rule.operands.items()
    ]
    console = _stdout()
    console.print(_table(f"recipe {recipe.name}", columns, rows))
    kept = {
        "output heads": recipe.keep_heads,
        "routers": recipe.keep_routers,
        f"the first {recipe.keep_first_n} blocks": recipe.keep_first_n,
        f"the last {recipe.keep_last:.0%} of the blocks": recipe.keep_last,
        f"the last {recipe.keep_last_n} blocks": recipe.keep_last_n,
        ", ".join(recipe.keep): recipe.keep,
    }
    lines = {
        "kept in high precision": "; ".join(what for what, applies in kept.items() if applies),
        "source": recipe.source,
        "inferred": recipe.inferred,
    }
    for label, line in lines.items():
        if line:
            console.print(f"{label}: {escape(line)}", highlight=False)


def _operand_cells(spec: Operand | None) -> tuple[str, ...]:
    from fp4compile.formats import FORMATS

    if spec is None:
        return ("high precision", "-", "-", "-", "-", "-")
    fmt = FORMATS[spec.format]
    edge = f"{fmt.block_2d}×{fmt.block_2d}" if spec.block_2d else "-"
    rule = spec.scale_rule or f"{fmt.rule(None)} (default)"
    transform = f"{spec.hadamard}, {spec.signs} signs" if spec.hadamard else "-"
    also = {
        "requantised": spec.requantise,
        "clip mask": spec.clip_mask,
        "no tensor scale": spec.tensor_scale is False,
    }
    extra = ", ".join(what for what, applies in also.items() if applies) or "-"
    return spec.format, spec.rounding, rule, transform, edge, extra


@command("fp4compile backends")
def backends() -> None:
    """List the backends, whether they run here, and their kernels."""
    from fp4compile.backend import backend_names

    rows = [_backend_row(name) for name in backend_names()]
    _stdout().print(_table("backends", ("backend", "about", "available here", "kernels"), rows))


def _backend_row(name: str) -> tuple[str, ...]:
    from fp4compile.backend import No, get_backend

    try:
        backend = get_backend(name)
    except ImportError as error:  # a plugin whose own requirements are missing
        return name, "", f"no: {error}", ""
    answer = backend.available()
    return name, backend.doc, f"no: {answer.reason}" if isinstance(answer, No) else "yes", _kernels(backend)


def _kernels(backend: Backend) -> str:
    """'cpu: quantize, dequantize', a line per device; what has no kernel runs the reference."""
    by_device: dict[str, list[str]] = {}
    for kernel in backend.kernels:
        ops = by_device.setdefault(kernel.device, [])
        if kernel.op not in ops:
            ops.append(kernel.op)
    lines = [f"{device}: {', '.join(ops)}" for device, ops in sorted(by_device.items())]
    return "\n".join(lines) or "the reference of every op"
