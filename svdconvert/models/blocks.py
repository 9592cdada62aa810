"""A causal language model in pieces, each brought to the device alone: embeddings, one transformer block, head.

The class that the checkpoint would be loaded into, transformers' own or that of our modeling file, is built without
weights; a piece gets its weights from the source's tensors for as long as it is in use. What a block is called with
(masks, position embeddings, cache positions) differs from one version of transformers to the next and, where some
blocks have a sliding window, from block to block. So it is not written down here: the base model's own forward is run
with recorders in the place of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from svdconvert.errors import InputError
from svdconvert.families.fused import fused_layer, section_of
from svdconvert.families.row import Section
from svdconvert.families.table import dense_architecture, factored_architecture
from svdconvert.foreign import foreign_code
from svdconvert.layouts.table import shared_layers
from svdconvert.models.skeleton import is_factored, move_buffers, skeleton
from svdconvert.names import layer_number, suffix
from svdconvert.storage.reader import WeightReader, torch_dtype
from svdconvert.storage.source import Source

# As much of a head is in memory at a time where it is run in parts, in bytes; a vocabulary's whole one may be larger
# than everything else.
HEAD_BYTES = 2**25

# Where a rehearsal ends, as far as it can go: what follows depends on what tensors hold.
_NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class Pieces:
    """Where the pieces are within the base model of a family; its head is found by ``get_output_embeddings``.

    Attributes:
        embeddings: modules with weights that run before the first block; the first one is what a tied head shares.
            A module that a model does not have is passed over.
        blocks: the list of blocks.
        final: what runs between the last block and the head; passed over likewise.
        logits: (config, what the head gives) -> the model's logits.
        writers: linear layers of a block whose output is added to the hidden state as it is.
    """

    embeddings: tuple[str, ...]
    blocks: str
    final: tuple[str, ...]
    writers: tuple[str, ...] = ()
    logits: Callable[[Any, Tensor], Tensor] = lambda config, logits: logits


def _soft_capped(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _scaled_down(config: Any, logits: Tensor) -> Tensor:
    return logits / config.logits_scaling


_LLAMA = Pieces(("embed_tokens",), "layers", ("norm",), ("self_attn.o_proj", "mlp.down_proj"))

PIECES: Mapping[str, Pieces] = {
    "gpt_neox": Pieces(("embed_in",), "layers", ("final_layer_norm",), ("attention.dense", "mlp.dense_4h_to_h")),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _LLAMA),
    # In these two, a norm or a factor comes between those layers and the sum.
    "gemma2": replace(_LLAMA, writers=(), logits=_soft_capped),
    "granite": replace(_LLAMA, writers=(), logits=_scaled_down),
    "opt": Pieces(
        ("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        "decoder.layers",
        ("decoder.final_layer_norm", "decoder.project_out"),
        ("self_attn.out_proj", "fc2"),
    ),
    "gpt2": Pieces(("wte", "wpe"), "h", ("ln_f",), ("attn.c_proj", "mlp.c_proj")),
}


@dataclass(frozen=True)
class Call:
    """What the base model hands to one of its blocks.

    Attributes:
        hidden: [batch, length, hidden], the block's input; it is the model's own for the first block only.
        args, kwargs: everything else.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


# a module of the model, and where its tensors are stored: its own name for each -> the checkpoint's
Part = tuple[nn.Module, Mapping[str, str]]


