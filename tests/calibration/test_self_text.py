"""Text that the model writes: against its own distribution in float64, and whatever may happen on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import VOCAB, random_tensors
from support.families import FAMILIES, stock_config, write_family
from support.forked import Forked
from support.launching import together
from support.refusals import assert_refused
from support.representatives import REPRESENTATIVES
from torch import Tensor
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, InputError, calibrate, convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.calibration.self_text import SelfText
from svdconvert.models import sampling, writing
from svdconvert.models.sampling import Sampler
from svdconvert.models.tokenizer import load_tokenizer
from svdconvert.models.writing import LOGIT_BYTES
from svdconvert.planning.events import Events
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import LocalSource
from svdconvert.storage.tensor_files import write_tensors

END = 2  # of a text, in the tests' tokenizer

# Another process of a job, and what it reads.
PROGRAM = r"""
import sys
from pathlib import Path
from svdconvert import Calibration
from svdconvert.machine import processes
from svdconvert.models import writing
from svdconvert.storage.source import LocalSource
writing.MOST_SEQUENCES = 2
group = processes.join()
text = Calibration("self", samples=7, length=12)
kept = Path(sys.argv[2])
# files, as lines that two processes print at once may run into each other
(kept / f"{group.rank}.digest").write_text(text.tokens(LocalSource(Path(sys.argv[1])), folder=kept).digest)
processes.leave()
"""


class Opened:
    """A tokenizer that opens every text with a token; the end of a text is often drawn, as the vocabulary is small."""

    bos_token_id, eos_token_id = 1, END

    def __init__(self, inner: Any) -> None:
        self.backend_tokenizer = inner.backend_tokenizer

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.bos_token_id, 5]}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> LocalSource:
    """A tiny GPT-NeoX in float32, whose rounding changes no token."""
    folder = tmp_path_factory.mktemp("exact") / "model"
    write_family(folder, "gpt_neox")
    return LocalSource(folder)


def request_of(
    source: LocalSource, *, samples: int = 7, length: int = 24, seed: int = 0, tokenizer: Any = None
) -> SelfText:
    found = tokenizer or load_tokenizer(source.folder)
    return SelfText(source, found, samples=samples, length=length, seed=seed)


def written(source: LocalSource, folder: Path, **options: Any) -> Tensor:
    return request_of(source, **options).tokens(folder, device="cpu", events=Events()).ids


def uniform(source: LocalSource, ids: Tensor, seed: int = 0) -> Tensor:
    """The numbers that the tokens were drawn by."""
    found = request_of(source, samples=ids.shape[0], length=ids.shape[1], seed=seed)
    return torch.stack([found._draws(row) for row in range(len(ids))])


def quantiles(source: LocalSource, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the stock model in float64: the distribution function before and at each token but the first.

    Without a cache, each prefix for itself: Phi-3's positions depend on how long the input is.

    Returns:
        [N, length - 1] each.
    """
    model = AutoModelForCausalLM.from_pretrained(source.folder).double().eval()
    model.config._experts_implementation = "eager"  # the product of all experts at once has no float64
    with torch.no_grad():
        logits = [model(input_ids=ids[:, :end]).logits[:, -1].double() for end in range(1, ids.shape[1])]
    probability = torch.softmax(torch.stack(logits, 1), -1)
    own = ids[:, 1:, None]
    at = probability.cumsum(-1).gather(-1, own)[..., 0]
    return at - probability.gather(-1, own)[..., 0], at


# Rows of every kind, and caches of every kind: of windows in all layers, in some, and in those with positions alone.
DRAWN = [name for name in FAMILIES if name in (*REPRESENTATIVES, "mistral", "gemma2", "cohere2")]


