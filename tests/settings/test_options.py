"""The command line and the library have the same options and defaults, and a card's command makes the same again."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from support.checkpoints import read_weights

import svdconvert
from svdconvert import Calibration
from svdconvert.cli.app import main
from svdconvert.cli.fields import parameter_name
from svdconvert.settings.options import BY_KEYWORD, FIELDS, option_name
from svdconvert.words import parse_size, size_text

COMMAND = main.commands["convert"]
SIGNATURE = inspect.signature(svdconvert.convert).parameters


def test_every_option_is_a_field_or_the_programs_own() -> None:
    flags = {parameter.opts[-1] for parameter in COMMAND.params if isinstance(parameter, click.Option)}
    assert flags - {one.option.flag for one in FIELDS} == {"--out", "--dry-run", "--json", "--quiet", "--verbose"}
    assert flags >= {one.option.flag for one in FIELDS}


def test_settings_need_neither_torch_nor_click() -> None:
    program = "import sys, svdconvert.settings.conversion; print({'torch', 'click', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"set()\n"


def test_every_keyword_is_a_field() -> None:
    keywords = set(SIGNATURE) - {"model", "out", "events", "calibration"}
    assert keywords == {keyword for keyword in BY_KEYWORD if "." not in keyword}
    assert {f"calibration.{field.name}" for field in fields(Calibration)} == {
        keyword for keyword in BY_KEYWORD if "." in keyword
    }


@pytest.mark.parametrize("keyword", BY_KEYWORD)
def test_defaults_are_those_of_the_library(keyword: str) -> None:
    setting = BY_KEYWORD[keyword]
    default = setting.option.default
    if "." in keyword:
        (field,) = (field for field in fields(Calibration) if field.name == setting.field)
        assert keyword == "calibration.text" or field.default == default
    else:
        assert setting.option.read(SIGNATURE[keyword].default) == default
    given = COMMAND.make_context("convert", ["MODEL"]).params[parameter_name(setting.option)]
    if default is True:
        assert given is False, "a flag that turns it off is not given"
    else:
        assert setting.option.read(given) == (() if setting.option.repeatable else default)


def test_names_of_options() -> None:
    assert option_name("share_layers") == "--share-layers"
    assert option_name("calibration") == option_name("calibration.text") == "--calib"
    assert option_name("max_shard_size") == "--max-shard-size"
    assert option_name("methods") == "--method"
    assert option_name("window") == "--window"


def test_cards_of_other_jobs_tell_the_size_of_files(
    factored: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]
) -> None:
    for number, (options, line) in enumerate(
        [
            ((), "svdconvert densify MODEL --out DIR"),
            (("--max-shard-size", "40KiB"), "svdconvert densify MODEL --max-shard-size 40KiB --out DIR"),
        ]
    ):
        out = tmp_path / str(number)
        assert run("densify", factored, *options, "--device", "cpu", "--out", out).code == 0
        assert line in (out / "README.md").read_text(encoding="utf-8").splitlines()


COMMANDS = ["plan", "sweep", "calibrate", "densify", "fold", "heal", "evaluate", "ablate", "spectrum", "options"]
# What the library calls otherwise, or leaves to the program.
OPPOSITE = {"no_plot": "plot"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_and_functions_have_the_same_defaults(command: str) -> None:
    function = inspect.signature(getattr(svdconvert, command)).parameters
    own = main.commands[command]
    needed = [word for param in own.params if param.required for word in (*param.opts[-1:], "x") if word[0] in "-x"]
    given = own.make_context(command, needed).params
    compared = 0
    for parameter in own.params:
        name = OPPOSITE.get(parameter.name, parameter.name)
        if name not in function or function[name].default is inspect.Parameter.empty:
            continue
        ours, theirs = given[parameter.name], function[name].default
        if parameter.name in OPPOSITE:
            ours = not ours
        if parameter.multiple or isinstance(theirs, tuple | list):
            ours, theirs = tuple(ours or ()), tuple(theirs or ())
        assert ours == theirs, (command, name)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("1GiB", 2**30),
        ("1.5 gib", 3 * 2**29),
        ("2Mi", 2**21),
        ("4KiB", 4096),
        ("30kB", 30_000),
        ("30KB", 30_000),
        ("1TiB", 2**40),
        ("1TB", 10**12),
        ("123456", 123_456),
        ("123456B", 123_456),
        ("0.5MB", 500_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(size_text(size)) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "5iB", "-1GB", "5 G B", "999", "1e9", "5GBB", "nan", "1 PiB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(svdconvert.InputError, match="is not a size; write for example 5GB"):
        parse_size(text)


@pytest.mark.parametrize(
    "options",
    [
        ["--rank", "8", "--rank", "attention.dense=12", "--targets", "attention.*", "--targets", "mlp.dense_4h_to_h"],
        ["--keep", "0.41", "--max-shard-size", "50KiB", "--work", "WORK"],
        ["--keep", "0.5", "--calib", "TEXT", "--allocation", "uniform", "--labels", "sampled", "--seed", "3"],
        ["--keep", "0.5", "--calib", "TEXT", "--method", "whiten", "--shrinkage", "0.3", "--calib-batch-size", "3"],
        ["--rank", "16", "--calib", "TEXT", "--calib-field", "body", "--refit", "sequential", "--method", "svd"],
        ["--params", "100000", "--method", "svd", "--allocation", "global", "--layout", "pivoted"],
        ["--keep", "0.5", "--method", "kfac", "--stats", "STATS", "--dtype", "float32"],
        ["--rank", "12", "--method", "svd", "--calib", "TEXT", "--heal", "--heal-epochs", "2"],
        ["--rank", "12", "--calib", "TEXT", "--heal", "--heal-calib", "HEALTEXT", "--heal-samples", "200"],
    ],
    ids=lambda options: " ".join(options[:1] + options[-2:]),
)
def test_the_command_of_a_card_makes_the_same_weights(
    options: list[str], dense: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]
) -> None:
    import json

    text, other, stats = tmp_path / "text.jsonl", tmp_path / "other.txt", tmp_path / "stats"
    rows = [{"text": f"mountain {i} tiger {i * i}", "body": f"호랑이 {i * 7} {i} old"} for i in range(300)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    other.write_text("\n\n".join(f"old {i} mountain {i % 7} tiger" for i in range(60)))
    reading = ["--calib-samples", "6", "--calib-length", "24"]
    places = {"TEXT": str(text), "HEALTEXT": str(other), "STATS": str(stats), "WORK": str(tmp_path / "work")}
    if "STATS" in options:
        done = run("calibrate", dense, "--calib", text, *reading, "--out", stats)
        assert done.code == 0, done
    rest = ["--device", "cpu", "--no-check"]

    def convert(words: list[str], out: Path) -> dict[str, Any]:
        done = run(*(places.get(word, word) for word in words), *rest, "--out", out)
        assert (done.code, done.err) == (0, ""), done
        return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}

    out = tmp_path / "first"
    first = convert([str(dense), *options, *(reading if "TEXT" in options else [])], out)
    card = (out / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^svdconvert .*", card, re.MULTILINE)
    program, model, *words = shlex.split(line)
    assert (program, model, words[-2:]) == ("svdconvert", dense.name, ["--out", "DIR"])
    assert str(tmp_path) not in line
    assert convert([str(dense), *words[:-2]], tmp_path / "again") == first
    assert read_weights(out)
