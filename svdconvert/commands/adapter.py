"""LoRA adapters as peft saves them: what is a plain product beside each layer, and what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.commands.patterns import matching, suffixed
from svdconvert.errors import InputError
from svdconvert.fields import COUNT, FLAG, NUMBER, TEXT, Kind, either, many, optional, require, short, table
from svdconvert.storage.documents import open_regular, read_json
from svdconvert.storage.headers import read_header
from svdconvert.storage.other_formats import ADAPTER_CONFIG
from svdconvert.tensors import FLOATS, TensorInfo
from svdconvert.words import listing

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_RANK = Kind("a rank", lambda value: COUNT.fits(value) and value > 0)
_NAMES = optional(either(TEXT, many(TEXT)))

# What is read of adapter_config.json.
_FIELDS: Mapping[str, Kind] = {
    "r": _RANK,
    "lora_alpha": NUMBER,
    "rank_pattern": optional(table(_RANK)),
    "alpha_pattern": optional(table(NUMBER)),
    "use_rslora": optional(FLAG),
    "fan_in_fan_out": optional(FLAG),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": optional(either(COUNT, many(COUNT))),
    "layers_pattern": _NAMES,
}

# Initialisations that leave the base model's weights as they are; the others (pissa, olora, corda, loftq, lora_ga)
# train beside changed ones, which peft makes again whenever it loads such an adapter.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

# Fields that say nothing about the result: what it was trained on and how, and settings of what is off.
_IDLE = frozenset(
    "auto_mapping base_model_name_or_path revision peft_version task_type inference_mode lora_dropout loftq_config "
    "eva_config corda_config lora_ga_config megatron_core qalora_group_size runtime_config ephemeral_gpu_offload "
    "ensure_weight_tying init_lora_weights peft_type".split()
) | frozenset(_FIELDS)


class Adapter:
    """A LoRA adapter: the factors of each layer, and their scales.

    Attributes:
        folder: where it is.
        config: adapter_config.json.
        pairs: module path -> (A, B).
        scales: module path -> factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    def __init__(self, folder: Path) -> None:
        """Read the config and the header of the weights.

        Raises:
            InputError: the files are damaged, or the adapter is more than a product beside each layer.
        """
        path = folder / ADAPTER_CONFIG
        self.folder = folder
        self.config = read_json(path, f"{folder} has no {ADAPTER_CONFIG}, so it is not a peft adapter")
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise InputError(f"{folder} has no {ADAPTER_WEIGHTS}; save the adapter with save_pretrained")
        self._refuse_other_kinds()
        require(self.config, _FIELDS, path, "save the adapter again")
        self.pairs = _pairs(folder)
        self._refuse_unreached()
        self.scales = self._scales()

    def identity(self) -> str:
        """Digest of the weights and the config."""
        digest = hashlib.sha256()
        with open_regular(self.folder / ADAPTER_WEIGHTS) as handle:
            while piece := handle.read(1 << 24):
                digest.update(piece)
        digest.update(json.dumps(self.config, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def _refuse_other_kinds(self) -> None:
        """Refuse, by name, whatever makes more of an adapter than a product: peft would compute something else."""
        kind = self.config.get("peft_type")
        wrong = {} if kind == "LORA" else {"peft_type": kind}
        if self.config.get("init_lora_weights") not in _INITIALISATIONS:
            wrong["init_lora_weights"] = self.config["init_lora_weights"]
        # An empty value switches a feature off, whatever the feature.
        empty: tuple[Any, ...] = (None, False, [], {}, "", "none")
        wrong |= {field: value for field, value in self.config.items() if field not in _IDLE and value not in empty}
        for field, value in wrong.items():
            raise InputError(
                f"{self.folder} cannot be folded: its {field[:60]} is {short(value)}; only a plain LoRA adds a product "
                "to each layer of the model as it is"
            )

    def _refuse_unreached(self) -> None:
        """Refuse weights of layers that the config does not name: peft would not load them."""
        names = list(self.pairs)
        reached = set(names)
        if (targets := self.config.get("target_modules")) not in (None, "all-linear"):
            reached = self._named(targets, names)
        if excluded := self.config.get("exclude_modules"):
            reached -= self._named(excluded, names)
        layers = self.config.get("layers_to_transform")
        if layers not in (None, []):
            numbers = self._layer_numbers(names)
            wanted = [layers] if isinstance(layers, int) else layers
            reached = {name for name in reached if numbers.get(name) in wanted}
        if left := [name for name in names if name not in reached]:
            raise InputError(
                f"{self.folder} cannot be folded: {ADAPTER_WEIGHTS} has weights for {listing(left)}, which "
                f"{ADAPTER_CONFIG} does not name, so peft would leave them out"
            )

    def _named(self, targets: str | Sequence[str], names: Sequence[str]) -> set[str]:
        if isinstance(targets, str):
            return set(matching([targets], names, self.folder / ADAPTER_CONFIG))
        return {name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)}

    def _layer_numbers(self, names: Iterable[str]) -> dict[str, int]:
        """Number of the block that a module is in, as peft finds it."""
        patterns = self.config.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if any(pattern != r"[^.]*" and not re.fullmatch(r"\w+", pattern) for pattern in patterns):
            raise InputError(f"{self.folder} cannot be folded: its layers_pattern is not a name ({short(patterns)})")
        found: dict[str, int] = {}
        for name in names:
            for pattern in patterns:
                match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
                if match:
                    found.setdefault(name, int(match[1]))
        return found

    def _scales(self) -> dict[str, float]:
        ranks = self._setting("rank_pattern", "r")
        alphas = self._setting("alpha_pattern", "lora_alpha")
        for module, (first, _) in self.pairs.items():
            if ranks[module] != first.shape[0]:
                raise InputError(
                    f"{self.folder} is damaged: {ADAPTER_CONFIG} says rank {ranks[module]} for {module}, its weights "
                    f"have {first.shape[0]}"
                )
        root: Callable[[float], float] = math.sqrt if self.config.get("use_rslora") else float
        return {module: alphas[module] / root(ranks[module]) for module in self.pairs}

    def _setting(self, patterns: str, default: str) -> dict[str, Any]:
        """A setting by module path: that of the first pattern that fits, else the adapter's own."""
        own = self.config.get(patterns) or {}
        by_pattern = {suffixed(pattern): value for pattern, value in own.items()}
        found = matching(list(by_pattern), list(self.pairs), f"{patterns} of {self.folder / ADAPTER_CONFIG}")
        return {module: by_pattern[found[module]] if module in found else self.config[default] for module in self.pairs}


def _pairs(folder: Path) -> dict[str, tuple[TensorInfo, TensorInfo]]:
    """(A, B) by module path.

    Raises:
        InputError: there are none, or tensors that are no halves of a product.
    """
    halves: dict[str, dict[str, TensorInfo]] = {}
    for info in read_header(folder / ADAPTER_WEIGHTS):
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight", info.name)
        if match is None:
            raise InputError(f"{folder} cannot be folded: {info.name} is not a LoRA weight of a linear layer")
        if info.dtype not in FLOATS or len(info.shape) != 2 or not info.size:
            raise InputError(
                f"{folder} cannot be folded: {info.name} is {info.dtype} of shape {list(info.shape)}, not a matrix of "
                "floating-point numbers"
            )
        halves.setdefault(match[1], {})[match[2]] = info
    if not halves:
        raise InputError(f"{folder} holds no LoRA weights; save the adapter with save_pretrained")
    for module, half in halves.items():
        if half.keys() != {"A", "B"} or half["A"].shape[0] != half["B"].shape[1]:
            raise InputError(f"{folder} is damaged: lora_A and lora_B of {module} do not fit together")
    return {module: (half["A"], half["B"]) for module, half in halves.items()}
