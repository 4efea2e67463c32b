"""Why a run ended: one enum for events, run folders and reports."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """Why a run ended; values are those in files."""

    FINISHED = "finished"
    """All steps were taken."""
    STOPPED = "stopped"
    """Early stopping: no improvement for `patience` validations."""
    CANCELLED = "cancelled"
    """The user ended it."""
    FAILED = "failed"
    """An error ended it."""

    @property
    def is_final(self) -> bool:
        """Whether the run is complete and cannot be resumed."""
        return self in (Outcome.FINISHED, Outcome.STOPPED)
