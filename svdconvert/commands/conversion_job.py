"""What a conversion leaves beside its weights: config, record, card, and the command that makes it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from svdconvert.commands import card
from svdconvert.commands.stages import Prepared, measure, packed_fields
from svdconvert.commands.work import Work
from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport, matrix_reports
from svdconvert.families.table import dense_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Reports
from svdconvert.planning.plan import Plan
from svdconvert.planning.target_kinds import sizes_by_kind
from svdconvert.reports.result_page import result_page
from svdconvert.settings.afterwards import Afterwards
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.text import SELF, Stats, Text
from svdconvert.tensors import majority_dtype

Priced = TypeVar("Priced", MatrixReport, RoundedReport)


def conversion_job(work: Work, prepared: Prepared, settings: Mapping[str, Any]) -> Job:
    """The job of a planned conversion.

    Args:
        work: the conversion.
        prepared: its final plan.
        settings: all that the result depends on.
    """
    source, plan = work.source, prepared.plan
    row = dense_architecture(source.config, source.where)
    config = model_files.factored_config(
        source.config, row, plan.ranks, work.request.output.dtype, work.request.recipe.layout, plan.shared
    )
    config |= packed_fields(source, plan)
    config.setdefault("torch_dtype", majority_dtype([step.outputs[0] for step in plan.steps]))
    results = _Results(work, prepared, settings)
    return Job(
        steps=plan.steps,
        shards=plan.shards,
        config=model_files.written_config(source, config),
        extra=model_files.code_files(source, row),
        card=results.card,
        details=results.details,
        page=result_page if work.request.output.report else None,
    )


@dataclass(frozen=True)
class _Results:
    """What the record and the card report."""

    work: Work
    prepared: Prepared
    settings: Mapping[str, Any]

    @property
    def plan(self) -> Plan:
        return self.prepared.plan

    @cached_property
    def losses(self) -> Mapping[str, float]:
        """On the text, measured once the weights are written."""
        return measure(self.work, self.plan)

    def matrices(self, reports: Reports) -> dict[str, dict[str, Any]]:
        """Module path -> what is known of its matrix."""
        found = {
            module: report
            for target in self.plan.targets
            if target.rank is not None
            for module, report in matrix_reports(reports[target.weight], [part.module for part in target.parts]).items()
        }
        return {name: self._priced(name, matrix).to_json() for name, matrix in found.items()}

    def rounded(self, reports: Reports) -> dict[str, dict[str, Any]]:
        """Module path -> what is known of a matrix that stays dense, in few bits."""
        found = {}
        for target in self.plan.targets:
            if target.rounded and target.rank is None:
                report = RoundedReport.from_json(reports[target.weight])
                found[target.module] = self._priced(target.module, report).to_json()
        return found

    def _priced(self, module: str, report: Priced) -> Priced:
        """A report with the loss that is predicted of it, where the metrics say that."""
        if not self.work.request.method.in_loss:
            return report
        worth = self.prepared.worths.get(module)
        # half of what the second-order estimate sums up to
        lost = (1.0 if worth is None else worth) * (report.lost or 0.0) / 2
        return replace(report, predicted_loss=lost, worth=worth)

    def predicted(self, reports: Reports) -> dict[str, float]:
        """Loss added by the truncation, in nats per token."""
        if not self.work.request.method.in_loss:
            return {}
        every = [*self.matrices(reports).values(), *self.rounded(reports).values()]
        return {"predicted_loss": sum(float(matrix["predicted_loss"]) for matrix in every)}

    def details(self, reports: Reports) -> dict[str, Any]:
        """Fields of svdconvert.json."""
        plan, refit, budget = self.plan, self.prepared.refit, self.prepared.budget
        return {
            "params": {"before": plan.params_before, "after": plan.params_after},
            "bytes": {"before": plan.bytes_before, "after": plan.bytes_after},
            "kinds": sizes_by_kind(plan.targets, plan.steps),
            "dense_targets": {
                part.module: t.reason for t in plan.targets if t.rank is None and not t.rounded for part in t.parts
            },
            "notes": list(plan.notes),
            "matrices": self.matrices(reports),
            **({"rounded": self.rounded(reports)} if plan.grids else {}),
            **self.predicted(reports),
            **self.losses,
            **self.written_text,
            **self.arithmetic,
            **({} if refit is None else {"refit": asdict(refit)}),
            **({} if budget is None else {"budget": budget.to_json()}),
            "repeat": self.command,
        }

    @property
    def written_text(self) -> dict[str, str]:
        """The digest of the tokens that the model wrote to calibrate with; empty for a text of another origin."""
        calibration, knowledge = self.work.request.calibration, self.work.knowledge
        if knowledge is None or not isinstance(calibration, Text) or not calibration.by_model:
            return {}
        return {"self_text": knowledge.text.digest}

    @property
    def arithmetic(self) -> dict[str, str]:
        """How the statistics of the decompositions were computed, in one line each; empty where they were collected.

        As kept with each decomposition: an earlier run with the same work folder may have taken its statistics from
        elsewhere.
        """
        from svdconvert.factoring.decompositions import load_arithmetic

        files = [step.options["decomposition"] for step in self.plan.steps if "decomposition" in step.options]
        lines = [load_arithmetic(Path(file)) for file in files]
        told = dict.fromkeys(line if line else "others collected beforehand" for line in sorted(lines, reverse=True))
        return {"arithmetic": ", and ".join(told)} if any(lines) else {}

    @property
    def command(self) -> str:
        """The command line that makes the same result."""
        return repeatable(self.work).command(self.work.source.name)

    def card(self, reports: Reports) -> str:
        """The model card."""
        source = self.work.source
        row = dense_architecture(source.config, source.where)
        lost = {**self.predicted(reports), **self.losses}
        budget = "" if self.prepared.budget is None else str(self.prepared.budget)
        return card.factored_card(
            source,
            self.plan,
            row,
            self.command,
            self.settings,
            self.matrices(reports),
            lost,
            budget,
            report=self.work.request.output.report,
        )


def repeatable(work: Work) -> Conversion:
    """The request that makes the same result elsewhere, for the command of the card.

    Stand-ins take the place of file names, and defaults that depend on something are spelled out. Two are not: svd
    without a text, and a uniform allocation where that is the method's own.
    """
    request, recipe = work.request, work.request.recipe
    usual = replace(request, recipe=replace(recipe, allocation=None)).allocation
    text = _text(work)
    method = None if text is None and recipe.method == "svd" else recipe.method
    allocation = None if recipe.allocation == usual == "uniform" else recipe.allocation
    keeps = work.kept is not None and not work.must_decompose
    return replace(
        request,
        size=request.size.as_asked,
        recipe=replace(recipe, method=method, allocation=allocation),
        calibration=text,
        afterwards=_afterwards(work),
        runtime=replace(request.runtime, work=Path("WORK") if keeps else None),
        hub=replace(request.hub, revision=work.source.commit),
    )


def _text(work: Work) -> Text | Stats | None:
    """The text that is read to convert, or to heal alone."""
    if work.knowledge is not None:
        return work.knowledge.repeatable
    own = work.request.calibration is not None and work.healed_on is not None
    return work.healed_on.repeatable if own and work.healed_on is not None else None


def _afterwards(work: Work) -> Afterwards:
    """What is done with the result, with the number of sequences that there are."""
    asked, known = work.request.afterwards, work.healed_on
    if known is None or (asked.text is None and asked.samples is None):
        return asked
    assert isinstance(known.repeatable, Text)
    text = asked.text if asked.text in (None, SELF) else "HEALTEXT"
    return replace(asked, text=text, samples=known.repeatable.samples)
