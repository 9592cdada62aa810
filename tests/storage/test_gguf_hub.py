"""GGUF models on the Hub: downloaded as a whole, by repository or by file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from svdconvert.storage.gguf_source import GgufSource
from svdconvert.storage.opening import local_folder, open_source

from support.gguf_files import tiny, write_gguf  # isort: skip
from support.hub_server import HubServer, use_hub  # isort: skip
from support.refusals import assert_refused  # isort: skip

REPO, CARD = "owner/tiny-GGUF", b"---\nlicense: mit\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts of a model."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "tiny.gguf", tiny("llama"), kind="Q8_0", split_max_tensors=12)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny-Q8_0.gguf"
    return write_gguf(path, tiny("llama"), kind="Q8_0").read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        yield server


def test_the_only_model(hub: HubServer, whole: bytes, run: Any, tmp_path: Path) -> None:
    """Converted, with where it comes from in the record and on the card."""
    hub.add(REPO, {"tiny-Q8_0.gguf": whole, "README.md": CARD})
    done = run(REPO, "--rank", 8, "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    source = open_source(REPO)
    assert record["source"] == {"name": REPO, "repo": REPO, "commit": source.commit}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {REPO}" in card
    assert "license: mit" in card
    assert (local_folder(REPO) / "tokenizer.json").is_file()
    assert len(hub.gets("tiny-Q8_0.gguf")) == 1


def test_without_a_network(hub: HubServer, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, as `hf download` leaves it."""
    hub.add(REPO, {"tiny-Q8_0.gguf": whole, "README.md": CARD})
    snapshot_download(REPO)
    known = open_source(REPO).identity()
    use_hub(monkeypatch, hub, tmp_path / "home", offline=True)
    assert open_source(REPO).identity() == known
    assert open_source(f"{REPO}/tiny-Q8_0.gguf").identity() == known


def test_one_of_several(hub: HubServer, whole: bytes, parts: dict[str, bytes], run: Any) -> None:
    """A file is chosen by its path behind the repository's name; the message has what can be given."""
    hub.add(REPO, {"tiny-Q8_0.gguf": whole, **{f"parts/{name}": data for name, data in parts.items()}})
    first = f"{REPO}/parts/{next(iter(parts))}"
    refused = run("plan", REPO, "--rank", 8)
    assert_refused(refused, "several GGUF models", first, f"{REPO}/tiny-Q8_0.gguf")
    assert "00002-of" not in refused.err
    assert not hub.gets("tiny-Q8_0.gguf")
    one, split = open_source(f"{REPO}/tiny-Q8_0.gguf"), open_source(first)
    assert isinstance(one, GgufSource)
    assert (one.where, one.files) == (f"{REPO}/tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"])
    assert split.files == list(parts)
    assert split.tensors.keys() == one.tensors.keys()
    assert_refused(run("plan", f"{REPO}/tiny-Q2_K.gguf", "--rank", 8), "has no tiny-Q2_K.gguf", "tiny-Q8_0.gguf")
    assert_refused(run("plan", f"{REPO}/../tiny-Q8_0.gguf", "--rank", 8), "has no ../tiny-Q8_0.gguf")


def test_beside_other_weights(hub: HubServer, whole: bytes, run: Any, tmp_path: Path) -> None:
    """They come first, and a GGUF file is then asked for by name; the command on the card asks for it, too."""
    hub.add(REPO, {"tiny-Q8_0.gguf": whole, "config.json": b"{}", "model.safetensors": b""})
    assert_refused(run("plan", REPO, "--rank", 8), "model_type None")
    model, out = f"{REPO}/tiny-Q8_0.gguf", tmp_path / "out"
    done = run(model, "--rank", 8, "--device", "cpu", "--no-check", "--out", out)
    assert done.code == 0, done.err
    command = json.loads((out / "svdconvert.json").read_text())["repeat"]
    assert command.split()[:2] == ["svdconvert", model]
    assert command in (out / "README.md").read_text()


def test_a_part_is_missing(hub: HubServer, parts: dict[str, bytes], run: Any) -> None:
    hub.add(REPO, dict(list(parts.items())[:-1]))
    assert_refused(run("plan", REPO, "--rank", 8), f"lacks {list(parts)[-1]}")
    assert not hub.gets(next(iter(parts)))


def test_the_download_breaks_off(hub: HubServer, whole: bytes, run: Any, tmp_path: Path) -> None:
    hub.add(REPO, {"tiny-Q8_0.gguf": whole})
    hub.fail("tiny-Q8_0.gguf", status=404)
    refused = run(REPO, "--rank", 8, "--out", tmp_path / "out")
    assert_refused(refused, "tiny-Q8_0.gguf", code=1)
    assert not (tmp_path / "out").exists()
