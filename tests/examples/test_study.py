"""examples/study.py: arms, batches, resuming, the rule for claims, the report; everything tiny and on the CPU."""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

import study
from lm import claims, commands, corpus, figures, report, results, tables
from lm.arms import PLANS, PROBED, TWINS, make_arm, stabilisers
from lm.findings import findings, order_table
from lm.machine import BadInput
from lm.model import Shape
from lm.probe import cosine
from lm.train import Settings, Trainer, files_of_run, files_of_trunk, steps_done

from fp4compile.errors import FP4ValueError
from fp4compile.recipe import RECIPES, ROLES

SCRIPT = Path(study.__file__)
PNG = b"\x89PNG\r\n\x1a\n"
SHAPE = Shape(300, 1, 64, 2, 64, 16)
SETTINGS = Settings("dense", SHAPE, 6, 4, 2, 3e-3, "float32", "digest", "cpu", "reference")
TINY = [
    *("--vocabulary", "300", "--layers", "1", "--dim", "64", "--heads", "2", "--ff", "64"),
    *("--sequence", "16", "--batch", "4", "--steps", "40", "--backend", "reference"),
]


def made_corpus(length: int = 2000) -> corpus.Corpus:
    """Tokens that nobody wrote."""
    tokens = torch.randint(300, (length,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return corpus.Corpus("made up", tokens[:-200], tokens[-200:], 3 * length, "digest")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of short files, one twice, one that is no text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.py").write_text("".join(f"value_{n} = {n} * {index}\n" for n in range(60)))
    (folder / "copy.py").write_bytes((folder / "0.py").read_bytes())
    (folder / "binary").write_bytes(bytes(range(256)))
    return folder


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "preset"), TWINS.items())
def test_ingredients_added_to_a_plain_recipe_make_the_recommended_one(name: str, preset: str) -> None:
    arm = make_arm(name)
    assert arm.recipe is not None and arm.name == arm.recipe.name == name
    assert arm.recipe.rules == RECIPES.get(preset).rules


def test_an_ingredient_changes_what_it_names_and_nothing_else() -> None:
    plain, sr, flat = RECIPES.get("nvfp4-plain"), make_arm("nvfp4-plain+sr").recipe, make_arm("nvfp4-plain+2d").recipe
    for before, after in zip(plain.rules, sr.rules, strict=True):
        assert after.grad == (before.grad and replace(before.grad, rounding="stochastic"))
        assert (after.input, after.weight) == (before.input, before.weight)
    assert [rule.weight and rule.weight.block_2d for rule in flat.rules] == [True, True, None]


def test_a_format_does_without_its_tensor_scale() -> None:
    bare = make_arm("nvfp4-plain+nopts").recipe
    assert {spec.scaled_per_tensor for spec in RECIPES.get("nvfp4-plain").operands} == {True}
    assert {spec.scaled_per_tensor for spec in bare.operands} == {False}


def test_every_arm_of_every_plan_can_be_made() -> None:
    for plan in PLANS.values():
        for part in plan.parts:
            made = [make_arm(name) for name in part.arms]
            assert len({arm.slug for arm in made}) == len(made)
            assert all(re.fullmatch(r"[\w.-]+", arm.slug) for arm in made)
    named = {arm for plan in PLANS.values() for part in plan.parts for arm in part.arms}
    for suffixes in tables.ABLATIONS.values():  # what the report compares is trained
        assert any({format + suffix for suffix in suffixes} <= named for format in ("hif4", "mxfp4", "nvfp4"))


def test_a_role_alone_keeps_its_rules() -> None:
    arm, whole = make_arm("mxfp4:wgrad"), RECIPES.get("mxfp4")
    assert arm.recipe is not None and arm.recipe.rules == tuple(rule for rule in whole.rules if rule.role == "wgrad")
    assert (arm.name, arm.slug) == ("mxfp4:wgrad", "mxfp4.wgrad")
    assert set(PROBED) > {f"{arm}:{role}" for arm in ("hif4", "mxfp4", "nvfp4") for role in ROLES}
    for arm in map(make_arm, PROBED):
        assert arm.recipe is not None and arm.recipe.rules


def test_a_switch_ends_fp4() -> None:
    arm = make_arm("hif4@0.9")
    assert arm.precisions == {0.0: RECIPES.get("hif4"), 0.9: None}
    assert make_arm("hif4", 0.9) == arm


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hif5", "unknown recipe 'hif5'"),
        ("hif4-plain+nopts", "hif4 has no tensor scale to go without"),
        ("hif4-plain+rhd", "unknown ingredient 'rhd' of hif4-plain; there are rht, sr, tf, 2d"),
        ("hif4:fprop", "unknown GEMM 'fprop' of hif4; there are forward, dgrad, wgrad"),
        ("hif4@late", "a fraction of the steps"),
        ("bf16@0.5", "no FP4 to switch off"),
        ("hif4-plain+2d", "format hif4 has no 2-D blocks"),
    ],
)
def test_arms_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises((BadInput, FP4ValueError), match=message):
        make_arm(name)


# --- text and batches ------------------------------------------------------------------------------------------------


