"""The source's weight files while a job runs: here before they are read, and given up after their last step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from svdconvert.jobs.crew import Crew
from svdconvert.machine.timing import StageTimes
from svdconvert.planning.steps import Step, files_here
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import Source


class SourceFiles:
    """Which files are here. One thread fetches them, another one gives them up."""

    def __init__(self, source: Source, steps: Sequence[Step], crew: Crew, times: StageTimes) -> None:
        """Nothing is fetched yet.

        Args:
            source: where they are.
            steps: all that read them, in order.
            crew: the threads of the job.
            times: gets the seconds of fetching, as those of the stage ``read``.
        """
        self._source, self._crew, self._times = source, crew, times
        self._left = Counter(file for step in steps for file in step.files)
        self._room = threading.Semaphore(files_here(steps) if source.fetched else max(len(source.files), 2))
        self._fetched: set[str] = set()

    def fetch(self, step: Step) -> None:
        """Bring the step's files here, but not more at a time than the disk is meant to hold.

        Raises:
            Stopped: the crew has been stopped.
            JobError: a file could not be fetched.
        """
        for file in sorted(step.files - self._fetched):
            self._crew.acquire(self._room)
            with self._times.measure("read"):
                self._source.path(file)
            self._fetched.add(file)

    def release(self, step: Step, reader: WeightReader) -> None:
        """Give up files that no later step reads.

        Args:
            step: it is done.
            reader: that of the calling thread, which may have such a file open.
        """
        for file in step.files:
            self._left[file] -= 1
            if self._left[file]:
                continue
            if self._source.fetched:
                reader.close()
            self._source.release(file)
            self._room.release()
