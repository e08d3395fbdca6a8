"""The command line, run in-process: what each command prints, and how it refuses."""

import errno
import json
import os
import runpy
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from typer.testing import CliRunner

import fp4compile
from fp4compile import backend, cli, recipe
from fp4compile.backend import Backend, No
from fp4compile.errors import FP4ValueError
from fp4compile.pipeline import default_pipeline

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 32)
        self.lm_head = nn.Linear(32, 16)

    def forward(self, x):
        return self.lm_head(self.proj(x).relu())


def build():
    return Net(), (torch.ones(4, 64),)


def lone():
    return Net()


def wide():
    return Net(), (torch.ones(4, 65),)


class Fails(Net):
    def forward(self, x):
        raise KeyError("[mine]")


def fails():
    return Fails(), (torch.ones(4, 64),)
"""

COMMANDS = ["explain", "convert", "opt", "formats", "recipes", "backends"]
# The package exports a function of the same name.
CONVERT = sys.modules["fp4compile.convert"]
PASSES = [step.name for step in default_pipeline().passes]


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], prog_name="fp4compile")


def output(*arguments):
    """What a command that succeeds prints; nothing may stand on stderr."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


def refusal(*arguments):
    """The one line of a command that refuses."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    return result.stderr.strip()


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(MODEL)
    return f"{tmp_path}/net.py:build"


# --- help -------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands():
    text = output("--help")
    assert all(f" {name} " in text for name in COMMANDS)
    assert {c.callback.__name__ for c in cli.app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(name):
    text = output(name, "--help")
    assert f"Example: fp4compile {name}" in " ".join(text.split())
    assert "--debug" in text
    assert output(name, "-h") == text


def test_version():
    assert output("--version").split() == ["fp4compile", f"{fp4compile.__version__},", "torch", torch.__version__]


def test_module_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "formats", "--json"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("fp4compile", run_name="__main__")
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "hif4"


@pytest.mark.parametrize("arguments", [["explain"], ["nope"], ["explain", "m", "--batch", "0"], ["formats", "--x"]])
def test_usage_errors(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


# --- tables -----------------------------------------------------------------------------------------------------


def test_formats():
    text = output("formats")
    for fmt in fp4compile.FORMATS.values():
        assert all(word in text for word in (fmt.name, str(fmt.bits_per_value), *fmt.scale_rules))


def test_formats_as_json():
    rows = {row["name"]: row for row in json.loads(output("formats", "--json"))}
    assert rows.keys() == fp4compile.FORMATS.keys()
    assert rows["nvfp4"] == {
        "name": "nvfp4",
        "block": 16,
        "element": "E2M1",
        "levels": ["e4m3 per 16", "fp32 per tensor"],
        "bits_per_value": 4.5,
        "scale_rules": ["nearest", "truncation-free", "4over6", "17/16", "eden"],
        "roundings": ["nearest", "stochastic", "eden"],
        "block_2d": 16,
        "doc": fp4compile.FORMATS["nvfp4"].doc,
    }


def test_recipes():
    text = output("recipes")
    assert all(f" {name} " in text for name in recipe.RECIPES.names())
    assert "inferred" in text and "source" in text


def test_one_recipe():
    lines = output("recipes", "nvfp4").splitlines()
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert cells == [
        ["forward", "*", "input", "nvfp4", "nearest", "nearest (default)", "-", "-", "-"],
        ["forward", "*", "weight", "nvfp4", "nearest", "nearest (default)", "-", "16×16", "-"],
        ["dgrad", "*", "grad", "nvfp4", "stochastic", "nearest (default)", "-", "-", "-"],
        ["dgrad", "*", "weight", "nvfp4", "nearest", "nearest (default)", "-", "16×16", "-"],
        ["wgrad", "*", "grad", "nvfp4", "stochastic", "nearest (default)", "16, fixed signs", "-", "-"],
        ["wgrad", "*", "input", "nvfp4", "nearest", "nearest (default)", "16, fixed signs", "-", "-"],
    ]
    assert "kept in high precision: output heads; routers; the last 15% of the blocks" in lines


def test_what_else_an_operand_gets(tmp_path):
    lines = output("recipes", "quartet").splitlines()
    assert any("32, fixed signs" in line and "clip mask" in line for line in lines)
    assert any("32, fresh signs" in line and "requantised" in line for line in lines)
    recipe.Recipe("deep", recipe.resolve("nvfp4-w4a16").rules, keep_first_n=1, keep_last_n=2).save(
        tmp_path / "deep.toml"
    )
    kept = "kept in high precision: output heads; routers; the first 1 blocks; the last 2 blocks"
    assert kept in output("recipes", tmp_path / "deep.toml").splitlines()


def test_operands_in_high_precision():
    assert "high precision" in output("recipes", "hif4-w4a16")


@pytest.mark.parametrize("name", recipe.RECIPES.names())
def test_recipe_as_toml(name):
    assert recipe.loads(output("recipes", name, "--toml")) == recipe.RECIPES.get(name)


def test_recipe_from_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text(output("recipes", "mxfp4", "--toml").replace('"mxfp4"', '"mine"', 1))
    assert "recipe mine" in output("recipes", tmp_path / "mine.toml").splitlines()[0]


def test_wrong_recipes(tmp_path):
    assert "hif4, hif4-plain, " in refusal("recipes", "hif5")
    assert "name it" in refusal("recipes", "--toml")
    assert "cannot read recipe" in refusal("recipes", tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = 3")
    assert "bad.toml" in refusal("recipes", tmp_path / "bad.toml")


def test_backends():
    text = output("backends")
    assert all(f" {name} " in text for name in backend.backend_names())
    assert "cpu: fake_quantize" in text


def test_backends_that_are_not_available(monkeypatch):
    class Absent(Backend):
        name, doc = "absent", "not here"

        def available(self):
            return No("[no] such device")

        def compile(self, *arguments):
            raise AssertionError

    def load(name):
        if name == "absent":
            return Absent()
        raise ImportError("no module named 'x'")

    monkeypatch.setattr(backend, "backend_names", lambda: ["absent", "broken"])
    monkeypatch.setattr(backend, "get_backend", load)
    text = output("backends")
    assert "no: [no] such device" in text and "no: no module named 'x'" in text


# --- explain ----------------------------------------------------------------------------------------------------


def test_explain(model):
    text = output("explain", model, "--train", "--recipe", "mxfp4-plain")
    assert "fp4compile: mxfp4-plain" in text
    for row in ("│ proj    │ forward │ linear │ fp4 ", "│ proj    │ wgrad   │ linear │ fp4 ", "output head"):
        assert row in text
    assert "2 GEMMs in FP4, 3 kept, 0 refused" in text


def test_explain_as_json(model):
    report = json.loads(output("explain", model, "--json", "-r", "hif4-w4a16", "-b", "reference"))
    assert [(s["path"], s["status"]) for s in report["sites"]] == [("proj", "fp4"), ("lm_head", "kept")]
    assert (report["recipe"], report["backend"]) == ("hif4-w4a16", "reference")


def test_keep(model):
    sites = json.loads(output("explain", model, "--json", "--keep", "proj", "--keep", "lm*"))["sites"]
    assert [(s["status"], s["reason"]) for s in sites] == [("kept", "keep='proj'"), ("kept", "output head")]


def test_warnings_are_one_line(model):
    result = run("explain", model, "--keep", "porj", "--json")
    assert result.exit_code == 0
    assert result.stderr == "warning: 'porj' of recipe 'hif4' matches no module; the nearest is 'proj'\n"
    assert json.loads(result.stdout)["notes"] == []


def test_a_warning_is_printed_once(monkeypatch):
    def warn(*names):
        for _ in range(2):
            warnings.warn("a [b]\nc\n\nadvice", fp4compile.errors.FP4Warning, stacklevel=1)

    monkeypatch.setattr(backend, "backend_names", lambda: warn() or [])
    assert run("backends").stderr == "warning: a [b] c\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "hif5"], "unknown recipe 'hif5'; allowed: "),
        (["--recipe", "none.toml"], "cannot read recipe 'none.toml'"),
        (["--backend", "cuda"], "unknown backend 'cuda'; allowed: auto, inductor, reference"),
        (["--batch", "2"], "--batch applies to transformers models only"),
    ],
)
def test_explain_refuses(model, arguments, message):
    assert message in refusal("explain", model, *arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net.py", "it defines build, lone"),
        ("net.py:none", "has no function 'none'; it defines build, lone"),
        ("net.py:lone", "must return (module, example_inputs), it returned Net"),
        ("none.py:build", "no such file"),
        ("none", "no such file or directory"),
        ("a.pt2", "--trust-pickle"),
        ("a.onnx", "explain reads file.py:function, a transformers directory or config.json, .pt2"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "opt"])
def test_models_that_are_none(model, tmp_path, monkeypatch, command, name, message):
    monkeypatch.chdir(tmp_path)
    for empty in ("a.pt2", "a.onnx"):
        (tmp_path / empty).touch()
    assert message in refusal(command, name)


def test_trust_pickle(tmp_path):
    program = torch.export.export(torch.nn.Linear(8, 4), (torch.ones(2, 8),))
    torch.export.save(program, tmp_path / "linear.pt2")
    report = json.loads(output("explain", tmp_path / "linear.pt2", "--trust-pickle", "--json"))
    assert [site["status"] for site in report["sites"]] == ["fp4"]


def test_debug_shows_the_traceback(model):
    result = run("explain", model, "--recipe", "hif5", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and "resolve" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown recipe 'hif5'")


@pytest.mark.parametrize("command", ["explain", "opt"])
def test_a_model_that_fails_is_blamed_on_one_line(model, command):
    wide, fails = (refusal(command, model.replace("build", name)) for name in ("wide", "fails"))
    assert "net.py:wide does not run on its example inputs: RuntimeError('" in wide and "[4, 65]" in wide
    assert wide.endswith("net.py:13)")
    assert fails.endswith("net.py:fails does not run on its example inputs: KeyError: '[mine]'")


def test_a_pass_that_fails_is_not_blamed_on_the_model(model, monkeypatch):
    monkeypatch.setattr(sys.modules["fp4compile.explain"], "copy_graph", lambda graph: 1 / 0)
    result = run("explain", model)
    assert result.exit_code == 1 and "ZeroDivisionError" in str(result.exception)


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr(backend, "backend_names", lambda: 1 / 0)
    result = run("backends")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_what_cannot_be_written_is_one_line(model, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("fp4compile.files.write_atomically", full)
    message = refusal("opt", model, "-p", "canonicalise", "-o", tmp_path / "graph.txt")
    assert message == f"error: No space left on device: '{tmp_path / 'graph.txt'}'"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission to write in" in refusal("opt", model, "-o", tmp_path / "graph.txt")


def test_names_are_neither_markup_nor_pictures(tmp_path):
    path = tmp_path / "mine.toml"
    rule = '[[rule]]\nrole = "forward"\nmodules = "a.[0-3]"\nweight = {format = "hif4"}\n'
    path.write_text(f'name = "[/z] [bold]x"\n{rule}')
    assert "recipe [/z] [bold]x" in output("recipes", path) and "a.[0-3]" in output("recipes", path)
    assert "fp4compile: [/z] [bold]x" in fp4compile.Report("[/z] [bold]x", "inductor", "cpu").to_text()
    path.write_text('name = "x"' + "\n" * 99 + "nobody = 1\n" + rule)
    assert "mine.toml:100: key 'nobody'" in " ".join(run("recipes", path).stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_conversion_leaves_nothing(tmp_path, number):
    """The command stops itself where it has begun to write weights."""
    lines = [
        "import os, signal, sys, transformers",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # a shell's job in the background ignores it
        "from fp4compile import checkpoint, cli",
        "sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)",
        "transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained('model')",
        "def write(*_):",
        "    print(os.listdir())",
        f"    try: os.kill(os.getpid(), {int(number)})",
        "    except SystemExit: raise ValueError('swallowed') from None",
        "checkpoint.Writer.write = write",
        "sys.argv = ['fp4compile', 'convert', 'model', '-o', 'out']",
        "cli.main()",
    ]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, env=paths, capture_output=True, text=True
    )
    assert done.returncode == 128 + number, done.stderr
    assert ".out." in done.stdout and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_messages_name_flags_and_drop_advice(monkeypatch):
    def refuse():
        raise FP4ValueError("[a] failed; pass strict=False\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(backend, "backend_names", refuse)
    assert refusal("backends") == "error: [a] failed; pass --allow-fallback"


# --- opt --------------------------------------------------------------------------------------------------------


def headings(text):
    return [line for line in text.splitlines() if line.startswith("#")]


def test_opt(model):
    text = output("opt", model, "--recipe", "mxfp4-w4a16")
    assert headings(text) == ["# graph 1, captured", f"# graph 1, after {PASSES[-1]}"]
    before, after = text.split("\n\n")
    assert "fp4compile" not in before
    assert "fp4compile.fake_quantize(" in after and "# forward proj: fp4" in after


def test_opt_with_passes(model):
    passes = "canonicalise, find_sites,annotate,pad_groups,insert_qdq"
    text = output("opt", model, "-p", passes, "-r", "mxfp4-w4a16", "--print-between")
    names = ["canonicalise", "find_sites", "annotate", "pad_groups", "insert_qdq"]
    assert headings(text) == ["# graph 1, captured", *(f"# graph 1, after {name}" for name in names)]
    assert "fp4compile.dequantize(" in text and "fake_quantize" not in text


def test_opt_train(model):
    text = output("opt", model, "--train", "-p", "canonicalise,find_sites")
    assert "tangents_1" in text and "# wgrad proj\n" in text  # what becomes of it is not decided yet
    assert "f32[32, 64] = input  # proj.weight\n" in text


def test_opt_lists_passes():
    text = output("opt", "--list")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("│")] == PASSES
    assert "Bring every GEMM to one spelling." in text


def test_opt_times_passes_on_stderr(model):
    result = run("opt", model, "--time-passes", "-p", "canonicalise,find_sites")
    assert result.exit_code == 0
    assert "time per pass" in result.stderr and "find_sites" in result.stderr
    assert "time per pass" not in result.stdout


def test_opt_writes_a_file(model, tmp_path):
    arguments = ("opt", model, "-p", "canonicalise")
    assert output(*arguments, "-o", tmp_path / "graph.txt") == ""
    assert (tmp_path / "graph.txt").read_text() == output(*arguments)


def test_opt_writes_where_a_link_leads_and_into_a_pipe(model, tmp_path):
    """The null device, written to by root, stays a device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("new.txt")
    arguments = ("opt", model, "-p", "canonicalise", "-o")
    assert output(*arguments, tmp_path / "link") == ""
    assert (tmp_path / "link").is_symlink() and (tmp_path / "new.txt").read_text().startswith("# graph 1")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert output(*arguments, tmp_path / "pipe") == ""
    assert os.read(reader, 1 << 16).startswith(b"# graph 1") and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "fuze"], f"unknown pass 'fuze'; allowed: {', '.join(sorted(PASSES))}"),
        (["--passes", "fuse"], "pass 'fuse' needs ['qdq'], which no pass before it gives"),
        (["--recipe", "hif5"], "unknown recipe"),
    ],
)
def test_opt_refuses_and_leaves_no_file(model, tmp_path, arguments, message):
    assert message in refusal("opt", model, *arguments, "-o", tmp_path / "graph.txt")
    assert not (tmp_path / "graph.txt").exists()


