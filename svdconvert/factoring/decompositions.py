"""The decomposition of every target, computed once and kept as files: another rank or budget is then a small job.

Per target there is one file with the squared singular values, the directions, the metric that the least-squares
partner needs, the diagonal of the other metric, by which rounding is judged, and, where the inputs' second moments are
known, the outputs' error at every rank: 12 k^2 bytes for a matrix whose smaller side is k. A file that is there is
finished. Where matrices are to be rounded to few bits, the whole metric on the longer side is kept as well, in a file
of its own: 4 l^2 bytes for l inputs or outputs.

Layers that share a factor are decomposed together, but their statistics come block by block. So each layer's metrics
wait in files of their own, 16 n^2 bytes for n inputs, until those of the whole group are there; then half of them goes,
and 8 n^2 bytes a layer stay for the least-squares partners.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.stores import LayerStatistics
from svdconvert.linalg.metrics import Metric
from svdconvert.linalg.rates import has_slow_float64
from svdconvert.linalg.results import Decomposition
from svdconvert.linalg.shared import SharedDecomposition
from svdconvert.methods.table import Method, unshrink
from svdconvert.planning.ranks import Target
from svdconvert.sentences import asked
from svdconvert.storage.differences import refuse_other_settings
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import in_json_types, read_json
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import names_in, read_tensors, write_tensors
from svdconvert.version import versions

if TYPE_CHECKING:
    from svdconvert.calibration.knowledge import Knowledge


class Decompositions:
    """Files of one model under one method, in a folder of their own."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, whole: bool = False, arithmetic: str = "") -> None:
        """Open or begin a collection.

        Args:
            folder: where the files are.
            key: everything that they depend on, in JSON types.
            whole: whether the metric on the longer side of a matrix is kept whole; a target whose is not here does not
                count as done.
            arithmetic: how the statistics of what is saved from now on are computed, in words; empty where they are
                not computed here. It is kept with each file, as one folder serves texts and collected statistics.

        Raises:
            InputError: the folder holds the decompositions of something else; the field that differs is named.
        """
        self.folder, self._whole, self._arithmetic = folder, whole, arithmetic
        key_file = folder / "key.json"
        wanted = in_json_types(key)
        if key_file.is_file():
            theirs = read_json(key_file, "", f"give another folder as {asked('work')}, or delete this one")
            advice = f"give another folder as {asked('work')}"
            refuse_other_settings(theirs, wanted, f"{folder} was computed with", advice)
            return
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            raise InputError(f"{folder} lacks key.json, which names its model; give another folder as {asked('work')}")
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(key_file, json.dumps(wanted, indent=1).encode())

    def path(self, target: Target) -> Path:
        """File of one target."""
        # the layers of a group follow one another, so that the first one and their number say which they are
        group = f"+{len(target.followers)}" if target.followers else ""
        return self.folder / f"{target.module}{group}.safetensors"

    def outer_path(self, target: Target) -> Path:
        """File of the whole metric on the longer side of a matrix."""
        return self.path(target).with_suffix(".longer")

    def metric_path(self, target: Target, index: int) -> Path:
        """File of the input metric of one layer of a group."""
        return self.path(target).with_suffix(f".{index}.inner")

    def waiting_path(self, target: Target, index: int) -> Path:
        """File of what else is needed of that layer until the group is decomposed; written after the other one."""
        return self.path(target).with_suffix(f".{index}.outer")

    def has(self, target: Target) -> bool:
        """Whether a target is done."""
        path = self.path(target)
        if not path.is_file() or (self._whole and not self.outer_path(target).is_file()):
            return False
        # Of a group that was decomposed in metrics, those of all layers are needed.
        return not target.followers or "captured" not in names_in(path) or self._has_metrics(target)

    def _has_metrics(self, target: Target) -> bool:
        return all(self.metric_path(target, index).is_file() for index in range(len(target.parts)))

    def keep_layer(self, target: Target, index: int, statistics: LayerStatistics) -> None:
        """Write what has to be known of one layer of a group; see :class:`svdconvert.factoring.stores.GroupStore`."""
        amount = statistics.shrinkage
        known = {} if amount is None else {"shrinkage": torch.tensor(amount, dtype=torch.float64)}
        write_tensors(self.metric_path(target, index), {"metric": statistics.inner, **known})
        outer = {} if statistics.outer is None else {"outer": statistics.outer}
        write_tensors(self.waiting_path(target, index), {"tokens": torch.tensor(statistics.tokens), **outer})

    def has_layer(self, target: Target, index: int) -> bool:
        """Whether all that has to be known of one layer of a group is there."""
        return self.waiting_path(target, index).is_file() and self.metric_path(target, index).is_file()

    def inner(self, target: Target, index: int, device: torch.device) -> Tensor:
        """Metric on the inputs of one layer of a group."""
        return load_metric(self.metric_path(target, index), device)

    def outer(self, target: Target, index: int, device: torch.device) -> Metric:
        """:func:`svdconvert.linalg.shared.outer_statistic` of one layer of a group."""
        outer = read_tensors(self.waiting_path(target, index), (), optional=("outer",)).get("outer")
        return None if outer is None else outer.to(device)

    def tokens(self, target: Target, index: int) -> int:
        """What the statistics of one layer of a group were averaged over."""
        return int(read_tensors(self.waiting_path(target, index), ("tokens",))["tokens"])

    def options(self, target: Target) -> dict[str, Any]:
        """What the step that truncates a target has to know."""
        options: dict[str, Any] = {"decomposition": str(self.path(target))}
        if target.followers:
            paths = [self.metric_path(target, index) for index in range(len(target.parts))]
            options["metrics"] = [str(path) for path in paths if path.is_file()]
        return options

    def files(self, targets: Iterable[Target]) -> dict[str, dict[str, Any]]:
        """Module path -> :meth:`options`."""
        return {target.module: self.options(target) for target in targets}

    def save(
        self, target: Target, decomposition: Decomposition, inner: Metric, outer: Metric, outputs: torch.Tensor | None
    ) -> None:
        """Write one target's file, whole or not at all; see :meth:`svdconvert.factoring.stores.Store.save`."""
        if self._whole:  # first, so that a target that is there has it
            whole = {} if outer is None else {"metric": outer.float()}
            write_tensors(self.outer_path(target), whole)
        # rounding errors to 16 bits see no more of the other metric
        diagonal = outer.diagonal() if outer is not None and outer.dim() == 2 else outer
        self._save(target, decomposition, metric=inner, outer=diagonal, outputs=outputs)

    def save_group(self, target: Target, decomposition: SharedDecomposition) -> None:
        """Write the file of a group that has metrics, and give up what waited for it."""
        self._save(target, decomposition.found, captured=decomposition.captured)
        with disk_errors(self.folder):
            for index in range(len(target.parts)):
                self.waiting_path(target, index).unlink(missing_ok=True)

    def _save(self, target: Target, decomposition: Decomposition, **more: Metric) -> None:
        tensors = {
            "values": decomposition.values,
            # Half the room; what is lost is far below what the least-squares partner makes good.
            "basis": decomposition.basis.float().contiguous(),
            "double": torch.tensor(decomposition.basis.dtype == torch.float64),
            "scale": torch.tensor(decomposition.scale, dtype=torch.float64),
        }
        given = {name: tensor for name, tensor in more.items() if tensor is not None}
        if decomposition.single:
            given["single"] = torch.tensor(True)
        if self._arithmetic:
            given["arithmetic"] = torch.tensor(list(self._arithmetic.encode()), dtype=torch.uint8)
        write_tensors(self.path(target), tensors | given)

    def spectrum(self, target: Target) -> torch.Tensor:
        """[k] float64, descending: squared singular values in the metrics; of a group, what each rank captures."""
        tensors = read_tensors(self.path(target), ("values", "scale"))
        return Decomposition(tensors["values"], torch.empty(0), float(tensors["scale"])).spectrum

    def outputs(self, target: Target) -> torch.Tensor | None:
        """[k + 1] float64: :mod:`svdconvert.linalg.output_losses`, or None where the inputs are not known."""
        return load_outputs(self.path(target))


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in read_tensors(path).items()}


