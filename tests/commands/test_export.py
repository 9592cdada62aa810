"""Factored models as graphs: torch.export, ONNX, and GGUF by way of densify."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.families import FAMILIES, VOCAB, write_family
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoModelForCausalLM

from svdconvert import convert, densify
from svdconvert.families.table import ARCHITECTURES
from svdconvert.layouts.table import LAYOUTS

TO_GGUF = Path(__file__).parents[2] / "examples" / "gguf" / "to_gguf.py"
LLAMA_CPP = os.environ.get("SVDCONVERT_LLAMA_CPP", "")
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
TRANSFORMERS_5 = hasattr(__import__("transformers"), "TokenizersBackend")
# Smaller and larger than what is traced.
BATCHES = [
    torch.randint(4, VOCAB, shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 13), (3, 29), (1, 4))
]


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Tracing takes seconds a layer. One layer of each template shows what tracing is about; the other families take their
# time, those with layers of several kinds with as many as show them.
QUICK = ("gpt_neox", "llama")
# Their recurrences go through a text in pieces, which transformers' own models cannot be traced with either.
UNTRACED = ("qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1")
TRACED = [name for name in FAMILIES if name not in UNTRACED]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in TRACED],
)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers = {"num_hidden_layers": 1 if request.param in QUICK else 2}
    if {"layer_types", "attention_types"} & ARCHITECTURES[request.param].tiny.keys():
        layers = {}
    return write_family(tmp_path_factory.mktemp(request.param) / "dense", request.param, **layers)


@pytest.fixture(scope="module")
def factored(dense: Path, layout: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factored") / layout
    convert(dense, folder, keep=0.6, layout=layout, dtype="float32", device="cpu", check=False)
    return folder


class Logits(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary], and nothing else: no cache, no output class."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
@torch.no_grad()
def traced(factored: Path) -> SimpleNamespace:
    """The model as one graph for any batch and length, and what the model itself makes of BATCHES."""
    model = Logits(factored)
    expected = [model(ids) for ids in BATCHES]
    sizes = {"input_ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=32)}}
    # the last use of the model: tracing leaves its own tensors in one with longrope (Phi-3)
    return SimpleNamespace(program=torch.export.export(model, (BATCHES[0],), dynamic_shapes=sizes), expected=expected)


needs_transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="the masks of transformers 4.46 cannot be traced")


@needs_transformers_5
@torch.no_grad()
def test_torch_export(traced: SimpleNamespace, tmp_path: Path) -> None:
    """Saved, and loaded without the modeling file."""
    torch.export.save(traced.program, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    for ids, expected in zip(BATCHES, traced.expected, strict=True):
        assert float(expected.std()) > 0.1
        assert float((graph(ids) - expected).abs().max()) < 1e-4


@needs_transformers_5
@torch.no_grad()
def test_onnx(traced: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(traced.program, dynamo=True, input_names=["input_ids"], verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for ids, expected in zip(BATCHES, traced.expected, strict=True):
        (found,) = session.run(None, {"input_ids": ids.numpy()})
        assert float((torch.from_numpy(found) - expected).abs().max()) < 1e-3


def to_gguf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TO_GGUF), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def give_a_merge(file: Path) -> None:
    """llama.cpp takes no byte-pair encoding without any pair: the last token becomes that of two others."""
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    *_, first, second, last = sorted(vocabulary, key=vocabulary.get)
    vocabulary[first + second] = vocabulary.pop(last)
    tokenizer["model"]["merges"] = [[first, second]]
    file.write_text(json.dumps(tokenizer))


def give_pieces(folder: Path) -> None:
    """A tokenizer of sentencepiece in the place of the other one."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = (f"{first}{last} {n}" for n, first in enumerate("abcdefghij") for last in ("lower", "ing", "est", "ment"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(folder / "tokenizer"), vocab_size=VOCAB, hard_vocab_limit=False
    )
    (folder / "tokenizer.vocab").unlink()
    for file in folder.glob("tokenizer*.json"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')


# Families that llama.cpp's converter knows.
IN_LLAMA_CPP = [name for name in FAMILIES if ARCHITECTURES[name].llama_cpp is not None]
OF_SENTENCEPIECE = {"gemma2", "phi3"}


@pytest.mark.skipif(not LLAMA_CPP, reason="SVDCONVERT_LLAMA_CPP: no source tree of llama.cpp")
@pytest.mark.parametrize("model_type", IN_LLAMA_CPP)
def test_gguf(model_type: str, layout: str, tmp_path: Path) -> None:
    """llama.cpp's converter takes the densified model whole; llama.cpp, where it is installed, computes the same."""
    write_family(tmp_path / "dense", model_type, **ARCHITECTURES[model_type].llama_cpp or {})
    factored = tmp_path / "factored"
    convert(tmp_path / "dense", factored, keep=0.6, layout=layout, dtype="float32", device="cpu", check=False)
    densify(factored, tmp_path / "densified", device="cpu", check=False)
    if model_type in OF_SENTENCEPIECE:
        give_pieces(tmp_path / "densified")
    else:
        give_a_merge(tmp_path / "densified" / "tokenizer.json")
    done = to_gguf(LLAMA_CPP, tmp_path / "densified", "--outtype", "f32", "--outfile", tmp_path / "model.gguf")
    assert done.returncode == 0, done.stderr[-2000:]
    sys.path.insert(0, str(Path(LLAMA_CPP) / "gguf-py"))
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{architecture}.block_count"].contents() == 3
    assert all(bool(torch.from_numpy(tensor.data.copy()).isfinite().all()) for tensor in reader.tensors)
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama_cpp is not installed: converted, but not run")
    import llama_cpp

    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    # longer than what Phi-3 calls short: llama.cpp goes by the context that it has room for
    ids = torch.randint(4, VOCAB, (48,), generator=torch.Generator().manual_seed(1))
    engine.eval(ids.tolist())
    found = torch.tensor(engine.scores[: len(ids)])
    engine.close()
    with torch.no_grad():
        expected = Logits(factored)(ids[None])[0]
    # llama.cpp tabulates its activation functions in half precision
    assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_gguf_of_what_it_is_not_for(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"svd_ranks": {}}')
    done = to_gguf(tmp_path, tmp_path / "model")
    assert done.returncode == 2
    assert "convert_hf_to_gguf.py is not there" in done.stderr
    (tmp_path / "convert_hf_to_gguf.py").touch()
    done = to_gguf(tmp_path, tmp_path / "model")
    assert done.returncode == 2
    assert "svdconvert densify" in done.stderr
    assert "Traceback" not in done.stderr
