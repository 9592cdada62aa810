"""The table of options: the program and the library have its defaults, and a card's command makes the same again."""

from __future__ import annotations

import inspect
import re
import shlex
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
from svdconvert.settings.options import BY_NAME, OPTIONS, repeating_command
from svdconvert.words import parse_size, size_text

COMMAND = main.commands["convert"]


def parsed(line: str) -> dict[str, Any]:
    """What click makes of a command line that begins with `svdconvert MODEL`."""
    program, *words = shlex.split(line)
    assert program == "svdconvert"
    return COMMAND.make_context("convert", words).params


def click_options() -> dict[str, click.Option]:
    return {opt.opts[-1]: opt for opt in COMMAND.params if isinstance(opt, click.Option)}


def another_value(option: click.Option) -> Any:
    """A value that is not the default."""
    if option.is_flag:
        return True
    if isinstance(option.type, click.Choice):
        return next(choice for choice in option.type.choices if choice != option.default)
    if option.multiple:
        return ("one", "two words=3", "layers.0.*=7")
    if option.name == "max_shard_size":
        return 12_345_678
    kinds = {click.types.IntParamType: 77, click.types.IntRange: 77, click.types.FloatParamType: 0.1 + 0.2}
    return kinds.get(type(option.type), f"some {option.name}")


def test_the_table_is_complete() -> None:
    assert [option.name for option in OPTIONS] == list(BY_NAME)
    assert set(click_options()) == set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_every_option_is_in_the_command_or_said_to_be_left_out(name: str) -> None:
    """Each by itself at a value that is not its default: told, and read back as it was; or with a reason not told."""
    option = click_options()[name]
    plain = {
        row.name: 5_000_000_000 if row.name == "--max-shard-size" else row.default
        for row in OPTIONS
        if not row.why_untold
    }
    defaults = parsed(repeating_command("MODEL", plain))
    assert repeating_command("MODEL", plain) == "svdconvert MODEL --out DIR"
    if BY_NAME[name].why_untold:
        with pytest.raises(AssertionError):
            repeating_command("MODEL", plain | {name: another_value(option)})
        return
    value = another_value(option)
    line = repeating_command("MODEL", plain | {name: value})
    assert name in shlex.split(line)
    again = parsed(line)
    changed = {key for key in again if again[key] != defaults[key]}
    assert changed == {option.name}
    read = again[option.name]
    if name == "--max-shard-size":
        assert parse_size(read) == value
    else:
        assert (str(read) if isinstance(read, Path) else read) == value


def test_all_options_at_once() -> None:
    values = {row.name: another_value(click_options()[row.name]) for row in OPTIONS if not row.why_untold}
    again = parsed(repeating_command("owner/name", values))
    for name, value in values.items():
        read = again[click_options()[name].name]
        assert (
            parse_size(read) if name == "--max-shard-size" else str(read) if isinstance(read, Path) else read
        ) == value


def test_a_forgotten_option_is_an_error() -> None:
    with pytest.raises(AssertionError, match="--labels"):
        repeating_command("MODEL", {row.name: None for row in OPTIONS if not row.why_untold and row.name != "--labels"})


@pytest.mark.parametrize("name", BY_NAME)
def test_defaults_are_those_of_the_library(name: str) -> None:
    row = BY_NAME[name]
    assert parsed("svdconvert MODEL")[click_options()[name].name] == row.default
    if row.keyword.startswith("calibration."):
        (field,) = (field for field in fields(Calibration) if field.name == row.keyword.partition(".")[2])
        assert field.name == "text" or field.default == row.default
    elif row.keyword and row.keyword != "out":
        default = inspect.signature(svdconvert.convert).parameters[row.keyword].default
        expected = {"--rank": None, "--no-check": True}.get(name, row.default)
        assert default == expected


def test_every_keyword_is_in_the_table() -> None:
    keywords = set(inspect.signature(svdconvert.convert).parameters) - {"model", "events", "calibration"}
    assert keywords == {row.keyword for row in OPTIONS if row.keyword and "." not in row.keyword}
    assert {f"calibration.{field.name}" for field in fields(Calibration)} == {
        row.keyword for row in OPTIONS if "." in row.keyword
    }


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


# What the library calls otherwise, or leaves to the program.
RENAMED = {"ranks": "rank"}
OPPOSITE = {"no_plot": "plot"}


@pytest.mark.parametrize("command", ["plan", "sweep", "calibrate", "densify", "fold", "evaluate", "ablate", "spectrum"])
def test_commands_and_functions_have_the_same_defaults(command: str) -> None:
    function = inspect.signature(getattr(svdconvert, command)).parameters
    own = main.commands[command]
    needed = [word for param in own.params if param.required for word in (*param.opts[-1:], "x") if word[0] in "-x"]
    given = own.make_context(command, needed).params
    compared = 0
    for parameter in own.params:
        name = OPPOSITE.get(parameter.name, RENAMED.get(parameter.name, parameter.name))
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
    ],
    ids=lambda options: " ".join(options[:1] + options[-2:]),
)
def test_the_command_of_a_card_makes_the_same_weights(
    options: list[str], dense: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]
) -> None:
    import json

    text, stats = tmp_path / "text.jsonl", tmp_path / "stats"
    rows = [{"text": f"mountain {i} tiger {i * i}", "body": f"호랑이 {i * 7} {i} old"} for i in range(300)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reading = ["--calib-samples", "6", "--calib-length", "24"]
    places = {"TEXT": str(text), "STATS": str(stats), "WORK": str(tmp_path / "work")}
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
