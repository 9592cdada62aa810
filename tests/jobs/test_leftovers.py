"""What an earlier run has left: continued if it is sound and of the same request, otherwise refused or done again."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import tree, write_checkpoint
from support.jobs import first_blocks
from support.moments import Zygote, command, mid_job

from svdconvert import convert
from svdconvert.errors import InputError
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.machine.processes import Group
from svdconvert.methods import table as metrics


def test_two_at_once(zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> None:
    expected, calls = reference
    out = tmp_path / "out"
    first = zygote.start(*command(small, out), at=mid_job(calls), do="wait")
    first.reached()
    before = tree(out)
    for options in ([], ["--overwrite"]):
        second = zygote.run(*command(small, out, *options))
        assert second.status == 2
        (who,) = re.findall(r"process (\d+) on [^ ]+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", second.err)
        assert int(who) == first.pid
        assert second.err.startswith(f"Error: {out} is in use by another svdconvert (")
        assert second.err.endswith("); wait for it to end\n")
        assert tree(out) == before
    first.go()
    assert first.wait().status == 0
    assert tree(out) == tree(expected)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--rank", "8"], "rank"),
        (["--keep", "0.5"], "rank"),
        (["--rank", "16", "--rank", "attention.dense=8"], "rank patterns"),
        (["--rank", "16", "--targets", "mlp.*"], "targets"),
        (["--rank", "16", "--dtype", "float32"], "dtype"),
        (["--rank", "16", "--factor-all"], "factor all"),
        (["--rank", "16", "--max-shard-size", "1MB"], "max shard bytes"),
    ],
)
def test_another_request_is_refused(
    options: list[str], field: str, zygote: Zygote, small: Path, unfinished: Path
) -> None:
    before = tree(unfinished)
    size = [] if "--max-shard-size" in options else ["--max-shard-size", "30KB"]
    ended = zygote.run(small, *options, *size, "--device", "cpu", "--out", unfinished)
    assert ended.status == 2, ended
    assert ended.err.startswith(f"Error: {unfinished} holds an unfinished job with another {field} (")
    assert "--overwrite" in ended.err
    assert tree(unfinished) == before


def resume(model: Path, out: Path) -> None:
    convert(model, out, rank=16, max_shard_size=30_000, device="cpu", check=False)


def test_another_source_is_refused(zygote: Zygote, unfinished: Path, tmp_path: Path) -> None:
    """Same shapes, same names, other numbers."""
    other = write_checkpoint(tmp_path / "model", first_blocks(1, seed=1), shards=2, config={"num_hidden_layers": 1})
    ended = zygote.run(*command(other, unfinished))
    assert ended.status == 2, ended
    assert "unfinished job with another weights (" in ended.err


def test_a_rewritten_source_file_is_refused(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(small, model)
    assert zygote.run(*command(model, out), at=mid_job(reference[1]), do="kill before").status == -signal.SIGKILL
    file = sorted(model.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ended = zygote.run(*command(model, out))
    assert ended.status == 2, ended
    assert "unfinished job with another weights (" in ended.err
    assert zygote.run(*command(model, out, "--overwrite")).status == 0


def test_another_method_is_refused(small: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dataclasses.replace(metrics.METHODS["svd"], name="other")
    monkeypatch.setattr(metrics, "METHODS", {**metrics.METHODS, "other": other})
    with pytest.raises(InputError, match=r'unfinished job with another method \("svd", now "other"\)'):
        convert(small, unfinished, rank=16, method="other", max_shard_size=30_000, device="cpu")


def test_another_version_is_refused(small: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a model by one version and half by another could not be told from either."""
    monkeypatch.setattr("svdconvert.jobs.job.__version__", "99.0")
    with pytest.raises(InputError, match="unfinished job with another svdconvert"):
        resume(small, unfinished)


def test_another_command_is_refused(zygote: Zygote, reference: tuple[Path, list[str]], unfinished: Path) -> None:
    ended = zygote.run("densify", reference[0], "--device", "cpu", "--out", unfinished)
    assert ended.status == 2, ended
    assert "unfinished job with another command" in ended.err


