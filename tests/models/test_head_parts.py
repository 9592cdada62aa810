"""Losses from a head that is read part by part, against autograd through all of it in float64; rows of embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import FAMILIES, VOCAB, write_family
from torch import Tensor, nn
from torch.nn import functional

from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.methods.statistics import Needs
from svdconvert.models import head_sizes
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.head import Head, Logits, whole_head
from svdconvert.models.head_divergence import head_divergence
from svdconvert.models.loss import head_batches, next_token_loss
from svdconvert.models.softmax import draw
from svdconvert.models.stream import Stream
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource

IDS = torch.randint(0, VOCAB, (3, 14), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(14)[None] < torch.tensor([14, 9, 12])[:, None]
COUNTED = MASK[:, :-1] & MASK[:, 1:]
DRAWS = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
# One of each way in which families make logits of their heads' output; and a bias, a tied head, a narrow embedding.
WAYS = {ARCHITECTURES[name].pieces.logits: name for name in reversed(FAMILIES)}
CASES = dict.fromkeys([*WAYS.values(), *(name for name in ("gptj", "gpt2", "opt") if name in FAMILIES)])


def accept(logits: Tensor) -> None:
    """Any logits will do."""


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has every head taken in parts of so many tokens, of which the last one is smaller."""

    def take(tokens: int, positions: int = 10) -> None:
        sizes = head_sizes.HeadSizes(whole=0, part=2**25, tokens=tokens, positions=positions)
        monkeypatch.setattr(head_sizes, "ON_CPU", sizes)

    return take


@dataclass(frozen=True)
class Whole:
    """What autograd and torch's own functions make of all logits at once, in float64.

    Attributes:
        nll, kl: sums in nats, of the text and from the other states.
        slope, slope_drawn, slope_kl: [batch, length, hidden], the gradients of the sums.
    """

    nll: float
    kl: float
    slope: Tensor
    slope_drawn: Tensor
    slope_kl: Tensor


def whole(blocks: ModelBlocks, hidden: Tensor, reference: Tensor) -> Whole:
    hidden = hidden.double().requires_grad_()
    logits = torch.cat([*blocks.logits(hidden)], -1)[:, :-1][COUNTED]
    with torch.no_grad():
        wanted = torch.cat([*blocks.logits(reference.double())], -1)[:, :-1][COUNTED].log_softmax(-1)
    nll = functional.cross_entropy(logits, IDS[:, 1:][COUNTED], reduction="sum")
    drawn = functional.cross_entropy(logits, draw(logits.detach(), DRAWS[:, :-1][COUNTED]), reduction="sum")
    kl = functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
    slopes = [torch.autograd.grad(each, hidden, retain_graph=True)[0] for each in (nll, drawn, kl)]
    return Whole(float(nll.detach()), float(kl.detach()), *slopes)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", CASES)
def test_as_exact_as_the_whole_head(family: str, in_parts: Callable[[int], None], tmp_path: Path) -> None:
    source = LocalSource(write_family(tmp_path / "dense", family))
    blocks = ModelBlocks(source)
    generator = torch.Generator().manual_seed(3)
    reference = torch.randn(*IDS.shape, blocks.hidden_size, generator=generator)
    hidden = reference + 0.1 * torch.randn(reference.shape, generator=generator)
    wanted = whole(ModelBlocks(source, dtype=torch.float64), hidden, reference)
    for tokens in (None, 37, VOCAB - 1):
        if tokens is not None:
            in_parts(tokens)
        with blocks.head() as head:
            assert len(head.parts) == (1 if tokens is None else math.ceil(VOCAB / tokens))
            known: dict[str, Any] = {"ids": IDS, "mask": MASK, "check": accept}
            nll, count, slope = next_token_loss(head, hidden, **known, gradient=True)
            same, _, drawn = next_token_loss(head, hidden, **known, gradient=True, draws=DRAWS)
            with torch.no_grad():
                alone, _, nothing = next_token_loss(head, hidden, **known)
            sums, slope_kl = head_divergence(head, reference, hidden, **known, gradient=True)
            plain, _ = head_divergence(head, reference, hidden, **known, reference_head=head)
        assert count == sums.tokens == int(COUNTED.sum())
        assert nll == same == pytest.approx(alone, rel=1e-6) == pytest.approx(wanted.nll, rel=1e-6)
        assert not nothing.any()
        assert off(slope, wanted.slope) < 3e-6
        assert off(drawn, wanted.slope_drawn) < 3e-6
        assert off(slope_kl, wanted.slope_kl) < 3e-5
        assert sums == plain
        assert sums.kl == pytest.approx(wanted.kl, rel=1e-4)
        assert sums.other == pytest.approx(wanted.nll, rel=1e-6)


