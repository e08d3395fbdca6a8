"""examples/pretrain.py: its checks before any work, its results from made-up arms, and one small run."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).parents[2] / "examples" / "pretrain.py"
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = [
    "--layers",
    "2",
    "--dim",
    "128",
    "--ff",
    "384",
    "--sequence",
    "32",
    "--batch",
    "4",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def pretrain() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("pretrain_example", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A few files that a small model learns something from, and one that is no text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(4):
        lines = (f"def f{n}(x):\n    return x + {n}\n" for n in range(100 * index, 100 * index + 100))
        (folder / f"{index}.py").write_text("".join(lines))
    (folder / "binary").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture
def untrained(pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training an error: the checks come before it."""

    def train(*_: Any) -> None:
        raise AssertionError("trained in spite of bad input")

    monkeypatch.setattr(pretrain, "train", train)


def made_up(pretrain: ModuleType, recipes: list[str], steps: int = 40) -> tuple[list[Any], Namespace]:
    """Arms with losses nobody trained for, and the options that go with them."""
    options = pretrain.parse_options(["--steps", str(steps), "--recipes", *recipes, *SMALL])
    options.dtype = "bfloat16"
    arms = pretrain.make_arms(pretrain.resolve_recipes(options.recipes), options.dtype)
    for index, arm in enumerate(arms):
        arm.losses = [5.0 / (1 + step) + 2.0 + 0.01 * index for step in range(steps)]
        arm.held_out, arm.data = 2.2, "digest"
        arm.seconds, arm.first_seconds, arm.step_seconds = 10.0, 2.0, 0.1 * (1 + index)
    return arms, options


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "hif5"], "unknown recipe 'hif5'; allowed: "),
        (["--recipes", "missing.toml"], "cannot read recipe 'missing.toml'"),
        (["--dim", "128", "--heads", "3"], "--heads 3 does not divide --dim 128"),
        (["--dim", "64", "--heads", "64"], "even head size"),
        (["--dim", "96", "--heads", "2"], "Hadamard transform of size 64, which does not divide --dim 96"),
        (["--ff", "100"], "does not divide --ff 100"),
        (["--device", "tpu"], "choose auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "CUDA devices that torch can use"),
        (["--text", "nowhere"], "no such file or folder"),
        (["--sequence", "100000"], "--sequence 100000 needs 2,000,020 or more"),
        (["--out", str(SCRIPT)], "--out"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    pretrain: ModuleType, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert pretrain.main(["--device", "cpu", "--text", str(text), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--lr", "-1"], ["--lr", "inf"], ["--batch", "many"], ["--step"]]
)
def test_bad_numbers_and_options_are_refused(pretrain: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.parse_options(arguments)


def test_two_recipes_of_one_name_are_refused(pretrain: ModuleType, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('name = "hif4"\n[[rule]]\nrole = "forward"\ninput = {format = "hif4"}\nweight = {format = "hif4"}\n')
    with pytest.raises(pretrain.BadInput, match="two different recipes are named 'hif4'"):
        pretrain.resolve_recipes(["hif4", str(own)])
    assert [recipe.name for recipe in pretrain.resolve_recipes(["hif4", "bf16", "hif4"])] == ["hif4"]


def test_interruption_leaves_no_file(
    pretrain: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "train", train)
    assert (
        pretrain.main(["--device", "cpu", "--text", str(text), "--sequence", "32", "--out", str(tmp_path / "out")])
        == 130
    )
    assert not list((tmp_path / "out").iterdir())


# --- text and batches ---------------------------------------------------------------------------------------


def test_the_text_does_not_depend_on_where_it_lies(pretrain: ModuleType, text: Path, tmp_path: Path) -> None:
    first = pretrain.read_text(text, 32)
    second = pretrain.read_text(text.rename(tmp_path / "elsewhere"), 32)
    assert first.sha256 == second.sha256
    assert len(first.held_out) == math.ceil(0.05 * (len(first.train) + len(first.held_out)))
    assert int(first.train.min()) > 0  # the binary file is left out


def test_batches_are_a_function_of_the_seed(pretrain: ModuleType, text: Path) -> None:
    tokens = pretrain.read_text(text, 32).train

    def read(seed: int) -> torch.Tensor:
        return torch.stack(list(pretrain.batches(tokens, Namespace(seed=seed, steps=3, batch=4, sequence=32))))

    assert read(0).shape == (3, 4, 33)
    assert torch.equal(read(0), read(0)) and not torch.equal(read(0), read(1))


def test_a_text_of_the_least_size_is_enough(pretrain: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 659)
    with pytest.raises(pretrain.BadInput, match=r"holds 659 bytes; --sequence 32 needs 660"):
        pretrain.read_text(path, 32)
    path.write_bytes(b"x" * 660)
    assert len(pretrain.read_text(path, 32).held_out) == 33


def test_the_schedule_warms_up_and_decays(pretrain: ModuleType) -> None:
    rates = [pretrain.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert 0 < pretrain.schedule(0, 1) <= 1


# --- results ------------------------------------------------------------------------------------------------


def test_table_figure_and_data(pretrain: ModuleType) -> None:
    arms, options = made_up(pretrain, ["hif4", "mxfp4"])
    console = Console(record=True, width=80)
    console.print(pretrain.result_table(arms))
    lines = console.export_text()
    assert all(word in lines for word in ("BF16", "HiF4", "MXFP4", "gap to", "2.00×"))
    assert pretrain.draw(arms, options).startswith(PNG)
    gap = pretrain.gap(arms[1].final, arms[0].final)
    assert 0 < gap < 0.01 and f"{100 * gap:+.2f}%" in lines


@pytest.mark.parametrize("finite", [0, 3, 30])
@pytest.mark.parametrize("which", [0, 1])
def test_an_arm_that_diverges_is_shown_as_such(pretrain: ModuleType, which: int, finite: int) -> None:
    arms, options = made_up(pretrain, ["hif4"])
    arms[which].losses[finite:] = [math.nan]
    console = Console(record=True, width=100)
    console.print(pretrain.result_table(arms))
    assert "diverged" in console.export_text()
    assert pretrain.draw(arms, options).startswith(PNG)
    text = pretrain.Text("made up", torch.zeros(9), torch.zeros(1), "")
    options.device = "cpu"
    data = json.loads(json.dumps(pretrain.results(arms, options, text), allow_nan=False))
    assert data["arms"][which]["diverged"] and data["arms"][which]["train_loss"] is None


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_of_few_steps_can_be_drawn(pretrain: ModuleType, steps: int) -> None:
    assert pretrain.draw(*made_up(pretrain, ["hif4"], steps)).startswith(PNG)


@pytest.mark.slow
def test_a_small_run(pretrain: ModuleType, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = [
        *SMALL,
        "--steps",
        "24",
        "--recipes",
        "hif4",
        "nvfp4-plain",
        "--text",
        str(text),
        "--out",
        str(out),
    ]
    assert pretrain.main(arguments) == 0
    assert torch.are_deterministic_algorithms_enabled()  # several threads would give other losses each time
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("HiF4", "nvfp4-plain", "gap to", "How to read it"))

    assert sorted(path.name for path in out.iterdir()) == ["pretrain.json", "pretrain.png"]
    assert (out / "pretrain.png").read_bytes().startswith(PNG)
    arms = json.loads((out / "pretrain.json").read_text())["arms"]
    assert len(arms) == 3 and len({arm["data_sha256"] for arm in arms}) == 1
    assert len({round(arm["losses"][0], 1) for arm in arms}) == 1  # the same weights
    for arm in arms:
        assert len(arm["losses"]) == 24 and all(map(math.isfinite, arm["losses"]))
        assert arm["train_loss"] < arm["losses"][0] - 1 and math.isfinite(arm["held_out_loss"])

    # Every GEMM of the blocks in each of the three roles; all that is left is the output head.
    blocks, head = 2 * (4 * 128 * 128 + 3 * 128 * 384), 128 * 256
    for arm in arms[1:]:
        assert arm["fp4_share"] == pytest.approx(blocks / (blocks + head))
        assert arm["fp4_share"] > 0.9
        assert arm["gemms"] == {"fp4": 3 * 2 * 7, "kept": 3, "refused": 0}
        assert arm["weight_bytes"] == [2 * blocks, blocks * 4.5 / 8]
    assert arms[0]["losses"] != arms[1]["losses"]
