"""How much host memory a conversion takes where it runs the model on a text, estimated from shapes alone.

The model is run block by block, so the peak is that of one piece: the embeddings of a batch's tokens, a block with its
statistics, the matrices of a block as they are decomposed, or the head, a large one in parts, with some of its logits.
Only a text that the model writes takes all of it at once. The counts follow the code (``calibration/run.py``,
``calibration/collector.py``, ``models/loss.py``, ``models/head_divergence.py``, ``factoring/edges.py``); what stands
beside them was measured (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from svdconvert.families.row import Architecture, Config
from svdconvert.families.table import longest_input
from svdconvert.models import head_sizes
from svdconvert.models.writing import writing_bytes
from svdconvert.names import expert, layer_number
from svdconvert.planning.expert_groups import ON_CPU, WEIGHTS_ON_CPU, in_groups, sums_bytes
from svdconvert.planning.memory import FLOAT32, FLOAT64, decomposition_bytes, group_decomposition_bytes
from svdconvert.planning.ranks import Target
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.text import Stats, Text
from svdconvert.storage.source import Source
from svdconvert.tensors import majority_dtype

# A process that has run a model: torch, transformers, and what the allocator keeps between two passes.
TEXT_BASE_BYTES = 550_000_000
# What such a process keeps besides of a pass, forward or backward, in which experts are read one at a time: gaps
# between them, and oneDNN's kernels, one for every number of tokens that an expert gets.
IN_TURN_BYTES = 175_000_000
# A tokenizer, for each token of its vocabulary.
TOKEN_BYTES = 1_000
# Logits are computed in pieces (models/head_sizes.py), of which so many are alive at a time: for a loss, for a loss and
# its gradient, and where two models are compared.
LOSS, SLOPE, COMPARED = 3, 6, 7
# Of a head in parts, so many copies of the hidden states that it is run on: without and with a gradient.
STATES, DIFFERENTIATED_STATES = 4, 8
# Numbers that a block keeps for each number that goes into or out of one of its matrices: without and with a gradient.
FORWARD, BACKWARD = 1.0, 2.5
# Copies of a block's matrices where compressed ones are put into it, and where their gradients are taken.
PLACED, DIFFERENTIATED = 2, 3
# A refit sums up two Gram matrices of inputs, and runs two models.
REFITTED = 2


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics that are in memory together: of a block, or of some of its layers.

    Attributes:
        grams: bytes of Gram matrices.
        largest: the largest side of a matrix that is decomposed meanwhile.
    """

    grams: int
    largest: int


