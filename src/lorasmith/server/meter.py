"""Counts what happens to the jobs of a server, for `watching`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lorasmith.runs.queue import ENDED, WORKER_ENDED, Job

WAITS_S = (1.0, 10.0, 60.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0)  # upper bounds of the histogram


class Meter:
    """Counts what happens to jobs; one for a dispatcher, which tells it each change and report."""

    def __init__(self) -> None:
        self._running: dict[str, int] = {}  # steps of running jobs, by id
        self.ended: Counter[tuple[str, str]] = Counter()  # by kind and state
        self.failures: Counter[str] = Counter()  # by kind of error
        self.steps: Counter[str] = Counter()  # by device
        self.waits: Counter[float] = Counter()  # by upper bound
        self.wait_s, self.started = 0.0, 0

    def changed(self, job: Job) -> None:
        """A job has another state."""
        if job.state == "running":
            if job.id not in self._running:
                self._running[job.id] = 0
                if job.attempts == 1 and job.started is not None:
                    self._waited(max(0.0, job.started - job.created))
            return
        if self._running.pop(job.id, None) is None:
            return
        kind = str((job.error or {}).get("kind", ""))
        if job.state in ENDED:
            self.ended[job.kind, job.state] += 1
        if job.state == "failed" or kind == WORKER_ENDED:
            self.failures[kind or "unknown"] += 1

    def viewed(self, job: Job, view: Mapping[str, Any]) -> None:
        """A job has reported the view of its run."""
        step, device = view.get("step"), str(job.device)
        before = self._running.get(job.id)
        if not isinstance(step, int) or before is None:
            return
        if step > before and (before or step == 1):  # an attempt that continues reports the steps of earlier ones first
            self.steps[device] += step - before
        self._running[job.id] = step

    def _waited(self, seconds: float) -> None:
        self.wait_s += seconds
        self.started += 1
        for bound in WAITS_S:
            if seconds <= bound:
                self.waits[bound] += 1
