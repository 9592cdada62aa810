"""Where a model comes from: a local folder, or a repository on the Hub (``storage/hub_source.py``).

A source knows its config and the header of every tensor from the start; weight files are fetched one by one with
:meth:`Source.path` and given up with :meth:`Source.release`. Nothing in a source is executed, and no file outside its
folder is read.
"""

from __future__ import annotations

import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.mixture import unstacked
from svdconvert.families.table import ARCHITECTURES, FACTORED, dense_architecture, dense_shapes
from svdconvert.families.towers import language_config
from svdconvert.storage.documents import fill, open_regular, read_bytes, read_json, reading
from svdconvert.storage.folders import ModelFolder, cached_repo
from svdconvert.storage.headers import read_header
from svdconvert.storage.identity import file_digest, weights_digest
from svdconvert.storage.mxfp4 import Mxfp4, read_mxfp4
from svdconvert.storage.other_formats import ADAPTER_CONFIG, refuse_other_format
from svdconvert.storage.packed import Packed, unpacked
from svdconvert.storage.side_files import choose_side_files, is_side_file, side_notes
from svdconvert.storage.tensor_data import PlainData, TensorData
from svdconvert.storage.whole import Whole, language_tensors
from svdconvert.storage.wrappers import unwrap
from svdconvert.tensors import CODES, TensorInfo
from svdconvert.words import listing

SAFE_SINGLE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# Files that are read of any model, besides its side files.
_READ = ("config.json", "README.md", ADAPTER_CONFIG, SAFE_SINGLE, SAFE_INDEX, PICKLE_SINGLE, PICKLE_INDEX)
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


class Source(ABC):
    """A checkpoint to read from.

    Attributes:
        name: its name, also as the base model in a model card.
        where: its name in messages, as a command takes it: the folder, or the repository id.
        repo: repository id on the Hub, or None for a local folder outside the Hub cache.
        commit: commit hash on the Hub, or None.
        fetched: whether weight files are downloaded one by one and deleted after use.
        config: parsed ``config.json``; of a model that sees, that of its language model.
        tensors: header of every tensor of the language model, by name.
        whole: what there is beside it, in a model that sees.
        files: weight files in the order of their names.
        side_files: other files that a converted model keeps.
        pickled: whether the weight files are ``torch.save`` pickles.
        config_only: whether there are no weights and ``tensors`` was deduced from the config.
        download_bytes: size of the weight files that have to be downloaded, by name.
        stored: tensor -> its name in the file, where the two differ (``storage/wrappers.py``).
        packed: weight -> what stands for it in the files, where that are packed integers (``storage/packed.py``).
        stacks: what stands for experts, where the files have them rounded (``storage/mxfp4.py``).
        notes: for the user, about how it was read.
        opening_bytes: memory that its tokenizer takes where it has to be made, before any work.
    """

    name: str
    where: str
    repo: str | None = None
    commit: str | None = None
    fetched: bool = False
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    files: list[str]
    side_files: list[str]
    pickled: bool = False
    config_only: bool = False
    download_bytes: Mapping[str, int] = MappingProxyType({})
    stored: Mapping[str, str] = MappingProxyType({})
    whole: Whole | None = None
    packed: Mapping[str, Packed] = MappingProxyType({})
    stacks: tuple[Mxfp4, ...] = ()
    notes: tuple[str, ...] = ()
    opening_bytes: int = 0

    @abstractmethod
    def path(self, file: str) -> Path:
        """The local path of a file, fetched now if it is not here yet.

        Raises:
            JobError: it could not be fetched.
        """

    def data(self, file: str) -> TensorData:
        """The data of a weight file that is no pickle, opened.

        Raises:
            JobError: it could not be fetched or opened.
        """
        if not self.packed and not self.stacks:
            return PlainData(self.path(file), file)
        from svdconvert.storage.packed_data import PackedData, PackedRows

        packed: list[PackedRows] = [*self.packed.values(), *self.stacks]
        return PackedData(self.path, file, {each.place: each for each in packed})

    def kept_type(self, info: TensorInfo) -> str:
        """safetensors' code of the type in which another checkpoint takes a tensor over: its own, or its scales'."""
        packed = self.packed.get(info.name)
        return info.dtype if packed is None else packed.scale.dtype

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same when an interrupted job continues: weights and config, in JSON types."""

    def side_identity(self) -> dict[str, Any]:
        """Likewise for the other files that go into a result."""
        return {}

    def refuse_changed(self) -> None:  # noqa: B027 - a commit on the Hub never changes
        """Check, cheaply, that the source is unchanged since its identity was first computed.

        Raises:
            InputError: it has changed.
        """

    def release(self, file: str) -> None:  # noqa: B027 - a local folder has nothing to delete
        """Give up a weight file that is no longer needed."""

    def card(self) -> str | None:
        """The source's model card (README.md), if it has one."""
        return None


