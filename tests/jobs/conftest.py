"""Jobs that are killed and interrupted: the model, its undisturbed result, and one that was broken off."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import write_checkpoint
from support.jobs import first_blocks
from support.moments import Zygote, command, mid_job

from svdconvert.jobs.own_files import JOB_FOLDER


@pytest.fixture(scope="package")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    process = Zygote(tmp_path_factory.mktemp("zygote"))
    yield process
    process.close()


@pytest.fixture(scope="package")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of the tiny model, so that the whole job is a hundred calls."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return write_checkpoint(folder, first_blocks(1), shards=2, config={"num_hidden_layers": 1})


@pytest.fixture(scope="package")
def reference(zygote: Zygote, small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The undisturbed result, and the calls that it took."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    ended = zygote.run(*command(small, folder))
    assert ended.status == 0, ended
    assert len(list(folder.glob("*.safetensors"))) >= 3
    assert not (folder / JOB_FOLDER).exists()
    return folder, ended.seen["calls"]


@pytest.fixture
def unfinished(zygote: Zygote, small: Path, reference: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A job that was killed half-way."""
    out = tmp_path / "unfinished"
    ended = zygote.run(*command(small, out), at=mid_job(reference[1]), do="kill before")
    assert ended.status == -signal.SIGKILL
    assert (out / JOB_FOLDER / "journal.jsonl").stat().st_size > 0
    assert list(out.glob("*.safetensors"))
    assert list((out / JOB_FOLDER).glob("*.partial"))
    assert not (out / "config.json").exists()
    return out
