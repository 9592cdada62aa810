"""What lies on the disk is what was written, of the model it is said to be of, and nobody else's is touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import random_tensors, read_config, tree, write_checkpoint

from svdconvert import Calibration, InputError, calibrate, convert
from svdconvert.jobs import pipeline
from svdconvert.jobs.journal import read_journal
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.storage.differences import difference, refuse_other_settings
from svdconvert.storage.disk import refuse_full
from svdconvert.storage.folders import refuse_foreign_files
from svdconvert.storage.identity import FULL
from svdconvert.storage.locks import FolderLock
from svdconvert.storage.source import LocalSource
from svdconvert.storage.tensor_files import read_note, read_tensors, sealed, unseal, write_tensors

Run = Callable[..., SimpleNamespace]
OPTIONS: dict[str, Any] = {"rank": 16, "device": "cpu", "check": False, "max_shard_size": 30_000}


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


class _Left(Exception):
    pass


@pytest.fixture
def broken_off(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of ``model`` that ended half-way."""
    out, real, calls = tmp_path / "out", pipeline.Pipeline._write, []

    def write(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > 20:
            raise _Left
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Pipeline, "_write", write)
        with pytest.raises(_Left):
            convert(model, out, **OPTIONS)
    assert read_journal(out / JOB_FOLDER / "journal.jsonl")
    return out


