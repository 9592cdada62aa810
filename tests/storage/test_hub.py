"""Reading from and pushing to the Hub, with the real client against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi, constants, hf_hub_download
from safetensors.numpy import save

from svdconvert.errors import InputError, JobError
from svdconvert.storage.headers import read_header
from svdconvert.storage.hub_push import check_push, push_folder
from svdconvert.storage.hub_source import HubSource, download_model
from svdconvert.storage.opening import local_folder, open_source
from svdconvert.tensors import TensorInfo

from support.hub_server import ALWAYS, READ_TOKEN, STRANGER_TOKEN, WRITE_TOKEN, HubServer, use_hub  # isort: skip

REPO = "owner/tiny"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
HIDDEN, LAYERS, VOCAB = 64, 2, 4096
CONFIG = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "torch_dtype": "float16",
}
SMALL_FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "README.md": b"---\nlicense: apache-2.0\n---\n# Tiny\n",
    "tokenizer.json": b'{"version": "1.0"}',
    "generation_config.json": b"{}",
}


def gpt_neox_tensors() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A random GPT-NeoX as it lies on the Hub, legacy buffers and all, in two shards."""
    random = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float16)

    shards: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    shards[0]["gpt_neox.embed_in.weight"] = weights(VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = {}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            block |= {f"{norm}.weight": weights(HIDDEN), f"{norm}.bias": weights(HIDDEN)}
        for name, out, inp in (
            ("attention.query_key_value", 3 * HIDDEN, HIDDEN),
            ("attention.dense", HIDDEN, HIDDEN),
            ("mlp.dense_h_to_4h", 4 * HIDDEN, HIDDEN),
            ("mlp.dense_4h_to_h", HIDDEN, 4 * HIDDEN),
        ):
            block |= {f"{name}.weight": weights(out, inp), f"{name}.bias": weights(out)}
        block["attention.bias"] = np.tril(np.ones((1, 1, 32, 32), dtype=bool))
        block["attention.masked_bias"] = np.array(-1e9, dtype=np.float32)
        block["attention.rotary_emb.inv_freq"] = np.ones(4, dtype=np.float32)
        shards[layer].update({f"gpt_neox.layers.{layer}.{name}": value for name, value in block.items()})
    shards[1]["gpt_neox.final_layer_norm.weight"] = weights(HIDDEN)
    shards[1]["gpt_neox.final_layer_norm.bias"] = weights(HIDDEN)
    shards[1]["embed_out.weight"] = weights(VOCAB, HIDDEN)
    return shards


def index_file(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}).encode()


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, bytes]:
    """Files of a sharded safetensors repository."""
    shards = gpt_neox_tensors()
    weight_map = {name: file for file, tensors in zip(SHARDS, shards, strict=True) for name in tensors}
    weights = {file: save(tensors, {"format": "pt"}) for file, tensors in zip(SHARDS, shards, strict=True)}
    return {**SMALL_FILES, INDEX: index_file(weight_map), **weights}


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a repository that has nothing but a pickle."""
    import torch

    path = tmp_path_factory.mktemp("pickled") / "pytorch_model.bin"
    first, second = gpt_neox_tensors()
    torch.save({name: torch.from_numpy(value) for name, value in {**first, **second}.items()}, path)
    return {**SMALL_FILES, path.name: path.read_bytes()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """An empty Hub that this process uses, without a token, and no waiting between attempts."""
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where weight files are downloaded to."""
    return tmp_path / "job" / "source"


@pytest.fixture
def result(tmp_path: Path, checkpoint: dict[str, bytes]) -> Path:
    """A finished folder with its job folder and left-overs."""
    path = tmp_path / "result"
    (path / ".svdconvert" / "source").mkdir(parents=True)
    (path / ".svdconvert" / "job.json").write_text("{}")
    (path / ".svdconvert" / "source" / "model.safetensors").write_bytes(b"source shard")
    (path / "model-00001-of-00002.safetensors.tmp").write_bytes(b"half")
    for name, data in checkpoint.items():
        (path / name).write_bytes(data)
    return path


def log_in(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)


