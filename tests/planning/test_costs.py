"""What a model costs to run, counted from shapes, against what models of several families do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import write_family
from support.multiplications import of_a_token

from svdconvert.families.table import dense_architecture
from svdconvert.models.loading import load_model
from svdconvert.planning.costs import costs_of
from svdconvert.planning.make import make_plan
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.opening import open_source

# What is looked up and not multiplied with; a head that is tied to the embedding multiplies with it.
LOOKED_UP = {
    "llama": ["model.embed_tokens.weight"],
    "gemma2": [],
    "opt": ["model.decoder.embed_positions.weight"],
    "phi3": ["model.embed_tokens.weight"],
    "bloom": [],
}


@pytest.mark.parametrize("family", LOOKED_UP)
def test_a_dense_model_and_what_is_left_of_it(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / family, family)
    source, model = open_source(str(folder)), load_model(folder, "cpu", torch.float32)
    row = dense_architecture(source.config, source.where)
    factored = make_plan(source, Conversion.of(keep=0.5))
    before = sum(target.dense_params for target in factored.targets)
    after = sum(target.params for target in factored.targets)
    costs = costs_of(source, row, factored)
    assert costs.answer == of_a_token(model) - before + after
    assert costs.answer - costs.prompt == model.get_output_embeddings().weight.numel()
    assert costs.training_bytes == 16 * factored.params_after
    sizes = {info.name: info.nbytes for step in factored.steps for info in step.outputs}
    assert costs.read_bytes == sum(sizes.values()) - sum(sizes[name] for name in LOOKED_UP[family])