def test_the_text_is_tokenised_once_and_reads_back(text: Path, tmp_path: Path) -> None:
    first = corpus.load_corpus(text, 1.0, 300, tmp_path / "out")
    (tokenizer,) = (tmp_path / "out").glob("tokenizer-*.json")
    decode = corpus.Tokenizer.from_file(str(tokenizer)).decode
    read = [decode(part.tolist(), skip_special_tokens=True) for part in (first.train, first.held_out)]
    files = {path.read_text() for path in text.glob("*.py")}
    assert sum(map(len, read)) == first.size == sum(map(len, files))  # the copy counts once
    assert all(("".join(read)).count(file) == 1 for file in files)
    assert 0.05 <= len(read[1]) / first.size < 0.1
    (stored,) = (tmp_path / "out").glob("corpus-*.safetensors")
    before = stored.stat().st_mtime_ns
    again = corpus.load_corpus(text, 1.0, 300, tmp_path / "out")
    assert stored.stat().st_mtime_ns == before
    assert torch.equal(again.train, first.train) and again.digest == first.digest


def test_one_file_is_cut_and_xz_is_unpacked(tmp_path: Path) -> None:
    lzma = pytest.importorskip("lzma")
    path = tmp_path / "prose.txt.xz"
    path.write_bytes(lzma.compress(b"".join(b"word %d\n" % n for n in range(1000))))
    (document,) = corpus.read_documents([path], 10**9)
    train, held_out = corpus.hold_out([document])
    assert b"".join(train + held_out) == document and len(held_out[0]) == int(0.05 * len(document))


def test_a_step_reads_windows_that_depend_on_seed_and_step_alone() -> None:
    tokens = torch.arange(165, dtype=torch.int32)  # ten windows of 16
    first, second = (corpus.Batches(tokens, 16, 4, seed) for seed in (0, 1))
    assert torch.equal(first.at(3), corpus.Batches(tokens, 16, 4, 0).at(3))
    assert not torch.equal(first.at(0), second.at(0))
    starts = torch.cat([first.starts(step) for step in range(10)]).tolist()
    epochs = [starts[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == [16 * i for i in range(10)] for epoch in epochs)  # each window once
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert first.at(0).shape == (4, 17) and torch.equal(first.at(0)[:, 0], first.starts(0))


def test_four_epochs_are_the_most() -> None:
    text = made_corpus(2000)  # 1800 to train on: 112 windows of 16
    corpus.check_length(text, 16, 4, 112)
    with pytest.raises(BadInput, match=r"1,800 training tokens; 113 steps of 4 × 16 .* or at most 112 --steps"):
        corpus.check_length(text, 16, 4, 113)
    with pytest.raises(BadInput, match="has 200 held-out tokens; --sequence 200 needs 201 or more"):
        corpus.check_length(text, 200, 1, 1)


# --- training --------------------------------------------------------------------------------------------------------


def trained(arm: str, folder: Path, stops: tuple[int, ...] = (), settings: Settings = SETTINGS) -> dict[str, Any]:
    """The result of an arm that leaves after each of `stops` steps and is started again in a new trainer."""
    files = files_of_run(folder, "dense", make_arm(arm), 5)
    for stop in (*stops, None):
        trainer = Trainer(make_arm(arm), settings, made_corpus(), {"settings": {}})
        torch.manual_seed(99 if stop is None else stop)  # nothing depends on what was drawn before
        assert trainer.train(5, files, lambda *_: None, 100, lambda done, stop=stop: done == stop) is (stop is None)
        assert files.state.exists() is (stop is not None)
    return json.loads(files.result.read_text())


def test_no_gradient_lives_on_from_one_precision_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def forward(compiled: Any, window: torch.Tensor, _: Settings) -> torch.Tensor:
        model = compiled._orig_mod  # under CUDA graphs the next graph writes where a gradient lies
        seen.append(any(parameter.grad is not None for parameter in model.parameters()))
        return model(window[:, :-1], window[:, 1:])

    monkeypatch.setattr("lm.train.forward", forward)
    Trainer(make_arm("mxfp4@0.5"), SETTINGS, made_corpus(), {})
    assert seen == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["bf16", "mxfp4", "mxfp4@0.5"])
def test_a_run_goes_on_bit_for_bit(arm: str, tmp_path: Path) -> None:
    whole = trained(arm, tmp_path / "whole")
    broken = trained(arm, tmp_path / "broken", (2, 3))
    assert torch.equal(torch.tensor(whole["losses"]), torch.tensor(broken["losses"]))
    assert whole["held_out_loss"] == broken["held_out_loss"]
    assert len(set(whole["losses"])) == 6


@pytest.mark.slow
def test_arms_branch_off_one_trunk(tmp_path: Path) -> None:
    settings, corpus_ = replace(SETTINGS, branch=0.5), made_corpus()
    trunk, bf16, mxfp4 = files_of_trunk(tmp_path, "dense", 5), make_arm("bf16"), make_arm("mxfp4")
    first, second = (Trainer(arm, settings, corpus_, {"settings": {}}) for arm in (bf16, mxfp4))
    ran: list[int] = []

    def go(trainer: Trainer, *more: Any, stop: int = 0) -> bool:
        files = trunk if len(more) == 2 else files_of_run(tmp_path, "dense", trainer.arm, 5)
        return trainer.train(5, files, lambda done, _: ran.append(done), 100, lambda done: done == stop, *more)

    with pytest.raises(BadInput, match="0 of 3 steps; train the bf16 arm"):
        go(second, trunk)
    assert not go(first, None, 3, stop=2)  # killed within the trunk
    assert steps_done(trunk, settings) == 2
    assert go(first, None, 3) and steps_done(trunk, settings) == 3
    assert go(first, trunk) and go(second, trunk)
    assert ran == [2, 3, 6, 6]
    whole = trained("bf16", tmp_path / "whole")["losses"]
    ours, theirs = (json.loads((tmp_path / f"dense-{arm}-s5.json").read_text())["losses"] for arm in ("bf16", "mxfp4"))
    assert ours == whole  # a branch of its own trunk is the run from scratch
    assert theirs[:3] == whole[:3] and theirs[3:] != whole[3:]
    result_ = tmp_path / "dense-bf16-s5.json"  # of a trunk that was made elsewhere, say
    result_.write_text(json.dumps(json.loads(result_.read_text()) | {"losses": [9.0, *ours[1:]]}))
    with pytest.raises(BadInput, match=r"dense-bf16-s5\.json branched off another trunk"):
        go(second, trunk)
    assert theirs[3] == pytest.approx(whole[3], rel=1e-3)  # same weights, same batch


