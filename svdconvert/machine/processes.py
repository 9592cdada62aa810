"""One job done by several processes that ``torchrun`` or ``accelerate launch`` has started.

torch.distributed connects them (the usual environment: WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and
carries their messages, on gloo even where GPUs compute: a few agreements, and sums of statistics, which go to the host
anyway. Only the gradients of a healing are added up where they are, by NCCL on GPUs. The process of rank 0 leads: it
owns the output folder and finishes the job. All of them see the same folders, so several machines need a shared file
system.

A process that fails ends by itself; the others end where they next wait for it, or by their launcher's signal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from svdconvert.errors import InputError, JobError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")

# A process may wait for another one's share of a large model. One that dies is noticed by its connection.
_PATIENCE = timedelta(days=7)


class Group:
    """The processes of a job; this class is a group of one.

    Attributes:
        rank: number of this process.
        size: how many there are.
        local_rank: number of this process on its machine.
        local_size: how many there are on its machine.
    """

    rank, size, local_rank, local_size = 0, 1, 0, 1

    @property
    def leader(self) -> bool:
        """Whether this process owns the shared folders."""
        return self.rank == 0

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Run the body in the leader first, and in the others once the leader has finished it."""
        if not self.leader:
            self.wait()
        yield
        if self.leader:
            self.wait()

    def own(self, path: Path) -> Path:
        """A folder beside ``path`` for this process alone; ``path`` itself for the leader."""
        return path if self.leader else path.with_name(f"{path.name}-{self.rank}")

    def portion(self, count: int) -> slice:
        """This process's contiguous part of ``count`` things; the sizes of parts differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wait(self) -> None:
        """Return when all processes have got here."""

    def share(self, value: _T) -> _T:
        """The leader's value, in every process."""
        return value

    def gather(self, value: _T) -> list[_T]:
        """The values of all processes, by rank."""
        return [value]

    def all(self, value: bool) -> bool:
        """Whether it is true in every process."""
        return all(self.gather(value))

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place, with the same bits in each.

        Args:
            tensor: on the CPU, or on a GPU that no other process uses.
        """
        return tensor

    def claim_error(self) -> bool:
        """Whether this process is the one to report the error: the first that asks."""
        return True

    def leave(self) -> None:
        """End, together with the others."""


class _Launched(Group):
    """Processes joined by torch.distributed."""

    def __init__(self) -> None:
        dist: Any = import_module("torch.distributed")
        if not dist.is_available():
            raise InputError("this torch has no torch.distributed; run the command in one process")
        self._dist = dist
        self._began = not dist.is_initialized()
        self._store: Any = None
        try:
            if self._began:
                self._store, rank, size = next(iter(dist.rendezvous("env://")))
                dist.init_process_group(
                    "gloo", store=dist.PrefixStore("svdconvert", self._store), rank=rank, world_size=size
                )
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise JobError(f"the processes of this job did not find each other ({reason}); start it again") from None
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self._on_gpus: Any = None

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise JobError("another process of this job has ended; run the same command to continue") from None

    def wait(self) -> None:
        with self._talking():
            self._dist.barrier(self._group)

    def share(self, value: _T) -> _T:
        box = [value if self.leader else None]
        with self._talking():
            self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]  # type: ignore[return-value]

    def gather(self, value: _T) -> list[_T]:
        boxes: list[Any] = [None] * self.size
        with self._talking():
            self._dist.all_gather_object(boxes, value, group=self._group)
        return boxes

    def add(self, tensor: Tensor) -> Tensor:
        with self._talking():
            if tensor.is_cuda and self._on_gpus is None:
                self._on_gpus = self._dist.new_group(backend="nccl", timeout=_PATIENCE)
            self._dist.all_reduce(tensor, group=self._on_gpus if tensor.is_cuda else self._group)
        return tensor

    def claim_error(self) -> bool:
        if self._store is None:
            return self.leader
        try:
            return bool(self._store.add("svdconvert/errors", 1) == 1)
        except RuntimeError:  # the process that kept the store has ended, and has said why
            return False

    def leave(self) -> None:
        self.wait()
        if self._began:
            self._dist.destroy_process_group()


_current = Group()


def current() -> Group:
    """The group that this process belongs to: itself alone, unless :func:`join` was called."""
    return _current


def launched() -> bool:
    """Whether a launcher has started several processes. Imports nothing."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0) if launched() else 0


def join() -> Group:
    """Join the launcher's other processes; without a launcher nothing changes.

    The command line does this by itself. A program that uses the library calls it in every process, and :func:`leave`
    at the end; in between, all processes must make the same calls.

    Raises:
        JobError: the others cannot be reached.
    """
    global _current
    if launched() and _current.size == 1:
        _current = _Launched()
    return _current


def leave() -> None:
    """Undo :func:`join`, once all processes have finished."""
    global _current
    group, _current = _current, Group()
    group.leave()
