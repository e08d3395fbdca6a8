"""benchmarks/gpu on a CPU: its arguments, tables and files, and every section on small shapes without a clock.

What needs a CUDA device (graphs, events, memory statistics, the profiler) is replaced; the rest runs as it is.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import accumulate, codec, decode, generate, timing, train
from benchmarks.gpu import sheet as sheets
from benchmarks.gpu.llama import Greedy, Llama, Shape, Stack, made, rotation
from benchmarks.gpu.options import RECIPES, Options
from benchmarks.gpu.sheet import Bar, Row, Sheet
from fp4compile.packed import PackedLinear
from fp4compile.weight_cache import WeightCache
from tests.claims import Claims, everything
from tests.helpers import capture

OF = {"device": "Some Device (TM) 80GB", "torch": "2.11", "triton": "3.6"}
TINY = Shape(dim=64, hidden=128, heads=4, kv_heads=2, layers=3, vocabulary=512)
Run = Callable[[], object]


def turns(runs: Sequence[Run], rounds: int, seconds: float, calls: int = 1) -> list[list[float]]:
    """Every run once; made-up times, 1 ms for the first, 2 ms for the second, …"""
    for run in runs:
        run()
    return [[float(number)] * rounds for number, _ in enumerate(runs, 1)]


def graphed(runs: Sequence[Run], calls: int, pool: object = None) -> Run:
    runs[0]()

    def replay() -> None:
        for number in range(calls):
            runs[number % len(runs)]()

    return replay


@pytest.fixture
def clockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what only a CUDA device can do."""
    for module in (accumulate, codec, decode, generate, train, timing):
        for name, stand_in in (("turns", turns), ("graphed", graphed)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)
    for module in (codec, train):
        monkeypatch.setattr(module, "host_microseconds", lambda run, calls=1: 7.0)
    monkeypatch.setattr(timing, "once", lambda run: 0.1)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(rounds=2, device="cpu", out=tmp_path, variants=("hif4-plain", "hif4"))


def printed(sheet: Sheet) -> str:
    console = Console(width=200, record=True)
    sheets.show(sheet, OF, console)
    return console.export_text()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- tables and files ------------------------------------------------------------------------------------------------


def a_sheet() -> Sheet:
    rows = [
        Row("base", 2.0, "ms", 0.01, 1.0, details={"GB/s": 1234.5}),
        Row("good", 1.0, "ms", 0.02, 2.0, Bar("≥", 1.9)),
        Row("bad", 4.0, "ms", 0.03, 0.5, Bar("≥", 0.9), {"host µs": 3.0}),
        Row("broken", bar=Bar("≤", 1.04), error="KeyError: [no, such] thing"),
    ]
    return Sheet("some", "a title", "base's time over the case's", rows, ["a note"])


def test_a_table_says_what_holds_and_what_was_not_measured() -> None:
    lines = printed(a_sheet()).splitlines()
    found = {row: next(line for line in lines if f"│ {row}" in line) for row in ("base", "good", "bad", "broken")}
    assert "holds" in found["good"] and "≥ 1.9" in found["good"]
    assert "MISSED" in found["bad"] and "not measured" in found["broken"]
    assert "holds" not in found["base"] and "MISSED" not in found["base"]
    text = "\n".join(lines)
    assert "broken: KeyError: [no, such] thing" in text and "a note" in text
    assert "Some Device (TM) 80GB, torch 2.11, Triton 3.6" in text and "base's time over the case's" in text


