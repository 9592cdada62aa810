"""What the result of a command must be, if it ends well on damaged input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from support.checkpoints import tree

if TYPE_CHECKING:
    from support.fuzz_bases import Target
    from support.fuzz_process import Ended

Weights = dict[str, torch.Tensor]


def wrong_result(target: Target, bases: Path, folder: Path, file: Path, ended: Ended, before: set[str]) -> str | None:
    """What is wrong with what a command has written; None if all is well."""
    if target.result is None:
        return None
    result = folder / target.result
    new = {path.name for path in result.glob("*") if path.is_file() and not path.name.startswith(".")} - before
    if ended.code:
        return f"{sorted(new)} under final names, but exit {ended.code}" if new else None
    if not (result / ("stats.json" if target.command[0] == "calibrate" else "config.json")).is_file():
        return "exit 0, but no result"
    if target.oracle == "same":
        return None if tree(result) == undisturbed(target, bases) else "another result than the undisturbed one"
    if target.oracle == "kept":
        name = str(file.relative_to(result))
        ours, theirs = tree(result, but=name), undisturbed(target, bases)
        theirs.pop(name)
        return None if ours == theirs else "a finished result has changed"
    if target.oracle == "factors":
        return _of_factors(folder / "f", result)
    if target.oracle == "source":
        return _of_source(folder / "m", result)
    if target.oracle == "adapter":
        return _of_adapter(folder / "f", folder / "a", result)
    return None


def undisturbed(target: Target, bases: Path) -> dict[str, object]:
    """The result of the same command on the base as it is."""
    from support.fuzz_process import copy_of, run

    if target not in _RESULTS:
        with copy_of(bases / target.base) as folder:
            ended = run(target.command, folder)
            assert ended.code == 0, ended
            assert target.result is not None
            _RESULTS[target] = tree(folder / target.result)
    return dict(_RESULTS[target])


_RESULTS: dict[Target, dict[str, object]] = {}


def read(folder: Path) -> Weights:
    """All tensors of a checkpoint, as the reference implementations read them."""
    tensors: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    for path in sorted(folder.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
    return tensors


def _of_source(source: Path, result: Path) -> str | None:
    """Every tensor is the source's own, or the best product of its rank; side files are the source's bytes."""
    theirs, ours = read(source), read(result)
    for name, tensor in ours.items():
        if name.endswith((".up.weight", ".down.weight", ".up.bias")):
            continue
        twin = next((theirs[n] for n in (name, name.replace("lm_head", "embed_out"), f"transformer.{name}",
                                         name.removeprefix("transformer.")) if n in theirs), None)  # fmt: skip
        if twin is None or not _equal(tensor, twin):
            return f"{name} is not the source's"
    for name, up in ours.items():
        module = name.removesuffix(".up.weight")
        if module == name:
            continue
        weight = next(
            theirs[n] for n in (f"{module}.weight", f"{module.removeprefix('transformer.')}.weight") if n in theirs
        )
        product = up.double() @ ours[f"{module}.down.weight"].double()
        weight = weight.double().T if module.startswith("transformer.") else weight.double()
        values = torch.linalg.svdvals(weight)
        best = values[up.shape[1] :].norm() ** 2
        if float((weight - product).norm() ** 2) > float(best) * 1.02 + 1e-4 * float(values.norm() ** 2):
            return f"{module} is not the best product"
    for path in source.glob("*token*"):
        if path.is_file() and (result / path.name).read_bytes() != path.read_bytes():
            return f"{path.name} is not the source's"
    return None


def _of_factors(factored: Path, result: Path) -> str | None:
    """Every matrix is the product of its factors, every other tensor theirs."""
    theirs, ours = read(factored), read(result)
    for name, tensor in ours.items():
        module = name.removesuffix(".weight")
        up, down = theirs.get(f"{module}.up.weight"), theirs.get(f"{module}.down.weight")
        if up is not None and down is not None:
            product = up.double() @ down.double()
            if not torch.allclose(tensor.double(), product, rtol=0.01, atol=1e-3 * float(product.abs().max())):
                return f"{name} is not the product of its factors"
            continue
        twins = (name, name.replace("embed_out", "lm_head"), name.replace(".bias", ".up.bias"))
        if not any(twin in theirs and _equal(tensor, theirs[twin]) for twin in twins):
            return f"{name} is not that of the factored model"
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double().nan_to_num(), other.double().nan_to_num())


def _of_adapter(base: Path, adapter: Path, result: Path) -> str | None:
    """Every product is the base's and the adapter's, scaled as its config says."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    ours, before = read(result), read(base)
    lora = {name.removeprefix("base_model.model."): tensor for name, tensor in read(adapter).items()}
    if not lora:
        return "an adapter without tensors was folded"
    for name in before:
        module = name.removesuffix(".up.weight")
        if module == name:
            continue
        old = before[name].double() @ before[f"{module}.down.weight"].double()
        if f"{module}.lora_A.weight" in lora:
            a, b = (lora[f"{module}.lora_{half}.weight"].double() for half in "AB")
            rank, alpha = _setting(config, "rank", "r", module), _setting(config, "alpha", "lora_alpha", module)
            if rank != a.shape[0]:
                return f"rank {rank} of {module} is that of the config, but {a.shape[0]} that of the weights"
            old = old + alpha / (rank**0.5 if config.get("use_rslora") else rank) * (b @ a)
        new = ours[name].double() @ ours[f"{module}.down.weight"].double()
        if not torch.allclose(new, old, rtol=0.02, atol=2e-3 * float(old.abs().max())):
            return f"{module} is not base and adapter together"
    return None


def _setting(config: dict[str, Any], kind: str, default: str, module: str) -> float:
    for pattern, value in (config.get(f"{kind}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])
