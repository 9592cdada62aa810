"""Legacy ``pytorch_model*.bin`` files, read without ever executing code in a pickle."""

from __future__ import annotations

import pickle
import struct
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.errors import InputError
from svdconvert.storage.documents import open_regular, reading
from svdconvert.storage.headers import MAX_DIMENSIONS, MAX_HEADER_BYTES, check_name
from svdconvert.tensors import CODES, TensorInfo

if TYPE_CHECKING:
    import torch

# Quantisers whose classes occur in pickles of quantised weights.
_QUANTISERS = ("torchao", "quanto", "bitsandbytes", "hqq", "auto_round", "neural_compressor")


@lru_cache(maxsize=2)
def load_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Map a pickled state dict: tensors are views of the file, read when they are first used.

    Raises:
        InputError: the file is damaged, older than torch 1.6's zip format, or holds anything but named tensors.
    """
    import torch

    _check_archive(path)
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        if quantiser := next((name for name in _QUANTISERS if name in str(error)), None):
            raise InputError(
                f"{path} holds weights that {quantiser} has quantised; convert the unquantised model and quantise the "
                "result"
            ) from None
        raise InputError(
            f"{path} is a pickle that holds more than weights, and opening it could run foreign code; "
            "save the model again with save_pretrained and give that folder"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged pickle may raise anything
        if "mmap can only be used" in str(error):
            raise InputError(
                f"{path} is in the pickle format of torch before 1.6; save the model again with save_pretrained "
                "and give that folder"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is damaged or not a weight file ({reason}); fetch it again") from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(f"{path} does not hold a plain dictionary of tensors; save the model with save_pretrained")
    for name, tensor in state.items():
        _check_tensor(path, name, tensor)
    return dict(state)


def pickled_header(path: Path) -> list[TensorInfo]:
    """Names, types and shapes of the tensors in a pickled file. Raises as :func:`load_pickled`."""
    infos = []
    for name, tensor in load_pickled(path).items():
        code = CODES.get(str(tensor.dtype).removeprefix("torch."))
        if code is None:
            raise InputError(f"tensor {name} in {path.name} has the unsupported type {tensor.dtype}")
        infos.append(TensorInfo(name, code, tuple(tensor.shape), path.name))
    return infos


def _check_archive(path: Path) -> None:
    """Refuse an archive with compressed parts: unpacking could fill the memory.

    Files that are not archives are left to torch, which knows older formats by name.
    """
    try:
        with reading(path), open_regular(path, advice="put the weight file in its place") as handle:
            if not zipfile.is_zipfile(handle):
                return
            parts = zipfile.ZipFile(handle).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{path} is damaged or not a weight file ({error}); fetch it again") from None
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
            raise InputError(
                f"{path} is packed at {part.filename}, which torch never does; save the model again with "
                "save_pretrained"
            )
        if part.filename.endswith(".pkl") and part.file_size > MAX_HEADER_BYTES:
            raise InputError(
                f"{path} has {part.file_size:,} bytes besides its weights, so it is not a checkpoint; fetch it again"
            )


def _check_tensor(path: Path, name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is not a plain array of stored numbers."""
    check_name(name, path.name)
    if (
        str(tensor.layout) != "torch.strided"
        or tensor.device.type != "cpu"
        or tensor.is_quantized
        or tensor.dim() > MAX_DIMENSIONS
    ):
        raise InputError(f"tensor {name} in {path} is not a plain array; save the model again with save_pretrained")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"tensor {name} in {path} claims {tensor.numel() * tensor.element_size():,} bytes, but "
            f"{tensor.untyped_storage().nbytes():,} are stored; save the model again with save_pretrained"
        )
