"""The weight files of a job by themselves: what is said to be complete, what is recorded, what a further run finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdconvert.jobs import shard_writer
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.jobs.record import RECORD
from svdconvert.jobs.shard_writer import ShardWriter, new_digest
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
    found = new_digest()
    found.update(data(name))
    return found.hexdigest()


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