def cached(tmp_path: Path, commit: str, file: str) -> Path:
    return tmp_path / "home" / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / commit / file


def pushed(result: Path) -> dict[str, bytes]:
    """What a push of a folder must put on the Hub."""
    return {
        entry.name: entry.read_bytes()
        for entry in result.iterdir()
        if entry.is_file() and not entry.name.endswith(".tmp")
    }


def message(caught: pytest.ExceptionInfo[Exception], *words: str) -> str:
    """Check that an error is one line and has certain words, and return it."""
    text = str(caught.value)
    assert "\n" not in text
    assert "Traceback" not in text
    for word in words:
        assert word in text
    return text


# --- opening


def test_open_reads_headers_only(hub: HubServer, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(REPO, checkpoint)
    source = open_source(REPO)
    assert source.files == SHARDS
    assert source.config == CONFIG
    assert source.side_files == ["generation_config.json", "tokenizer.json"]
    assert source.download_bytes == {file: len(checkpoint[file]) for file in SHARDS}
    for file in SHARDS:
        (tmp_path / file).write_bytes(checkpoint[file])
        for info in read_header(tmp_path / file):
            assert source.tensors[info.name] == info
        assert [r.status for r in hub.gets(file)] == [206]
        assert hub.gets(file)[0].sent <= 64 * 1024 < len(checkpoint[file]) / 5
    assert set(source.tensors) == set(json.loads(checkpoint[INDEX])["weight_map"])
    assert source.tensors["gpt_neox.layers.0.attention.bias"] == TensorInfo(
        "gpt_neox.layers.0.attention.bias",
        "BOOL",
        (1, 1, 32, 32),
        SHARDS[0],
        source.tensors["gpt_neox.layers.0.attention.bias"].start,
    )
    assert hub.sent() < 200_000


def test_a_header_longer_than_the_first_request(
    hub: HubServer, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, checkpoint)
    whole = HubSource(REPO, download_folder=None).tensors
    monkeypatch.setattr("svdconvert.storage.hub_source._HEADER_GUESS", 100)
    before = len(hub.gets(SHARDS[0]))
    assert HubSource(REPO, download_folder=None).tensors == whole
    ranges = [r.range for r in hub.gets(SHARDS[0])[before:]]
    length = int.from_bytes(checkpoint[SHARDS[0]][:8], "little")
    assert ranges == ["bytes=0-99", f"bytes=100-{length + 7}"]


def test_single_file_repository(hub: HubServer, folder: Path) -> None:
    first, second = gpt_neox_tensors()
    data = save({**first, **second})
    hub.add(REPO, {"config.json": SMALL_FILES["config.json"], "model.safetensors": data, "onnx/model.onnx": b""})
    source = HubSource(REPO, download_folder=folder)
    assert source.files == ["model.safetensors"]
    assert source.card() is None
    assert source.path("model.safetensors").read_bytes() == data


def test_commit_is_pinned(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    old = hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    new = hub.add(REPO, {**checkpoint, "README.md": b"# New\n", SHARDS[0]: checkpoint[SHARDS[1]]})
    assert new != old
    assert source.identity() == {"repo": REPO, "commit": old}
    assert (source.name, source.repo, source.commit) == (REPO, REPO, old)
    assert source.path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]
    assert source.card() == checkpoint["README.md"].decode()


def test_revision(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    main = hub.add(REPO, checkpoint)
    branch = hub.add(REPO, {**checkpoint, "README.md": b"# Branch\n"}, branch="step/1000")
    assert HubSource(REPO, "step/1000", download_folder=None).commit == branch
    assert HubSource(REPO, "step/1000", download_folder=None).card() == "# Branch\n"
    assert HubSource(REPO, main, download_folder=None).commit == main


def test_environment_variables_are_enough(hub: HubServer, checkpoint: dict[str, bytes], tmp_path: Path) -> None:
    """A fresh process, as the command line is one."""
    commit = hub.add(REPO, checkpoint, private=True)
    script = (
        "from svdconvert.storage.opening import open_source; s = open_source('owner/tiny'); "
        "print(s.commit, len(s.tensors))"
    )
    count = len(json.loads(checkpoint[INDEX])["weight_map"])
    # use_hub has set the variables in this process, and so in its children.
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "HF_TOKEN": WRITE_TOKEN, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.stdout.split() == [commit, str(count)], done.stderr


# --- refusals


def test_gated(hub: HubServer, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, checkpoint, gated=True)
    for token in ("", STRANGER_TOKEN):
        log_in(monkeypatch, token)
        with pytest.raises(InputError) as caught:
            HubSource(REPO, download_folder=None)
        message(caught, "gated", f"accept its conditions at {hub.url}/{REPO}", "hf auth login")
    hub.users[STRANGER_TOKEN]["granted"].add(REPO)
    assert HubSource(REPO, download_folder=None).files == SHARDS


@pytest.mark.parametrize("token", ["", STRANGER_TOKEN])
@pytest.mark.parametrize("private", [False, True])
def test_not_found_or_private(
    hub: HubServer, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, token: str, private: bool
) -> None:
    if private:
        hub.add(REPO, checkpoint, private=True)
    log_in(monkeypatch, token)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, REPO, "does not exist on the Hub or is private")


def test_unknown_revision(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    hub.add(REPO, checkpoint)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, "v2", download_folder=None)
    message(caught, "no revision 'v2'")


def test_invalid_token(hub: HubServer, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, checkpoint)
    wrong = "hf_" + "x" * 20
    log_in(monkeypatch, wrong)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    assert wrong not in message(caught, "does not accept the Hugging Face token")


def test_no_network(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    hub.close()
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, f"connection to {hub.url} failed", "check the network")
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    message(caught, f"connection to {hub.url} failed", "the same command continues")


@pytest.mark.parametrize(
    ("status", "words"), [(503, "answered with error 503"), (429, "limits the number"), (418, "refused the request")]
)
def test_errors_of_the_server(hub: HubServer, checkpoint: dict[str, bytes], status: int, words: str) -> None:
    hub.add(REPO, checkpoint)
    hub.fail(f"/api/models/{REPO}", status=status, times=ALWAYS)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, words)


