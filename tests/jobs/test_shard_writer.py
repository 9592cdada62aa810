"""The weight files of a job by themselves: what is said to be complete, what is recorded, what a further run finds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert.errors import InputError
from svdconvert.jobs import shard_writer
from svdconvert.jobs.journal import read_journal, rewrite_journal
from svdconvert.jobs.output import OutputFolder, clear_folder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.jobs.record import RECORD
from svdconvert.jobs.shard_writer import ShardWriter
from svdconvert.tensors import TensorInfo

SHARDS = {
    "a.safetensors": [TensorInfo("x", "F32", (4, 2)), TensorInfo("y", "F32", (3,))],
    "b.safetensors": [TensorInfo("z", "F32", (5,))],
}
TENSORS = {
    info.name: torch.randn(info.shape, generator=torch.Generator().manual_seed(seed))
    for seed, info in enumerate([info for infos in SHARDS.values() for info in infos])
}


def data(name: str) -> memoryview:
    return memoryview(TENSORS[name].numpy().tobytes())


def digest(name: str) -> str:
    return hashlib.blake2b(data(name), digest_size=16).hexdigest()


def put(writer: ShardWriter, name: str) -> list[tuple[str, int]]:
    writer.write(name, data(name))
    return writer.finish(f"step {name}", [name], {"of": name})


@pytest.fixture
def output(tmp_path: Path) -> Iterator[OutputFolder]:
    with OutputFolder(tmp_path / "out", {}) as folder:
        yield folder


def test_a_file_is_complete_once_and_with_its_last_tensor(output: OutputFolder) -> None:
    writer = ShardWriter(output, SHARDS)
    assert put(writer, "y") == []
    assert writer.record() == []  # one tensor of two
    assert not list(output.folder.glob("*.safetensors"))
    half = len(data("x")) // 2
    writer.write("x", data("x")[:half])
    writer.write("x", data("x")[half:], half)
    completed = writer.finish("step x", ["x"], {})
    assert completed == [("a.safetensors", (output.folder / "a.safetensors").stat().st_size)]
    assert [name for name, _ in put(writer, "z")] == ["b.safetensors"]
    assert writer.record() == []
    assert writer.join() == []
    writer.close()
    writer.close()
    found = load_file(output.folder / "a.safetensors") | load_file(output.folder / "b.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert writer.digests == {name: digest(name) for name in TENSORS}


def test_a_further_run_finds_what_was_recorded_and_no_more(output: OutputFolder) -> None:
    first = ShardWriter(output, SHARDS)
    put(first, "y")
    first.record()
    put(first, "z")  # completes its file and so is recorded
    first.write("x", data("x"))  # never finished
    first.close()
    second = ShardWriter(output, SHARDS)
    assert {name: second.is_done(f"step {name}") for name in TENSORS} == {"x": False, "y": True, "z": True}
    assert second.reports == {"step y": {"of": "y"}, "step z": {"of": "z"}}
    assert second.digests == {name: digest(name) for name in "yz"}
    assert [name for name, _ in put(second, "x")] == ["a.safetensors"]
    second.close()
    assert torch.equal(load_file(output.folder / "a.safetensors")["y"], TENSORS["y"])


def test_the_room_of_a_file_is_reserved_and_its_handle_given_back(output: OutputFolder) -> None:
    writer = ShardWriter(output, SHARDS)
    before = len(os.listdir("/dev/fd"))
    writer.write("x", data("x")[:4])
    (partial,) = output.job.glob("*.partial")
    size = partial.stat().st_size
    assert len(os.listdir("/dev/fd")) == before + 1
    put(writer, "y")
    put(writer, "x")
    assert (output.folder / "a.safetensors").stat().st_size == size
    assert len(os.listdir("/dev/fd")) == before
    writer.close()


def test_a_complete_file_that_lacks_a_record_is_continued(output: OutputFolder) -> None:
    first = ShardWriter(output, SHARDS)
    put(first, "x")
    put(first, "y")
    first.close()
    journal = output.job / "journal.jsonl"
    rewrite_journal(journal, [entry for entry in read_journal(journal) if "x" not in entry["tensors"]])
    second = ShardWriter(output, SHARDS)
    assert not (output.folder / "a.safetensors").exists()
    assert second.digests.keys() == {"y"}
    assert [name for name, _ in put(second, "x")] == ["a.safetensors"]
    second.close()
    found = load_file(output.folder / "a.safetensors")
    assert all(torch.equal(found[name], TENSORS[name]) for name in "xy")


def test_journals_of_several_processes_become_one(output: OutputFolder) -> None:
    first = ShardWriter(output, SHARDS)
    for name in TENSORS:
        put(first, name)
    first.close()
    journal = output.job / "journal.jsonl"
    entries = read_journal(journal)
    rewrite_journal(journal, entries[:1])
    rewrite_journal(output.job / "journal-1.jsonl", entries[1:])
    second = ShardWriter(output, SHARDS)
    second.close()
    assert second.digests == {name: digest(name) for name in TENSORS}
    assert [path.name for path in output.job.glob("journal*")] == ["journal.jsonl"]
    assert {entry["step"] for entry in read_journal(journal)} == {f"step {name}" for name in TENSORS}


def test_a_folder_is_for_one_job_at_a_time_and_may_be_begun_anew(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", {"of": 1}) as output:
        output.promise(SHARDS)
        writer = ShardWriter(output, SHARDS)
        put(writer, "z")
        writer.close()
        with (
            pytest.raises(InputError, match="is in use by another svdconvert"),
            OutputFolder(tmp_path / "out", {"of": 1}),
        ):
            pass
    (output.job / "left over").write_text("")
    with OutputFolder(tmp_path / "out", {"of": 2}, overwrite=True) as output:
        assert not (output.job / "left over").exists()
        writer = ShardWriter(output, SHARDS)
        assert not writer.is_done("step z")
        writer.close()


def test_a_cleared_folder_keeps_its_lock_only(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").write_text("mine")
    (tmp_path / "job" / "work" / "deeper").mkdir(parents=True)
    (tmp_path / "job" / "link").symlink_to(tmp_path / "other")
    for name in ("lock", "lock-2", "job.json", "work/a"):
        (tmp_path / "job" / name).write_text("")
    clear_folder(tmp_path / "job")
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"lock", "lock-2"}
    assert (tmp_path / "other" / "mine").exists()


def test_steps_are_recorded_in_batches(output: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor alone is below the limit, two of them reach it; a step that comes late is recorded by itself."""
    journal = output.job / "journal.jsonl"
    few = {"a.safetensors": [TensorInfo(str(i), "F32", (8,)) for i in range(6)]}
    monkeypatch.setattr(shard_writer, "BATCH_BYTES", 2 * 32)
    monkeypatch.setattr(shard_writer, "BATCH_SECONDS", 1e9)
    writer = ShardWriter(output, few)
    lines = []
    for i in range(5):
        if i == 4:
            monkeypatch.setattr(shard_writer, "BATCH_SECONDS", -1.0)
        writer.write(str(i), memoryview(bytes(32)))
        writer.finish(str(i), [str(i)], {})
        lines.append(journal.read_bytes().count(b"\n"))
    writer.close()
    assert lines == [0, 2, 2, 4, 5]


def test_after_a_failed_sync_nothing_is_recorded(output: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(output, SHARDS)
    put(writer, "y")

    def fail(handle: int) -> None:
        raise RuntimeError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr("svdconvert.jobs.shard_file.sync", fail)
        with pytest.raises(RuntimeError, match="the disk is gone"):
            writer.record()
    assert writer.record() == []
    assert put(writer, "z") == []
    writer.close()
    assert (output.job / "journal.jsonl").read_bytes() == b""
    assert not list(output.folder.glob("*.safetensors"))


def test_a_folder_in_the_place_of_a_file_of_ours_stays(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"files": ["config.json", "notes", "kept/LICENSE", RECORD]}))
    (tmp_path / "config.json").write_text("{}")
    for folder in ("notes", "kept"):
        (tmp_path / folder).mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "kept" / "LICENSE").write_text("ours")
    with OutputFolder(tmp_path, {}, overwrite=True):
        assert [path.name for path in tmp_path.iterdir() if path.name != JOB_FOLDER] == ["notes"]
        assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"