@pytest.mark.parametrize("model_type", DRAWN)
def test_tokens_are_drawn_from_the_model(model_type: str, tmp_path: Path) -> None:
    """Longer than the window of layers that have one, where the version of transformers can do that with a cache."""
    write_family(tmp_path / "model", model_type)
    source, length = LocalSource(tmp_path / "model"), 40
    if model_type == "gemma2" and getattr(stock_config(model_type), "cache_implementation", None) == "hybrid":
        with pytest.raises(InputError, match=r"beyond its window of 7 tokens; update transformers, or lower calib"):
            written(source, tmp_path, length=8)
        length = 7
    ids = written(source, tmp_path, samples=6, length=length)
    assert ids.shape == (6, length)
    assert set(ids[:, 0].tolist()) == {END}
    low, high = quantiles(source, ids)
    drawn = uniform(source, ids)[:, 1:]
    assert bool((low - 1e-4 <= drawn).all())
    assert bool((drawn <= high + 1e-4).all())
    chance = float((high - low).double().log().sum().exp())  # some tiny models know but one token
    assert chance > 0.01 or len(ids[:, 1:].unique()) > 1


def test_frequencies(exact: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pearson's statistic of the second tokens, of which the seed makes always the same."""
    monkeypatch.setattr(writing, "MOST_SEQUENCES", 2048)
    count = 4096
    ids = written(exact, tmp_path, samples=count, length=2)
    model = AutoModelForCausalLM.from_pretrained(exact.folder).double().eval()
    with torch.no_grad():
        expected = count * torch.softmax(model(input_ids=ids[:1, :1]).logits[0, 0].double(), -1)
    seen = torch.bincount(ids[:, 1], minlength=VOCAB).double()
    often = expected >= 5
    cells = torch.cat([(seen - expected)[often], (seen - expected)[~often].sum()[None]])
    sizes = torch.cat([expected[often], expected[~often].sum()[None]])
    assert often.sum() > 20
    degrees = float(often.sum())
    assert float((cells.square() / sizes).sum()) < degrees + 5 * (2 * degrees) ** 0.5
    even = torch.full_like(expected, count / VOCAB)  # another distribution is noticed
    assert float(((seen - even).square() / even).sum()) > degrees + 50 * (2 * degrees) ** 0.5


def test_batches_do_not_matter(exact: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(exact, tmp_path / "whole")
    for most in (1, 3):
        monkeypatch.setattr(writing, "MOST_SEQUENCES", most)
        assert torch.equal(written(exact, tmp_path / str(most)), whole)
    assert torch.equal(written(exact, tmp_path / "fewer", samples=4), whole[:4])
    assert torch.equal(written(exact, tmp_path / "shorter", length=9), whole[:, :9])


def test_the_seed_matters(exact: LocalSource, tmp_path: Path) -> None:
    first, second = (written(exact, tmp_path, seed=seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert request_of(exact).digest != request_of(exact, seed=1).digest
    assert len({tuple(row) for row in first.tolist()}) == len(first)


def test_opening_token(exact: LocalSource, tmp_path: Path) -> None:
    """At the beginning, and behind the end of each text."""
    tokenizer = Opened(load_tokenizer(exact.folder))
    ids = written(exact, tmp_path, samples=40, tokenizer=tokenizer)
    assert set(ids[:, 0].tolist()) == {Opened.bos_token_id}
    ends = (ids[:, :-1] == END).nonzero()
    assert len(ends) > 3
    assert set(ids[ends[:, 0], ends[:, 1] + 1].tolist()) == {Opened.bos_token_id}


def test_no_special_token(exact: LocalSource, tmp_path: Path) -> None:
    """Then every sequence begins with any token."""
    inner = load_tokenizer(exact.folder)
    bare = SimpleNamespace(backend_tokenizer=inner.backend_tokenizer, eos_token_id=None)
    ids = written(exact, tmp_path, samples=40, length=3, tokenizer=bare)
    assert len(ids[:, 0].unique()) > 20
    assert 0 <= int(ids.min()) <= int(ids.max()) < VOCAB


def test_half_types(dense: Path, tmp_path: Path) -> None:
    """On this CPU in bfloat16 or in float32; near the model's distribution either way."""
    source = LocalSource(dense)
    sampler = Sampler(source, 2, 20, device="cpu")
    assert sampler.dtype in (torch.bfloat16, torch.float32)
    assert sampling.sampling_dtype(source, "cuda") == torch.float16
    ids = written(source, tmp_path, length=20)
    low, high = quantiles(source, ids)
    drawn = uniform(source, ids)[:, 1:]
    assert float(((low - drawn).clamp_min(0) + (drawn - high).clamp_min(0)).max()) < 0.1


@pytest.mark.parametrize("form", [{"pickled": True, "legacy": True}, {"shards": 3, "tied": True}], ids=str)
def test_forms_of_files(form: dict[str, Any], fresh: Callable[..., Path], tmp_path: Path) -> None:
    """Pickled with buffers that the class does not have; in three files, with a head that is the embedding."""
    tensors, config = random_tensors(dtype=torch.float32), {"torch_dtype": "float32"}
    if form.pop("tied", False):
        del tensors["embed_out.weight"]
        tensors["gpt_neox.embed_in.weight"] *= 0.3
        config["tie_word_embeddings"] = True  # type: ignore[assignment]
    source = LocalSource(fresh(tensors, config=config, **form))
    ids = written(source, tmp_path)
    low, high = quantiles(source, ids)
    drawn = uniform(source, ids)[:, 1:]
    assert bool(((low - 1e-4 <= drawn) & (drawn <= high + 1e-4)).all())


def test_gguf(tmp_path: Path) -> None:
    """In 16 bits where the CPU has them, and by the file's own tokenizer."""
    pytest.importorskip("gguf")
    from support.gguf_files import tiny, write_gguf

    source = open_source(str(write_gguf(tmp_path / "tiny.gguf", tiny("llama"))), None)
    found = Calibration("self", samples=3, length=12).tokens(source)
    assert found.ids.shape == (3, 12)
    assert sampling.sampling_dtype(source, "cuda:0") == torch.bfloat16
    assert set(found.ids[:, 0].tolist()) == {2}  # its tokenizer opens no text


def test_an_interrupted_one_goes_on(exact: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "MOST_SEQUENCES", 2)
    expected = written(exact, tmp_path / "at-once")

    class Stopping(Events):
        def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
            assert (phase, total) == ("writing text", 7 * 24)
            if done > 100:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        request_of(exact).tokens(tmp_path / "work", device="cpu", events=Stopping())
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert len(kept) == 2
    assert torch.equal(written(exact, tmp_path / "work"), expected)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    monkeypatch.setattr(Sampler, "load", lambda self: pytest.fail("a finished text is read"))
    assert torch.equal(written(exact, tmp_path / "work"), expected)


def test_a_changed_file(exact: LocalSource, tmp_path: Path) -> None:
    ids = written(exact, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-8] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="is damaged: its content is not what was written; remove it"):
        written(exact, tmp_path)
    write_tensors(file, {"ids": ids}, note="another request")
    with pytest.raises(InputError, match="holds other sequences than its name says; remove it"):
        written(exact, tmp_path)


def test_no_room(exact: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "available_memory_bytes", lambda: 10_000)
    with pytest.raises(
        InputError,
        match=r"model needs \d+\.\d\d kB of memory to write its own text \(calibration.text='self'\), since all its "
        r"weights are used for every token, but this machine has 10.00 kB free; give a text as calibration.text",
    ):
        written(exact, tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(InputError, match=r"but each process has 2\.50 kB free"):
        written(exact, tmp_path)


def test_needed_memory_counts_what_is_kept(exact: LocalSource) -> None:
    """Keys and values of 3 layers, 4 heads of 16: the tiny models' own shape; of no more sequences than there are."""
    one, two = (Sampler(exact, 10**6, length, device="cpu") for length in (10, 20))
    assert two.needed - one.needed == one.batch * 10 * 2 * 3 * 64 * 4
    few = Sampler(exact, 1, 10, device="cpu")
    assert few.batch == one.batch > 1, "the tokens are the same, however many are asked for"
    assert one.needed - few.needed == (one.batch - 1) * (10 * 2 * 3 * 64 * 4 + VOCAB * LOGIT_BYTES)


def test_what_is_refused(exact: LocalSource, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sequences of 65 tokens are too long; model reads up to 64"):
        written(exact, tmp_path, length=65)
    with pytest.raises(InputError, match=r"calibration\.field='body' has no effect on calibration\.text='self'"):
        Calibration("self", field="body")
    strange = SimpleNamespace(backend_tokenizer=load_tokenizer(exact.folder).backend_tokenizer, eos_token_id=VOCAB)
    with pytest.raises(InputError, match="the tokenizer belongs to another model"):
        written(exact, tmp_path, tokenizer=strange)


def test_broken_weights(fresh: Callable[..., Path], tmp_path: Path) -> None:
    tensors = random_tensors(dtype=torch.float32)
    tensors["embed_out.weight"] *= 1e38
    source = LocalSource(fresh(tensors, config={"torch_dtype": "float32"}))
    with pytest.raises(InputError, match=r"NaN or infinite activations where .* writes its own text"):
        written(source, tmp_path)


def test_commands(exact: LocalSource, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion: what is kept or finished is not written again, and the card's command says `self`."""
    out, options = tmp_path / "out", ["--calib", "self", "--calib-samples", 8, "--calib-length", 16]
    command = [exact.folder, "--keep", 0.7, *options, "--device", "cpu", "--work", tmp_path / "work", "--out"]
    with monkeypatch.context() as small:
        small.setattr(sampling, "available_memory_bytes", lambda: 10_000)
        assert_refused(
            run(*command[:-3], "--out", out), "to write its own text (--calib self)", "give a text as --calib"
        )
        assert not out.exists()
    done = run(*command, out)
    assert done.code == 0, done.err
    assert "model writes 128 tokens to calibrate with" in done.out + done.err
    record = json.loads((out / "svdconvert.json").read_text())
    assert "--calib self --calib-samples 8 --calib-length 16" in record["repeat"]
    assert record["settings"]["calibration"] == request_of(exact, samples=8, length=16).digest
    expected = request_of(exact, samples=8, length=16).tokens(tmp_path / "again", device="cpu", events=Events())
    assert record["self_text"] == expected.digest
    monkeypatch.setattr(Sampler, "load", lambda self: pytest.fail("it is written again"))
    assert run(*command, tmp_path / "smaller", "--layout", "pivoted").code == 0
    shutil.rmtree(tmp_path / "work")
    done = run(*command, out)
    assert (done.code, "already holds this result" in done.out + done.err) == (0, True)
    assert run(*command, out, "--seed", 1).code == 2


def test_statistics(exact: LocalSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished ones are known again without writing the text, and hold it for conversions."""
    request = Calibration("self", samples=8, length=16)
    perplexity = calibrate(exact.folder, request, tmp_path / "stats", device="cpu")
    kept = StatisticsFolder(tmp_path / "stats").tokens()
    assert kept.digest == request.tokens(exact).digest
    assert not (tmp_path / "stats" / "work").exists()
    monkeypatch.setattr(Sampler, "load", lambda self: pytest.fail("it is written again"))
    assert calibrate(exact.folder, request, tmp_path / "stats", device="cpu") == perplexity
    report = convert(exact.folder, tmp_path / "out", keep=0.7, stats=tmp_path / "stats", device="cpu")
    assert report.outcome.record["settings"]["calibration"] == kept.digest


def test_a_file_of_that_name(exact: LocalSource, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "a.txt").write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path)
    options = {"samples": 5, "length": 16}
    read = Calibration(str(text), **options).tokens(exact)
    assert Calibration("./self", **options).tokens(exact).digest == read.digest
    assert Calibration("self", **options).tokens(exact).digest != read.digest


def test_several_processes(exact: LocalSource, launcher: Forked, tmp_path: Path) -> None:
    """A part each, and the same tokens as one process."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = together(launcher, 2, exact.folder, tmp_path / "kept", program=str(program))
    assert [ended.status for ended in done] == [0, 0], done
    expected = Calibration("self", samples=7, length=12).tokens(exact).digest
    assert [(tmp_path / "kept" / f"{rank}.digest").read_text() for rank in (0, 1)] == [expected] * 2
    assert len(list((tmp_path / "kept").rglob("*.safetensors"))) == 4
