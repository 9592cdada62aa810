"""One budget of bytes: what is written is what was chosen, its loss is the one that was told, and even rounding is
never better by it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import tree, write_checkpoint
from support.families import write_family
from support.html_pages import Node, parse
from support.refusals import assert_refused
from support.rounded_results import loss, stored

from svdconvert import Calibration, InputError, JobError, calibrate, convert, plan, verify
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.factoring import price_list
from svdconvert.factoring.price_list import PriceLists
from svdconvert.grids import Grid
from svdconvert.jobs.record import read_record
from svdconvert.machine import processes
from svdconvert.methods.table import METHODS
from svdconvert.models.loading import load_model
from svdconvert.planning.advice import next_steps
from svdconvert.planning.make import bytes_budget, make_plan
from svdconvert.reports.result_page import result_page
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.opening import open_source
from svdconvert.storage.packed_config import NEEDED
from svdconvert.words import size as in_words

# Of all targets' 16-bit bytes; at the last one there are products of low rank.
SHARES = (0.5, 0.3, 0.1)
TARGETS = ("layers.0.*", "layers.1.attention.*")
MATRICES = 6


@pytest.fixture(scope="module")
def stats(dense: Path, calibration: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes") / "stats"
    calibrate(dense, calibration, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what all budgets of this file begin from."""
    return tmp_path_factory.mktemp("bytes") / "work"


