"""A causal language model in pieces, each brought to the device alone: embeddings, one transformer block, head.

The class that would load the checkpoint, the stock one or that of our modeling file, is built without weights; a piece
has its weights only while it is in use (``piece_weights.py``). The arguments of a block come from the base model's own
forward (``calls.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
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
from svdconvert.families.table import LONGEST, dense_architecture, factored_architecture
from svdconvert.foreign import CORRECT, foreign_code
from svdconvert.layouts.table import shared_layers
from svdconvert.machine.products import fast_products
from svdconvert.models.calls import BlockCalls, Call, block_output
from svdconvert.models.head import Head, Logits, whole_head
from svdconvert.models.head_sizes import HEAD_BYTES, head_sizes
from svdconvert.models.matrices import differentiable, is_linear, matrix, replaced
from svdconvert.models.piece_weights import Part, PieceWeights
from svdconvert.models.routing import Routing
from svdconvert.models.skeleton import is_factored, move_buffers, skeleton
from svdconvert.models.tokenizer import OWN_TOKENIZER
from svdconvert.names import expert, layer_number, suffix
from svdconvert.storage.source import Source

# These end a rehearsal: what follows depends on the values of tensors.
_NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class ModelBlocks:
    """A model, dense or factored, of which only one piece has weights at a time.

    Weights are read into ``dtype`` on ``device``, whatever type they are stored in; stored integers stay integers.
    Gradients of inputs and of linear layers' weights are computed where a caller asks for them.

    Attributes:
        shapes: of the class's tensors, by their names in it.
        tied: whether the embedding is its head, too.
        width: channels of the head's input; of some OPTs not those of the hidden states.
        experts: of the family; None if there are none.
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
            source: the checkpoint. A factored one can be run, but its matrices cannot be read or replaced.
            device: of the piece in use.
            dtype: that it computes in.
            stored_as: types that some weights are rounded to first, by their full names.

        Raises:
            InputError: its architecture is unknown, or its config is wrong.
        """
        factored = is_factored(source)
        row = (factored_architecture if factored else dense_architecture)(source.config, source.where)
        self._source, self._row, self._pieces, self.experts = source, row, row.pieces, row.experts
        self._head_name = row.head[factored]
        full = row.full_names(source.tensors, source.config)
        self._tensors = {full[name]: info for name, info in source.tensors.items()}
        self.device, self.dtype = torch.device(device), dtype
        self._weights = PieceWeights(source, self._tensors, device=self.device, dtype=dtype, stored_as=stored_as)
        self._model = skeleton(source, row)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        self.tied = bool(self._model.config.tie_word_embeddings)
        self.writers = self._pieces.writers if _adds_up(self._model.config) else ()
        self._base: nn.Module = self._model.base_model
        self._layers: list[nn.Module] = list(self._base.get_submodule(self._pieces.blocks))
        self._calls = BlockCalls(self._base, self._pieces.blocks, self._layers, self.device)
        move_buffers(self._base, self.device)
        for module in self._present(self._pieces.embeddings[1:]).values():
            _hollow(module, self.device, dtype)
        self.count = len(self._layers)
        self.hidden_size: int = self._model.config.hidden_size
        self.vocabulary: int = self._model.get_output_embeddings().weight.shape[0]
        self.width: int = self._model.get_output_embeddings().weight.shape[1]
        # Models without a limit lack the field.
        longest = (getattr(self._model.config, name, None) for name in LONGEST)
        self.longest: int | None = next((length for length in longest if length is not None), None)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The first block's input; of the embeddings, these tokens' alone are read.

        Args:
            ids: [batch, length], int64.
            mask: [batch, length], bool; False is padding.

        Returns:
            [batch, length, hidden] on the device.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named. Or a token is none of the model's.
        """
        tokens, *others = self._present(self._pieces.embeddings).items()
        rows, places = torch.unique(ids, return_inverse=True)
        known = self._model.get_input_embeddings().weight.shape[0]
        if not 0 <= int(rows[0]) <= int(rows[-1]) < known:  # else other tensors' bytes would be read
            raise InputError(
                f"the text has the token {int(rows[-1])}, but {self._source.where} knows {known:,}; the tokenizer "
                f"belongs to another model, so {OWN_TOKENIZER}"
            )
        with (
            self._weights.given([self._part(*tokens)], partial(self._weights.chosen, rows=rows.tolist())),
            self._weights.given(self._part(*other) for other in others),
        ):
            return self._calls.record({"input_ids": places.to(self.device)}, mask)[0].hidden

    def is_linear(self, index: int, path: str) -> bool:
        """Whether a block has a linear layer of this path."""
        return is_linear(dict(self._layers[index].named_modules()).get(path))

    def sides(self, index: int, path: str) -> tuple[int, int]:
        """(out, in) of a linear layer of a block, by its path, where the layers are PyTorch's own."""
        layer = self._layers[index].get_submodule(path)
        assert isinstance(layer, nn.Linear)
        return layer.out_features, layer.in_features

    def expert_bytes(self, index: int) -> int:
        """What the weights of all experts of a block take."""
        named = self._layers[index].named_parameters()
        return self.dtype.itemsize * sum(weight.numel() for name, weight in named if expert(name))

    @contextmanager
    def block(self, index: int, *, by_expert: bool = False) -> Iterator[nn.Module]:
        """Have one block's weights on the device.

        Inside, this thread's float32 products are computed as :mod:`svdconvert.machine.products` says.

        Args:
            index: of the block.
            by_expert: whether an expert's weights are there only while it is run, and are read again for a backward
                pass. All are read, whether or not a token is sent there.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        module = self._layers[index]
        move_buffers(module, self.device)
        parts = self._parts(index, expert if by_expert else _together)
        present = self._weights.given(parts.pop(""))
        experts = {module.get_submodule(path): own for path, own in parts.items()}
        with present, self._weights.given_in_turn(experts), fast_products(self.device):
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
        return block_output(output)

    def mixture(self, block: nn.Module) -> nn.Module:
        """The part of a block that holds its experts: [batch, length, hidden] -> the same, as a block gives it."""
        assert self.experts is not None
        return block.get_submodule(self.experts.mixture)

    @contextmanager
    def some_experts(self, index: int, experts: Collection[str], by_expert: bool = False) -> Iterator[nn.Module]:
        """Have a block in which its mixture alone can be run, for what some experts do; others give zeros.

        Args:
            index: of the block.
            experts: their paths in the block.
            by_expert: whether the weights of each are there only while it is run, as in :meth:`block`.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        assert self.experts is not None
        block, mixture = self._layers[index], f"{self.experts.mixture}."
        move_buffers(block, self.device)
        parts = self._parts(index, lambda path: expert(path) or ("" if path.startswith(mixture) else "elsewhere"))
        present = self._weights.given(parts.pop(""))
        parts.pop("elsewhere", None)
        chosen = {block.get_submodule(path): own for path, own in parts.items() if path in experts}
        others = [block.get_submodule(path) for path in parts if path not in experts]
        try:
            for module in others:
                module.forward = _zeros
            together = [] if by_expert else [part for own in chosen.values() for part in own]
            in_turn = self._weights.given_in_turn(chosen if by_expert else {}, unseen=False)
            with present, self._weights.given(together), in_turn, fast_products(self.device):
                yield block
        finally:
            for module in others:
                module.__dict__.pop("forward", None)

    def rehearse(self) -> None:
        """Run a block of each kind without weights and values: types and shapes alone.

        Raises:
            InputError: the class rejects config.json.
        """
        mask, kinds = torch.ones(1, 4, dtype=torch.bool), set()
        with foreign_code(f"config.json of {self._source.where} cannot be used", CORRECT), torch.no_grad():
            hidden = torch.zeros(1, 4, self.hidden_size, device=self.device)
            for index, block in enumerate(self._layers):
                if (kind := (getattr(block, "attention_type", None), *block.state_dict())) in kinds:
                    continue
                kinds.add(kind)
                call = self._call(index, hidden, mask)
                _, *lent = self._parts(index, _together)[""]
                with (
                    suppress(*_NEED_VALUES),
                    FakeTensorMode(allow_non_fake_inputs=True),  # tables that are no buffers
                    self._weights.given(lent, lambda reader, name, empty: self._without_values(empty)),
                ):
                    tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
                    given = (tensors, (hidden, *call.args), dict(call.kwargs))
                    functional_call(block, *tree_map_only(Tensor, self._without_values, given))

    def _without_values(self, tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)

    @contextmanager
    def head(self) -> Iterator[Head]:
        """Have the final norm's weights on the device, and the head's; those of a large one part by part, as asked for.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named. Of parts, when one is asked for.
        """
        sizes = head_sizes(self.device.type)
        parts = self._head_parts(sizes.at_a_time(self.vocabulary, self._token_bytes))
        with self.final() as final, ExitStack() as stack:
            if len(parts) == 1:
                yield whole_head(stack.enter_context(self.output()), self.vocabulary, final)
            else:
                yield Head(final, parts, sizes.positions, lambda number: self._head_part(parts[number]))

    @contextmanager
    def final(self) -> Iterator[nn.Sequential]:
        """Have the weights on the device of what lies between the last block and the head: the final norm.

        Yields:
            [..., hidden] -> the head's input [..., width], each position by itself.
        """
        final = self._present(self._pieces.final)
        with self._weights.given(self._part(*part) for part in final.items()):
            yield nn.Sequential(*final.values())

    @contextmanager
    def output(self) -> Iterator[nn.Sequential]:
        """Have the head's weights on the device, without the final norm's.

        Yields:
            [..., width] -> logits [..., vocabulary], each position by itself.
        """
        head = self._head()
        with self._weights.given([head]), fast_products(self.device):
            yield nn.Sequential(head[0], Logits(self._pieces.logits, self._model.config))

    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """The logits, with a part of the head's weights on the device at a time.

        Args:
            hidden: [..., hidden], the last block's output.

        Yields:
            [..., n], those of the vocabulary's next n tokens.

        Raises:
            InputError: a weight has NaN or infinite entries; it is named.
        """
        with self.final() as final:
            hidden = final(hidden)
        for tokens in self._head_parts(max(1, HEAD_BYTES // self._token_bytes)):
            with self._head_part(tokens) as part:
                found = part(hidden)
            yield found

    @property
    def _token_bytes(self) -> int:
        """Bytes of one token's weights in the head."""
        return self.width * self.dtype.itemsize

    def _head_parts(self, step: int) -> list[slice]:
        """The vocabulary, so many tokens at a time."""
        starts = range(0, self.vocabulary, step)
        return [slice(start, min(start + step, self.vocabulary)) for start in starts]

    @contextmanager
    def _head_part(self, tokens: slice) -> Iterator[nn.Sequential]:
        """Have a part of the head on the device: [..., width] -> logits of its tokens."""
        head = self._head()
        with self._weights.given([head], partial(self._weights.read, rows=tokens)), fast_products(self.device):
            yield nn.Sequential(head[0], Logits(self._pieces.logits, self._model.config))

    def place(self, path: str) -> tuple[str, Section | None]:
        """The linear layer of a block that a path names, and which of its outputs; None for all.

        Parts of fused projections have paths, too (``families/fused.py``).
        """
        layer = fused_layer(self._row, path)
        return (path, None) if layer is None else (layer, section_of(self._row, self._source.config, path))

    def routing(self, block: nn.Module) -> Routing:
        """Which tokens each expert of a block gets, while the block is run."""
        return Routing(block, self._row.experts, int(getattr(self._model.config, "num_experts_per_tok", None) or 1))

    def matrix(self, block: nn.Module, path: str) -> Tensor:
        """Weight [out, in] of a linear layer in a block, or of a part of one."""
        return matrix(block, path, self.place)

    def replaced(self, block: nn.Module, matrices: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Context with other weights [out, in] in some linear layers of a block, or parts of them, by path."""
        return replaced(block, matrices, self.place)

    def differentiable(
        self, block: nn.Module, paths: Sequence[str]
    ) -> AbstractContextManager[Callable[[], dict[str, Tensor]]]:
        """Context in which backward passes differentiate by weights; see
        :func:`svdconvert.models.matrices.differentiable`."""
        return differentiable(block, paths, self.place)

    def _present(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """Those of the modules that exist in this model."""
        modules = dict(self._base.named_modules())
        return {name: modules[name] for name in names if name in modules}

    def _part(self, path: str, module: nn.Module) -> Part:
        """A module of the base model with its stored tensors: parameters, and buffers that are not computed."""
        return module, {key: f"{self._row.prefix}{path}.{key}" for key in module.state_dict()}

    def _head(self) -> Part:
        """The head, which may be stored as the embedding."""
        head, own = self._model.get_output_embeddings(), self._head_name
        stored = own
        if self._row.is_tied(self._source.config) or own not in self._tensors:
            stored = self._row.embedding
        return head, {key: stored if key == "weight" else own[:-6] + key for key in head.state_dict()}

    def _parts(self, index: int, group: Callable[[str], str]) -> dict[str, list[Part]]:
        """What a block consists of, and what it uses of others, in groups.

        Args:
            index: of the block.
            group: a path in the block -> the name of its group; empty for what is there all the time.
        """
        block, names = self._part(f"{self._pieces.blocks}.{index}", self._layers[index])
        shared = {u: o for u, o in shared_layers(self._source.config).items() if layer_number(u) == index}
        lenders = {o for o in shared.values() if layer_number(o) == index}
        within = {suffix(lender) for lender in lenders}
        # what layers of several groups may use
        common = {key for key in names if key.rpartition(".down.")[0] in within}
        groups: dict[str, dict[str, str]] = {"": {}}
        for key, name in names.items():
            groups.setdefault("" if key in common else group(key), {})[key] = name
        parts: dict[str, list[Part]] = {name: [(block, own)] for name, own in groups.items()}
        # factors of layers in other blocks
        lent = {(group(suffix(user)), owner) for user, owner in shared.items() if owner not in lenders}
        for name, owner in sorted(lent):
            other, down = layer_number(owner), f"{suffix(owner)}.down"
            module = self._layers[other].get_submodule(down)
            parts[name].append(self._part(f"{self._pieces.blocks}.{other}.{down}", module))
        return parts

    def _call(self, index: int, hidden: Tensor, mask: Tensor) -> Call:
        """The arguments of a block for this batch."""
        return self._calls.of(index, hidden, mask, self._model.get_input_embeddings().weight.shape[1])


def _together(path: str) -> str:
    """The one group of all paths."""
    return ""


def _zeros(x: Tensor) -> Tensor:
    """What an expert gives that is left out; as wide as its input."""
    return x.new_zeros(()).expand_as(x)


def _adds_up(config: Any) -> bool:
    """Whether the outputs of a block's layers add up; not where norms follow the sums, as in some OPTs."""
    return getattr(config, "do_layer_norm_before", True) and not getattr(
        config, "apply_residual_connection_post_layernorm", False
    )


def _hollow(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace parameters on the meta device by zeros that take no memory.

    The arguments of blocks do not depend on embeddings, but a forward that adds position embeddings needs some to add.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=dtype, device=device).expand(parameter.shape)
            setattr(part, name, nn.Parameter(zeros, requires_grad=False))
