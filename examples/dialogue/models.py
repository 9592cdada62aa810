"""The model of a run: factored, quantised and adapted as its settings say; and what a finished run leaves, loaded.

No code that lies in a model's folder is run: factored checkpoints are loaded by the package's own classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.dialogue.settings import AdapterSettings, QuantizationSettings, Settings, read_settings
from svdconvert.errors import InputError
from svdconvert.families.table import FACTORED
from svdconvert.storage.documents import read_json
from svdconvert.storage.opening import local_folder

MODEL, ADAPTER, START, REPORT = "model", "adapter", "start", "report.json"


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        folder: the model that is loaded.
        source: the dense model it was factored from, or the same folder.
        config: config.json of ``folder``.
    """

    folder: Path
    source: Path
    config: Mapping[str, Any]

    @property
    def factored(self) -> bool:
        """Whether its layers are factored."""
        return self.config.get("model_type") in FACTORED


def result_of(path: str) -> Path:
    """The model that the run of a settings file has trained.

    Raises:
        InputError: the run trains an adapter, which is no model of its own.
    """
    settings = read_settings(path)
    if settings.adapter.kind != "none":
        raise InputError(f"{path} trains an adapter, not a model; another run cannot start from it")
    return Path(settings.output) / MODEL


def source_folder(settings: Settings) -> Path:
    """The folder of the model that is factored or trained.

    Raises:
        InputError, JobError: there is none, or it cannot be downloaded.
    """
    if settings.model.trained_by:
        return result_of(settings.model.trained_by)
    return local_folder(settings.model.path, settings.model.revision or None)


def factor(settings: Settings, device: str, calibration_text: Callable[[], Path], events: Any = None) -> Start:
    """The start model, factored first if the settings say so; a finished conversion is used again.

    Args:
        settings: of the run.
        device: that computes the factors.
        calibration_text: writes the training samples as text; called where the settings name ``train``.
        events: receiver of the conversion's progress.

    Raises:
        InputError, JobError: the model cannot be used or factored.
    """
    from svdconvert import Calibration, convert

    source, wanted = source_folder(settings), settings.convert
    folder = source
    if wanted.wanted:
        folder = Path(settings.output) / START
        calibration = None
        if wanted.calibration:
            text = calibration_text() if wanted.calibration == "train" else Path(wanted.calibration)
            calibration = Calibration(
                str(text),
                samples=wanted.calibration_samples,
                length=wanted.calibration_length or None,
                seed=settings.training.seed,
            )
        convert(
            source,
            folder,
            rank=wanted.rank or None,
            keep=wanted.keep or None,
            params=wanted.params or None,
            method=wanted.method,
            layout=wanted.layout,
            allocation=wanted.allocation or None,
            targets=wanted.targets,
            calibration=calibration,
            device=device,
            check=False,  # the run loads it anyway
            events=events,
        )
    return start_in(folder, source)


def start_in(folder: Path, source: Path | None = None) -> Start:
    """A model folder as a start.

    Raises:
        InputError: it is no model folder.
    """
    config = read_json(folder / "config.json", f"{folder} has no config.json, so it is no model folder")
    return Start(folder, source or folder, config)


