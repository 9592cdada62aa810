"""The command line as people meet it: real processes where that matters, the same entry point in-process elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch
from click import shell_completion
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIG, HIDDEN, LAYERS, LINEARS, TARGETS, read_config, read_weights
from support.hub_server import WRITE_TOKEN, HubServer, hub_environment, use_hub

from svdconvert.cli.app import main
from svdconvert.cli.groups import GROUPS
from svdconvert.version import __version__

SCRIPT = Path(sys.executable).parent / "svdconvert"
COMMANDS = tuple("convert plan calibrate verify evaluate ablate spectrum sweep densify fold heal push".split())
HEAL = ("--against", "model", "--calib", "a-dataset")
Run = Callable[..., SimpleNamespace]


def process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m svdconvert ...`"""
    return subprocess.run(
        [sys.executable, "-m", "svdconvert", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=900,
        check=False,
    )


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# --- starting


PROBE = r"""
import contextlib, io, json, sys
from svdconvert.cli.app import main
for args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as end:
            code = end.code or 0
    heavy = sorted({"torch", "transformers", "safetensors.torch", "accelerate", "peft"} & set(sys.modules))
    print(json.dumps({"args": args, "code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy}))
"""


def test_help_errors_and_plans_do_not_import_torch(dense: Path, tmp_path: Path) -> None:
    lines = [
        (0, "Usage:", ["--help"]),
        *((0, "--help", [command, "--help"]) for command in COMMANDS),
        (0, __version__, ["--version"]),
        (2, "did you mean 'verify'", ["verfy", str(tmp_path)]),
        (2, "--out is missing", [str(dense), "--rank", "8"]),
        (2, "there is no folder", ["no-such-model", "--rank", "8", "--out", str(tmp_path / "out"), "--device", "cpu"]),
        (2, "exactly one of", [str(dense), "--out", str(tmp_path / "out")]),
        (2, "neither a whole number", [str(dense), "--rank", "x", "--out", str(tmp_path / "out")]),
        (2, "lots", [str(dense), "--rank", "8", "--max-shard-size", "lots", "--out", str(tmp_path / "out")]),
        (2, "no such option", [str(dense), "--rnak", "8"]),
        (2, "there is no folder", ["verify", str(tmp_path / "none")]),
        (2, "there is no folder", ["densify", str(tmp_path / "none"), "--out", str(tmp_path / "out")]),
        (2, "--lr 0 must be", ["heal", str(dense), *HEAL, "--lr", "0", "--out", str(tmp_path / "out")]),
        (2, "--quiet and --verbose", ["densify", str(dense), "-q", "-v", "--out", str(tmp_path / "out")]),
        (0, "break-even", ["plan", str(dense), "--rank", "8"]),
        (0, "svd_ranks", ["plan", str(dense), "--rank", "8", "--json"]),
        (0, "break-even", [str(dense), "--rank", "8", "--dry-run"]),
        (0, "fast solver", ["plan", str(dense), "--rank", "8", "--solver", "fast"]),
        (2, "does not go with", [str(dense), "--rank", "8", "--solver", "fast", "--work", "w", "--out", "o"]),
        (2, "none.txt does not exist", [str(dense), "--keep", "0.6", "--calib", "none.txt", "--out", "o"]),
        (2, "none.txt does not exist", ["calibrate", str(dense), "--calib", "none.txt", "--out", "o"]),
        (2, "none.txt does not exist", ["heal", str(dense), *HEAL[:2], "--calib", "none.txt", "--out", "o"]),
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps([args for _, _, args in lines])],
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(lines)
    for (code, word, args), answer in zip(lines, answers, strict=True):
        assert answer["args"] == args
        assert answer["code"] == code, answer
        assert word.lower() in (answer["out"] + answer["err"]).lower(), answer
        assert answer["heavy"] == [], answer


def test_installed_script_and_module() -> None:
    script = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, check=False)
    module = process("--version")
    for done in (script, module):
        assert done.returncode == 0
        assert done.stdout.strip().endswith(f"version {__version__}")
        assert done.stderr == ""


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in COMMANDS:
        assert re.search(rf"^  {command}\s+\w", result.out, re.MULTILINE), command
    assert "svdconvert polyglot-ko-3.8b --rank 768 --out DIR" in result.out
    assert run("-h").out == result.out