@pytest.mark.slow
def test_micro_batches_add_up(tmp_path: Path) -> None:
    whole = trained("bf16", tmp_path / "whole", settings=replace(SETTINGS, micro=4))
    parts = trained("bf16", tmp_path / "parts", settings=replace(SETTINGS, micro=1))
    assert whole["losses"] == pytest.approx(parts["losses"], rel=1e-5)


def test_waiting_for_a_trunk(tmp_path: Path) -> None:
    settings = replace(SETTINGS, branch=0.5)
    trunk = files_of_trunk(tmp_path, "dense", 5)
    leg = study.Leg(5, files_of_run(tmp_path, "dense", make_arm("hif4"), 5), trunk, 3, 6)
    leave = commands.Leave(None)
    leave.asked = True
    assert not study.wait_for(leg, settings, leave)
    about = {"settings": settings.to_json(), "done": "3"}
    trunk.state.write_bytes(safetensors.torch.save({"losses": torch.zeros(6)}, about))
    assert study.wait_for(leg, settings, leave)
    with pytest.raises(BadInput, match="was made with other settings"):
        study.wait_for(leg, replace(settings, steps=8), leave)


def test_what_is_left_of_a_branching_arm(tmp_path: Path) -> None:
    settings = replace(SETTINGS, branch=0.5)
    options = argparse.Namespace(out=tmp_path, model="dense", seed=[0, 1], wait=False)

    def legs(arm: str) -> list[tuple[int, str, int, int]]:
        found = study.legs_of(options, make_arm(arm), settings)
        return [(leg.seed, leg.files.stem, leg.first, leg.last) for leg in found]

    trunks = [(seed, f"dense-trunk-s{seed}", 0, 3) for seed in (0, 1)]
    branches = [(seed, f"dense-bf16-s{seed}", 3, 6) for seed in (0, 1)]
    assert legs("bf16") == trunks + branches  # first what others wait for
    with pytest.raises(BadInput, match=r"no checkpoint of 3 steps to branch off; train --arm bf16 first, or --wait"):
        legs("hif4")
    options.wait = True
    assert legs("hif4") == [(seed, f"dense-hif4-s{seed}", 3, 6) for seed in (0, 1)]
    options.wait = False
    for seed in (0, 1):
        about = {"settings": settings.to_json(), "done": "3"}
        files_of_trunk(tmp_path, "dense", seed).state.write_bytes(
            safetensors.torch.save({"losses": torch.zeros(6)}, about)
        )
    assert legs("bf16") == branches and len(legs("hif4")) == 2


def test_a_second_signal_ends_at_once_and_an_echo_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(commands.time, "monotonic", lambda: now[0])
    with commands.Leave(None) as leave:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a terminal sends one, the command that watches another
        assert leave(1)
        now[0] += commands.PATIENCE + 1
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == commands.UNFINISHED


def test_a_watched_command_ends_though_its_child_holds_the_output(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import subprocess, sys\n"
        "print('step 20/40 loss 3.5', flush=True)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(5)'])\n"
        "print('step 40/40 loss 3.25', flush=True)\n"
        "sys.exit(3)\n"
    )
    told: list[dict[str, Any]] = []
    started = time.monotonic()
    log, leave = tmp_path / "child.log", commands.Leave(None)
    assert commands.watch([sys.executable, str(script)], log, lambda **more: told.append(more), leave) == 3
    assert time.monotonic() - started < 4
    assert told[1:] == [{"completed": n, "total": 40, "note": f"loss {loss}"} for n, loss in ((20, 3.5), (40, 3.25))]
    assert "step 40/40" in log.read_text()


def test_every_seed_and_step_has_random_numbers_of_its_own() -> None:
    draws = {torch.rand((), generator=torch.Generator().manual_seed(corpus.mixed(seed, 0))).item() for seed in range(9)}
    assert len(draws) == 9
    assert len({corpus.mixed(seed, step) for seed in range(4) for step in range(1000)}) == 4000


