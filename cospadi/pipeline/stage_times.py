"""Seconds of each stage over all runs that worked on a folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cospadi.models import trim_heap
from cospadi.pipeline.job import Job
from cospadi.pipeline.records import Records
from cospadi.reporting import machine, versions, write_run


class StageTimes:
    """Seconds of each stage, kept as a note of the records.

    Parameters
    ----------
    records : Records
        Hold the seconds of interrupted runs.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._began = time.time()
        noted = records.noted("seconds")
        self.seconds: dict[str, float] = dict(noted) if isinstance(noted, dict) else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Measure a stage, and give its memory back to the system when it ends well."""
        begin = time.perf_counter()
        yield
        trim_heap()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        self._records.note("seconds", self.seconds)

    def write_run(self, job: Job, out: Path, groups: dict[str, float]) -> None:
        """Write run.json: when and where the run was, and the seconds of its stages and groups."""
        write_run(
            out,
            {
                "began": self._began,
                "seconds": time.time() - self._began,
                "machine": machine(),
                "versions": versions(),
                "threads": job.place.executor.threads,
                "stages": self.seconds,
                "groups": groups,
                "predicted_memory": asdict(job.place.budget.predicted),
            },
        )
