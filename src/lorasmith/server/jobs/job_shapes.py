"""The JSON of jobs, plans, drafts and sweeps. msgspec validates and describes it; numbers are finite, or null.

The server imports this module, so it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lorasmith.server.datasets.dataset_shapes import SkippedFile


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What is chosen for a training on a dataset that is not queued yet. All pages share it."""

    name: Annotated[str, "of the LoRA"] = ""
    trigger: Annotated[str, "phrase for the subject or style"] = ""
    model: Annotated[str | None, "its name in the list of models"] = None
    edit: Annotated[str | None, "edit variant that the model is, or none; null if its name says so"] = None
    is_chosen: Annotated[bool, "whether somebody chose the model, so that no other is suggested"] = False
    what: Annotated[
        Literal["", "person", "pet", "thing", "style", "edit", "slider"], "what it is; empty if nobody said so"
    ] = ""
    pairs: Annotated[bool | None, "whether it trains on pairs; null if the pictures say so"] = None
    preset: Annotated[str, "name of a preset"] = "balanced"
    teaches: Annotated[Literal["", "subject", "style"], "what the pictures teach; guessed if empty"] = ""
    settings: Annotated[dict[str, Any], "those that differ from the preset's, by name"] = field(default_factory=dict)
    measurement: Annotated[str | None, "id of the job that measures a step for it"] = None
    again: Annotated[str, "id of the run that is trained again; empty for none"] = ""


@dataclass(frozen=True, kw_only=True)
class DraftBody:
    """A draft to store."""

    draft: Draft
    seen: Annotated[
        Draft | None,
        "the draft that it was made from. What others changed since then stays, and 409 where both changed the same. "
        "Null to replace all.",
    ] = None


@dataclass(frozen=True, kw_only=True)
class DraftAnswer:
    """The draft of a dataset."""

    draft: Draft
    version: Annotated[int, "how often it was stored; 0 for one that nobody has stored"]


