"""A causal language model in pieces, each brought to the device alone: embeddings, one transformer block, head.

The stock class of transformers is built without weights; a piece gets its weights from the source's tensors for as long
as it is in use. What a block is called with (masks, position embeddings, cache positions) differs from one version of
transformers to the next, so it is not written down here: the base model's own forward is run with a recorder in the
place of its blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.architectures import dense_architecture
from svdconvert.errors import InputError
from svdconvert.loading import quiet_transformers
from svdconvert.source import Source
from svdconvert.weights import WeightReader


@dataclass(frozen=True)
class Pieces:
    """Where the pieces are within the base model of a family; its head is found by ``get_output_embeddings``.

    Attributes:
        embeddings: modules with weights that run before the first block; the first one is what a tied head shares.
        blocks: the list of blocks.
        norm: what runs between the last block and the head.
        writers: linear layers of a block whose output is added to the hidden state as it is.
    """

    embeddings: tuple[str, ...]
    blocks: str
    norm: str
    writers: tuple[str, ...] = ()


PIECES: Mapping[str, Pieces] = {
    "gpt_neox": Pieces(("embed_in",), "layers", "final_layer_norm", ("attention.dense", "mlp.dense_4h_to_h"))
}


@dataclass(frozen=True)
class Call:
    """What the base model hands to its first block.

    Attributes:
        hidden: [batch, length, hidden], the first block's input.
        args, kwargs: everything else, the same for every block.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class ModelBlocks:
    """A dense model of which only one piece has weights at a time.

    Weights are read into ``dtype`` on ``device``, whatever type they are stored in. Gradients of weights are never
    computed; those of inputs are, where a caller asks for them.
    """

    def __init__(self, source: Source, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Build the model without weights.

        Args:
            source: the dense checkpoint.
            device: where pieces are put.
            dtype: what they compute in.

        Raises:
            InputError: the architecture cannot be taken apart, or its config is wrong.
        """
        row = dense_architecture(source.config, source.name)
        if row.model_type not in PIECES:
            known = ", ".join(sorted(PIECES))
            raise InputError(f"{source.name} ({row.model_type}) cannot be run block by block; known: {known}")
        self._source, self._row, self._pieces = source, row, PIECES[row.model_type]
        self.writers = self._pieces.writers
        self.device, self.dtype = torch.device(device), dtype
        self._model = _skeleton(source)
        self._base: nn.Module = self._model.base_model
        self._layers: list[nn.Module] = list(getattr(self._base, self._pieces.blocks))
        setattr(self._base, self._pieces.blocks, nn.ModuleList([_Recorder()]))
        _move_buffers(self._base, self.device)
        self.count = len(self._layers)
        self.hidden_size: int = self._model.get_input_embeddings().weight.shape[1]
        self.vocabulary: int = self._model.get_output_embeddings().weight.shape[0]
        # Polyglot and its like know their longest input; a model without a limit has none of these fields.
        self.longest: int | None = source.config.get("max_position_embeddings")
        self._arguments: dict[tuple[int, ...], Call] = {}

    @contextmanager
    def embeddings(self) -> Iterator[None]:
        """Have the embeddings' weights on the device; :meth:`embed` works inside."""
        prefix = self._row.prefix
        parts = {name: getattr(self._base, name) for name in self._pieces.embeddings}
        with self._weights(
            (module, {key: f"{prefix}{name}.{key}" for key, _ in module.named_parameters()})
            for name, module in parts.items()
        ):
            yield

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The first block's input.

        Args:
            ids: [batch, length], int64.
            mask: [batch, length], bool; False is padding.

        Returns:
            [batch, length, hidden] on the device.
        """
        return self._record({"input_ids": ids.to(self.device)}, mask).hidden

    def is_linear(self, index: int, path: str) -> bool:
        """Whether a block has a linear layer of this path."""
        return isinstance(dict(self._layers[index].named_modules()).get(path), nn.Linear)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Have one block's weights on the device.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        module = self._layers[index]
        prefix = f"{self._row.prefix}{self._pieces.blocks}.{index}."
        _move_buffers(module, self.device)
        with self._weights([(module, {key: prefix + key for key, _ in module.named_parameters()})]):
            yield module

    def run(self, block: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """A block's output.

        Args:
            block: from :meth:`block`, inside of its context.
            hidden: [batch, length, hidden] on the device.
            mask: [batch, length], bool; False is padding.

        Returns:
            [batch, length, hidden], differentiable with respect to ``hidden``.
        """
        call = self._call(hidden, mask)
        output = block(hidden, *call.args, **call.kwargs)
        # transformers 4 returns a tuple; 5 returns the tensor itself, of which [0] would be the first sample.
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Have the final norm's and the head's weights on the device.

        Yields:
            [..., hidden] -> logits [..., vocabulary], each position by itself.
        """
        norm, head = getattr(self._base, self._pieces.norm), self._model.get_output_embeddings()
        stored = self._row.head[0]
        if self._source.config.get("tie_word_embeddings", False) or stored not in self._source.tensors:
            stored = f"{self._row.prefix}{self._pieces.embeddings[0]}.weight"
        names = {key: stored if key == "weight" else self._row.head[0][:-6] + key for key, _ in head.named_parameters()}
        prefix = f"{self._row.prefix}{self._pieces.norm}."
        with self._weights([(norm, {key: prefix + key for key, _ in norm.named_parameters()}), (head, names)]):
            yield nn.Sequential(norm, head)

    def _call(self, hidden: Tensor, mask: Tensor) -> Call:
        """What every block is called with for this batch; it depends on the mask and on the input's shape alone."""
        if not bool(mask.all()):
            return self._record({"inputs_embeds": hidden.detach()}, mask)
        key = tuple(mask.shape)
        if key not in self._arguments:
            self._arguments = {key: self._record({"inputs_embeds": hidden.detach()}, mask)}
        return self._arguments[key]

    def _record(self, inputs: Mapping[str, Tensor], mask: Tensor) -> Call:
        with torch.no_grad():
            try:
                self._base(**inputs, attention_mask=mask.to(self.device), use_cache=False)
            except _Recorded as recorded:
                return recorded.call
        raise AssertionError("the base model never called its blocks")

    @contextmanager
    def _weights(self, parts: Any) -> Iterator[None]:
        """Give modules their weights, and take them away again."""
        reader = WeightReader(self._source)
        taken: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module, names in parts:
                for key, name in names.items():
                    path, _, last = key.rpartition(".")
                    owner = module.get_submodule(path)
                    empty = getattr(owner, last)
                    taken.append((owner, last, empty))
                    setattr(owner, last, nn.Parameter(self._read(reader, name, empty), requires_grad=False))
            yield
        finally:
            reader.close()
            for owner, last, empty in taken:
                setattr(owner, last, empty)

    def _read(self, reader: WeightReader, name: str, like: Tensor) -> Tensor:
        info = self._source.tensors.get(name)
        if info is None:
            raise InputError(f"{self._source.name} lacks {name}; the checkpoint is incomplete, fetch it again")
        if info.shape != tuple(like.shape):
            raise InputError(
                f"tensor {name} of {self._source.name} has shape {list(info.shape)}, but by config.json it must be "
                f"{list(like.shape)}; config and weights are not of one model"
            )
        stored = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
        if not bool(torch.isfinite(stored).all()):
            raise InputError(f"tensor {name} has NaN or infinite entries; repair the source checkpoint")
        weight = stored.to(device=self.device, dtype=self.dtype)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"tensor {name} exceeds the range of {self.dtype}; compute in another type")
        return weight


