"""The trial run of a result: whole or block by block, what it finds wrong, and the memory that it takes."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import CONFIG, LAYERS, LINEARS, VOCAB, read_config, read_weights
from transformers import AutoModelForCausalLM

from svdconvert import InputError, JobError, convert, densify, verify
from svdconvert.commands.verify import expected_tensors, failed, self_check
from svdconvert.families.table import GPT_NEOX
from svdconvert.jobs.model_files import factored_config
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.probe import PROBE, logits_by_block, probe
from svdconvert.storage.source import LocalSource

IDS = torch.arange(PROBE)[None]


@pytest.fixture(params=["loaded whole", "block by block"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way of running these models, all of which are small."""
    if request.param == "block by block":
        monkeypatch.setattr("svdconvert.models.probe.LOADED_BYTES", 0)
    return str(request.param)


@pytest.fixture
def copy(factored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(factored, tmp_path / "copy"))


def change(folder: Path, name: str, value: float | None, row: int = 3) -> None:
    """Overwrite a row of a tensor, or leave the tensor out."""
    tensors = read_weights(folder)
    if value is None:
        del tensors[name]
    else:
        tensors[name][row] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def whole(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_the_check_says_how_it_was_done(dense: Path, way: str, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "out", rank=16, device="cpu")
    assert f"logits: finite for 16 tokens, {way}" in report.outcome.checks
    assert way in next(check.detail for check in verify(tmp_path / "out") if check.name == "logits")
    assert f"logits: finite for 16 tokens, {way}" in densify(tmp_path / "out", tmp_path / "d", device="cpu").checks


@pytest.mark.parametrize("how", [{"layout": "balanced"}, {"layout": "pivoted"}, {"share_layers": 3}])
def test_half_precision_on_the_disk(dense: Path, how: dict[str, Any], tmp_path: Path) -> None:
    """Computed in float32 whatever is stored; tests/families/test_families_converted.py has the other families."""
    convert(dense, tmp_path / "out", rank=16, device="cpu", **how)
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    for folder in (tmp_path / "out", tmp_path / "densified"):
        found = torch.cat(list(logits_by_block(LocalSource(folder), IDS)), -1)
        assert found.dtype == torch.float32
        assert float((found - whole(folder)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["gpt_neox.layers.2.mlp.dense_4h_to_h.up.weight", "lm_head.weight"])
def test_numbers_that_are_none(copy: Path, way: str, name: str) -> None:
    change(copy, name, math.nan)
    changed, bad = failed(verify(copy))
    assert changed.name == "data"
    assert bad.name == "logits"
    assert "NaN or infinite" in bad.detail
    assert (name in bad.detail) == (way == "block by block")
    with pytest.raises(JobError, match=r"failed its check \(logits: "):
        self_check(copy, read_config(copy))


def test_a_block_that_overflows(dense: Path, way: str, tmp_path: Path) -> None:
    """Every stored number is finite, but what is computed from them is not."""
    convert(dense, tmp_path / "out", rank=16, device="cpu", dtype="float32")
    change(tmp_path / "out", "gpt_neox.layers.1.mlp.dense_4h_to_h.up.weight", 3e38)
    *_, bad = failed(verify(tmp_path / "out"))
    what = "block 1 gives" if way == "block by block" else "the logits have"
    assert bad.detail == f"{what} NaN or infinite values for a few tokens"


@pytest.mark.parametrize("name", ["layers.1.attention.dense.down.weight", "layers.2.input_layernorm.bias"])
def test_missing_tensors(copy: Path, way: str, name: str) -> None:
    name = f"gpt_neox.{name}"
    change(copy, name, None)
    with pytest.raises(InputError, match=f"{name}|cannot be loaded"):
        probe(copy, LocalSource(copy))
    with pytest.raises(JobError, match=f"missing {name}"):
        self_check(copy, read_config(copy))


def test_positions_that_there_are_not(dense: Path, way: str, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, layout="pivoted", device="cpu")
    change(tmp_path / "out", "gpt_neox.layers.1.attention.dense.position", 64)
    *_, bad = failed(verify(tmp_path / "out"))
    assert bad.name == "positions"
    assert "layers.1.attention.dense" in bad.detail
    assert "not a permutation" in bad.detail


def test_one_piece_at_a_time(dense: Path, tmp_path: Path) -> None:
    """What has values: the factors of one block, and the inner ones that it shares with the first."""
    convert(dense, tmp_path / "out", rank=16, share_layers=3, device="cpu")
    blocks = ModelBlocks(LocalSource(tmp_path / "out"))

    def real() -> int:
        parts = [*blocks._layers, blocks._model]
        return sum(p.numel() for part in parts for p in part.parameters() if not p.is_meta)

    inner = sum(16 * inputs for _, inputs in LINEARS.values())
    outer = sum(outputs * (16 + 1) for outputs, _ in LINEARS.values())
    assert real() == 0
    for index in range(LAYERS):
        with blocks.block(index):
            assert real() == inner + outer + 4 * 64
    hidden = torch.zeros(1, 1, 64)
    assert [part.shape[-1] for part in blocks.logits(hidden)] == [VOCAB]
    assert real() == 0


# Peaks after shallow models and after deep ones; that of a process never goes down.
PEAKS = """
import sys
from pathlib import Path
import torch
from svdconvert.machine.memory import peak_memory_bytes
from svdconvert.models.probe import logits_by_block
from svdconvert.storage.source import LocalSource
for folder in sys.argv[1:]:
    assert all(part.isfinite().all() for part in logits_by_block(LocalSource(Path(folder)), torch.arange(16)[None]))
    print(peak_memory_bytes())
"""


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """A block of these has 6 MB in float32: ten more are 60 MB, and the table of 20,000 tokens is 41 MB."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 20_000}
    folders = []
    for count, layout in itertools.product((4, 14), ("balanced", "pivoted")):
        ranks = {f"layers.{layer}.{name}": 192 for layer in range(count) for name in LINEARS}
        source = {**CONFIG, **sizes, "num_hidden_layers": count}
        config = factored_config(source, GPT_NEOX, ranks, "float16", layout, {})
        folders.append(folder := tmp_path / f"{count}-{layout}")
        folder.mkdir()
        tensors = {}
        for name, shape in expected_tensors(config).items():
            values = torch.arange(shape[0]) if name.endswith("position") else torch.full(shape, 0.01).half()
            tensors[name] = values
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, folders)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    _, shallow, *deep = map(int, done.stdout.split())
    assert max(deep) - shallow < 20_000_000  # a third of what ten blocks are: the allocator keeps 6 to 16 MB
