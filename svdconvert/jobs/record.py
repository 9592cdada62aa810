"""``svdconvert.json``: how a folder came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.fields import COUNT, FLAG, NUMBER, OBJECT, TEXT, either, many, optional, record, require, table
from svdconvert.machine.timing import StageTime
from svdconvert.sentences import asked
from svdconvert.storage.documents import in_json_types, read_json
from svdconvert.storage.source import Source
from svdconvert.version import versions

RECORD = "svdconvert.json"
# Beside it, where it was asked for: a page about the result.
REPORT = "report.html"
FORMAT = 1

# Field with the digest of the others, and fields that differ from run to run, at any depth.
SEAL, _TIMES = "digest", ("seconds", "timing")

# What to do about a damaged one.
ANEW = f"convert again with {asked('overwrite', True)}"
_TRIAL = {"kl": NUMBER, "added": NUMBER}
_BUDGET = {
    **_TRIAL,
    "dense_loss": NUMBER,
    "tokens": COUNT,
    "share": optional(NUMBER),
    "sizes": optional(many(record({"share": NUMBER, **_TRIAL}))),
    "rounds": optional(many(record(_TRIAL))),
    "tried": optional(many(record({"name": TEXT, **_TRIAL}))),
}
_MATRIX = {"rank": COUNT, "shape": many(COUNT), "relative_error": NUMBER}
_ROUNDED = {"bits": many(COUNT), "groups": many(COUNT), "shape": many(COUNT), "relative_error": NUMBER}
_JUDGED = {"kl": NUMBER, "added": NUMBER, "perplexity": optional(NUMBER)}
_HEALING = {
    "changed": FLAG,
    "before": record(_JUDGED),
    "after": record(_JUDGED),
    "dense_loss": NUMBER,
    "dense_perplexity": optional(NUMBER),
    "held_out_tokens": COUNT,
    "tokens": COUNT,
    "steps": COUNT,
    "lr": optional(NUMBER),
    "trained": optional(record({"factors": COUNT, "scales": COUNT})),
}
# Of a conversion whose result was healed: what it was before.
_TRAINING_FREE = {
    "matrices": table(record(_MATRIX)),
    "rounded": optional(table(record(_ROUNDED))),
    "predicted_loss": optional(NUMBER),
    "dense_loss": optional(NUMBER),
    "measured_loss": optional(NUMBER),
    "budget": optional(record(_BUDGET)),
}
_FIELDS = {
    "command": TEXT,
    "source": record({"name": TEXT}),
    "settings": OBJECT,
    "params": either(COUNT, record({"before": COUNT, "after": COUNT})),
    "matrices": optional(either(COUNT, table(record(_MATRIX)))),  # a densified model's were multiplied out
    "rounded": optional(table(record(_ROUNDED))),  # dense, in few bits
    "tensors": optional(table(TEXT)),  # since 0.2.0
    "predicted_loss": optional(NUMBER),
    "dense_loss": optional(NUMBER),
    "measured_loss": optional(NUMBER),
    "budget": optional(record(_BUDGET)),
    "healing": optional(record(_HEALING)),
    "training_free": optional(record(_TRAINING_FREE)),
    "timing": many(table(record({"wall_seconds": NUMBER, "cpu_seconds": NUMBER}))),
}


@dataclass(frozen=True)
class Origin:
    """The model that a result was made from.

    Attributes:
        name: its folder or repository.
        repo: repository id on the Hub, or None.
        commit: commit hash on the Hub, or None.
    """

    name: str
    repo: str | None = None
    commit: str | None = None

    @classmethod
    def of(cls, source: Source) -> Origin:
        """That of a source."""
        return cls(source.name, source.repo, source.commit)


@dataclass(frozen=True)
class Record:
    """What ``svdconvert.json`` holds.

    The same job always writes the same record, but for ``timing`` and the ``seconds`` of each matrix.

    Attributes:
        command: which of the tool's commands made the folder.
        source: the model it was made from.
        settings: what the result depends on.
        results: what that command reports, by name: ``params``, ``matrices``, losses.
        files: files of the folder, or None in a record of an early version.
        tensors: tensor -> digest of its data, hexadecimal; None in a record of a version before 0.2.0.
        timing: stages of the run that finished it, for each of its processes.
        versions: of svdconvert and the libraries that it stands on.
    """

    command: str
    source: Origin
    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    files: Sequence[str] | None
    tensors: Mapping[str, str] | None
    timing: Sequence[Mapping[str, StageTime]]
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_json(self) -> dict[str, Any]:
        """The record in JSON types, as it is written."""
        last = {"files": self.files, "tensors": self.tensors}
        document = {
            "format": FORMAT,
            "command": self.command,
            "versions": dict(self.versions),
            "source": asdict(self.source),
            "settings": dict(self.settings),
            **self.results,
            **{name: value for name, value in last.items() if value is not None},
            "timing": [{stage: time.to_json() for stage, time in stages.items()} for stages in self.timing],
        }
        return sealed(document)

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: object) -> Record:
        """What :meth:`to_json` gave, or a record of an earlier version.

        Args:
            document: the parsed JSON.
            where: its file, for messages.

        Raises:
            InputError: it lacks what a record has; the field is named.
        """
        require(document, _FIELDS, where, ANEW)
        results = dict(document)
        known = {*cls.__dataclass_fields__, "format", SEAL} - {"results"}
        fields = {name: results.pop(name, None) for name in known}
        return cls(
            command=fields["command"],
            source=Origin(**{name: fields["source"].get(name) for name in Origin.__dataclass_fields__}),
            settings=fields["settings"],
            results=results,
            files=fields["files"],
            tensors=fields["tensors"],
            timing=[
                {stage: StageTime.from_json(time) for stage, time in stages.items()} for stages in fields["timing"]
            ],
            versions=fields["versions"] or {},
        )


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of all that it says, by which a later change is noticed.

    Args:
        document: in JSON types; a digest that it has is replaced.
    """
    return {**{name: value for name, value in document.items() if name != SEAL}, SEAL: _digest(document)}


def is_changed(document: Mapping[str, Any]) -> bool:
    """Whether a record was changed since it was written; not known of one without a digest, of an earlier version."""
    return SEAL in document and document[SEAL] != _digest(document)


def _digest(document: Mapping[str, Any]) -> str:
    """Of what the same job always writes: without times."""
    said = in_json_types(_timeless({name: value for name, value in document.items() if name != SEAL}))
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _timeless(one) for name, one in value.items() if name not in _TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list | tuple) else value


def read_record(folder: Path) -> Record:
    """A finished result's record.

    Raises:
        InputError: there is none, or it lacks what a record has.
    """
    path = folder / RECORD
    missing = f"{folder} has no {RECORD}, so svdconvert did not write it"
    return Record.from_json(read_json(path, missing, ANEW), path)
