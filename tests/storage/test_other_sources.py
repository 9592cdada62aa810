"""Sources that are no checkpoint of a language model, under the names of those who wrote them, and wrapped ones."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIG, read_config, read_weights, tree, write_checkpoint, write_tokenizer
from support.families import stock_config, stock_model, write_family
from support.hub_server import HubServer, use_hub
from support.refusals import assert_refused
from transformers import CONFIG_MAPPING

from svdconvert import convert, densify, evaluate, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.families.towers import TOWERS
from svdconvert.families.unsupported import kind_of
from svdconvert.storage.source import LocalSource

Run = Callable[..., SimpleNamespace]


def peft_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = stock_model("gpt_neox")
    model.name_or_path = "EleutherAI/polyglot-ko-1.3b"
    get_peft_model(model, LoraConfig(r=2, target_modules=["dense"])).save_pretrained(folder)


def distributed(folder: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=folder)


def fsdp(folder: Path) -> None:
    distributed(folder / "pytorch_model_fsdp_0")


def files(*names: str, config: bool = True) -> Callable[[Path], None]:
    """Empty files, of which only the names count, beside a config."""

    def write(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        if config:
            (folder / "config.json").write_text(json.dumps(CONFIG))

    return write


def trained(folder: Path) -> None:
    for step in (500, 1000, 90):
        write_checkpoint(folder / f"checkpoint-{step}")
    (folder / "trainer_state.json").write_text("{}")


def in_cache(folder: Path) -> None:
    write_checkpoint(folder / "snapshots" / "0123abcd")
    (folder / "blobs").mkdir()


OTHERS: dict[str, tuple[Any, ...]] = {
    "PEFT": (peft_adapter, "PEFT adapter of EleutherAI/polyglot-ko-1.3b", "merge", "svdconvert fold"),
    "GGUF that is none": (files("model-Q4_K_M.gguf"), "model-Q4_K_M.gguf is not a GGUF file"),
    "Flax": (files("flax_model.msgpack"), "Flax", "from_flax=True"),
    "Flax in parts": (files("flax_model-00001-of-00002.msgpack", "flax_model.msgpack.index.json"), "from_flax=True"),
    "TensorFlow": (files("tf_model.h5"), "TensorFlow", "from_tf=True"),
    "ONNX": (files("onnx/model.onnx"), "ONNX", "exported from"),
    "Meta": (files("consolidated.00.pth", "params.json", config=False), "Meta", "convert_*_weights_to_hf.py"),
    "ZeRO": (
        files("zero_to_fp32.py", "latest", "global_step100/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        "DeepSpeed ZeRO",
        "zero_to_fp32.py",
    ),
    "ZeRO's own folder": (files("zero_pp_rank_0_mp_rank_00_optim_states.pt", config=False), "DeepSpeed ZeRO"),
    "FSDP": (fsdp, "FSDP", "accelerate merge-weights", "pytorch_model_fsdp_0"),
    "FSDP whole": (files("pytorch_model_fsdp.bin"), "rename pytorch_model_fsdp.bin to pytorch_model.bin"),
    "DCP": (distributed, "torch.distributed.checkpoint", "dcp_to_torch"),
    "Megatron": (files("iter_0000100/mp_rank_00/model_optim_rng.pt", config=False), "Megatron"),
    "checkpoints": (trained, "training checkpoints", "checkpoint-1000"),
    "Hub cache": (in_cache, "Hub cache", "snapshots/0123abcd"),
    "models": (lambda folder: write_checkpoint(folder / "final") and None, "folder of models", "/final"),
    "diffusers": (files("model_index.json", "unet/config.json", config=False), "diffusers"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_it_is_is_said(case: str, run: Run, tmp_path: Path) -> None:
    """By conversion, plan, and those that load the model themselves, in the same words; and nothing is written."""
    make, *words = OTHERS[case]
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    make(model)
    before = tree(model)
    refused = run(model, "--rank", 8, "--device", "cpu", "--out", out)
    assert_refused(refused, model, *words)
    text = tmp_path / "text.txt"
    text.write_text("text")
    for command in (["plan", model, "--rank", 8], ["evaluate", model, "--text", text]):
        assert run(*command).err == refused.err
    assert not out.exists()
    assert tree(model) == before


@pytest.mark.parametrize("case", ["Flax", "ZeRO", "PEFT"])
def test_what_it_is_on_the_hub(case: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, *words = OTHERS[case]
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    names = {str(path.relative_to(tmp_path / "model")): path for path in (tmp_path / "model").rglob("*")}
    with HubServer() as hub:
        use_hub(monkeypatch, hub, tmp_path / "home")
        hub.add("owner/name", {name: path.read_bytes() for name, path in names.items() if path.is_file()})
        assert_refused(run("owner/name", "--rank", 8, "--out", tmp_path / "out"), "owner/name", *words)


def test_adapter_beside_the_weights(dense: Path, run: Run, tmp_path: Path) -> None:
    """transformers would load it as well; what it means is not guessed, and not found out after the work."""
    model = shutil.copytree(dense, tmp_path / "model")
    peft_adapter(model)
    for command in (["plan"], ["convert", "--out", tmp_path / "out"]):
        assert_refused(
            run(command[0], model, "--rank", 8, *command[1:]), "adapter_config.json", "merge the adapter", "move it"
        )


# --- configs


def test_every_kind_of_the_installed_transformers() -> None:
    """Whatever has experts or layers without attention in its own config says so."""
    kinds = {
        "mixtral": "experts",
        "qwen2_moe": "experts",
        "jamba": "not attention alone and a mixture of experts",
        "mamba": "not attention alone",
        "falcon_mamba": "not attention alone",
        "zamba": "not attention alone",
        "rwkv": "not attention alone",
        "recurrent_gemma": "not attention alone (recurrent)",
        "falcon_h1": "not attention alone",
        "bamba": "not attention alone",
        "qwen3_next": "not attention alone (linear_attention) and a mixture of experts",
        "lfm2": "not attention alone",
        "bert": "an encoder, which",
        "xlm-roberta": "an encoder, which",
        "t5": "an encoder with a decoder",
        "bart": "an encoder with a decoder",
        "llava": "sees or hears",
    }
    known = kinds.keys() & set(CONFIG_MAPPING.keys())
    assert len(known) >= 12
    for kind in known:
        assert kinds[kind] in kind_of(CONFIG_MAPPING[kind]().to_dict()), kind
    dense = {name for name, row in ARCHITECTURES.items() if row.experts is None and not (row.kinds or row.mixer)}
    for kind in {"phi", "gptj", "bloom", "gpt_neo", *dense} & set(CONFIG_MAPPING.keys()):
        assert kind_of(CONFIG_MAPPING[kind]().to_dict()) == "", kind


def test_what_the_page_says_of_other_types() -> None:
    """Every type that this version of transformers has, by the configuration that its class has by default."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \| (converts|its language model converts|is refused.*) \|$", page, re.MULTILINE)
    said = {kind: verdict for kinds, verdict in rows for kind in re.findall(r"`(.+?)`", kinds)}
    assert sum(len(kinds.split(", ")) for kinds, _ in rows) == len(said) >= 100
    seeing = {tower.model_type for tower in TOWERS}
    assert {kind for kind, verdict in said.items() if verdict == "converts"} == ARCHITECTURES.keys()
    assert {kind for kind, verdict in said.items() if verdict.startswith("its language")} == seeing
    converted = {*ARCHITECTURES, *seeing}
    known = {kind: verdict for kind, verdict in said.items() if kind in CONFIG_MAPPING and kind not in converted}
    assert len(known) > 40
    for kind, verdict in known.items():
        clause = "" if verdict.endswith("types that convert") else verdict.replace("is refused:", ",")
        found = kind_of(CONFIG_MAPPING[kind]().to_dict())
        assert found.startswith(clause), kind
        assert bool(found) == bool(clause), kind


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lfm2_moe", "layer_types": ["conv", "full_attention"]}, "not attention alone (conv)"),
        ({"model_type": "codegen"}, "'codegen', which is not supported"),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 4}}, "quantised (MLX)"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quantised (quanto)"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantised (torchao)"),
    ],
)
def test_the_type_comes_before_the_weights(config: dict[str, Any], words: str, run: Run, tmp_path: Path) -> None:
    for make in (write_checkpoint, lambda folder, config: files("config.json")(folder.mkdir() or folder)):
        folder = tmp_path / make.__name__.strip("<>")
        make(folder, config=config)
        (folder / "config.json").write_text(json.dumps(dict(CONFIG) | config))
        assert_refused(run("plan", folder, "--rank", 8), words)