def test_every_option_is_explained(run: Run) -> None:
    for command in COMMANDS:
        for name, parameter in ((p.name, p) for p in main.commands[command].params):
            if parameter.param_type_name == "option":
                assert parameter.help, (command, name)
        assert main.commands[command].get_short_help_str(), command


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("verfy", "verify"), ("evalute", "evaluate"), ("densfy", "densify"), ("covert", "convert"), ("plam", "plan")],
)
def test_mistyped_command(typed: str, meant: str, run: Run) -> None:
    result = run(typed, "somewhere")
    assert result.code == 2
    assert result.err == f"Error: there is no command {typed!r}; did you mean {meant!r}?\n"


def test_help_as_a_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("help") == run("--help")
    assert run("help", "verify") == run("verify", "--help")
    assert "there is no command 'frobnicate'; `svdconvert help` lists them" in run("help", "frobnicate").err
    assert "did you mean 'verify'?" in run("help", "verfy").err
    (tmp_path / "help").mkdir()
    assert "help has no config.json" in run("plan", "help", "--rank", "4").err
    assert "help has no config.json" in run("help", "--rank", "4", "--out", "out").err


def test_a_folder_named_like_a_command(dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is meant, however it is called."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folds").symlink_to(dense)
    assert run("folds", "--rank", 8, "--dry-run").code == 0
    (tmp_path / "fold").symlink_to(dense)
    assert run("./fold", "--rank", 8, "--dry-run").code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion_script(shell: str) -> None:
    environment = {**os.environ, "_SVDCONVERT_COMPLETE": f"{shell}_source"}
    done = subprocess.run([SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "_SVDCONVERT_COMPLETE" in done.stdout
    assert re.search(r"^\s*(complete|compdef) .*svdconvert", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("svdconvert pl", {"plan"}),
        ("svdconvert poly", {f"polyglot-ko-{size}" for size in ("1.3b", "3.8b", "5.8b", "12.8b")}),
        ("svdconvert verify DIR --ag", {"--against"}),
        ("svdconvert --ra", {"--rank", "--rank-multiple"}),
        ("svdconvert --ver", {"--version", "--verbose"}),
        ("svdconvert polyglot-ko-1.3b --ra", {"--rank", "--rank-multiple"}),
        ("svdconvert polyglot-ko-1.3b --rank 8 --d", {"--device", "--dtype", "--dry-run"}),
        ("svdconvert --rank 8 --dty", {"--dtype"}),
        ("svdconvert polyglot-ko-1.3b --dtype b", {"bfloat16"}),
        ("svdconvert --method k", {"kfac"}),
        ("svdconvert MODEL --method d", {"drone"}),
        ("svdconvert MODEL --layout p", {"pivoted"}),
        ("svdconvert sweep MODEL --method w", {"whiten"}),
        ("svdconvert MODEL --device cu", {"cuda", "cuda:N"}),
        ("svdconvert verfy --ag", set()),
    ],
)
def test_shell_completes(words: str, expected: set[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(words, monkeypatch) == expected


def completed(words: str, monkeypatch: pytest.MonkeyPatch, kind: str = "plain") -> set[str]:
    """What a shell is offered; of kind ``dir`` and ``file`` it completes the names itself."""
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    completer = shell_completion.ZshComplete(main, {}, "svdconvert", "_SVDCONVERT_COMPLETE")
    args, incomplete = completer.get_completion_args()
    return {item.value for item in completer.get_completions(args, incomplete) if item.type == kind}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("svdconvert out", "dir"),
        ("svdconvert plan out", "dir"),
        ("svdconvert MODEL --out out", "dir"),
        ("svdconvert MODEL --calib out", "file"),
        ("svdconvert verify out", "dir"),
        ("svdconvert evaluate MODEL --text out", "file"),
    ],
)
def test_shell_completes_names_of_files(words: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed(words, monkeypatch, kind) == {"out"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_a_group_and_names_its_values(command: str, run: Run) -> None:
    for parameter in main.commands[command].params:
        if parameter.param_type_name == "option":
            assert parameter.group in GROUPS, parameter.name
            metavar = parameter.metavar or ""
            row, _ = parameter.get_help_record(click.Context(main.commands[command]))
            assert parameter.is_flag or metavar or "|" in row, parameter.name
    shown = run(command, "--help").out
    assert not re.search(r"\b(TEXT|INTEGER|FLOAT|PATH|WORD)\b(?! *(Text for|Text to))", shown), shown
    headings = re.findall(r"^(\w[\w ]*):$", shown, re.MULTILINE)
    assert headings[-1] == "Other"
    assert headings[:-1] == [name for name in GROUPS if name in headings]
    if command in ("convert", "plan", "sweep"):
        assert "--method [svd|asvd|fwsvd|whiten|kfac]" in shown
    if command == "convert":
        assert headings[:-1] == "Size,What to factor,Method,Calibration,Healing,Output,Running,Hub".split(",")
        assert re.search(r"--work FOLDER .*?\n  --keep-work ", shown, re.DOTALL)


# --- plan


def polyglot(folder: Path, hidden: int, layers: int, heads: int) -> Path:
    """A folder with nothing but the config.json of a published model."""
    folder.mkdir()
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": 30080,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
    return folder


@pytest.mark.parametrize(
    ("shape", "rank", "before", "after"),
    [
        ((2048, 24, 16), 512, 1_331_810_304, 526_503_936),
        ((3072, 32, 24), 768, 3_809_974_272, 1_394_055_168),
    ],
)
def test_numbers_of_a_plan(
    shape: tuple[int, int, int], rank: int, before: int, after: int, run: Run, tmp_path: Path
) -> None:
    folder = polyglot(tmp_path / "model", *shape)
    hidden, layers, _ = shape
    # By hand: what a block has beside its four matrices, the matrices dense and factored, embeddings, last norm.
    rest = layers * (4 * hidden + 3 * hidden + hidden + 4 * hidden + hidden) + 2 * 30080 * hidden + 2 * hidden
    dense = rest + layers * 12 * hidden**2
    factored = rest + layers * rank * ((3 + 1) + (1 + 1) + (4 + 1) + (1 + 4)) * hidden
    assert (before, after) == (dense, factored)
    result = run("plan", folder, "--rank", rank, "--json")
    assert (result.code, result.err) == (0, "")
    plan = json.loads(result.out)
    assert plan["params"] == {"before": dense, "after": factored}
    assert set(plan["svd_ranks"].values()) == {rank}
    assert len(plan["svd_ranks"]) == 4 * layers
    assert plan["bytes"]["before"] == 2 * dense
    assert 0 <= plan["bytes"]["after"] - 2 * factored < 200_000
    assert sum(plan["shards"].values()) == 2 * factored
    shown = run("plan", folder, "--rank", rank).out
    assert f"{dense:,} -> {factored:,}" in shown
    assert f"{3 * hidden} x {hidden}" in shown
    assert "from config.json alone" in " ".join(shown.split())


def test_plan_is_dry_run(dense: Path, run: Run, tmp_path: Path) -> None:
    options = ["--rank", 16, "--rank", "attention.dense=8", "--dtype", "float32"]
    planned, dry = run("plan", dense, *options), run(dense, *options, "--dry-run")
    explicit = run("convert", dense, *options, "--dry-run", "--out", tmp_path / "out")

    def steady(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("disk")]

    assert planned.code == dry.code == explicit.code == 0
    assert steady(planned.out) == steady(dry.out) == steady(explicit.out)
    assert len(steady(planned.out)) >= 8
    assert run("plan", dense, *options, "--json").out == run(dense, *options, "--dry-run", "--json").out
    assert not (tmp_path / "out").exists()


def test_plan_says_what_it_does_to_each_matrix(dense: Path, run: Run) -> None:
    result = run("plan", dense, "--rank", 40, "--rank", "attention.dense=16")
    table = {line.split()[0]: line.split() for line in result.out.splitlines() if " x " in line}
    assert table["attention.dense"][1:6] == ["64", "x", "64", "3", "16"]
    assert table["mlp.dense_4h_to_h"][1:6] == ["64", "x", "256", "3", "40"]
    assert f"{3 * 64 * 64:,} -> {3 * 16 * 128:,}" in result.out
    assert "50.0%" in result.out
    # 3 hidden x hidden breaks even at 48, hidden x hidden at 32.
    assert "48.0" in result.out
    assert "32.0" in result.out
    kept_dense = run("plan", dense, "--rank", 40)
    assert "rank 40 saves nothing" in kept_dense.out
    assert re.search(r"attention\.dense +64 x 64 +3 +dense", kept_dense.out)


# --- convert


def test_json_is_all_of_standard_output(dense: Path, factored: Path, tmp_path: Path) -> None:
    """A real process: JSON for programs, everything for people on the other stream."""
    out = tmp_path / "out"
    done = process(dense, "--rank", 16, "--device", "cpu", "--out", out, "--json", "-v", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["folder"] == str(out)
    assert report["plan"]["params"]["after"] == sum(tensor.numel() for tensor in read_weights(out).values())
    assert list(report["matrices"]) == TARGETS
    assert report["already_done"] is False
    assert report["peak_memory_bytes"] > 10**7
    for line in ("break-even", "wrote model.safetensors", "checking the result"):
        assert line in done.stderr
    assert len(re.findall(r"^gpt_neox\.layers\.\S+, rank 16, .*relative error 0\.\d+", done.stderr, re.MULTILINE)) == 12
    assert "\x1b" not in done.stderr
    assert read_config(out) == read_config(factored)


def in_terminal(*args: object) -> tuple[int, str]:
    """Exit code and output of the program in a terminal of 120 columns."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-m", "svdconvert", *map(str, args)],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={key: value for key, value in environment.items() if key not in ("NO_COLOR", "CI")},
        close_fds=True,
    )
    os.close(follower)
    pieces = []
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux says that nobody has the terminal open any more
            break
        if not piece:
            break
        pieces.append(piece)
    os.close(leader)
    return child.wait(900), b"".join(pieces).decode()


def test_bar_in_a_terminal(dense: Path, tmp_path: Path) -> None:
    code, shown = in_terminal(dense, "--rank", 16, "--device", "cpu", "--no-check", "--out", tmp_path / "out")
    assert code == 0, shown
    assert "\x1b[" in shown
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    assert re.search(r"factors .*12/12", plain)
    assert "━" in plain
    assert "gpt_neox.layers." in plain, "the matrix in work"
    assert "written to" in plain
    assert "Traceback" not in plain


def test_plain_lines_elsewhere(dense: Path, run: Run, tmp_path: Path) -> None:
    result = run(dense, "--rank", 16, "--device", "cpu", "--no-check", "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert "\r" not in result.out
    assert "━" not in result.out
    assert "12/12" not in result.out
    assert "wrote model.safetensors" in result.out
    assert "gpt_neox.layers.0" not in result.out, "no line per matrix without -v"
    assert re.search(r"relative error +mean 0\.\d{4}, worst 0\.\d{4} \(layers\.\d", result.out)
    assert str(tmp_path / "out") in result.out.replace("\n", "")


def test_quiet_prints_what_was_written(dense: Path, run: Run, tmp_path: Path) -> None:
    """And errors; no progress, no plan, no notes."""
    out, options = tmp_path / "out", ("--device", "cpu", "--no-check")
    assert_quiet(run(dense, "--rank", 16, *options, "-q", "--out", out), out)
    assert_quiet(run(dense, "--rank", 16, *options, "--quiet", "--out", out), out)
    assert_quiet(run("densify", out, "-q", "--device", "cpu", "--out", tmp_path / "dense"), tmp_path / "dense")
    result = run(dense, "--rank", 8, *options, "-q", "--json", "--out", tmp_path / "json")
    assert (json.loads(result.out)["folder"], result.err) == (str(tmp_path / "json"), "")
    result = run(dense, "--rank", 8, *options, "-q", "--out", out)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: ")
    result = run(dense, "--rank", 8, *options, "-q", "-v", "--out", tmp_path / "both")
    assert result.code == 2
    assert "--quiet and --verbose exclude each other" in result.err
    assert not (tmp_path / "both").exists()


def assert_quiet(result: SimpleNamespace, out: Path) -> None:
    assert (result.code, result.out, result.err) == (0, f"{out}\n", "")


def test_verbose_prints_a_line_for_every_matrix(dense: Path, run: Run, tmp_path: Path) -> None:
    result = run(dense, "--rank", 16, "-v", "--device", "cpu", "--no-check", "--out", tmp_path / "out")
    found = re.findall(
        r"^gpt_neox\.(\S+)\.weight, rank 16, energy kept (0\.\d{4}), relative error (0\.\d{4}), [\d.]+ s$",
        result.out,
        re.MULTILINE,
    )
    assert sorted(name for name, _, _ in found) == sorted(TARGETS)
    for _, energy, error in found:
        assert float(energy) == pytest.approx(1 - float(error) ** 2, abs=2e-4)


def test_convert_is_the_default_and_options_may_come_first(
    dense: Path, factored: Path, run: Run, tmp_path: Path
) -> None:
    rest = ["--device", "cpu", "--no-check"]
    lines = {
        "named": ["convert", dense, "--rank", 16, "--out", tmp_path / "named", *rest],
        "options-first": ["--rank", 16, "--out", tmp_path / "options-first", *rest, dense],
        "mixed": ["--rank", 16, dense, *rest, "--out", tmp_path / "mixed"],
    }
    for name, line in lines.items():
        result = run(*line)
        assert (result.code, result.err) == (0, ""), result
        assert weights(tmp_path / name) == weights(factored)


def test_second_run_does_nothing(dense: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [dense, "--rank", 16, "--device", "cpu", "--no-check", "--out", out]
    assert run(*line).code == 0
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    again = run(*line)
    assert (again.code, again.err) == (0, "")
    assert "already holds this result; nothing to compute" in again.out
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before
    report = json.loads(run(*line, "--json").out)
    assert report["already_done"] is True
    assert list(report["matrices"]) == TARGETS


# --- verify, evaluate, densify, fold


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return path


def test_verify(factored: Path, run: Run) -> None:
    result = run("verify", factored, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    for check in ("modeling file", "ranks", "keys and shapes", "logits"):
        assert re.search(rf"^ok +{check}: ", result.out, re.MULTILINE), check
    assert "failed" not in result.out


def test_verify_against_the_source_and_on_a_text(dense: Path, factored: Path, run: Run, text: Path) -> None:
    line = ["verify", factored, "--against", dense, "--text", text, "--device", "cpu"]
    result = run(*line)
    assert (result.code, result.err) == (0, ""), result
    assert "12 multiplied out" in result.out
    # Embeddings, head and last norm; biases of the factored layers and two norms in each block.
    assert f"copied tensors: {4 + LAYERS * (4 + 4)} equal to the source's" in result.out
    assert result.out.count("perplexity") == 2
    report = json.loads(run(*line, "--json").out)
    assert report["passed"] is True
    ours, theirs = report["evaluations"]
    assert (ours["model"], theirs["model"]) == (str(factored), str(dense))
    assert ours["parameters"] < theirs["parameters"]
    assert ours["tokens"] == theirs["tokens"] > 0
    assert ours["perplexity"] != theirs["perplexity"]


def test_evaluate(dense: Path, run: Run, text: Path) -> None:
    result = run("evaluate", dense, "--text", text, "--window", 32, "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    perplexity = float(re.search(r"perplexity +([\d.]+) per token", result.out)[1])
    report = json.loads(
        run("evaluate", dense, "--text", text, "--window", 32, "--device", "cpu", "--json", "--batch-size", 2).out
    )
    assert report["perplexity"] == pytest.approx(perplexity, abs=1e-4, rel=1e-5)
    assert (report["window"], report["stride"]) == (32, 16)
    assert report["characters"] == len(text.read_text())


def test_densify(dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("densify", factored, "--out", out, "--device", "cpu", "-v")
    assert (result.code, result.err) == (0, ""), result
    assert len(re.findall(r"^gpt_neox\.layers\.\S+, rank 16, [\d.]+ s$", result.out, re.MULTILINE)) == 12
    ours, theirs, factors = read_weights(out), read_weights(dense), read_weights(factored)
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    for module in TARGETS:
        stem = f"gpt_neox.{module}"
        product = factors[f"{stem}.up.weight"].float() @ factors[f"{stem}.down.weight"].float()
        torch.testing.assert_close(ours[f"{stem}.weight"].float(), product, atol=1e-3, rtol=1e-3)
        assert torch.equal(ours[f"{stem}.bias"], theirs[f"{stem}.bias"])
    config = read_config(out)
    assert config["model_type"] == "gpt_neox"
    assert "svd_ranks" not in config
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))
    assert "already holds" in run("densify", factored, "--out", out, "--device", "cpu").out


def test_fold(factored: Path, run: Run, tmp_path: Path) -> None:
    folder, out = tmp_path / "adapter", tmp_path / "out"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": ["dense"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    changed = [f"gpt_neox.layers.{layer}.attention.dense" for layer in range(LAYERS)]
    for module in changed:
        pairs[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, HIDDEN, generator=generator)
        pairs[f"base_model.model.{module}.lora_B.weight"] = torch.randn(HIDDEN, 2, generator=generator)
    save_file(pairs, folder / "adapter_model.safetensors")
    result = run("fold", factored, "--adapter", folder, "--out", out, "--device", "cpu")
    assert (result.code, result.err) == (0, ""), result
    ours, theirs = read_weights(out), read_weights(factored)
    ranks = read_config(out)["svd_ranks"]
    for module in TARGETS:
        stem = f"gpt_neox.{module}"
        before = theirs[f"{stem}.up.weight"].float() @ theirs[f"{stem}.down.weight"].float()
        after = ours[f"{stem}.up.weight"].float() @ ours[f"{stem}.down.weight"].float()
        assert ranks[module] == (18 if stem in changed else 16)
        if stem in changed:
            lora = [pairs[f"base_model.model.{stem}.lora_{half}.weight"] for half in "BA"]
            before += 3 * lora[0] @ lora[1]
        torch.testing.assert_close(after, before, atol=2e-2, rtol=2e-2)
    assert run("verify", out, "--device", "cpu").code == 0
    assert set(LINEARS) == {name.split(".", 2)[2] for name in ranks}


# --- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub of our own that this process uses, with a token that may write to `owner/...`."""
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home", token=WRITE_TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def test_convert_from_the_hub(hub: HubServer, dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    commit = hub.add("owner/tiny", dense)
    out = tmp_path / "out"
    line = ["owner/tiny", "--rank", 16, "--device", "cpu", "--out", out]
    result = run(*line)
    assert (result.code, result.err) == (0, ""), result
    assert weights(out) == weights(factored)
    assert read_config(out) == read_config(factored)
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "modeling_polyglot_svd.py"):
        assert (out / name).read_bytes() == (factored / name).read_bytes()
    record = json.loads((out / "svdconvert.json").read_text())
    assert record["source"] == {"name": "owner/tiny", "repo": "owner/tiny", "commit": commit}
    assert f"svdconvert owner/tiny --revision {commit} --rank 16 --out DIR" in (out / "README.md").read_text()
    assert not list(out.glob(".*")), "nothing of the download is left"
    sent = hub.sent("model.safetensors")
    assert "already holds" in run(*line).out
    assert hub.sent("model.safetensors") - sent <= 2**17, "the second run may look at headers, no more"


def test_plan_of_a_hub_model_transfers_no_weights(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    # Larger than what is read of a header at a time, so that a transfer of the file would show.
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    tensors = load_file(model / "model.safetensors")
    for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
        tensors[name] = torch.zeros(20_000, HIDDEN, dtype=torch.float16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    config = read_config(model) | {"vocab_size": 20_000}
    (model / "config.json").write_text(json.dumps(config))
    hub.add("owner/tiny", model)
    result = run("plan", "owner/tiny", "--rank", 16, "--json")
    assert (result.code, result.err) == (0, "")
    theirs, local = json.loads(result.out), json.loads(run("plan", model, "--rank", 16, "--json").out)
    for key in ("params", "groups", "svd_ranks", "shards"):
        assert theirs[key] == local[key]
    size = (model / "model.safetensors").stat().st_size
    gets = hub.gets("model.safetensors")
    assert gets
    assert all(request.range for request in gets)
    assert sum(request.sent for request in gets) <= 2**17 < size / 20
    assert not list((tmp_path / "home").rglob("model.safetensors"))


def pushed(hub: HubServer, repo: str) -> Mapping[str, bytes]:
    return {name: data for name, data in hub.files(repo).items() if name != ".gitattributes"}


def test_push(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [dense, "--rank", 16, "--device", "cpu", "--no-check", "--out", out]
    result = run(*line, "--push-to-hub", "owner/result", "--private")
    assert (result.code, result.err) == (0, ""), result
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert pushed(hub, "owner/result") == files
    assert {"config.json", "model.safetensors", "README.md", "modeling_polyglot_svd.py"} <= files.keys()
    assert hub.repos["owner/result"].private
    assert f"{hub.url}/owner/result" in result.out.replace("\n", "")

    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*line, "--push-to-hub", "owner/other", "--json")
    assert again.code == 0, again
    assert json.loads(again.out)["already_done"] is True
    assert "nothing to compute" in again.err
    assert pushed(hub, "owner/other") == files
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before

    alone = run("push", out, "owner/third", "--hub-revision", "draft")
    assert alone.code == 0, alone
    assert f"{hub.url}/owner/third" in alone.out
    third = {name: data for name, data in hub.files("owner/third", "draft").items() if name != ".gitattributes"}
    assert third == files
    assert not hub.repos["owner/third"].private


@pytest.mark.slow
def test_hub_from_a_process_of_its_own(dense: Path, factored: Path, tmp_path: Path) -> None:
    """Nothing of this process's patches: environment variables alone lead to the Hub."""
    with HubServer() as hub:
        hub.add("owner/tiny", dense)
        environment = hub_environment(hub, tmp_path / "home", token=WRITE_TOKEN)
        out = tmp_path / "out"
        done = process("owner/tiny", "--rank", 16, "--out", out, "--push-to-hub", "owner/result", **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert pushed(hub, "owner/result") == {path.name: path.read_bytes() for path in out.iterdir()}
        ours, theirs = read_weights(out), read_weights(factored)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name].float(), tensor.float(), atol=2e-2, rtol=2e-2)


def test_calibrated_conversion(run: Run, dense: Path, tmp_path: Path) -> None:
    """Text to statistics to model, and the same from the text at once; for kfac alone, a text is summed in float32."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"호랑이 {i} tiger {i * i}" for i in range(200)), encoding="utf-8")
    reading = ("--calib", text, "--calib-samples", 8, "--calib-length", 32)
    done = run("calibrate", dense, *reading, "--method", "whiten", "--out", tmp_path / "stats")
    assert done.code == 0
    assert "perplexity on the calibration text" in done.out
    arguments = ("--keep", 0.5, "--method", "whiten", "--layout", "pivoted", "--no-check")
    assert run(dense, *arguments, "--stats", tmp_path / "stats", "--out", tmp_path / "one").code == 0
    assert run(dense, *arguments, *reading, "--out", tmp_path / "two").code == 0
    one, two = (read_weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    refused = run(dense, *arguments, *reading, "--stats", tmp_path / "stats", "--out", tmp_path / "three")
    assert refused.code == 2
    assert "either --calib" in refused.err


@pytest.mark.parametrize("option", ["--calib-samples", "--seed", "--calib-batch-size"])
def test_an_option_of_a_text_without_a_text(option: str, run: Run, dense: Path, tmp_path: Path) -> None:
    done = run(dense, "--rank", 4, option, 3, "--out", tmp_path / "out")
    assert done.code == 2
    assert done.err == f"Error: {option} has no effect without --calib; give the text as well, or leave it out\n"


def test_ablate(run: Run, dense: Path, text: Path) -> None:
    done = run("ablate", dense, "--text", text, "--groups", 3, "--window", 32, "--json")
    rows = json.loads(done.out)
    assert [row["group"] for row in rows] == [0, 1, 2, 3]
    assert sum(row["energy"] for row in rows[1:]) == pytest.approx(1)
    table = run("ablate", dense, "--text", text, "--groups", 3, "--window", 32)
    assert f"{rows[1]['perplexity']:.2f}" in table.out


def test_verify_with_a_text(run: Run, factored: Path, dense: Path, text: Path) -> None:
    found = json.loads(run("verify", factored, "--against", dense, "--text", text, "--json").out)
    assert found["passed"]
    assert len(found["evaluations"]) == 2
    assert found["evaluations"][0]["parameters"] < found["evaluations"][1]["parameters"]
