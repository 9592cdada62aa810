"""One request: its command asks for the same again, and its key is that of results from before it was one object."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdconvert import Calibration, Events, InputError
from svdconvert.cli.app import main
from svdconvert.cli.fields import conversion_of
from svdconvert.commands.conversion_job import repeatable
from svdconvert.commands.work import Work
from svdconvert.settings.afterwards import Afterwards
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.hub import Hub
from svdconvert.settings.options import SECTIONS
from svdconvert.settings.output import DTYPES, Output
from svdconvert.settings.recipe import ALLOCATIONS, REFITS, Recipe
from svdconvert.settings.row import options_of
from svdconvert.settings.runtime import Runtime
from svdconvert.settings.scope import Scope
from svdconvert.settings.size import USES, Size
from svdconvert.settings.text import LABELS, Stats, Text

COMMAND = main.commands["convert"]
# Results of the commit 53a5e07, which had no such object: options, settings of svdconvert.json, command of the card.
RECORDED: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded.json").read_text())


def parsed(line: str) -> Conversion:
    """What the command line makes of a command that begins with `svdconvert MODEL`."""
    program, *words = shlex.split(line)
    assert program == "svdconvert"
    values = COMMAND.make_context("convert", words).params
    own = ("model", "out", "dry_run", "as_json", "verbose", "quiet")
    return conversion_of({name: value for name, value in values.items() if name not in own})


words = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=12)
counts = st.integers(1, 10**6)
shares = st.floats(0, 1)
patterns = words.filter(lambda text: "=" not in text and text != "*")
sizes = st.one_of(
    st.builds(Size, rank=counts | st.none(), patterns=st.dictionaries(patterns, counts, max_size=3)),
    st.builds(Size, keep=shares, multiple=counts, factor_all=st.booleans()),
    st.builds(Size, params=counts),
    st.builds(Size, fit=counts, fit_context=counts | st.none(), fit_for=st.sampled_from(USES)),
    st.builds(Size, max_loss=shares),
    st.builds(Size, max_kl=shares),
)
recipes = st.builds(
    Recipe,
    method=st.sampled_from(["svd", "asvd", "kfac", "drone"]) | st.none(),
    layout=st.sampled_from(["balanced", "pivoted"]),
    solver=st.sampled_from(["exact", "fast"]),
    alpha=shares | st.none(),
    shrinkage=shares | st.none(),
    allocation=st.sampled_from(ALLOCATIONS) | st.none(),
    refit=st.sampled_from(REFITS),
)
texts = st.builds(
    Calibration,
    text=words,
    field=words | st.none(),
    samples=counts,
    length=st.integers(2, 4096) | st.none(),
    seed=st.integers(-(2**31), 2**31),
    batch_size=counts,
    labels=st.sampled_from(LABELS),
)
# A leading `~` has been read by then.
folders = words.filter(lambda text: not text.startswith("~")).map(Path)
told = st.builds(
    Conversion,
    size=sizes,
    scope=st.builds(
        Scope,
        targets=st.lists(words, max_size=3).map(tuple),
        split_fused=st.booleans(),
        share_layers=counts,
        share_experts=st.booleans(),
    ),
    recipe=recipes,
    calibration=texts | st.builds(Stats, folders) | st.none(),
    afterwards=st.builds(
        Afterwards, heal=st.booleans(), text=words | st.none(), samples=counts | st.none(), epochs=shares | st.none()
    ),
    output=st.builds(Output, dtype=st.sampled_from(DTYPES), max_shard_bytes=st.integers(1000, 2**45)),
    runtime=st.builds(Runtime, work=folders | st.none()),
    hub=st.builds(Hub, revision=words | st.none()),
)


@given(told)
def test_the_command_asks_for_the_same(request: Conversion) -> None:
    again = parsed(request.command("owner/name"))
    assert again == request
    # The last match wins, and equal mappings may differ in order.
    assert list(again.size.patterns) == list(request.size.patterns)


@given(told)
def test_json(request: Conversion) -> None:
    told = request.to_json()
    assert json.loads(json.dumps(told)) == told
    assert set(told) == {field.name for field in fields(Conversion)}


# Each field by itself, so that none can be forgotten.
OTHER: Mapping[type, Mapping[str, Any]] = {
    Size: {
        "rank": 7,
        "patterns": {"a.b": 3},
        "keep": 0.1 + 0.2,
        "params": 77,
        "bytes": 0.1 + 0.2,
        "widths": (16, 8),
        "fit": 8_000_000_000,
        "fit_context": 100,
        "fit_for": "training",
        "max_loss": 0.05,
        "max_kl": 0.1,
        "multiple": 8,
        "factor_all": True,
    },
    Scope: {"targets": ("one", "two words"), "split_fused": True, "share_layers": 2, "share_experts": True},
    Recipe: {
        "method": "kfac",
        "layout": "pivoted",
        "solver": "fast",
        "alpha": 0.0,
        "shrinkage": 0.0,
        "allocation": "uniform",
        "refit": "sequential",
    },
    Text: {"text": "t", "field": "f", "samples": 3, "length": 3, "seed": 3, "batch_size": 3, "labels": "sampled"},
    Stats: {"folder": Path("s")},
    Afterwards: {"heal": True, "text": "t", "samples": 3, "epochs": 0.5},
    Output: {"dtype": "float16", "max_shard_bytes": 12_345_678, "overwrite": True, "check": False, "report": True},
    Runtime: {"device": "cpu", "workers": 3, "work": Path("w"), "keep_work": True},
    Hub: {"revision": "r", "push_to": "owner/name", "private": True, "push_revision": "b"},
}
FIELDS = [(section, field.name) for section in SECTIONS for field in fields(section)]


def with_field(section: type, name: str, value: Any) -> Conversion:
    """The plain request with one field changed."""
    if section is Text:
        return Conversion(calibration=Calibration(**{"text": "TEXT", name: value}))
    if section is Stats:
        return Conversion(calibration=Stats(value))
    return replace(Conversion(), **{section.__name__.lower(): section(**{name: value})})


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[f"{s.__name__}.{name}" for s, name in FIELDS])
def test_every_field_is_in_the_command_or_said_to_be_left_out(section: type, name: str) -> None:
    request = with_field(section, name, OTHER[section][name])
    option = options_of(section)[name]
    line = request.command("MODEL")
    if option.omitted_because:
        assert len(option.omitted_because) > 10
        assert line == "svdconvert MODEL --out DIR"
    else:
        assert option.flag in shlex.split(line)
        assert parsed(line) == request


def test_the_plain_command() -> None:
    assert Conversion().command("MODEL") == "svdconvert MODEL --out DIR"
    assert parsed("svdconvert MODEL") == Conversion() == Conversion.of()


def test_keywords() -> None:
    request = Conversion.of(
        rank={"a": 3, "*": 5}, targets=["x"], max_shard_size="1GB", params="1.4B", stats="~/s", check=False
    )
    assert (request.size.rank, request.size.patterns, request.size.params) == (5, {"a": 3}, 1_400_000_000)
    assert request.scope.targets == ("x",)
    assert request.output == Output(max_shard_bytes=10**9, check=False)
    assert request.calibration == Stats(Path.home() / "s")
    assert Conversion.of(targets="mlp.*").scope.targets == ("mlp.*",)
    assert Conversion.of(rank={"a": 3}) == Conversion(size=Size(None, {"a": 3}))


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("ranks", "a conversion has no setting 'ranks'; did you mean 'rank'?"),
        ("share_layer", "a conversion has no setting 'share_layer'; did you mean 'share_layers'?"),
        ("calibrations", "a conversion has no setting 'calibrations'; did you mean 'calibration'?"),
        ("zzz", "a conversion has no setting 'zzz'"),
        ("patterns", "a conversion has no setting 'patterns'"),
    ],
)
def test_unknown_words(word: str, text: str) -> None:
    with pytest.raises(InputError) as error:
        Conversion.of(keep=0.5, **{word: 1})
    assert str(error.value).startswith(text)


@pytest.mark.parametrize(
    ("keywords", "method", "allocation", "options"),
    [
        ({"keep": 0.5}, "svd", "uniform", {}),
        ({"keep": 0.5, "calibration": Calibration("t")}, "kfac", "global", {"shrinkage": 0.2}),
        ({"rank": 5, "stats": "s"}, "kfac", "uniform", {"shrinkage": 0.2}),
        ({"rank": {"a": 5}, "stats": "s"}, "kfac", "uniform", {"shrinkage": 0.2}),
        ({"rank": 5, "stats": "s", "allocation": "global"}, "kfac", "global", {"shrinkage": 0.2}),
        ({"keep": 0.5, "stats": "s", "method": "drone"}, "whiten", "uniform", {"shrinkage": 0.0}),
        ({"keep": 0.5, "stats": "s", "method": "asvd", "alpha": 0.3}, "asvd", "uniform", {"alpha": 0.3}),
    ],
)
def test_settled(keywords: dict[str, Any], method: str, allocation: str, options: dict[str, float]) -> None:
    request = Conversion.of(**keywords)
    settled = request.settled()
    assert (settled.recipe.method, settled.recipe.allocation) == (method, allocation)
    assert {name: value for name, value in settled.recipe.given.items() if value is not None} == options
    assert settled.settled() == settled
    assert settled.key() == request.key()


@pytest.mark.parametrize("row", RECORDED, ids=[" ".join(row["options"]) for row in RECORDED])
def test_recorded_results(row: dict[str, Any]) -> None:
    """The settings block of svdconvert.json, name by name, and the request that the card's command made."""
    request = parsed(shlex.join(["svdconvert", "MODEL", *row["options"]]))
    settings, text = row["settings"], None
    if request.calibration is not None:
        text = {name: settings[name] for name in ("calibration", "tokens", "samples", "length", "labels", "seed")}
    assert json.loads(json.dumps(request.key(text))) == settings
    knowledge: Any = None if text is None else SimpleNamespace(repeatable=replace(request.calibration, text="TEXT"))
    source: Any = SimpleNamespace(commit=None)
    work = Work(source, request.settled(), knowledge, Path("out"), "cpu", Events())
    assert repeatable(work) == parsed(row["command"])
    assert repeatable(work).settled() == replace(request.settled(), calibration=repeatable(work).calibration)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"split_fused": "no"}, "split_fused='no' is neither True nor False"),
        ({"factor_all": 1}, "factor_all=1 is neither True nor False"),
        ({"overwrite": None}, "overwrite=None is neither True nor False"),
        ({"targets": [3]}, "targets=.3. is no list of patterns"),
        ({"targets": None}, "targets=None is no list of patterns"),
        ({"rank": {3: 4}}, "a pattern that is not text"),
        ({"params": [1]}, "params=.1. is not a number of parameters"),
        ({"params": True}, "params=True is not a number of parameters"),
        ({"revision": 5}, "revision=5 is not text"),
        ({"work": 3}, "3 is not a path"),
        ({"heal_calib": ""}, "is empty"),
    ],
)
def test_values_of_the_wrong_kind(keywords: dict[str, Any], words: str) -> None:
    """A text is not taken for the truth, nor a number for a name."""
    with pytest.raises(InputError, match=words):
        Conversion.of(**keywords)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"samples": "4"}, "calibration.samples='4' is not a whole number"),
        ({"samples": 4.0}, "calibration.samples=4.0 is not a whole number"),
        ({"length": True}, "calibration.length=True is not a whole number"),
        ({"seed": "a"}, "calibration.seed='a' is not a whole number"),
        ({"labels": "x"}, "calibration.labels='x' is unknown; choose empirical or sampled"),
        ({"field": 3}, "calibration.field=3 is not text"),
    ],
)
def test_calibrations_of_the_wrong_kind(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Calibration("text.txt", **fields)


def test_a_path_as_a_text() -> None:
    assert Calibration(Path("a") / "text.txt") == Calibration("a/text.txt")  # type: ignore[arg-type]