def test_where_the_label_has_nearly_all_the_probability() -> None:
    """The gradient is small then; of a head in parts it is no difference of large numbers."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 9, 32, generator=generator)
    linear = nn.Linear(32, 100).requires_grad_(False)
    linear.weight.copy_(torch.randn(100, 32, generator=generator) / 6)
    linear.bias.copy_(torch.randn(100, generator=generator) / 6)
    ids = torch.randperm(90, generator=generator)[None, :9]
    for position in range(8):
        linear.weight[ids[0, position + 1]] = hidden[0, position] * 14 / hidden[0, position].square().sum()
    exact = hidden.double().requires_grad_()
    loss = functional.cross_entropy(
        functional.linear(exact, linear.weight.double(), linear.bias.double())[0, :-1], ids[0, 1:], reduction="sum"
    )
    (wanted,) = torch.autograd.grad(loss, exact)
    to_logits = Logits("as they are", None)

    @contextmanager
    def part(number: int) -> Iterator[nn.Sequential]:
        some = nn.Linear(32, 1).requires_grad_(False)
        tokens = slice(10 * number, 10 * number + 10)
        some.weight, some.bias = nn.Parameter(linear.weight[tokens]), nn.Parameter(linear.bias[tokens])
        yield nn.Sequential(some.requires_grad_(False), to_logits)

    heads = [
        whole_head(nn.Sequential(linear, to_logits), 100),
        Head(nn.Identity(), [slice(place, place + 10) for place in range(0, 100, 10)], 100, part),
    ]
    errors = []
    for head in heads:
        nll, _, slope = next_token_loss(
            head, hidden, ids, torch.ones_like(ids, dtype=torch.bool), check=accept, gradient=True
        )
        assert nll == pytest.approx(float(loss.detach()), abs=1e-6)
        row = (slope.double() - wanted)[0, :-1].norm(dim=-1) / wanted[0, :-1].norm(dim=-1)
        errors.append(float(row.max()))
    assert errors[1] < 1e-5
    assert errors[0] < 1e-2


def test_a_large_head_is_in_memory_part_by_part(
    in_parts: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = LocalSource(write_family(tmp_path / "dense", "llama"))
    blocks = ModelBlocks(source)

    def real() -> int:
        return sum(p.numel() for p in blocks._model.parameters() if not p.is_meta)

    with blocks.head() as head:
        assert head.parts == [slice(0, VOCAB)]
        assert real() == VOCAB * 64 + 64
    in_parts(50)
    with blocks.head() as head:
        assert head.parts == [slice(0, 50), slice(50, 100), slice(100, 150), slice(150, VOCAB)]
        for number, tokens in enumerate(head.parts):
            assert real() == 64
            with head.part(number):
                assert real() == 64 + (tokens.stop - tokens.start) * 64
    assert real() == 0
    monkeypatch.setattr(head_sizes, "ON_CPU", replace(head_sizes.ON_CPU, whole=VOCAB * 64 * 4))
    with blocks.head() as head:
        assert len(head.parts) == 1, "it is not larger than what may be there whole"


def test_sizes_of_parts() -> None:
    """151,936 tokens of 2,048 channels in float32 are 1.24 GB; a part is bounded by bytes and by tokens."""
    on_cpu, on_device = head_sizes.head_sizes("cpu"), head_sizes.head_sizes("cuda")
    assert on_cpu.at_a_time(151_936, 4 * 2048) == 4096
    assert on_cpu.at_a_time(128_256, 4 * 8192) == 1024
    assert on_cpu.at_a_time(262_144, 4 * 640) == 4096
    assert on_cpu.at_a_time(49_152, 4 * 576) == 49_152
    assert on_device.at_a_time(151_936, 4 * 2048) == 151_936


def test_small_batches_are_put_together(in_parts: Callable[..., None], tmp_path: Path) -> None:
    blocks = ModelBlocks(LocalSource(write_family(tmp_path / "dense", "llama")))
    batches = [slice(place, min(place + 2, 9)) for place in range(0, 9, 2)]
    with blocks.head() as head:
        assert head_batches(batches, 14, head) is batches
    in_parts(50, positions=60)
    with blocks.head() as head:
        assert head_batches(batches, 14, head) == [slice(0, 4), slice(4, 8), slice(8, 9)]
        assert head_batches(batches, 100, head) == batches


@pytest.mark.parametrize("labels", ["empirical", "sampled"])
def test_statistics(labels: str, in_parts: Callable[[int], None], tmp_path: Path) -> None:
    """The same labels are drawn, and the same loss is known, in whatever parts the head is taken."""
    source = LocalSource(write_family(tmp_path / "dense", "gemma2"))
    tokens = CalibrationTokens(IDS, MASK, len(IDS), int(MASK.sum()))
    found = []
    for take in (None, 37):
        if take is not None:
            in_parts(take)
        work = tmp_path / str(take)
        modules = ["layers.1.mlp.up_proj"]
        run = StatisticsRun(source, tokens, Needs(True, True), modules, work=work, batch_size=1, labels=labels)
        ((_, part),) = run
        assert run.loss is not None
        found.append((run.loss.nll, part[modules[0]].output_gram))
    (loss, gram), (of_parts, gram_of_parts) = found
    assert of_parts == pytest.approx(loss, rel=1e-6)
    assert gram is not None
    assert gram_of_parts is not None
    assert off(gram_of_parts, gram) < 1e-5


def test_numbers_that_are_none(in_parts: Callable[[int], None], tmp_path: Path) -> None:
    folder = write_family(tmp_path / "dense", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][VOCAB - 1, 3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    in_parts(50)
    stream = Stream(ModelBlocks(LocalSource(folder)), IDS, MASK, tmp_path / "work", {}, name="it", batch_size=2)
    blocks = stream._blocks
    with stream.store.writing(f"hidden-{blocks.count}") as write:
        write(torch.randn(*IDS.shape, blocks.hidden_size))
    with blocks.head() as head, pytest.raises(InputError, match=r"tensor lm_head\.weight has NaN"):
        stream.loss(head)
    assert all(parameter.is_meta for parameter in blocks._model.parameters())


@pytest.mark.parametrize("form", ["safetensors", "pickled"])
def test_rows_of_the_embedding(form: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the tokens alone, and what lies between two that are near."""
    folder = write_family(tmp_path / "dense", "llama")
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    if form == "pickled":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    monkeypatch.setattr("svdconvert.models.piece_weights._NEAR", 4 * 64 * 2)
    monkeypatch.setattr("svdconvert.models.piece_weights.CHUNK", 4 * 64 * 5)
    ids = torch.tensor([[3, 5, 150, 7], [9, 11, 13, 3]])
    read, plain = [], WeightReader.read

    def watched(self: WeightReader, info: Any, buffer: Tensor) -> Tensor:
        read.append((info.name, info.shape[0]))
        return plain(self, info, buffer)

    monkeypatch.setattr(WeightReader, "read", watched)
    found = ModelBlocks(LocalSource(folder)).embed(ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(found, table[ids])
    # 3 to 7, for there is room for five at a time; 9 to 13; 150
    assert read == [("model.embed_tokens.weight", count) for count in (5, 5, 1)]


def test_an_embedding_that_is_none(tmp_path: Path) -> None:
    """Said of a token that is met."""
    folder = write_family(tmp_path / "dense", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    blocks, mask = ModelBlocks(LocalSource(folder)), torch.ones(1, 2, dtype=torch.bool)
    assert blocks.embed(torch.tensor([[6, 8]]), mask).isfinite().all()
    with pytest.raises(InputError, match=r"tensor model\.embed_tokens\.weight has NaN"):
        blocks.embed(torch.tensor([[6, 7]]), mask)


def test_a_token_that_the_model_does_not_know(tmp_path: Path) -> None:
    """The bytes behind the embedding are another tensor's."""
    blocks = ModelBlocks(LocalSource(write_family(tmp_path / "dense", "llama")))
    with pytest.raises(InputError, match=rf"has the token {VOCAB}, but .* knows {VOCAB}"):
        blocks.embed(torch.tensor([[6, VOCAB]]), torch.ones(1, 2, dtype=torch.bool))
