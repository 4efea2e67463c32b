"""When a run ends by what its previews show: pictures that no longer get more alike, and follow prompts less.

Previews are measured as LoRAs are in an evaluation (`evaluation.measures`); the score is a product of two of these
(`LikenessMeasured`). Held-out losses have a history of their own (`validation.History`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lorasmith.training.events import LikenessMeasured

_NOISE = 0.05
"""Difference of two previews' adherence, and of their likeness, that says nothing."""


class LikenessHistory:
    """The measured previews of a run, by step."""

    def __init__(self, measured: Iterable[LikenessMeasured] = ()) -> None:
        self.measured: list[LikenessMeasured] = []
        for previous in measured:
            self.add(previous)

    def add(self, measured: LikenessMeasured) -> None:
        """Add a measured preview; those from its step on are replaced."""
        self.measured = [earlier for earlier in self.measured if earlier.step < measured.step] + [measured]

    @property
    def best_step(self) -> int:
        """Step of the highest score, the earliest on ties."""
        return self.measured[self._best].step

    def is_at(self, step: int) -> bool:
        """Whether the last measured preview is of this step."""
        return bool(self.measured) and self.measured[-1].step == step

    def should_stop(self, patience: int) -> bool:
        """Whether likeness has not risen above that of the best preview, and adherence was below its, for the last
        `patience` previews; 0 never stops.
        """
        since = self.measured[self._best + 1 :] if self.measured else []
        return 0 < patience <= len(since) and all(self._is_worse(later) for later in since[-patience:])

    @property
    def reason(self) -> str:
        """Why the run stops, in a sentence."""
        best, last = self.measured[self._best], self.measured[-1]
        alike = f"{best.likeness:.2f} then, {last.likeness:.2f} now"
        follows = f"{best.adherence or 0:.2f} then, {last.adherence or 0:.2f} now"
        return (
            f"The run stops early: since step {best.step} previews look no more like the images ({alike}), and follow "
            f"prompts less ({follows})."
        )

    @property
    def _best(self) -> int:
        return int(np.argmax([likeness.score for likeness in self.measured]))

    def _is_worse(self, measured: LikenessMeasured) -> bool:
        best = self.measured[self._best]
        follows = (measured.adherence or 0.0) < (best.adherence or 0.0) - _NOISE
        return follows and measured.likeness <= best.likeness + _NOISE
