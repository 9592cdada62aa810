"""What directions are worth, against autograd in float64 on the whole model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import write_family
from transformers import AutoModelForCausalLM

from svdconvert import Calibration
from svdconvert.factoring import edges as edging
from svdconvert.factoring import samples
from svdconvert.factoring.decompositions import Decompositions
from svdconvert.factoring.edges import Edges
from svdconvert.factoring.refit_streams import HELD_OUT
from svdconvert.factoring.sampled import Bench
from svdconvert.factoring.samples import PARTS, correction_sample
from svdconvert.factoring.trials import Trials
from svdconvert.families.fused import fused_layer, section_of
from svdconvert.families.table import dense_architecture
from svdconvert.planning.events import Events
from svdconvert.planning.make import make_plan, plan_for
from svdconvert.planning.plan import Plan
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import LocalSource


def prepared(dense: Path, calibration: Calibration, work: Path, keep: float, **settings: Any) -> tuple[Plan, Any]:
    """(plan from decompositions, the decompositions)."""
    from svdconvert.calibration.knowledge import find_knowledge
    from svdconvert.factoring.decompose import kept_decompositions

    source = LocalSource(dense)
    request = Conversion.of(keep=keep, calibration=calibration, **{"dtype": "float32", **settings}).settled()
    plan, knowledge = make_plan(source, request), find_knowledge(source, calibration, Events())
    needed = knowledge if request.method.statistics else None
    store = kept_decompositions(source, plan.targets, request.method, request.options, needed, work, "cpu", Events())
    return plan_for(source, request, plan.targets, store.files(plan.targets)), store


def bench(dense: Path, calibration: Calibration, work: Path) -> Bench:
    source = LocalSource(dense)
    tokens = calibration.tokens(source)
    return Bench(source, tokens, {}, work / "trials", work / "states", "cpu", calibration.batch_size, Events())


class Whole:
    """A model in memory, in float64, and the same compressed."""

    def __init__(self, dense: Path, plan: Plan) -> None:
        source = LocalSource(dense)
        self.row, self.config = dense_architecture(source.config, source.where), source.config
        self.dense, self.model = (
            AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").double().eval() for _ in range(2)
        )
        self.plan = plan

    def weight(self, model: Any, module: str, values: torch.Tensor | None = None) -> torch.Tensor:
        """A layer's matrix [out, in], or that part of a fused one; of its gradient with ``values``."""
        name = fused_layer(self.row, module) or module
        whole = model.base_model.get_submodule(name).weight if values is None else values
        whole = whole.T if self.row.transposed else whole
        section = section_of(self.row, self.config, module)
        return whole if section is None else section.of(whole)

    def compress(self, products: dict[str, torch.Tensor]) -> None:
        """Put other matrices in their places."""
        for module, product in products.items():
            name = fused_layer(self.row, module) or module
            layer = self.model.base_model.get_submodule(name).weight.data
            layer, section = (layer.T if self.row.transposed else layer), section_of(self.row, self.config, module)
            layer.copy_(product) if section is None else section.put(product, layer)

    def kl(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean KL, differentiable by the compressed model's weights."""
        with torch.no_grad():
            p = self.dense(ids).logits[:, :-1].log_softmax(-1)
        q = self.model(ids).logits[:, :-1].log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1).mean()

    def gradients(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.zero_grad()
        self.kl(ids).backward()
        found = {}
        for target in self.plan.targets:
            for part in target.parts:
                name = fused_layer(self.row, part.module) or part.module
                gradient = self.model.base_model.get_submodule(name).weight.grad
                found[part.module] = self.weight(self.model, part.module, gradient)
        return found


def truncated(target: Any, store: Decompositions, whole: Whole, rank: int) -> dict[str, torch.Tensor]:
    """The exact products of a target at a rank, by the textbook: W projected in the metric of the inputs or outputs."""
    from svdconvert.factoring.decompositions import load_decomposition, load_metric

    found, metric, _ = load_decomposition(store.path(target), torch.device("cpu"))
    weights = [whole.weight(whole.dense, part.module).detach() for part in target.parts]
    k = found.basis.shape[0]
    basis = found.basis.double()[:, found.basis.shape[1] - rank :]
    if not target.followers:
        metric = torch.eye(k).double() if metric is None else metric if metric.dim() == 2 else metric.diag()
        (w,) = weights
        tall = w.shape[0] >= w.shape[1]
        project = basis @ torch.linalg.pinv(basis.T @ metric @ basis, hermitian=True) @ basis.T @ metric  # onto basis
        return {target.module: w @ project.T if tall else project @ w}
    paths = store.options(target)["metrics"]
    if not paths:
        stack = torch.cat(weights)
        product = stack @ basis @ basis.T if stack.shape[0] >= stack.shape[1] else basis @ basis.T @ stack
        pieces = product.split([w.shape[0] for w in weights])
        return {part.module: piece for part, piece in zip(target.parts, pieces, strict=True)}
    products = {}
    for part, w, path in zip(target.parts, weights, paths, strict=True):
        inner = load_metric(Path(path), torch.device("cpu"))
        inner = inner if inner.dim() == 2 else inner.diag()
        gram = basis.T @ inner @ basis
        products[part.module] = w @ inner @ basis @ torch.linalg.solve(gram + 1e-6 * torch.eye(rank), basis.T)
    return products


CASES = {
    "kfac": ("gpt_neox", {}),
    "split": ("gpt_neox", {"split_fused": True, "layout": "pivoted"}),
    "whiten": ("llama", {"method": "whiten", "layout": "pivoted"}),
    "transposed": ("gpt2", {"method": "kfac"}),
    "shared": ("llama", {"share_layers": 2}),
    "svd": ("llama", {"method": "svd", "refit": "sequential"}),
    "svd, shared": ("llama", {"method": "svd", "share_layers": 2, "allocation": "measured"}),
}


@pytest.mark.parametrize("case", CASES)
def test_directions_against_autograd(
    case: str, dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, settings = CASES[case]
    folder = dense if family == "gpt_neox" else write_family(tmp_path / "dense", family)
    plan, store = prepared(folder, calibration, tmp_path / "work", 0.4, **settings)
    whole = Whole(folder, plan)
    products = {}
    for target in plan.targets:
        products |= truncated(target, store, whole, target.rank)
    whole.compress(products)
    tokens = calibration.tokens(LocalSource(folder))
    held = torch.zeros(len(tokens.ids), dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    trial = Trials(bench(folder, calibration, tmp_path)).measure(plan.targets, plan.steps, "x")
    assert trial.kl == pytest.approx(float(whole.kl(tokens.ids[held]).detach()), rel=2e-4)
    if case == "whiten":  # sequences of which the beginning alone is read
        monkeypatch.setattr(edging, "READ", 12)
    ids = tokens.ids[correction_sample(tokens, 0), : edging.READ]
    gradients = whole.gradients(ids)
    measured = Edges(bench(folder, calibration, tmp_path), store).measure(plan.targets, plan.steps, 0)
    worst = max(abs(sum(edge.measured)) for edge in measured.values())
    for target in plan.targets:
        start, stop = edging.edge_of(target.rank, min(target.shape))
        above, below = (truncated(target, store, whole, rank) for rank in (stop, start))
        wanted = -sum(float((gradients[name] * (above[name] - below[name])).sum()) for name in above)
        assert sum(measured[target.module].measured) == pytest.approx(wanted, rel=2e-3, abs=2e-4 * worst), target.module
        spectrum = store.spectrum(target)
        assert measured[target.module].predicted == pytest.approx(float(spectrum[start:stop].sum()))
    # The parts are those of the text, one after the other.
    target = plan.targets[0]
    parts = measured[target.module].measured
    assert PARTS <= len(parts) <= len(ids)
    start, stop = edging.edge_of(target.rank, min(target.shape))
    above, below = (truncated(target, store, whole, rank) for rank in (stop, start))
    for part in (0, len(parts) - 1):
        gradients = whole.gradients(ids.view(len(parts), -1, ids.shape[1])[part])
        wanted = -sum(float((gradients[name] * (above[name] - below[name])).sum()) for name in above) / len(parts)
        assert parts[part] == pytest.approx(wanted, rel=2e-3, abs=2e-4 * worst)
    # All directions that are missing, near the dense model: KL is quadratic there (Euler).
    if case == "kfac":
        monkeypatch.setattr(edging, "edge_of", lambda rank, full: (rank, full))
        plan, store = prepared(folder, calibration, tmp_path / "work", 0.9, **settings)
        missing = Edges(bench(folder, calibration, tmp_path / "euler"), store).measure(plan.targets, plan.steps, 0)
        total = sum(sum(edge.measured) for edge in missing.values())
        near = Whole(folder, plan)
        near.compress({k: v for t in plan.targets for k, v in truncated(t, store, near, t.rank).items()})
        assert total == pytest.approx(2 * float(near.kl(ids).detach()), rel=0.05)


def test_another_round_has_other_text(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of one round is left in the next, the dense model's hidden states neither."""
    monkeypatch.setattr(samples, "CORRECTED", 8 * calibration.length)
    plan, store = prepared(dense, calibration, tmp_path / "work", 0.4)
    several, fresh = (Edges(bench(dense, calibration, tmp_path / name), store) for name in ("several", "fresh"))
    first, second = (several.measure(plan.targets, plan.steps, number) for number in (0, 1))
    assert second == fresh.measure(plan.targets, plan.steps, 1) != first