class TestIdentity:
    def test_the_same_model_staged_again(self, model: Path, broken_off: Path, dense: Path, tmp_path: Path) -> None:
        """Equal bytes in new files with new times: the job goes on, and the finished one is known again."""
        shutil.rmtree(model)
        shutil.copytree(dense, model)
        for path in model.iterdir():
            os.utime(path, (1, 1))
        convert(model, broken_off, **OPTIONS)
        convert(dense, tmp_path / "expected", **OPTIONS)
        expected = tree(tmp_path / "expected")
        assert {name: value for name, value in tree(broken_off).items() if name.endswith(".safetensors")} == {
            name: value for name, value in expected.items() if name.endswith(".safetensors")
        }
        os.utime(model / "model.safetensors", (2, 2))
        assert convert(model, broken_off, **OPTIONS).outcome.already_done

    @pytest.mark.parametrize(
        ("file", "change", "told"),
        [
            ("config.json", {"rotary_emb_base": 20000}, r"another config \(rotary_emb_base: 10000, now 20000\)"),
            ("tokenizer_config.json", {"eos_token": "<pad>"}, r"another side file \(tokenizer_config.json: "),
        ],
    )
    def test_another_file_is_refused_by_name(
        self, file: str, change: dict[str, Any], told: str, model: Path, broken_off: Path
    ) -> None:
        before = tree(broken_off)
        path = model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(InputError, match=f"unfinished job with {told}"):
            convert(model, broken_off, **OPTIONS)
        assert tree(broken_off) == before

    def test_other_weights_are_told_apart(self, model: Path, broken_off: Path) -> None:
        tensors = random_tensors()
        tensors["embed_out.weight"][0, 0] += 1
        write_checkpoint(model, tensors)
        with pytest.raises(InputError, match=r"another weights \(model.safetensors: \"(.+)\", now \"(.+)\"\)") as error:
            convert(model, broken_off, **OPTIONS)
        was, now = str(error.value).split('"')[1::2]
        assert was != now

    @pytest.mark.parametrize("file", ["model.safetensors", "config.json", "LICENSE"])
    def test_a_source_that_changes_meanwhile(
        self, file: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, out = pipeline.Pipeline.run, tmp_path / "out"

        def run(self: pipeline.Pipeline) -> Any:
            reports = real(self)
            if file == "config.json":
                (model / file).write_text(json.dumps(read_config(model) | {"eos_token_id": 1}))
            elif file == "LICENSE":
                (model / file).write_text("another licence")
            else:
                write_checkpoint(model, random_tensors(seed=1))
            return reports

        monkeypatch.setattr(pipeline.Pipeline, "run", run)
        with pytest.raises(InputError, match="was changed while it was read"):
            convert(model, out, **OPTIONS)
        assert not (out / "config.json").exists()
        monkeypatch.undo()
        with pytest.raises(InputError, match="unfinished job with another"):
            convert(model, out, **OPTIONS)
        assert convert(model, out, **OPTIONS, overwrite=True).outcome.record["command"] == "convert"

    @pytest.mark.parametrize("pickled", [False, True])
    def test_digests(self, pickled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Samples find what a training changes; every single byte counts where asked, and always in pickles."""
        tensors = {**random_tensors(), "gpt_neox.embed_in.weight": torch.arange(100_000).float()}
        one = LocalSource(write_checkpoint(tmp_path / "one", tensors, pickled=pickled))
        tensors["gpt_neox.embed_in.weight"][30_000] += 1  # between the samples
        two = LocalSource(write_checkpoint(tmp_path / "two", tensors, pickled=pickled))
        assert (one.identity() == two.identity()) == (not pickled)
        monkeypatch.setenv(FULL, "1")
        assert one.identity() != two.identity()
        assert LocalSource(one.folder).identity() == one.identity()


class TestDifference:
    def test_none(self) -> None:
        assert difference({"a": {"b": float("nan")}}, {"a": {"b": float("nan")}}) is None

    def test_where_long_values_differ(self) -> None:
        found = difference({"a": ["x" * 300, 1]}, {"a": ["x" * 300, 2]})
        assert found is not None
        was, now = found[1].split(", now ")
        assert was != now
        assert len(was) < 80

    def test_a_refusal_names_the_field_and_both_values(self) -> None:
        refuse_other_settings({"seed": 1}, {"seed": 1}, "it was made with", "give another")
        with pytest.raises(InputError, match=r'^it was made with another rank multiple \(1, now "2"\); give another$'):
            refuse_other_settings({"rank_multiple": 1}, {"rank_multiple": "2"}, "it was made with", "give another")
        with pytest.raises(InputError, match=r"^it has statistics of other labels \(1, now null\); give another$"):
            refuse_other_settings({"a": 1}, {}, "it has statistics of", "give another", {"a": "other labels"})

    def test_foreign_files(self, tmp_path: Path) -> None:
        file, folder = tmp_path / "file", tmp_path / "folder"
        file.touch()
        with pytest.raises(InputError, match="is a file"):
            refuse_foreign_files(file, known=True)
        refuse_foreign_files(folder, known=False)
        folder.mkdir()
        refuse_foreign_files(folder, known=False)
        (folder / "lock").touch()
        refuse_foreign_files(folder, known=False, leftovers={"lock"})
        (folder / "thesis.txt").touch()
        refuse_foreign_files(folder, known=True)
        with pytest.raises(InputError, match="holds files that svdconvert did not write"):
            refuse_foreign_files(folder, known=False, leftovers={"lock"})

    def test_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("svdconvert.storage.disk.free_bytes", lambda folder: 999_950_000)
        with pytest.raises(
            InputError, match=r"needs 1.00 GB, but the disk has only 999.95 MB free, 51.00 kB too little"
        ):
            refuse_full(tmp_path, 1_000_001_000, "", "free some")


@pytest.fixture(scope="module")
def stats(dense: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stats") / "stats"
    calibrate(dense, Calibration(str(text), samples=4, length=16), folder, device="cpu")
    return folder


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


class TestDigests:
    @pytest.mark.parametrize("damage", ["zeros", "negated", "flipped", "header", "short"])
    def test_a_file(self, damage: str, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        tensors = {"a": torch.randn(30, 40), "b": torch.tensor(True), "c": torch.arange(5)}
        write_tensors(path, tensors, "a note")
        assert all(torch.equal(value, tensors[name]) for name, value in read_tensors(path).items())
        assert read_note(path) == "a note"
        data = path.read_bytes()
        place = data.index(tensors["a"].numpy().tobytes())
        flipped = (-tensors["a"]).numpy().tobytes()
        if damage == "zeros":
            path.write_bytes(data[:place] + bytes(4800) + data[place + 4800 :])
        elif damage == "negated":
            path.write_bytes(data[:place] + flipped + data[place + 4800 :])
        elif damage == "short":
            path.write_bytes(data[:-1])
        elif damage == "header":
            path.write_bytes(data.replace(b"[30,40]", b"[40,30]"))
        else:
            flip(path, (place + 100) / len(data))
        with pytest.raises(InputError, match=r"a\.safetensors is damaged: .* remove it"):
            read_tensors(path)
        assert damage in ("short", "header") or read_tensors(path, ("c",))["c"].tolist() == [0, 1, 2, 3, 4]

    def test_every_bit_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        write_tensors(path, {"a": torch.arange(4.0)}, "note")
        data = path.read_bytes()
        for bit in range(8 * len(data)):
            changed = bytearray(data)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = (read_tensors(path)["a"].tolist(), read_note(path))
            except (InputError, KeyError):
                continue
            assert found == ([0, 1, 2, 3], "note"), f"bit {bit}"

    def test_json(self, tmp_path: Path) -> None:
        found = json.loads(sealed({"a": 1, "b": [0.1]}))
        assert unseal(found, tmp_path) == {"a": 1, "b": [0.1]}
        for wrong, message in (
            ({**found, "a": 2}, "damaged"),
            ({**found, "c": None}, "damaged"),
            ({"a": 1, "b": [0.1]}, "an earlier version"),
        ):
            with pytest.raises(InputError, match=message):
                unseal(wrong, tmp_path)

    def test_statistics(self, stats: Path, dense: Path, tmp_path: Path, text: Path) -> None:
        damaged = Path(shutil.copytree(stats, tmp_path / "stats"))
        expected = tree(stats)
        flip(damaged / "block-00001.safetensors", 0.7)
        settings = {"keep": 0.4, "method": "kfac", "device": "cpu", "check": False}
        with pytest.raises(InputError, match=r"block-00001\.safetensors is damaged"):
            convert(dense, tmp_path / "out", **settings, stats=damaged)
        (damaged / "block-00001.safetensors").unlink()  # as the sentence says
        calibrate(dense, Calibration(str(text), samples=4, length=16), damaged, device="cpu")
        assert tree(damaged) == expected
        state = json.loads((damaged / "stats.json").read_text())
        state["loss"]["tokens"] += 1
        (damaged / "stats.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match=r"stats\.json is damaged"):
            convert(dense, tmp_path / "out", **settings, stats=damaged)

    def test_decompositions(self, dense: Path, tmp_path: Path) -> None:
        work = tmp_path / "work"
        convert(dense, tmp_path / "one", rank=16, device="cpu", check=False, work=work)
        file = work / "decompositions" / "layers.1.mlp.dense_h_to_4h.safetensors"
        flip(file, 0.9)
        with pytest.raises(InputError, match=r"dense_h_to_4h\.safetensors is damaged: .* remove it"):
            convert(dense, tmp_path / "two", rank=16, device="cpu", check=False, work=work)
        file.unlink()
        convert(dense, tmp_path / "two", rank=16, device="cpu", check=False, work=work)
        assert tree(tmp_path / "two") == tree(tmp_path / "one")

    def test_decompositions_without_their_key(self, dense: Path, tmp_path: Path) -> None:
        work = tmp_path / "work"
        convert(dense, tmp_path / "one", rank=16, device="cpu", check=False, work=work)
        (work / "decompositions" / "key.json").unlink()
        with pytest.raises(InputError, match=r"lacks key\.json"):
            convert(dense, tmp_path / "two", rank=16, device="cpu", check=False, work=work)


def hold(folder: Path, file: Path, ready: Any, go: Any) -> None:
    lock = FolderLock(folder, file, "")
    lock.acquire()
    ready.set()
    go.wait(60)
    lock.release(remove=True)


class TestLocks:
    @pytest.mark.parametrize("kind", ["work", "calibrate", "stats", "out", "sweep"])
    def test_two_at_once(self, kind: str, stats: Path, dense: Path, text: Path, tmp_path: Path, run: Run) -> None:
        """The second one is told who the first is, writes nothing, and works when that has ended."""
        calibration = ["--calib", text, "--calib-samples", 4, "--calib-length", 16, "--device", "cpu"]
        folder = Path(shutil.copytree(stats, tmp_path / "held"))
        words, file = {
            "work": ([dense, "--rank", 16, "--device", "cpu", "--work", folder], ".work.lock"),
            "calibrate": (["calibrate", dense, *calibration, "--out", folder], ".stats.lock"),
            "stats": ([dense, "--keep", 0.4, "--method", "kfac", "--stats", folder, "--device", "cpu"], ".stats.lock"),
            "out": ([dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out"], f"{JOB_FOLDER}/lock"),
            "sweep": (
                [
                    "sweep",
                    dense,
                    "--text",
                    text,
                    "--rank",
                    8,
                    "--no-plot",
                    "--device",
                    "cpu",
                    "--out",
                    tmp_path / "out",
                ],
                f"{JOB_FOLDER}/lock",
            ),
        }[kind]
        if kind in ("work", "stats"):
            words += ["--out", tmp_path / "model"]
        place = tmp_path / "out" if kind in ("out", "sweep") else folder
        context = multiprocessing.get_context("fork")
        ready, go = context.Event(), context.Event()
        holder = context.Process(target=hold, args=(place, place / file, ready, go))
        holder.start()
        try:
            assert ready.wait(60)
            refused = run(*words)
            assert refused.code == 2, refused
            assert refused.err.count("\n") == 1
            assert f"{place} is in use by another svdconvert (process {holder.pid} on " in refused.err
        finally:
            go.set()
            holder.join()
        assert not (place / file).exists()
        done = run(*words)
        assert (done.code, done.err) == (0, ""), done

    def test_readers_share(self, tmp_path: Path) -> None:
        one, two, writer = (FolderLock(tmp_path, tmp_path / "lock", "") for _ in range(3))
        one.acquire(shared=True)
        two.acquire(shared=True)
        with pytest.raises(InputError, match="in use"):
            writer.acquire()
        one.release(remove=True)
        assert (tmp_path / "lock").exists()
        two.release(remove=True)
        assert not (tmp_path / "lock").exists()
        writer.acquire()
        writer.release(remove=True)

    def test_a_claim_of_a_process_that_is_gone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is no flock. One of another machine cannot be looked at, and is named with its file."""

        def flock(handle: int, operation: int) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr("fcntl.flock", flock)
        claim = tmp_path / "lock.pid"
        gone = {"pid": 2**22 + 1, "host": os.uname().nodename, "since": "then", "started": 1}
        for owner, takes in (
            (gone, True),
            ({**gone, "host": "elsewhere"}, False),
            ({**gone, "pid": os.getpid()}, True),
        ):
            claim.write_text(json.dumps(owner))
            lock = FolderLock(tmp_path, tmp_path / "lock", "")
            if takes:
                lock.acquire()
                with pytest.raises(InputError, match=f"process {os.getpid()} on .* remove {claim}"):
                    FolderLock(tmp_path, tmp_path / "lock", "").acquire()
                lock.release(remove=True)
                assert not list(tmp_path.iterdir())
            else:
                with pytest.raises(InputError, match=f"on elsewhere, since then.* remove {claim}"):
                    lock.acquire()
                claim.unlink()
                (tmp_path / "lock").unlink()


class TestOverwrite:
    def test_foreign_files_stay(self, dense: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        report = convert(dense, out, **OPTIONS)
        ours = {path.name for path in out.iterdir()}
        assert set(report.outcome.record["files"]) == ours
        (out / "train.py").write_text("mine")
        (out / "notes").mkdir()
        (out / "notes" / "a.bin").write_bytes(b"mine")
        convert(dense, out, **{**OPTIONS, "rank": 8, "max_shard_size": "5GB"}, overwrite=True)
        left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert left - {"model.safetensors"} == {name for name in ours if "safetensors" not in name} | {
            "train.py",
            "notes/a.bin",
        }

    @pytest.mark.parametrize("name", ["README.md", "weights.bin", "adapter_config.json", "LICENSE"])
    def test_what_would_be_replaced_or_taken_for_the_model(self, name: str, dense: Path, tmp_path: Path) -> None:
        (tmp_path / name).write_text("mine")
        (tmp_path / "setup.py").write_text("mine")
        with pytest.raises(InputError, match=f"holds {name}, which svdconvert did not write"):
            convert(dense, tmp_path, **OPTIONS, overwrite=True)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
        convert(dense, tmp_path, **OPTIONS, overwrite=True)
        assert (tmp_path / "setup.py").read_text() == "mine"

    def test_names_that_lead_elsewhere(self, dense: Path, tmp_path: Path) -> None:
        """A record is only a file: what it lists outside of its folder is left alone."""
        out, other = tmp_path / "out", tmp_path / "mine.txt"
        other.write_text("mine")
        convert(dense, out, **OPTIONS)
        (out / "link").symlink_to(tmp_path)
        path = out / "svdconvert.json"
        record = json.loads(path.read_text())
        record["files"] += ["../mine.txt", str(other), "link/mine.txt", "", ".", "a\0b", 7]
        path.write_text(json.dumps(record))
        convert(dense, out, **{**OPTIONS, "rank": 8}, overwrite=True)
        assert other.read_text() == "mine"

    def test_an_unfinished_job(self, model: Path, broken_off: Path, tmp_path: Path) -> None:
        (broken_off / "mine.py").write_text("mine")
        convert(model, broken_off, **{**OPTIONS, "max_shard_size": "5GB"}, overwrite=True)
        assert {path.name for path in broken_off.glob("*.safetensors")} == {"model.safetensors"}
        assert (broken_off / "mine.py").read_text() == "mine"


def cut_first_record(folder: Path) -> None:
    journal = folder / JOB_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().partition(b"\n")[2])


def tear_in_the_middle(folder: Path) -> None:
    flip(folder / JOB_FOLDER / "journal.jsonl", 0.5)


def join_two_records(folder: Path) -> None:
    journal = folder / JOB_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b"\n", b"", 1))


