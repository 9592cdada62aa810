"""GGUF files as source checkpoints: their tensors, settings and tokenizer are those that transformers makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from svdconvert import plan
from svdconvert.errors import JobError
from svdconvert.models.loading import load_model
from svdconvert.storage import gguf_view
from svdconvert.storage.gguf_header import TYPES, read_gguf_header
from svdconvert.storage.gguf_source import GgufSource
from svdconvert.storage.opening import local_folder, open_source
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_data import OpenFile
from svdconvert.words import size as in_bytes

from support.families import FAMILIES, VERSION, VOCAB  # isort: skip
from support.gguf_files import AS_TRANSFORMERS, as_transformers_reads, tiny, write_gguf  # isort: skip

HERE = [name for name in AS_TRANSFORMERS if name in FAMILIES]
IDS = torch.randint(4, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))


def weights(source: Source) -> dict[str, torch.Tensor]:
    """All tensors, each read whole and in pieces."""
    found = {}
    with WeightReader(source) as reader:
        for name, info in source.tensors.items():
            found[name] = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))
            pieces = torch.cat([piece.clone() for piece in reader.stream(info)])
            assert torch.equal(pieces, found[name].reshape(-1).view(torch.uint8)), name
    return found


# Every family in one float and one quantised type, and every type that gguf can round to.
CASES = [
    *((name, kind) for name, kind in zip(HERE, ["F16", "BF16"] * 9, strict=False)),
    *((name, kind) for name, kind in zip(HERE, ["Q4_1", "Q8_0", "Q5_0"] * 9, strict=False)),
    *(("llama", kind) for kind in ("F32", "BF16", "Q4_0", "Q5_1")),
]


@pytest.mark.skipif(VERSION < (5, 23), reason="older readers lack architectures")
@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_tensors_are_those_of_transformers(model_type: str, kind: str, tmp_path: Path) -> None:
    """Bit by bit: names, order of rows, offsets, and what quantised blocks stand for."""
    path = write_gguf(tmp_path / "model.gguf", tiny(model_type), kind=kind)
    source = open_source(str(path))
    found, expected = weights(source), as_transformers_reads(path)
    if source.config["tie_word_embeddings"]:
        del expected["lm_head.weight"]
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name]), name
    stored = {tensor.dtype for tensor in found.values() if tensor.dim() > 1}
    assert stored == {{"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)}


@pytest.mark.skipif(VERSION < (5, 23), reason="older readers lack architectures")
@pytest.mark.parametrize("model_type", HERE)
def test_config_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    """In every field that transformers takes from the file."""
    path = write_gguf(tmp_path / "model.gguf", tiny(model_type))
    theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name).to_dict()
    ours = AutoConfig.for_model(**open_source(str(path)).config).to_dict()
    read = set(open_source(str(path)).config) - {"architectures", "torch_dtype"}
    # what it leaves to its defaults although the file has it, or what follows from it
    read -= {"attn_logit_softcapping", "final_logit_softcapping", "sliding_window_pattern", "query_pre_attn_scalar"}
    read -= {"n_positions"} | ({"rope_theta"} if model_type == "starcoder2" else set())
    for field in read - {"rope_theta"}:
        assert ours[field] == theirs[field], field
    if "rope_theta" in read:
        assert ours["rope_parameters"] == theirs["rope_parameters"]


@pytest.mark.parametrize("model_type", HERE)
def test_the_model_is_the_one_that_was_written(model_type: str, tmp_path: Path) -> None:
    """Loaded to be evaluated, it computes what the model did that llama.cpp's converter was given."""
    model = tiny(model_type)
    folder = local_folder(str(write_gguf(tmp_path / "model.gguf", model, tokenizer=False)))
    with torch.no_grad():
        found = load_model(folder, "cpu", torch.float32)(input_ids=IDS).logits
        assert torch.allclose(found, model(input_ids=IDS).logits, atol=2e-4)


@pytest.mark.parametrize("scaling", ["llama3", "linear"])
def test_scaled_rotation(scaling: str, tmp_path: Path) -> None:
    """transformers leaves it out. LLaMA 3.1's is a table of factors in the file, as llama.cpp's converter makes it."""
    base, size = 500000.0, 16
    rope = {"rope_type": scaling, "factor": 8.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny("llama", rope_theta=base, rope_scaling=rope)
    factors = []
    for frequency in base ** -(np.arange(0, size, 2) / size):
        wavelength = 2 * np.pi / frequency
        smooth = (8192 / wavelength - 1) / (4 - 1)
        between = 1 / ((1 - smooth) / 8 + smooth)
        factors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else between)
    table = {"rope_freqs.weight": np.array(factors, np.float32)}
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 8.0}
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        tokenizer=False,
        extra=table if scaling == "llama3" else None,
        changes=linear if scaling == "linear" else None,
    )
    assert open_source(str(path)).config["rope_scaling"] == rope
    with torch.no_grad():
        found = load_model(local_folder(str(path)), "cpu", torch.float32)(input_ids=IDS).logits
        assert torch.allclose(found, model(input_ids=IDS).logits, atol=2e-4)


