"""Running a job: read ahead, solve, write behind, each in its own thread and each with a bound on memory.

Every step reads from the source, computes, writes its tensors at their places and is recorded. Solvers hold one
matrix each; the reader is at most one matrix ahead of them, the writer at most two results behind. Of layers that share
a factor a solver reads one matrix after the other itself, and hands on one result after the other. On a GPU a solver
has begun with its next matrix before it looks at the result of the last one, and small matrices are read and solved
several at a time (``factoring/stacks.py``, ``machine/lanes.py``). Of several processes each does its share of the
steps.

The stages' times say which of them is the bottleneck. Wall seconds are of work, without waiting for other stages;
those of several solvers add up. CPU seconds of reading and writing are of their threads; solving has the rest of what
the process takes while the pipeline runs, since torch computes in threads of its own. Copied tensors are read by the
writer and count as writing; what a solver reads counts as solving.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdconvert.factoring.operations import IN_TURN, convert_piece, run_in_turn
from svdconvert.factoring.stacks import Finish, begin, in_units
from svdconvert.jobs.crew import Crew, Stopped
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.shard_writer import ShardWriter
from svdconvert.jobs.source_files import SourceFiles
from svdconvert.linalg.panels import Workspace
from svdconvert.machine import interrupts
from svdconvert.machine.lanes import Transfer, lanes_of
from svdconvert.machine.memory import give_memory_back
from svdconvert.machine.threads import shared_cores, start_and_join
from svdconvert.machine.timing import StageTimes
from svdconvert.planning.events import Events
from svdconvert.planning.partition import split_steps
from svdconvert.planning.steps import Step
from svdconvert.storage.reader import TensorsInTurn, WeightReader, as_bytes, same_values
from svdconvert.storage.source import Source
from svdconvert.storage.tying import other_head
from svdconvert.tensors import TensorInfo

_ALIGN = 64
# Units of more bytes leave so much memory free that returning it is worth the time: some ms beside a second of work.
_LARGE = 8 * 2**20


@dataclass(frozen=True)
class _Read:
    """A unit whose tensors are on their way to the device, from a buffer."""

    unit: tuple[Step, ...]
    inputs: Transfer
    buffer: Tensor


@dataclass(frozen=True)
class _Begun:
    unit: tuple[Step, ...]
    finish: Finish
    seconds: float


@dataclass(frozen=True)
class _Made:
    """A tensor of a step that hands its outputs on one by one; what solved it follows the last one."""

    info: TensorInfo
    tensor: Tensor


@dataclass(frozen=True)
class _Solved:
    """A step with its outputs, or with those that were not handed on before."""

    step: Step
    outputs: Sequence[Tensor]
    report: dict[str, Any]


class Pipeline:
    """One run over the steps of a job that are not done yet."""

    def __init__(
        self,
        source: Source,
        steps: Sequence[Step],
        shards: Mapping[str, Sequence[TensorInfo]],
        output: OutputFolder,
        *,
        device: torch.device,
        workers: int = 1,
        events: Events | None = None,
        times: StageTimes | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            source: where the tensors are.
            steps: the job, in the order of the source's files.
            shards: weight files to write.
            output: their folder, already entered.
            device: what computes.
            workers: matrices solved at the same time. Memory grows with it.
            events: who is told about progress.
            times: gets the seconds of the stages ``read``, ``solve`` and ``write``.
        """
        self._source, self._lanes, self._workers = source, lanes_of(device), workers
        self._events, self._times = events or Events(), times or StageTimes()
        for stage in ("read", "solve", "write"):  # in this order, whoever comes first
            self._times.add(stage, 0.0, 0.0)
        self._writer = ShardWriter(output, shards)
        self.resumed = sum(1 for report in self._writer.reports.values() if report)
        left = [step for step in steps if not self._writer.is_done(step.key)]
        group = output.group
        self._todo = split_steps(left, group.size, whole_files=source.fetched)[group.rank]
        self._crew = Crew()
        self._files = SourceFiles(source, self._todo, self._crew, self._times)
        self._units = in_units(self._todo, device)
        staging = max(map(_staging, self._units), default=0)
        self._free: queue.Queue[Tensor] = queue.Queue()
        for _ in range(min(workers + 1, max(len(self._units), 1))):
            self._free.put(self._lanes.staging(staging))
        self._to_solve: queue.Queue[Step | _Read | None] = queue.Queue(maxsize=workers)
        self._to_write: queue.Queue[Step | _Made | _Solved | None] = queue.Queue(maxsize=2)

    @property
    def digests(self) -> dict[str, str]:
        """Digest of every tensor that was written, by earlier runs too; of several processes the leader has all."""
        return self._writer.digests

    def run(self) -> dict[str, dict[str, Any]]:
        """Do what is left of the job, or this process's share of it, and wait for the others.

        Returns:
            The report of every computed step by its key, those of earlier runs included; of several processes the
            leader alone has those of the others.

        Raises:
            InputError, JobError: what the first failing thread raised; finished steps stay recorded.
            KeyboardInterrupt: likewise.
        """
        with interrupts.held():
            return self._run()

    def _run(self) -> dict[str, dict[str, Any]]:
        self._events.begin([step for step in self._todo if step.kind != "copy"], self.resumed)
        cpu_before = time.process_time()
        workers = [self._crew.thread(self._read_all, "read")]
        workers += [self._crew.thread(self._solve_all, f"solve-{i}") for i in range(self._workers)]
        workers.append(self._crew.thread(self._write_all, "write"))
        try:
            with shared_cores(self._workers):
                start_and_join(workers, stop=self._interrupt, last=self._end_of_work)
        finally:
            if all(worker.ended.is_set() for worker in workers):
                try:
                    with self._times.measure("write"):
                        self._shards_done(self._writer.record())
                finally:
                    self._writer.close()
            spent = time.process_time() - cpu_before
            self._times.add("solve", 0.0, spent - self._times.cpu("read", "write"))
        if self._crew.error is not None:
            raise self._crew.error
        self._shards_done(self._writer.join())
        return {key: report for key, report in self._writer.reports.items() if report}

    def _end_of_work(self) -> None:
        """Tell the writer that nothing more will come."""
        with suppress(Stopped):
            self._crew.put(self._to_write, None)

    def _interrupt(self) -> None:
        self._crew.stop()
        self._events.note("stopping after the current matrix; press Ctrl-C again to stop at once")

    def _read_all(self) -> None:
        with WeightReader(self._source) as reader:
            for unit in self._units:
                for step in unit:
                    self._files.fetch(step)
                if unit[0].kind == "copy":
                    self._crew.put(self._to_write, unit[0])
                elif unit[0].kind in IN_TURN:
                    self._crew.put(self._to_solve, unit[0])
                else:
                    self._crew.put(self._to_solve, self._read(reader, unit))
        for _ in range(self._workers):
            self._crew.put(self._to_solve, None)

    def _read(self, reader: WeightReader, unit: tuple[Step, ...]) -> _Read:
        """The tensors of a unit, on their way to the device."""
        buffer = self._crew.get(self._free)
        inputs, position = [], 0
        with self._times.measure("read"):
            for info in (info for step in unit for info in step.inputs):
                inputs.append(reader.read(info, buffer[position:]))
                position += _aligned(info)
            return _Read(unit, self._lanes.upload(inputs), buffer)

    def _solve_all(self) -> None:
        workspace = Workspace()
        begun: deque[_Begun] = deque()
        with self._lanes.worker():
            while True:
                # With nothing to go on with, there is nothing to be gained by leaving results where they are.
                while begun and (len(begun) > self._lanes.ahead or self._to_solve.empty()):
                    self._finish(begun.popleft())
                item = self._crew.get(self._to_solve)
                if item is None:
                    break
                if isinstance(item, Step):
                    self._solve_in_turn(item, workspace)
                    continue
                begun.append(self._begin(item, workspace))
                del item  # with the device's memory
            while begun:
                self._finish(begun.popleft())

    def _begin(self, item: _Read, workspace: Workspace) -> _Begun:
        for step in item.unit:
            self._events.solving(step)
        start = time.perf_counter()
        there = iter(item.inputs.take())
        inputs = [[next(there) for _ in step.inputs] for step in item.unit]
        finish = begin(item.unit, inputs, workspace, self._lanes)
        item.inputs.wait()
        self._free.put(item.buffer)
        return _Begun(item.unit, finish, time.perf_counter() - start)

    def _finish(self, begun: _Begun) -> None:
        start = time.perf_counter()
        results = begun.finish()
        seconds = begun.seconds + time.perf_counter() - start
        self._times.add("solve", seconds, 0.0)
        for step, (outputs, report) in zip(begun.unit, results, strict=True):
            report["seconds"] = round(seconds / len(begun.unit), 4)
            self._crew.put(self._to_write, _Solved(step, outputs, report))
        if _staging(begun.unit) >= _LARGE:
            give_memory_back()

    def _solve_in_turn(self, step: Step, workspace: Workspace) -> None:
        """Solve a step that asks for its tensors and hands on its results one by one."""
        self._events.solving(step)
        outputs, start = iter(step.outputs), time.perf_counter()
        with WeightReader(self._source) as reader:
            inputs = TensorsInTurn(reader, step.inputs, self._lanes.device)
            report = run_in_turn(
                step, inputs, workspace, lambda made: self._crew.put(self._to_write, _Made(next(outputs), made))
            )
        seconds = time.perf_counter() - start
        self._times.add("solve", seconds, 0.0)
        self._crew.put(self._to_write, _Solved(step, (), {**report, "seconds": round(seconds, 4)}))
        give_memory_back()

    def _write_all(self) -> None:
        with WeightReader(self._source) as reader:
            while (item := self._crew.get(self._to_write)) is not None:
                if isinstance(item, _Made):
                    with self._times.measure("write"):
                        self._writer.write(item.info.name, as_bytes(item.tensor))
                    continue
                step = item if isinstance(item, Step) else item.step
                with self._times.measure("write"):
                    report, finished = self._write(reader, item)
                if report:
                    self._events.solved(step, report)
                self._shards_done(finished)
                self._files.release(step, reader)

    def _write(self, reader: WeightReader, item: Step | _Solved) -> tuple[dict[str, Any], list[tuple[str, int]]]:
        """Returns the step's report and the weight files that it made complete."""
        if isinstance(item, Step):
            self._copy(reader, item)
            step, report = item, {}
        else:
            step, report = item.step, item.report
            for info, tensor in zip(step.outputs, item.outputs, strict=bool(item.outputs)):
                self._writer.write(info.name, as_bytes(tensor))
        return report, self._writer.finish(step.key, [info.name for info in step.outputs], report)

    def _copy(self, reader: WeightReader, step: Step) -> None:
        (source, *copies), (target,) = step.inputs, step.outputs
        for copy in copies:
            if not same_values(self._source, source, copy):
                raise other_head(self._source, copy.name, source.name)
        position = 0
        for piece in reader.stream(source):
            data = as_bytes(convert_piece(piece, source, target))
            self._writer.write(target.name, data, position)
            position += len(data)

    def _shards_done(self, finished: list[tuple[str, int]]) -> None:
        for name, size in finished:
            self._events.shard(name, size)


def _staging(unit: Sequence[Step]) -> int:
    """Bytes that are read ahead for a unit."""
    if unit[0].kind == "copy" or unit[0].kind in IN_TURN:
        return 0
    return sum(_aligned(info) for step in unit for info in step.inputs)


def _aligned(info: TensorInfo) -> int:
    return -(-info.nbytes // _ALIGN) * _ALIGN
