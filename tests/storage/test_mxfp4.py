"""gpt-oss as it is published: experts in MXFP4, multiplied out as transformers does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights
from support.families import FAMILIES, read_matrices, write_family
from torch import Tensor

from svdconvert import convert, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.storage.source import LocalSource

pytestmark = pytest.mark.skipif("gpt_oss" not in FAMILIES, reason="transformers has no gpt-oss")
STACKS = ("gate_up_proj", "down_proj")
# Bits of E2M1: a sign, two of the exponent, one of the mantissa.
NUMBERS = torch.tensor(
    [
        (1 - 2 * (c >> 3)) * ((c & 1) / 2 if not c & 6 else (1 + (c & 1) / 2) * 2.0 ** ((c >> 1 & 3) - 1))
        for c in range(16)
    ]
)


def packed(generator: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Any bytes, and any powers of two between which bfloat16 has no gap: [experts, in, out] -> blocks and scales."""
    count, width, rows = shape
    groups = (count, rows, width // 32)
    return {
        "_blocks": torch.randint(256, (*groups, 16), dtype=torch.uint8, generator=generator),
        "_scales": torch.randint(110, 127, groups, dtype=torch.uint8, generator=generator),
    }


def multiplied_out(blocks: Tensor, scales: Tensor) -> Tensor:
    """By the definition, in float64: [experts, out, in]."""
    numbers = NUMBERS.double()[torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()]
    return (numbers * 2.0 ** (scales.double()[..., None] - 127)).flatten(-2)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the form in which gpt-oss is on the Hub. Read only."""
    folder = write_family(tmp_path_factory.mktemp("mxfp4") / "published", "gpt_oss")
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, tensor in read_weights(folder).items():
        if name.endswith(STACKS):
            weights |= {name + part: found for part, found in packed(generator, tuple(tensor.shape)).items()}
        else:
            weights[name] = tensor.bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = {name: value for name, value in read_config(folder).items() if name not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def rewritten(published: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = read_weights(published)
    change(weights)
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((published / "config.json").read_bytes())
    return folder


def test_numbers_are_those_of_transformers(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of the definition, to the bit, when a few rows are multiplied out at a time."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    monkeypatch.setattr("svdconvert.storage.packed_data.PIECE", 1000)
    weights, found = read_weights(published), read_matrices(published)
    for layer in range(3):
        for stack in STACKS:
            path = f"model.layers.{layer}.mlp.experts"
            blocks, scales = (weights[f"{path}.{stack}{part}"] for part in ("_blocks", "_scales"))
            theirs, exact = convert_moe_packed_tensors(blocks, scales), multiplied_out(blocks, scales)
            for number in range(4):
                own = found[f"{path}.{number}.{stack}.weight"]
                assert own.dtype == torch.bfloat16
                assert torch.equal(own.view(torch.int16), theirs[number].T.contiguous().view(torch.int16))
                assert torch.equal(own.double(), exact[number])
                assert torch.equal(found[f"{path}.{number}.{stack}.bias"], weights[f"{path}.{stack}_bias"][number])


def test_any_scale(tmp_path: Path, published: Path) -> None:
    """All 255 powers of two that there are, where bfloat16 has no normal numbers, too."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    name = "model.layers.0.mlp.experts.down_proj"

    def change(weights: dict[str, Tensor]) -> None:
        scales = weights[f"{name}_scales"]
        weights[f"{name}_scales"] = torch.arange(scales.numel()).remainder(255).to(torch.uint8).view(scales.shape)

    folder = rewritten(published, tmp_path / "model", change)
    weights, found = read_weights(folder), read_matrices(folder)
    theirs = convert_moe_packed_tensors(weights[f"{name}_blocks"], weights[f"{name}_scales"])
    for number in range(4):
        own = found[f"model.layers.0.mlp.experts.{number}.down_proj.weight"]
        assert torch.equal(own.view(torch.int16), theirs[number].T.contiguous().view(torch.int16))


def test_converted_as_the_model_multiplied_out(published: Path, tmp_path: Path) -> None:
    """The result is that of the bfloat16 model which transformers makes of the files, byte by byte."""
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    settings = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(published, quantization_config=settings, **options)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    (plain := tmp_path / "plain").mkdir()
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in read_config(published).items() if name != "quantization_config"}
    (plain / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    outcomes = {
        folder.name: convert(
            folder, tmp_path / f"{folder.name}-made", keep=0.6, device="cpu", check=folder is published
        )
        for folder in (published, plain)
    }
    one, two = (read_weights(tmp_path / f"{name}-made") for name in ("published", "plain"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    made = read_config(tmp_path / "published-made")
    assert "quantization_config" not in made
    assert made == read_config(tmp_path / "plain-made")
    assert not failed(verify(tmp_path / "published-made", str(published)))
    told = [note for note in outcomes["published"].plan.notes if "MXFP4" in note]
    assert len(told) == 1
    assert not [note for note in outcomes["plain"].plan.notes if "MXFP4" in note]


def test_a_plan_of_the_config(published: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((published / "config.json").read_bytes())
    one, two = plan(published, keep=0.5), plan(tmp_path, keep=0.5)
    assert (one.params_before, one.bytes_before, one.ranks) == (two.params_before, two.bytes_before, two.ranks)


NAME = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(f"{NAME}_scales"), f"lacks {NAME}_scales"),
        (
            lambda weights: weights.update({f"{NAME}_scales": weights[f"{NAME}_scales"][:, :5].clone()}),
            "are not numbers and",
        ),
        (lambda weights: weights.update({f"{NAME}_blocks": weights[f"{NAME}_blocks"].int()}), "are not numbers and"),
        (lambda weights: weights.pop(f"{NAME}_blocks"), "experts.0.down_proj.weight"),
        (lambda weights: weights[f"{NAME}_scales"].fill_(255), "infinite"),
    ],
    ids=["no scales", "few scales", "another type", "no numbers", "not a number"],
)
def test_refused(published: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    folder = rewritten(published, tmp_path / "model", change)
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "out", keep=0.6, device="cpu", check=False)
    assert not (tmp_path / "out" / "config.json").exists()


def test_pickles_and_other_ways_are_refused(published: Path, tmp_path: Path) -> None:
    torch.save(read_weights(published), tmp_path / "pytorch_model.bin")
    config = read_config(published)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="MXFP4 weights in pickles; give the safetensors files"):
        LocalSource(tmp_path)
    config["quantization_config"]["quant_method"] = "gptq"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"already quantised \(gptq\)"):
        LocalSource(tmp_path)
