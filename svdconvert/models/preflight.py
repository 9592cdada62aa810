"""Before any work: what the installed transformers makes of a model's config, and whether the weights are that model's.

A plan looks at config and headers alone. Here the class that the checkpoint would be loaded into is built without
weights and taken through a block of each kind without values, so that whatever the config says that this class does
not take is told now and not by the check of the result.
"""

from __future__ import annotations

import transformers

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture, dense_architecture, dense_shapes, factored_architecture
from svdconvert.foreign import foreign_code
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loading import quiet_transformers
from svdconvert.models.skeleton import is_factored
from svdconvert.storage.other_models import refuse_other_model
from svdconvert.storage.reader import same_values
from svdconvert.storage.source import Source
from svdconvert.storage.tying import embedding_of, head_copies, other_head

_ATTENTION = "eager sdpa flex_attention flash_attention_2 flash_attention_3 flash_attention_4".split()


def check_model(source: Source) -> None:
    """Look at a model that is to be converted, calibrated, multiplied out or folded into.

    Args:
        source: dense or factored, its plan made.

    Raises:
        InputError: the class that it would be loaded into does not take its config, or has other weights than it has.
        JobError: a file cannot be read.
    """
    factored = is_factored(source)
    row = (factored_architecture if factored else dense_architecture)(source.config, source.where)
    _check_attention(source)
    if not factored:
        full = row.full_names(source.tensors, source.config)
        refuse_other_model(full, full, dense_shapes(row, source.config, source.where), row, source)
    blocks = ModelBlocks(source)
    _check_weights(source, row, blocks, row.head[factored])
    blocks.rehearse()
    _check_generation(source)
    if not source.fetched:  # files that come one by one are compared when they are here
        _check_head(source, row)


def _check_attention(source: Source) -> None:
    """An attention of config.json counts for those who load the result; here it only has to be one that there is."""
    for field in ("attn_implementation", "_attn_implementation"):
        asked = source.config.get(field)
        for name in asked.values() if isinstance(asked, dict) else [asked]:
            named = isinstance(name, str) and ("/" in name or name.removeprefix("paged|") in _ATTENTION)
            if name is not None and not named:
                raise InputError(
                    f"config.json of {source.where} says {field} {name!r}, which is not one of "
                    f"{', '.join(_ATTENTION)}; correct or remove it"
                )


def _check_weights(source: Source, row: Architecture, blocks: ModelBlocks, head: str) -> None:
    """Compare what the class has with what the files have; the plan compared them with what the table says.

    The table follows config.json. The class fills in what is not said there, and what it does not know.
    """
    name, version = source.where, transformers.__version__
    if blocks.tied != row.is_tied(source.config):
        raise InputError(
            f"config.json of {name} does not say whether the head is tied to the embedding, and transformers {version} "
            "differs from other versions there; add tie_word_embeddings"
        )
    left_out = {info.name for info in head_copies(row, source)}
    full = row.full_names(source.tensors, source.config)
    found = {
        full[key]: info.shape for key, info in source.tensors.items() if key not in left_out and not row.is_dropped(key)
    }
    tied = {*row.head, "lm_head.weight"} if blocks.tied else set()
    # the class of GPT-NeoX calls its head otherwise than its files do
    stored = {head if key in row.head else key: shape for key, shape in blocks.shapes.items() if key not in tied}
    for key in sorted(found.keys() | stored.keys()):
        if found.get(key) != stored.get(key):
            there, wanted = (
                f"of shape {list(shape)}" if shape else "none" for shape in (found.get(key), stored.get(key))
            )
            raise InputError(
                f"with config.json of {name}, transformers {version} builds a model with {key} {wanted}, but the files "
                f"have {there}; correct config.json, or add the fields that it leaves to defaults"
            )


def _check_generation(source: Source) -> None:
    """A generation_config.json goes along, and a model with a bad one is not loaded."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    if name not in source.side_files:
        return
    folder = source.path(name).parent
    with foreign_code(f"{name} of {source.where} keeps the model from being loaded; correct or remove it"):
        try:
            with quiet_transformers():
                GenerationConfig.from_pretrained(folder)
        except OSError:  # no JSON: transformers goes on without it
            pass


def _check_head(source: Source, row: Architecture) -> None:
    """A tied head that the files have all the same has to be the embedding."""
    embedding = embedding_of(row, source)
    for copy in head_copies(row, source):
        assert embedding is not None
        if not same_values(source, embedding, copy):
            raise other_head(source, copy.name, embedding.name)
