"""Messages of the library as the command line shows them, and as a Python program reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from svdconvert import InputError, convert
from svdconvert.cli.app import main
from svdconvert.cli.progress import TerminalEvents
from svdconvert.cli.screen import print_json
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.options import BY_KEYWORD, option_name
from svdconvert.settings.told import in_options, told


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("share_layers", 3, "--share-layers 3"),
        ("share_layers", ..., "--share-layers"),
        ("keep", 2.0, "--keep 2"),
        ("keep", 0.1, "--keep 0.1"),
        ("split_fused", True, "--split-fused"),
        ("split_fused", False, "no --split-fused"),
        ("check", False, "--no-check"),
        ("check", True, "no --no-check"),
        ("plot", False, "--no-plot"),
        ("stats", None, "no --stats"),
        ("out", "a b", "--out 'a b'"),
        ("rank", 5, "--rank 5"),
        ("rank", {"attention.dense": 4}, "--rank attention.dense=4"),
        ("rank", {"layers.0.*": 4, "*": 7}, "--rank 'layers.0.*=4' --rank 7"),
        ("rank", [128, 256], "--rank 128,256"),
        ("keep", [0.5, 1.0], "--keep 0.5,1"),
        ("targets", ["mlp", "a*"], "--targets mlp --targets 'a*'"),
        ("methods", ["svd"], "--method svd"),
        ("calibration", ..., "--calib"),
        ("calibration.text", "t.txt", "--calib t.txt"),
        ("calibration.batch_size", ..., "--calib-batch-size"),
        ("calibration.labels", "sampled", "--labels sampled"),
        ("window", 8, "--window 8"),
    ],
)
def test_words(field: str, value: Any, text: str) -> None:
    assert in_options(field, value) == text
    assert told(Sentence(f"{asked(field, value)} is wrong")) == f"{text} is wrong"


def test_every_keyword_is_an_option() -> None:
    known = {name for parameter in main.commands["convert"].params for name in parameter.opts}
    for keyword, setting in BY_KEYWORD.items():
        assert setting.option.flag in known
        assert option_name(keyword) == setting.option.flag


def test_other_texts_stay() -> None:
    assert told("share_layers=3 is a plain text") == "share_layers=3 is a plain text"


def test_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Raised by the library, shown by the program."""

    @click.command()
    def failing() -> None:
        raise InputError(f"{asked('share_layers', 3)} does not go with {asked('layout', 'pivoted')}")

    monkeypatch.setitem(main.commands, "failing", failing)
    found = CliRunner().invoke(main, ["failing"])
    assert found.exit_code == 2
    assert found.output == "Error: --share-layers 3 does not go with --layout pivoted\n"


def test_notes(capsys: pytest.CaptureFixture[str]) -> None:
    note = Sentence(f"it loses more than {asked('allocation', 'uniform')}")
    stream = io.StringIO()
    with TerminalEvents(Console(file=stream, width=200)) as events:
        events.note(note)
    assert stream.getvalue().rstrip() == "note: it loses more than --allocation uniform"
    print_json({"notes": [note], "of": {"more": (note,), "rank": 3}})
    assert json.loads(capsys.readouterr().out) == {
        "notes": ["it loses more than --allocation uniform"],
        "of": {"more": ["it loses more than --allocation uniform"], "rank": 3},
    }


def test_python_reads_keywords(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        convert(tmp_path, tmp_path / "out", keep=2.0)
    assert str(error.value) == "keep=2.0 must lie between 0 and 1 (the fraction of target parameters kept)"
    assert error.value.fields == ("keep",)