class ModelBlocks:
    """A model, dense or factored, of which only one piece has weights at a time.

    Weights are read into ``dtype`` on ``device``, whatever type they are stored in; stored integers stay what they are.
    Gradients of weights are never computed; those of inputs are, where a caller asks for them.

    Attributes:
        shapes: tensors that the class has, by their names in it.
        tied: whether its head is the embedding's other use.
    """

    def __init__(
        self,
        source: Source,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        stored_as: Mapping[str, torch.dtype] = MappingProxyType({}),
    ) -> None:
        """Build the model without weights.

        Args:
            source: the checkpoint. A factored one can be run, but its matrices can be neither read nor replaced.
            device: where pieces are put.
            dtype: what they compute in.
            stored_as: types that some weights are rounded to first, by their full names.

        Raises:
            InputError: the architecture cannot be taken apart, or its config is wrong.
        """
        factored = is_factored(source)
        row = (factored_architecture if factored else dense_architecture)(source.config, source.where)
        if row.model_type not in PIECES:
            known = ", ".join(sorted(PIECES))
            raise InputError(f"{source.where} ({row.model_type}) cannot be run block by block; known: {known}")
        self._source, self._row, self._pieces = source, row, PIECES[row.model_type]
        self._head_name = row.head[factored]
        full = row.full_names(source.tensors, source.config)
        self._tensors = {full[name]: info for name, info in source.tensors.items()}
        self.device, self.dtype, self._stored_as = torch.device(device), dtype, stored_as
        self._model = skeleton(source, row)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self.tied = bool(self._model.config.tie_word_embeddings)
        # Where norms come after the sums (an OPT of that kind), a block's outputs do not add up.
        self.writers = self._pieces.writers if getattr(self._model.config, "do_layer_norm_before", True) else ()
        self._base: nn.Module = self._model.base_model
        self._layers: list[nn.Module] = list(self._base.get_submodule(self._pieces.blocks))
        self._calls: list[Call] = []
        recorders = [_Recorder(layer, self._calls) for layer in self._layers]
        recorders[-1].last = True
        _set(self._base, self._pieces.blocks, nn.ModuleList(recorders))
        move_buffers(self._base, self.device)
        for module in self._present(self._pieces.embeddings[1:]).values():
            _hollow(module, self.device, dtype)
        self.count = len(self._layers)
        self.hidden_size: int = self._model.config.hidden_size
        self.vocabulary: int = self._model.get_output_embeddings().weight.shape[0]
        # A model without a limit does not have the field.
        self.longest: int | None = getattr(self._model.config, "max_position_embeddings", None)
        self._arguments: dict[tuple[int, ...], list[Call]] = {}

    @contextmanager
    def embeddings(self, highest: int | None = None) -> Iterator[None]:
        """Have the embeddings' weights on the device; :meth:`embed` works inside.

        Args:
            highest: the highest token id that it will be asked for; rows of higher ones are not read.
        """
        tokens, *others = self._present(self._pieces.embeddings).items()
        rows = None if highest is None else slice(0, highest + 1)
        with (
            self._weights([self._part(*tokens)], partial(self._begin, rows=rows)),
            self._weights(self._part(*other) for other in others),
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
        return self._record({"input_ids": ids.to(self.device)}, mask)[0].hidden

    def is_linear(self, index: int, path: str) -> bool:
        """Whether a block has a linear layer of this path."""
        from transformers.pytorch_utils import Conv1D

        return isinstance(dict(self._layers[index].named_modules()).get(path), (nn.Linear, Conv1D))

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Have one block's weights on the device.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        module = self._layers[index]
        move_buffers(module, self.device)
        with self._weights([self._part(f"{self._pieces.blocks}.{index}", module), *self._lent(index)]):
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
        call = self._call(self._layers.index(block), hidden, mask)
        output = block(hidden, *call.args, **call.kwargs)
        # transformers 4 returns a tuple; 5 returns the tensor itself, of which [0] would be the first sample.
        return output[0] if isinstance(output, tuple) else output

    def rehearse(self) -> None:
        """Go through a block of each kind without weights and without values: types and shapes alone.

        Raises:
            InputError: the class does not take what config.json says.
        """
        mask, kinds = torch.ones(1, 4, dtype=torch.bool), set()
        with foreign_code(f"config.json of {self._source.where} cannot be used"), torch.no_grad():
            hidden = torch.zeros(1, 4, self.hidden_size, device=self.device)
            for index, block in enumerate(self._layers):
                if (kind := getattr(block, "attention_type", None)) in kinds:
                    continue
                kinds.add(kind)
                call = self._call(index, hidden, mask)
                with suppress(*_NEED_VALUES), FakeTensorMode():
                    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
                    given = (tensors, (hidden, *call.args), dict(call.kwargs))
                    functional_call(block, *tree_map_only(Tensor, self._without_values, given))

    def _without_values(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """Have the final norm's and the head's weights on the device.

        Yields:
            [..., hidden] -> logits [..., vocabulary], each position by itself.
        """
        final, head = self._present(self._pieces.final), self._head()
        with self._weights([*(self._part(*part) for part in final.items()), head]):
            yield nn.Sequential(*final.values(), head[0], _Logits(self._pieces.logits, self._model.config))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """The logits, with a part of the head's weights on the device at a time.

        Args:
            hidden: [..., hidden], the last block's output.

        Yields:
            [..., n], those of the vocabulary's next n tokens.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        final, (head, names) = self._present(self._pieces.final), self._head()
        with self._weights(self._part(*part) for part in final.items()):
            hidden = nn.Sequential(*final.values())(hidden)
        step = max(1, HEAD_BYTES // (hidden.shape[-1] * self.dtype.itemsize))
        for begin in range(0, self.vocabulary, step):
            rows = slice(begin, min(begin + step, self.vocabulary))
            with self._weights([(head, names)], partial(self._read, rows=rows)):
                part = self._pieces.logits(self._model.config, head(hidden))
            yield part

    def place(self, path: str) -> tuple[str, Section | None]:
        """The linear layer of a block that a path means, and which of its outputs; None for all of them.

        The parts of fused projections have paths too, see ``families/fused.py``.
        """
        layer = fused_layer(self._row, path)
        return (path, None) if layer is None else (layer, section_of(self._row, self._source.config, path))

    def matrix(self, block: nn.Module, path: str) -> Tensor:
        """Weight [out, in] of a linear layer in a block, or of a part of one."""
        layer, section = self.place(path)
        whole = _matrix(block.get_submodule(layer))
        return whole if section is None else section.of(whole)

    @contextmanager
    def replaced(self, block: nn.Module, matrices: Mapping[str, Tensor]) -> Iterator[None]:
        """Have other weights [out, in] in some linear layers of a block, or parts of them, by their paths."""
        layers = [self.place(path)[0] for path in matrices]
        dense: dict[str, Any] = {layer: block.get_submodule(layer).weight for layer in layers}
        try:
            for path, other in matrices.items():
                name, section = self.place(path)
                layer = block.get_submodule(name)
                weight = other.to(_matrix(layer))
                if section is not None:
                    part, weight = weight, _matrix(layer).clone()
                    section.put(part, weight)
                layer.weight = nn.Parameter(weight if isinstance(layer, nn.Linear) else weight.T, requires_grad=False)
            yield
        finally:
            for name, weight in dense.items():
                block.get_submodule(name).weight = weight

    def _present(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Those of the modules that this model has."""
        modules = dict(self._base.named_modules())
        return {name: modules[name] for name in names if name in modules}

    def _part(self, path: str, module: nn.Module) -> Part:
        """A module of the base model with what is stored of it: its parameters, and buffers that are not computed."""
        return module, {key: f"{self._row.prefix}{path}.{key}" for key in module.state_dict()}

    def _head(self) -> Part:
        """The head, which may be the embedding's other use."""
        head, own = self._model.get_output_embeddings(), self._head_name
        stored = own
        if self._row.is_tied(self._source.config) or own not in self._tensors:
            stored = f"{self._row.prefix}{self._pieces.embeddings[0]}.weight"
        return head, {key: stored if key == "weight" else own[:-6] + key for key in head.state_dict()}

    def _lent(self, index: int) -> Iterator[Part]:
        """What layers of a block use of layers in other blocks."""
        shared = shared_layers(self._source.config)
        owners = dict.fromkeys(owner for user, owner in shared.items() if layer_number(user) == index)
        for owner in owners:
            if (other := layer_number(owner)) != index:
                down = f"{suffix(owner)}.down"
                yield self._part(f"{self._pieces.blocks}.{other}.{down}", self._layers[other].get_submodule(down))

    def _call(self, index: int, hidden: Tensor, mask: Tensor) -> Call:
        """What a block is called with for this batch; it depends on the mask and on the input's shape alone."""
        width = self._model.get_input_embeddings().weight.shape[1]
        inputs = {"inputs_embeds": hidden.new_zeros(()).expand(*mask.shape, width)}
        if not bool(mask.all()):
            return self._record(inputs, mask)[index]
        key = tuple(mask.shape)
        if key not in self._arguments:
            self._arguments = {key: self._record(inputs, mask)}
        return self._arguments[key][index]

    def _record(self, inputs: Mapping[str, Tensor], mask: Tensor) -> list[Call]:
        """What each block is called with."""
        self._calls.clear()
        with torch.no_grad(), suppress(_Recorded):
            self._base(**inputs, attention_mask=mask.to(self.device), use_cache=False)
        calls = list(self._calls)
        self._calls.clear()
        assert len(calls) == self.count, "the base model did not call its blocks in their order"
        return calls

    @contextmanager
    def _weights(self, parts: Iterable[Part], read: Callable[..., Tensor] | None = None) -> Iterator[None]:
        """Give modules their weights, and take them away again.

        Args:
            parts: the modules.
            read: reads one, from a reader, its name and the tensor whose place it takes; by default all of it.
        """
        reader = WeightReader(self._source)
        taken: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for module, names in parts:
                for key, name in names.items():
                    path, _, last = key.rpartition(".")
                    owner = module.get_submodule(path)
                    empty = getattr(owner, last)
                    taken.append((owner, last, empty))
                    stored = (read or self._read)(reader, name, empty)
                    is_weight = isinstance(empty, nn.Parameter)
                    setattr(owner, last, nn.Parameter(stored, requires_grad=False) if is_weight else stored)
            yield
        finally:
            reader.close()
            for owner, last, empty in taken:
                setattr(owner, last, empty)

    def _begin(self, reader: WeightReader, name: str, like: Tensor, rows: slice | None) -> Tensor:
        """A tensor of which some rows are read; the others are whatever is there, in memory that nobody has touched."""
        stored = self._read(reader, name, like, rows)
        if len(stored) == len(like):
            return stored
        whole = stored.new_empty(like.shape)
        whole[: len(stored)] = stored
        return whole

    def _read(self, reader: WeightReader, name: str, like: Tensor, rows: slice | None = None) -> Tensor:
        """A stored tensor, or some of its rows."""
        info = self._tensors.get(name)
        if info is None:
            raise InputError(f"{self._source.where} lacks {name}; the checkpoint is incomplete, fetch it again")
        if info.shape != tuple(like.shape):
            raise InputError(
                f"tensor {name} of {self._source.where} has shape {list(info.shape)}, but by config.json it must be "
                f"{list(like.shape)}; config and weights are not of one model"
            )
        if rows is not None:
            info = info.rows(rows.start, rows.stop)
        dtype = self.dtype if like.is_floating_point() else like.dtype
        weight = torch.empty(info.shape, dtype=dtype, device=self.device)
        flat, done = weight.view(-1), 0
        # In pieces, so that a large one is not in memory in both types at a time.
        for data in reader.stream(info):
            stored = data.view(torch_dtype(info.dtype))
            piece = flat[done : done + len(stored)].copy_(stored)
            done += len(stored)
            # of what isfinite() takes memory for, these are all that counts: NaN comes out of them as NaN
            if all(bool(torch.isfinite(end)) for end in torch.aminmax(piece)):
                continue
            if not bool(torch.isfinite(stored).all()):
                raise InputError(f"tensor {name} has NaN or infinite entries; repair the checkpoint")
            raise InputError(f"tensor {name} exceeds the range of {dtype}; compute in another type")
        return weight.to(self._stored_as.get(name, dtype)).to(dtype)


def _matrix(layer: nn.Module) -> Tensor:
    """Weight [out, in] of a linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T  # Conv1D of GPT-2 has it as [in, out]


class _Recorded(Exception):
    """Leaves the base model's forward where its last block would begin."""


class _Recorder(nn.Module):
    """Stands in for one block and keeps what it is called with."""

    def __init__(self, layer: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls
        # Some versions choose a block's mask by it.
        self.attention_type = getattr(layer, "attention_type", None)
        self.last = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._calls.append(Call(hidden_states, args, kwargs))
        if self.last:
            raise _Recorded
        # A version that wants a tensor takes the tuple on to the next recorder, which does not look at it.
        return (hidden_states,)


class _Logits(nn.Module):
    """What a family does with its head's output."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], config: Any) -> None:
        super().__init__()
        self._function, self._config = function, config

    def forward(self, logits: Tensor) -> Tensor:
        return self._function(self._config, logits)


def _hollow(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put zeros that take no memory in the place of parameters on the meta device.

    Blocks are called with what does not depend on embeddings, but a forward that adds positions to what it is given
    needs some that can be added.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
            setattr(part, name, nn.Parameter(zeros, requires_grad=False))


def _set(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
