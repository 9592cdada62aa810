"""Settings files of the training command: TOML, one file a run, everything the paper leaves open under a name.

A file may say ``inherit = "other.toml"``; its own values then come on top, section by section. Paths are relative to
the file they are written in.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from svdconvert.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Section = TypeVar("_Section")


@dataclass(frozen=True)
class ModelSettings:
    """The model to start from.

    Attributes:
        path: folder, Hub repository or short name (``polyglot-ko-1.3b``).
        trained_by: instead, a settings file: its result is the start, and is trained first if it is not there.
        revision: branch, tag or commit on the Hub.
        weights: type of the weights in memory. Masters of a full fine-tuning should be float32.
        attention: attention implementation of transformers; empty leaves the choice to it.
    """

    path: str = ""
    trained_by: str = ""
    revision: str = ""
    weights: str = "float32"
    attention: str = ""


@dataclass(frozen=True)
class ConvertSettings:
    """Factoring the start model with svdconvert, before anything is trained.

    Attributes:
        rank, keep, params: size of the result, one of them; all empty: the model is trained as it is.
        method: row of svdconvert's method table.
        layout: ``balanced`` or ``pivoted``.
        allocation: ``uniform`` or ``global``; empty: what the method does best with.
        targets: patterns that choose among the linear layers; empty: all of them.
        calibration: text for data-aware methods: a file, or ``train`` for the rendered training samples.
        calibration_samples, calibration_length: sequences to read, and tokens in each (0: the model's longest).
    """

    rank: int = 0
    keep: float = 0.0
    params: int = 0
    method: str = "svd"
    layout: str = "balanced"
    allocation: str = ""
    targets: tuple[str, ...] = ()
    calibration: str = ""
    calibration_samples: int = 128
    calibration_length: int = 0

    @property
    def wanted(self) -> bool:
        """Whether the start model is factored."""
        return bool(self.rank or self.keep or self.params)


@dataclass(frozen=True)
class QuantizationSettings:
    """Loading the frozen weights quantised (bitsandbytes), as QLoRA (arXiv:2305.14314) does.

    Attributes:
        bits: 4, 8, or 0 for none.
        kind: ``nf4`` or ``fp4``.
        double: quantise the quantisation constants too.
        compute: type to multiply in.
    """

    bits: int = 0
    kind: str = "nf4"
    double: bool = True
    compute: str = "bfloat16"


@dataclass(frozen=True)
class AdapterSettings:
    """What trains in place of the weights.

    Attributes:
        kind: ``none`` (all weights train), ``lora`` (peft), ``llama-adapter`` (one gate a head, module of this
            example) or ``adaption-prompt`` (peft's LLaMA-Adapter, one gate a layer; llama, mistral and gpt2 only).
        rank, alpha, dropout: of LoRA.
        targets: layers that LoRA goes beside; on a factored layer, beside the whole product.
        length, layers: prompt tokens, and the number of layers from the top, of a LLaMA-Adapter.
    """

    kind: str = "none"
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    length: int = 10
    layers: int = 30


@dataclass(frozen=True)
class DistillationSettings:
    """DistilBERT's three losses (arXiv:1910.01108) with a dense teacher.

    Attributes:
        teacher: folder, Hub repository or short name; empty: no distillation.
        teacher_trained_by: instead, a settings file whose result is the teacher.
        teacher_weights: type of the teacher's weights in memory.
        temperature: T of both softmaxes.
        alpha_ce, alpha_task, alpha_cos: weights of T^2 KL, of the cross-entropy with the labels, and of 1 - cos of the
            last hidden states.
    """

    teacher: str = ""
    teacher_trained_by: str = ""
    teacher_weights: str = "bfloat16"
    temperature: float = 2.0
    alpha_ce: float = 5.0
    alpha_task: float = 2.0
    alpha_cos: float = 1.0

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.teacher or self.teacher_trained_by)


@dataclass(frozen=True)
class DataSettings:
    """What is trained on.

    Attributes:
        kind: ``dialogue``, samples of this example's schema, or ``text``, raw text for continued pre-training.
        train, validation: JSONL files of samples, or text files.
        template: row of the template table.
        passage: ``span``, ``section`` or ``document``: what of the passage in the file is used.
        elision: what stands where the authors left out a part of the template ``kodoc2dial``; empty: their dots.
        max_length: tokens of prompt and answer; a longer sample is dropped, and counted. For text, of a window.
        max_answer: tokens of the answer; a longer one is dropped.
        answer_only: the loss counts the answer's tokens only.
        limit, validation_limit: use that many samples, chosen by the seed; 0: all.
    """

    kind: str = "dialogue"
    train: str = ""
    validation: str = ""
    template: str = "kodoc2dial"
    passage: str = "document"
    elision: str = ""
    max_length: int = 1024
    max_answer: int = 256
    answer_only: bool = True
    limit: int = 0
    validation_limit: int = 0


@dataclass(frozen=True)
class TrainingSettings:
    """The recipe. Defaults are the paper's; what it leaves open is marked (open).

    Attributes:
        epochs, batch_size, clip, learning_rate, schedule, weight_decay: as named; the batch is that of all devices
            together.
        warmup_epochs, evaluation_epochs: lengths in epochs.
        micro_batch: samples on a device at a time; the rest of the batch is accumulated (open).
        evaluation_batch: likewise in evaluations (open).
        optimizer: a name of transformers, or ``paged``: paged_adamw_32bit where the device has it (open).
        beta2: of AdamW (open).
        autocast: ``bf16``, ``fp16`` or ``no`` (open).
        gradient_checkpointing: compute activations twice and keep fewer (open).
        select: ``last`` or ``best`` by evaluation loss (open).
        keep_checkpoints: how many to leave on disk (open).
        seed: of data order, dropout and new weights (open).
        max_steps: stop after so many, for trials; 0: by epochs (open).
        timeout_hours: how long processes wait for the first one, which converts (open).
    """

    epochs: float = 3.0
    batch_size: int = 64
    clip: float = 1.0
    learning_rate: float = 3e-4
    schedule: str = "linear"
    warmup_epochs: float = 0.3
    weight_decay: float = 0.02
    evaluation_epochs: float = 0.5
    micro_batch: int = 8
    evaluation_batch: int = 8
    optimizer: str = "adamw_torch"
    beta2: float = 0.999
    autocast: str = "bf16"
    gradient_checkpointing: bool = False
    select: str = "last"
    keep_checkpoints: int = 1
    seed: int = 42
    max_steps: int = 0
    timeout_hours: float = 12.0


@dataclass(frozen=True)
class SpeechSettings:
    """The check whether a model still speaks, before the first step and at every evaluation.

    Attributes:
        samples: answers to generate; 0: no check.
        show: how many of them to print.
        new_tokens: longest answer.
        perplexity_ratio: warn above so many times the perplexity of the model that was factored.
        repetition: warn above this rate of repeated 4-grams.
        empty: warn above this rate of empty answers.
    """

    samples: int = 8
    show: int = 3
    new_tokens: int = 48
    perplexity_ratio: float = 10.0
    repetition: float = 0.5
    empty: float = 0.5


@dataclass(frozen=True)
class Settings:
    """One training run.

    Attributes:
        name: how tables call it.
        output: folder of everything it writes.
    """

    name: str
    output: str
    model: ModelSettings = field(default_factory=ModelSettings)
    convert: ConvertSettings = field(default_factory=ConvertSettings)
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    speech: SpeechSettings = field(default_factory=SpeechSettings)

    def to_json(self) -> dict[str, Any]:
        """The settings in JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


# Values that are paths; a short name or a repository stays as it is.
_PATHS = {
    "": ("output",),
    "model": ("path", "trained_by"),
    "convert": ("calibration",),
    "distillation": ("teacher", "teacher_trained_by"),
    "data": ("train", "validation"),
}
_CHOICES = {
    ("model", "weights"): ("float32", "bfloat16", "float16"),
    ("convert", "layout"): ("balanced", "pivoted"),
    ("convert", "allocation"): ("", "uniform", "global"),
    ("quantization", "bits"): (0, 4, 8),
    ("quantization", "kind"): ("nf4", "fp4"),
    ("quantization", "compute"): ("float32", "bfloat16", "float16"),
    ("adapter", "kind"): ("none", "lora", "llama-adapter", "adaption-prompt"),
    ("distillation", "teacher_weights"): ("float32", "bfloat16", "float16"),
    ("data", "kind"): ("dialogue", "text"),
    ("training", "autocast"): ("bf16", "fp16", "no"),
    ("training", "select"): ("last", "best"),
}
_POSITIVE = {
    "training": ("epochs", "batch_size", "micro_batch", "evaluation_batch", "evaluation_epochs", "keep_checkpoints"),
    "data": ("max_length", "max_answer"),
    "adapter": ("rank", "length", "layers"),
    "distillation": ("temperature",),
}


def read_settings(path: str | Path, overrides: Mapping[str, Any] | None = None, anchor: Path | None = None) -> Settings:
    """Read and check a settings file.

    Args:
        path: the file.
        overrides: values on top of it, in the same form as the file's tables.
        anchor: folder that paths in the overrides are relative to; the working directory by default.

    Raises:
        InputError: a file is missing or no TOML, or a setting is unknown, of the wrong type or impossible.
    """
    table = _read(Path(path).expanduser(), ())
    if overrides:
        table = _merged(table, _anchored(overrides, anchor or Path.cwd()))
    return _checked(_build(Settings, table, str(path), ""), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file, or what a program has written as JSON (``.json``).

    Raises:
        InputError: it cannot be read or is malformed; the message has the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # TOML, JSON and UTF-8 errors alike
        raise InputError(f"{path} is not valid: {error}") from None
    return found


def parse_value(text: str) -> Any:
    """A value as a settings file has it, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise InputError(f"{path} inherits from itself")
    table = read_toml(path)
    parent = table.pop("inherit", None)
    table = _anchored(table, path.parent)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise InputError(f"{path}: inherit must be the name of another settings file")
    return _merged(_read(path.parent / parent, (*seen, path)), table)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in top.items():
        old = both.get(key)
        both[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return both


def _anchored(table: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The table with the paths that exist, or that are written as paths, made absolute."""

    def absolute(value: Any) -> Any:
        if not isinstance(value, str) or not value:
            return value
        there = folder / Path(value).expanduser()
        written_as_path = value.startswith((".", "~", "/")) or value.endswith((".toml", ".jsonl", ".txt"))
        return str(there.resolve()) if written_as_path or there.exists() else value

    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in table.items()}
    for section, keys in _PATHS.items():
        values = out if not section else out.get(section, {})
        if not isinstance(values, dict):
            continue  # refused where the sections are built
        for key in keys:
            if key in values:
                values[key] = str((folder / values[key]).resolve()) if key == "output" else absolute(values[key])
    return out


def _build(kind: type[_Section], table: Mapping[str, Any], file: str, section: str) -> _Section:
    hints = typing.get_type_hints(kind)
    names = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{section}.{key}" if section else key
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            raise InputError(
                f"{file} has an unknown setting {where}" + (f"; did you mean {close[0]}?" if close else "")
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise InputError(f"{file}: {where} must be a section, [{where}]")
            values[key] = _build(typing.cast(Any, hint), value, file, where)
        else:
            values[key] = _value(value, hint, file, where)
    missing = [
        one.name
        for one in dataclasses.fields(kind)  # type: ignore[arg-type]
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and one.name not in values
    ]
    if missing:
        raise InputError(f"{file} lacks the setting {missing[0]}")
    return kind(**values)


def _value(value: Any, hint: Any, file: str, where: str) -> Any:
    if isinstance(hint, types.GenericAlias) or typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise InputError(f"{file}: {where} must be a list of strings")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        kind = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}[hint.__name__]
        raise InputError(f"{file}: {where} must be {kind}, not {value!r}")
    return value


def _checked(settings: Settings, file: str) -> Settings:
    def refuse(sentence: str) -> None:
        raise InputError(f"{file}: {sentence}")

    for (section, key), choices in _CHOICES.items():
        value = getattr(getattr(settings, section), key)
        if value not in choices:
            refuse(f"{section}.{key} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    for section, keys in _POSITIVE.items():
        for key in keys:
            if getattr(getattr(settings, section), key) <= 0:
                refuse(f"{section}.{key} must be above zero")
    model, convert, adapter, training = settings.model, settings.convert, settings.adapter, settings.training
    if bool(model.path) == bool(model.trained_by):
        refuse("give either model.path or model.trained_by")
    if sum(map(bool, (convert.rank, convert.keep, convert.params))) > 1:
        refuse("give only one of convert.rank, convert.keep and convert.params")
    if settings.distillation.teacher and settings.distillation.teacher_trained_by:
        refuse("give either distillation.teacher or distillation.teacher_trained_by")
    if not settings.data.train or not settings.data.validation:
        refuse("give data.train and data.validation")
    if settings.quantization.bits and adapter.kind != "lora":
        refuse("quantised weights cannot be trained themselves; set adapter.kind to 'lora'")
    if model.weights == "float16" and adapter.kind == "none" and not settings.quantization.bits:
        refuse(
            "weights in float16 cannot be trained: an update is smaller than float16's spacing and is lost, and with "
            "fp16 autocast torch stops with 'Attempting to unscale FP16 gradients'; set model.weights to 'float32' "
            "(masters) or 'bfloat16'"
        )
    if training.batch_size % training.micro_batch:
        refuse("training.batch_size must be a multiple of training.micro_batch")
    return settings
