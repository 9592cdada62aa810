"""Mixtures of experts: stacked files, and experts that few tokens are sent to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import read_weights
from support.families import FAMILIES, full_ranks, write_family
from support.running import TOKENS, distance
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import svdconvert.healing.state
from svdconvert import Calibration, convert, densify, heal, plan, verify
from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.methods.statistics import Needs
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loading import factored_classes, load_model
from svdconvert.planning.events import Events
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import Cut, TensorInfo

EXPERTS = {name: row.experts for name, row in ARCHITECTURES.items() if name in FAMILIES and row.experts is not None}
# what files have in two forms, what they have stacked alone, and of that what they have as [in, out]
MIXTURES = [name for name, experts in EXPERTS.items() if not experts.stacked_alone]
STACKED = [name for name, experts in EXPERTS.items() if experts.stacked_alone]
TRANSPOSED = [name for name, experts in EXPERTS.items() if experts.transposed]


def stacked(weights: dict[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Weights as transformers 5 has them in memory: [experts, out, in], the gate before what it gates."""
    experts = ARCHITECTURES[model_type].experts
    assert experts is not None
    gate, up, down = experts.names
    found = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    if experts.mixture != "mlp":
        found = {name.replace(f".{experts.mixture}.", ".mlp."): tensor for name, tensor in found.items()}
    for block in sorted({name.partition(".experts.")[0] for name in weights if ".experts." in name}):
        each = [
            {name: weights[f"{block}.experts.{number}.{name}.weight"] for name in experts.names} for number in range(4)
        ]
        own = block.replace(experts.mixture, "mlp")
        found[f"{own}.experts.gate_up_proj"] = torch.stack([torch.cat([one[gate], one[up]]) for one in each])
        found[f"{own}.experts.down_proj"] = torch.stack([one[down] for one in each])
    return found


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_stacked_files(model_type: str, file: str, checkpoints: Any, tmp_path: Path) -> None:
    """The same tensors come out, to the bit, as of files with a matrix for every expert."""
    dense = checkpoints.dense(model_type)
    weights = stacked(read_weights(dense), model_type)
    (tmp_path / "stacked").mkdir()
    if file.endswith(".bin"):
        torch.save(weights, tmp_path / "stacked" / file)
    else:
        save_file(weights, tmp_path / "stacked" / file, metadata={"format": "pt"})
    (tmp_path / "stacked" / "config.json").write_bytes((dense / "config.json").read_bytes())
    for source in (dense, tmp_path / "stacked"):
        convert(source, tmp_path / source.name / "made", keep=0.6, device="cpu", check=False)
    one, two = (read_weights(tmp_path / name / "made") for name in (dense.name, "stacked"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not failed(verify(tmp_path / "stacked" / "made", str(tmp_path / "stacked")))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("model_type", TRANSPOSED)
def test_transposed_stacks(
    model_type: str, file: str, checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert's matrix, some of its rows and its bias, of stacks [experts, in, out]; columns are read in pieces."""
    monkeypatch.setattr("svdconvert.storage.reader.PANEL", 5000)
    monkeypatch.setattr("svdconvert.storage.reader.CHUNK", 3000)
    dense, experts = checkpoints.dense(model_type), EXPERTS[model_type]
    weights = read_weights(dense)
    if file.endswith(".bin"):
        torch.save(weights, tmp_path / file)
    else:
        save_file(weights, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    source = LocalSource(tmp_path)
    buffer = torch.empty(2**17, dtype=torch.uint8)
    with WeightReader(source) as reader:
        for name in experts.names:
            stack = f"model.layers.1.{experts.mixture_5}.experts.{name}"
            path = f"model.layers.1.{experts.mixture}.experts.2.{name}"
            info, expected = source.tensors[f"{path}.weight"], weights[stack][2].T
            assert torch.equal(reader.read(info, buffer), expected)
            assert torch.equal(
                torch.cat([piece.clone() for piece in reader.stream(info)]).view(expected.dtype).view(expected.shape),
                expected,
            )
            assert torch.equal(reader.read(info.rows(5, 9), buffer), expected[5:9])
            assert torch.equal(reader.read(source.tensors[f"{path}.bias"], buffer), weights[f"{stack}_bias"][2])
    assert not any(name.endswith(tuple(experts.stacks)) for name in source.tensors)


@pytest.mark.parametrize("model_type", STACKED)
def test_densified_without_an_expert(model_type: str, checkpoints: Any, tmp_path: Path) -> None:
    """Nothing takes the place of a matrix that is not there."""
    made = checkpoints.pair(model_type).factored
    weights, lost = read_weights(made), f"model.layers.1.{EXPERTS[model_type].mixture}.experts.2."
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    config = json.loads((made / "config.json").read_text())
    config["svd_ranks"] = {n: r for n, r in config["svd_ranks"].items() if not f"model.{n}.".startswith(lost)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lacks a part of .*, that of expert 2"):
        densify(tmp_path, tmp_path / "out", device="cpu")


def test_a_plan_has_a_line_for_a_kind(checkpoints: Any) -> None:
    groups = {group.name: group.count for group in plan(checkpoints.dense("mixtral"), keep=0.6).groups}
    assert groups["block_sparse_moe.experts.*.w1"] == 12
    assert len(groups) == len(ARCHITECTURES["mixtral"].targets)


def test_rows_of_a_matrix_in_a_stack(tmp_path: Path, checkpoints: Any) -> None:
    """Bytes of bytes: rows of an expert's matrix are read from the stack that it lies in."""
    weights = stacked(read_weights(checkpoints.dense("mixtral")), "mixtral")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoints.dense("mixtral") / "config.json").read_bytes())
    source = LocalSource(tmp_path)
    info = source.tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"].rows(5, 9)
    with WeightReader(source) as reader:
        found = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
    assert torch.equal(found, weights["model.layers.1.mlp.experts.gate_up_proj"][2, 128 + 5 : 128 + 9])
    cut = TensorInfo("part", "F16", (10, 4), "file", 0, Cut("whole", 800, 80, 8000)).rows(2, 5).cut
    assert cut == Cut("whole", 816, 24, 8000)


class Notes(Events):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("model_type", [name for name in ("mixtral", "gpt_oss") if name in EXPERTS])
def test_one_token(model_type: str, checkpoints: Any) -> None:
    """Goes to its own experts alone, by no other rule than among other tokens."""
    pair = checkpoints.pair(model_type)
    model = AutoModelForCausalLM.from_pretrained(pair.factored, trust_remote_code=True).eval()
    mixtures = [part for part in model.modules() if type(part).__name__ == "Experts"]
    assert mixtures
    width, chosen = model.config.hidden_size, torch.tensor([[2, 0], [1, 3]])
    hidden, weights = torch.randn(2, width, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.7, 0.3]] * 2)
    called: list[int] = []
    for number, expert in enumerate(mixtures[0]):
        expert.register_forward_hook(lambda *_, number=number: called.append(number))
    with torch.no_grad():
        both = mixtures[0](hidden, chosen, weights)
        called.clear()
        one = mixtures[0](hidden[:1], chosen[:1], weights[:1])
    assert called == [2, 0]
    assert one.shape == (1, width)
    assert distance(one, both[:1]) < 1e-5
    mixtures[0](hidden[:1].requires_grad_(), chosen[:1], weights[:1]).sum().backward()
    assert all(weight.grad is not None for weight in mixtures[0].parameters())


@pytest.mark.parametrize("gradients", [False, True])
def test_experts_without_a_token(gradients: bool, tmp_path: Path) -> None:
    """Their metric is what the block's experts have in common, and it is said."""
    dense = write_family(tmp_path / "dense", "mixtral", num_local_experts=16)
    source, row = LocalSource(dense), ARCHITECTURES["mixtral"]
    tokens = CalibrationTokens(TOKENS.ids[:1, :5], TOKENS.mask[:1, :5], 1, 5)
    events = Notes()
    run = StatisticsRun(
        source, tokens, Needs(True, gradients, True, False), list(full_ranks(row, dense)), work=tmp_path, events=events
    )
    found = {path: entry for _, block in run for path, entry in block.items()}
    blocks = ModelBlocks(source)
    with torch.no_grad():
        hidden = blocks.embed(tokens.ids, tokens.mask)
    with blocks.block(0) as block, blocks.routing(block) as routing, torch.no_grad():
        blocks.run(block, hidden, tokens.mask)
        seen = {n: len(routing.tokens(f"block_sparse_moe.experts.{n}.w1")) for n in range(16)}
    assert sum(seen.values()) == 2 * 5
    unseen = [number for number, count in seen.items() if count == 0]
    assert len(unseen) >= 6
    first, *others = (found[f"layers.0.block_sparse_moe.experts.{number}.w1"] for number in unseen)
    for other in others:
        assert torch.equal(other.input_gram, first.input_gram)
    assert float(first.input_gram.trace()) > 0
    inner = found[f"layers.0.block_sparse_moe.experts.{unseen[0]}.w2"].input_gram
    assert torch.allclose(inner, inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype))
    told = [note for note in events.notes if "experts have seen fewer tokens than channels" in note]
    assert len(told) == 1
    assert ": 0)" in told[0]


