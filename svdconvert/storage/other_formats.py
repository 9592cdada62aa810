"""Folders and repositories that are not model checkpoints, and the command that turns each into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"
_CHECKPOINT = re.compile(r"(checkpoint-(\d+))/")
_SNAPSHOT = re.compile(r"(snapshots/([^/]+))/config\.json")
_MODEL = re.compile(r"([^/]+)/config\.json")


@dataclass(frozen=True)
class _Format:
    """One way to store a model.

    Attributes:
        files: pattern of a whole path in it.
        is_: its name, a format string over WHERE and FILE, the first such path.
        remedy: what to do, in the imperative.
    """

    files: str
    is_: str
    remedy: str


# In this order; all but the first only where transformers finds no weights to load.
_FORMATS = (
    _Format(r"model_index\.json", "a diffusers pipeline, not a language model", "give the folder of a language model"),
    _Format(
        r"zero_to_fp32\.py|global_step\d+/.*|.*_optim_states\.pt",
        "a DeepSpeed ZeRO checkpoint, whose weights are in the parts that its processes had",
        "put them together with `python {where}/zero_to_fp32.py {where} DIR`, add config.json and the tokenizer, and "
        "give DIR",
    ),
    _Format(
        r"pytorch_model_fsdp\.bin",
        "a checkpoint of FSDP under a name of its own",
        "rename {file} to pytorch_model.bin, and see that config.json is beside it",
    ),
    _Format(
        r"(pytorch_model_fsdp[^/]*)/.*",
        "an FSDP checkpoint, whose weights are in the parts that its processes had",
        "put them together with `accelerate merge-weights {where}/{folder} DIR`, add config.json and the tokenizer, "
        "and give DIR",
    ),
    _Format(
        r".*\.distcp",
        "a checkpoint of torch.distributed.checkpoint, in parts that no model loads",
        "put them together with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {where}/{folder} "
        "pytorch_model.bin`, put config.json beside that file, and give their folder",
    ),
    _Format(
        r"flax_model.*\.msgpack(\.index\.json)?",
        "a model with weights of Flax only",
        "save it for PyTorch, with transformers 4: AutoModelForCausalLM.from_pretrained(..., "
        "from_flax=True).save_pretrained(DIR)",
    ),
    _Format(
        r"tf_model.*\.h5(\.index\.json)?|model\.ckpt.*",
        "a model with weights of TensorFlow only",
        "save it for PyTorch, with transformers 4: AutoModelForCausalLM.from_pretrained(..., "
        "from_tf=True).save_pretrained(DIR)",
    ),
    _Format(
        r".*\.gguf",
        "a model for llama.cpp (GGUF), not one that svdconvert wrote",
        "give the folder of a conversion",
    ),
    _Format(
        r"consolidated(\.\d+)?\.(pth|pt|safetensors)",
        "a model in the form in which Meta or Mistral publish theirs",
        "give its Hugging Face form, which transformers' convert_*_weights_to_hf.py writes",
    ),
    _Format(r"([^/]*/)?.*\.onnx", "a model with weights of ONNX only", "give the checkpoint that it was exported from"),
    _Format(r".*\.nemo", "a NeMo archive", "give the Hugging Face form, which NeMo's export scripts write"),
    _Format(
        r"(.*/)?mp_rank_\d+.*",
        "a Megatron checkpoint",
        "give its Hugging Face form, which Megatron's checkpoint converter writes",
    ),
)


def refuse_other_format(
    where: object, files: Collection[str], read: Callable[[str], Mapping[str, Any]], *, has_weights: bool
) -> None:
    """Refuse a folder that transformers would not load as a model, and name what it is.

    Args:
        where: what to call it.
        files: paths in it.
        read: reads a JSON file of it.
        has_weights: whether there are weights under a name that transformers loads.

    Raises:
        InputError: it is one of the known other things.
    """
    if ADAPTER_CONFIG in files:
        raise InputError(_adapter(where, read(ADAPTER_CONFIG), has_weights="config.json" in files and has_weights))
    for known in _FORMATS[:1] if has_weights else _FORMATS:
        for file in sorted(files):
            if re.fullmatch(known.files, file):
                words = {"where": where, "file": file, "folder": file.rpartition("/")[0]}
                raise InputError(f"{where} is {known.is_}; {known.remedy.format(**words)}")
    if not has_weights and (inner := _inner(files)):
        raise InputError(f"{where} is {inner[0]}; give {inner[1].format(where=where)}")


def _adapter(where: object, settings: Mapping[str, Any], *, has_weights: bool) -> str:
    if has_weights:
        return (
            f"{where} has an {ADAPTER_CONFIG} beside its weights, so it is a model with an adapter; merge the adapter "
            "with peft, or move it to a folder of its own and add it afterwards with `svdconvert fold`"
        )
    base = settings.get("base_model_name_or_path")
    named = f"of {base}" if isinstance(base, str) and base else "without the name of its base model"
    return (
        f"{where} is a PEFT adapter {named}, not a whole model; merge it into that model (merge_and_unload, then "
        "save_pretrained) and give the result, or, where it was trained on a converted model, run "
        f"`svdconvert fold CONVERTED --adapter {where} --out DIR`"
    )


def _inner(files: Collection[str]) -> tuple[str, str] | None:
    """What a folder of several models is, and which of them to give."""
    steps = {int(match[2]): match[1] for file in files if (match := _CHECKPOINT.match(file))}
    if steps:
        return "a folder of training checkpoints", f"one of them, the newest is {{where}}/{steps[max(steps)]}"
    snapshots = sorted(match[1] for file in files if (match := _SNAPSHOT.fullmatch(file)))
    if snapshots:
        return "a model's folder in the Hub cache", " or ".join(f"{{where}}/{name}" for name in snapshots[:3])
    models = sorted(match[1] for file in files if (match := _MODEL.fullmatch(file)))
    if models and "config.json" not in files:
        return "a folder of models", " or ".join(f"{{where}}/{name}" for name in models[:3])
    return None
