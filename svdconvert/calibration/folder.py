"""Statistics kept in a folder, and the key that says what they are statistics of."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.calibration.collector import statistic_tensors
from svdconvert.calibration.presence import no_statistics
from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.fields import COUNT, FLAG, NUMBER, OBJECT, TEXT, WHOLE, Kind, nullable, optional, record, require, table
from svdconvert.machine.processes import current
from svdconvert.methods.statistics import STATISTICS, ModuleStatistics, Needs
from svdconvert.models.activations import LOSS, Loss
from svdconvert.names import layer_number
from svdconvert.storage.differences import refuse_other_settings
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import in_json_types, read_json
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import read_tensors, sealed, unseal, write_tensors
from svdconvert.version import __version__
from svdconvert.words import listing

TOKENS = "tokens.safetensors"

# What to do about a damaged file.
_AGAIN = "give another folder and run `svdconvert calibrate` again"

_KEY = {
    "text": TEXT,
    "tokens": TEXT,
    "tokenizer": TEXT,
    "samples": COUNT,
    "length": COUNT,
    "packed": FLAG,
    "seed": WHOLE,
    "labels": optional(TEXT),
}
_FILE = Kind("a block's file", lambda value: re.fullmatch(r"block-\d+(-\d+)?\.safetensors", str(value)) is not None)
_MODULE = record(
    {"tokens": NUMBER, "samples": NUMBER, "file": optional(_FILE), **dict.fromkeys(STATISTICS, optional(TEXT))}
)
_BLOCK = record({"file": _FILE, "modules": table(_MODULE), "parts": optional(COUNT), "broken_off": optional(FLAG)})
_STATE = {
    "key": OBJECT,
    "loss": nullable(LOSS),
    "blocks": Kind("blocks by number", lambda value: table(_BLOCK).fits(value) and all(map(str.isdecimal, value))),
}

_FIELDS: Mapping[str, str] = {
    "model": "another model",
    "tokenizer": "another tokenizer",
    "text": "another calibration text",
    "tokens": "another calibration text",
    "version": "another version of svdconvert",
    "length": "another length of sequences",
    "samples": "another number of sequences",
    "packed": "another packing",
    "labels": "other labels",
    "label_seed": "another seed of the labels",
    "dtype": "another data type",
    "needs": "other kinds",
}


def statistics_key(
    source: Source,
    tokens: CalibrationTokens,
    needs: Needs,
    *,
    labels: str = "empirical",
    seed: int = 0,
) -> dict[str, Any]:
    """What statistics depend on, in JSON types: the key of a :class:`StatisticsFolder`."""
    return {
        "model": model_key(source),
        "tokenizer": tokens.tokenizer_digest,
        "text": tokens.text_digest,
        "tokens": tokens.digest,
        "samples": tokens.ids.shape[0],
        "length": tokens.ids.shape[1],
        "packed": True,  # there is no other way; the field stays, so that earlier statistics hold
        "seed": tokens.seed,
        "labels": labels if needs.gradients else None,
        "label_seed": seed if needs.gradients and labels == "sampled" else None,
        "dtype": "float32",  # what blocks compute in, see StatisticsRun
        "needs": asdict(needs),
        "version": __version__,
    }


def model_key(source: Source) -> str:
    """Digest of a model's config, headers and content, the same for a copy of the model."""
    digest = hashlib.blake2b(digest_size=16)
    tensors = [[info.name, info.dtype, list(info.shape)] for _, info in sorted(source.tensors.items())]
    digest.update(json.dumps([dict(source.config), tensors, source.identity()], sort_keys=True).encode())
    return digest.hexdigest()