@pytest.mark.slow
def test_a_killed_command_goes_on(text: Path, tmp_path: Path) -> None:
    def command(out: str) -> list[str]:
        more = [
            "--arm",
            "mxfp4",
            "--steps",
            "60",
            "--save-every",
            "10",
            "--text",
            str(text),
            "--out",
            str(tmp_path / out),
        ]
        return [sys.executable, str(SCRIPT), "train", *TINY, "--device", "cpu", *more]

    subprocess.run(command("whole"), check=True, capture_output=True)
    with subprocess.Popen(command("killed"), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline().startswith("step 20/60")
        child.kill()
    assert [path.suffix for path in (tmp_path / "killed").glob("dense-*")] == [".state"]
    subprocess.run(command("killed"), check=True, capture_output=True)
    whole, killed = (json.loads((tmp_path / out / "dense-mxfp4-s0.json").read_text()) for out in ("whole", "killed"))
    assert whole["losses"] == killed["losses"] and len(set(whole["losses"])) == 60
    assert whole["held_out_loss"] == killed["held_out_loss"]


# --- numbers and claims ----------------------------------------------------------------------------------------------


def result(arm: str, seed: int, loss: float, model: str = "dense", **more: Any) -> dict[str, Any]:
    """A result of 20 steps that end at `loss`; the first half is its trunk's."""
    made = {
        "kind": "train",
        "model": model,
        "arm": arm,
        "seed": seed,
        "settings": {"steps": 20, "batch": 4, "lr": 1e-3, "dtype": "bfloat16", "branch": 0.5, "shape": vars(SHAPE)},
        "command": f"train --arm {arm}",
        "text": {"source": "<made up>", "train_tokens": 10**6, "held_out_tokens": 10**4, "bytes_per_token": 3.0},
        "machine": {"device": "none", "torch": "2"},
        "report": None if arm == "bf16" else {"fp4_share": 0.9},
        "switch": 0.9 if arm.endswith("@0.9") else None,
        "parameters": 10**6,
        "tokens_per_second": 1000.0,
        "diverged": False,
        "held_out_loss": loss + 0.1,
        "losses": [9.0 - seed] * 10 + [loss + 1.0] * 8 + [loss - 0.5, loss + 0.5],
    }
    return made | more


def probe_result(seed: int, losses: dict[str, float]) -> dict[str, Any]:
    """A probe of two batches."""
    rows = {
        arm: {
            "bf16_losses": [2.0, 4.0],
            "losses": [2.0 * (1 + error), 4.0 * (1 + error)],
            "cosines": {"weights": [0.9, 0.8], "layers.0": [0.99, 0.97], "layers.0.attention.q_proj": [0.7, 0.5]},
            "mean_cosines": {"weights": 0.95 - error, "layers.0.attention.q_proj": 0.8},
        }
        for arm, error in losses.items()
    }
    return result("", seed, 0.0) | {"kind": "probe", "command": "probe", "arms": rows}


def write_results(folder: Path, all_made: list[dict[str, Any]]) -> results.Study:
    folder.mkdir(exist_ok=True)
    for index, made in enumerate(all_made):
        (folder / f"{index}.json").write_text(json.dumps(made))
    (folder / "tokenizer-0.json").write_text('{"model": {}}')
    return results.read_study(folder)


@pytest.mark.parametrize(
    ("differences", "answer"),
    [
        ([-0.010, -0.011, -0.009, -0.010], "below"),
        ([0.010, 0.011, 0.009, 0.010], "above"),
        ([-0.010, -0.011, -0.009], "unresolved"),  # three seeds carry nothing
        ([-0.01, -0.02, -0.00, -0.01], "unresolved"),  # mean 0.010, spread 0.0082
        ([-0.01, math.nan, -0.01, -0.01], "unresolved"),
        ([0.0, 0.0, 0.0, 0.0], "unresolved"),
        ([], "unresolved"),
    ],
)
def test_the_rule_for_claims(differences: list[float], answer: str) -> None:
    assert claims.verdict(differences) == answer


def test_the_rule_asks_for_three_spreads_exactly() -> None:
    values = [-1.0, -2.0, -3.0, -4.0]  # a spread of sqrt(5/3)
    mean = 3 * math.sqrt(5 / 3)
    assert claims.verdict([v + 2.5 - 1.001 * mean for v in values]) == "below"
    assert claims.verdict([v + 2.5 - 0.999 * mean for v in values]) == "unresolved"


def test_errors_are_relative_and_paired_by_seed(tmp_path: Path) -> None:
    runs = [result("bf16", 0, 2.0), result("bf16", 1, 4.0), result("hif4", 0, 2.1), result("hif4", 1, 4.1)]
    study_ = write_results(tmp_path, [*runs, result("hif4", 2, 9.0)])  # seed 2 has no BF16
    assert study_.errors("dense", "hif4") == pytest.approx({0: 0.05, 1: 0.025})
    assert study_.errors("dense", "hif4", results.held_out_loss) == pytest.approx({0: 0.1 / 2.1, 1: 0.1 / 4.1})


def test_claims_say_what_the_data_say(tmp_path: Path) -> None:
    gaps = {"bf16": 0.0, "hif4": 0.004, "mxfp4": 0.02, "nvfp4": 0.002}
    noise = (0.0, 1e-4, -1e-4, 5e-5)
    runs = [
        result(arm, seed, (3.0 + seed) * (1 + gap + (noise[seed] if gap else 0) * (arm == "hif4")))
        for arm, gap in gaps.items()
        for seed in range(4)
    ]
    training, *_ = zip(*[iter(tables.all_claims(write_results(tmp_path, runs), "dense"))] * 3, strict=True)
    answers = [claim.answer for claim in training]
    assert [answer.split("**")[1] for answer in answers] == ["yes", "yes", "no, the data say the opposite"]
    assert answers[1].endswith("(paired difference -1.60% ± 0.01%, 4 seeds)")
    few = write_results(tmp_path / "few", [run for run in runs if run["seed"] < 3])
    assert all("unresolved" in claim.answer for claim in tables.all_claims(few, "dense"))


def test_findings_say_what_the_data_say(tmp_path: Path) -> None:
    noise = (0.0, 1e-4, -1e-4, 5e-5)
    gaps = {"hif4": 0.004, "hif4-plain": 0.006, "mxfp4": 0.02, "nvfp4": 0.0041}
    runs = [result("bf16", seed, 3.0 + seed / 100) for seed in range(4)]
    for index, (arm, gap) in enumerate(gaps.items()):
        for seed in range(4):
            runs.append(result(arm, seed, (3.0 + seed / 100) * (1 + gap + noise[(seed + index) % 4])))
    runs += [probe_result(seed, {"hif4-plain": 0.004, "hif4": 0.002 + noise[seed]}) for seed in range(4)]
    made = write_results(tmp_path, runs)
    text, (_, *orders) = "\n".join(findings(made, "dense")), order_table(made, "dense")
    assert orders[0] == [
        *("training loss", "recipes"),
        "HiF4 +0.40%, NVFP4 +0.41%, MXFP4 +2.00%",
        "HiF4 below, NVFP4 below, MXFP4 above",
        "HiF4 < MXFP4, NVFP4 < MXFP4",
        "HiF4 < NVFP4",
    ]
    plain = [row[:3] for row in orders if row[1] == "plain formats"]
    assert plain[0] == ["training loss", "plain formats", "HiF4 +0.60%"]
    assert tables.effect_table(made, "dense")[1:] == [
        [name, "helps, -0.20%", "–", "–"] for name in ("all of the recipe", "Hadamard transform")
    ]
    probed, _ = tables.probe_ablation_table(made, "dense")[1:]
    assert probed[1:3] == ["all of the recipe: Hadamard transform", "+0.40% → +0.20%: helps"]
    assert probed[3].endswith(": no effect") and probed[4] == "0.9460 → 0.9480: helps"
    earlier = {row[0]: row[4] for row in tables.loss_table(made, "dense")}
    assert earlier["HiF4"] == "+0.30% ± 0.01%"
    assert "tenth before, by the same rule: still growing: HiF4, MXFP4, NVFP4, HiF4-plain." in text
    assert "final losses of 4 seeds lie 1.00% apart" in text
    assert "MXFP4 90.0%, NVFP4 90.0%, HiF4-plain 90.0% (all at or above 90%)" in text
    assert "1.0 M parameters" in text and "Every arm begins with 50% of the steps in BF16" in text


def test_unequal_shares_are_said_and_plain_formats_are_claimed_too(tmp_path: Path) -> None:
    gaps = {"bf16": 0.0, "hif4": 0.01, "nvfp4": 0.02, "hif4-plain": 0.02, "nvfp4-plain": 0.03}
    runs = [result(arm, seed, 3.0 * (1 + gap)) for arm, gap in gaps.items() for seed in range(4)]
    for run in runs:
        if run["arm"] == "nvfp4":
            run["report"] = {"fp4_share": 0.75}
    runs.append(probe_result(0, {"hif4": 0.01, "nvfp4": 0.02}))
    made = write_results(tmp_path, runs)
    rows = [row[:2] + row[3:4] for row in tables.claims_table(made, "dense")]
    note = " (90.0% and 75.0% of the FLOPs in FP4)"
    assert ["training loss", f"HiF4's gap is below NVFP4's{note}", "4 seeds"] in rows
    assert ["training loss", "HiF4-plain's gap is below NVFP4-plain's", "4 seeds"] in rows
    assert ["frozen probe", f"HiF4's gap is below NVFP4's{note}", "2 batches"] in rows
    assert "NVFP4 +2.00% (75.0% of the FLOPs in FP4)" in order_table(made, "dense")[1][2]


def test_stabilisers_in_words() -> None:
    found = {name: stabilisers(RECIPES.get(name)) for name in ("hif4", "mxfp4", "nvfp4", "nvfp4-plain")}
    assert found == {
        "hif4": "Hadamard transform",
        "mxfp4": "Hadamard transform, stochastic rounding, truncation-free scales",
        "nvfp4": "Hadamard transform, stochastic rounding, 2-D blocks, BF16 in 15% of the layers",
        "nvfp4-plain": "none",
    }


def test_what_was_not_trained_is_not_said(tmp_path: Path) -> None:
    made = write_results(tmp_path, [probe_result(0, {"hif4": 0.01})])
    (text,) = findings(made, "dense")
    assert text.startswith("Nothing was trained")
    assert [row[4] for row in order_table(made, "dense")[1:]] == ["fewer than 4 pairs carry no claim"] * 2
    broken = result("hif4", 0, 3.0) | {"diverged": True, "held_out_loss": None, "losses": [9.0] * 10 + [None]}
    made = write_results(tmp_path / "broken", [result("bf16", 0, 3.0), broken, result("hif4-plain", 0, 3.1)])
    assert order_table(made, "dense")[1] == ["training loss", "recipes", "HiF4 diverged", "–", "–", "–"]
    assert tables.effect_table(made, "dense")[1][:2] == ["all of the recipe", "diverged"]


def test_probes_of_many_files_are_one(tmp_path: Path) -> None:
    made = write_results(tmp_path, [probe_result(0, {"hif4": 0.01}), probe_result(0, {"mxfp4": 0.04})])
    assert set(made.probes["dense"][0]["arms"]) == {"hif4", "mxfp4"}
    other = probe_result(1, {"hif4": 0.01})
    other["settings"] = other["settings"] | {"steps": 7}
    with pytest.raises(BadInput, match="cannot be compared: steps differ"):
        write_results(tmp_path, [probe_result(0, {"hif4": 0.01}), other])


def test_the_heat_map_has_a_panel_for_each_recipe_and_role(tmp_path: Path) -> None:
    arms = {"hif4": 0.01, "hif4:dgrad": 0.0, "nvfp4": 0.02, "nvfp4-plain": 0.02}
    made = write_results(tmp_path, [probe_result(0, arms)])
    assert figures.heat_map(made, "dense").startswith(PNG)
    assert figures._grid({"layers.3.mlp.up_proj": 0.5, "layers.3": 0.7, "weights": 0.9}) == {
        ("mlp.up_proj", 3): 0.5,
        ("block input", 3): 0.7,
    }


@pytest.mark.parametrize(
    "all_made",
    [
        [result("hif4-plain+sr", 0, 2.0)],
        [probe_result(0, {"hif4-plain": 0.01, "hif4-plain:wgrad": 0.0})],
        [probe_result(0, {"hif4:wgrad": 0.01})],
        [probe_result(0, {"hif4-plain+rht": 0.01})],
    ],
    ids=["ablations alone", "plain formats alone", "one role alone", "a probe of ablations"],
)
def test_a_report_of_what_no_figure_shows(all_made: list[dict[str, Any]], tmp_path: Path) -> None:
    made = write_results(tmp_path / "results", all_made)
    assert {path.name for path in report.write_report(made, tmp_path)} == {"report.md", "report.html"}


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "+1.23%"), (-1e-9, "0.00%"), (-0.002, "-0.20%"), (math.nan, "–")]
)
def test_percent(value: float, text: str) -> None:
    assert claims.percent(value) == text


