"""What can be had of a model: the table says what the conversions then do, and the advice follows from its figures."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES, write_family
from support.html_pages import parse
from support.multiplications import of_a_token
from support.refusals import assert_refused

from svdconvert import Calibration, Options, Way, convert, evaluate, options
from svdconvert.commands import option_bench
from svdconvert.factoring.price_list import PriceLists
from svdconvert.families.table import ARCHITECTURES
from svdconvert.grids import Grid
from svdconvert.jobs.record import read_record
from svdconvert.models.loading import load_model

TARGETS = ("layers.0.*", "layers.1.attention.*")
DEVICE = {"fit": "0.3MB", "fit_context": 20}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options") / "work"


@pytest.fixture(scope="module")
def common(calibration: Calibration, work: Path) -> dict[str, Any]:
    return {"calibration": calibration, "work": work, "targets": TARGETS, "device": "cpu"}


@pytest.fixture(scope="module")
def found(dense: Path, common: dict[str, Any], text: Path) -> Options:
    return options(dense, **common, **DEVICE, measure=text)


def refuse(*arguments: object, **more: object) -> None:
    raise AssertionError("done again")


def way(found: Options, name: str) -> Way:
    (one,) = [way for way in found.ways if way.name == name]
    return one


@pytest.fixture(scope="module")
def results(found: Options, dense: Path, common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a way -> what a conversion by its options gives."""
    folder = tmp_path_factory.mktemp("converted")
    made = {"rank and bits, 0.18": {"bytes": 0.18}, "rank alone, 60% kept": {"keep": 0.6, "layout": "pivoted"}}
    assert [way(found, name).options for name in made] == ["--bytes 0.18", "--keep 0.6 --layout pivoted"]
    with pytest.MonkeyPatch.context() as patch:  # they begin from what is there
        patch.setattr(PriceLists, "write", refuse)
        for number, how in enumerate(made.values()):
            convert(dense, folder / str(number), **common, **how)
    return {name: folder / str(number) for number, name in enumerate(made)}


def test_the_ways(found: Options) -> None:
    names = [one.name for one in found.ways]
    assert names[:5] == [
        "dense, 16 bits",
        "dense, 8 bits",
        "dense, 4 bits",
        "rank alone, 80% kept",
        "rank alone, 60% kept",
    ]
    assert names[5:9] == [f"rank and bits, {share}" for share in (0.5, 0.35, 0.25, 0.18)]
    assert found.matrices == 6
    assert all(sum(one.bits.values()) == found.matrices for one in found.ways)
    assert way(found, "dense, 4 bits").bits == {4: 6}
    for kind in ("all alike", "rank alone"):
        many, few = found.of(kind)
        assert many.bytes > few.bytes
        assert many.predicted < few.predicted
        assert many.kl < few.kl  # type: ignore[operator]


def test_a_conversion_does_what_the_table_says(
    found: Options, results: dict[str, Path], dense: Path, common: dict[str, Any], tmp_path: Path
) -> None:
    convert(dense, tmp_path / "half", **common, bytes=0.5)
    worths = {name: one["worth"] for name, one in read_record(tmp_path / "half").results["rounded"].items()}
    for name, result in results.items():
        told, one = read_record(result).results, way(found, name)
        assert (one.bytes, one.params) == (told["bytes"]["after"], told["params"]["after"])
        assert one.products == len(told["matrices"])
        matrices = {**told["matrices"], **told.get("rounded", {})}
        # of rank alone, a conversion does not multiply with what matrices are worth
        again = sum(
            one["predicted_loss"] * (1 if "worth" in one else worths[module]) for module, one in matrices.items()
        )
        # what is written is improved by coordinate descent
        assert one.predicted == pytest.approx(again, rel=0.15 if "rounded" in told else 1e-3)


def test_what_is_measured_is_what_is_measured_of_the_conversion(
    found: Options, results: dict[str, Path], dense: Path, text: Path
) -> None:
    for name, result in results.items():
        own = evaluate(result, text, protocol="disjoint", against=dense, device="cpu")
        assert own.divergence is not None
        assert way(found, name).kl == pytest.approx(own.divergence.kl, rel=1e-6)
        assert way(found, name).added == pytest.approx(own.divergence.added, rel=1e-6)
        assert found.tokens == own.tokens
    assert found.perplexity == evaluate(dense, text, protocol="disjoint", device="cpu").perplexity


def test_models_are_removed_and_nothing_is_done_twice(
    found: Options, dense: Path, common: dict[str, Any], work: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not (work / "options").exists()
    monkeypatch.setattr(PriceLists, "write", refuse)
    monkeypatch.setattr(option_bench, "evaluate", refuse)
    monkeypatch.setattr(option_bench, "run_job", refuse)
    assert options(dense, **common, **DEVICE, measure=text) == found


def test_even_rounding_takes_the_bytes_of_its_grids(found: Options, dense: Path) -> None:
    weights = load_file(dense / "model.safetensors")
    names = [f"layers.0.{kind}" for kind in ("attention.query_key_value", "attention.dense")]
    names += ["layers.0.mlp.dense_h_to_4h", "layers.0.mlp.dense_4h_to_h"]
    names += [name.replace("0", "1", 1) for name in names[:2]]
    shapes = [tuple(weights[f"gpt_neox.{name}.weight"].shape) for name in names]
    saved = sum(2 * m * n - Grid(4, 64).nbytes((m, n)) for m, n in shapes)
    sizes = [way(found, f"dense, {bits} bits").bytes for bits in (16, 4)]
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=5000)  # longer headers