def empty_partial_beside_a_final_file(folder: Path) -> None:
    final = min(folder.glob("*.safetensors"))
    (folder / JOB_FOLDER / f"{final.name}.partial").write_bytes(bytes(final.stat().st_size))


def zeros_in_place_of_a_partial(folder: Path) -> None:
    for path in (folder / JOB_FOLDER).glob("*.partial"):
        path.write_bytes(bytes(path.stat().st_size))


def copy_of_a_final_file_as_partial(folder: Path) -> None:
    final = min(folder.glob("*.safetensors"))
    shutil.copy(final, folder / JOB_FOLDER / f"{final.name}.partial")


@pytest.mark.parametrize(
    "damage",
    [
        cut_first_record,
        tear_in_the_middle,
        join_two_records,
        empty_partial_beside_a_final_file,
        zeros_in_place_of_a_partial,
        copy_of_a_final_file_as_partial,
    ],
    ids=lambda damage: damage.__name__,
)
def test_records_and_files_that_do_not_fit(
    damage: Callable[[Path], None], model: Path, broken_off: Path, tmp_path: Path
) -> None:
    assert list(broken_off.glob("*.safetensors"))
    assert list((broken_off / JOB_FOLDER).glob("*.partial"))
    damage(broken_off)
    convert(model, broken_off, **OPTIONS)
    convert(model, tmp_path / "expected", **OPTIONS)
    assert tree(broken_off) == tree(tmp_path / "expected")


@pytest.mark.parametrize("content", ["{", None])
def test_without_its_job_file_nothing_is_known_to_be_ours(content: str | None, model: Path, broken_off: Path) -> None:
    path = broken_off / JOB_FOLDER / "job.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    weights = {name: value for name, value in tree(broken_off).items() if name.startswith("model")}
    assert weights
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"give another folder"):
            convert(model, broken_off, **OPTIONS, overwrite=overwrite)
    assert tree(broken_off).items() >= weights.items()
