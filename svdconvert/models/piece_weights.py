"""Weights of the pieces of a model, in memory only while the piece is in use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.errors import InputError
from svdconvert.machine.memory import give_memory_back
from svdconvert.storage.reader import CHUNK, WeightReader, torch_dtype
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo

# Bytes between two rows that are wanted which are read rather than skipped: as fast as to read again.
_NEAR = 2**16

# a module of the model, and the names of its tensors: its own -> the checkpoint's
Part = tuple[nn.Module, Mapping[str, str]]


class PieceWeights:
    """Reads a checkpoint's tensors into modules without weights, and takes them away again."""

    def __init__(
        self,
        source: Source,
        tensors: Mapping[str, TensorInfo],
        *,
        device: torch.device,
        dtype: torch.dtype,
        stored_as: Mapping[str, torch.dtype],
    ) -> None:
        """Prepare.

        Args:
            source: the checkpoint.
            tensors: its tensors, by their full names.
            device: of the weights.
            dtype: that floating-point weights are read into; stored integers stay integers.
            stored_as: types that some weights are first rounded to, by their full names.
        """
        self._source, self._tensors, self._device = source, tensors, device
        self._dtype, self._stored_as = dtype, stored_as

    @contextmanager
    def given(self, parts: Iterable[Part], read: Callable[..., Tensor] | None = None) -> Iterator[None]:
        """Context in which modules have their weights.

        Args:
            parts: the modules.
            read: (reader, name, the tensor that it replaces) -> a tensor; by default the whole one.
        """
        taken: list[tuple[nn.Module, str, Tensor]] = []
        try:
            with WeightReader(self._source) as reader:
                for module, names in parts:
                    for key, name in names.items():
                        path, _, last = key.rpartition(".")
                        owner = module.get_submodule(path)
                        empty = getattr(owner, last)
                        taken.append((owner, last, empty))
                        stored = (read or self.read)(reader, name, empty)
                        is_weight = isinstance(empty, nn.Parameter)
                        setattr(owner, last, nn.Parameter(stored, requires_grad=False) if is_weight else stored)
            yield
        finally:
            for owner, last, empty in taken:
                setattr(owner, last, empty)

    @contextmanager
    def given_in_turn(self, modules: Mapping[nn.Module, Sequence[Part]], *, unseen: bool = True) -> Iterator[None]:
        """Context in which each of some modules has its weights only while it is called.

        A backward pass reads those again that it needs, one by one.

        Args:
            modules: what each of them needs to be there.
            unseen: whether those of one that nobody has called are read in the end, so that nothing damaged in them
                goes unseen.
        """
        left = dict(modules)

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            left.pop(module, None)
            try:
                with self.given(modules[module]), self._not_kept(modules[module]):
                    return type(module).forward(module, *args, **kwargs)
            finally:
                give_memory_back()  # else it lies in pieces between the next one's

        try:
            for module in modules:
                module.forward = partial(called, module)
            yield
            for parts in left.values() if unseen else ():
                with self.given(parts):
                    pass
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)

    def _not_kept(self, parts: Iterable[Part]) -> AbstractContextManager[object]:
        """Context whose computations keep no weights of modules for a backward pass, but what to read then."""
        names: dict[int, tuple[str, Tensor]] = {}
        for module, own in parts:
            for key, name in own.items():
                path, _, last = key.rpartition(".")
                weight = getattr(module.get_submodule(path), last)
                names[weight.untyped_storage().data_ptr()] = name, weight.detach().to("meta")

        def keep(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
            found = names.get(tensor.untyped_storage().data_ptr())
            return tensor if found is None else partial(self._read_again, *found, tensor.detach().to("meta"))

        def take(kept: Tensor | Callable[[], Tensor]) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept()

        return torch.autograd.graph.saved_tensors_hooks(keep, take)

    def _read_again(self, name: str, like: Tensor, view: Tensor) -> Tensor:
        """A stored tensor, or a view of it.

        Args:
            name: of the tensor.
            like: the tensor without values.
            view: the view without values.
        """
        with WeightReader(self._source) as reader:
            return self.read(reader, name, like).as_strided(view.shape, view.stride(), view.storage_offset())

    def chosen(self, reader: WeightReader, name: str, like: Tensor, rows: Sequence[int]) -> Tensor:
        """A tensor whose first rows are some of a stored one's; the others have no values.

        Args:
            reader: of the calling thread.
            name: of the tensor.
            like: the tensor without values.
            rows: numbers of the rows, rising.
        """
        info = self._info(name, like)
        weight = torch.empty(like.shape, dtype=self._computed(like), device=self._device)
        self._convert(name, info.dtype, _rows(reader, info, rows).view(-1).split(CHUNK), weight[: len(rows)])
        return weight

    def read(self, reader: WeightReader, name: str, like: Tensor, rows: slice | None = None) -> Tensor:
        """A stored tensor, or some of its rows."""
        info = self._info(name, like)
        if rows is not None:
            info = info.rows(rows.start, rows.stop)
        weight = torch.empty(info.shape, dtype=self._computed(like), device=self._device)
        # In pieces, so that a large one is never in memory in both types.
        self._convert(name, info.dtype, reader.stream(info), weight)
        return weight

    def _info(self, name: str, like: Tensor) -> TensorInfo:
        """Where a tensor is stored, if it is what the model needs.

        Raises:
            InputError: it is missing, or misshapen.
        """
        info = self._tensors.get(name)
        if info is None:
            raise InputError(f"{self._source.where} lacks {name}; the checkpoint is incomplete, fetch it again")
        if info.shape != tuple(like.shape):
            raise InputError(
                f"tensor {name} of {self._source.where} has shape {list(info.shape)}, but according to config.json it "
                "must be "
                f"{list(like.shape)}; config and weights are not of one model"
            )
        return info

    def _computed(self, like: Tensor) -> torch.dtype:
        """The type that a tensor is read into."""
        return self._dtype if like.is_floating_point() else like.dtype

    def _convert(self, name: str, code: str, pieces: Iterable[Tensor], weight: Tensor) -> None:
        """Fill a tensor with stored numbers.

        Args:
            name: of the tensor.
            code: type that is stored.
            pieces: the bytes in order, flat uint8.
            weight: gets the numbers, rounded first to what they are to be stored as.

        Raises:
            InputError: one is NaN or infinite, or becomes so.
        """
        flat, done = weight.view(-1), 0
        for data in pieces:
            stored = data.view(torch_dtype(code))
            piece = flat[done : done + len(stored)].copy_(stored)
            done += len(stored)
            # instead of isfinite() of all, which takes memory: minimum and maximum are NaN if any entry is
            if all(bool(torch.isfinite(end)) for end in torch.aminmax(piece)):
                if name in self._stored_as:
                    piece.copy_(piece.to(self._stored_as[name]))
                continue
            if not bool(torch.isfinite(stored).all()):
                raise InputError(f"tensor {name} has NaN or infinite entries; repair the checkpoint")
            raise InputError(f"tensor {name} exceeds the range of {weight.dtype}; compute in another type")


def _rows(reader: WeightReader, info: TensorInfo, rows: Sequence[int]) -> Tensor:
    """Some rows of a stored tensor, [rows, bytes of one] uint8; what lies between two that are near is read, too."""
    unit = info.nbytes // info.shape[0]
    reach, near = max(1, CHUNK // unit), max(1, _NEAR // unit)
    found = torch.empty(len(rows), unit, dtype=torch.uint8)
    buffer, begin = torch.empty(min(reach, info.shape[0]) * unit, dtype=torch.uint8), 0
    for end in range(1, len(rows) + 1):
        first = rows[begin]
        if end < len(rows) and rows[end] - rows[end - 1] <= near and rows[end] - first < reach:
            continue
        some = info.rows(first, rows[end - 1] + 1)
        stored = reader.read(some, buffer).view(-1).view(torch.uint8).view(some.shape[0], unit)
        found[begin:end] = stored[torch.tensor(rows[begin:end]) - first]
        begin = end
    return found
