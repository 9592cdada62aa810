"""A row of the architecture table: everything that the package knows about a family."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from svdconvert.fields import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from svdconvert.families.experts import Experts

Config = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Section:
    """Some outputs of a fused projection: ``count`` from ``start`` on, in each of ``stretches`` equal stretches.

    Attributes:
        start: position of the first one in a stretch.
        count: outputs in a stretch.
        stretches: number of stretches; 1 if the outputs lie together.
    """

    start: int
    count: int
    stretches: int = 1

    @property
    def outputs(self) -> int:
        """Number of outputs in all."""
        return self.count * self.stretches

    def of(self, fused: Tensor, dim: int = 0) -> Tensor:
        """The part of a tensor of all outputs: [..., outputs, ...]; a copy if it cannot be a view."""
        return self.view(fused, dim).flatten(dim, dim + 1)

    def view(self, fused: Tensor, dim: int = 0) -> Tensor:
        """The same as a view of the whole: [..., stretches, count, ...]; ``dim`` is not negative."""
        return fused.unflatten(dim, (self.stretches, -1)).narrow(dim + 1, self.start, self.count)

    def put(self, part: Tensor, fused: Tensor, dim: int = 0) -> None:
        """Inverse of :meth:`of`: write a part into the whole."""
        self.view(fused, dim).copy_(part.unflatten(dim, (self.stretches, self.count)))


@dataclass(frozen=True)
class Fused:
    """A projection that is several in one: queries, keys and values of attention.

    Attributes:
        sizes: config -> outputs of each part, in the order in which they come.
        by_head: whether the parts alternate from head to head; then all are of one size.
        names: of the parts.
    """

    sizes: Callable[[Config], tuple[int, ...]]
    by_head: bool = False
    names: tuple[str, ...] = ("query", "key", "value")

    def sections(self, config: Config) -> dict[str, Section]:
        """Where the outputs of each part are."""
        stretches = config["num_attention_heads"] if self.by_head else 1
        found, start = {}, 0
        for name, size in zip(self.names, self.sizes(config), strict=True):
            found[name] = Section(start, size // stretches, stretches)
            start += size // stretches
        return found


@dataclass(frozen=True)
class Pieces:
    """The pieces of a family's base model; its head is found by ``get_output_embeddings``.

    Attributes:
        embeddings: modules with weights that run before the first block; a tied head shares the first one. Modules
            that a model lacks are skipped.
        blocks: the list of blocks.
        final: modules between the last block and the head; skipped likewise.
        writers: linear layers of a block whose output is added to the hidden state as it is; none if a norm or a
            factor comes between.
        logits: what the model does with the output of its head, by its name in ``models/head.py``.
    """

    embeddings: tuple[str, ...]
    blocks: str
    final: tuple[str, ...]
    writers: tuple[str, ...] = ()
    logits: Literal[
        "as they are",
        "soft-capped",
        "divided by logits_scaling",
        "times logits_scaling",
        "times logit_scale",
        "times lm_head_multiplier",
    ] = "as they are"


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        model_type: ``config.json``'s model_type of the dense model.
        stock: prefix of the names of the family's classes in transformers, for example ``Llama``.
        text: what the names of its configuration, base model and classifiers have after that: ``Text`` where the family
            has models that see, too.
        factored: prefix of the names of the factored classes, ``LlamaSVD``.
        svd_model_type: ``config.json``'s model_type of the factored model; its file is modeling_TYPE.py.
        prefix: name of the base model inside the causal one, with the dot.
        targets: suffixes of the linear layers that are factored by default.
        shapes: config -> every parameter of the dense model and its shape as stored, the head included.
        config_overrides: config -> fields that are written into config.json beside the source's, dense or factored.
        pieces: modules that are run one after the other if the model is not in memory whole.
        head: ``(name in dense checkpoints, name in factored ones)`` of the output head's weight.
        dropped: patterns of buffers that old checkpoints have and no current model reads.
        predictors: prefixes of layers in checkpoints that predict further tokens, which transformers does not load.
        kinds: part of a block -> the entry of ``layer_types`` in config.json of the blocks that have it, where blocks
            are of several kinds.
        gates: narrow linear layers of a block that set others for each token, and are never factored.
        old_kinds: entry of ``layer_types`` -> its name in files, where older versions of transformers know no other.
        mixer: class of the part of a block that in training hands the weight of its ``out_proj`` to a fused kernel.
        fills: whether initialising its model fills buffers of its blocks.
        refused: config -> what keeps a model of it from being converted, and what to do: the end of a sentence that
            names its model_type. Empty if nothing does.
        tied: whether the head is the embedding if config.json does not say.
        transposed: whether the targets are stored as [in, out] (Conv1D of GPT-2) instead of [out, in].
        classifies: whether transformers has a sequence classifier of the family.
        labels: name of the head in its token classifier; empty if transformers has none.
        labels_4: its name in transformers 4, if that is another one.
        causal: ending of the stock causal class's name.
        fused: suffixes of the targets that may be split before they are factored, and their parts.
        copies_keys: config -> whether its cache has keys and values for every head, where several heads share them.
        experts: of mixtures; None where every block has one MLP.
        fields: what the fields of its config.json may hold; ``claims.py`` has those that families have in common.
        since: the first supported version of transformers that has the family.
        template: of its modeling file, in ``modeling/templates/``.
        title: its name in the modeling file; ``stock`` if empty.
        head_width: field of the config with the number of inputs of its head.
        head_bias: whether its head has a bias.
        kept: settings that the stock causal model keeps as attributes of its own.
        asks_parallel: whether its classes in transformers 4 ask whether they are spread over devices.
        filled: name of a layer whose weight the initialisation of the module around it fills; empty if there is none.
        models: published models, for the table in docs/families.md.
        remarks: its particulars, for the same table.
        tiny: settings of the tests' tiny model that make every particular show: windows shorter than its sequences,
            caps that cap, factors that are not 1. They come on top of the common ones (``tests/support/families.py``);
            None removes a setting.
        llama_cpp: changes to ``tiny`` that llama.cpp's converter needs; None if it is not tried.
    """

    model_type: str
    stock: str
    factored: str
    svd_model_type: str
    prefix: str
    targets: tuple[str, ...]
    shapes: Callable[[Config], Shapes]
    config_overrides: Callable[[Config], dict[str, Any]]
    pieces: Pieces
    head: tuple[str, str] = ("lm_head.weight", "lm_head.weight")
    dropped: tuple[str, ...] = ()
    predictors: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[str, ...] = ()
    old_kinds: Mapping[str, str] = field(default_factory=dict)
    mixer: str = ""
    fills: bool = False
    refused: Callable[[Config], str] = lambda config: ""
    tied: bool = False
    transposed: bool = False
    classifies: bool = True
    labels: str = "score"
    labels_4: str = ""
    causal: str = "ForCausalLM"
    fused: Mapping[str, Fused] = field(default_factory=dict)
    copies_keys: Callable[[Config], bool] = lambda config: False
    experts: Experts | None = None
    fields: Mapping[str, Kind] = field(default_factory=dict)
    since: tuple[int, int] = (4, 46)
    template: str = "decoder"
    text: str = ""
    title: str = ""
    head_width: str = "hidden_size"
    head_bias: bool = False
    kept: tuple[str, ...] = ()
    asks_parallel: bool = False
    filled: str = ""
    models: str = ""
    remarks: str = ""
    tiny: Mapping[str, Any] = field(default_factory=dict)
    llama_cpp: Mapping[str, Any] | None = None

    @property
    def embedding(self) -> str:
        """Name of the weight that a tied head is a copy of."""
        return f"{self.prefix}{self.pieces.embeddings[0]}.weight"

    @property
    def inner(self) -> str:
        """Prefix of the names of the stock configuration, base model and classifiers."""
        return f"{self.stock}{self.text}"

    @property
    def dense_class(self) -> str:
        """Class name of the dense model, as in ``architectures`` of config.json."""
        return f"{self.stock}{self.causal}"

    @property
    def modeling(self) -> str:
        """Name of the modeling file, without its ending."""
        return f"modeling_{self.svd_model_type}"

    @property
    def config_class(self) -> str:
        """Class name of the factored model's configuration."""
        return f"{self.factored}Config"

    @property
    def causal_class(self) -> str:
        """Class name of the factored causal model."""
        return f"{self.factored}ForCausalLM"

    @property
    def auto_map(self) -> dict[str, str]:
        """``config.json``'s auto_map. AutoModel is there because serving engines build the base model."""
        classes = {
            "AutoConfig": self.config_class,
            "AutoModel": f"{self.factored}Model",
            "AutoModelForCausalLM": self.causal_class,
        }
        if self.classifies:
            classes["AutoModelForSequenceClassification"] = f"{self.factored}ForSequenceClassification"
        if self.labels:
            classes["AutoModelForTokenClassification"] = f"{self.factored}ForTokenClassification"
        return {auto: f"{self.modeling}.{name}" for auto, name in classes.items()}

    def parameters(self, config: Config) -> Shapes:
        """Every parameter that a dense checkpoint must have, and its shape as stored."""
        shapes = self.shapes(config)
        if self.is_tied(config):
            del shapes[self.head[0]]
        return shapes

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor of the source is a legacy buffer, or of a layer that transformers does not load."""
        return self.is_predictor(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in self.dropped)

    def is_predictor(self, name: str) -> bool:
        """Whether a tensor of the source is of a layer that predicts further tokens."""
        return name.removeprefix(self.prefix).startswith(self.predictors)

    def is_tied(self, config: Config) -> bool:
        """Whether the head shares the embedding's weight."""
        tied = config.get("tie_word_embeddings")
        return self.tied if tied is None else bool(tied)

    def full_name(self, name: str) -> str:
        """Name in the causal model of a checkpoint's tensor; the checkpoint may be of the base model alone."""
        in_head = name.rpartition(".")[0] in {head.rpartition(".")[0] for head in self.head}
        return name if name.startswith(self.prefix) or in_head else self.prefix + name

    def full_names(self, names: Iterable[str], config: Config) -> dict[str, str]:
        """The same of all tensors; a tied model may have stored its head alone, which then is its embedding."""
        full = {name: self.full_name(name) for name in names}
        if self.is_tied(config) and self.embedding not in full.values():
            full |= {name: self.embedding for name in self.head if name in full}
        return full

    def factored_name(self, name: str) -> str:
        """Name in the factored checkpoint of a tensor that is copied."""
        return self.head[1] if name == self.head[0] else name

    def dense_name(self, name: str) -> str:
        """Inverse of :meth:`factored_name`."""
        return self.head[0] if name == self.head[1] else name

    def has_experts(self, config: Config) -> bool:
        """Whether a model of the family has experts; there are families with and without."""
        return self.experts is not None and self.experts.count(config) > 0

    def needs(self, config: Config) -> tuple[int, ...]:
        """The first version of transformers that has a model of the family."""
        own = self.experts.since if self.experts is not None and self.has_experts(config) else ()
        return max(self.since, own)

    def split(self) -> Architecture:
        """The row of the same family with the parts of fused projections as its targets."""
        parts = [
            [f"{target}.{name}" for name in self.fused[target].names] if target in self.fused else [target]
            for target in self.targets
        ]
        return replace(self, targets=tuple(name for names in parts for name in names))

    def matrix_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """``(out, in)`` of a target from the shape that is stored; its own inverse."""
        first, second = stored
        return (second, first) if self.transposed else (first, second)
