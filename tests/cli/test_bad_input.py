"""Everything that is refused: one sentence, the right exit code, and nothing left that could be taken for a model."""

from __future__ import annotations

import collections
import errno
import io
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers  # noqa: F401 - its loggers keep the stderr of their import, which must not be that of one test
from safetensors.torch import load_file, save_file
from support.checkpoints import HIDDEN, random_tensors, read_config, read_weights, write_checkpoint
from support.hub_server import ALWAYS, HubServer, use_hub
from support.refusals import assert_refused, edit_json

from svdconvert.cli.app import main

DENSE_LAYER = "gpt_neox.layers.1.attention.dense.weight"
EMBEDDING = "gpt_neox.embed_in.weight"
NORM = "gpt_neox.layers.2.input_layernorm.bias"
Run = Callable[..., SimpleNamespace]


def assert_no_model(out: Path) -> None:
    """Nothing has its final name."""
    if out.is_dir():
        found = [p.name for p in out.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".py", ".md")]
        assert not found


# --- the source


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sharded") / "model", shards=3)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def quantised(parts: Mapping[str, torch.dtype]) -> Callable[[dict[str, torch.Tensor]], object]:
    """What a quantiser leaves of a weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[DENSE_LAYER]
        tensors |= {f"{DENSE_LAYER.removesuffix('weight')}{name}": torch.zeros(8, 8).to(d) for name, d in parts.items()}

    return change


def put(name: str, value: float) -> Callable[[Path], None]:
    """One entry of one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return edit_tensors(change)


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return edit


