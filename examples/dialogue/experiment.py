"""The file that describes a table of runs, and the settings of each row."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.dialogue.settings import Settings, read_settings, read_toml
from svdconvert.errors import InputError

_ROW = "row:"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of the setting, as the table calls it.
        table: which table it stands in.
        config: settings file that its training is started with; written by :func:`read_experiment` where the row
            changes something.
        settings: what is in it.
        bits: a fully trained row is looked at in so many bits; 0: as it was trained.
        of: name of the row whose model this one looks at; its own otherwise.
        start: look at the model that the row ``of`` started from, before its training.
        svd, lora: marks of the paper's table.
        evaluated: whether it answers; a row of continued pre-training does not.
    """

    name: str
    table: str
    config: Path
    settings: Settings
    bits: int = 0
    of: str = ""
    start: bool = False
    svd: str = "X"
    lora: str = "X"
    evaluated: bool = True


@dataclass(frozen=True)
class Experiment:
    """What the table command does.

    Attributes:
        title: of the page.
        work: folder of everything but the page.
        page: folder of the page.
        profile: of the metrics.
        launcher: words before the training module, as ``["accelerate", "launch", "--config_file", "fsdp.yaml"]``;
            empty: this Python.
        threads: CPU threads of each process of a row; 0 leaves them to torch. One is the fastest for a model of a few
            million parameters, and gives the same figures on every machine of a kind.
        decoding: fields of :class:`examples.dialogue.generation.Decoding`.
        batch_size: prompts at a time.
        weights: type of the weights when a model is asked; empty: as in training.
        limit: validation samples to answer; 0: all.
        tables: name -> what stands above it.
        references: table -> its row that KL of the others is measured from, which stands before them.
        examples: questions whose answers stand on the page.
        full_size: whether the page counts the memory of the paper's models.
        remarks: paragraphs of the page, written by who ran it. ``{ROW.FIGURE}`` is replaced by a row's result, see
            :data:`examples.dialogue.page.FIGURES`.
        rows: in the order of the tables.
    """

    title: str
    work: Path
    page: Path
    profile: str = "ko"
    launcher: tuple[str, ...] = ()
    threads: int = 0
    decoding: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    weights: str = ""
    limit: int = 0
    tables: Mapping[str, str] = field(default_factory=dict)
    references: Mapping[str, str] = field(default_factory=dict)
    examples: int = 1
    full_size: bool = True
    remarks: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()


def read_experiment(path: Path) -> Experiment:
    """Read and check a table's file; writes the settings of rows that change some into the work folder.

    A row has ``name``, ``table`` and either ``settings``, a settings file, with changes under ``set``, or ``of``, the
    name of a row before it, with ``bits`` or ``start``. ``trained_by = "row:NAME"`` names the result of another row.

    Raises:
        InputError: something is missing, unknown or impossible.
    """
    table = read_toml(path.expanduser())
    folder = path.expanduser().resolve().parent
    rows = table.pop("rows", [])
    names = {one.name for one in dataclasses.fields(Experiment)} - {"rows"}
    unknown = table.keys() - names
    if unknown:
        raise InputError(f"{path} has an unknown setting {min(unknown)}; known are {', '.join(sorted(names))}")
    for needed in ("title", "work", "page"):
        if not isinstance(table.get(needed), str):
            raise InputError(f"{path} lacks the setting {needed}")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} has no [[rows]]")
    work = (folder / table["work"]).resolve()
    found: dict[str, Row] = {}
    for entry in rows:
        row = _row(entry, folder, work, found, path)
        if row.name in found:
            raise InputError(f"{path} has two rows named {row.name}")
        if row.table not in table.get("tables", {}):
            raise InputError(f"{path}: row {row.name} is of table {row.table!r}, which [tables] does not have")
        reference = table.get("references", {}).get(row.table, row.name)
        if reference != row.name and reference not in found:
            raise InputError(f"{path}: KL of row {row.name} is measured from {reference!r}, which is no row before it")
        found[row.name] = row
    lists: dict[str, Any] = {key: tuple(table[key]) for key in ("launcher", "remarks") if key in table}
    paths = {"work": work, "page": (folder / table["page"]).resolve()}
    values: dict[str, Any] = {**table, **lists, **paths}
    return Experiment(**values, rows=tuple(found.values()))


def _row(entry: Any, folder: Path, work: Path, before: Mapping[str, Row], path: Path) -> Row:
    known = {"name", "table", "settings", "set", "of", "bits", "start", "svd", "lora", "evaluated"}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or "table" not in entry:
        raise InputError(f"{path}: a row needs a name and a table")
    name = entry["name"]
    if entry.keys() - known:
        raise InputError(f"{path}: row {name} has an unknown setting {min(entry.keys() - known)}")
    marks = {key: entry[key] for key in ("svd", "lora", "evaluated") if key in entry}
    if "of" in entry:
        if entry["of"] not in before:
            raise InputError(f"{path}: row {name} is of {entry['of']!r}, which is no row before it")
        of = before[entry["of"]]
        bits, start = int(entry.get("bits", 0)), bool(entry.get("start", False))
        return Row(name, entry["table"], of.config, of.settings, bits, of.name, start, **marks)
    if "settings" not in entry:
        raise InputError(f"{path}: row {name} needs settings, a settings file, or of, another row")
    config = (folder / entry["settings"]).resolve()
    changes = json.loads(json.dumps(entry.get("set", {})))
    if changes:
        for section, key in (("model", "trained_by"), ("distillation", "teacher_trained_by")):
            value = changes.get(section, {}).get(key, "")
            if value.startswith(_ROW):
                other = value.removeprefix(_ROW)
                if other not in before:
                    raise InputError(f"{path}: row {name} starts from {other!r}, which is no row before it")
                changes[section][key] = str(before[other].config)
        if changes.get("model", {}).get("trained_by"):
            changes["model"]["path"] = ""
        settings = read_settings(config, changes | {"name": name, "output": str(work / "rows" / name)}, folder)
        config = work / "settings" / f"{name}.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        partial = config.with_name(config.name + ".writing")
        partial.write_text(json.dumps(settings.to_json(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(config)
    else:
        settings = read_settings(config)
    return Row(name, entry["table"], config, settings, **marks)
