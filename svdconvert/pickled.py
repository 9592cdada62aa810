"""Legacy ``pytorch_model*.bin`` files, read without ever executing what a pickle may contain."""

from __future__ import annotations

import pickle
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.errors import InputError
from svdconvert.headers import CODES, TensorInfo

if TYPE_CHECKING:
    import torch


@lru_cache(maxsize=2)
def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Map a pickled state dict: tensors are views of the file, read only when they are touched.

    Raises:
        InputError: the file is damaged, older than torch 1.6's zip format, or holds anything but named tensors.
    """
    import torch

    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} is a pickle that holds more than weights, and opening it could run foreign code; "
            "save the model again with save_pretrained and give that folder"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError, KeyError) as error:
        if "mmap can only be used" in str(error):
            raise InputError(
                f"{path} is in the pickle format of torch before 1.6; save the model again with save_pretrained "
                "and give that folder"
            ) from None
        raise InputError(
            f"{path} is damaged or no weight file ({str(error).splitlines()[0]}); fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(f"{path} does not hold a plain dictionary of tensors; save the model with save_pretrained")
    return state


def pickled_header(path: Path) -> list[TensorInfo]:
    """Names, types and shapes of the tensors in a pickled file. Raises as :func:`load_pickled`."""
    infos = []
    for name, tensor in load_pickled(path).items():
        code = CODES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise InputError(f"tensor {name} in {path.name} has the unsupported type {tensor.dtype}")
        infos.append(TensorInfo(name, code, tuple(tensor.shape), path.name))
    return infos