def test_phi3_with_long_contexts(tmp_path: Path) -> None:
    """Its two tables and the factor that goes with them, as llama.cpp's converter writes them."""
    short, long = [1.0 + 0.1 * n for n in range(8)], [2.0 + 0.2 * n for n in range(8)]
    rope = {"rope_type": "longrope", "type": "longrope", "short_factor": short, "long_factor": long}
    model = tiny("phi3", rope_scaling=rope, original_max_position_embeddings=16)
    tables = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        tokenizer=False,
        extra={name: np.array(values, np.float32) for name, values in tables.items()},
        changes={
            "phi3.rope.scaling.original_context_length": 16,
            "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(64 / 16) / math.log(16)),
        },
    )
    loaded = load_model(local_folder(str(path)), "cpu", torch.float32)
    with torch.no_grad():
        for ids in (IDS[:, :9], IDS):  # within the first context, and beyond it
            assert torch.allclose(loaded(input_ids=ids).logits, model(input_ids=ids).logits, atol=2e-4)


def test_every_type_is_that_of_the_package() -> None:
    for number, (name, elements, size) in TYPES.items():
        assert GGMLQuantizationType(number).name == name
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (elements, size)


@pytest.mark.parametrize("kind", [name for name, elements, _ in TYPES.values() if elements > 1])
def test_blocks_are_multiplied_out_in_pieces(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types that only llama.cpp itself can round to: random blocks, against the package on the whole matrix."""
    monkeypatch.setattr("svdconvert.storage.gguf_data.PIECE", 20_000)
    number, (hidden, inner) = GGMLQuantizationType[kind], (256, 512)
    model = tiny("llama", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1)
    elements, size = gguf.GGML_QUANT_SIZES[number]
    random = np.random.default_rng(0)

    def blocks(rows: int, columns: int) -> np.ndarray:
        # bytes whose halves are no float16 beyond 2, so that no scale is infinite
        return random.integers(0, 64, (rows, columns // elements * size), np.uint8)

    chosen = {
        "ffn_down": (hidden, inner),
        "ffn_up": (inner, hidden),
        "attn_q": (hidden, hidden),
        "attn_k": (hidden // 2, hidden),
    }
    raw = {f"blk.0.{name}.weight": blocks(*shape) for name, shape in chosen.items()}
    path = write_gguf(
        tmp_path / "model.gguf", model, tokenizer=False, raw={name: (values, number) for name, values in raw.items()}
    )
    source = open_source(str(path))
    assert kind in source.notes[0]
    stored = gguf.GGUFReader(path).tensors
    read, written = 4 * sum(int(one.n_elements) for one in stored), sum(int(one.n_bytes) for one in stored)
    assert source.notes[0].endswith(f"those of float32, {in_bytes(read)}, not of the file, {in_bytes(written)}")
    found = weights(source)
    layer = "model.layers.0."
    for name, own in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
        expected = gguf.dequantize(raw[f"blk.0.{name}.weight"], number)
        assert np.array_equal(found[f"{layer}{own}.weight"].numpy(), expected, equal_nan=True)
    for name, own, heads in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2)):
        values = gguf.dequantize(raw[f"blk.0.{name}.weight"], number)
        half = values.shape[0] // heads // 2
        rows = [(head * half + i) * 2 + j for head in range(heads) for j in range(2) for i in range(half)]
        assert np.array_equal(found[f"{layer}{own}.weight"].numpy(), values[rows], equal_nan=True)


def test_few_rows_are_multiplied_out_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of an embedding, of which each batch has some tokens."""
    source = open_source(str(write_gguf(tmp_path / "model.gguf", tiny("llama"), kind="Q8_0", tokenizer=False)))
    info = source.tensors["model.embed_tokens.weight"]
    table, plain, done = weights(source)[info.name], gguf.dequantize, list[int]()

    def watched(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        done.append(len(raw))
        return plain(raw, kind)

    monkeypatch.setattr(gguf, "dequantize", watched)
    with WeightReader(source) as reader:
        for begin, end in ((3, 4), (100, 103), (3, 5), (101, 102)):
            found = reader.read(info.rows(begin, end), torch.empty(info.nbytes, dtype=torch.uint8))
            assert torch.equal(found, table[begin:end])
    # aligned to as many as are asked for
    assert done == [1, 3, 3, 2, 2, 1]


def test_a_piece_is_read_again_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdconvert.storage.gguf_data.PIECE", 2_000)
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), kind="Q8_0", tokenizer=False)
    source = open_source(str(path))
    info = source.tensors["model.layers.0.mlp.up_proj.weight"]
    data, whole, again = source.data(info.file), bytearray(info.nbytes), bytearray(64)
    data.fill(info, memoryview(whole), 0)
    data.fill(info, memoryview(again), 0)

    def broken(*_: object) -> None:
        raise JobError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(OpenFile, "read", broken)
        with pytest.raises(JobError, match="the disk is gone"):
            data.fill(info, memoryview(again), info.nbytes - 64)
    data.fill(info, memoryview(again), 0)
    data.close()
    assert again == whole[:64]


