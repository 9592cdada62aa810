"""A conversion whose result is healed: one job in one folder, in whose own folder the result lies that is healed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert.calibration.knowledge import Knowledge, find_knowledge
from svdconvert.commands.card import factored_card
from svdconvert.commands.healed_card import healed_lines
from svdconvert.commands.healing_job import as_stored, healed_steps, healing_details
from svdconvert.commands.measured_budgets import MeasuredBudget
from svdconvert.commands.verify import self_check
from svdconvert.commands.work import Work
from svdconvert.families.table import factored_architecture
from svdconvert.healing.healing import heal_factors, result_file
from svdconvert.healing.memory import check_memory
from svdconvert.healing.outcome import Healed
from svdconvert.healing.precision import precision_of
from svdconvert.healing.work import HealingWork
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Outcome, run_job
from svdconvert.jobs.record import read_record
from svdconvert.planning.plan import Plan
from svdconvert.planning.steps import shard
from svdconvert.planning.whole import whole_steps
from svdconvert.reports.result_page import result_page
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.healing import HealRequest
from svdconvert.settings.rules import reads_text
from svdconvert.settings.text import Stats, Text
from svdconvert.storage.disk import refuse_full
from svdconvert.storage.source import LocalSource

# Of a conversion's record, what is of its factors: with those of the healed ones these figures have nothing to do.
FIGURES = ("matrices", "rounded", "predicted_loss", "dense_loss", "measured_loss", "refit", "budget")

_NO_GAIN = "Training brought no gain, so the weights are what they were."

# The conversion without healing: what it is -> its plan as it was carried out, and how it ended.
Convert = Callable[[Work, Plan], tuple[Plan, Outcome]]


def with_texts(work: Work) -> Work:
    """A conversion with the texts that it reads: to calibrate, and to heal on.

    Raises:
        InputError: a text or a folder of statistics cannot be used.
    """
    request = work.request

    def find(what: Text | Stats | None) -> Knowledge | None:
        return find_knowledge(work.source, what, work.events, folder=work.place, device=work.device)

    known = find(request.calibration) if reads_text(request) else None
    if request.healing is None:
        return replace(work, knowledge=known)
    text, own = request.healing.calibration, request.calibration
    same = isinstance(own, Text) and replace(own, labels=text.labels) == text
    return replace(work, knowledge=known, healed_on=known if same and known is not None else find(text))


def convert_and_heal(work: Work, plan: Plan, convert: Convert) -> tuple[Plan | None, Outcome]:
    """Do the job, or what is left of it.

    Args:
        work: the conversion.
        plan: the plan made from headers alone.
        convert: does the conversion alone.

    Returns:
        The plan of the conversion as it was carried out, None if that was done before, and how the job ended.

    Raises:
        InputError: the folder, the text, or the memory is not fit for it.
        JobError: it broke off; the same call continues it.
    """
    request, healing = work.request, work.request.healing
    assert healing is not None
    assert work.healed_on is not None
    precision = precision_of(healing.healing.precision, work.device)
    text = {name: value for name, value in work.healed_on.key.items() if name != "labels"}
    settings = {
        **request.key(None if work.knowledge is None else work.knowledge.key),
        "heal": healing.key(text, str(precision).removeprefix("torch.")),
    }
    carried_out: list[Plan] = []

    def prepare() -> Job:
        _check_room(work, plan)
        stage = _Healing(work, *convert(_alone(work), plan), settings)
        carried_out.append(stage.plan)
        return stage.job(healing, precision)

    outcome = run_job(
        "convert",
        work.source,
        settings,
        prepare,
        work.folder,
        device=work.device,
        overwrite=request.output.overwrite,
        check=self_check if request.output.check else None,
        events=work.events,
    )
    return carried_out[0] if carried_out else None, outcome


def _check_room(work: Work, plan: Plan) -> None:
    """Refuse what the disk or the memory has no room for, before hours are spent on the conversion.

    Raises:
        InputError: they have not.
    """
    if work.request.size.limit is not None or plan.healing is None:
        return  # the size is yet to be found
    check_memory(plan.healing.memory_bytes, work.source.where, work.device)
    there = 0
    for folder, _, names in os.walk(work.folder):
        for name in names:
            with suppress(OSError):
                there += (Path(folder) / name).stat().st_size
    needed = plan.bytes_after + plan.healing.disk_bytes
    advice = f"free some, give another folder as {asked('out')}, or leave out {asked('heal', True)}"
    refuse_full(work.folder, max(0, needed - there), " to heal what it converts", advice)


def _alone(work: Work) -> Work:
    """The conversion by itself, in a folder of the job's own."""
    runtime = replace(work.request.runtime, work=work.kept, keep_work=False)
    output = replace(work.request.output, overwrite=False, report=False)
    request = replace(work.request, runtime=runtime, output=output)
    return replace(work, request=request, folder=work.job / "work" / "converted")


@dataclass(frozen=True)
class _Healing:
    """What follows on the conversion.

    Attributes:
        work: all of the job.
        plan: the conversion as it was carried out.
        outcome: how it ended.
        settings: all that the result depends on.
    """

    work: Work
    plan: Plan
    outcome: Outcome
    settings: Mapping[str, Any]

    def job(self, request: HealRequest, precision: Any) -> Job:
        """Heal; the job that writes the result."""
        work, source = self.work, LocalSource(self.outcome.folder)
        assert work.healed_on is not None
        work.events.note("the conversion is done; healing it")
        row, folder = factored_architecture(source.config, source.where), work.job / "work" / "heal"
        steps = whole_steps(source, healed_steps(source, row, result_file(folder)))
        healing = HealingWork(
            source, work.source, work.healed_on.text, request, folder, work.device, precision, work.events
        )
        healed = heal_factors(healing)
        work.events.note(Sentence(str(healed)))
        told = healing_details(healing, healed)
        converted = read_record(source.folder).results
        figures = {name: converted[name] for name in FIGURES if name in converted}
        rest = {name: value for name, value in converted.items() if name not in FIGURES}
        return Job(
            steps=steps,
            shards=shard([info for step in steps for info in step.outputs], request.output.max_shard_bytes),
            config=model_files.written_config(source, source.config),
            extra=model_files.code_files(source, row),
            card=lambda reports: self._card(figures, rest["repeat"], healed),
            details=lambda reports: {**rest, "training_free": figures, **told},
            page=result_page if work.request.output.report else None,
            reads=as_stored(source),
        )

    def _card(self, figures: Mapping[str, Any], command: str, healed: Healed) -> str:
        work, plan = self.work, self.plan
        row = factored_architecture(LocalSource(self.outcome.folder).config, str(self.outcome.folder))
        budget = str(MeasuredBudget.from_json(figures["budget"])) if "budget" in figures else ""
        return factored_card(
            work.source,
            plan,
            row,
            command,
            self.settings,
            figures["matrices"],
            figures,
            budget,
            healed=[*([] if healed.changed else [_NO_GAIN, ""]), *healed_lines(healed, plan.params_after)],
            report=work.request.output.report,
        )