def test_opt_names_an_output_that_is_no_file(model, tmp_path):
    assert "is a folder; name a file" in refusal("opt", model, "-o", tmp_path)
    (tmp_path / "file").touch()
    assert "is no folder" in refusal("opt", model, "-o", tmp_path / "file" / "graph.txt")


def test_opt_without_a_model():
    assert "name a MODEL, or list the passes with --list" in refusal("opt")


# --- convert ----------------------------------------------------------------------------------------------------


def files(folder):
    """What a folder holds besides the model's source; a failed conversion must leave it as it was."""
    return sorted(p.name for p in folder.iterdir() if p.name not in ("net.py", "__pycache__", "a.pt2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "docx"], f"unknown target 'docx'; allowed: {', '.join(CONVERT.TARGETS)}"),
        (["--recipe", "hif5"], "unknown recipe 'hif5'; allowed: "),
        ([], "not a Net"),
    ],
)
def test_convert_refuses_and_leaves_no_folder(model, tmp_path, arguments, message):
    assert message in refusal("convert", model, *arguments, "-o", tmp_path / "out")
    assert files(tmp_path) == []


def test_convert_of_what_is_no_folder(tmp_path):
    (tmp_path / "a.pt2").touch()
    for name in ("a.pt2", "none"):
        assert name in refusal("convert", tmp_path / name, "-o", tmp_path / "out")
    assert files(tmp_path) == []