# --- heads and parts


@pytest.mark.parametrize(
    ("family", "auto", "words"),
    [
        ("llama", "AutoModelForSequenceClassification", ["a sequence classifier"]),
        ("gpt_neox", "AutoModelForSequenceClassification", ["a sequence classifier"]),
        ("qwen2", "AutoModelForTokenClassification", ["a classifier of tokens"]),
        ("llama", "AutoModelForQuestionAnswering", ["marking them in a text"]),
        ("opt", "AutoModelForQuestionAnswering", ["marking them in a text"]),
        ("llama", "AutoModel", ["a base model without the head", "lm_head.weight"]),
        ("gpt_neox", "AutoModel", ["a base model without the head", "embed_out.weight"]),
    ],
)
@pytest.mark.parametrize("keeps_names", [True, False])
def test_models_with_other_heads(
    family: str, auto: str, words: list[str], keeps_names: bool, text: Path, run: Run, tmp_path: Path
) -> None:
    """All commands that may be given one say the same."""
    import transformers

    model = getattr(transformers, auto).from_config(stock_config(family, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "model")
    if not keeps_names:  # a config whose classes were left out
        config = read_config(tmp_path / "model")
        del config["architectures"]
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        words = ["a classifier ("] if "Classification" in auto else words
    write_tokenizer(tmp_path / "model")
    refused = run("plan", tmp_path / "model", "--rank", 8)
    assert_refused(refused, *words)
    for command in (
        ["convert", tmp_path / "model", "--rank", 8, "--out", tmp_path / "out"],
        ["evaluate", tmp_path / "model", "--text", text, "--window", 16],
        ["calibrate", tmp_path / "model", "--calib", text, "--out", tmp_path / "out"],
    ):
        assert run(*command).err == refused.err
    assert not (tmp_path / "out").exists()


def test_base_model_of_a_tied_one_is_the_whole(tmp_path: Path) -> None:
    """Where the head is the embedding, nothing is missing."""
    model = stock_model("llama", tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "model")
    assert plan(tmp_path / "model", rank=8).ranks


def quantised(parts: dict[str, torch.dtype]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "gpt_neox.layers.1.attention.dense."
        del tensors[f"{name}weight"]
        tensors |= {f"{name}{part}": torch.zeros(8, 8).to(dtype) for part, dtype in parts.items()}

    return change


@pytest.mark.parametrize(
    ("parts", "by"),
    [
        ({"weight._data": torch.int8, "weight._scale": torch.float16}, "checkpoint of quanto"),
        ({"_weight_qdata": torch.int8, "_weight_scale": torch.float16}, "checkpoint of torchao"),
        ({"weight": torch.uint8, "weight.absmax": torch.float32}, "quantised checkpoint"),
        ({"weight": torch.uint32, "scales": torch.float16, "biases": torch.float16}, "quantised checkpoint"),
    ],
)
def test_quantised_without_a_word_in_the_config(
    parts: dict[str, torch.dtype], by: str, dense: Path, run: Run, tmp_path: Path
) -> None:
    tensors = load_file(dense / "model.safetensors")
    quantised(parts)(tensors)
    assert_refused(run("plan", write_checkpoint(tmp_path / "model", tensors), "--rank", 8), by, "unquantised")


def test_quantised_pickle(dense: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of a class of torchao, which is not here and would not be imported if it were."""
    module = ModuleType("torchao.quantization")
    module.Int8Tensor = type("Int8Tensor", (), {"__module__": module.__name__})  # type: ignore[attr-defined]
    model = shutil.copytree(dense, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torchao", ModuleType("torchao"))
        patch.setitem(sys.modules, module.__name__, module)
        torch.save({"gpt_neox.embed_in.weight": module.Int8Tensor()}, model / "pytorch_model.bin")
    assert_refused(run("plan", model, "--rank", 8), "torchao has quantised", "unquantised model")


# --- wrappers

WRAPPED: dict[str, tuple[str, Callable[[str], str], str]] = {
    "DDP": ("gpt_neox", lambda name: f"module.{name}", "`module.`"),
    "compiled": ("llama", lambda name: f"_orig_mod.{name}", "`_orig_mod.`"),
    "compiled in DDP": ("qwen2", lambda name: f"module._orig_mod.{name}", "`module.`"),
    "compiled blocks": (
        "llama",
        lambda name: re.sub(r"(layers\.\d+)\.", r"\1._orig_mod.", name),
        "`_orig_mod.`",
    ),
    "FSDP": (
        "llama",
        lambda name: "_fsdp_wrapped_module." + re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", name),
        "`_fsdp_wrapped_module.`",
    ),
    "PEFT": (
        "gpt_neox",
        lambda name: "base_model.model." + re.sub(r"(dense\w*|query_key_value)\.", r"\1.base_layer.", name),
        "`base_layer.`",
    ),
    "inside of a model that sees": (
        "llama",
        lambda name: re.sub(r"^model\.", "model.language_model.", name),
        "`model.language_model.`",
    ),
    "inside of one of old": ("mistral", lambda name: f"language_model.{name}", "`language_model.`"),
}


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Give the tensors of a checkpoint other names, index and all."""
    for file in folder.glob("*.safetensors"):
        tensors = {change(name): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    for file in folder.glob("*.bin"):
        torch.save({change(name): tensor for name, tensor in torch.load(file).items()}, file)
    for file in folder.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {change(name): shard for name, shard in index["weight_map"].items()}
        file.write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["one file", "shards", "pickled", "pickled shards"])
@pytest.mark.parametrize("case", WRAPPED)
def test_wrapped(case: str, form: str, text: Path, run: Run, tmp_path: Path) -> None:
    """The result is that of the model itself, to the byte; and all commands see the same model."""
    from support.checkpoints import pickle_weights

    family, change, part = WRAPPED[case]
    limit = "150kB" if "shards" in form else "5GB"
    plain = write_family(tmp_path / "plain", family, max_shard_size=limit, tie_word_embeddings=False)
    if "pickled" in form:
        pickle_weights(plain)
    wrapped = tmp_path / "wrapped" / "plain"
    shutil.copytree(plain, wrapped)
    rename(wrapped, change)
    one = convert(plain, tmp_path / "one", rank=8, device="cpu", check=False)
    two = convert(wrapped, tmp_path / "two", rank=8, device="cpu")
    assert [note for note in two.plan.notes if part in note]
    assert not [note for note in one.plan.notes if "wrapper" in note]
    assert read_weights(tmp_path / "one").keys() == read_weights(tmp_path / "two").keys()
    theirs = read_weights(tmp_path / "two")
    for name, tensor in read_weights(tmp_path / "one").items():
        assert torch.equal(tensor, theirs[name]), name
    assert not failed(verify(tmp_path / "two", str(wrapped)))
    expected = evaluate(plain, text, window=16, device="cpu").perplexity
    assert evaluate(wrapped, text, window=16, device="cpu").perplexity == pytest.approx(expected, rel=1e-6)


def test_wrapped_and_calibrated(calibration: Any, dense: Path, tmp_path: Path) -> None:
    wrapped = shutil.copytree(dense, tmp_path / "wrapped")
    rename(wrapped, WRAPPED["PEFT"][1])
    for source, out in ((dense, "one"), (wrapped, "two")):
        convert(source, tmp_path / out, keep=0.5, calibration=calibration, device="cpu")
    theirs = read_weights(tmp_path / "two")
    for name, tensor in read_weights(tmp_path / "one").items():
        assert torch.equal(tensor, theirs[name]), name


def test_wrapped_result(factored: Path, dense: Path, text: Path, tmp_path: Path) -> None:
    """A factored model that was trained compiled and in DDP."""
    wrapped = shutil.copytree(factored, tmp_path / "wrapped")
    rename(wrapped, lambda name: f"module._orig_mod.{name}")
    densify(factored, tmp_path / "one", device="cpu")
    densify(wrapped, tmp_path / "two", device="cpu")
    theirs = read_weights(tmp_path / "two")
    for name, tensor in read_weights(tmp_path / "one").items():
        assert torch.equal(tensor, theirs[name]), name
    # its own class refuses to load it so, and that is what a user would get
    assert [check.name for check in failed(verify(wrapped, str(dense)))] == ["logits"]
    with pytest.raises(InputError, match=r"cannot be loaded: .*_orig_mod"):
        evaluate(wrapped, text, window=16, device="cpu")
    assert evaluate(tmp_path / "two", text, window=16, device="cpu").tokens > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: (
                {f"base_model.model.{n.replace('dense.', 'dense.base_layer.')}": v for n, v in t.items()}
                | {"base_model.model.gpt_neox.layers.0.attention.dense.lora_A.default.weight": torch.ones(2, 64)}
            ),
            ["adapter in its layers that was not merged", "merge_and_unload"],
        ),
        (
            lambda t: {f"module.{n}": v for n, v in t.items() if "layers.1.attention.dense.weight" not in n},
            ["DDP", "`module.`", "lacks gpt_neox.layers.1.attention.dense.weight"],
        ),
        (
            lambda t: {f"language_model.{n}": v for n, v in t.items()} | {"vision_tower.weight": torch.ones(2, 2)},
            ["a model that sees or hears", "vision_tower.weight"],
        ),
    ],
)
def test_wrapped_and_something_else(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    words: list[str],
    dense: Path,
    run: Run,
    tmp_path: Path,
) -> None:
    tensors = {name: value.contiguous() for name, value in change(load_file(dense / "model.safetensors")).items()}
    assert_refused(run("plan", write_checkpoint(tmp_path / "model", tensors), "--rank", 8), *words)


def test_names_are_not_touched_without_need(dense: Path) -> None:
    source = LocalSource(dense)
    assert source.stored == {}
    assert not [note for note in source.notes if "wrapper" in note]


def test_a_name_twice_without_its_wrapper(dense: Path, tmp_path: Path) -> None:
    """Nothing is chosen among two tensors."""
    tensors = load_file(dense / "model.safetensors")
    tensors |= {f"module.{name}": tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(InputError, match=r"has the tensor module\."):
        plan(write_checkpoint(tmp_path / "model", tensors), rank=8)
