"""What errors cost token by token, against autograd in float64 on the whole model in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.families import write_family
from transformers import AutoModelForCausalLM

from svdconvert import Calibration
from svdconvert.factoring import token_losses
from svdconvert.factoring.sampled import Bench
from svdconvert.factoring.token_losses import TokenLosses
from svdconvert.families.fused import fused_layer, section_of
from svdconvert.families.table import dense_architecture
from svdconvert.models.softmax import draw
from svdconvert.models.stream import Stream
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.planning.make import make_plan
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import LocalSource

CASES = {"gpt_neox": {"split_fused": True}, "gpt2": {}, "llama": {}}


@pytest.mark.parametrize("family", CASES)
def test_against_the_whole_model(
    family: str, dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_losses, "SEQUENCES", 3)
    monkeypatch.setattr(token_losses, "READ", 12)
    folder = dense if family == "gpt_neox" else write_family(tmp_path / "dense", family)
    source = LocalSource(folder)
    tokens = calibration.tokens(source)
    plan = make_plan(source, Conversion.of(keep=0.5, calibration=calibration, method="kfac", **CASES[family]).settled())
    generator = torch.Generator().manual_seed(3)
    errors = {
        target.module: 0.01 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
        for target in plan.targets
    }

    def of_block(index: int) -> dict[str, torch.Tensor]:
        return {suffix(module): error for module, error in errors.items() if layer_number(module) == index}

    def bench(name: str) -> Bench:
        work = tmp_path / name
        return Bench(source, tokens, {}, work / "results", work / "states", "cpu", 2, Events())

    found = TokenLosses(bench("one")).measure(list(errors), of_block, {"seed": 3})
    assert set(found) == set(errors)

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    some = torch.linspace(0, len(tokens.ids) - 1, 3).round().long()
    ids = tokens.ids[some, :12]
    draws = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, :-1]
    row = dense_architecture(source.config, source.where)
    seen: dict[str, torch.Tensor] = {}
    for module, error in errors.items():
        section = section_of(row, source.config, module)

        def hook(layer, args, output, module=module, error=error, section=section):  # type: ignore[no-untyped-def]
            change = args[0].detach() @ error.T

            def backward(gradient: torch.Tensor) -> None:
                own = gradient if section is None else section.of(gradient, gradient.dim() - 1)
                seen[module] = (own * change).sum(-1)

            output.register_hook(backward)

        model.base_model.get_submodule(fused_layer(row, module) or module).register_forward_hook(hook)
    logits = model(ids).logits[:, :-1]
    labels = draw(logits.detach().flatten(0, 1), draws.flatten())
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    for module, loss in found.items():
        assert loss == pytest.approx(float(seen[module].square().mean()) / 2, rel=1e-3), module

    # A result is kept, and belongs to its errors.
    kept = bench("one")
    assert TokenLosses(kept).measure(list(errors), lambda index: {}, {"seed": 3}) == found
    errors = {module: 2 * error for module, error in errors.items()}
    doubled = TokenLosses(bench("two")).measure(list(errors), of_block, {"seed": 4})
    assert doubled == pytest.approx({module: 4 * loss for module, loss in found.items()}, rel=1e-4)

    # What does not depend on the errors is not computed again.
    def refuse(*arguments: object) -> None:
        raise AssertionError("another pass forward")

    monkeypatch.setattr(Stream, "step", refuse)
    monkeypatch.setattr(Stream, "slopes", refuse)
    assert TokenLosses(bench("one")).measure(list(errors), of_block, {"seed": 4}) == doubled


def test_it_is_the_loss_that_a_small_error_adds(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """All of the text, one matrix: the KL of the changed model, up to what tokens of one sequence add to each other."""
    source = LocalSource(dense)
    tokens = calibration.tokens(source)
    plan = make_plan(source, Conversion.of(keep=0.5, calibration=calibration, method="kfac").settled())
    target = next(target for target in plan.targets if "dense_4h_to_h" in target.module)
    generator = torch.Generator().manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").double().eval()
    layer = model.base_model.get_submodule(target.module)
    before = model(tokens.ids).logits[:, :-1].log_softmax(-1).detach()
    measured, estimated = 0.0, 0.0
    for number in range(4):
        error = 0.003 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
        work = tmp_path / str(number)
        bench = Bench(source, tokens, {}, work / "results", work / "states", "cpu", 4, Events())
        found = TokenLosses(bench).measure(
            [target.module],
            lambda index, error=error: {suffix(target.module): error} if index == layer_number(target.module) else {},
            {"number": number},
        )
        with torch.no_grad():
            layer.weight += error
            after = model(tokens.ids).logits[:, :-1].log_softmax(-1)
            layer.weight -= error
        measured += float((before.exp() * (before - after)).sum(-1).mean())
        estimated += found[target.module]
    assert estimated == pytest.approx(measured, rel=0.35)