def test_convert_passes_everything_on(tmp_path, monkeypatch):
    seen = {}

    def record(*arguments, **options):
        seen.update(options, arguments=arguments)
        report = fp4compile.Report("hif4-w4a4", "inductor", "cpu", notes=["[a] note"])
        return CONVERT.Artifact(tmp_path / "out", report, 4000, 1000)

    monkeypatch.setattr(CONVERT, "convert", record)
    options = ["-r", "hif4-w4a4", "--keep", "a*", "--keep", "b", "--allow-fallback", "--overwrite"]
    text = output("convert", "llama", *options, "-o", "out")
    path = cli.Path("out")
    assert seen.pop("arguments") == ("llama", "hif4-w4a4", "safetensors", path)
    assert seen == {"keep": ["a*", "b"], "example_inputs": None, "strict": False, "overwrite": True}
    assert "note: [a] note" in text
    assert text.splitlines()[-1] == f"{tmp_path}/out: 1,000 bytes, of 4,000 before"


TINY = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def build():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=16
    )
    return LlamaForCausalLM(config), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
"""


@pytest.mark.slow
def test_convert(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tiny.py").write_text(TINY)
    text = output("convert", f"{tmp_path}/tiny.py:build", "-o", tmp_path / "out")
    assert "7 GEMMs in FP4, 1 kept, 0 refused" in text
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "--overwrite" in refusal("convert", f"{tmp_path}/tiny.py:build", "-o", tmp_path / "out")
    fp4compile.load(tmp_path / "out")