@pytest.mark.parametrize("body", [b"<html>Please log in to the Wi-Fi</html>", b"{}"])
def test_not_a_hub(hub: HubServer, body: bytes) -> None:
    hub.fail(f"/api/models/{REPO}", status=200, body=body)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, f"{hub.url} does not answer as a Hub does", "HF_ENDPOINT")


def test_a_passing_error_is_survived(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    hub.fail("config.json", status=503, method="HEAD")
    hub.fail(SHARDS[0], status=503)
    source = HubSource(REPO, download_folder=folder)
    hub.fail(SHARDS[0], status=503)
    hub.slow(SHARDS[0], seconds=0.2)
    assert source.path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]
    assert all(fault.times == 0 for fault in hub.faults)


def test_offline(hub: HubServer, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commit = hub.add(REPO, checkpoint)
    home = tmp_path / "home"
    use_hub(monkeypatch, hub, home, offline=True)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, "HF_HUB_OFFLINE", f"hf download {REPO}")
    use_hub(monkeypatch, hub, home)
    for name in ("config.json", INDEX, SHARDS[0]):
        hf_hub_download(REPO, name)
    use_hub(monkeypatch, hub, home, offline=True)
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, "HF_HUB_OFFLINE", f"lacks {SHARDS[1]}")
    use_hub(monkeypatch, hub, home)
    hf_hub_download(REPO, SHARDS[1])
    use_hub(monkeypatch, hub, home, offline=True)
    asked = len(hub.requests)
    source = HubSource(REPO, download_folder=None)
    assert source.commit == commit
    assert source.path(SHARDS[1]).read_bytes() == checkpoint[SHARDS[1]]
    assert len(hub.requests) == asked
    with pytest.raises(JobError) as caught:
        source.path("tokenizer.json")
    message(caught, "HF_HUB_OFFLINE", "tokenizer.json")