@dataclass(frozen=True, kw_only=True)
class MeasurementBody:
    """What to measure: some steps on a model, on made-up pictures."""

    model: Annotated[str, "its name in the list of models"]
    settings: Annotated[dict[str, Any], "of data and training, by name"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlanBody(MeasurementBody):
    """The run to plan."""

    dataset: Annotated[str | None, "name of a dataset"] = None
    folder: Annotated[str | None, "path or address of images, in place of a dataset"] = None
    trigger: Annotated[str, "phrase for the subject or style"] = ""
    edit: Annotated[str | None, "edit variant that the model is, or none; null if its name says so"] = None
    preset: Annotated[str, "whose recipe completes the settings; their own defaults if it is none or empty"] = ""
    teaches: Annotated[
        Literal["", "subject", "style"], "what the pictures teach, which a recipe follows; guessed if empty"
    ] = ""


@dataclass(frozen=True, kw_only=True)
class PlanAnswer:
    """The plan of a run."""

    steps: Annotated[int, "updates"]
    seen: Annotated[int, "pictures seen in all steps, repetitions counted"]
    epochs: Annotated[float, "how often each picture is seen"]
    rank: Annotated[int, "of the LoRA"]
    resolution: Annotated[int, "side in pixels of the square whose area pictures are scaled to"]
    images: Annotated[int, "number of pictures"]
    held_out: Annotated[int, "number of those that are held out for validation"]
    parameters: Annotated[int, "number of trained parameters"]
    memory_bytes: Annotated[int | None, "needed at the peak of a step, with `memory_settings`"]
    fits: Annotated[bool | None, "whether the device has it; null if its memory is unknown"]
    memory_settings: Annotated[
        dict[str, Any], "that should be added to the run so that it fits; they are the cheapest ones"
    ] = field(default_factory=dict)
    seconds_per_step: Annotated[float | None, "measured on this device; null if it was not"] = None
    seconds: Annotated[float | None, "of all steps"] = None
    measured_at: Annotated[float | None, "when that was measured, in seconds since the epoch; null if it was not"] = (
        None
    )
    estimated_seconds: Annotated[
        float | None, "of the run with its previews, about, as busy as the machine is; null if unknown"
    ] = None
    slowdown: Annotated[float, "how many times as long other programs make it take, in `estimated_seconds`"] = 1.0
    notes: Annotated[tuple[str, ...], "remarks, one sentence each"] = ()
    teaches: Annotated[str, "subject or style, as it was said or guessed; empty without a recipe"] = ""
    teaches_because: Annotated[str, "why that was guessed, in a clause; empty if it was said"] = ""
    recipe: Annotated[dict[str, Any], "settings that the preset adds, by name"] = field(default_factory=dict)
    distilled: Annotated[str, "what training a model distilled to few steps needs; empty for others"] = ""
    usual_adapter: Annotated[str, "the LoRA made for that among those here; empty for none"] = ""


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """What a job may use. One that goes beyond it saves its run and fails; it can be continued."""

    steps: Annotated[int | None, "of its run; null for no limit"] = None
    minutes: Annotated[float | None, "in all attempts together; null for no limit"] = None
    memory_bytes: Annotated[int | None, "at the peak, as its run reports it; null for no limit"] = None


@dataclass(frozen=True, kw_only=True)
class JobBody(PlanBody):
    """The job to add to the queue."""

    kind: Annotated[Literal["train"], "train"] = "train"
    name: Annotated[str, "of the LoRA; that of the dataset if it is empty"] = ""
    front: Annotated[bool, "whether it goes before all others"] = False
    evaluate: Annotated[bool, "whether its LoRAs are evaluated at its end, by a job behind all others"] = False
    key: Annotated[
        str,
        "chosen by the client, at most 200 characters: a request with a key that was used is answered with its job. A "
        "job with a key waits again whenever its server ended. Empty for none",
    ] = ""
    priority: Annotated[int, "higher ones are started first, -100 to 100"] = 0
    deadline: Annotated[
        float | None, "when it must have ended, in seconds since the epoch; it then saves its run and fails"
    ] = None
    limits: Annotated[JobLimits, "what it may use"] = field(default_factory=JobLimits)
    notify: Annotated[
        str, "address that receives its notices, on a host that the operator allows; the server's own if it is empty"
    ] = ""


@dataclass(frozen=True, kw_only=True)
class JobAnswer:
    """A job."""

    id: Annotated[str, "of the job"]
    kind: Annotated[str, "graph, train, measure or draw"]
    state: Annotated[str, "pending, running, completed, failed, cancelled, paused or interrupted"]
    number: Annotated[float, "order in the queue"]
    title: Annotated[str, "what it is, in some words"]
    name: Annotated[str | None, "of the LoRA that it trains; null for other jobs"]
    model: Annotated[str | None, "that it is about; null for graphs"]
    dataset: Annotated[str | None, "that it trains on; null for other folders and jobs"]
    created: Annotated[float, "when it was queued, in seconds since the epoch"]
    started: Annotated[float | None, "when it was last started; null before that"]
    ended: Annotated[float | None, "when it ended; null before that"]
    outputs: Annotated[
        dict[str, Any],
        "of a graph's nodes, by their ids; of a drawing its `pictures`, without and with the LoRA, and `strengths`",
    ]
    error: Annotated[dict[str, Any] | None, "why it failed"]
    run: Annotated[str | None, "id of the run that it trains or has trained"]
    attempts: Annotated[int, "how often it was started"]
    about: Annotated[str | None, "id of the run whose LoRAs it draws with or evaluates; null for other jobs"] = None
    wish: Annotated[str | None, "what the grid that it draws is asked for; null for other jobs"] = None
    gives_way: Annotated[bool, "whether the server or a page queued it by itself: every other job comes first"] = False
    key: Annotated[str | None, "that its client gave it; null for none"] = None
    priority: Annotated[int, "higher ones are started first"] = 0
    deadline: Annotated[float | None, "when it must have ended, in seconds since the epoch; null for none"] = None
    limits: Annotated[dict[str, Any], "what it may use, of steps, minutes and memory_bytes"] = field(
        default_factory=dict
    )
    submitter: Annotated[str | None, "name of the token by which it was queued; null without one"] = None
    request: Annotated[dict[str, Any], "what it does"] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobList:
    """Some jobs: those that run and wait in order, then those that ended, the last first; and the number of all."""

    jobs: tuple[JobAnswer, ...]
    total: int


@dataclass(frozen=True, kw_only=True)
class RemovedJob:
    """The id of a job that is no longer there."""

    id: str


@dataclass(frozen=True, kw_only=True)
class CancelBody:
    """Whether the job only pauses, to be continued later."""

    pause: bool = False


@dataclass(frozen=True, kw_only=True)
class MoveBody:
    """Where a waiting job goes: before all others, or behind them."""

    front: bool = True


@dataclass(frozen=True, kw_only=True)
class SweepBody(PlanBody):
    """The sweep to queue: a run for each combination of the values in `grid`."""

    name: Annotated[str, "of the LoRAs; that of the dataset if it is empty"] = ""
    grid: Annotated[dict[str, list[Any]], "the values to try of each further setting, by name"] = field(
        default_factory=dict
    )


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """A sweep in the list."""

    id: Annotated[str, "name of its folder in `runs`."]
    runs: Annotated[int, "their number."]
    states: Annotated[dict[str, int], "number of runs by the state of their jobs."]


@dataclass(frozen=True, kw_only=True)
class SweepList:
    """All sweeps, those of the page first, and the folders that look like one and cannot be read."""

    sweeps: tuple[SweepRow, ...]
    damaged: tuple[SkippedFile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepRunRow:
    """A run of a sweep."""

    name: Annotated[str, "of its folder in that of the sweep."]
    run: Annotated[str, "its id."]
    settings: Annotated[dict[str, Any], "the values that the sweep varies."]
    state: Annotated[str, "complete, failed, stopped, running, or waiting."]
    place: Annotated[
        int | None, "in the ranking, from 1; None for runs that are not complete or have no held-out loss."
    ] = None
    loss: Annotated[float | None, "the lowest held-out loss and its step."] = None
    best_step: Annotated[int | None, "the lowest held-out loss and its step."] = None
    change: Annotated[float | None, "of the loss relative to that of the base model, such as -0.05 for 5 % less."] = (
        None
    )
    steps: Annotated[int, "that were taken."] = 0
    error: Annotated[str, "of a failed run, in a sentence."] = ""
    cover: Annotated[str | None, "its newest picture; a path among its files."] = None


@dataclass(frozen=True, kw_only=True)
class SweepAnswer:
    """A sweep."""

    id: Annotated[str, "name of its folder in `runs`."]
    comparable: Annotated[
        bool, "whether all losses are of the same held-out images; if not, the ranking is by `change`."
    ]
    runs: Annotated[tuple[SweepRunRow, ...], "the best first, then those that are not ranked."]