@pytest.fixture(scope="module")
def results(dense: Path, stats: Path, work: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Share -> result."""
    folder = tmp_path_factory.mktemp("results")
    for share in SHARES:
        convert(dense, folder / str(share), bytes=share, stats=stats, work=work, device="cpu", targets=TARGETS)
    return {share: folder / str(share) for share in SHARES}


@pytest.mark.parametrize("share", SHARES)
def test_the_loss_that_is_told_is_that_of_the_weights_as_they_are_stored(
    share: float, results: dict[float, Path], dense: Path, stats: Path
) -> None:
    record, before = read_record(results[share]).results, load_file(dense / "model.safetensors")
    kept = StatisticsFolder(stats)
    assert record["matrices"] or share > 0.1
    told = {**record["matrices"], **record["rounded"]}
    assert told
    for module, matrix in told.items():
        weight = before[f"gpt_neox.{module}.weight"].double().numpy()
        error = weight - stored(results[share], module)
        expected = loss(error, kept.load([module])[module])
        assert matrix["predicted_loss"] == pytest.approx(matrix["worth"] * expected, rel=1e-4, abs=1e-12), module
        relative = np.linalg.norm(error) / np.linalg.norm(weight)
        assert matrix["relative_error"] == pytest.approx(relative, rel=1e-4, abs=1e-6), module
    assert record["predicted_loss"] == pytest.approx(sum(matrix["predicted_loss"] for matrix in told.values()))


@pytest.mark.parametrize("share", SHARES)
def test_bytes_on_the_disk_are_those_asked_for_and_planned(share: float, results: dict[float, Path]) -> None:
    record = read_record(results[share]).results
    before, after = (sum(kind["bytes"][when] for kind in record["kinds"].values()) for when in ("before", "after"))
    assert after <= share * before
    assert after > 0.9 * share * before
    assert record["bytes"]["after"] == (results[share] / "model.safetensors").stat().st_size


def test_parameters_are_entries_and_not_words(results: dict[float, Path]) -> None:
    record = read_record(results[0.5]).results
    assert not record["matrices"]
    assert record["params"]["after"] == record["params"]["before"]
    assert all(kind["params"]["after"] == kind["params"]["before"] for kind in record["kinds"].values())
    factored = read_record(results[0.1]).results
    saved = sum(
        math.prod(matrix["shape"]) - matrix["rank"] * sum(matrix["shape"]) for matrix in factored["matrices"].values()
    )
    assert factored["params"]["before"] - factored["params"]["after"] == saved > 0


@pytest.mark.parametrize("share", SHARES)
def test_it_is_never_worse_than_even_rounding(share: float, results: dict[float, Path], work: Path) -> None:
    record = read_record(results[share]).results
    told = {**record["matrices"], **record["rounded"]}
    lists = []
    for path in (work / "prices").glob("*/*.json"):
        choices = json.loads(path.read_text())["choices"]
        worth = told[path.stem]["worth"] if path.stem in told else 1.0
        lists.append([{**one, "loss": worth * one["loss"]} for one in choices])
    assert len(lists) == MATRICES
    budget = share * sum(kind["bytes"]["before"] for kind in record["kinds"].values())
    for bits in (8, 6, 5, 4, 3, 2):
        even = [
            next(one for one in choices if one["rank"] is None and [grid[0] for grid in one["grids"]] == [bits])
            for choices in lists
        ]
        if sum(one["bytes"] for one in even) <= budget:
            assert record["predicted_loss"] <= sum(one["loss"] for one in even) * (1 + 1e-9)


def test_config_names_the_grid_of_every_packed_weight_once(results: dict[float, Path]) -> None:
    result = results[0.1]
    config = json.loads((result / "config.json").read_text())
    record = read_record(result).results
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    widths = {one["weights"]["num_bits"] for one in settings["config_groups"].values()}
    told = {bits for one in (*record["matrices"].values(), *record["rounded"].values()) for bits in one.get("bits", ())}
    assert widths == told - {16}
    assert config["svd_ranks"] == {name: one["rank"] for name, one in record["matrices"].items()}


def test_another_run_gives_the_same_bytes_and_prices_nothing_again(
    results: dict[float, Path], dense: Path, stats: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("priced again")

    monkeypatch.setattr(PriceLists, "write", refuse)
    convert(dense, tmp_path / "again", bytes=0.3, stats=stats, work=work, device="cpu", targets=TARGETS, workers=2)
    assert tree(tmp_path / "again") == tree(results[0.3])
    done = convert(dense, tmp_path / "again", bytes=0.3, stats=stats, work=work, device="cpu", targets=TARGETS)
    assert done.outcome.already_done
    assert done.plan.bytes_after == (tmp_path / "again" / "model.safetensors").stat().st_size
    assert done.plan.grids


def test_what_other_budgets_have_priced_does_not_change_the_result(dense: Path, stats: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"stats": stats, "device": "cpu", "targets": TARGETS}
    for share in (0.1, 0.15):
        convert(dense, tmp_path / f"{share}", **request, bytes=share, work=tmp_path / "work")
    convert(dense, tmp_path / "alone", **request, bytes=0.15)
    assert read_record(tmp_path / "0.1").results["matrices"]  # there were products
    assert tree(tmp_path / "0.15") == tree(tmp_path / "alone")


@pytest.mark.parametrize(("share", "kept"), [(0.3, 2), (0.1, MATRICES + 2)], ids=["dense ways", "products"])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    share: float,
    kept: int,
    results: dict[float, Path],
    dense: Path,
    stats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, left, made = PriceLists.write, [kept], set()

    class Told(price_list.MeteredMatrix):
        def __init__(self, weight: torch.Tensor, file: Path, *more: Any) -> None:
            super().__init__(weight, file, *more)
            self.name = file.name.removesuffix(".safetensors")

        def rounded(self, rank: Any, grids: Any) -> Any:
            made.add((self.name, rank, tuple(grids)))
            return super().rounded(rank, grids)

    def broken(self: PriceLists, *arguments: Any) -> None:
        if not left[0]:
            raise JobError("the disk is full")
        left[0] -= 1
        write(self, *arguments)

    monkeypatch.setattr(price_list, "MeteredMatrix", Told)
    monkeypatch.setattr(PriceLists, "write", broken)
    request: dict[str, Any] = {"bytes": share, "stats": stats, "device": "cpu", "targets": TARGETS}
    with pytest.raises(JobError, match="disk is full"):
        convert(dense, tmp_path / "out", **request, workers=1)
    lists = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("**/prices/*/*.json")}
    begun = {
        (module, way["rank"], tuple(Grid(*grid) for grid in way["grids"]))
        for module, told in lists.items()
        for way in told["choices"]
        if way["grids"] and None not in way["grids"]
    }
    assert len(lists) == min(kept, MATRICES)
    assert any(rank for _, rank, _ in begun) == (kept > MATRICES)
    assert begun < made  # what was made last was not kept
    made.clear()
    monkeypatch.setattr(PriceLists, "write", write)
    convert(dense, tmp_path / "out", **request, workers=2)
    assert made
    assert not made & begun
    assert tree(tmp_path / "out") == tree(results[share])


def test_the_weight_files_take_no_more_than_a_size_that_is_given(
    run: Callable[..., SimpleNamespace], dense: Path, stats: Path, work: Path, tmp_path: Path
) -> None:
    size = (dense / "model.safetensors").stat().st_size
    targets = sum(kind.dense_params for kind in plan(dense, bytes=0.5, targets=TARGETS).groups)
    wanted = size - int(0.6 * 2 * targets)
    out, chosen = tmp_path / "out", [word for name in TARGETS for word in ("--targets", name)]
    given = ("--stats", stats, "--work", work, "--out", out, "--device", "cpu")
    done = run(dense, "--bytes", f"{wanted}B", *chosen, *given)
    assert done.code == 0, done.err
    found = (out / "model.safetensors").stat().st_size
    assert 0.97 * wanted < found <= wanted
    card = (out / "README.md").read_text()
    assert f"--bytes {wanted}" in card
    assert "compressed-tensors" in card


def test_what_the_result_leaves_out_takes_nothing_of_a_size(dense: Path, tmp_path: Path) -> None:
    legacy = write_checkpoint(tmp_path / "legacy", legacy=True)
    size = (dense / "model.safetensors").stat().st_size
    assert (legacy / "model.safetensors").stat().st_size > size + 1000
    targets = sum(kind.dense_params for kind in plan(dense, bytes=0.5).groups)
    request = Conversion.of(bytes=size - targets)
    budgets = []
    for folder in (dense, legacy):
        source = open_source(str(folder))
        budgets.append(bytes_budget(source, request, make_plan(source, request).targets))
    assert budgets[0] == budgets[1]


def test_no_process_goes_on_before_all_have_read_the_lists(
    results: dict[float, Path],
    dense: Path,
    stats: Path,
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    class Alone(processes.Group):
        def wait(self) -> None:
            happened.append("wait")

    read = PriceLists.read
    monkeypatch.setattr(price_list, "current", Alone)
    monkeypatch.setattr(PriceLists, "read", lambda self, *one: (happened.append("read"), read(self, *one))[1])
    convert(dense, tmp_path / "out", bytes=0.3, stats=stats, work=work, device="cpu", targets=TARGETS)
    order = "".join(word[0] for word in happened)
    assert order.startswith("w" + MATRICES * "r" + "w")
    assert order.endswith("rw")


def test_what_is_advised_of_weights_of_few_bits() -> None:
    """To heal them, unless that was done; and what loads them."""
    settings: dict[str, Any] = {"bytes": 0.5, "share_layers": 1, "refit": "none"}
    fitted = settings | {"bytes": None, "fit": 10**9, "fit_context": None, "fit_for": "inference"}
    for given in (settings, fitted):
        advice = next_steps(METHODS["kfac"], given, Path("out")).marked
        assert "`svdconvert heal`, which trains its scales" in advice
        assert "svdconvert[packed]" in advice
        assert "svdconvert heal" not in next_steps(METHODS["kfac"], given | {"heal": {}}, Path("out")).marked
    assert "heal" in next_steps(METHODS["kfac"], settings | {"bytes": None}, Path("out")).marked


def test_widths_are_those_that_were_asked_for(dense: Path, stats: Path, work: Path, tmp_path: Path) -> None:
    report = convert(
        dense, tmp_path / "out", bytes=0.4, widths="16,8,4", stats=stats, work=work, device="cpu", targets=TARGETS
    )
    told = {**report.outcome.record["matrices"], **report.outcome.record["rounded"]}
    assert {bits for one in told.values() for bits in one.get("bits", ())} <= {16, 8, 4}


def test_ranks_are_multiples_where_that_was_asked_for(
    results: dict[float, Path], dense: Path, stats: Path, work: Path, tmp_path: Path
) -> None:
    multiple = 12
    size = {"bytes": 0.1, "rank_multiple": multiple}
    convert(dense, tmp_path / "out", **size, stats=stats, work=work, device="cpu", targets=TARGETS)
    ranks, others = (
        [matrix["rank"] for matrix in read_record(folder).results["matrices"].values()]
        for folder in (tmp_path / "out", results[0.1])
    )
    assert ranks
    assert not any(rank % multiple for rank in ranks)
    assert any(rank % multiple for rank in others)


def test_a_multiple_that_leaves_no_rank_is_refused(dense: Path) -> None:
    with pytest.raises(InputError, match="rank_multiple=1000 leaves no rank that saves anything in any matrix"):
        plan(dense, bytes=0.2, rank_multiple=1000)


def test_a_plan_shows_the_widest_even_width(dense: Path) -> None:
    made = plan(dense, bytes=0.35)  # of all matrices
    assert {grid.bits for grid in made.grids.values()} == {5}
    targets = sum(kind.dense_params for kind in made.groups)
    assert made.params_after == made.params_before
    assert made.bytes_before - made.bytes_after > 0.6 * 2 * targets
    assert made.method == "kfac"


def test_widths_that_cannot_use_the_bytes_say_so(dense: Path, stats: Path, work: Path, tmp_path: Path) -> None:
    """Planned and made; not where the bytes are used, nor where a wider way would not fit."""
    said = "widths=[4] cannot use all that bytes=0.5 leaves for the targets"
    made = plan(dense, bytes=0.5, widths="4")
    assert [said in str(note) for note in made.notes].count(True) == 1
    how = {"bytes": 0.5, "widths": "4", "targets": TARGETS, "stats": stats, "work": work, "device": "cpu"}
    assert said in str(convert(dense, tmp_path / "out", **how).plan.notes)
    for share, widths in ((0.29, "4"), (0.35, "8,4"), (0.2, "4")):
        assert "cannot use" not in str(plan(dense, bytes=share, widths=widths).notes), (share, widths)


def test_every_worker_that_rounds_takes_the_memory_of_its_metrics(dense: Path) -> None:
    made = plan(dense, bytes=0.35)
    assert all(target.rank is None for target in made.targets)
    largest = max(max(target.shape) for target in made.targets)
    metric = 8 * largest**2
    assert made.worker_bytes >= 2 * metric
    assert made.solving_bytes(9) - made.solving_bytes(1) == 8 * made.worker_bytes
    assert made.device_bytes(2) >= 4 * metric


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bytes": 0.5}, "needs a text"),
        ({"bytes": 1.5}, "between 0 and 1"),
        ({"bytes": "much"}, "neither a share nor a size"),
        ({"bytes": 20}, "between 0 and 1"),
        ({"bytes": "90MB", "stats": True}, "keeps every matrix as it is"),
        ({"bytes": 0.001, "stats": True}, "give more bytes"),
        ({"bytes": "20kB", "stats": True}, "cannot be met"),
        ({"bytes": 0.5, "keep": 0.5}, "exactly one"),
        ({"keep": 0.5, "widths": [8, 4]}, "leaves a choice"),
        ({"bytes": 0.5, "widths": "16,9"}, "cannot be stored in"),
        ({"bytes": 0.5, "widths": []}, "cannot be stored in"),
        ({"bytes": 0.5, "widths": [4.7]}, "not a list of widths"),
        ({"bytes": 0.5, "stats": True, "share_layers": 2}, "does not go with"),
        ({"bytes": 0.5, "stats": True, "split_fused": True}, "does not go with"),
        ({"bytes": 0.5, "stats": True, "refit": "sequential"}, "does not go with"),
        ({"bytes": 0.5, "stats": True, "layout": "pivoted"}, "does not go with"),
        ({"bytes": 0.5, "stats": True, "allocation": "uniform"}, "does not go with"),
        ({"bytes": 0.5, "stats": True, "method": "whiten"}, "does not estimate"),
        ({"bytes": 0.5, "stats": True, "factor_all": True}, "does not go with"),
    ],
)
def test_what_cannot_be_is_refused(
    settings: dict[str, Any], words: str, dense: Path, stats: Path, tmp_path: Path
) -> None:
    given = settings | ({"stats": stats} if "stats" in settings else {})
    with pytest.raises(InputError, match=words):
        convert(dense, tmp_path / "out", **given, device="cpu", targets=TARGETS)


def test_what_the_command_line_refuses_is_in_its_words(
    run: Callable[..., SimpleNamespace], dense: Path, tmp_path: Path
) -> None:
    refused = run("plan", dense, "--bytes", "3MB")
    size = (dense / "model.safetensors").stat().st_size
    assert_refused(refused, "--bytes 3MB keeps every matrix as it is", in_words(size))
    assert_refused(run("plan", dense, "--bytes", "2"), "--bytes 2 must lie between 0 and 1")
    refused = run(dense, "--bytes", "0.5", "--share-layers", "2", "--out", tmp_path / "out")
    assert_refused(refused, "--bytes 0.5", "--share-layers 2")


def maps_of(page: Node) -> dict[str, dict[str, str]]:
    """Caption of a map -> module path -> the text of its cell."""
    found: dict[str, dict[str, str]] = {}
    for table in (table for table in page.all("table") if "map" in table.classes):
        heads, (body,) = [head.text for head in next(table.all("thead")).all("th")][1:-1], table.all("tbody")
        rows = [(kind.text, cells) for kind, *cells, _ in (row.children for row in body.children)]
        found[next(table.all("caption")).text] = {
            f"layers.{layer}.{kind}": cell.text
            for kind, cells in rows
            for layer, cell in zip(heads, cells, strict=True)
            if cell.text
        }
    return found


@pytest.mark.parametrize("share", SHARES)
def test_maps_of_the_page_count_rounded_matrices(share: float, results: dict[float, Path]) -> None:
    result = results[share]
    record, tensors = read_record(result), load_file(result / "model.safetensors")
    told = {**record.results["matrices"], **record.results["rounded"]}
    maps = maps_of(parse(result_page(record, result)))
    whole = record.results["predicted_loss"]
    for module, matrix in told.items():
        part = 100 * matrix["predicted_loss"] / whole
        assert float(maps["Predicted loss, percent of its sum"][module]) == pytest.approx(part, abs=0.51), module
        error = 100 * matrix["relative_error"]
        assert float(maps["Error of the weights, percent"][module]) == pytest.approx(error, abs=0.51), module
    bits = maps["Bits per weight of the dense matrix"]
    assert bits.keys() == {*told, *record.results["dense_targets"]}
    for module, text in bits.items():
        stem, shape_or_bias = f"gpt_neox.{module}.", ("bias", "weight_shape")
        held = [
            tensor for name, tensor in tensors.items() if name.startswith(stem) and not name.endswith(shape_or_bias)
        ]
        shape = told[module]["shape"] if module in told else held[0].shape
        stored = 8 * sum(tensor.nbytes for tensor in held) / math.prod(shape)
        assert float(text) == pytest.approx(stored, abs=0.051), module
    ranks = "Rank of every matrix, and share of its parameters that is kept"
    assert (ranks in maps) == bool(record.results["matrices"])


@pytest.mark.parametrize(("share", "title"), [(0.5, "rounded"), (0.1, "factored and rounded")])
def test_what_is_rounded_alone_is_not_called_factored(share: float, title: str, results: dict[float, Path]) -> None:
    record, factored = read_record(results[share]), share == 0.1
    page = parse(result_page(record, results[share]))
    assert next(page.all("h1")).text.endswith(f", {title}")
    (lead,) = [node.text for node in page.all("p") if "lead" in node.classes]
    before, after = (record.results["bytes"][when] for when in ("before", "after"))
    kept = f"{100 * after / before:.1f} %"
    assert lead.startswith(f"{in_words(before)} of weights became {in_words(after)}, {kept} of the bytes")
    assert ("parameters became" in lead, "low rank" in lead) == (factored, factored)
    _, front, body = (results[share] / "README.md").read_text().split("---\n", 2)
    assert f", {title}\n" in body
    assert ("- low-rank\n" in front, "- svd\n" in front) == (factored, factored)
    assert ("low rank" in body, "whole product" in body) == (factored, factored)
    install = body.index(f'pip install "compressed-tensors>={NEEDED}"')
    assert body.index("## Use") < install < body.index("from_pretrained")


def test_a_page_and_the_card_tell_the_bits_of_every_matrix(results: dict[float, Path]) -> None:
    result = results[0.1]
    record = read_record(result)
    rows = [[cell.text for cell in row.children] for row in parse(result_page(record, result)).all("tr")]
    told = {**record.results["matrices"], **record.results["rounded"]}
    for module, matrix in told.items():
        (cells,) = [cells for cells in rows if cells[0] == module]
        shape = " x ".join(map(str, matrix["shape"]))
        bits = " + ".join(map(str, matrix["bits"]))
        assert cells[1:4] == [shape, str(matrix.get("rank", "dense")), bits]
    card = (result / "README.md").read_text()
    assert "| layers | shape | rank | bits |" in card
    assert "fine-tune" not in card
    narrowest = min(bits for matrix in told.values() for bits in matrix["bits"])
    assert f" at {narrowest} bits" in card


def test_transposed_matrices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="transposed"):
        plan(write_family(tmp_path / "gpt2", "gpt2"), bytes=0.5)


@pytest.mark.parametrize("share", SHARES)
def test_it_is_what_it_says_it_is(share: float, results: dict[float, Path], dense: Path) -> None:
    checks = verify(results[share], dense)
    assert len(checks) > 5
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("share", SHARES)
def test_verify_counts_products_and_rounded_matrices_apart(
    share: float, results: dict[float, Path], dense: Path
) -> None:
    record = read_record(results[share]).results
    told = {check.name: check.detail for check in verify(results[share], dense)}
    for name, how, which in (("factored", "multiplied out", "matrices"), ("rounded", "rounded", "rounded")):
        errors = [matrix["relative_error"] for matrix in record[which].values()]
        if not errors:
            assert f"{name} matrices" not in told
            continue
        detail = told[f"{name} matrices"]
        assert detail.startswith(f"{len(errors)} {how}; relative error mean {sum(errors) / len(errors):.4f}, ")
        assert detail.endswith(", as recorded")


def spoil_the_record(folder: Path, module: str) -> None:
    record = json.loads((folder / "svdconvert.json").read_text())
    record["rounded"][module]["relative_error"] *= 1.01
    (folder / "svdconvert.json").write_text(json.dumps(record))


def spoil_a_word(folder: Path, module: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"gpt_neox.{module}.weight_packed"][0, 0] ^= 0x7FFFFFFF
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("spoil", [spoil_the_record, spoil_a_word])
@pytest.mark.parametrize("share", [0.3, 0.1])
def test_verify_compares_rounded_matrices_with_their_record(
    share: float, spoil: Callable[[Path, str], None], results: dict[float, Path], dense: Path, tmp_path: Path
) -> None:
    module = next(iter(read_record(results[share]).results["rounded"]))
    shutil.copytree(results[share], tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", module)
    (bad,) = [check for check in verify(tmp_path / "spoilt", dense) if check.name == "rounded matrices"]
    assert not bad.passed
    assert bad.detail == f"not as recorded: {module}"


def test_it_runs_as_the_matrices_that_are_stored(results: dict[float, Path], dense: Path) -> None:
    result, ids = results[0.1], torch.arange(40)[None] % 150
    model = load_model(dense, "cpu", torch.float64)
    for module in {**read_record(result).results["matrices"], **read_record(result).results["rounded"]}:
        model.gpt_neox.get_submodule(module).weight.data = torch.from_numpy(stored(result, module))
    packed = load_model(result, "cpu", torch.float64)
    with torch.no_grad():
        wanted, found = model(ids).logits, packed(ids).logits
    assert float((found - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())