def test_bytes_are_spent_on_experts_too(checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some experts are rounded and some become products; each is stored as recorded, and multiplied out the same."""
    dense = checkpoints.dense("mixtral")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"tiger {i} and lion {i * i}" for i in range(200)), encoding="utf-8")
    calibration = Calibration(str(text), samples=4, length=16)
    out, targets = tmp_path / "out", ("layers.1.*",)
    report = convert(dense, out, bytes=0.15, calibration=calibration, device="cpu", targets=targets)
    record = report.outcome.record
    assert any(".experts." in name for name in record["rounded"])
    assert any(".experts." in name for name in record["matrices"])
    assert not failed(verify(tmp_path / "out", against=str(dense)))
    densify(tmp_path / "out", tmp_path / "plain")
    packed, plain = (load_model(tmp_path / name, "cpu", torch.float32)(TOKENS.ids).logits for name in ("out", "plain"))
    assert torch.allclose(packed, plain, rtol=0, atol=1e-3 * float(plain.abs().max()))
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_FACTOR", 0.0)
    short = Calibration(str(text), samples=4, length=2)
    for how in ("end-to-end", "blocks"):  # a step whose two tokens are not sent to every expert is saved, too
        healed = tmp_path / how
        told = heal(out, dense, short, healed, how=how, steps=2, lr=1e-3, batch_size=1, device="cpu").record
        assert told["rounded"].keys() == record["rounded"].keys()
        assert not failed(verify(healed, against=str(dense)))


class _Mixture(nn.Module):
    """Experts as a model's only part, for an export."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        found: Tensor = self.experts(hidden, chosen, weights)
        return found


@pytest.mark.skipif("mixtral" not in EXPERTS, reason="the experts of this version are modules of its own")
def test_what_is_not_chosen_may_overflow_in_a_graph() -> None:
    _, model_class = factored_classes(ARCHITECTURES["mixtral"])
    experts = sys.modules[model_class.__module__].Experts(nn.Linear(8, 8, bias=False) for _ in range(3))
    mixture = _Mixture(experts).half().requires_grad_(False)
    experts[2].weight.fill_(60_000)
    given = (torch.ones(3, 8).half(), torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.rand(3, 2).half())
    wanted = mixture(*given)
    assert wanted.isfinite().all()
    assert torch.equal(torch.export.export(mixture, given).module()(*given), wanted)