def test_a_file_holds_every_row_with_its_device(tmp_path: Path) -> None:
    path = sheets.write(a_sheet(), OF, tmp_path / "new")
    assert path.name == "some-some-device-tm-80gb.csv" and [p.name for p in path.parent.iterdir()] == [path.name]
    rows = read(path)
    assert [row["case"] for row in rows] == ["base", "good", "bad", "broken"]
    assert {row["device"] for row in rows} == {OF["device"]} and rows[0]["triton"] == "3.6"
    assert (rows[0]["GB/s"], rows[0]["host µs"], rows[0]["bar"]) == ("1234.5", "", "")
    assert (rows[2]["holds"], rows[2]["ratio"], rows[2]["bar"]) == ("False", "0.5", "≥ 0.9")
    assert rows[3]["error"] and not rows[3]["value"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    sheet = a_sheet()
    sheets.write(sheet, OF, tmp_path)
    del sheet.rows[1:]
    assert len(read(sheets.write(sheet, OF, tmp_path))) == 1


def test_bars() -> None:
    assert Bar("≥", 2.0).holds(2.0) and not Bar("≥", 2.0).holds(1.99)
    assert Bar("≤", 1.0).holds(1.0) and not Bar("≤", 1.0).holds(1.001)
    assert Row("x", ratio=None, bar=Bar("≤", 1.0)).holds is None


def test_a_peer_that_fails_is_no_failure() -> None:
    assert not Sheet("a", "", "", [Row("peer", error="no", is_peer=True)]).failed
    assert Sheet("a", "", "", [Row("ours", error="no")]).failed


def test_the_middle_of_times() -> None:
    assert sheets.middle([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, pytest.approx(2 / 3))
    assert sheets.middle([2.0]) == (2.0, 0.0)


# --- the clock -------------------------------------------------------------------------------------------------------


def test_turns_give_every_run_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    made_calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    def work(name: str, ms: float) -> Run:
        def run() -> None:
            nonlocal now
            made_calls.append(name)
            now += ms

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runs = [work("a", 1.0), work("b", 2.0), work("c", 4.0)]
    times = timing.turns(runs, 4, 60.0, calls=3)
    assert times == [[1.0] * 4, [2.0] * 4, [4.0] * 4]
    played = "".join(made_calls)
    assert played[:3] == "abc"
    rounds = [played[at : at + 18] for at in range(3, len(played), 18)]
    # Every turn is three untimed and three timed calls of one run; orders differ, and are the same every time.
    assert all(sorted(each[::6]) == ["a", "b", "c"] and each == "".join(c * 6 for c in each[::6]) for each in rounds)
    assert len(rounds) == 4 and len(set(rounds)) > 1
    made_calls.clear()
    timing.turns(runs, 4, 60.0, calls=3)
    assert "".join(made_calls) == played
    assert [len(found) for found in timing.turns([work("a", 1.0)], 9, 0.0)] == [3]  # the least, whatever the time


def test_what_fails_or_is_slow_is_named_and_the_rest_is_timed(clockless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("no\nkernel")

    def slow() -> None: ...

    monkeypatch.setattr(timing, "once", lambda run: 1e3 if run is slow else 0.1)
    times, errors = timing.compare({"good": [lambda: None], "broken": [broken], "slow": [slow]}, 4, 3, 1.0)
    assert times == {"good": [0.25] * 3}
    assert errors["broken"] == "ValueError: no kernel" and "one call takes 1000 ms" in errors["slow"]


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["codecs"], "no section codecs; there are codec, decode, train, accumulate, generate"),
        (["train", "--variants", "hif4,hif5"], "hif5: the recipes are"),
        (["--rounds", "0"], "0 is less than 1"),
        ([], "torch sees no CUDA device"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[Options], Sheet]]]:
    """Sections by name, to be filled by the test."""
    found: dict[str, Callable[[Options], Sheet]] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "versions", lambda: OF)
    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(run=found[name[15:]]))
    yield found


def test_one_section_runs_here(sections: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Options] = []
    sections["train"] = lambda options: seen.append(options) or Sheet("train", "t", "r", [Row("x", 1.0)])
    given = [
        "train",
        "--rounds",
        "3",
        "--seconds",
        "1.5",
        "--variants",
        "hif4,mxfp4",
        "--profile",
        "--out",
        str(tmp_path),
    ]
    assert command.main(given) == 0
    assert seen == [Options(3, 1.5, tmp_path, ("hif4", "mxfp4"), True)]
    assert f"written to {tmp_path / 'train-some-device-tm-80gb.csv'}" in capsys.readouterr().out.replace("\n", "")