class FileSource(Source):
    """A checkpoint in local files that somebody may change while they are read."""

    def __init__(self) -> None:
        """Nothing is known of the files yet."""
        self._known: dict[str, Any] = {}

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """What the files hold now, as :meth:`identity` has it."""

    @abstractmethod
    def _watched(self) -> list[Path]:
        """The files that it comes from."""

    def identity(self) -> dict[str, Any]:
        times = self._times()
        identity = self._content()
        self._known = self._known or {"times": times, "identity": identity}
        return identity

    def refuse_changed(self) -> None:
        times = self._times()
        if not self._known or self._known["times"] == times:
            return
        if self._content() != self._known["identity"]:
            raise InputError(f"{self.where} was changed while it was read; run the command again")
        self._known["times"] = times

    def _times(self) -> list[tuple[int, int, int]]:
        """Inodes, sizes and times, which change with any of the files but may also change alone."""
        found = [path.stat() if path.is_file() else None for path in self._watched()]
        return [(s.st_ino, s.st_size, s.st_mtime_ns) if s else (0, 0, 0) for s in found]


class LocalSource(FileSource):
    """A checkpoint in a local folder."""

    def __init__(
        self,
        folder: Path,
        *,
        need_weights: bool = True,
        config: Mapping[str, Any] | None = None,
        as_stored: bool = False,
    ) -> None:
        """Read config and headers.

        Args:
            folder: the checkpoint folder.
            need_weights: False accepts a folder with only a config (planning).
            config: config.json's content, where the file is not written yet.
            as_stored: leave packed weights the tensors that the files have.

        Raises:
            InputError: something is missing, damaged or inconsistent.
        """
        super().__init__()
        self.folder, self._config = folder, config
        self._in_files: Mapping[str, TensorInfo] = {}
        self.name = folder.resolve().name
        if (cached := cached_repo(folder)) is not None:
            self.repo, self.commit = cached
            self.name = self.repo
        self.where = self.repo or str(folder)
        listed = survey(folder)
        names = [name for name in listed.sizes if "/" not in name]
        raw = self.read_config()
        self.config = language_config(raw, self.where)
        check_type(self.config, self.where)
        index, self.files, self.pickled = weight_files(names, folder)
        listed.check([*self.files, *filter(None, [index])])
        if index:
            weight_map = parse_index(read_json(folder / index, f"{folder / index} is missing"), folder / index)
            self.files = sorted(set(weight_map.values()))
            missing = [file for file in self.files if file not in names]
            if missing:
                raise InputError(f"{folder} lacks {listing(missing)}, which {index} names; fetch the missing files")
            listed.check(self.files)
        side = choose_side_files(listed.sizes, self._settings, self._code, raw, {*self.files, *filter(None, [index])})
        listed.check([*side.taken, "README.md"])
        self.side_files, self.notes = list(side.taken), tuple(side_notes(side, listing))
        if not self.files:
            self.config_only = True
            self.config = read_mxfp4({}, self.config, self.where, pickled=False).config
            self.tensors = tensors_from_config(self.config, self.where)
            if need_weights or not self.tensors:
                raise InputError(
                    f"{folder} has no weights; expected {SAFE_SINGLE}, {SAFE_INDEX}, {PICKLE_SINGLE} or {PICKLE_INDEX}"
                )
            return
        if self.pickled:
            from svdconvert.storage.pickled import pickled_header

            headers = {file: pickled_header(folder / file) for file in self.files}
        else:
            headers = {file: read_header(folder / file) for file in self.files}
        self._in_files = merge_headers(headers)
        tensors, packed = dict(self._in_files), dict[str, Packed]()
        tensors, self.whole = language_tensors(tensors, raw, self.where)
        if not as_stored and "svd_ranks" in self.config:  # a dense model that is quantised was refused
            tensors, packed = unpacked(tensors, self.config, self.where, self._pair, self.whole)
        if packed and self.pickled:
            raise InputError(f"{folder} holds packed weights in pickles; save the model with save_pretrained")
        read = read_mxfp4(tensors, self.config, self.where, pickled=self.pickled)
        self.config, self.stacks = read.config, read.stacks
        self.tensors, self.stored, note = unwrap(one_by_one(read.tensors, self.config), self.config)
        self.packed = {own: packed[name] for own in self.tensors if (name := self.stored.get(own, own)) in packed}
        if self.whole is not None:
            self.stored = {**self.whole.stored, **self.stored}
            self.notes = (self.whole.note(), *self.notes)
        self.notes = (*filter(None, [note, read.note]), *self.notes)

    def _pair(self, info: TensorInfo) -> tuple[int, int]:
        """The values of a tensor of two int64."""
        path, data = self.path(info.file), bytearray(16)
        with reading(path), open_regular(path) as handle:
            handle.seek(info.start)
            if info.start < 0 or not fill(handle, memoryview(data)):
                raise InputError(f"{path} ends within its tensor {info.name}; fetch it again")
        first, second = struct.unpack("<2q", data)
        return first, second

    def _settings(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name, f"{self.folder / name} is missing")

    def _code(self, name: str) -> str:
        return read_bytes(self.folder / name, f"{self.folder / name} is missing").decode("utf-8", errors="replace")

    def read_config(self) -> dict[str, Any]:
        """Parsed ``config.json``."""
        return raw_config(self.folder) if self._config is None else dict(self._config)

    def path(self, file: str) -> Path:
        return self.folder / file

    def _content(self) -> dict[str, Any]:
        weights = {
            file: weights_digest(self.path(file), [info for info in self._in_files.values() if info.file == file])
            for file in self.files
        }
        return {"weights": weights, "config": self.read_config()}

    def _watched(self) -> list[Path]:
        return [self.path(file) for file in [*self.files, "config.json"]]

    def side_identity(self) -> dict[str, Any]:
        names = [*self.side_files, *(["README.md"] if (self.folder / "README.md").is_file() else [])]
        return {"side_file": {name: file_digest(self.path(name)) for name in names}}

    def card(self) -> str | None:
        readme = self.folder / "README.md"
        return read_bytes(readme, "").decode("utf-8", errors="replace") if readme.is_file() else None