def test_a_finished_result_of_another_rank_is_refused(
    zygote: Zygote, small: Path, reference: tuple[Path, list[str]]
) -> None:
    before = tree(reference[0])
    ended = zygote.run(*command(small, reference[0], "--rank", "attention.dense=8"))
    assert ended.status == 2, ended
    assert ended.err.startswith(f"Error: {reference[0]} holds a converted model with another rank patterns (")
    assert tree(reference[0]) == before


def test_overwrite_starts_anew(zygote: Zygote, small: Path, unfinished: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    other = ["--rank", "attention.dense=8"]
    assert zygote.run(*command(small, clean, *other)).status == 0
    ended = zygote.run(*command(small, unfinished, *other, "--overwrite"))
    assert ended.status == 0, ended
    assert "earlier run" not in ended.out
    assert tree(unfinished) == tree(clean)


def tear_journal(folder: Path) -> None:
    journal = folder / JOB_FOLDER / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])


def append_garbage(folder: Path) -> None:
    with (folder / JOB_FOLDER / "journal.jsonl").open("ab") as handle:
        handle.write(b'{"step": "gpt_neox.layers.0.att\xff\x00\n{"st')


def append_zeros(folder: Path) -> None:
    """What some file systems leave of an append after a power failure: its length."""
    with (folder / JOB_FOLDER / "journal.jsonl").open("ab") as handle:
        handle.write(bytes(300))


def delete_journal(folder: Path) -> None:
    (folder / JOB_FOLDER / "journal.jsonl").unlink()


def delete_partial(folder: Path) -> None:
    for path in (folder / JOB_FOLDER).glob("*.partial"):
        path.unlink()


def shorten_partial(folder: Path) -> None:
    for path in (folder / JOB_FOLDER).glob("*.partial"):
        os.truncate(path, path.stat().st_size // 2)


def delete_finished_file(folder: Path) -> None:
    next(folder.glob("*.safetensors")).unlink()


def shorten_finished_file(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)


def delete_lock(folder: Path) -> None:
    (folder / JOB_FOLDER / "lock").unlink()


def leave_temporary_file(folder: Path) -> None:
    (folder / ".README.md.tmp").write_text("half a ca")


@pytest.mark.parametrize(
    "damage",
    [
        tear_journal,
        append_garbage,
        append_zeros,
        delete_journal,
        delete_partial,
        shorten_partial,
        delete_finished_file,
        shorten_finished_file,
        delete_lock,
        leave_temporary_file,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_leftovers_are_done_again(
    damage: Callable[[Path], None], zygote: Zygote, small: Path, unfinished: Path, reference: tuple[Path, list[str]]
) -> None:
    damage(unfinished)
    ended = zygote.run(*command(small, unfinished))
    assert (ended.status, ended.err) == (0, ""), ended
    assert tree(unfinished) == tree(reference[0])


class _Member(Group):
    """The second of two processes, or the first."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size, self.local_rank = rank, 2, rank


@pytest.mark.parametrize("first", [0, 1])
def test_the_last_process_of_a_finished_job_leaves_nothing(first: int, tmp_path: Path) -> None:
    """Whichever that is: of a shared lock the file goes with its last holder."""
    out = tmp_path / "out"
    processes = [OutputFolder(out, {}, group=_Member(rank)) for rank in (0, 1)]
    for process in processes:
        process.__enter__()
    (out / "config.json").write_text("{}")
    processes[0].finished = True
    for rank in (first, 1 - first):
        processes[rank].__exit__()
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_a_process_that_leaves_an_unfinished_job_keeps_its_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    leader, other = (OutputFolder(out, {}, group=_Member(rank)) for rank in (0, 1))
    leader.__enter__()
    other.__enter__()
    other.__exit__()
    assert (out / JOB_FOLDER / "lock").exists()
    with pytest.raises(InputError, match="in use by another svdconvert"):
        OutputFolder(out, {}).__enter__()
    leader.__exit__()
    assert not out.exists()
