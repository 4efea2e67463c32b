"""Why a run ended, as events, run folders, reports and doors say it."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Outcome"]


class Outcome(StrEnum):
    """Why no more steps come; the value is what files say."""

    FINISHED = "finished"
    """All steps were taken."""
    STOPPED = "stopped"
    """Validation found no improvement for as long as the patience allows."""
    CANCELLED = "cancelled"
    """Somebody ended it."""
    FAILED = "failed"
    """An error ended it."""

    @property
    def is_final(self) -> bool:
        """Whether the run ended by itself, so that it is not continued."""
        return self in (Outcome.FINISHED, Outcome.STOPPED)