def read_config(folder: Path) -> dict[str, Any]:
    """Parsed ``config.json`` of a model folder; of a model that sees, the config of its language model.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    return language_config(raw_config(folder), str(folder))


def raw_config(folder: Path) -> dict[str, Any]:
    """Parsed ``config.json`` of a model folder.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    return read_json(
        folder / "config.json", f"{folder} has no config.json, so it is not a model folder; give the one that holds it"
    )


def survey(folder: Path) -> ModelFolder:
    """The files of a local model folder.

    Raises:
        InputError: it is not a model in the form that transformers loads, or needed files are outside of it.
    """
    listed = ModelFolder(folder)
    listed.check(read_names(listed.sizes))
    refuse_other_format(
        folder,
        listed.sizes,
        lambda name: read_json(folder / name, f"{folder / name} is missing"),
        has_weights=bool(stock_weights(listed.sizes)),
    )
    return listed


def read_names(names: Iterable[str]) -> list[str]:
    """The files that are read or copied of any model."""
    return [name for name in names if name in _READ or _SHARD.fullmatch(name) or is_side_file(name)]


def check_type(config: Mapping[str, Any], where: str) -> None:
    """Check that a model's type is known, before anything is said about its weights.

    Raises:
        InputError: it is not, or it is quantised.
    """
    kind = config.get("model_type")
    if "svd_ranks" not in config and not (isinstance(kind, str) and kind in FACTORED):
        dense_architecture(config, where)


def stock_weights(names: Iterable[str]) -> set[str]:
    """The weight files of a checkpoint that transformers would load, or their index."""
    return {SAFE_SINGLE, SAFE_INDEX, PICKLE_SINGLE, PICKLE_INDEX}.intersection(names)


def weight_files(names: Iterable[str], where: object) -> tuple[str | None, list[str], bool]:
    """Choose the weight files of a checkpoint, in the order in which transformers looks for them.

    Returns:
        ``(index, files, pickled)``: the index file or None, the weight files known without it, and whether they are
        pickles. All empty where there are no weights.

    Raises:
        InputError: there are weight files, but none under a name that transformers loads.
    """
    present = set(names)
    for single, index, pickled in ((SAFE_SINGLE, SAFE_INDEX, False), (PICKLE_SINGLE, PICKLE_INDEX, True)):
        if single in present:
            return None, [single], pickled
        if index in present:
            return index, [], pickled
    strays = sorted(name for name in present if name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth")))
    if strays:
        raise InputError(
            f"{where} has weight files ({listing(strays)}) but neither {SAFE_SINGLE} nor {SAFE_INDEX}; "
            "fetch the index, or save the model again with save_pretrained"
        )
    return None, [], False


def parse_index(index: Mapping[str, Any], where: object) -> dict[str, str]:
    """Validate an index file and return its ``weight_map`` (tensor -> file in the same folder)."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{where} has no weight_map; fetch it again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise InputError(
                f"{where} puts tensor {name} into {file!r}, which is not a plain file name in the checkpoint's own "
                "folder; do not trust this checkpoint"
            )
    return weight_map


def merge_headers(headers: Mapping[str, list[TensorInfo]]) -> dict[str, TensorInfo]:
    """Join the headers of all files.

    An index only lists the files: transformers loads all tensors in them, whatever the index says of each.

    Raises:
        InputError: a tensor is in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, infos in headers.items():
        for info in infos:
            if info.name in tensors:
                raise InputError(
                    f"tensor {info.name} is in both {tensors[info.name].file} and {file}; remove one of them"
                )
            tensors[info.name] = info
    return tensors


def one_by_one(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
    """The tensors of a checkpoint with the experts of a dense model by themselves, where files have them stacked."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    return tensors if row is None else unstacked(tensors, row)


def tensors_from_config(config: Mapping[str, Any], where: str) -> dict[str, TensorInfo]:
    """The tensors that a model of this config must have; empty for an unknown architecture.

    Raises:
        InputError: the config lacks a size.
    """
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if row is None:
        return {}
    dtype = CODES.get(str(config.get("torch_dtype") or config.get("dtype") or "float32"), "F32")
    return {name: TensorInfo(name, dtype, shape) for name, shape in dense_shapes(row, config, where).items()}