def test_double_precision_stays(tmp_path: Path) -> None:
    model = tiny("llama")
    path = write_gguf(tmp_path / "model.gguf", model, kind="F64", tokenizer=False)
    found = weights(open_source(str(path)))
    assert found["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float64
    assert torch.equal(
        found["model.layers.0.self_attn.q_proj.weight"].float(), model.model.layers[0].self_attn.q_proj.weight
    )


def test_tokenizer_is_that_of_transformers(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "one" / "model.gguf", tiny("llama"))
    (tmp_path / "one" / "tokenizer_config.json").write_text('{"tokenizer_class": "Nothing"}')  # of something else
    source = open_source(str(path))
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(source.side_files)
    folder = source.path("tokenizer.json").parent
    write_gguf(tmp_path / "two" / "model.gguf", tiny("llama"))
    ours, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path / "two", gguf_file=path.name),
    )
    text = "thethen<|end|>the"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    # transformers 4.46 puts the opening token before a text
    assert ours.decode(ours(text)["input_ids"]).removeprefix("<s>") == text
    assert ours.chat_template == theirs.chat_template is not None
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text()


def test_no_tokenizer(tmp_path: Path) -> None:
    source = open_source(str(write_gguf(tmp_path / "model.gguf", tiny("llama"), tokenizer=False)))
    assert source.side_files == ["generation_config.json"]


@pytest.mark.skipif(VERSION < (5, 23), reason="older readers lack architectures")
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_generation_is_that_of_transformers(model_type: str, tmp_path: Path) -> None:
    """The file that transformers saves with the model, but for what says which transformers it was."""
    path = write_gguf(tmp_path / "model.gguf", tiny(model_type))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    model.generation_config.save_pretrained(tmp_path / "theirs")
    theirs = json.loads((tmp_path / "theirs" / "generation_config.json").read_text())
    ours = json.loads(open_source(str(path)).path("generation_config.json").read_text())
    assert theirs.pop("transformers_version")
    assert ours == theirs
    assert ours["eos_token_id"] is not None


@pytest.mark.parametrize("given", ["folder", "first", "last"])
def test_parts(given: str, tmp_path: Path) -> None:
    """What llama.cpp's gguf-split writes: all metadata in the first part, a header in each."""
    model = tiny("llama")
    whole = weights(open_source(str(write_gguf(tmp_path / "whole.gguf", model))))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "model.gguf", model, split_max_tensors=12)
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) > 2
    place = {"folder": folder, "first": folder / names[0], "last": folder / names[-1]}[given]
    source = open_source(str(place))
    assert isinstance(source, GgufSource)
    assert source.files == names
    found = weights(source)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert "tokenizer.json" in source.side_files


def test_identity(tmp_path: Path) -> None:
    """The same for the same content, wherever it is; another one for a changed weight or token."""
    path = write_gguf(tmp_path / "a.gguf", tiny("llama"), kind="Q8_0")
    copy = tmp_path / "b" / "a.gguf"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    source = open_source(str(path))
    known = source.identity()
    assert open_source(str(copy)).identity() == known
    source.refuse_changed()
    tensor = read_gguf_header(path).tensors["blk.1.ffn_up.weight"]
    for place in (tensor.start + 5, path.read_bytes().index(b"the")):
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        copy.write_bytes(data)
        assert open_source(str(copy)).identity() != known


def test_the_tokenizer_is_a_part_of_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same file another version of transformers may make another one, and a card may be replaced."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "model.gguf", tiny("llama"))
    (folder / "README.md").write_text("one")
    known = open_source(str(folder)).side_identity()
    assert {"tokenizer.json", "generation_config.json", "README.md"} <= known["side_file"].keys()
    monkeypatch.setattr(gguf_view, "_VIEWS", {})
    assert open_source(str(folder)).side_identity() == known, "made anew, byte by byte the same"
    save = PreTrainedTokenizerBase.save_pretrained

    def with_another_token(self: Any, place: Path, **options: Any) -> Any:
        self.add_tokens(["<another>"])
        return save(self, place, **options)

    monkeypatch.setattr(gguf_view, "_VIEWS", {})
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", with_another_token)
    changed = open_source(str(folder)).side_identity()
    assert changed["side_file"]["tokenizer.json"] != known["side_file"]["tokenizer.json"]
    (folder / "README.md").write_text("two")
    assert open_source(str(folder)).side_identity()["side_file"]["README.md"] != known["side_file"]["README.md"]


def test_a_plan_counts_the_tokenizer(tmp_path: Path) -> None:
    """transformers takes thousands of bytes for a token while it makes one; small matrices take less."""
    text = {"tokenizer.ggml.tokens": [str(number) for number in range(100_000)], "tokenizer.ggml.merges": None}
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), changes=text | {"tokenizer.ggml.token_type": None})
    few = plan(write_gguf(tmp_path / "few.gguf", tiny("llama")), rank=8)
    made = plan(path, rank=8)
    assert few.peak_bytes() < made.peak_bytes() == made.to_json()["peak_memory_bytes"]
    assert made.peak_bytes() > 600_000_000
    assert made.worker_bytes == few.worker_bytes > 0