def test_a_case_that_failed_is_an_error_status(sections: dict[str, Any], tmp_path: Path) -> None:
    sections["decode"] = lambda options: a_sheet()
    assert command.main(["decode", "--out", str(tmp_path)]) == 1
    assert len(list(tmp_path.iterdir())) == 1  # what was measured is kept


def test_a_section_that_fails_says_why(sections: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def fails(options: Options) -> Sheet:
        raise RuntimeError("the device is gone")

    sections["codec"] = fails
    assert command.main(["codec"]) == 1
    assert "section codec failed" in (out := capsys.readouterr().out) and "the device is gone" in out


def test_sections_run_apart_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def called(line: list[str], check: bool) -> SimpleNamespace:
        commands.append(line[3:])
        return SimpleNamespace(returncode=1 if "decode" in line else 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.subprocess, "run", called)
    assert command.main(["codec", "decode", "train", "--rounds", "2"]) == 1
    assert [line[0] for line in commands] == ["codec", "decode", "train"]
    assert all(line[1:3] == ["--rounds", "2"] for line in commands)
    commands.clear()
    assert command.main([]) == 1 and [line[0] for line in commands] == list(command.SECTIONS)
    # What is handed on is what was given.
    given = command.parser().parse_args(commands[0])
    assert (given.rounds, given.seconds, given.out, given.variants) == (20, 20.0, Options.out, RECIPES)


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_cache_changes_nothing() -> None:
    """Token by token over a cache, all at once over a cache, and the plain causal model."""
    torch.manual_seed(0)
    model = made(Llama, TINY, "cpu").float()
    stack = Stack(TINY)
    stack.layers = model.layers
    tokens = torch.randint(0, TINY.vocabulary, (2, 6))
    with torch.no_grad():
        x = stack(model.entry.embedding(tokens), *rotation(torch.arange(6), TINY.head_dim))
        plain = model.head(x, torch.zeros_like(x))
        at_once = model(tokens, torch.arange(6), caches := model.caches(2, 9))
        caches = model.caches(2, 9)
        for position in range(6):
            stepped = model(tokens[:, position : position + 1], torch.tensor([position]), caches)
    torch.testing.assert_close(at_once, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stepped, plain, rtol=1e-4, atol=1e-6)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.randint(-20, 20, (50, 1024)).bfloat16()
    greedy = Greedy()(logits)
    assert greedy.shape == (50, 1) and torch.equal(greedy, logits.argmax(-1, keepdim=True))


def test_the_shape_is_that_of_llama_3_8b() -> None:
    with torch.device("meta"):
        model = Llama(Shape())
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248


def test_weights_are_random_and_norms_are_one() -> None:
    model = made(Llama, TINY, "cpu")
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.head.norm.weight.eq(1).all() and 0.015 < model.head.lm_head.weight.float().std() < 0.025


# --- the sections ----------------------------------------------------------------------------------------------------


def test_codec(clockless: None, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: Tensor) -> Tensor:
        raise RuntimeError("no such dtype")

    monkeypatch.setattr(codec, "SIZE", 128)
    monkeypatch.setattr(codec, "PEERS", {"hif4": ("a peer", lambda x: x), "mxfp4": ("another", fails)})
    monkeypatch.setattr(torch, "compile", lambda run: run)
    sheet = codec.run(options)
    rows = {row.case: row for row in sheet.rows}
    assert not sheet.failed and rows["another, torch.compile"].error == "RuntimeError: no such dtype"
    assert rows[codec.COPY].ratio == 1.0
    for name in ("hif4 rows", "nvfp4 columns", "mxfp4 rows"):
        assert rows[name].bar == Bar("≥", 0.92)
    for name in ("hif4 columns, Hadamard 64", "mxfp4 rows, Hadamard 32, stochastic", "nvfp4 both axes"):
        assert rows[name].bar == Bar("≥", 0.85)
    assert "nvfp4 both axes, gradient of nvfp4, two launches" in rows and "hif4 rows, squares" not in rows
    # The copy is the first case and takes 1 ms for its graph, the second 2 ms: half the speed for the same bytes.
    assert rows["hif4 rows"].ratio == pytest.approx(0.5)
    assert rows["nvfp4 both axes"].details["GB/s"] == pytest.approx(
        3 * 128 * 128 * 2 / (rows["nvfp4 both axes"].value or 0) / 1e6
    )


@pytest.fixture
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "BARS", {(48, 128): {1: 2.9, 5: 0.2}})
    monkeypatch.setattr(decode, "COPY_BYTES", 1 << 12)