@pytest.mark.parametrize("name", ["dense, 16 bits", "rank alone, 60% kept"])
def test_multiplications_are_those_of_the_model(
    name: str, found: Options, results: dict[str, Path], dense: Path
) -> None:
    model, one = load_model(results.get(name, dense), "cpu", torch.float32), way(found, name)
    assert one.answer == of_a_token(model)
    head = model.get_output_embeddings().weight.numel()
    assert one.answer - one.prompt == head
    assert one.training_bytes == 16 * sum(parameter.numel() for parameter in model.parameters())
    stored = load_file(results.get(name, dense) / "model.safetensors")
    looked_up = stored["gpt_neox.embed_in.weight"].nbytes
    assert one.read_bytes == sum(tensor.nbytes for tensor in stored.values()) - looked_up


def test_what_fits_is_told(found: Options) -> None:
    left = 300_000 - 30_000 - 20 * 2 * 3 * 64 * 2
    assert [one.fits for one in found.ways] == [one.bytes <= left for one in found.ways]
    assert found.ways[-1].options == f"--bytes {left}"
    assert 0.97 * left < found.ways[-1].bytes <= left
    assert found.room is not None
    assert found.room.startswith("300.00 kB of memory: 30.00 kB left free, 15.36 kB for the cache of 20 tokens")


def test_the_command(
    run: Callable[..., SimpleNamespace],
    found: Options,
    dense: Path,
    work: Path,
    calibration: Calibration,
    text: Path,
    tmp_path: Path,
) -> None:
    page = tmp_path / "options.html"
    given: list[object] = ["--calib", calibration.text, "--calib-samples", 24, "--calib-length", 48, "--work", work]
    given += [*(word for name in TARGETS for word in ("--targets", name)), "--device", "cpu", "--calib-batch-size", 5]
    given += ["--fit", "0.3MB", "--fit-context", 20, "--measure", text]
    done = run("options", dense, *given, "--out", page)
    assert done.code == 0, done.err
    for one in found.ways:
        cells = " ".join(line for line in done.out.splitlines() if line.startswith(f"{one.name}  ")).split()
        assert ("yes" if one.fits else "no") in cells
        assert f"{one.params:,}" in cells
        assert one.kl is None or {f"{one.predicted:+.4f}", f"{one.added:+.4f}", f"{one.kl:.4f}"} <= {*cells}
    assert " ".join(found.advice) in " ".join(done.out.split())
    told = json.loads(run("options", dense, *given, "--json").out)
    assert told == json.loads(json.dumps(found.to_json()))
    for one in found.ways:
        if one.options:
            (line,) = [line for line in done.out.splitlines() if line.startswith(f"{one.name}: ")]
            words = shlex.split(line.removeprefix(f"{one.name}: "))
            assert words[:2] == ["svdconvert", str(dense)]
            assert {*shlex.split(one.options), "--calib", calibration.text, "--work", str(work)} <= {*words}
            assert run(*words[1:-1], tmp_path / "planned", "--dry-run").code == 0
    tree = parse(page.read_bytes())
    rows = [[cell.text for cell in row.children] for row in tree.all("tr")]
    assert [row[0] for row in rows[1:]] == [one.name for one in found.ways]
    assert all(tuple(row[1:]) == found.cells(one) for row, one in zip(rows[1:], found.ways, strict=True))
    hints = [node.text for node in tree.all("title")]
    assert sum(any(hint.startswith(f"{one.name}:") for hint in hints) for one in found.ways) == len(found.ways) - 1
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    assert_refused(run("options", dense, *given, "--out", mine), "no page that svdconvert wrote")
    assert mine.read_text() == "mine"


def test_what_cannot_be_is_refused(
    run: Callable[..., SimpleNamespace], dense: Path, text: Path, tmp_path: Path
) -> None:
    assert_refused(run("options", dense), "needs a text")
    model = write_family(tmp_path / "gpt2", "gpt2")
    assert_refused(run("options", model, "--calib", text), "keeps its matrices transposed", "svdconvert sweep")
    mixture = next((name for name in FAMILIES if ARCHITECTURES[name].experts is not None), None)
    if mixture is not None:
        experts = write_family(tmp_path / mixture, mixture)
        assert_refused(run("options", experts, "--calib", text), "is a mixture of experts")
    assert_refused(run("options", dense, "--calib", text, "--fit-context", 9), "no effect without --fit")
    assert_refused(run("options", dense, "--calib", text, "--fit", "20kB", "--fit-context", 60), "cannot be met")
    assert_refused(run("options", dense, "--calib", text, "--measure", tmp_path / "none.txt"), "none.txt")