@dataclass(frozen=True)
class TextPasses:
    """What is run on a text, and what it is run with.

    Attributes:
        vocabulary, hidden: of the embeddings.
        batch, length: sequences at a time, and tokens in each.
        weights: parameters of the largest block.
        present: those of a block that are in memory at a time while statistics are collected.
        widths: inputs and outputs of its matrices, added up; of experts, as far as tokens meet them.
        inputs: inputs of the factored ones, squared.
        largest: the largest side of a factored matrix.
        grouped: inputs of matrices that share a factor; 0 where there are none.
        gradients: whether statistics of gradients are collected.
        statistics: what is in memory together of them; empty where there are none.
        decomposes: whether matrices are decomposed.
        compares: whether compressed models are compared with the dense one.
        corrects: whether what single directions are worth is measured, too.
        refits: whether outer factors are fitted again.
        writing: bytes of the whole model while it writes the text; 0 where it does not.
    """

    vocabulary: int
    hidden: int
    batch: int
    length: int
    weights: int
    present: int
    widths: int
    inputs: int
    largest: int
    gradients: bool
    statistics: tuple[BlockStatistics, ...]
    decomposes: bool
    compares: bool
    corrects: bool
    refits: bool
    writing: int = 0
    grouped: int = 0

    def peak_bytes(self, workers: int = 1) -> int:
        """Estimated peak.

        Args:
            workers: matrices that are decomposed at the same time.
        """
        pieces = [self._embeddings, self._head, self._block, self.writing]
        if self.decomposes:
            known = self.statistics or (BlockStatistics(0, self.largest),)
            pieces += [part.grams + decomposition_bytes([part.largest], workers) for part in known]
            pieces.append(group_decomposition_bytes(self.grouped))
        if self.compares:
            pieces.append(PLACED * self._weights + self._kept(BACKWARD if self.corrects else FORWARD))
        if self.corrects:
            pieces.append(DIFFERENTIATED * self._weights + self._kept(BACKWARD))
        if self.refits:
            pieces.append(REFITTED * (FLOAT64 * self.inputs + self._weights + self._kept(FORWARD)))
        return TEXT_BASE_BYTES + TOKEN_BYTES * self.vocabulary + max(pieces)

    @property
    def _tokens(self) -> int:
        return self.batch * self.length

    @property
    def _weights(self) -> int:
        return FLOAT32 * self.weights

    @property
    def _states(self) -> int:
        """A batch between two blocks, and the one that becomes of it."""
        return 2 * FLOAT32 * self._tokens * self.hidden

    @property
    def _embeddings(self) -> int:
        """Rows of a batch's tokens, as they are stored and in float32."""
        return 2 * FLOAT32 * min(self.vocabulary, self._tokens) * self.hidden + self._states

    @property
    def _head(self) -> int:
        pieces = COMPARED if self.compares else SLOPE if self.gradients else LOSS
        passes = 0 if self.present == self.weights else 2 if self.gradients else 1
        part = head_sizes.ON_CPU.at_a_time(self.vocabulary, FLOAT32 * self.hidden)
        needed = FLOAT32 * part * self.hidden + passes * IN_TURN_BYTES
        if part == self.vocabulary:
            positions = min(head_sizes.positions_of_whole(self.vocabulary), self._tokens)
            return needed + self._states + pieces * FLOAT32 * positions * self.vocabulary
        copies = DIFFERENTIATED_STATES if self.gradients or self.compares else STATES
        together = pieces * part + copies * self.hidden
        return needed + self._states + FLOAT32 * head_sizes.ON_CPU.positions * together

    @property
    def _block(self) -> int:
        grams = max((part.grams for part in self.statistics), default=0)
        return FLOAT32 * self.present + grams + self._kept(BACKWARD if self.gradients else FORWARD)

    def _kept(self, share: float) -> int:
        """Activations of a batch in a block, and the mask of its attention."""
        mask = FLOAT32 * self.batch * self.length**2
        return self._states + mask + int(share * FLOAT32 * self._tokens * self.widths)


def text_passes(source: Source, row: Architecture, targets: Sequence[Target], request: Conversion) -> TextPasses | None:
    """What a conversion runs on a text; None where it needs none.

    A plan may be made without the text that the conversion will have; the usual length and number are taken then.

    Args:
        source: the dense model.
        row: its architecture.
        targets: the matrices that may be factored.
        request: what is asked for, settled.
    """
    statistics, given = request.method.statistics, request.calibration
    if given is None and not statistics:
        return None
    text = given if isinstance(given, Text) else Text("any.txt")
    collected = set() if isinstance(given, Stats) else set(statistics)
    named = row.full_names(source.tensors, source.config)
    blocks: dict[int, dict[str, int]] = {}
    widths: dict[int, float] = {}
    for name, info in source.tensors.items():
        if not row.is_dropped(name):
            block, part = layer_number(named[name]), expert(named[name])
            sizes = blocks.setdefault(block, {"": 0})
            sizes[part] = sizes.get(part, 0) + info.size
            if len(info.shape) == 2:
                widths[block] = widths.get(block, 0) + _met(row, source.config, named[name]) * sum(info.shape)
    vocabulary, hidden = next(info.shape for name, info in source.tensors.items() if named[name] == row.embedding)
    layers = [sizes for block, sizes in blocks.items() if block >= 0]
    matrices = _shapes(targets)
    every = [shape for shapes in matrices.values() for shape in shapes.values()]
    limited, length = request.size.limit is not None, text.length or min(2048, longest_input(source.config, 2048))
    return TextPasses(
        vocabulary=vocabulary,
        hidden=hidden,
        batch=min(text.batch_size, text.samples),
        length=length,
        weights=max(sum(sizes.values()) for sizes in layers),
        present=max(map(_present, layers)),
        widths=int(max(width for block, width in widths.items() if block >= 0)),
        inputs=max(sum(columns**2 for _, columns in shapes.values()) for shapes in matrices.values()),
        largest=max(map(max, every)),
        gradients=bool({"output_gram", "fisher"} & collected),
        statistics=tuple(part for shapes in matrices.values() for part in _statistics(row, shapes, statistics)),
        decomposes=bool(statistics)
        or request.allocation != "uniform"
        or limited
        or request.size.rounds
        or request.recipe.refit != "none",
        compares=request.allocation == "measured" or limited,
        corrects=request.allocation == "measured",
        refits=request.recipe.refit != "none",
        grouped=max((target.shape[1] for target in targets if target.followers), default=0),
        writing=_writing(source, text, vocabulary, 2 * len(layers) * hidden * length) if text.by_model else 0,
    )