def weights(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(data)

    return write


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def truncate(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, keep(path.stat().st_size))

    return truncate


def remove(pattern: str) -> Callable[[Path], None]:
    def unlink(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            path.unlink()

    return unlink


def pickled(value: object, **options: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(value, folder / "pytorch_model.bin", **options)

    return write


SINGLE_FILE_FAULTS = {
    "unknown architecture": (
        edit_config(model_type="codegen"),
        "'codegen', which is not",
        "types apertus, arcee, bloom, ",
    ),
    "no architecture": (
        edit_config(model_type=None),
        "model_type None, which is not",
        "types apertus, arcee, bloom, ",
    ),
    "experts": (
        edit_config(model_type="dbrx", ffn_config={"moe_num_experts": 16}),
        "'dbrx', a mixture of experts, which is not",
    ),
    "hidden experts": (
        edit_config(model_type="some_vl_moe", text_config={"num_experts": 60}),
        "'some_vl_moe', a mixture of experts, which is not",
    ),
    "images": (
        edit_config(model_type="llava_next", vision_config={}, text_config={"model_type": "llama"}),
        "'llava_next', a model that sees or hears, which is not",
    ),
    "encoder": (edit_config(model_type="t5", is_encoder_decoder=True), "'t5', an encoder with a decoder, which is not"),
    **{
        f"quantised config, {method}": (
            edit_config(quantization_config={"quant_method": method}),
            f"already quantised ({method})",
            "convert the unquantised model",
        )
        for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors")
    },
    "quantised config of old": (
        edit_config(compression_config={"quant_method": "compressed-tensors"}),
        "already quantised (compressed-tensors)",
    ),
    **{
        f"quantised weights, {name}": (edit_tensors(change), part, "quantised checkpoint")
        for name, change, part in (
            (
                "gptq",
                quantised({"qweight": torch.int32, "scales": torch.float16, "g_idx": torch.int32}),
                "attention.dense.",
            ),
            (
                "awq",
                quantised({"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}),
                "attention.dense.q",
            ),
            ("fp8", quantised({"weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32}), DENSE_LAYER),
            ("nf4", quantised({"weight": torch.uint8, "weight.absmax": torch.float32}), DENSE_LAYER),
        )
    },
    "int8 weights": (
        edit_tensors(lambda t: t.update({DENSE_LAYER: torch.ones(HIDDEN, HIDDEN, dtype=torch.int8)})),
        DENSE_LAYER,
        "int8",
        "quantised",
    ),
    "ranks in a dense config": (edit_config(svd_ranks={}), "already factored"),
    "no config": (remove("config.json"), "config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json", "JSON"),
    "config is no object": (lambda f: (f / "config.json").write_text("[]"), "config.json", "JSON object"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json"),
    "config without sizes": (edit_config(hidden_size=None), "config.json", "hidden_size"),
    "config of odd types": (edit_config(num_hidden_layers="three"), "config.json"),
    "no weights": (remove("model.safetensors"), "has no weights", "model.safetensors"),
    "no known weight file": (
        lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"),
        "weights.safetensors",
        "model.safetensors.index.json",
    ),
    "empty weights": (weights(b""), "model.safetensors", "truncated"),
    "a web page": (weights(b"<!DOCTYPE html><html>" * 9), "model.safetensors", "not a safetensors file"),
    "header of nonsense": (weights(b"\x08" + bytes(7) + b"nonsense"), "model.safetensors", "header"),
    "cut data": (cut(lambda size: size - 1), "model.safetensors", "truncated"),
    "cut header": (cut(lambda size: 100), "model.safetensors", "truncated"),
    "extra data": (cut(lambda size: size + 1), "model.safetensors", "damaged"),
    "other model's config": (edit_config(hidden_size=128), "embed_out.weight", "[160, 64]", "[160, 128]"),
    "fewer layers than the config": (edit_config(num_hidden_layers=4), "says 4 layers", "weights of 3"),
    "more layers than the config": (edit_config(num_hidden_layers=2), "says 2 layers", "weights of 3"),
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), "lacks", NORM),
    "NaN in a matrix": (put(DENSE_LAYER, float("nan")), DENSE_LAYER, "NaN"),
    "infinity in a matrix": (put(DENSE_LAYER, float("inf")), DENSE_LAYER, "infinite"),
    "NaN in a copied tensor": (put(EMBEDDING, float("nan")), EMBEDDING, "NaN"),
    "infinity in a copied tensor": (put(NORM, float("-inf")), NORM, "infinite"),
    "pickle of a list": (pickled([torch.ones(2)]), "pytorch_model.bin", "dictionary of tensors"),
    "pickle of other things": (pickled({"step": 3}), "pytorch_model.bin", "dictionary of tensors"),
    "pickle of odd keys": (pickled({1: torch.ones(2)}), "pytorch_model.bin", "dictionary of tensors"),
    "pickle of a complex model": (pickled({"x": torch.ones(2, dtype=torch.complex64)}), "x", "complex64"),
    "pickle before torch 1.6": (
        pickled({"x": torch.ones(2)}, _use_new_zipfile_serialization=False),
        "pytorch_model.bin",
        "before 1.6",
    ),
    "pickle of nothing": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin",
    ),
}


@pytest.mark.parametrize("fault", SINGLE_FILE_FAULTS)
def test_faulty_source(fault: str, dense: Path, run: Run, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(dense, model)
    damage, *words = SINGLE_FILE_FAULTS[fault]
    damage(model)
    before = sorted(model.iterdir())
    assert_refused(run(model, "--rank", 16, "--device", "cpu", "--out", out), *words)
    assert_no_model(out)
    assert sorted(model.iterdir()) == before


FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"


def leave_out(file: str) -> Callable[[dict[str, Any]], Any]:
    def change(names: dict[str, Any]) -> None:
        for name in [name for name, where in names.items() if where == file]:
            del names[name]

    return change


def duplicate_tensor(folder: Path) -> None:
    first, second = load_file(folder / FIRST), load_file(folder / SECOND)
    name = next(iter(first))
    save_file(second | {name: first[name].clone()}, folder / SECOND, metadata={"format": "pt"})


SHARDED_FAULTS = {
    "missing shard": (remove(SECOND), SECOND, "fetch the missing"),
    "index leaves out a file": (edit_index(leave_out(SECOND)), "lacks", "incomplete"),
    "tensor in two files": (duplicate_tensor, "in both", FIRST, SECOND),
    "path upwards": (edit_index(lambda m: m.update({EMBEDDING: f"../outside/{FIRST}"})), "../outside", "do not trust"),
    "path into a folder": (edit_index(lambda m: m.update({EMBEDDING: f"sub/{FIRST}"})), "sub/", "do not trust"),
    "file is no text": (edit_index(lambda m: m.update({EMBEDDING: 3})), "do not trust"),
    "empty index": (edit_index(lambda m: m.clear()), "weight_map"),
    "index is no JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json", "JSON"),
}


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_faulty_sharded_source(fault: str, sharded: Path, run: Run, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(sharded, model)
    # What the paths out of the folder lead to is there and whole: only the path is wrong.
    shutil.copytree(sharded, tmp_path / "outside")
    shutil.copytree(sharded, model / "sub")
    damage, *words = SHARDED_FAULTS[fault]
    damage(model)
    assert_refused(run(model, "--rank", 16, "--device", "cpu", "--out", out), *words)
    assert not out.exists()


def test_absolute_path_in_the_index(sharded: Path, run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sharded, model)
    edit_index(lambda m: m.update({EMBEDDING: str(sharded / FIRST)}))(model)
    assert_refused(run(model, "--rank", 16, "--out", tmp_path / "out"), sharded / FIRST, "do not trust")


class Touches:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("command", ["convert", "plan"])
def test_a_malicious_pickle_is_not_run(form: str, command: str, dense: Path, run: Run, tmp_path: Path) -> None:
    model, out, trace = tmp_path / "model", tmp_path / "out", tmp_path / "it-ran"
    shutil.copytree(dense, model, ignore=shutil.ignore_patterns("*.safetensors"))
    content = {"gpt_neox.embed_in.weight": torch.ones(2), "x": Touches(trace)}
    if form == "bare":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Touches(trace)}))
    else:
        torch.save(content, model / "pytorch_model.bin", _use_new_zipfile_serialization=form == "zip")
    result = run(command, model, "--rank", 16, "--out", out)
    assert not trace.exists()
    assert_refused(result, "pytorch_model.bin", *(["foreign code"] if form == "zip" else []))
    assert not out.exists()
    # The trap works: only weights_only keeps it shut.
    with io.BytesIO(pickle.dumps(Touches(trace))) as data:
        pickle.load(data)
    assert trace.exists()


def test_already_factored(factored: Path, run: Run, tmp_path: Path) -> None:
    result = run(factored, "--rank", 8, "--out", tmp_path / "out")
    assert_refused(result, "already factored", "svdconvert densify")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["no-such-folder", "./no/such/folder", "/no/such/folder", "polyglot-ko-1.3"])
def test_no_such_model(model: str, run: Run, tmp_path: Path) -> None:
    result = run(model, "--rank", 16, "--out", tmp_path / "out")
    assert_refused(result, model, "no folder", "polyglot-ko-1.3b")


def test_model_is_a_file(dense: Path, run: Run, tmp_path: Path) -> None:
    result = run(dense / "model.safetensors", "--rank", 16, "--out", tmp_path / "out")
    assert_refused(result, "is a file", "folder that holds config.json")


def test_revision_of_a_local_folder(dense: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run(dense, "--rank", 16, "--revision", "main", "--out", tmp_path / "out"), "--revision")


# --- the request

REQUESTS = {
    "rank 0": (["--rank", 0], "--rank 0 is too small", "least is 1"),
    "rank -1": (["--rank", -1], "--rank -1 is too small", "least is 1"),
    "rank 0 by pattern": (["--rank", 8, "--rank", "attention.dense=0"], "--rank attention.dense=0 is too small"),
    "rank too large": (["--rank", 65], "rank 65 is larger than layers.0.attention", "highest is 64"),
    "rank too large by pattern": (["--rank", 8, "--rank", "attention.dense=65"], "rank 65", "64 x 64"),
    "rank abc": (["--rank", "abc"], "--rank abc is", "PATTERN=NUMBER"),
    "rank 1.5": (["--rank", "1.5"], "--rank 1.5 is"),
    "rank of nothing": (["--rank", "=8"], "--rank =8 is"),
    "rank without number": (["--rank", "attention.dense="], "--rank attention.dense= is"),
    "two ranks": (["--rank", 8, "--rank", 9], "--rank is given twice", "8 and 9"),
    "rank and keep": (
        ["--rank", 8, "--keep", 0.5],
        "exactly one of --rank, --keep, --params, --bytes, --fit, --max-loss and --max-kl",
    ),
    "keep and params": (["--keep", 0.5, "--params", "100K"], "exactly one of"),
    "no rank at all": ([], "exactly one of --rank, --keep, --params, --bytes, --fit, --max-loss and --max-kl"),
    "pattern without match": (["--rank", 8, "--rank", "mlp.nothing=4"], "mlp.nothing=4 matches no target", "layers.0."),
    "targets without match": (["--rank", 8, "--targets", "lm_head"], "--targets lm_head matches no", "attention.dense"),
    "rank pattern outside of the targets": (
        ["--rank", 8, "--targets", "mlp.*", "--rank", "attention.dense=4"],
        "attention.dense=4 matches no target",
    ),
    "rank no multiple": (
        ["--rank", 20, "--rank-multiple", 8],
        "--rank 20 does not go with --rank-multiple 8",
        "16 or 24",
    ),
    "multiple 0": (["--keep", 0.5, "--rank-multiple", 0], "--rank-multiple 0 is too small", "least is 1"),
    "multiple too large": (["--keep", 0.5, "--rank-multiple", 32], "--rank-multiple 32", "64 x 64", "smaller"),
    "multiple above what is kept": (["--keep", 0.1, "--rank-multiple", 8], "below the multiple 8", "keep at least"),
    "keep 0": (["--keep", 0], "--keep 0 must lie between 0 and 1"),
    "keep 1": (["--keep", 1], "--keep 1 must lie between"),
    "keep 1.5": (["--keep", 1.5], "--keep 1.5 must lie between"),
    "keep -0.5": (["--keep", -0.5], "--keep -0.5 must lie between"),
    "keep nan": (["--keep", "nan"], "--keep nan must lie between"),
    "keep next to nothing": (["--keep", 0.001], "leaves no rank", "keep at least"),
    "params too few": (["--params", 1000], "--params 1000 cannot be met"),
    "params too many": (["--params", "1B"], "--params 1000000000 cannot be met"),
    "params nonsense": (["--params", "many"], "--params many is", "1.4B"),
    "params negative": (["--params", "-5"], "--params -5 is"),
    "method": (["--rank", 8, "--method", "magic"], "--method magic is unknown; choose one of svd"),
    "shard size": (["--rank", 8, "--max-shard-size", "lots"], "--max-shard-size lots is", "5GB"),
    "shard size 0": (["--rank", 8, "--max-shard-size", "0"], "--max-shard-size 0 is"),
    "shard size -5GB": (["--rank", 8, "--max-shard-size", "-5GB"], "--max-shard-size -5GB is"),
    "shard size in bits": (["--rank", 8, "--max-shard-size", "5Gb/s"], "--max-shard-size 5Gb/s is"),
}
RUNS = {
    "device": (["--rank", 8, "--device", "tpu"], "--device tpu is unknown"),
    "device number": (["--rank", 8, "--device", "cuda:99"], "--device cuda:99 is not there", "--device cpu"),
}
USAGE = {
    "dtype": (["--rank", 8, "--dtype", "int8"], "--dtype", "int8", "bfloat16"),
    "keep": (["--keep", "half"], "--keep", "half"),
    "unknown option": (["--rank", 8, "--rnak", 8], "--rnak"),
}


@pytest.mark.parametrize("case", [*REQUESTS, *RUNS])
def test_impossible_request(case: str, dense: Path, run: Run, tmp_path: Path) -> None:
    options, *words = (REQUESTS | RUNS)[case]
    assert_refused(run(dense, *options, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", REQUESTS)
def test_impossible_request_to_plan(case: str, dense: Path, run: Run) -> None:
    """A plan refuses what the conversion would."""
    options, *words = REQUESTS[case]
    assert_refused(run("plan", dense, *options), *words)


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case: str, dense: Path, run: Run, tmp_path: Path) -> None:
    options, *words = USAGE[case]
    assert_refused(run(dense, *options, "--out", tmp_path / "out"), *words, usage=True)
    assert not (tmp_path / "out").exists()


def test_workers(dense: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run(dense, "--rank", 8, "--workers", 0, "--out", tmp_path / "out"), "--workers", usage=True)


def test_no_out(dense: Path, run: Run) -> None:
    assert_refused(run(dense, "--rank", 8), "--out is missing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(dense: Path, run: Run, tmp_path: Path) -> None:
    result = run(dense, "--rank", 8, "--device", "cuda", "--out", tmp_path / "out")
    assert_refused(result, "--device cuda is not there", "use --device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value"), [(DENSE_LAYER, 1e12), (EMBEDDING, 1e6), (NORM, -1e6)], ids=["target", "embedding", "norm"]
)
def test_float16_cannot_hold_it(name: str, value: float, fresh: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    from support.checkpoints import random_tensors

    tensors = random_tensors(dtype=torch.float32)
    tensors[name].view(-1)[3] = value
    model, out = fresh(tensors, config={"torch_dtype": "float32"}), tmp_path / "out"
    result = run(model, "--rank", 16, "--device", "cpu", "--dtype", "float16", "--out", out)
    assert_refused(result, name, "is not finite in float16", "--dtype")
    assert_no_model(out)
    # The same numbers are no problem where they fit.
    assert run(model, "--rank", 16, "--device", "cpu", "--dtype", "bfloat16", "--out", tmp_path / "wide").code == 0


# --- the output folder


def test_out_is_a_file(dense: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    for options in ([], ["--overwrite"]):
        assert_refused(run(dense, "--rank", 16, *options, "--out", out), out, "is a file")
    assert out.read_text() == "mine"


def test_out_is_somebody_elses(dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("mine")
    (out / "config.json").write_text("{}")
    args = [dense, "--rank", 16, "--device", "cpu", "--out", out]
    theirs = ["config.json", "model-00001-of-00002.safetensors"]
    assert_refused(run(*args), out, "did not write; give another folder")
    assert_refused(run(*args, "--overwrite"), out, *theirs, "did not write", "move it away")
    assert sorted(path.name for path in out.iterdir()) == theirs
    for name in theirs:
        (out / name).rename(out / f"{name}.txt")
    assert run(*args, "--overwrite").code == 0
    assert (out / "model-00001-of-00002.safetensors.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() == (factored / "model.safetensors").read_bytes()
    assert read_config(out) == read_config(factored)


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
@pytest.mark.parametrize("link", [False, True])
def test_out_is_the_source(options: list[str], link: bool, dense: Path, run: Run, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    out = tmp_path / "link" if link else model
    if link:
        out.symlink_to(model)
    assert_refused(run(model, "--rank", 16, *options, "--out", out), "give another", "folder" if options else "")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize("where", ["under a file", "in /proc"])
def test_out_cannot_be_written(where: str, dense: Path, run: Run, tmp_path: Path) -> None:
    """Permissions do not bind root, these places do."""
    (tmp_path / "file").touch()
    out = Path("/proc/no-such-folder") if where == "in /proc" else tmp_path / "file" / "out"
    assert_refused(run(dense, "--rank", 16, "--device", "cpu", "--out", out), out, "give another folder as --out")


def test_no_space_to_begin_with(dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    result = run(dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(result, tmp_path / "out", "needs", "1.00 kB free")
    assert not (tmp_path / "out").exists()


def fill_disk(monkeypatch: pytest.MonkeyPatch, call: str, room: int) -> None:
    """Let a system call fail for want of space after so many bytes."""
    real = getattr(os, call)
    left = [room]

    def limited(handle: int, *args: Any) -> Any:
        left[0] -= args[1] if call == "posix_fallocate" else len(args[0])
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, *args)

    monkeypatch.setattr(os, call, limited)


@pytest.mark.parametrize(
    ("call", "room"),
    [("pwrite", 0), ("pwrite", 40_000), ("pwrite", 90_000), ("posix_fallocate", 120_000), ("write", 0)],
)
def test_disk_is_full_half_way(
    call: str, room: int, dense: Path, factored: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    args = [dense, "--rank", 16, "--device", "cpu", "--out", out]
    if call == "posix_fallocate":
        args += ["--max-shard-size", "50KB"]
    with monkeypatch.context() as patch:
        fill_disk(patch, call, room)
        result = run(*args)
    assert_refused(result, "no space left", out, "run the same command to continue", code=1)
    assert not (out / "config.json").exists()
    if call != "posix_fallocate":
        assert_no_model(out)
    assert run(*args).code == 0
    ours, theirs = read_weights(out), read_weights(factored)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_other_disk_errors(dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    args = [dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        assert_refused(run(*args), "could not be written", "Input/output error", "the same command", code=1)
    assert_no_model(tmp_path / "out")
    assert run(*args).code == 0


def test_source_shrinks_while_it_is_read(
    dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network folder that drops out: said, and no traceback."""
    monkeypatch.setattr(os, "preadv", lambda *args: 0)
    result = run(dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(result, "model.safetensors", "ended inside tensor", code=1)
    assert_no_model(tmp_path / "out")


def test_source_cannot_be_read(dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    result = run(dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(result, "model.safetensors", "Input/output error", code=1)
    assert_no_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; use fewer --workers"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "fewer --workers"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory; use fewer --workers"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory on the device; free some there"),
    ],
)
def test_out_of_memory(
    error: Exception, words: str, dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdconvert.factoring import operations as compute

    def full(*args: object) -> None:
        raise error

    args = [dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setitem(compute.OPERATIONS, "factorize", full)
        assert_refused(run(*args), words, "the same command", code=1)
    assert_no_model(tmp_path / "out")
    assert run(*args).code == 0


# --- the Hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        use_hub(monkeypatch, server, tmp_path / "home")
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def test_a_head_that_is_no_copy_after_all(hub: HubServer, run: Run, tmp_path: Path) -> None:
    """It is known only when both files are here, which takes no more of the disk than any two."""
    tensors = random_tensors()
    tensors["embed_out.weight"] = tensors["gpt_neox.embed_in.weight"].clone()
    tied = {"tie_word_embeddings": True}
    hub.add("owner/same", write_checkpoint(tmp_path / "same", tensors, shards=4, config=tied))
    tensors["embed_out.weight"][-1] += 1
    hub.add("owner/other", write_checkpoint(tmp_path / "other", tensors, shards=4, config=tied))
    args = ["--rank", 16, "--device", "cpu", "--out"]
    assert run("owner/same", *args, tmp_path / "out").code == 0
    assert "lm_head.weight" not in read_weights(tmp_path / "out")
    result = run("owner/other", *args, tmp_path / "out2")
    assert_refused(result, "ties embed_out.weight to gpt_neox.embed_in.weight", "tie_word_embeddings")
    assert not (tmp_path / "out2" / "config.json").exists()


def test_the_place_of_an_error_for_those_who_ask(dense: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDCONVERT_DEBUG", "1")
    result = run("plan", dense, "--rank", 0)
    assert "Traceback" in result.err
    assert result.code == 2


def test_unknown_repository(hub: HubServer, run: Run, tmp_path: Path) -> None:
    result = run("owner/nothing", "--rank", 16, "--out", tmp_path / "out")
    assert_refused(result, "owner/nothing does not exist", "hf auth login")
    assert_no_model(tmp_path / "out")


def test_unknown_revision(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    hub.add("owner/tiny", dense)
    result = run("owner/tiny", "--rank", 16, "--revision", "v9", "--out", tmp_path / "out")
    assert_refused(result, "owner/tiny", "'v9'")


def test_gated_repository(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    hub.add("owner/tiny", dense, gated=True)
    result = run("owner/tiny", "--rank", 16, "--out", tmp_path / "out")
    assert_refused(result, "owner/tiny is gated", "accept its conditions", "HF_TOKEN")
    assert_no_model(tmp_path / "out")


def test_no_network(hub: HubServer, run: Run, tmp_path: Path) -> None:
    hub.close()
    result = run("owner/tiny", "--rank", 16, "--out", tmp_path / "out")
    assert_refused(result, "the connection to http://127.0.0.1", "check the network")
    assert_no_model(tmp_path / "out")


def test_network_breaks_off_half_way(hub: HubServer, dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    hub.add("owner/tiny", dense)
    args = ["owner/tiny", "--rank", 16, "--device", "cpu", "--out", tmp_path / "out"]
    # Headers come by range requests; the file itself is refused from then on.
    assert run("plan", "owner/tiny", "--rank", 16).code == 0
    served = len(hub.gets("model.safetensors"))
    hub.cut("model.safetensors", after=100_000, times=ALWAYS)
    assert_refused(run(*args), "the connection to http://127.0.0.1", "the same command continues", code=1)
    assert len(hub.gets("model.safetensors")) > served
    assert_no_model(tmp_path / "out")
    hub.faults.clear()
    assert run(*args).code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (factored / "model.safetensors").read_bytes()


def test_push_is_refused_before_the_work(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    """Hours of work for a repository that cannot be written would be a pity."""
    args = [dense, "--rank", 16, "--device", "cpu", "--out", tmp_path / "out"]
    assert_refused(run(*args, "--push-to-hub", "owner/result"), "token")
    assert_refused(run(*args, "--push-to-hub", "no name"), "no name")
    assert not (tmp_path / "out").exists()


def test_push_of_nothing(hub: HubServer, dense: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run("push", dense, "owner/result"), "no finished result")
    assert_refused(run("push", tmp_path / "nothing", "owner/result"), "no folder")


# --- evaluate


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a small text " * 20)
    return path


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "is empty"), (b" \n\t\n", "is empty"), (b"caf\xe9", "is not UTF-8 text (byte 3)")]
)
def test_unusable_text(content: bytes, word: str, dense: Path, run: Run, text: Path) -> None:
    text.write_bytes(content)
    assert_refused(run("evaluate", dense, "--text", text), text, word)


@pytest.mark.parametrize("name", ["text.jsonl", "text.parquet"])
def test_records_are_not_measured_as_text(name: str, dense: Path, run: Run, tmp_path: Path) -> None:
    """Calibration reads them by their ending; here the perplexity would be one of braces and field names."""
    (tmp_path / name).write_text('{"text": "one"}\n' * 50)
    assert_refused(run("evaluate", dense, "--text", tmp_path / name), name, "; write its texts into a .txt file")


def test_missing_text(dense: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run("evaluate", dense, "--text", tmp_path / "none"), tmp_path / "none", "cannot be read")
    assert_refused(run("evaluate", dense, "--text", tmp_path), "cannot be read")
    assert_refused(run("evaluate", dense), "--text", usage=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", 1], ["--window 1", "from 2 to 64"]),
        (["--window", 0], ["--window 0"]),
        (["--window", -8], ["--window -8"]),
        (["--window", 65], ["--window 65", "from 2 to 64"]),
        (["--window", 8, "--stride", 8], ["--stride 8", "between 1 and 7"]),
        (["--window", 8, "--stride", 0], ["--stride 0"]),
        (["--window", 8, "--stride", -1], ["--stride -1"]),
        (["--device", "tpu"], ["--device tpu is unknown"]),
    ],
)
def test_impossible_window(options: list[object], words: list[str], dense: Path, run: Run, text: Path) -> None:
    assert_refused(run("evaluate", dense, "--text", text, *options), *words)


def test_model_without_tokenizer(fresh: Callable[..., Path], run: Run, text: Path) -> None:
    model = fresh(tokenizer=False)
    assert_refused(run("evaluate", model, "--text", text), model, "no usable tokenizer", "; copy the files")


def test_tokenizer_of_another_model(fresh: Callable[..., Path], run: Run, text: Path) -> None:
    model = fresh(config={"vocab_size": 20})
    assert_refused(run("evaluate", model, "--text", text), model, "tokenizer", "another model; put")


def test_evaluate_half_a_model(dense: Path, run: Run, text: Path, tmp_path: Path) -> None:
    """Missing weights would be filled with random numbers, and the perplexity be one of noise."""
    model = tmp_path / "model"
    shutil.copytree(dense, model)
    edit_tensors(lambda tensors: tensors.pop(DENSE_LAYER))(model)
    assert_refused(run("evaluate", model, "--text", text), model, "missing", DENSE_LAYER)
    edit_json(model / "config.json", model_type="no-such-kind")
    assert_refused(run("evaluate", model, "--text", text), model)
    (model / "config.json").unlink()
    assert_refused(run("evaluate", model, "--text", text), "config.json")


# --- fold, densify


def adapter(folder: Path, module: str = "gpt_neox.layers.0.attention.dense", **config: Any) -> Path:
    """A LoRA adapter of rank 2 as peft writes it."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["dense"]} | config
    settings = {key: value for key, value in settings.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name = f"base_model.model.{module}"
    pair = {f"{name}.lora_A.weight": torch.ones(2, HIDDEN), f"{name}.lora_B.weight": torch.ones(HIDDEN, 2)}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


def edit_adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


LORA = "base_model.model.gpt_neox.layers.0.attention.dense"
ADAPTER_FAULTS = {
    "no config": (remove("adapter_config.json"), "no adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "no adapter_model.safetensors"),
    "weights are none": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"<html>" * 9),
        "adapter_model.safetensors",
        "not a safetensors file",
    ),
    "half a pair": (edit_adapter(lambda t: t.pop(f"{LORA}.lora_B.weight")), "lora_A and lora_B", "attention.dense"),
    "DoRA vector": (edit_adapter(lambda t: t.update({f"{LORA}.lora_magnitude_vector": torch.ones(2)})), "not a LoRA"),
    "pair of two ranks": (
        edit_adapter(lambda t: t.update({f"{LORA}.lora_B.weight": torch.ones(HIDDEN, 3)})),
        "do not fit together",
    ),
    "other width": (
        edit_adapter(lambda t: t.update({f"{LORA}.lora_A.weight": torch.ones(2, 32)})),
        "do not fit a 64 x 64 layer",
    ),
    "no rank": (lambda f: edit_json(f / "adapter_config.json", r=None), "adapter_config.json", "'r'"),
    "no alpha": (lambda f: edit_json(f / "adapter_config.json", lora_alpha=None), "adapter_config.json", "lora_alpha"),
    "odd rank": (lambda f: edit_json(f / "adapter_config.json", r=0), "adapter_config.json"),
    "endless rank": (lambda f: edit_json(f / "adapter_config.json", r=float("inf")), "adapter_config.json", "'r'"),
    "true as rank": (lambda f: edit_json(f / "adapter_config.json", r=True), "adapter_config.json", "'r'"),
    "rank of other weights": (lambda f: edit_json(f / "adapter_config.json", r=3), "says rank 3", "have 2"),
    "alpha that is no number": (
        lambda f: edit_json(f / "adapter_config.json", lora_alpha=float("nan")),
        "adapter_config.json",
        "lora_alpha",
    ),
    "rank of a layer that is text": (
        lambda f: edit_json(f / "adapter_config.json", rank_pattern={"dense": "2"}),
        "'rank_pattern'",
    ),
    "pattern that is none": (
        lambda f: edit_json(f / "adapter_config.json", alpha_pattern={"(dense": 2}),
        "alpha_pattern",
        "not a regular expression",
    ),
    "no tensors": (edit_adapter(lambda t: t.clear()), "holds no LoRA weights"),
    "integers": (
        edit_adapter(lambda t: t.update({f"{LORA}.lora_A.weight": torch.ones(2, HIDDEN, dtype=torch.int64)})),
        "lora_A.weight is I64",
    ),
    "a convolution": (
        edit_adapter(lambda t: t.update({f"{LORA}.lora_A.weight": torch.ones(2, HIDDEN, 1, 1)})),
        "of shape [2, 64, 1, 1]",
    ),
    "layers that the config does not name": (
        lambda f: edit_json(f / "adapter_config.json", target_modules=["query_key_value"]),
        "has weights for gpt_neox.layers.0.attention.dense",
        "peft would leave them out",
    ),
    "layers that it leaves out": (
        lambda f: edit_json(f / "adapter_config.json", exclude_modules=r".*\.0\..*"),
        "peft would leave them out",
    ),
    "layers of other blocks": (
        lambda f: edit_json(f / "adapter_config.json", layers_to_transform=[1, 2]),
        "peft would leave them out",
    ),
    "not finite": (edit_adapter(lambda t: t[f"{LORA}.lora_B.weight"].fill_(float("nan"))), "is not finite in float16"),
    "beyond float16": (lambda f: edit_json(f / "adapter_config.json", lora_alpha=1e30), "is not finite in float16"),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_faulty_adapter(fault: str, factored: Path, run: Run, tmp_path: Path) -> None:
    damage, *words = ADAPTER_FAULTS[fault]
    folder = adapter(tmp_path / "adapter")
    damage(folder)
    assert_refused(run("fold", factored, "--adapter", folder, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["embed_in"]}, "modules_to_save"),
        ({"peft_type": ...}, "peft_type"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"init_lora_weights": "of tomorrow"}, "of tomorrow"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"tensor_parallel": 2}}, "megatron_config"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_parameters": ["dense.weight"]}, "target_parameters"),
        ({"of_tomorrow": 3}, "of_tomorrow"),
    ],
)
def test_adapter_of_another_kind(config: dict[str, Any], word: str, factored: Path, run: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", **config)
    result = run("fold", factored, "--adapter", folder, "--out", tmp_path / "out")
    assert_refused(result, folder, word, "only a plain LoRA")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {
            "init_lora_weights": "gaussian",
            "lora_dropout": 0.1,
            "peft_version": "9.9",
            "of_tomorrow": None,
            "more": False,
        },
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(dense|query_key_value)", "exclude_modules": ["layers.1.attention.dense"]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"layers_to_transform": 0},
        {"r": 5, "rank_pattern": {r"layers\.\d+\.attention\.dense": 2}},
    ],
)
def test_adapters_that_are_plain(config: dict[str, Any], factored: Path, run: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", **config)
    result = run("fold", factored, "--adapter", folder, "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert read_config(tmp_path / "out")["svd_ranks"]["layers.0.attention.dense"] == 18


def test_adapter_for_transposed_layers(factored: Path, run: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", fan_in_fan_out=True)
    result = run("fold", factored, "--adapter", folder, "--out", tmp_path / "out")
    assert_refused(result, folder, "fan_in_fan_out", "no Conv1D")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["gpt_neox.layers.7.attention.dense", "model.layers.0.self_attn.q_proj"])
def test_adapter_of_another_model(module: str, factored: Path, run: Run, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", module, target_modules=[module])
    result = run("fold", factored, "--adapter", folder, "--out", tmp_path / "out")
    assert_refused(result, module, "trained on another model")


def test_fold_of_what_is_not_there(dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    folder, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    assert_refused(run("fold", tmp_path / "none", "--adapter", folder, "--out", out), tmp_path / "none", "no folder")
    assert_refused(run("fold", factored, "--adapter", tmp_path / "none", "--out", out), tmp_path / "none", "no folder")
    assert_refused(run("fold", dense, "--adapter", folder, "--out", out), "not a factored checkpoint")
    assert_refused(run("fold", factored, "--adapter", folder), "--out", usage=True)
    assert not out.exists()


def test_fold_into_what_is_read(factored: Path, run: Run, tmp_path: Path) -> None:
    """Neither the model nor the adapter is overwritten by what is made of them, even if that is asked for."""
    model, folder = tmp_path / "model", adapter(tmp_path / "adapter")
    shutil.copytree(factored, model)
    for out in (model, folder):
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        result = run("fold", model, "--adapter", folder, "--out", out, "--overwrite", "--device", "cpu")
        assert_refused(result, out, "give another")
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_densify_of_other_folders(dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_refused(run("densify", dense, "--out", out), f"{dense} is not a factored checkpoint")
    assert_refused(run("densify", tmp_path / "none", "--out", out), "no folder")
    assert_refused(run("densify", factored, "--out", factored, "--overwrite"), "own folder")
    model = tmp_path / "model"
    shutil.copytree(factored, model)
    ranks = read_config(model)["svd_ranks"]
    edit_json(model / "config.json", svd_ranks=ranks | {"layers.0.attention.dense": 15})
    assert_refused(run("densify", model, "--out", out), "layers.0.attention.dense", "rank 16", "says 15")
    edit_json(model / "config.json", svd_ranks=ranks | {"layers.9.attention.dense": 16})
    assert_refused(run("densify", model, "--out", out), "lacks", "layers.9.attention.dense.down.weight")
    assert not out.exists()


# --- verify


@pytest.fixture
def damaged(factored: Path, tmp_path: Path) -> Path:
    """A factored checkpoint to be damaged."""
    return Path(shutil.copytree(factored, tmp_path / "damaged"))


def test_verify_of_other_folders(dense: Path, factored: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run("verify", dense), dense.name, "not a factored checkpoint")
    assert_refused(run("verify", tmp_path / "none"), "no folder")
    assert_refused(run("verify", tmp_path), "no config.json")
    assert_refused(run("verify", factored, "--revision", "main"), "--revision belongs to --against")
    assert_refused(run("verify", factored, "--against", tmp_path / "none"), tmp_path / "none")
    assert_refused(run("verify", factored, "--against", factored), "already factored", f"densify {factored} --out")


def test_verify_finds_a_changed_rank(damaged: Path, run: Run) -> None:
    ranks = read_config(damaged)["svd_ranks"]
    edit_json(damaged / "config.json", svd_ranks=ranks | {"layers.1.mlp.dense_4h_to_h": 17})
    result = run("verify", damaged)
    assert_refused(result, damaged, "did not pass: ranks", code=1)
    assert "config.json says rank 17 for layers.1.mlp.dense_4h_to_h" in result.out
    report = run("verify", damaged, "--json")
    assert report.code == 1
    assert json.loads(report.out)["passed"] is False


def test_verify_finds_a_forgotten_rank(damaged: Path, run: Run) -> None:
    ranks = read_config(damaged)["svd_ranks"]
    ranks.pop("layers.1.mlp.dense_4h_to_h")
    edit_json(damaged / "config.json", svd_ranks=ranks)
    result = run("verify", damaged)
    assert_refused(result, "keys and shapes", code=1)
    assert "layers.1.mlp.dense_4h_to_h" in result.out


def flip(folder: Path, name: str, value: float) -> None:
    """Change one number of one tensor in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[5] += value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("gpt_neox.layers.1.attention.dense.up.weight", "factored matrices"),
        ("gpt_neox.layers.1.attention.dense.down.weight", "factored matrices"),
        ("gpt_neox.layers.1.attention.dense.up.bias", "copied tensors"),
        ("gpt_neox.embed_in.weight", "copied tensors"),
        ("lm_head.weight", "copied tensors"),
    ],
)
def test_verify_finds_a_changed_number(name: str, failing: str, dense: Path, damaged: Path, run: Run) -> None:
    flip(damaged, name, 0.25)
    assert_refused(run("verify", damaged), "did not pass: data", code=1)
    result = run("verify", damaged, "--against", dense)
    assert_refused(result, f"did not pass: data, {failing}", code=1)
    assert "layers.1.attention.dense" in result.out or name.split(".")[-2] in result.out or "embed_out" in result.out


def test_verify_finds_truncated_weights(damaged: Path, run: Run) -> None:
    cut(lambda size: size - 2)(damaged)
    assert_refused(run("verify", damaged), "model.safetensors", "truncated")


def test_verify_against_another_model(damaged: Path, fresh: Callable[..., Path], run: Run) -> None:
    from support.checkpoints import random_tensors

    other = fresh(random_tensors(seed=5))
    result = run("verify", damaged, "--against", other)
    assert_refused(result, "copied tensors, factored matrices", code=1)


@pytest.mark.parametrize("command", ["verify", "evaluate", "densify"])
def test_a_changed_modeling_file_is_not_run(command: str, damaged: Path, run: Run, text: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    file = damaged / "modeling_polyglot_svd.py"
    file.write_text(f"open({str(trace)!r}, 'w')\n{file.read_text()}")
    if command == "verify":
        result = run("verify", damaged)
        assert_refused(result, "modeling file", code=1)
        assert "it was not run" in result.out
    else:
        options = ["--text", text] if command == "evaluate" else ["--out", tmp_path / "out"]
        assert run(command, damaged, *options, "--device", "cpu").code == 0
    assert not trace.exists()


def test_verify_finds_a_missing_modeling_file(damaged: Path, run: Run) -> None:
    (damaged / "modeling_polyglot_svd.py").unlink()
    result = run("verify", damaged)
    assert_refused(result, "did not pass: modeling file", code=1)
    assert "modeling_polyglot_svd.py is missing" in result.out


def test_a_fault_of_ours_is_a_sentence_too(factored: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("svdconvert.commands.verify.verify", fail)
    monkeypatch.delenv("SVDCONVERT_DEBUG", raising=False)
    where = "(ZeroDivisionError: division, test_bad_input.py line "
    assert_refused(run("verify", factored), "failed unexpectedly", where, "SVDCONVERT_DEBUG=1", code=1)
    monkeypatch.setenv("SVDCONVERT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["verify", str(factored)])


def test_names_do_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    result = run("verify", f"{tmp_path}/a\x1b[2Jb")
    assert_refused(result, r"a\x1b[2Jb")
    assert "\x1b" not in result.err


def test_pipes_and_devices_are_not_waited_for(
    fresh: Callable[..., Path], dense: Path, run: Run, tmp_path: Path
) -> None:
    model = fresh()
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    assert_refused(run("plan", model, "--rank", 16), "config.json", "not a regular file")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    result = run("plan", model, "--rank", 16)
    assert result.code == 2
    assert "config.json" in result.err
    os.mkfifo(tmp_path / "text.txt")
    assert_refused(run("evaluate", dense, "--text", tmp_path / "text.txt"), "is a pipe", "write the text to a file")
    options = ["--rank", 16, "--calib", tmp_path / "text.txt", "--out", tmp_path / "out"]
    assert_refused(run("convert", dense, *options), "text.txt", "is a pipe")


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"],
)
def test_deep_nesting(name: str, fresh: Callable[..., Path], text: Path, run: Run, tmp_path: Path) -> None:
    model = fresh()
    (model / name).write_text('{"a":' * 10**5 + "1" + "}" * 10**5)
    result = run("evaluate", model, "--text", text, "--device", "cpu")
    if name == "generation_config.json":
        assert result.code == 0  # a look at a model does without it
    else:
        assert_refused(result, name, "nested more than 64 levels deep")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("svd_shared", "x"),
        ("svd_shared", {"a": 1}),
        ("svd_ranks", {"a": "16"}),
        ("svd_ranks", {"a": 0}),
    ],
)
@pytest.mark.parametrize("command", ["verify", "densify"])
def test_config_of_factors(command: str, field: str, value: object, damaged: Path, run: Run, tmp_path: Path) -> None:
    edit_json(damaged / "config.json", **{field: value})
    options = ["--out", tmp_path / "out"] if command == "densify" else []
    assert_refused(run(command, damaged, *options), "config.json", f"its '{field}' is")
    assert not (tmp_path / "out").exists()