def test_what_is_left_out_is_named(dense: Path, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from svdconvert import Events
    from svdconvert.commands import options as module

    class Heard(Events):
        def note(self, sentence: Any) -> None:
            notes.append(str(sentence))

    notes: list[str] = []
    monkeypatch.setattr(module, "SHARES", (0.5, 0.001))
    names = [one.name for one in options(dense, **common, events=Heard()).ways]
    assert "rank and bits, 0.5" in names
    assert "rank and bits, 0.001" not in names
    (note,) = [note for note in notes if note.startswith("left out is")]
    assert note.startswith("left out is rank and bits, 0.001: ")
    assert note.endswith("too small, since their smallest choices take " + note.split()[-1])


def test_sizes_that_nobody_gave_are_in_no_sentence(
    run: Callable[..., SimpleNamespace], text: Path, tmp_path: Path
) -> None:
    """Matrices so small that half of their bytes hold none of them, on a device that holds nothing beside them."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = write_family(tmp_path / "toy", "gpt_neox", vocab_size=200, **sizes)
    line: list[object] = ["--calib", text, "--calib-samples", 2, "--calib-length", 8, "--device", "cpu"]
    done = run("options", model, *line, "--fit", "15kB", "--fit-context", 1)
    assert done.code == 0, done.err
    names = [line.split("  ")[0] for line in done.out.splitlines() if line.startswith(("dense", "rank"))]
    assert names[:3] == ["dense, 32 bits", "dense, 8 bits", "dense, 4 bits"]
    notes = dict(re.findall(r"note: left out is (rank and bits, .+?): (.+)", done.out))
    shares = [f"rank and bits, {share}" for share in (0.5, 0.35, 0.25, 0.18)]
    assert notes.keys() - {*shares} == {"rank and bits, 13.44 kB"}
    assert shares[1:] == [name for name in shares if name in notes and name not in names]
    assert all(notes[name].startswith("a budget of") and ";" not in notes[name] for name in shares[1:])
    of_device = notes["rank and bits, 13.44 kB"]
    assert of_device.startswith("--fit 15kB cannot be met, since everything but the targets takes")
    assert not [why for why in notes.values() if "--bytes" in why]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--measure", "none.txt"), "none.txt cannot be read"),
        (("--window", 1), "--window 1 is not possible"),
        (("--out", __file__), "no page that svdconvert wrote"),
        (("--stats", "none"), "none has no stats.json"),
        ((), "needs a text"),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(words: tuple[object, ...], said: str, dense: Path) -> None:
    text = () if not words or words[0] == "--stats" else ("--calib", __file__)
    program = (
        "import sys\nfrom svdconvert.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    line = [sys.executable, "-c", program, "options", dense, *text, *words]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr
    assert said in done.stderr


PLAIN = Way("dense, 16 bits", "dense", "", 1000, 500, 0, {16: 3}, 0.0, 400, 450, 900, 8000)
FOUR = replace(
    PLAIN, name="dense, 4 bits", kind="all alike", bytes=300, predicted=0.05, bits={4: 3}, training_bytes=None
)
LOW = replace(PLAIN, name="rank alone, 60% kept", kind="rank alone", bytes=620, predicted=0.4, prompt=240, products=3)
BOTH = replace(FOUR, name="rank and bits, 0.25", kind="rank and bits", bytes=280, predicted=0.04, products=1)


def advised(*ways: Way, **more: Any) -> str:
    return " ".join(Options("m", "t", 3, [PLAIN, *ways], **more).advice)


def test_bits_are_advised_where_they_lose_less() -> None:
    said = advised(FOUR, LOW, BOTH)
    assert "For fewer bytes alone take bits: rank and bits, 0.25 (280 B, predicted loss 0.0400)" in said
    assert "chosen for 1 of 3 matrices" in said
    assert "come of rank alone: 60% of them" in said
    assert "multiplies the perplexity by 1.49: low rank is the wrong tool" in said


def test_rank_is_advised_where_it_loses_less() -> None:
    good = replace(LOW, predicted=0.01)
    said = advised(FOUR, good)
    assert "rank alone is at least as good as bits here: rank alone, 60% kept (620 B, predicted loss 0.0100)" in said
    assert "wrong tool" not in said
    dear = advised(FOUR, replace(good, name="rank alone, 80% kept"), LOW)
    assert "The smaller multiplies the perplexity by 1.49; heal or fine-tune it." in dear


def test_what_is_measured_counts() -> None:
    measured = {"text": "x.txt", "tokens": 9, "perplexity": 5.0}
    said = advised(replace(FOUR, kl=0.9, added=0.8), replace(LOW, kl=0.1, added=0.05), **measured)
    assert "rank alone is at least as good as bits here: rank alone, 60% kept (620 B, KL 0.1000)" in said
    assert "wrong tool" not in said


def test_the_best_that_fits_is_named() -> None:
    fitting = [replace(FOUR, fits=True), replace(LOW, fits=False), replace(BOTH, fits=True)]
    assert "Of those that fit the device, rank and bits, 0.25 is closest" in advised(*fitting, room="little")
    assert "None of these fits the device" in advised(replace(FOUR, fits=False), room="less")
