"""Seconds of each stage over all runs that worked on a folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from cospadi.models import trim_heap
from cospadi.pipeline.records import Records


class StageTimes:
    """Seconds of each stage, kept as a note of the records.

    Parameters
    ----------
    records : Records
        Hold the seconds of interrupted runs.

    Attributes
    ----------
    began : float
        When this run began, in seconds since 1970 (UTC).
    seconds : dict of str to float
        By stage.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.began = time.time()
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