def test_decode(clockless: None, small_layers: None, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(weight: Tensor) -> decode.Linear:
        return lambda x: x @ weight.t()

    def refuses(weight: Tensor) -> decode.Linear:
        raise RuntimeError("needs another device")

    peers = {"torch": ("a peer", peer), "numpy": ("refuses", refuses), "no_such_package": ("absent", refuses)}
    monkeypatch.setattr(decode, "PEERS", peers)
    sheet = decode.run(options)
    assert [row.case for row in sheet.rows][:5] == [f"48×128, M = 1, {n}" for n in ("bf16", *decode.NAMES, "a peer")]
    assert not sheet.failed and len(sheet.rows) == 10
    assert sheet.rows[1].ratio == pytest.approx(0.5) and sheet.rows[1].holds is False
    assert sheet.rows[6].holds is True and sheet.rows[4].bar is None
    assert sheet.notes[1:] == [
        "refuses: RuntimeError: needs another device",
        "no_such_package is not installed: not measured",
    ]


def test_a_wrong_result_is_not_timed(
    clockless: None, small_layers: None, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PackedLinear.forward

    def off(self: PackedLinear, x: Tensor) -> Tensor:
        return forward(self, x) * (1.25 if self.packed.weight.format == "mxfp4" else 1.0)

    monkeypatch.setattr(PackedLinear, "forward", off)
    sheet = decode.run(options)
    errors = {row.case.rpartition(" ")[2]: row.error for row in sheet.rows}
    assert sheet.failed and "its result is off by 0.2" in errors["mxfp4"]
    assert not errors["hif4"] and not errors["nvfp4"]


def test_packed_models_share_what_is_not_packed() -> None:
    model = made(Llama, TINY, "cpu")
    twin = generate.packed(model, "hif4-w4a16")
    assert (
        twin.entry is not model.entry
        and twin.entry.embedding is model.entry.embedding
        and twin.head.lm_head is model.head.lm_head
    )
    linear, packed = model.layers[1].mlp.down_proj, twin.layers[1].mlp.down_proj
    assert isinstance(linear, nn.Linear) and isinstance(packed, PackedLinear)
    assert sum(isinstance(m, PackedLinear) for m in twin.modules()) == 7 * TINY.layers
    assert generate.linear_bytes(twin) / generate.linear_bytes(model) == pytest.approx(4.5 / 16)


def test_the_packed_gemm_of_gate_and_up_applies_the_swiglu() -> None:
    twin = generate.packed(made(Llama, replace(TINY, joined=True), "cpu"), generate.RECIPE)
    found = capture(twin.layers[0].mlp, (torch.zeros(2, 1, TINY.dim).bfloat16(),), generate.RECIPE, train=False)
    found.context.backend = Claims(mm=everything)
    found.until("activate")
    assert [node.kwargs.get("activation") for node in found.calls("mm")] == ["swiglu", None]
    assert not found.calls(torch.ops.aten.mul.Tensor)


@pytest.fixture
def short_generation(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Few tokens of a tiny model, compiled without Inductor; returns how many graphs that took, at its end."""
    monkeypatch.setattr(generate, "SHAPE", TINY)
    for name, value in (("PROMPT", 4), ("TOKENS", 5), ("BATCHES", (1, 3))):
        monkeypatch.setattr(generate, name, value)
    graphs: list[int] = []
    compile_in_place = nn.Module.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph

    def compiled(self: nn.Module, **given: Any) -> None:
        compile_in_place(self, **{**given, "backend": backend, "options": None})

    monkeypatch.setattr(nn.Module, "compile", compiled)
    return graphs


def test_generate(clockless: None, short_generation: list[int], options: Options) -> None:
    sheet = generate.run(options)
    rows = {row.case: row for row in sheet.rows}
    assert not sheet.failed and len(rows) == 6
    assert rows["batch 3, bf16"].value == pytest.approx(3 * 5 / 1e-3)  # the first run takes 1 ms
    assert rows["batch 3, hif4-w4a16"].ratio == pytest.approx(0.5) and rows["batch 3, hif4-w4a16"].holds is False
    assert rows["linear weights, hif4-w4a16"].ratio == pytest.approx(0.28125)
    # For each batch and model one graph of all blocks, and one of each other part.
    assert len(short_generation) <= 2 * 2 * 4


def test_a_model_that_does_not_run_is_named(
    clockless: None, short_generation: list[int], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: PackedLinear, x: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(PackedLinear, "forward", fails)
    sheet = generate.run(options)
    assert sheet.failed and [row.case for row in sheet.rows if row.error] == [
        "batch 1, hif4-w4a16",
        "batch 3, hif4-w4a16",
    ]


def test_decoding_is_greedy_and_starts_anew(clockless: None) -> None:
    torch.manual_seed(0)
    model = made(Llama, TINY, "cpu")
    decoder = generate.Decoder(model, 2)
    run = generate.generation(decoder)
    run()
    first = decoder.tokens.clone()
    assert int(decoder.position) == generate.PROMPT + generate.TOKENS
    run()
    assert torch.equal(decoder.tokens, first)
    decoder.reset()
    with torch.no_grad():
        expected = model(decoder.tokens, decoder.position, decoder.caches).argmax(-1, keepdim=True)
    decoder.step()
    assert torch.equal(decoder.tokens, expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNN", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "GEMM"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x>", "GEMM"),
        ("exact", "GEMM"),
        ("fake_quantize", "quantise"),
        ("fake_quantize_both", "quantise"),
        ("amax", "quantise"),
        ("window", "quantise"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_poi_fused__scaled_mm_amax_0", "rest"),
        ("void at::native::vectorized_elementwise_kernel", "rest"),
        ("Memset (Device)", "rest"),
    ],
)
def test_kernel_classes(name: str, kind: str) -> None:
    assert train.kernel_class(name) == kind


def variants(**names: int) -> list[train.Variant]:
    return [train.Variant(name.replace("_", "-"), lambda: None, peak=peak) for name, peak in names.items()]


def test_recommended_recipes_are_held_against_their_plain_form() -> None:
    found = variants(bf16=100, mxfp4_plain=90, mxfp4=101, hif4=100)
    rows = {row.case: row for row in train.rows_of(found, [[40.0], [28.0], [29.0], [44.0]])}
    assert rows["mxfp4-plain, step"].bar == Bar("≤", 0.72) and rows["mxfp4-plain, step"].holds
    assert rows["mxfp4, step"].bar == Bar("≤", pytest.approx(0.75)) and rows["mxfp4, step"].holds
    assert rows["hif4, step"].bar is None  # without its plain form
    assert rows["mxfp4-plain, peak memory"].holds and rows["mxfp4, peak memory"].holds is False


def test_a_step_that_the_host_cannot_keep_up_with_is_named() -> None:
    rows = [Row("a, step", 40.0, details={"host ms": 37.0}), Row("b, step", 40.0, details={"host ms": 24.0})]
    (note,) = train.host_bound([*rows, Row("a, peak memory", 4.0)])
    assert note.startswith("a, step: enqueued in 37.0 ms")


@pytest.mark.slow
def test_train(clockless: None, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SHAPE", Shape(dim=64, hidden=128, heads=4, kv_heads=4, layers=2, vocabulary=8))
    monkeypatch.setattr(train, "SEQUENCE", 16)

    def kernels(step: Run) -> Mapping[str, float]:
        step()
        return {"nvjet": 3000.0, "fake_quantize": 500.0}

    def peak(step: Run) -> int:
        step()
        return 10**9

    monkeypatch.setattr(train, "kernels_of", kernels)
    monkeypatch.setattr(train, "peak_of", peak)
    monkeypatch.setattr(train, "versions", lambda: OF)
    compiled = train.compiled

    def breaks(model: Stack, name: str, **others: Any) -> Callable[..., Tensor]:
        if name == "mxfp4":
            raise RuntimeError("cannot be compiled")
        return compiled(model, name, **others)

    monkeypatch.setattr(train, "compiled", breaks)
    sheet = train.run(Options(2, 1.0, options.out, ("hif4-plain", "mxfp4", "hif4"), profile=True, device="cpu"))
    rows = {row.case: row for row in sheet.rows}
    assert rows["mxfp4, step"].error == "RuntimeError: cannot be compiled" and sheet.failed
    assert rows["hif4-plain, step"].ratio == pytest.approx(2.0) and rows["hif4, step"].ratio == pytest.approx(3.0)
    details = rows["hif4-plain, step"].details
    # 7 layers, 2 blocks, 3 roles: x asks for a gradient, so that the first layers have a dgrad too.
    assert details["FP4 GEMMs"] == 42 and details["GEMM ms"] == 3.0 and details["quantise ms"] == 0.5
    assert rows["bf16, step"].details["FP4 GEMMs"] == 0 and details["host ms"] == pytest.approx(0.007)
    assert any(note.startswith("hif4: ") for note in sheet.notes)
    kernels_file = read(options.out / "train-some-device-tm-80gb-kernels.csv")
    assert {row["variant"] for row in kernels_file} == {"bf16", "hif4-plain", "hif4"}
    assert kernels_file[0] == {"variant": "bf16", "class": "GEMM", "us": "3000.0", "kernel": "nvjet"}


@pytest.mark.slow
def test_accumulate(clockless: None, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(dim=64, hidden=128, heads=4, kv_heads=4, layers=2, vocabulary=8)
    monkeypatch.setattr(accumulate, "SHAPE", shape)
    monkeypatch.setattr(accumulate, "SEQUENCE", 16)
    monkeypatch.setattr(accumulate, "peak_of", lambda step: step() or 10**9)
    quantised: list[int] = []
    make = WeightCache._make
    monkeypatch.setattr(WeightCache, "_make", lambda *args: quantised.append(1) or make(*args))
    sheet = accumulate.run(Options(2, 1.0, options.out, ("hif4-plain",), device="cpu"))
    rows = {row.case: row.ratio for row in sheet.rows}
    assert rows["bf16, 8 micro-batches"] == 1.0 and rows["hif4-plain, 4 micro-batches"] == pytest.approx(5 / 2)
    assert rows["hif4-plain cached, 1 micro-batches"] == pytest.approx(7.0) and not sheet.failed
    # 7 layers, 2 blocks, once a step: the first one, three for memory, three for time.
    assert len(quantised) == 14 * 7


# --- on a GPU, nothing replaced --------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("section", [accumulate, codec, decode, generate, train])
def test_a_section_on_a_gpu(section: Any, small_layers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(dim=256, hidden=512, heads=4, kv_heads=4, layers=2, vocabulary=64)
    small = {"SIZE": 256, "SHAPE": shape, "SEQUENCE": 64, "PROMPT": 32, "TOKENS": 32, "PEERS": {}}
    for name, value in small.items():
        if hasattr(section, name):
            monkeypatch.setattr(section, name, value)
    sheet = section.run(Options(rounds=3, out=tmp_path, variants=("hif4-plain",), profile=True))
    assert not sheet.failed and all(row.value for row in sheet.rows)
    assert sheets.write(sheet, sheets.versions(), tmp_path).exists()
