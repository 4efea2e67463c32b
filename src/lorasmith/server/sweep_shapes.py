"""Types of the API about sweeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lorasmith.server.api_shapes import DatasetSource, SkippedFile


@dataclass(frozen=True, kw_only=True)
class SweepBody(DatasetSource):
    """The sweep to queue: a run for each combination of the values in `grid`.

    Attributes:
        name: of the LoRAs; that of the dataset if it is empty.
        model: its name in the list of models.
        dataset: name of a dataset.
        folder: path of a folder of images, in place of a dataset.
        trigger: phrase for the subject or style.
        settings: of data and training that all runs have, by name.
        grid: the values to try of each further setting, by name.
    """

    name: str = ""
    grid: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A sweep in the list.

    Attributes:
        id: name of its folder in `runs`.
        runs: their number.
        states: number of runs by the state of their jobs.
    """

    id: str
    runs: int
    states: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class SweepList:
    """All sweeps, those of the page first, and the folders that look like one and cannot be read."""

    sweeps: tuple[SweepRow, ...]
    damaged: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepRunRow:
    """A run of a sweep.

    Attributes:
        name: of its folder in that of the sweep.
        run: its id.
        settings: the values that the sweep varies.
        state: complete, failed, stopped, running, or waiting.
        place: in the ranking, from 1; None for runs that are not complete or have no held-out loss.
        loss, best_step: the lowest held-out loss and its step.
        change: of the loss relative to that of the base model, such as -0.05 for 5 % less.
        steps: that were taken.
        error: of a failed run, in a sentence.
    """

    name: str
    run: str
    settings: dict[str, Any]
    state: str
    place: int | None = None
    loss: float | None = None
    best_step: int | None = None
    change: float | None = None
    steps: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepAnswer:
    """A sweep.

    Attributes:
        id: name of its folder in `runs`.
        comparable: whether all losses are of the same held-out images; if not, the ranking is by `change`.
        runs: the best first, then those that are not ranked.
    """

    id: str
    comparable: bool
    runs: tuple[SweepRunRow, ...]
