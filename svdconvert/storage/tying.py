"""Output heads tied to the embedding: what the config says of them, and what the files hold.

A config that ties the head to the embedding may still come with a head in the files. If that has the embedding's values
it is left out of the result. If not, transformers 5 uses it and transformers 4 does not, so the model is ambiguous and
is refused.
"""

from __future__ import annotations

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo


def head_copies(row: Architecture, source: Source) -> list[TensorInfo]:
    """The head of a checkpoint that also has the embedding which, by its config, the head must be a copy of.

    Args:
        row: the architecture.
        source: the checkpoint, dense or factored.

    Raises:
        InputError: it has another shape than the embedding.
    """
    if not row.is_tied(source.config):
        return []
    full = row.full_names(source.tensors, source.config)
    embedding = embedding_of(row, source)
    copies = [source.tensors[name] for name, own in full.items() if own in row.head]
    for copy in copies:
        if embedding is not None and copy.shape != embedding.shape:
            raise other_head(source, copy.name, embedding.name)
    return copies


def embedding_of(row: Architecture, source: Source) -> TensorInfo | None:
    """The embedding of a checkpoint, under any of its names; None where it is missing."""
    full = row.full_names(source.tensors, source.config)
    return next((source.tensors[name] for name, own in full.items() if own == row.embedding), None)


def other_head(source: Source, head: str, embedding: str) -> InputError:
    """The error for a head that is not a copy."""
    return InputError(
        f"{source.where} ties {head} to {embedding} by its config.json, but they differ, and versions of transformers "
        "disagree on which of them counts; set tie_word_embeddings to false to keep both, or remove the head"
    )