class StatisticsFolder:
    """Statistics on disk: ``stats.json`` and a safetensors file per block, or several of a block with many experts.

    A block counts as soon as ``stats.json`` names it whole, which is after its files are complete. A Gram that several
    layers share is stored once, and read as one object.
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None, *, create: bool = False) -> None:
        """Open a folder.

        Args:
            folder: where the statistics are.
            expected: fields of :func:`statistics_key` that must be as given; all of them with ``create``.
            create: begin anew where there is nothing yet.

        Raises:
            InputError: there are no statistics, or they are of another model, text or setting; the field is named.
        """
        self.folder = folder
        path = folder / "stats.json"
        wanted: dict[str, Any] = in_json_types(dict(expected or {}))
        if create and not path.exists():
            self._state: dict[str, Any] = {"key": wanted, "loss": None, "blocks": {}}
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._write()
            return
        document = read_json(
            path,
            no_statistics(folder),
            _AGAIN,
        )
        require(document, _STATE, path, _AGAIN)
        self._state = unseal(document, path, _AGAIN)
        key = self.key
        require(key, _KEY, path, _AGAIN)
        refuse_other_settings(
            {field: key.get(field) for field in wanted},
            wanted,
            f"{folder} holds statistics of",
            "give another folder, or run `svdconvert calibrate` for this model",
            _FIELDS,
        )

    @property
    def key(self) -> dict[str, Any]:
        """What the statistics depend on."""
        return dict(self._state["key"])

    @property
    def blocks(self) -> frozenset[int]:
        """Blocks that are complete."""
        return frozenset(
            int(index)
            for index, entry in self._state["blocks"].items()
            if not entry.get("broken_off") and all((self.folder / file).is_file() for file in _files(entry))
        )

    @property
    def loss(self) -> Loss | None:
        """The dense model's loss on the calibration text; None if it is not known yet."""
        loss = self._state["loss"]
        return None if loss is None else Loss(loss["nll"], loss["tokens"])

    def set_loss(self, loss: Loss) -> None:
        """Keep the loss."""
        self._state["loss"] = asdict(loss)
        self._write()

    def save(self, index: int, statistics: Mapping[str, ModuleStatistics], *, whole: Collection[str] = ()) -> None:
        """Store a block's statistics, or a part of them.

        Args:
            index: of the block.
            statistics: by layer; those that are here already are not written again.
            whole: all layers of the block where it comes in several parts.

        Raises:
            JobError: they could not be written.
        """
        entry = self._state["blocks"].get(str(index))
        if entry is None or not entry.get("broken_off"):  # nothing yet, or something to be replaced
            entry = {"file": f"block-{index:05d}.safetensors", "modules": {}}
        known, parts = entry["modules"], entry.get("parts", 1 if entry["modules"] else 0)
        files = {known[name].get("file", entry["file"]) for name in statistics if name in known}
        if statistics.keys() <= known.keys() and all((self.folder / file).is_file() for file in files):
            return
        file = f"block-{index:05d}-{parts}.safetensors" if parts else entry["file"]
        tensors: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        modules: dict[str, Any] = {}
        for module, found in statistics.items():
            modules[module] = {"tokens": found.tokens, "samples": found.samples} | ({"file": file} if parts else {})
            for kind, tensor in statistic_tensors(found).items():
                name = names.setdefault(id(tensor), f"{module}.{kind}")
                tensors[name] = tensor
                modules[module][kind] = name
        write_tensors(self.folder / file, tensors)
        entry = {"file": entry["file"], "modules": {**known, **modules}} | ({"parts": parts + 1} if parts else {})
        if not set(whole) <= entry["modules"].keys():
            entry["broken_off"] = True
        self._state["blocks"][str(index)] = entry
        self._write()

    def save_tokens(self, tokens: CalibrationTokens) -> None:
        """Keep the text, as the model reads it, for a later refit or measurement."""
        if not (self.folder / TOKENS).is_file():
            write_tensors(self.folder / TOKENS, {"ids": tokens.ids, "mask": tokens.mask})

    def tokens(self) -> CalibrationTokens:
        """The text that the statistics are of.

        Raises:
            InputError: it is not here, or not that text.
        """
        path = self.folder / TOKENS
        if not path.is_file():
            raise InputError(f"{self.folder} lacks {TOKENS}; run `svdconvert calibrate` again")
        read = read_tensors(path, ("ids", "mask"))
        ids, mask = read["ids"], read["mask"]
        key = self.key
        tokens = CalibrationTokens(
            ids=ids,
            mask=mask,
            texts_used=0,
            tokens=int(mask.sum()),
            text_digest=key["text"],
            tokenizer_digest=key["tokenizer"],
            seed=key["seed"],
        )
        if tokens.digest != key["tokens"]:
            raise InputError(f"{path} is not the text that {self.folder / 'stats.json'} names; calibrate again")
        return tokens

    def load(self, modules: Sequence[str], kinds: Collection[str] | None = None) -> dict[str, ModuleStatistics]:
        """Read statistics of layers of one block, so that shared Grams are read once.

        Args:
            modules: their names.
            kinds: which of :data:`STATISTICS` to read, by default those that are here; others are None.

        Raises:
            InputError: a layer or kind is not here, or a file is damaged.
        """
        read: dict[str, Tensor] = {}
        statistics = {}
        for module in modules:
            entry = self._state["blocks"].get(str(layer_number(module)), {})
            record = entry.get("modules", {}).get(module)
            if record is None:
                raise InputError(f"{self.folder} has no statistics of {module}; run `svdconvert calibrate` again")
            lacking = [kind for kind in kinds or () if kind not in record]
            if lacking:
                raise InputError(
                    f"{self.folder} has no {listing(lacking).replace('_', ' ')} of {module}, which this method needs; "
                    "run `svdconvert calibrate` for it"
                )
            values: dict[str, Tensor | None] = dict.fromkeys(STATISTICS)
            for kind in STATISTICS if kinds is None else kinds:
                if kind in record:
                    if record[kind] not in read:
                        read |= read_tensors(self.folder / record.get("file", entry["file"]), (record[kind],))
                    values[kind] = read[record[kind]]
            statistics[module] = ModuleStatistics(**values, tokens=record["tokens"], samples=record["samples"])
        return statistics

    def _write(self) -> None:
        with disk_errors(self.folder):
            atomic_write(self.folder / "stats.json", sealed(self._state))


def _files(entry: Mapping[str, Any]) -> set[str]:
    """Those of a block."""
    return {entry["file"], *(module["file"] for module in entry["modules"].values() if "file" in module)}


def save_statistics(folder: StatisticsFolder, run: StatisticsRun) -> None:
    """Store what a run yields, as it comes, and the loss; of several processes the leader does.

    Raises:
        InputError, JobError: as :class:`svdconvert.calibration.run.StatisticsRun` and :meth:`StatisticsFolder.save`.
    """
    leader = current().leader
    for index, statistics in run:
        if leader:
            run.refuse_changed()
            folder.save(index, statistics, whole=run.modules(index))
        del statistics  # or two blocks' Grams would be in memory
    if leader and run.loss is not None and folder.loss != run.loss:
        folder.set_loss(run.loss)
