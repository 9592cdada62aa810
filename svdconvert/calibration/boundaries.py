"""Inputs of a model's blocks, and gradients with respect to them, in files while statistics are collected.

Boundary i is the input of block i; the last one is the input of the head. An interrupted run continues from them. Of a
block whose experts are run in groups there are the input of its mixture and the gradient with respect to its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.machine.processes import Group
from svdconvert.models.activations import ActivationStore, Loss, check_room
from svdconvert.models.calls import block_output


class Boundaries:
    """Hidden states and gradients, [sequences, length, hidden] each, and the loss.

    Each of several processes has files of its own, for its part of the sequences. A file counts as there if all of them
    have it, since they must take the same steps.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
        copies: int,
        group: Group,
        more: int = 0,
    ) -> None:
        """Open the files, or start new ones.

        Args:
            folder: where they are.
            key: what they depend on, in JSON types; files of another key are removed.
            shape: (sequences, length, hidden) of one file of this process.
            dtype: of the files.
            device: that they are read to.
            copies: the most files that exist at a time.
            group: the processes.
            more: bytes of statistics that lie on the same disk.

        Raises:
            InputError: the disk is too small.
            JobError: it cannot be written.
        """
        self._store = ActivationStore(group.own(folder), key, shape, dtype)
        self._device, self._group = device, group
        check_room({self._store: copies}, more)

    @property
    def loss(self) -> Loss | None:
        """The loss that an earlier run measured, if all processes have it."""
        return self._store.loss if self._group.all(self._store.loss is not None) else None

    def keep_loss(self, loss: Loss) -> None:
        """Record the loss."""
        self._store.loss = loss

    def has_hidden(self, index: int) -> bool:
        """Whether a block's input is there."""
        return self._group.all(self._store.has(f"hidden-{index}"))

    def has_gradient(self, index: int) -> bool:
        """Whether the gradient with respect to a block's input is there."""
        return self._group.all(self._store.has(f"gradient-{index}"))

    def hidden(self, index: int, batch: slice) -> Tensor:
        """A block's input: [batch, length, hidden] on the device."""
        return self._store.read(f"hidden-{index}", batch).to(self._device)

    def gradient(self, index: int, batch: slice) -> Tensor:
        """The gradient with respect to it, likewise."""
        return self._store.read(f"gradient-{index}", batch).to(self._device)

    def mixture(self, index: int, batch: slice) -> tuple[Tensor, Tensor | None]:
        """The input of a block's mixture, and the gradient with respect to its output if it was kept, likewise."""
        given, gradient = (
            self._store.read(name, batch).to(self._device) if self._store.has(name) else None
            for name in _of_mixture(index)
        )
        assert given is not None
        return given, gradient

    @contextmanager
    def keeping_mixture(self, index: int, mixture: nn.Module, *, gradient: bool) -> Iterator[None]:
        """Context in which what goes into a block's mixture is written, batch by batch, while the block is run.

        Args:
            index: of the block.
            mixture: its mixture.
            gradient: whether the gradient with respect to what comes out is, too.
        """
        given, of_output = _of_mixture(index)
        with self._store.writing(given) as write, self._store.writing(of_output, dry=not gradient) as write_gradient:

            def before(module: nn.Module, args: tuple[Any, ...]) -> None:
                write(args[0])

            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                block_output(output).register_hook(write_gradient)

            handles = [mixture.register_forward_pre_hook(before)]
            if gradient:
                handles.append(mixture.register_forward_hook(after))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def drop_mixture(self, index: int) -> None:
        """Remove both."""
        for name in _of_mixture(index):
            self._store.remove(name)

    def writing_hidden(self, index: int) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Write a block's input, batch by batch; the file gets its name at the end."""
        return self._store.writing(f"hidden-{index}")

    def writing_gradient(self, index: int, *, dry: bool) -> AbstractContextManager[Callable[[Tensor], None]]:
        """Likewise the gradient with respect to it; ``dry`` writes nothing."""
        return self._store.writing(f"gradient-{index}", dry=dry)

    def drop_hidden(self, index: int) -> None:
        """Remove a block's input."""
        self._store.remove(f"hidden-{index}")

    def drop_gradient(self, index: int) -> None:
        """Remove the gradient with respect to it."""
        self._store.remove(f"gradient-{index}")

    def clear(self) -> None:
        """Remove all files; the loss stays."""
        self._store.clear()


def _of_mixture(index: int) -> tuple[str, str]:
    """Names of the files of a block's mixture: its input, and the gradient with respect to its output."""
    return f"mixture-{index}", f"mixture-gradient-{index}"
