"""Sums of the experts of a block in files, group by group, until those of all of them are known.

What an expert's moments are pulled towards is known with the last group only. So each group's sums wait in a file of
their own, with what all experts up to it have in common; an interrupted run goes on with the groups that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.calibration.experts import Common, ExpertSums
from svdconvert.machine.processes import Group
from svdconvert.methods.statistics import STATISTICS
from svdconvert.storage.disk import disk_errors
from svdconvert.storage.documents import in_json_types
from svdconvert.storage.tensor_files import names_in, read_note, read_tensors, write_tensors

_COMMON = "common"


class ExpertFiles:
    """The files of one block. Of several processes the leader writes; all of them read."""

    def __init__(
        self, folder: Path, key: Mapping[str, Any], index: int, groups: Sequence[Sequence[str]], group: Group
    ) -> None:
        """Remove what a folder has of other blocks, or of other settings.

        Args:
            folder: where they are; nothing else is.
            key: what the sums depend on beside the layers, in JSON types.
            index: of the block.
            groups: layers of the experts in each group.
            group: the processes.

        Raises:
            JobError: the folder cannot be written.
        """
        self._group, self._count = group, len(groups)
        whole = json.dumps([in_json_types(key), [list(names) for names in groups]], sort_keys=True)
        digest = hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()
        self._paths = [folder / f"block-{index:05d}-{place:04d}-{digest}.safetensors" for place in range(len(groups))]
        if group.leader:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for path in [*folder.glob("*.safetensors"), *folder.glob(".*.tmp")]:
                    if path not in self._paths:
                        path.unlink()
        group.wait()

    def first_missing(self) -> int:
        """The number of groups, from the first one, that are there."""
        there = [path.is_file() for path in self._paths]
        return int(self._group.share(there.index(False) if False in there else self._count))

    def save(self, place: int, sums: ExpertSums, common: Common, tokens: int, samples: int) -> None:
        """Write a group's sums.

        Args:
            place: of the group; those before it are there.
            sums: of the group.
            common: of all groups up to it.
            tokens, samples: of all processes.

        Raises:
            JobError: they could not be written.
        """
        if self._group.leader:
            tensors = {f"{kind} {name}": each for kind in STATISTICS for name, each in getattr(sums, kind).items()}
            tensors |= {f"{_COMMON} {name}": each for name, each in common.sums.items()}
            told = {
                "counts": sums.counts,
                "channels": sums.channels,
                "leaders": sums.leaders,
                "own_inputs": sorted(sums.own_inputs),
                _COMMON: common.counts,
                "seen": [tokens, samples],
            }
            write_tensors(self._paths[place], tensors, note=json.dumps(told))
        self._group.wait()

    def read(self, place: int) -> tuple[ExpertSums, int, int]:
        """A group's sums, tokens and samples; on the CPU.

        Raises:
            InputError: the file is damaged.
        """
        told, tensors = self._read(place, STATISTICS)
        found: dict[str, dict[str, Any]] = {kind: {} for kind in STATISTICS}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(" ")
            found[kind][name] = tensor
        own, (tokens, samples) = frozenset(told["own_inputs"]), told["seen"]
        whole = {field: told[field] for field in ("counts", "channels", "leaders")}
        return ExpertSums(**found, **whole, own_inputs=own), tokens, samples

    def common(self, place: int) -> Common:
        """What the experts of all groups up to one have in common; nothing before the first.

        Raises:
            InputError: the file is damaged.
        """
        if place < 0:
            return Common()
        told, tensors = self._read(place, (_COMMON,))
        return Common({key.partition(" ")[2]: tensor for key, tensor in tensors.items()}, told[_COMMON])

    def clear(self) -> None:
        """Remove all files."""
        self._group.wait()
        if self._group.leader:
            for path in self._paths:
                with disk_errors(path.parent):
                    path.unlink(missing_ok=True)

    def _read(self, place: int, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self._paths[place]
        names = [name for name in names_in(path) if name.partition(" ")[0] in kinds]
        return json.loads(read_note(path)), read_tensors(path, names)