def _met(row: Architecture, config: Config, name: str) -> float:
    """The share of the tokens that a matrix meets: all, or of an expert's, on average, as many as are sent to one."""
    chosen = config.get("num_experts_per_tok")
    if row.experts is None or chosen is None or ".experts." not in name:
        return 1.0
    return min(float(chosen) / row.experts.count(config), 1.0)


def _writing(source: Source, text: Text, vocabulary: int, kept: int) -> int:
    """Memory of a model that writes a text, on a machine that computes in the type of its weights.

    Args:
        source: the dense model.
        text: that it writes.
        vocabulary: of the model.
        kept: keys and values of a sequence, at most.
    """
    from svdconvert.storage.gguf_source import GgufSource  # which imports numpy

    wide = majority_dtype(source.tensors.values()) in ("float32", "float64") and not isinstance(source, GgufSource)
    width = FLOAT32 if wide else 2
    weights = width * sum(info.size for info in source.tensors.values())
    return writing_bytes(weights, width * kept, vocabulary, text.samples)


def _shapes(targets: Sequence[Target]) -> dict[int, dict[str, tuple[int, int]]]:
    """Block -> layer -> (outputs, inputs), of those that may be factored."""
    found: dict[int, dict[str, tuple[int, int]]] = {}
    for target in targets:
        for part in target.parts:
            found.setdefault(layer_number(part.module), {})[part.module] = part.rows, target.shape[1]
    return found


def _present(sizes: Mapping[str, int]) -> int:
    """Parameters of a block that are in memory at a time.

    Args:
        sizes: parameters of each expert, and of all else under an empty name.
    """
    rest, experts = sizes[""], [size for part, size in sizes.items() if part]
    return rest + (max(experts) if FLOAT32 * sum(experts) > WEIGHTS_ON_CPU else sum(experts))


def _statistics(
    row: Architecture, shapes: Mapping[str, tuple[int, int]], kinds: Collection[str]
) -> Iterator[BlockStatistics]:
    """What is in memory together of a block's statistics.

    Args:
        row: the architecture.
        shapes: layer -> (outputs, inputs), of those whose statistics are needed.
        kinds: names of the statistics.
    """
    grams = {"input_grams": "input_gram" in kinds, "output_grams": "output_gram" in kinds}
    if not any(grams.values()):
        return
    layers: dict[str, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        layers.setdefault(expert(name), {})[name] = shape
    largest = {part: max(map(max, own.values())) for part, own in layers.items()}
    others = layers.pop("", {})
    rest = FLOAT64 * sum(i**2 * grams["input_grams"] + o**2 * grams["output_grams"] for o, i in others.values())
    own_inputs = "" if row.experts is None else row.experts.names[-1]
    sizes = {part: sums_bytes(own, own_inputs, **grams) for part, own in layers.items()}
    common = max(sizes.values(), default=0)  # somewhat less, as of inner channels only the diagonal is kept
    if sum(sizes.values()) <= ON_CPU:
        yield BlockStatistics(rest + sum(sizes.values()) + common, max(largest.values()))
        return
    if others:
        yield BlockStatistics(rest, largest[""])
    names = list(sizes)
    for group in in_groups(sizes.values(), ON_CPU):
        together = [names[place] for place in group]
        yield BlockStatistics(sum(sizes[n] for n in together) + common, max(largest[n] for n in together))
