"""A device's memory as a size: what a model really keeps there, and what is left for its weights."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import FAMILIES, stock_model, write_family
from support.refusals import assert_refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svdconvert import Calibration, convert, plan
from svdconvert.families.cache import cached_numbers
from svdconvert.families.table import ARCHITECTURES
from svdconvert.jobs.record import read_record
from svdconvert.planning.fit import fitted, room_of
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.opening import open_source

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_polyglot" / "model"
# The tiny model's float16 weights take 0.34 MB.
SMALL = "0.25MB"


def kept(model: Any, tokens: int) -> int:
    """Keys and values in a model's own cache after so many tokens; states of recurrences, which do not grow, aside."""
    found = model(input_ids=torch.arange(tokens)[None], use_cache=True).past_key_values
    return sum(layer.keys.numel() + layer.values.numel() for layer in found.layers if hasattr(layer, "keys"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_what_a_model_keeps(family: str) -> None:
    model, row = stock_model(family), ARCHITECTURES[family]
    if not hasattr(model(input_ids=torch.arange(2)[None]).past_key_values, "layers"):
        pytest.skip("this version of transformers keeps caches in other objects")
    assert 4 * cached_numbers(row, model.config.to_dict()) == kept(model, 4)


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_a_request_becomes_bytes(dtype: str) -> None:
    source = open_source(str(EXAMPLE))
    request = fitted(source, Conversion.of(fit="8MB", fit_context=100, dtype=dtype))
    width = 192 * 6 * 2  # keys and values of six layers
    cache = 100 * width * (2 if dtype == "keep" else 4)
    assert request.size.bytes == 8_000_000 - 800_000 - cache
    assert request.size.params is None
    assert fitted(source, request) == request
    assert request.size.as_asked == Conversion.of(fit="8MB", fit_context=100).size
    assert room_of(source, Conversion.of(fit="8MB")).context == source.config["max_position_embeddings"]


def test_training_takes_what_it_is_said_to_take(dense: Path) -> None:
    made = plan(dense, fit="2.4MB", fit_for="training", fit_context=16)
    model = stock_model("llama")
    optimiser = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()
    optimiser.step()
    parameters = list(model.parameters())
    moments = [value for state in optimiser.state.values() for value in state.values() if value.dim()]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
    count = sum(p.numel() for p in parameters)
    assert sum(tensor.nbytes for tensor in tensors) == 16 * count
    sequence = room_of(open_source(str(dense)), Conversion.of(**asked_of(made))).sequence
    assert 0.95 * (2_160_000 - sequence) < made.training_bytes[1] <= 2_160_000 - sequence


def asked_of(made: Any) -> dict[str, Any]:
    return {name: made.settings[name] for name in ("fit", "fit_context", "fit_for")}


class Live(TorchDispatchMode):
    """The most bytes that results of operations take at the same time."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
        return out

    def _gone(self, place: int, count: int) -> None:
        self._known.discard(place)
        self.now -= count


def test_activations_of_a_long_text_are_what_a_step_keeps() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, torch_dtype=torch.float32).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    ids = torch.arange(512)[None]
    with Live(known) as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    request = Conversion.of(fit="1GB", fit_for="training", fit_context=512)
    assert room_of(open_source(str(EXAMPLE)), request).sequence == pytest.approx(live.most, rel=0.2)


def test_a_result_fits(
    run: Callable[..., SimpleNamespace], dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out, text = tmp_path / "out", ("--calib", calibration.text, "--calib-samples", 24, "--calib-length", 48)
    given = ("--fit", SMALL, "--fit-context", 20, *text, "--out", out, "--device", "cpu")
    done = run(dense, *given)
    assert done.code == 0, done.err
    left = room_of(open_source(str(dense)), Conversion.of(fit=SMALL, fit_context=20)).weights
    assert 0.95 * left < (out / "model.safetensors").stat().st_size <= left
    said = " ".join(done.out.split())
    assert "250.00 kB of memory: 25.00 kB left free" in said
    assert f"that is --bytes {left}" in said
    assert "transformers unpacks them" in said
    record = read_record(out)
    assert record.results["repeat"].startswith(f"svdconvert {dense.name} --fit 250kB --fit-context 20 ")
    assert (record.settings["fit"], record.settings["bytes"], record.settings["fit_for"]) == (
        250_000,
        left,
        "inference",
    )
    again = convert(dense, out, fit=SMALL, fit_context=20, device="cpu", calibration=calibration_of(calibration))
    assert again.outcome.already_done


def calibration_of(other: Calibration) -> Calibration:
    return Calibration(other.text, samples=24, length=48)


def test_one_that_is_trained_gets_parameters(run: Callable[..., SimpleNamespace], dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(dense, "--fit", "2.4MB", "--fit-for", "training", "--fit-context", 16, "--out", out, "--device", "cpu")
    assert done.code == 0, done.err
    record = read_record(out)
    count = record.settings["params"]
    assert 0.97 * count < record.results["params"]["after"] <= count
    said = " ".join(done.out.split())
    assert f"for {count:,} parameters of 16 bytes" in said
    assert f"that is --params {count}" in said
    assert "--fit 2400kB --fit-context 16 --fit-for training" in record.results["repeat"]
    assert "--params" not in record.results["repeat"]


def test_ranks_alone_are_told_to_fit_transformers(run: Callable[..., SimpleNamespace], dense: Path) -> None:
    done = run("plan", dense, "--fit", SMALL, "--fit-context", 20, "--widths", 16)
    assert done.code == 0
    assert "left free" in done.out
    assert "unpacks" not in done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fit", "8GB"), "--fit 8GB has room for the model as it is"),
        (("--fit", "8GB", "--fit-for", "training"), "--fit 8GB has room for the model as it is"),
        (("--fit", "80kB"), "--fit 80kB cannot be met, since everything but the targets takes"),
        (("--fit", "100kB", "--fit-for", "training"), "activations of 64 tokens take"),
        (("--fit", "100kB", "--fit-context", 999), "--fit-context 999 is more than"),
        (
            ("--fit", "400kB", "--fit-for", "training", "--fit-context", 2),
            "--fit 400kB cannot be met, as it leaves room",
        ),
        (("--fit", "much"), "--fit much is not a size; write 8GB"),
        (("--fit", "8"), "--fit 8 is too small for a device"),
        (("--fit", "8GB", "--keep", 0.5), "exactly one of"),
        (("--fit", SMALL, "--layout", "pivoted"), "--fit 250kB does not go with --layout pivoted"),
        (("--fit", SMALL, "--factor-all"), "--factor-all does not go with --fit"),
        (("--keep", 0.5, "--fit-context", 5), "--fit-context 5 has no effect without --fit"),
        (("--keep", 0.5, "--fit-for", "training"), "--fit-for training has no effect without --fit"),
        (("--fit", "5MB", "--fit-for", "training", "--widths", 8), "--widths 8 does not go with --fit-for training"),
    ],
)
def test_what_cannot_be_is_refused(
    words: tuple[object, ...], said: str, run: Callable[..., SimpleNamespace], dense: Path
) -> None:
    assert_refused(run("plan", dense, *words), said)


@pytest.mark.parametrize(
    "words",
    [
        ("--fit", "60kB", "--fit-context", 2),
        ("--fit", "75kB", "--fit-context", 2),
        ("--fit", "72kB", "--fit-context", 2, "--widths", "16"),
        ("--fit", "400kB", "--fit-for", "training", "--fit-context", 2),
        ("--fit", "100kB", "--fit-for", "training"),
        ("--fit", "5kB", "--fit-context", 60),
        ("--fit", "5kB", "--fit-context", 60, "--dtype", "float32"),
    ],
)
def test_how_much_memory_would_do(words: tuple[object, ...], run: Callable[..., SimpleNamespace], dense: Path) -> None:
    """It does; and where it is the least that does, two kilobytes less do not."""
    refused = run("plan", dense, *words)
    assert_refused(refused, "--fit")
    ((count, for_all),) = re.findall(r"--fit (\d+)kB (?:at least|would do( for the model as it is))", refused.err)
    found, less = (run("plan", dense, "--fit", int(count) * 1000 - fewer, *words[2:]) for fewer in (0, 2000))
    if for_all:
        assert "cannot be met" not in found.err
        if "--fit-for" in words:
            assert_refused(found, "has room for the model as it is")
        elif "--dtype" not in words:
            cache = 60 * 2 * 3 * 64 * 2
            assert 0.95 < ((dense / "model.safetensors").stat().st_size + cache) / (0.9 * int(count) * 1000) <= 1
    else:
        assert found.code == 0
        assert less.code == 2


def test_transposed_matrices_are_refused_in_the_same_words(run: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    model = write_family(tmp_path / "gpt2", "gpt2")
    assert_refused(run("plan", model, "--fit", "100kB", "--fit-context", 2), "--fit 100kB cannot be met", "transposed")
