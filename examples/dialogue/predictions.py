"""Files of generated answers: JSONL, whose first line may say how they were generated.

{"settings": {"model": "...", "template": "...", "decoding": {...}, ...}}
{"id": "d1_3", "prediction": "...", "prompt_tokens": 210, "new_tokens": 31, "finished": true}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.dialogue.schema import Sample, numbered_lines
from svdconvert.errors import InputError

Row = Mapping[str, Any]


def read_predictions(path: Path | str) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Settings (empty where the file says nothing) and answers by the id of their sample.

    Raises:
        InputError: the file cannot be read, a line is malformed, or an id is there twice.
    """
    settings, rows = read_rows(Path(path))
    return settings, {row["id"]: row["prediction"] for row in rows}


def read_rows(path: Path) -> tuple[Mapping[str, Any], list[Row]]:
    """Settings and rows of a file.

    Raises:
        InputError: as of :func:`read_predictions`.
    """
    settings: Mapping[str, Any] = {}
    rows: dict[str, Row] = {}
    for number, line in numbered_lines(path):
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}, is not valid JSON ({error}); correct it") from None
        if isinstance(entry, dict) and isinstance(entry.get("settings"), dict) and not rows and not settings:
            settings = entry["settings"]
            continue
        for name in ("id", "prediction"):
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise InputError(f"{path}, line {number}: the field {name!r} is missing or no text; correct it")
        if entry["id"] in rows:
            raise InputError(f"{path}, line {number}: the id {entry['id']!r} was there before; remove one of the two")
        rows[entry["id"]] = entry
    return settings, list(rows.values())


def pair(
    predictions: Mapping[str, str], samples: Sequence[Sample], *, partial: bool = False
) -> tuple[list[str], list[str]]:
    """Predictions and references in the order of the samples.

    Args:
        predictions: by the id of their sample.
        samples: with the references as their answers.
        partial: whether samples without a prediction are left out.

    Raises:
        InputError: a sample has no prediction or a prediction no sample.
    """
    known = {sample.id for sample in samples}
    unknown = [name for name in predictions if name not in known]
    if unknown:
        raise InputError(f"{len(unknown):,} predictions belong to no sample (first {unknown[0]}); give their own data")
    missing = [sample.id for sample in samples if sample.id not in predictions]
    if missing and not partial:
        raise InputError(
            f"{len(missing):,} of {len(samples):,} samples have no prediction (first {missing[0]}); "
            "generate them, or leave them out with --partial"
        )
    chosen = [sample for sample in samples if sample.id in predictions]
    return [predictions[sample.id] for sample in chosen], [sample.answer for sample in chosen]