def test_index_names_a_missing_shard(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    hub.add(REPO, {name: data for name, data in checkpoint.items() if name != SHARDS[1]})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, f"lacks {SHARDS[1]}", INDEX)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors"])
def test_index_leads_out_of_the_folder(hub: HubServer, checkpoint: dict[str, bytes], file: str) -> None:
    hub.add(REPO, {**checkpoint, INDEX: index_file({"embed_out.weight": file})})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, repr(file), "do not trust")


def test_index_and_shards_disagree(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    """transformers takes of an index only which files there are."""
    weight_map = json.loads(checkpoint[INDEX])["weight_map"]
    weight_map["embed_out.weight"] = SHARDS[0]
    hub.add(REPO, {**checkpoint, INDEX: index_file(weight_map)})
    assert HubSource(REPO, download_folder=None).tensors["embed_out.weight"].file == SHARDS[1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-100], "truncated or damaged"),
        (lambda data: data[:200], "truncated inside its header"),
        (lambda data: b"", "truncated"),
        (lambda data: b"<html>not found</html>", "not a safetensors file"),
    ],
)
def test_damaged_shard_on_the_hub(hub: HubServer, checkpoint: dict[str, bytes], damage, words: str) -> None:
    hub.add(REPO, {**checkpoint, SHARDS[0]: damage(checkpoint[SHARDS[0]])})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, SHARDS[0], words)


@pytest.mark.parametrize(
    ("dropped", "words"), [(["config.json"], "no config.json"), ([INDEX, *SHARDS], "no weights"), ([INDEX], "index")]
)
def test_incomplete_repository(hub: HubServer, checkpoint: dict[str, bytes], dropped: list[str], words: str) -> None:
    hub.add(REPO, {name: data for name, data in checkpoint.items() if name not in dropped})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, REPO, words)


def test_weights_in_subfolders_are_other_models(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    hub.add(REPO, {**SMALL_FILES, "unet/model.safetensors": checkpoint[SHARDS[0]]})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, f"{REPO} has no weights")


def test_config_is_no_json(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    hub.add(REPO, {**checkpoint, "config.json": b"<html>"})
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=None)
    message(caught, "config.json", "not valid JSON")


# --- files