def test_a_diverged_arm_carries_no_claim(tmp_path: Path) -> None:
    runs = [result(arm, seed, 3.0) for arm in ("bf16", "hif4", "mxfp4") for seed in range(4)]
    runs[5] |= {"diverged": True, "held_out_loss": None, "losses": [*runs[5]["losses"][:11], None]}
    made = write_results(tmp_path, runs)
    assert "no: an arm diverged" in {claim.answer for claim in tables.all_claims(made, "dense")}
    (row,) = [row for row in tables.loss_table(made, "dense") if row[0] == "HiF4"]
    assert row[2:4] == ["diverged", "diverged"]
    figures.curves_figure(made, "dense")


def test_results_of_different_settings_are_not_compared(tmp_path: Path) -> None:
    other = result("hif4", 0, 2.1)
    other["settings"] = other["settings"] | {"lr": 1.0}
    with pytest.raises(BadInput, match="cannot be compared: lr differ"):
        write_results(tmp_path, [result("bf16", 0, 2.0), other])
    other["settings"] = result("bf16", 0, 2.0)["settings"] | {"added": True}
    with pytest.raises(BadInput, match="cannot be compared: added differ"):
        write_results(tmp_path, [result("bf16", 0, 2.0), other])


def test_a_file_that_is_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "dense-hif4-s0.json").write_text('{"kind": "train", "mod')
    with pytest.raises(BadInput, match=r"dense-hif4-s0\.json is no whole JSON file"):
        results.read_study(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    whole = [result("bf16", 0, 2.0), probe_result(0, {"hif4": 0.01})]
    for made, lost, message in (
        (whole[0], "text", "text.source, text.train_tokens, text.bytes_per_token missing"),
        (whole[0], "report", "report missing"),
        (whole[1], "arms", "arms missing"),
        (whole[1], "settings", "settings.dtype"),
    ):
        (tmp_path / "0.json").write_text(json.dumps({key: value for key, value in made.items() if key != lost}))
        with pytest.raises(BadInput, match=rf"0\.json is no result of study\.py: .*{re.escape(message)}"):
            results.read_study(tmp_path)
    for broken in (whole[0] | {"losses": [3.0]}, whole[1] | {"arms": {"hif4": {}}}):
        (tmp_path / "0.json").write_text(json.dumps(broken))
        with pytest.raises(BadInput, match="losses"):
            results.read_study(tmp_path)


def test_results_that_stand_for_one_thing_are_refused(tmp_path: Path) -> None:
    twice = [result("hif4", 0, 2.0), result("hif4", 0, 2.1)]
    with pytest.raises(BadInput, match=r"1\.json and .*0\.json are both of hif4, seed 0"):
        write_results(tmp_path, twice)
    with pytest.raises(BadInput, match="both of hif4, seed 0"):
        write_results(tmp_path, [probe_result(0, {"hif4": 0.1, "mxfp4": 0.1}), probe_result(0, {"hif4": 0.1})])


def test_arms_of_a_seed_share_their_trunk(tmp_path: Path) -> None:
    other = result("hif4", 0, 2.0)
    other["losses"][9] += 1e-6
    with pytest.raises(BadInput, match="do not branch off one trunk"):
        write_results(tmp_path, [result("bf16", 0, 2.0), other])
    other["seed"] = 1
    write_results(tmp_path, [result("bf16", 0, 2.0), other])


def test_machines_are_said_and_pairs_of_two_of_them(tmp_path: Path) -> None:
    runs = [result(arm, seed, 2.0) for arm in ("bf16", "hif4") for seed in (0, 1)]
    (line,) = [line for line in report.conditions(write_results(tmp_path, runs), "dense") if line.startswith("Device")]
    assert line == "Device: none, torch 2"
    runs[3]["machine"] = {"device": "other", "torch": "2"}
    made = write_results(tmp_path, [*runs, probe_result(1, {"hif4": 0.01})])
    (line,) = [line for line in report.conditions(made, "dense") if line.startswith("Device")]
    assert (
        line
        == "Device: none, torch 2 (training of seeds 0, 1; probe of seeds 1) and other, torch 2 (training of seeds 1)"
    )
    (said,) = [text for text in findings(made, "dense") if "another machine" in text]
    assert said.endswith("their gaps hold too: HiF4 seed 1.")


def test_what_a_recipe_is_by_another_name_is_read_from_it(tmp_path: Path) -> None:
    gaps = {"bf16": 0.0, "hif4-plain": 0.02, "hif4": 0.01, "mxfp4-plain+rht+sr": 0.04, "mxfp4": 0.03}
    runs = [result(arm, seed, 2.0 * (1 + gap)) for arm, gap in gaps.items() for seed in range(4)]
    rows = tables.ablation_table(write_results(tmp_path, runs), "dense")
    assert [(*row[:2], row[4], row[5]) for row in rows[1:]] == [
        ("HiF4", "all of the recipe: Hadamard transform", "-1.00% ± 0.00%", "helps"),
        ("HiF4", "Hadamard transform", "-1.00% ± 0.00%", "helps"),
        ("MXFP4", "truncation-free scales, added to both", "-1.00% ± 0.00%", "helps"),
    ]


def test_a_gradient_that_vanished_has_no_direction() -> None:
    one, none = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert cosine(one, one) == pytest.approx(1.0)
    assert cosine(one, none) == cosine(none, one) == 0.0
    assert math.isnan(cosine(one, one * math.nan))


def test_ingredients_without_effect_are_drawn(tmp_path: Path) -> None:
    made = write_results(tmp_path, [result(arm, 0, 2.0) for arm in ("bf16", "hif4-plain", "hif4")])
    assert tables.effect_table(made, "dense")[1] == ["all of the recipe", "no effect, 0.00%", "–", "–"]
    assert figures.effects_figure(made, "dense").startswith(PNG)


def test_the_report(tmp_path: Path) -> None:
    names = ("bf16", "hif4", "mxfp4", "hif4-plain", "hif4-plain+rht", "mxfp4-plain", "mxfp4-plain+sr", "hif4@0.9")
    runs = [result(arm, seed, 2.0 + 0.01 * i) for i, arm in enumerate(names) for seed in (0, 1)]
    runs += [result(arm, 0, 2.0 + 0.01 * i, "moe") for i, arm in enumerate(names[:2])]
    made = write_results(tmp_path / "results", [*runs, probe_result(0, {"hif4": 0.01, "mxfp4": 0.04})])
    assert tables.probe_table(made, "dense")[1][:5] == ["HiF4", "1", "+1.00%", "0.00%", "0.8500"]
    assert ["block input", "0.9800", "0.9800"] in tables.kind_table(made, "dense")
    assert ["attention.q_proj", "0.6000", "0.6000"] in tables.kind_table(made, "dense")
    ablations = {tuple(row[:2]): row for row in tables.ablation_table(made, "dense")}
    assert ablations["HiF4", "Hadamard transform"][2:6] == [
        "+1.50% ± 0.00%",
        "+2.00% ± 0.00%",
        "+0.50% ± 0.00%",
        "unresolved",
    ]
    assert {("MXFP4", "stochastic rounding"), ("HiF4", "BF16 for the last 10% of the steps")} < ablations.keys()

    out = tmp_path / "docs"
    report.write_report(made, out)
    files = {path.name for path in out.iterdir()}
    assert files == {
        *("report.md", "report.html"),
        *("curves-dense.png", "effects-dense.png", "probe-dense.png", "curves-moe.png"),
    }
    assert all((out / name).read_bytes().startswith(PNG) for name in files if name.endswith(".png"))
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert "<th>gap in training loss</th><th class=n>seed 0</th>" in page and "<td class=n>+0.50%</td>" in page
    assert page.count('src="data:image/png;base64,') == 4 and "&lt;made up&gt;" in page and "http" not in page
    assert (
        "| HiF4 | 2 | 2.0100 | +0.50% ± 0.00% |" in text
        and "HiF4-plain+rht" not in text
        and "![curves-dense](curves-dense.png)" in text
    )
    shares = {row[0]: row[7] for row in tables.loss_table(made, "dense")[1:]}
    assert shares == {"BF16": "–", **dict.fromkeys(("HiF4", "MXFP4", "HiF4-plain", "MXFP4-plain"), "90.0%")}
    assert "`train --arm ARM` with ARM = `bf16`, `hif4`, " in text and "<code>train --arm ARM</code> with" in page


def test_commands_that_differ_in_arms_and_time_are_one_line() -> None:
    made = results.Study()
    made.commands = {
        "study.py train --arm hif4 --seed 0 1 --minutes 2.5",
        "study.py train --arm 'own recipe.toml' --seed 0 1 --minutes 1",
        "study.py probe --arms hif4 nvfp4:wgrad --batches 2",
        "study.py probe --batches 2",
    }
    assert report.commands(made) == [
        "`study.py probe --arms ARM --batches 2` with ARM = `hif4 nvfp4:wgrad`",
        "`study.py probe --batches 2`",
        "`study.py train --arm ARM --seed 0 1` with ARM = `hif4`, `own recipe.toml`",
    ]


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--arm", "hif5"], "unknown recipe 'hif5'"),
        (["train", "--arm", "bf16", "--switch", "0.9"], "no FP4 to switch off"),
        (["train", "--arm", "hif4", "--switch", "1.5"], "a fraction of the run must be in [0, 1), got 1.5"),
        (["train", "--arm", "hif4", "--dim", "96"], "which does not divide --dim 96"),
        (["train", "--arm", "hif4", "--micro", "3"], "--micro 3 does not divide --batch 4"),
        (["train", "--arm", "hif4", "--branch", "0.99"], "--branch 0.99 of --steps 40 leaves no step to one of both"),
        (["train", "--arm", "hif4", "--branch", "0.5"], "no checkpoint of 20 steps to branch off"),
        (["train", "--arm", "bf16", "--text", "nowhere"], "--text nowhere: no such file or folder"),
        (["train", "--arm", "bf16", "--steps", "9999"], "4 epochs are the most"),
        (["train", "--arm", "bf16", "--device", "tpu"], "choose auto, cpu, cuda or cuda:N"),
        (["train", "--arm", "bf16", "--backend", "referense"], "unknown backend 'referense'"),
        (["train", "--arm", "bf16", "--seed", "0", "1", "0"], "--seed 0 1 0 names a seed twice"),
        (["run", "--arms", "bf16", "hif5"], "unknown recipe 'hif5'"),
        (["run", "--seeds", "3", "3"], "--seed 3 3 names a seed twice"),
        (["probe", "--arms", "bf16"], "takes neither bf16 nor a switch"),
        (["probe"], "no checkpoint of a bf16 arm there"),
        (["probe", "--checkpoint", "nowhere.safetensors"], "--checkpoint nowhere.safetensors"),
        (["report", "--results", "nowhere"], "nowhere: no results of study.py there"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    arguments: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "_compile", lambda _: pytest.fail("compiled in spite of bad input"))
    verb, *rest = arguments
    sizes = {"train": TINY, "run": TINY, "probe": [], "report": []}[verb]
    where = [] if verb == "report" else ["--text", str(text), "--device", "cpu"]
    assert study.main([verb, *sizes, *where, "--out", str(tmp_path / "out"), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_a_plan_becomes_train_commands(tmp_path: Path) -> None:
    sizes = ["--steps", "9", "--batch", "64", "--micro", "32"]
    options = study.parse_options(["run", "--plan", "full", "--models", "moe", "--seeds", "7", *sizes])
    found = study.children(options)
    assert list(found) == ["moe bf16", "moe hif4", "moe mxfp4", "moe nvfp4"]
    both = study.children(study.parse_options(["run", "--plan", "full", "--models", "dense", "--arms", "bf16", *sizes]))
    assert study.parse_options(both["dense bf16"][2:]).seed == [0, 1, 2, 3]  # of the first part, not of the ablations'
    child = study.parse_options(found["moe hif4"][2:])
    assert (child.verb, child.model, child.arm, child.seed) == ("train", "moe", "hif4", [7])
    for name in ("micro", "batch", "steps", "lr", "out", "vocabulary", "deterministic", "allow_fallback", "text"):
        assert getattr(child, name) == getattr(options, name)


@pytest.mark.slow
def test_run_probe_and_report(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, shared = tmp_path / "out", ["--text", str(text), "--device", "cpu", "--out", str(tmp_path / "out")]
    run = ["run", *TINY, *shared, "--jobs", "2", "--seeds", "0", "1", "--arms", "hif4-plain", "bf16", "--branch", "0.5"]
    assert study.main(run) == 0
    assert "2 of 2 arms are done" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert sum("dense-" in path.name for path in made) == 4
    assert study.main(run) == 0  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.json")} == made
    losses = {arm: json.loads((out / f"dense-{arm}-s1.json").read_text())["losses"] for arm in ("bf16", "hif4-plain")}
    assert losses["bf16"][:20] == losses["hif4-plain"][:20] and losses["bf16"][20:] != losses["hif4-plain"][20:]
    probe = ["probe", *shared, "--backend", "reference", "--batches", "2", "--arms", "hif4", "nvfp4", "--jobs", "2"]
    assert study.main(probe) == 0
    probed = {
        name: json.loads((out / f"probe-dense-{name}-s1.json").read_text())["arms"][name] for name in ("hif4", "nvfp4")
    }
    for rows in probed.values():
        assert 0 < abs(rows["losses"][0] / rows["bf16_losses"][0] - 1) < 0.05
        assert set(rows["cosines"]) == {"weights", "layers.0"} | {
            f"layers.0.{name}_proj"
            for name in (*(f"attention.{n}" for n in "qkvo"), *(f"mlp.{n}" for n in ("gate", "up", "down")))
        }
        assert all(0.5 < value < 1 for values in rows["cosines"].values() for value in values)
    made = {path: path.stat().st_mtime_ns for path in out.glob("probe-*.json")}
    assert len(made) == 4 and study.main(probe) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("probe-*.json")} == made
    assert study.main(["report", "--results", str(out), "--out", str(tmp_path / "docs")]) == 0
    assert "hif4-plain" in (tmp_path / "docs" / "report.md").read_text().lower()
    capsys.readouterr()
    assert study.main(["train", *TINY, *shared, "--arm", "bf16", "--branch", "0.5", "--lr", "1"]) == 2
    assert "made with other settings (lr 0.001 there, 1.0 now)" in capsys.readouterr().err
