"""Checks before any work: that the installed transformers accepts a model's config, and that the weights fit it.

A plan reads config and headers only. Here the class that would load the checkpoint is built without weights, and a
block of each kind is run without values, so that a config which this class rejects is reported now and not when the
result is checked.
"""

from __future__ import annotations

from collections import Counter

import transformers

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture, dense_architecture, dense_shapes, factored_architecture
from svdconvert.foreign import CORRECT, foreign_code, quiet_transformers
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loading import portable
from svdconvert.models.skeleton import is_factored
from svdconvert.storage.other_models import refuse_other_model
from svdconvert.storage.reader import same_values
from svdconvert.storage.source import Source
from svdconvert.storage.tying import embedding_of, head_copies, other_head
from svdconvert.storage.whole import Whole

_ATTENTION = "eager sdpa flex_attention flash_attention_2 flash_attention_3 flash_attention_4".split()


def check_model(source: Source) -> None:
    """Check a model before it is converted, calibrated, densified or folded into.

    Args:
        source: dense or factored, its plan made.

    Raises:
        InputError: the class that would load it rejects its config, or has other weights than the files.
        JobError: a file cannot be read.
    """
    factored = is_factored(source)
    row = (factored_architecture if factored else dense_architecture)(source.config, source.where)
    _check_version(source, row.model_type, row.needs(source.config))
    if source.whole is not None:
        _check_version(source, source.whole.tower.model_type, source.whole.tower.since)
    _check_attention(source)
    if not factored:
        full = row.full_names(source.tensors, source.config)
        refuse_other_model(full, full, dense_shapes(row, source.config, source.where), row, source)
    blocks = ModelBlocks(source)
    _check_weights(source, row, blocks, row.head[factored])
    blocks.rehearse()
    _check_generation(source)
    if source.whole is not None:
        check_beside(source.whole)
    if not source.fetched:  # files that are fetched one by one are compared on arrival
        _check_head(source, row)


def check_beside(whole: Whole) -> None:
    """What a model sees with has to be there. Versions of transformers differ in its names, but not in its shapes.

    Args:
        whole: dense or factored; its language model was checked.

    Raises:
        InputError: something is missing, left over or of another shape, or its config cannot be used.
    """
    from accelerate import init_empty_weights

    tower = whole.tower
    config = portable(tower.stock_config(whole.config))  # a factored one sees with the same modules
    problem = f"config.json of {whole.where} cannot be used"
    with foreign_code(problem, CORRECT), quiet_transformers(), init_empty_weights(include_buffers=False):
        made = transformers.AutoConfig.for_model(**config)
        model = getattr(transformers, tower.dense_class)(made).model
    shapes = Counter(tuple(part.shape) for name in tower.vision for part in getattr(model, name).parameters())
    if shapes != Counter(info.shape for info in whole.rest.values()):
        wanted = sum(shapes.values())
        known = f"there are {wanted}" if wanted != len(whole.rest) else "some are of other shapes"
        raise InputError(
            f"{whole.where} has {len(whole.rest)} tensors beside its language model, but by its config.json {known} in "
            f"{' and '.join(tower.vision)}; the checkpoint is incomplete, or config and weights are not of one model"
        )


def _check_version(source: Source, model_type: str, since: tuple[int, ...]) -> None:
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < since:
        needed = ".".join(map(str, since))
        raise InputError(
            f"{source.where} has model_type {model_type!r}, which needs transformers {needed} or newer; update "
            f"transformers, which is {transformers.__version__}"
        )


def _check_attention(source: Source) -> None:
    """The attention that config.json asks for is for whoever loads the result; here it only has to exist."""
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
    """Compare the tensors of the class with those of the files; the plan compared the files with the table.

    The table follows config.json alone; the class has defaults for fields that are missing there.
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
    """generation_config.json is copied to the result, and a model with a bad one does not load."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    if name not in source.side_files:
        return
    folder = source.path(name).parent
    with foreign_code(f"{name} of {source.where} keeps the model from being loaded", "correct or remove it"):
        try:
            with quiet_transformers():
                GenerationConfig.from_pretrained(folder)
        except OSError:  # no JSON: transformers goes on without it
            pass


def _check_head(source: Source, row: Architecture) -> None:
    """If a tied head is in the files too, it has to equal the embedding."""
    embedding = embedding_of(row, source)
    for copy in head_copies(row, source):
        assert embedding is not None
        if not same_values(source, embedding, copy):
            raise other_head(source, copy.name, embedding.name)
