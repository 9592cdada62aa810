"""Checkpoints of a known type that are not its language model: other heads, adapters, quantised weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture
from svdconvert.storage.source import Source
from svdconvert.storage.wrappers import unwrapped, wrapped_by
from svdconvert.words import listing

_LANGUAGE_MODEL = "convert the language model that it was trained from"
_VALUES = "save its pretrained_model with save_pretrained and give that"
_MARKS = "a model that answers questions by marking them in a text"
# End of the class name in config.json, what such a model is, and what to do.
_CLASSES = (
    ("ForSequenceClassification", "a sequence classifier", _LANGUAGE_MODEL),
    ("ForTokenClassification", "a classifier of tokens", _LANGUAGE_MODEL),
    ("ForQuestionAnswering", _MARKS, _LANGUAGE_MODEL),
    ("WithValueHead", "a language model with the value head of trl", _VALUES),
)
# The same by the beginning of its head's tensor names.
_HEADS = (
    (("score.", "classifier.", "classification_head."), "a classifier", _LANGUAGE_MODEL),
    (("qa_outputs.",), _MARKS, _LANGUAGE_MODEL),
    (("v_head.",), "a language model with the value head of trl", _VALUES),
)
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save|original_module)\.")

# Tensors that quantisers, and writers of 8-bit floats, put beside a weight or in its place.
_QUANTISED = (
    (r"(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?)", ""),
    (r"(SCB|weight\.(absmax|quant_map|quant_state\..*))", " of bitsandbytes"),
    (r"(weight\._(data|scale|shift)|(input|output)_scale)", " of quanto"),
    (r"(weight:)?_?(weight_)?(qdata|zero_point)|weight:_data:.*", " of torchao"),
)


def quantised_part(name: str) -> str | None:
    """Which quantiser a tensor belongs to: `` of quanto``, empty where several use the name; None if to none.

    >>> quantised_part("model.layers.0.mlp.up_proj.weight._data")
    ' of quanto'
    """
    last = name.rpartition(".")[0]
    for pattern, by in _QUANTISED:
        if last and re.search(rf"\.({pattern})$", name):
            return by
    return None


def refuse_other_model(
    names: Collection[str], full: Mapping[str, str], expected: Collection[str], row: Architecture, source: Source
) -> None:
    """Refuse a checkpoint that is not the type's causal language model, and say what it is.

    Args:
        names: its tensors.
        full: their names -> those in the causal model.
        expected: the causal model's names.
        row: the architecture in its config.
        source: the checkpoint.

    Raises:
        InputError: it is something else.
    """
    if adapter := [name for name in names if _ADAPTER.search(name)]:
        raise InputError(
            f"{source.where} holds a PEFT adapter in its layers that was not merged ({listing(sorted(adapter), 1)}); "
            "load it with peft, merge_and_unload(), and save the model with save_pretrained"
        )
    found = set(full.values())
    if found.issuperset(expected) and not any(
        quantised_part(name) is None and full[name] not in expected for name in names
    ):
        return
    classes = source.config.get("architectures")
    said = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
    kinds = [(what, remedy, name) for ending, what, remedy in _CLASSES for name in said if name.endswith(ending)]
    kinds += [(what, remedy, name) for head, what, remedy in _HEADS for name in sorted(names) if name.startswith(head)]
    if kinds:
        what, remedy, by = kinds[0]
        raise InputError(f"{source.where} is {what} ({by}), not a {row.dense_class}; {remedy}")
    if set(expected) - found == {row.head[0]}:
        whole = (row if source.whole is None else source.whole.tower).dense_class
        raise InputError(
            f"{source.where} is a base model without the head that predicts tokens ({row.head[0]}); save the whole "
            f"{whole}, or, if its head is the embedding, say so in config.json (tie_word_embeddings: true)"
        )
    if wrappers := wrapped_by(dict.fromkeys(names)):
        _refuse_wrapped(names, wrappers, set(expected), row, source)


def _refuse_wrapped(
    names: Collection[str], wrappers: Mapping[str, str], expected: set[str], row: Architecture, source: Source
) -> None:
    """Refuse tensors with the names of a wrapper, and say why leaving the wrapper out does not help."""
    own = {row.full_name(unwrapped(name, row)) for name in names}
    missing = sorted(expected - own)
    others = sorted(name for name in own - expected if not row.is_dropped(name) and name != row.head[0])
    if not missing and not others:
        return
    because = f"it lacks {listing(missing, 1)}" if missing else f"it has {listing(others, 1)} as well"
    part, who = next(iter(wrappers.items()))
    raise InputError(
        f"the tensors of {source.where} are named by {who} (`{part}`), and without that {because}; unwrap the "
        f"{row.dense_class} and save it with save_pretrained"
    )
