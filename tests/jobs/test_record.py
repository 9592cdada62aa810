"""svdconvert.json as an object: what is written is what is read, and early records are read too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from svdconvert import InputError
from svdconvert.jobs.record import Origin, Record, is_changed, sealed
from svdconvert.machine.timing import StageTime

RECORD = Record(
    command="convert",
    source=Origin("EleutherAI/polyglot-ko-1.3b", "EleutherAI/polyglot-ko-1.3b", "abc"),
    settings={"method": "svd", "rank": 16},
    results={"params": {"before": 10, "after": 5}, "matrices": {}, "measured_loss": 0.5},
    files=["config.json", "model.safetensors"],
    tensors={"embed": "00ff"},
    timing=[{"read": StageTime(1.5, 0.25), "solve": StageTime(2.0, 4.0, workers=2)}],
)


def test_what_is_written_is_read() -> None:
    document = RECORD.to_json()
    assert list(document)[:5] == ["format", "command", "versions", "source", "settings"]
    assert document["timing"] == [
        {
            "read": {"wall_seconds": 1.5, "cpu_seconds": 0.25},
            "solve": {"wall_seconds": 2.0, "cpu_seconds": 4.0, "workers": 2},
        }
    ]
    assert document["measured_loss"] == 0.5
    assert Record.from_json(document, "it") == RECORD


def test_a_record_without_digests_stays_without() -> None:
    early = replace(RECORD, tensors=None, files=None)
    assert not {"tensors", "files"} & early.to_json().keys()
    assert Record.from_json(early.to_json(), "it") == early


def test_a_change_is_noticed_in_what_does_not_differ_from_run_to_run() -> None:
    document = RECORD.to_json()
    later = replace(RECORD, timing=[{"read": StageTime(3.0, 3.0)}]).to_json()
    assert later["digest"] == document["digest"]
    read = json.loads(json.dumps(document, indent=2))
    assert not is_changed(read)
    assert is_changed(read | {"measured_loss": 0.4})
    assert is_changed({name: value for name, value in read.items() if name != "files"})
    early = {name: value for name, value in read.items() if name != "digest"}
    assert not is_changed(early), "not known"
    assert sealed(early) == read


@pytest.mark.parametrize("field", ["command", "source", "settings", "params", "timing"])
def test_a_missing_field_is_named(field: str) -> None:
    document = {name: value for name, value in RECORD.to_json().items() if name != field}
    with pytest.raises(InputError, match=f"out/svdconvert.json is damaged: it has no '{field}'"):
        Record.from_json(document, Path("out/svdconvert.json"))