def load_causal(
    folder: Path,
    device: torch.device,
    weights: str = "float32",
    quantization: QuantizationSettings | None = None,
    attention: str = "",
) -> nn.Module:
    """A dense or factored causal language model.

    Args:
        folder: the checkpoint.
        device: where to put it.
        weights: type of its weights in memory.
        quantization: how its linear layers are quantised.
        attention: attention implementation; empty leaves the choice to transformers.

    Raises:
        InputError: it cannot be loaded, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers import __version__ as version

    from svdconvert.foreign import quiet_transformers
    from svdconvert.models.loading import factored_classes

    config = start_in(folder).config
    spelling = "dtype" if tuple(map(int, version.split(".")[:2])) >= (4, 56) else "torch_dtype"
    options: dict[str, Any] = {spelling: getattr(torch, weights)}
    if attention:
        options["attn_implementation"] = attention
    if quantization and quantization.bits:
        if find_spec("bitsandbytes") is None:
            raise InputError("quantised loading needs bitsandbytes; pip install bitsandbytes")
        options |= {"quantization_config": _bitsandbytes(quantization), "device_map": {"": str(device)}}
    row = FACTORED.get(str(config.get("model_type")))
    try:
        with quiet_transformers():
            if row is None:
                model = _reads_what_it_saves(
                    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
                )
            else:
                model = factored_classes(row)[1].from_pretrained(folder, **options)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    return _quantized_for_training(model) if "device_map" in options else model.to(device)


def _reads_what_it_saves(model: Any) -> Any:
    """Let a dense GPT-NeoX take its own checkpoints.

    transformers holds the head as ``lm_head`` from 5.14 on and saves it as ``embed_out``. Its Trainer loads checkpoints
    without that renaming and only warns: a run that goes on, or that ends with its best checkpoint, would have the head
    of another step.
    """
    if model.config.model_type != "gpt_neox" or not hasattr(model, "lm_head"):
        return model

    def rename(module: Any, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        saved = f"{prefix}embed_out.weight"
        if saved in tensors:
            tensors[f"{prefix}lm_head.weight"] = tensors.pop(saved)

    model.register_load_state_dict_pre_hook(rename)
    return model


def _bitsandbytes(quantization: QuantizationSettings) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute),
    )


def _quantized_for_training(model: Any) -> nn.Module:
    """Keep bitsandbytes from repacking 4-bit weights on the CPU.

    Where the CPU has AVX512-BF16, the first forward pass in evaluation mode repacks them for a kernel that has no
    gradient: everything below a layer would stop to learn after the first evaluation, without a word. The kernel also
    takes ranks that are multiples of 64 only.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapt(model: nn.Module, settings: Settings, base: str) -> nn.Module:
    """Put the adapter of the settings on a model and freeze the rest; without one, all weights train.

    Args:
        model: loaded, quantised or not.
        settings: of the run.
        base: where the model was loaded from, for the saved adapter.

    Raises:
        InputError: this adapter cannot go on this model.
    """
    adapter = settings.adapter
    if settings.quantization.bits:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=settings.training.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    if adapter.kind == "none":
        return model.requires_grad_(True)
    if adapter.kind == "llama-adapter":
        from examples.dialogue.llama_adapter import LlamaAdapterModel

        return LlamaAdapterModel(model, adapter.length, adapter.layers, base)
    from peft import get_peft_model

    try:
        return get_peft_model(model, _peft_config(adapter))
    except ValueError as error:
        raise InputError(f"{adapter.kind} cannot go on this model: {str(error).splitlines()[0]}") from None


def _peft_config(adapter: AdapterSettings) -> Any:
    from peft import AdaptionPromptConfig, LoraConfig

    if adapter.kind == "adaption-prompt":
        return AdaptionPromptConfig(adapter_len=adapter.length, adapter_layers=adapter.layers, task_type="CAUSAL_LM")
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        task_type="CAUSAL_LM",
    )


def load_trained(
    settings: Settings,
    device: torch.device,
    quantization: QuantizationSettings | None = None,
    *,
    start: bool = False,
    weights: str = "",
) -> tuple[nn.Module, Any]:
    """The model that a finished run has trained, its adapter on it, and the tokenizer.

    Args:
        settings: of the run.
        device: where to put it.
        quantization: instead of the run's own; so a fully trained model can be looked at in 4 or 8 bits.
        start: load what the run started from, as it was before the first step.
        weights: type of the weights in memory; empty: that of the settings.

    Raises:
        InputError: the run is not finished, or its result cannot be loaded.
    """
    from svdconvert.models.tokenizer import load_tokenizer

    folder = Path(settings.output)
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder} holds no finished run; train it first") from None
    full = settings.adapter.kind == "none"
    base = folder / MODEL if full and not start else Path(report["start"])
    wanted = quantization or settings.quantization
    model = load_causal(base, device, weights or settings.model.weights, wanted, settings.model.attention)
    if settings.adapter.kind == "llama-adapter" and not start:
        from examples.dialogue.llama_adapter import load_adapter

        model = load_adapter(model, folder / ADAPTER)
    elif not full and not start:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / ADAPTER)
    return model.eval().requires_grad_(False), load_tokenizer(base)


def load_teacher(settings: Settings, device: torch.device) -> nn.Module:
    """The teacher of a distillation.

    Raises:
        InputError: it cannot be loaded.
    """
    wanted = settings.distillation
    folder = result_of(wanted.teacher_trained_by) if wanted.teacher_trained_by else local_folder(wanted.teacher)
    return load_causal(folder, device, wanted.teacher_weights).eval()


def without_output(settings: Settings) -> dict[str, Any]:
    """What identifies a run: its settings but for where it writes and what it is called."""
    plain = replace(settings, name="", output="").to_json()
    return {key: value for key, value in plain.items() if key not in ("name", "output")}