def matrix(block: nn.Module, path: str) -> Tensor:
    """Weight [out, in] of a linear layer in a block."""
    weight = block.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


@contextmanager
def replaced(block: nn.Module, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Have other weights [out, in] in some linear layers of a block, by their paths."""
    dense: dict[str, Any] = {path: block.get_submodule(path).weight for path in matrices}
    try:
        for path, other in matrices.items():
            block.get_submodule(path).weight = nn.Parameter(other.to(dense[path]), requires_grad=False)
        yield
    finally:
        for path, weight in dense.items():
            block.get_submodule(path).weight = weight


class _Recorded(Exception):
    """Leaves the base model's forward where its first block would begin."""

    def __init__(self, call: Call) -> None:
        self.call = call


class _Recorder(nn.Module):
    """Stands in for the blocks and keeps what they are called with."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise _Recorded(Call(hidden_states, args, kwargs))


def _skeleton(source: Source) -> Any:
    """The stock model in evaluation mode: its parameters on the meta device, its buffers real.

    Buffers that are computed rather than stored (rotary frequencies, causal masks) have no values on the meta device
    and come out uninitialised from ``to_empty``, so only parameters are left out.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in source.config.items() if key != "model_type"}
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    # Without it the config's half type becomes the type that buffers are computed in.
    dtype = {"dtype" if version >= (4, 56) else "torch_dtype": torch.float32}
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            config = AutoConfig.for_model(source.config["model_type"], **settings)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **dtype)
    except (ValueError, TypeError, KeyError, RuntimeError, _config_error()) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise InputError(f"config.json of {source.name} cannot be used: {reason}") from None
    return model.eval()


def _config_error() -> type[Exception]:
    """What transformers 5 raises for a config that contradicts itself; before it was a ValueError."""
    from huggingface_hub import errors

    found = getattr(errors, "StrictDataclassError", ValueError)
    assert issubclass(found, Exception)
    return found


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            assert not buffer.is_meta, name
            part._buffers[name] = buffer.to(device)