def load_outputs(path: Path) -> torch.Tensor | None:
    """:meth:`Decompositions.outputs` of a target's file."""
    return read_tensors(path, (), optional=("outputs",)).get("outputs")


def load_arithmetic(path: Path) -> str:
    """How the statistics of a target's file were computed; empty where they were not, or where it is not known."""
    found = read_tensors(path, (), optional=("arithmetic",)).get("arithmetic")
    return "" if found is None else bytes(found.tolist()).decode(errors="replace")


def load_decomposition(path: Path, device: torch.device) -> tuple[Decomposition, Metric, Metric]:
    """``(decomposition, metric on the smaller side, diagonal of that on the longer side)`` of a target's file."""
    tensors = _load(path, device)
    basis = tensors["basis"].double() if bool(tensors["double"]) else tensors["basis"]
    decomposition = Decomposition(tensors["values"], basis, float(tensors["scale"]), single="single" in tensors)
    return decomposition, tensors.get("metric"), tensors.get("outer")


def load_metrics(path: Path, device: torch.device) -> tuple[Metric, Metric]:
    """``(metric on the smaller side, metric on the longer side)`` of a target's file, both whole, float64.

    Args:
        path: of the target's file, beside which :meth:`Decompositions.outer_path` has the other one.
        device: where to.
    """
    inner, outer = (
        read_tensors(file, (), optional=("metric",)).get("metric") for file in (path, path.with_suffix(".longer"))
    )
    return tuple(None if metric is None else metric.to(device).double() for metric in (inner, outer))  # type: ignore[return-value]


def load_group(path: Path, device: torch.device) -> SharedDecomposition:
    """The decomposition of a group that has metrics."""
    tensors = _load(path, device)
    return SharedDecomposition(Decomposition(tensors["values"], tensors["basis"].double()), tensors["captured"])


def load_second_moment(path: Path, device: torch.device) -> Tensor | None:
    """The second moment of a layer's inputs that its metric was made of; None where it cannot be had from it."""
    tensors = _load(path, device)
    return unshrink(tensors["metric"], float(tensors["shrinkage"])) if "shrinkage" in tensors else None


def load_metric(path: Path, device: torch.device) -> Tensor:
    """The input metric of one layer of a group."""
    return _load(path, device)["metric"]


def decompositions_key(
    source: Source, method: Method, options: Mapping[str, float], knowledge: Knowledge | None, device: str
) -> dict[str, Any]:
    """What decompositions depend on, in JSON types: the key of :class:`Decompositions`."""
    return {
        "svdconvert": versions()["svdconvert"],
        **source.identity(),
        "method": method.name,
        **options,
        **({} if knowledge is None else knowledge.content),
        # GPUs of both kinds have one name, and what they compute differs
        "device": device.split(":")[0] + (" with slow float64" if has_slow_float64(torch.device(device)) else ""),
    }