def test_shards_come_one_at_a_time(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    planned = len(hub.requests)
    for file in SHARDS:
        path = source.path(file)
        assert source.path(file) == path
        assert path.read_bytes() == checkpoint[file]
        # Nothing but this shard takes up room, whatever the client notes beside it.
        assert [p.name for p in folder.rglob("*.safetensors")] == [file]
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < len(checkpoint[file]) + 2000
        source.release(file)
        assert not list(folder.iterdir())
    fetched = [r.file for r in hub.requests[planned:] if r.method == "GET" and r.status == 200]
    assert fetched == SHARDS
    assert not list((folder.parent.parent / "home").rglob("*.safetensors"))


def test_released_file_can_be_fetched_again(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    source.path(SHARDS[0])
    source.release(SHARDS[0])
    source.release(SHARDS[0])
    assert source.path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]


def test_release_keeps_the_other_shard(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    first, second = (source.path(file) for file in SHARDS)
    source.release(SHARDS[0])
    assert not first.exists()
    assert second.read_bytes() == checkpoint[SHARDS[1]]
    # What the client noted about the second one spares the next run its download.
    assert list(folder.rglob(f"{SHARDS[1]}.metadata"))
    (folder / "tokenizer.json").write_bytes(b"not ours")
    source.release("tokenizer.json")
    assert second.exists()
    assert (folder / "tokenizer.json").exists()


def test_finished_download_is_found_again(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    """A killed job leaves a shard; the next run does not fetch it again."""
    hub.add(REPO, checkpoint)
    HubSource(REPO, download_folder=folder).path(SHARDS[0])
    again = HubSource(REPO, download_folder=folder)
    before = hub.sent(SHARDS[0])
    assert again.path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]
    assert hub.sent(SHARDS[0]) == before
    again.release(SHARDS[0])
    assert not list(folder.iterdir())


def test_cached_file_is_used_and_kept(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    commit = hub.add(REPO, checkpoint)
    hf_hub_download(REPO, SHARDS[0])
    source = HubSource(REPO, download_folder=folder)
    assert source.download_bytes == {SHARDS[1]: len(checkpoint[SHARDS[1]])}
    before = hub.sent(SHARDS[0])
    path = source.path(SHARDS[0])
    assert path == cached(tmp_path, commit, SHARDS[0])
    source.release(SHARDS[0])
    assert path.read_bytes() == checkpoint[SHARDS[0]]
    assert hub.sent(SHARDS[0]) == before
    assert not folder.exists()


def test_side_files_go_through_the_cache(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, tmp_path: Path
) -> None:
    commit = hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    for file in source.side_files:
        assert source.path(file) == cached(tmp_path, commit, file)
        assert source.path(file).read_bytes() == checkpoint[file]
        source.release(file)
        assert source.path(file).exists()
    assert not folder.exists()


def test_file_that_does_not_exist(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    with pytest.raises(JobError) as caught:
        source.path("vocab.json")
    message(caught, f"{REPO} has no vocab.json")


def test_token_stays_on_the_hub(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, checkpoint, private=True)
    log_in(monkeypatch, READ_TOKEN)
    HubSource(REPO, download_folder=folder).path(SHARDS[0])
    storage = [r for r in hub.requests if r.path.startswith("/cdn/")]
    assert len(storage) == 3
    assert all(r.token is None for r in storage)


def test_cut_once_is_resumed(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    # The client keeps whole chunks only, and those are larger than these shards.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    before = len(hub.gets(SHARDS[0]))
    hub.cut(SHARDS[0], after=300_000)
    assert source.path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]
    first, second = hub.gets(SHARDS[0])[before:]
    assert (first.range, first.sent) == (None, 300_000)
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 300_000
    assert second.sent == len(checkpoint[SHARDS[0]]) - start
    source.release(SHARDS[0])
    assert not list(folder.iterdir())


def test_cut_always_ends(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    before = len(hub.gets(SHARDS[0]))
    hub.cut(SHARDS[0], after=0, times=ALWAYS)
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    message(caught, "failed", "the same command continues")
    assert 3 <= len(hub.gets(SHARDS[0])) - before <= 30
    assert not (folder / SHARDS[0]).exists()
    hub.faults.clear()
    assert HubSource(REPO, download_folder=folder).path(SHARDS[0]).read_bytes() == checkpoint[SHARDS[0]]


def test_retries_are_ours_too(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older clients give up at the first broken connection."""
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    tries = []

    def broken(*args: object, **kwargs: object) -> str:
        tries.append(1)
        raise ConnectionResetError("peer")

    monkeypatch.setattr(HfApi, "hf_hub_download", broken)
    with pytest.raises(JobError):
        source.path(SHARDS[0])
    assert len(tries) == 3


def test_disk_full(hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    tries = []

    def full(*args: object, **kwargs: object) -> str:
        tries.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HfApi, "hf_hub_download", full)
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    message(caught, "the disk is full", SHARDS[0], "the same command continues")
    assert len(tries) == 1


def test_secrets_are_not_repeated(
    hub: HubServer, checkpoint: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    log_in(monkeypatch, "a-token-of-another-form")

    def broken(*args: object, **kwargs: object) -> str:
        raise RuntimeError(
            f"Data processing error for a-token-of-another-form, {WRITE_TOKEN} at "
            "https://cdn.example/file?Signature=abcdef&Key=1\nmore"
        )

    monkeypatch.setattr(HfApi, "hf_hub_download", broken)
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    text = message(caught, "Data processing error", "https://cdn.example/file")
    assert "another-form" not in text
    assert WRITE_TOKEN not in text
    assert "Signature" not in text


def test_download_that_is_not_what_was_planned(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    commit = hub.add(REPO, checkpoint)
    source = HubSource(REPO, download_folder=folder)
    good = checkpoint[SHARDS[0]]
    # Of the right length and a valid file, but types or names have changed places.
    bad = good.replace(b'"gpt_neox.layers.0.mlp.dense_4h_to_h.bias"', b'"gpt_neox.layers.0.mlp.dense_4h_to_h.bjas"', 1)
    assert bad != good
    hub.objects[hashlib.sha256(bad).hexdigest()] = bad
    hub.repos[REPO].commits[commit][SHARDS[0]] = bad
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    message(caught, SHARDS[0], "run the same command to fetch it again")
    assert not (folder / SHARDS[0]).exists()
    hub.repos[REPO].commits[commit][SHARDS[0]] = good
    assert source.path(SHARDS[0]).read_bytes() == good


def test_damaged_file_in_the_cache(hub: HubServer, checkpoint: dict[str, bytes], folder: Path) -> None:
    hub.add(REPO, checkpoint)
    path = Path(hf_hub_download(REPO, SHARDS[0]))
    source = HubSource(REPO, download_folder=folder)
    path.write_bytes(b"")
    with pytest.raises(JobError) as caught:
        source.path(SHARDS[0])
    message(caught, str(path), "delete it")
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=folder)
    message(caught, f"delete {path}")
    assert path.exists()


# --- whole models


def test_download_model(
    hub: HubServer, checkpoint: dict[str, bytes], pickled: dict[str, bytes], tmp_path: Path
) -> None:
    """Everything that belongs to the model, and its weights in one format only."""
    model = {**checkpoint, "modeling_x.py": b"pass\n", "svdconvert.json": b"{}"}
    other = {"pytorch_model.bin": pickled["pytorch_model.bin"], "onnx/model.onnx": b"x", "optimizer.pt": b"x"}
    hub.add(REPO, {"config.json": b"{}"})
    commit = hub.add(REPO, {**model, **other}, branch="v1")
    path = local_folder(REPO, "v1")
    assert path == cached(tmp_path, commit, "config.json").parent
    assert {entry.name: entry.read_bytes() for entry in path.iterdir()} == model
    assert local_folder(str(path)) == path
    sent = hub.sent(SHARDS[0])
    assert download_model(REPO, "v1") == path
    assert hub.sent(SHARDS[0]) == sent


def test_download_pickled_model(hub: HubServer, pickled: dict[str, bytes]) -> None:
    hub.add(REPO, pickled)
    path = download_model(REPO)
    assert (path / "pytorch_model.bin").read_bytes() == pickled["pytorch_model.bin"]


def test_download_model_fails(hub: HubServer, checkpoint: dict[str, bytes]) -> None:
    with pytest.raises(InputError) as caught:
        download_model(REPO)
    message(caught, f"{REPO} does not exist")
    hub.add(REPO, checkpoint)
    hub.cut(SHARDS[1], after=0, times=ALWAYS)
    with pytest.raises(JobError) as caught:
        download_model(REPO)
    message(caught, "the same command continues")
    hub.faults.clear()
    sent = hub.sent(SHARDS[0])
    assert (download_model(REPO) / SHARDS[1]).read_bytes() == checkpoint[SHARDS[1]]
    assert hub.sent(SHARDS[0]) == sent


# --- pickles


def test_pickles_cannot_be_planned_from_afar(hub: HubServer, pickled: dict[str, bytes]) -> None:
    hub.add(REPO, pickled, branch="old")
    with pytest.raises(InputError) as caught:
        HubSource(REPO, "old", download_folder=None)
    message(caught, "pytorch_model.bin", f"hf download {REPO} --revision old --local-dir DIR")
    assert not hub.gets("pytorch_model.bin")


def test_pickles_are_downloaded_first(
    hub: HubServer, pickled: dict[str, bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(REPO, pickled)
    with caplog.at_level("WARNING", "svdconvert"):
        source = HubSource(REPO, download_folder=folder)
    assert any("pytorch_model.bin" in record.getMessage() for record in caplog.records)
    assert source.pickled
    assert source.files == ["pytorch_model.bin"]
    expected = gpt_neox_tensors()
    assert {name: info.shape for name, info in source.tensors.items()} == {
        name: value.shape for shard in expected for name, value in shard.items()
    }
    path = source.path("pytorch_model.bin")
    assert path == (folder / "pytorch_model.bin").resolve()
    assert len(hub.gets("pytorch_model.bin")) == 1
    source.release("pytorch_model.bin")
    assert not list(folder.iterdir())


def test_pickles_that_do_not_fit_are_not_begun(
    hub: HubServer, pickled: dict[str, bytes], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, pickled)
    size = len(pickled["pytorch_model.bin"])
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    with pytest.raises(InputError) as caught:
        HubSource(REPO, download_folder=folder)
    message(caught, "free, 1 B too little", REPO)
    assert not hub.gets("pytorch_model.bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    HubSource(REPO, download_folder=folder)
    # What lies there from an interrupted run needs no room again.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert HubSource(REPO, download_folder=folder).files == ["pytorch_model.bin"]


def test_cached_pickles_can_be_planned(hub: HubServer, pickled: dict[str, bytes]) -> None:
    hub.add(REPO, pickled)
    hf_hub_download(REPO, "pytorch_model.bin")
    source = HubSource(REPO, download_folder=None)
    assert source.tensors["embed_out.weight"].shape == (VOCAB, HIDDEN)


# --- pushing


def test_push_to_a_new_repository(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/new")
    assert set(hub.files("owner/new")) == {".gitattributes"}
    url = push_folder(result, "owner/new", message="Add factored weights")
    head = hub.repos["owner/new"].refs["main"]
    assert url == f"{hub.url}/owner/new/commit/{head}"
    assert hub.repos["owner/new"].messages[head] == "Add factored weights"
    assert not hub.repos["owner/new"].private
    files = hub.files("owner/new")
    assert files.pop(".gitattributes")
    assert files == pushed(result)
    assert not any(".svdconvert" in name or name.endswith(".tmp") for name in files)


def test_push_without_check_creates_the_repository(
    hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    push_folder(result, "team/new", private=True, message="m")
    assert hub.repos["team/new"].private
    assert hub.files("team/new")[SHARDS[1]] == (result / SHARDS[1]).read_bytes()


def test_push_to_an_existing_repository(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards that the folder does not have any more go away, everything else of the owner's stays."""
    kept = {
        ".gitattributes": b"",
        "notes.md": b"mine",
        "adapter_model.safetensors": b"a",
        "onnx/model.safetensors": b"b",
    }
    stale = {"model-00003-of-00003.safetensors": b"c", "model.safetensors": b"d"}
    hub.add("owner/old", {**kept, **stale, "config.json": b"old"})
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/old")
    push_folder(result, "owner/old", message="m")
    assert hub.files("owner/old") == {**kept, **pushed(result)}


def test_push_again_sends_nothing(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    url = push_folder(result, "owner/new", message="m")
    puts = hub.paths("PUT")
    assert push_folder(result, "owner/new", message="m") == url
    assert hub.paths("PUT") == puts


def test_single_file_replaces_the_index(
    hub: HubServer, checkpoint: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that stays would make the next reader look for shards that are gone."""
    hub.add("owner/old", checkpoint)
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"single")
    log_in(monkeypatch, WRITE_TOKEN)
    push_folder(folder, "owner/old", message="m")
    assert set(hub.files("owner/old")) == {*SMALL_FILES, "model.safetensors"}


def test_push_to_a_branch(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = hub.add("owner/old", {"README.md": b"old"})
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/old", revision="rank-64")
    check_push("owner/old", revision="rank-64")
    push_folder(result, "owner/old", revision="rank-64", message="m")
    assert hub.repos["owner/old"].refs["main"] == main
    assert hub.files("owner/old", "rank-64") == pushed(result)


def test_private(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/new", private=True)
    assert hub.repos["owner/new"].private
    check_push("owner/new", private=True)
    check_push("owner/new")
    assert hub.repos["owner/new"].private


def test_private_is_not_pushed_to_a_public_repository(
    hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hub.add("owner/open", {"README.md": b"x"})
    log_in(monkeypatch, WRITE_TOKEN)
    for push in (
        lambda: check_push("owner/open", private=True),
        lambda: push_folder(result, "owner/open", private=True, message="m"),
    ):
        with pytest.raises(InputError) as caught:
            push()
        message(caught, "owner/open exists and is public", "settings")
    assert hub.repos["owner/open"].refs["main"] == before


def test_push_without_token(hub: HubServer) -> None:
    with pytest.raises(InputError) as caught:
        check_push("owner/new")
    message(caught, "no Hugging Face token", "hf auth login")
    assert not hub.repos


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (READ_TOKEN, "can only read"),
        (STRANGER_TOKEN, "does not permit"),
        ("hf_" + "x" * 20, "does not accept the Hugging Face token"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_push_without_permission(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, token: str, words: str, exists: bool
) -> None:
    if exists:
        hub.add("owner/model", {"README.md": b"x"})
    log_in(monkeypatch, token)
    with pytest.raises(InputError) as caught:
        check_push("owner/model")
    assert token not in message(caught, words)
    assert len(hub.repos) == exists


def test_fine_grained_token_that_may_not_write(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its role says nothing, so only the Hub's answer tells."""
    hub.add("owner/model", {"README.md": b"x"})
    hub.users[READ_TOKEN]["role"] = "fineGrained"
    log_in(monkeypatch, READ_TOKEN)
    with pytest.raises(InputError) as caught:
        check_push("owner/model")
    message(caught, "does not permit")


def test_hub_without_write_check(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("/auth-check/write", status=404, times=ALWAYS)
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/new")
    assert "owner/new" in hub.repos


@pytest.mark.parametrize("repo", ["new", "owner/new/3", "owner/a--b", "../x/y", ""])
def test_push_to_an_invalid_name(hub: HubServer, monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    with pytest.raises(InputError) as caught:
        check_push(repo)
    message(caught, repr(repo), "owner/name")
    assert not hub.repos


def test_push_offline(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_hub(monkeypatch, hub, tmp_path / "home", token=WRITE_TOKEN, offline=True)
    with pytest.raises(InputError) as caught:
        check_push("owner/new")
    message(caught, "HF_HUB_OFFLINE")
    assert not hub.requests


def test_broken_card_is_told(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result / "README.md").write_text("---\nlicense: x\n")
    log_in(monkeypatch, WRITE_TOKEN)
    with pytest.raises(JobError) as caught:
        push_folder(result, "owner/new", message="m")
    message(caught, "Invalid metadata in README.md")


def test_upload_cut_always_then_continued(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    check_push("owner/new")
    shards = {file: hashlib.sha256((result / file).read_bytes()).hexdigest() for file in SHARDS}
    hub.cut(f"/lfs/{shards[SHARDS[1]]}", after=200_000, times=ALWAYS, method="PUT")
    with pytest.raises(JobError) as caught:
        push_folder(result, "owner/new", message="m")
    assert WRITE_TOKEN not in message(caught, "the same command continues")
    assert set(hub.files("owner/new")) == {".gitattributes"}
    assert shards[SHARDS[1]] not in hub.objects
    done = [oid for oid in shards.values() if oid in hub.objects]
    hub.faults.clear()
    before = len(hub.requests)
    push_folder(result, "owner/new", message="m")
    sent = [r.path for r in hub.requests[before:] if r.method == "PUT"]
    assert sent == [f"/lfs/{oid}" for oid in shards.values() if oid not in done]
    files = hub.files("owner/new")
    assert files.pop(".gitattributes")
    assert files == pushed(result)


def test_upload_cut_once_is_repeated(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    hub.cut("/lfs/", after=200_000, method="PUT")
    push_folder(result, "owner/new", message="m")
    assert {name: hub.files("owner/new")[name] for name in SHARDS} == {
        name: (result / name).read_bytes() for name in SHARDS
    }


def test_commit_fails(hub: HubServer, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_in(monkeypatch, WRITE_TOKEN)
    hub.fail("/commit/", status=500, times=ALWAYS, method="POST")
    with pytest.raises(JobError) as caught:
        push_folder(result, "owner/new", message="m")
    message(caught, "error 500", "the same command continues")
    puts = hub.paths("PUT")
    hub.faults.clear()
    hub.fail("/commit/", status=500, method="POST")
    push_folder(result, "owner/new", message="m")
    assert hub.paths("PUT") == puts
    assert SHARDS[1] in hub.files("owner/new")
