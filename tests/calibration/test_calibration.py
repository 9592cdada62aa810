"""Streamed statistics against the whole model with autograd, in float64; interruption; the folder they are kept in."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LAYERS, TARGETS, VOCAB, random_tensors, write_checkpoint
from torch import Tensor

from svdconvert.calibration.collector import Collector
from svdconvert.calibration.folder import StatisticsFolder, model_key, save_statistics, statistics_key
from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.methods.statistics import STATISTICS, ModuleStatistics, Needs
from svdconvert.models.blocks import ModelBlocks
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource
from svdconvert.storage.tensor_files import sealed

ALL = Needs(True, True, True, True)
INPUTS = Needs(input_gram=True, input_abs=True)


def make_tokens(lengths: list[int], seed: int = 0) -> CalibrationTokens:
    """Random sequences, padded on the right to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    return CalibrationTokens(ids, mask, len(lengths), int(mask.sum()))


PACKED = make_tokens([20] * 5)
PADDED = make_tokens([20, 7, 13, 2, 16])


@pytest.fixture(scope="module")
def source(dense: Path) -> LocalSource:
    return LocalSource(dense)


@pytest.fixture(scope="module")
def stock(dense: Path) -> Any:
    """The whole model, by transformers itself, in float64."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(dense).double().eval()


def collect(source: LocalSource, tokens: CalibrationTokens, needs: Needs, work: Path, **options: Any) -> Any:
    """``({module: statistics}, loss)``."""
    run = StatisticsRun(source, tokens, needs, options.pop("modules", TARGETS), work=work, **options)
    found = {name: entry for _, part in run for name, entry in part.items()}
    return found, run.loss


def keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, args: tuple[Tensor], output: Tensor) -> None:
    """A hook that keeps a layer's input and output, and has the output's gradient kept."""
    output.retain_grad()
    seen[name] = args[0], output


def reference(model: Any, tokens: CalibrationTokens, labels: Tensor | None = None) -> Any:
    """The same statistics from one sequence at a time, unpadded, by autograd through the whole model."""
    sums: dict[str, dict[str, Tensor]] = {}
    nll, predicted = 0.0, 0
    for row, counted in enumerate(tokens.mask.sum(dim=1).tolist()):
        ids = tokens.ids[row, :counted][None]
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = [
            model.base_model.get_submodule(name).register_forward_hook(partial(keep, seen, name)) for name in TARGETS
        ]
        logits = model(input_ids=ids).logits
        own = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        nll, predicted = nll + float(own.detach()), predicted + counted - 1
        wanted = ids[0, 1:] if labels is None else labels[row, : counted - 1]
        torch.nn.functional.cross_entropy(logits[0, :-1], wanted, reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in seen.items():
            assert y.grad is not None
            x, g = x[0].detach(), y.grad[0]
            weight = model.base_model.get_submodule(name).weight
            found = {
                "input_gram": x.T @ x,
                "output_gram": g.T @ g,
                "input_abs": x.abs().sum(0),
                "fisher": weight.grad.square().sum(0),
            }
            weight.grad = None
            into = sums.setdefault(name, {})
            for kind, value in found.items():
                into[kind] = into.get(kind, 0) + value
        model.zero_grad()
    counts = dict.fromkeys(STATISTICS, tokens.tokens) | {"fisher": len(tokens.ids)}
    means = {name: {kind: value / counts[kind] for kind, value in entry.items()} for name, entry in sums.items()}
    return means, nll, predicted


def worst(found: dict[str, ModuleStatistics], means: dict[str, dict[str, Tensor]]) -> float:
    """Largest relative error (Frobenius) of all statistics."""
    errors = [
        float((getattr(found[name], kind) - value).norm() / value.norm())
        for name, entry in means.items()
        for kind, value in entry.items()
    ]
    assert len(errors) == 4 * len(TARGETS)
    return max(errors)


class TestAgainstWholeModel:
    @pytest.mark.parametrize("tokens", [PACKED, PADDED], ids=["packed", "padded"])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
    def test_all_four_statistics(
        self, source: LocalSource, stock: Any, tmp_path: Path, tokens: Any, dtype: torch.dtype, tolerance: float
    ) -> None:
        means, nll, predicted = reference(stock, tokens)
        for batch_size in (1, 2, 5):
            found, loss = collect(source, tokens, ALL, tmp_path, batch_size=batch_size, dtype=dtype)
            assert worst(found, means) < tolerance
            assert loss.nll == pytest.approx(nll, rel=tolerance)
            assert loss.tokens == predicted == int(tokens.mask[:, 1:].sum())
            assert {(e.tokens, e.samples) for e in found.values()} == {(tokens.tokens, 5)}
        assert list((tmp_path / "activations").glob("*.bin")) == []

    @pytest.mark.parametrize("tokens", [PACKED, PADDED], ids=["packed", "padded"])
    def test_input_statistics_need_one_pass(
        self, source: LocalSource, tmp_path: Path, tokens: CalibrationTokens
    ) -> None:
        both, loss = collect(source, tokens, ALL, tmp_path / "a", batch_size=2)
        one, same = collect(source, tokens, INPUTS, tmp_path / "b", batch_size=2)
        assert loss == same
        for name, entry in one.items():
            assert torch.equal(entry.input_gram, both[name].input_gram)
            assert torch.equal(entry.input_abs, both[name].input_abs)
            assert entry.output_gram is None
            assert entry.fisher is None

    def test_order_of_blocks(self, source: LocalSource, tmp_path: Path) -> None:
        forward = [i for i, _ in StatisticsRun(source, PACKED, INPUTS, TARGETS, work=tmp_path)]
        backward = [i for i, _ in StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path)]
        assert forward == backward[::-1] == [0, 1, 2]

    def test_only_what_is_asked_for(self, source: LocalSource, tmp_path: Path) -> None:
        modules = ["layers.1.mlp.dense_4h_to_h", "layers.1.attention.dense"]
        found, _ = collect(source, PACKED, Needs(fisher=True), tmp_path, modules=modules)
        assert list(found) == modules
        assert all(entry.fisher is not None and entry.input_gram is None for entry in found.values())
        whole, _ = collect(source, PACKED, ALL, tmp_path)
        assert all(torch.equal(found[name].fisher, whole[name].fisher) for name in modules)

    def test_padded_equals_unpadded(self, source: LocalSource, tmp_path: Path) -> None:
        """Documents of one length, as they are and with padding behind them that would be seen if it counted."""
        wide = CalibrationTokens(
            torch.cat([PACKED.ids, torch.full((5, 9), 7)], dim=1),
            torch.cat([PACKED.mask, torch.zeros(5, 9, dtype=torch.bool)], dim=1),
            5,
            PACKED.tokens,
        )
        plain, loss = collect(source, PACKED, ALL, tmp_path, dtype=torch.float64)
        padded, same = collect(source, wide, ALL, tmp_path, dtype=torch.float64)
        assert loss.tokens == same.tokens
        assert loss.nll == pytest.approx(same.nll, rel=1e-12)
        for name, entry in plain.items():
            for kind in STATISTICS:
                assert torch.allclose(getattr(entry, kind), getattr(padded[name], kind), rtol=1e-9, atol=1e-12)

    def test_fisher_is_of_single_sequences(self, source: LocalSource, stock: Any, tmp_path: Path) -> None:
        """Gradients of a batch, squared, would be something else."""
        found, _ = collect(source, PACKED, Needs(fisher=True), tmp_path, batch_size=5)
        logits = stock(input_ids=PACKED.ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), PACKED.ids[:, 1:].reshape(-1))
        name = TARGETS[4]
        (slope,) = torch.autograd.grad(loss, [stock.base_model.get_submodule(name).weight])
        batch = (slope * PACKED.mask[:, 1:].sum()).square().sum(0) / len(PACKED.ids)
        assert float((found[name].fisher - batch).norm() / found[name].fisher.norm()) > 0.1

    def test_grams_are_symmetric(self, source: LocalSource, tmp_path: Path) -> None:
        found, _ = collect(source, PACKED, ALL, tmp_path)
        for entry in found.values():
            assert torch.equal(entry.input_gram, entry.input_gram.T)
            assert torch.equal(entry.output_gram, entry.output_gram.T)
            assert entry.input_gram.dtype == entry.fisher.dtype == torch.float64

    def test_other_residual_and_tied_head(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        tensors = random_tensors()
        del tensors["embed_out.weight"]
        config = {"tie_word_embeddings": True, "use_parallel_residual": False, "rotary_pct": 0.25}
        folder = fresh(tensors, config=config, shards=3)
        stock = AutoModelForCausalLM.from_pretrained(folder).double().eval()
        means, nll, _ = reference(stock, PADDED)
        found, loss = collect(LocalSource(folder), PADDED, ALL, tmp_path, dtype=torch.float64)
        assert worst(found, means) < 1e-12
        assert loss.nll == pytest.approx(nll)

    @pytest.mark.parametrize("form", [{"pickled": True}, {"legacy": True, "shards": 4}])
    def test_every_form_of_checkpoint(
        self, source: LocalSource, fresh: Callable[..., Path], tmp_path: Path, form: dict[str, Any]
    ) -> None:
        plain, _ = collect(source, PACKED, INPUTS, tmp_path)
        found, _ = collect(LocalSource(fresh(**form)), PACKED, INPUTS, tmp_path)
        assert all(torch.equal(found[name].input_gram, plain[name].input_gram) for name in TARGETS)


class TestSampledLabels:
    def test_agree_with_autograd(self, source: LocalSource, stock: Any, tmp_path: Path) -> None:
        """The labels are recomputed from the seed by inverting the distribution position by position."""
        uniform = torch.rand(PADDED.ids.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        labels = torch.zeros_like(PADDED.ids)
        for row, counted in enumerate(PADDED.mask.sum(dim=1).tolist()):
            chances = torch.softmax(stock(input_ids=PADDED.ids[row, :counted][None]).logits[0].detach(), dim=-1)
            for position in range(counted):
                below = (chances[position].cumsum(0) <= uniform[row, position]).sum()
                labels[row, position] = below
        means, nll, _ = reference(stock, PADDED, labels)
        found, loss = collect(
            source, PADDED, ALL, tmp_path, labels="sampled", seed=3, dtype=torch.float64, batch_size=2
        )
        assert worst(found, means) < 1e-12
        assert loss.nll == pytest.approx(nll)

    def test_seed(self, source: LocalSource, tmp_path: Path) -> None:
        def run(**options: Any) -> Tensor:
            return collect(source, PADDED, ALL, tmp_path, labels="sampled", **options)[0][TARGETS[0]].output_gram

        first = run(seed=1)
        assert torch.equal(first, run(seed=1))
        assert torch.allclose(first, run(seed=1, batch_size=1), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(first, run(seed=2), rtol=1e-2)

    def test_unknown(self, source: LocalSource, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"calibration.labels='soft' is unknown; choose empirical or sampled"):
            StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path, labels="soft")


class TestSharing:
    def test_shared_input_gives_one_object(self) -> None:
        class Attention(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.q, self.k, self.v, self.o = (torch.nn.Linear(6, 6) for _ in range(4))

            def forward(self, x: Tensor) -> Tensor:
                return self.o(self.q(x) * self.k(x) + self.v(x + 1))  # type: ignore[no-any-return]

        torch.manual_seed(0)
        block = Attention()
        batches = [(torch.randn(n, 4, 6), torch.ones(n, 4, dtype=torch.bool)) for n in (2, 3)]
        with Collector(
            block, {name: (name, None) for name in "qkvo"}, Needs(input_gram=True, input_abs=True)
        ) as collector:
            for x, mask in batches:
                collector.begin(mask)
                block(x)
        found = collector.result()
        assert found["q"].input_gram is found["k"].input_gram
        assert found["q"].input_abs is found["k"].input_abs
        assert len({id(found[name].input_gram) for name in "qkvo"}) == 3
        rows = torch.cat([x.reshape(-1, 6) for x, _ in batches]).double()
        assert found["q"].input_gram is not None
        assert torch.allclose(found["q"].input_gram, rows.T @ rows / len(rows))


class TestInterruption:
    @staticmethod
    def same(left: dict[str, ModuleStatistics], right: dict[str, ModuleStatistics]) -> bool:
        def equal(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b if a is None or b is None else torch.equal(a, b)

        return left.keys() == right.keys() and all(
            equal(getattr(left[name], kind), getattr(right[name], kind)) for name in left for kind in STATISTICS
        )

    @pytest.mark.parametrize("needs", [ALL, INPUTS], ids=["backward", "forward"])
    @pytest.mark.parametrize("finished", [0, 1, 2, 3])
    def test_between_blocks(self, source: LocalSource, tmp_path: Path, needs: Needs, finished: int) -> None:
        whole, loss = collect(source, PADDED, needs, tmp_path / "whole", batch_size=2)
        first = StatisticsRun(source, PADDED, needs, TARGETS, work=tmp_path / "cut", batch_size=2)
        done = dict(itertools.islice(first, finished))
        first.close()
        second = StatisticsRun(
            source, PADDED, needs, TARGETS, work=tmp_path / "cut", batch_size=2, skip_blocks=list(done)
        )
        rest = dict(second)
        assert sorted([*done, *rest]) == [0, 1, 2]
        joined = {name: entry for part in (done | rest).values() for name, entry in part.items()}
        assert self.same({name: joined[name] for name in whole}, whole)
        assert second.loss == loss

    @pytest.mark.parametrize("needs", [ALL, INPUTS], ids=["backward", "forward"])
    def test_anywhere(self, source: LocalSource, tmp_path: Path, needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
        """Break off at every single run of a block in turn, and each time go on; blocks are not run twice."""
        whole, loss = collect(source, PADDED, needs, tmp_path / "whole", batch_size=2)
        run_block = ModelBlocks.run
        for step in range(1, 9 if needs is INPUTS else 18):
            calls = [0]

            def stumbling(*args: Any, calls: list[int] = calls, step: int = step) -> Tensor:
                calls[0] += 1
                if calls[0] == step:
                    raise KeyboardInterrupt
                return run_block(*args)

            monkeypatch.setattr(ModelBlocks, "run", stumbling)
            found: dict[str, ModuleStatistics] = {}
            blocks: set[int] = set()
            for _ in range(2):
                run = StatisticsRun(
                    source, PADDED, needs, TARGETS, work=tmp_path / "cut", batch_size=2, skip_blocks=blocks
                )
                try:
                    for index, part in run:
                        blocks.add(index)
                        found |= part
                except KeyboardInterrupt:
                    continue
            assert self.same({name: found[name] for name in whole}, whole)
            assert run.loss == loss
            # Each block has 3 batches; at most the broken one is repeated.
            assert calls[0] <= (18 if needs is ALL else 9) + 3

    def test_skipped_blocks_between(self, source: LocalSource, tmp_path: Path) -> None:
        whole, _ = collect(source, PACKED, ALL, tmp_path)
        for skip in ([0], [1], [2], [0, 2], [1, 2], [0, 1, 2]):
            found, _ = collect(source, PACKED, ALL, tmp_path, skip_blocks=skip)
            kept = {name: entry for name, entry in whole.items() if int(name.split(".")[1]) not in skip}
            assert self.same({name: found[name] for name in kept}, kept)
            assert len(found) == len(kept)

    def test_files_of_something_else_are_not_used(self, source: LocalSource, dense: Path, tmp_path: Path) -> None:
        def cut(work: Path, **options: Any) -> None:
            run = StatisticsRun(source, options.pop("tokens", PACKED), ALL, TARGETS, work=work, **options)
            next(run)
            run.close()

        wanted, _ = collect(source, PACKED, ALL, tmp_path / "clean")
        other = make_tokens([20] * 5, seed=1)
        for number, options in enumerate(
            [{"tokens": other}, {"batch_size": 2}, {"dtype": torch.float64}, {"labels": "sampled"}, {"seed": 1}]
        ):
            work = tmp_path / str(number)
            cut(work, **options)
            assert list((work / "activations").glob("*.bin"))
            found, _ = collect(source, PACKED, ALL, work)
            assert self.same(found, wanted)

    def test_truncated_files_are_not_used(self, source: LocalSource, tmp_path: Path) -> None:
        run = StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path)
        next(run)
        run.close()
        for path in (tmp_path / "activations").glob("*.bin"):
            path.write_bytes(path.read_bytes()[:-4])
        wanted, _ = collect(source, PACKED, ALL, tmp_path / "clean")
        found, _ = collect(source, PACKED, ALL, tmp_path)
        assert self.same(found, wanted)


class TestBadModel:
    def test_weight_with_nan(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        tensors = random_tensors()
        name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
        tensors[name][3, 3] = float("nan")
        with pytest.raises(InputError, match=f"tensor {name} has NaN or infinite entries"):
            collect(LocalSource(fresh(tensors)), PACKED, INPUTS, tmp_path)

    @pytest.mark.parametrize("needs", [ALL, INPUTS], ids=["backward", "forward"])
    def test_activations_overflow(self, fresh: Callable[..., Path], tmp_path: Path, needs: Needs) -> None:
        tensors = random_tensors(dtype=torch.float32)
        tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"] *= 1e6
        tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"] *= 1e37
        with pytest.raises(InputError, match="block 1 gives NaN or infinite activations on the calibration text"):
            collect(LocalSource(fresh(tensors)), PACKED, needs, tmp_path)

    def test_half_type_overflows(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        tensors = random_tensors()
        tensors["gpt_neox.layers.2.mlp.dense_h_to_4h.weight"] *= 500
        tensors["gpt_neox.layers.2.mlp.dense_4h_to_h.weight"] *= 500
        source = LocalSource(fresh(tensors))
        collect(source, PACKED, INPUTS, tmp_path)
        with pytest.raises(InputError, match=r"block 2 gives NaN or infinite activations.* in float32"):
            collect(source, PACKED, INPUTS, tmp_path, dtype=torch.float16)

    def test_missing_tensor(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        tensors = random_tensors()
        del tensors["gpt_neox.layers.2.attention.dense.bias"]
        with pytest.raises(InputError, match=r"lacks gpt_neox.layers.2.attention.dense.bias"):
            collect(LocalSource(fresh(tensors)), PACKED, INPUTS, tmp_path)

    def test_config_of_another_size(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        source = LocalSource(fresh(config={"intermediate_size": 128}))
        with pytest.raises(InputError, match=r"dense_h_to_4h.weight.* \[256, 64\], but according to config.json"):
            collect(source, PACKED, INPUTS, tmp_path)

    def test_config_that_is_none(self, fresh: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"config.json of .*model cannot be used"):
            collect(LocalSource(fresh(config={"num_attention_heads": 5})), PACKED, INPUTS, tmp_path)

    @pytest.mark.parametrize("module", ["layers.3.attention.dense", "layers.0.attention", "embed_in", "layers.0.x"])
    def test_no_such_module(self, source: LocalSource, tmp_path: Path, module: str) -> None:
        with pytest.raises(InputError, match=f"{module} is not a linear layer"):
            collect(source, PACKED, INPUTS, tmp_path, modules=[module])

    def test_tokens_of_another_tokenizer(self, source: LocalSource, tmp_path: Path) -> None:
        tokens = replace(PACKED, ids=PACKED.ids + 100)
        with pytest.raises(InputError, match="the tokenizer belongs to another model"):
            collect(source, tokens, INPUTS, tmp_path)

    def test_too_long(self, source: LocalSource, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="sequences of 65 tokens are too long; tiny reads up to 64"):
            collect(source, make_tokens([65]), INPUTS, tmp_path)

    def test_nothing_to_predict(self, source: LocalSource, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no token to predict"):
            collect(source, make_tokens([1, 1]), INPUTS, tmp_path)

    def test_disk_too_small(self, source: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("svdconvert.storage.disk.free_bytes", lambda folder: 1000)
        with pytest.raises(
            InputError,
            match=r"needs 128.00 kB for activations, but .* only 1.00 kB free, 127.00 kB",
        ):
            collect(source, PACKED, ALL, tmp_path)

    def test_nothing_to_do_needs_no_disk(
        self, source: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("svdconvert.storage.disk.free_bytes", lambda folder: 1000)
        assert collect(source, PACKED, ALL, tmp_path, skip_blocks=range(99)) == ({}, None)

    def test_no_batch(self, source: LocalSource, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"calibration.batch_size=0 is too small"):
            collect(source, PACKED, ALL, tmp_path, batch_size=0)


class TestBlocks:
    @pytest.mark.parametrize("tokens", [PACKED, PADDED], ids=["packed", "padded"])
    def test_logits_are_the_whole_models(self, dense: Path, source: LocalSource, tokens: CalibrationTokens) -> None:
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(dense).float().eval()
        blocks = ModelBlocks(source)
        with torch.no_grad():
            wanted = whole(input_ids=tokens.ids, attention_mask=tokens.mask.long()).logits
            hidden = blocks.embed(tokens.ids, tokens.mask)
            for index in range(blocks.count):
                with blocks.block(index) as block:
                    hidden = blocks.run(block, hidden, tokens.mask)
            found = torch.cat(list(blocks.logits(hidden)), -1)
        assert float((found - wanted)[tokens.mask].abs().max()) < 1e-5

    def test_one_piece_at_a_time(self, source: LocalSource) -> None:
        blocks = ModelBlocks(source)

        def real() -> int:
            parts = [*blocks._layers, blocks._model]
            return sum(p.numel() for part in parts for p in part.parameters() if not p.is_meta)

        assert real() == 0
        sizes = []
        for index in range(LAYERS):
            with blocks.block(index):
                sizes.append(real())
        assert sizes == [3 * 64 * 65 + 64 * 65 + 256 * 65 + 64 * 257 + 4 * 64] * LAYERS
        with blocks.head():
            assert real() == VOCAB * 64 + 128
        assert real() == 0


class TestFolder:
    @pytest.fixture
    def key(self, source: LocalSource) -> dict[str, Any]:
        return statistics_key(source, PACKED, ALL)

    @pytest.fixture
    def filled(self, source: LocalSource, key: dict[str, Any], tmp_path: Path) -> StatisticsFolder:
        folder = StatisticsFolder(tmp_path / "stats", key, create=True)
        save_statistics(folder, StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path / "work"))
        return folder

    def test_round_trip(
        self, source: LocalSource, key: dict[str, Any], filled: StatisticsFolder, tmp_path: Path
    ) -> None:
        wanted, loss = collect(source, PACKED, ALL, tmp_path / "again")
        folder = StatisticsFolder(filled.folder, key)
        assert folder.blocks == {0, 1, 2}
        assert folder.loss == loss
        assert folder.key == key
        assert TestInterruption.same(folder.load(TARGETS), wanted)
        some = folder.load(TARGETS[:1], ["fisher"])[TARGETS[0]]
        assert some.input_gram is None
        assert some.fisher is not None
        assert sorted(path.name for path in folder.folder.iterdir()) == [
            *(f"block-{i:05d}.safetensors" for i in range(LAYERS)),
            "stats.json",
        ]

    def test_readable_by_safetensors(self, filled: StatisticsFolder) -> None:
        from safetensors.torch import load_file

        tensors = load_file(filled.folder / "block-00001.safetensors")
        assert torch.equal(tensors[f"{TARGETS[4]}.input_gram"], filled.load(TARGETS[4:5])[TARGETS[4]].input_gram)

    def test_shared_gram_is_stored_once(self, key: dict[str, Any], tmp_path: Path) -> None:
        gram = torch.eye(20, dtype=torch.float64)
        folder = StatisticsFolder(tmp_path, key, create=True)
        names = [f"layers.0.{name}" for name in "qkv"]
        folder.save(0, {name: ModuleStatistics(gram, None, None, None, 7, 2) for name in names})
        found = StatisticsFolder(tmp_path).load(names)
        assert len({id(entry.input_gram) for entry in found.values()}) == 1
        assert found[names[2]].tokens == 7
        assert (tmp_path / "block-00000.safetensors").stat().st_size < gram.nbytes + 400

    def test_resumed(self, source: LocalSource, key: dict[str, Any], tmp_path: Path, filled: StatisticsFolder) -> None:
        folder = StatisticsFolder(tmp_path / "cut", key, create=True)
        run = StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path / "work")
        folder.save(*next(run))
        run.close()
        folder = StatisticsFolder(tmp_path / "cut", key, create=True)
        assert folder.blocks == {2}
        run = StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path / "work", skip_blocks=folder.blocks)
        save_statistics(folder, run)
        for file in ["stats.json", *(f"block-{i:05d}.safetensors" for i in range(LAYERS))]:
            left, right = (part.folder / file for part in (folder, filled))
            assert left.read_bytes() == right.read_bytes() or file == "stats.json"
        assert folder.loss == filled.loss

    @pytest.mark.parametrize(
        ("field", "message"),
        [
            ("model", "statistics of another model"),
            ("tokenizer", "statistics of another tokenizer"),
            ("text", "statistics of another calibration text"),
            ("length", "statistics of another length of sequences \\(20, now 99\\)"),
            ("seed", "another seed"),
            ("labels", "statistics of other labels"),
            ("needs", "statistics of other kinds"),
            ("version", "another version of svdconvert"),
        ],
    )
    def test_another_key(self, key: dict[str, Any], filled: StatisticsFolder, field: str, message: str) -> None:
        for create in (True, False):
            with pytest.raises(InputError, match=message):
                StatisticsFolder(filled.folder, key | {field: 99}, create=create)
        StatisticsFolder(filled.folder, {"model": key["model"]})

    def test_model_key(self, source: LocalSource, tmp_path: Path) -> None:
        copy = write_checkpoint(tmp_path / "copy")
        assert model_key(LocalSource(copy)) == model_key(source)
        changed = random_tensors()
        changed["embed_out.weight"][0, 0] += 1
        assert model_key(LocalSource(write_checkpoint(tmp_path / "b", changed))) != model_key(source)
        config = write_checkpoint(tmp_path / "c", config={"rotary_pct": 0.25})
        assert model_key(LocalSource(config)) != model_key(source)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no stats.json"):
            StatisticsFolder(tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": 3, "blocks": {}}'])
    def test_damaged(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "stats.json").write_text(content)
        with pytest.raises(InputError, match=r"stats.json"):
            StatisticsFolder(tmp_path)

    def test_of_an_earlier_version(self, filled: StatisticsFolder) -> None:
        """It is sound, and must not be called damaged."""
        state = json.loads((filled.folder / "stats.json").read_text())
        del state["digest"]
        (filled.folder / "stats.json").write_text(json.dumps(state))
        with pytest.raises(
            InputError, match=r"stats.json has no digest, so it comes from an earlier version .*; give another"
        ):
            StatisticsFolder(filled.folder)

    def test_lost_and_lacking(self, filled: StatisticsFolder, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no statistics of layers.7.x"):
            filled.load(["layers.7.x"])
        state = json.loads((filled.folder / "stats.json").read_text())
        del state["blocks"]["0"]["modules"][TARGETS[0]]["output_gram"]
        del state["digest"]
        (filled.folder / "stats.json").write_bytes(sealed(state))
        with pytest.raises(InputError, match=r"has no output gram of layers.0.*, which this method needs"):
            StatisticsFolder(filled.folder).load(TARGETS[:1], ["output_gram"])
        (filled.folder / "block-00001.safetensors").unlink()
        assert StatisticsFolder(filled.folder).blocks == {0, 2}


@pytest.mark.parametrize("needs", [ALL, INPUTS], ids=["backward", "forward"])
def test_grams_of_one_block_at_a_time(source: LocalSource, tmp_path: Path, needs: Needs) -> None:
    """While a block is run, nothing of the one before it is alive, if the caller let go of it."""
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Listener(Events):
        def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
            alive.append(sum(reference() is not None for reference in kept))

    run = StatisticsRun(source, PACKED, needs, TARGETS, work=tmp_path, events=Listener())
    for _, found in run:
        assert alive[-1] == 0
        kept += [weakref.ref(entry.input_gram) for entry in found.values() if entry.input_gram is not None]
        del found
    assert len(kept) == len(TARGETS)
    assert set(alive) == {0}


def test_padding_in_front_is_refused() -> None:
    with pytest.raises(ValueError, match="padding must come last"):
        CalibrationTokens(PACKED.ids, PADDED.mask.flip(1), 5, 5)


def test_progress_and_note(source: LocalSource, tmp_path: Path) -> None:
    class Listener(Events):
        def __init__(self) -> None:
            self.notes: list[str] = []
            self.seen: list[tuple[str, int, int, str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

        def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
            self.seen.append((phase, done, total, detail))

    listener = Listener()
    run = StatisticsRun(source, PACKED, ALL, TARGETS, work=tmp_path, batch_size=2, events=listener)
    for _ in run:
        pass
    assert listener.seen == [
        *(("embedding", i, 3, "") for i in range(1, 4)),
        *(("forward", i, 9, f"block {(i - 1) // 3 + 1} of 3") for i in range(1, 10)),
        *(("head", i, 3, "") for i in range(1, 4)),
        *(("backward", i, 9, f"block {3 - (i - 1) // 3} of 3") for i in range(1, 10)),
    ]
    assert run.loss is not None
    assert listener.notes == [
        f"the model's perplexity on the calibration text is {run.loss.perplexity:,.2f} (95 tokens predicted)"
    ]
