"""Records of runs: the content of `run.json`, of the entry about its run in a LoRA, and of `events.jsonl`.

The first two are written and read only here. A record may be damaged, untrusted or of another version, so it is
validated as a whole before anything in it is used; `runs.recorded_run` restricts what it may name.

A killed run may end in an incomplete line of its log, and a full disk leaves gaps; unreadable lines are counted and
skipped. A log is read line by line: it may have gigabytes, mostly draws, which are not kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torch import nn

from lorasmith.core.errors import OptionError, TrainingError
from lorasmith.core.extensions import Extension
from lorasmith.core.files import open_regular, read_regular
from lorasmith.core.folders import MAX_STEM_BYTES, RUN_LOG, RUN_RECORD, file_stem
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import Scalar, typed
from lorasmith.data.dataset import Split
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import MOST_LINE_BYTES, Event, Outcome, RunFinished, RunStarted, StepDone, decoded
from lorasmith.training.job import TrainJob
from lorasmith.training.section import Consequences, recorded_consequences
from lorasmith.training.storage.fingerprint import Fingerprint, environment, file_digests, fingerprint

_REPEATED = ("source", "asked", "fingerprint", "environment", "environments")
"""Fields from which a run can be reproduced, and which its LoRA stores."""

_ELSEWHERE = ("command", "model", "name", "vae", "device")
"""Parts of a source that are not about its images."""

_MOST_STEPS = 10**9

RECORD_VERSION = 1
"""Version of the format of `run.json`."""


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """The base model of a run."""

    name: Annotated[str, "its title"] = ""
    path: Annotated[str | None, "where it was, None for a model made in memory"] = None
    family: Annotated[str, "its architecture"] = ""
    files: Annotated[dict[str, str], "where its parts were, by component"] = field(default_factory=dict)
    pipeline: Annotated[str, "class of the diffusers pipeline that draws with it, empty if unknown"] = ""


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """A training image: its name, caption and the shape of its latents."""

    name: str = ""
    caption: str | None = None
    latents: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run. Fields that another version did not write have their defaults."""

    version: Annotated[int, "of this format, raised when an older reader would misunderstand it; 1 if missing"] = (
        RECORD_VERSION
    )
    title: Annotated[str, "name of the LoRA and its file"] = ""
    source: Annotated[
        dict[str, Any], "JSON values from which a door can repeat the run, with the name of its command"
    ] = field(default_factory=dict)
    model: Annotated[ModelRecord, "the base model"] = field(default_factory=ModelRecord)
    config: Annotated[dict[str, Scalar], "settings, all resolved"] = field(default_factory=dict)
    asked: Annotated[dict[str, Scalar], "settings as requested, some of them open"] = field(default_factory=dict)
    steps_before: Annotated[int, "steps of the LoRA that was continued"] = 0
    samples: Annotated[tuple[SampleRecord, ...], "the training samples"] = ()
    data: Annotated[dict[str, Any], "facts on the images, for readers"] = field(default_factory=dict)
    adapters: Annotated[dict[str, int], "number of parameters by module path"] = field(default_factory=dict)
    differences: Annotated[dict[str, int], "number of parameters of trained differences by module path"] = field(
        default_factory=dict
    )
    fingerprint: Annotated[Fingerprint, "of the run"] = field(default_factory=Fingerprint)
    environment: Annotated[dict[str, Any], "the first one that it was trained in"] = field(default_factory=dict)
    environments: Annotated[tuple[dict[str, Any], ...], "all of them, if they are several"] = ()
    extensions: Annotated[tuple[Extension, ...], "what it used of other packages; missing if nothing"] = ()

    @property
    def consequences(self) -> Consequences:
        """What follows from the settings."""
        return recorded_consequences(TrainConfig, self.config)

    def __post_init__(self) -> None:
        if not 1 <= self.version <= RECORD_VERSION:
            rule = f"version must be between 1 and {RECORD_VERSION}, got {self.version}"
            raise ValueError(f"{rule}; if a later Lorasmith wrote it, update")
        if self.title:
            try:
                check_title(self.title)
            except OptionError as error:
                raise ValueError(str(error)) from error
        if not 0 <= self.steps_before <= _MOST_STEPS:
            raise ValueError(f"steps_before must be between 0 and {_MOST_STEPS:,}, got {self.steps_before}")

    @property
    def all_environments(self) -> tuple[dict[str, Any], ...]:
        """All environments that the run was trained in; resuming may add some."""
        return self.environments or (self.environment,)

    def to_text(self) -> str:
        return _json({name: value for name, value in asdict(self).items() if value or name != "extensions"}, indent=2)

    def to_entry(self) -> str:
        return _json({name: value for name in _REPEATED if (value := getattr(self, name))}, sort_keys=True)


def parsed_record(text: str | bytes) -> RunRecord:
    """The record in `run.json` or in a LoRA. Raises ValueError with a clause that says what is wrong and where."""
    found = parse_foreign_json(text)
    record = typed(found, RunRecord)
    # Parts that only a later version's fingerprint has are kept: they are differences, too.
    return replace(record, fingerprint=found.get("fingerprint", {}))


def run_record(
    job: TrainJob,
    parts: Split,
    *,
    title: str,
    source: Mapping[str, Any],  # JSON values from which the run can be repeated
    facts: Mapping[str, Any],  # more on the images, for readers
    verify: bool,  # digest every byte of the base model's files
) -> RunRecord:
    """The record of a planned run. Raises ModelError if a file of the base model cannot be read for `verify`."""
    model = job.model.facts
    held_out = parts.held_out.samples if parts.held_out else ()
    taken = fingerprint(job, parts.training, parts.held_out)
    if verify:
        taken["files"] = file_digests(model.files)
    return RunRecord(
        title=title,
        source=dict(source),
        model=ModelRecord(
            name=model.title,
            path=str(model.path) if model.path else None,
            family=job.model.names.family,
            files={part: str(path) for part, path in model.files.items()},
            pipeline=model.pipeline,
        ),
        config=asdict(job.config),
        asked=asdict(job.requested),
        steps_before=job.steps_before,
        samples=tuple(
            SampleRecord(name=sample.name, caption=sample.conditioning.text, latents=tuple(sample.latents.shape))
            for sample in parts.training.samples
        ),
        data={
            **{
                name: value
                for name, value in source.items()
                if name not in _ELSEWHERE and value and isinstance(value, Scalar)
            },
            "held_out": ", ".join(dict.fromkeys(sample.name for sample in held_out)),
            "note": parts.note,
            **facts,
        },
        adapters={path: _size(adapter) for path, adapter in job.all_adapters.items()},
        differences={path: _size(difference) for path, difference in job.differences.items()},
        fingerprint=taken,
        environment=environment(
            job.way.device, job.config.optimizer, compile=job.config.compile, extensions=job.extensions
        ),
        extensions=job.extensions,
    )


def check_title(name: str) -> None:
    """Raise OptionError unless a LoRA's name is a valid file name on all platforms."""
    if not name.strip(". ") or any(letter in name for letter in ("/\\:" if os.name == "nt" else "/\\")):
        raise OptionError(f"name must be a file name without folders, got {name!r}; give folders as the output")
    if file_stem(name) != name:
        raise OptionError(
            f"name must have at most {MAX_STEM_BYTES} bytes and no control characters, got {name!r}; choose another"
        )


def _json(value: object, **options: Any) -> str:
    """JSON in which undecodable bytes of paths are question marks, as readers refuse them."""
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "replace").decode()


def _size(trained: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trained.parameters())


RECORD, EVENTS = RUN_RECORD, RUN_LOG

MOST_EVENTS = 2_000_000
"""Events that are kept; the longest run has some hundred thousand."""

_E = TypeVar("_E", bound=Event)


@dataclass(frozen=True)
class RunHistory:
    """The record and events of a run."""

    folder: Path
    record: RunRecord
    events: tuple[Event, ...]  # in order, steps without their draws; a resumed run has several starts
    unreadable: int  # number of skipped lines of `events.jsonl`

    def of(self, kind: type[_E]) -> list[_E]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def outcome(self) -> Outcome | None:
        """Why the run ended; None if it was killed or is running."""
        return _outcome(self.events)


def read_history(folder: Path) -> RunHistory:
    """The history of the run in `folder`. Raises OptionError and TrainingError, as `read_record`."""
    record = read_record(folder)
    events: list[Event] = []
    unreadable = 0
    for _, event in logged(folder):
        if event is None or len(events) == MOST_EVENTS:
            unreadable += 1
        else:
            events.append(replace(event, draws=()) if isinstance(event, StepDone) else event)
    return RunHistory(folder, record, tuple(events), unreadable)


def logged(folder: Path, *, only: bytes = b"") -> Iterator[tuple[bytes, Event | None]]:
    """Lines of a run's log that contain `only`, each with its event, None if unreadable. Raises TrainingError."""
    for line in _lines(folder / EVENTS):
        if not line.strip() or only not in line:
            continue
        try:
            yield line, decoded(line)
        except ValueError:
            yield line, None


def logged_outcome(folder: Path) -> Outcome | None:
    """Why the run in a folder ended, as `RunHistory.outcome`, without reading its whole log."""
    return _outcome(event for _, event in logged(folder, only=b"Run"))


def _outcome(events: Iterable[Event | None]) -> Outcome | None:
    last = None
    for event in events:
        if isinstance(event, RunStarted | RunFinished):
            last = event
    return last.reason if isinstance(last, RunFinished) else None


def read_record(folder: Path) -> RunRecord:
    """Content of `run.json`. Raises OptionError if there is no run, TrainingError if it is unreadable or damaged."""
    path = folder / RECORD
    if not path.is_file():
        raise OptionError(f"a run folder must contain run.json, got {folder}; name one such as runs/photos-001")
    try:
        return parsed_record(read_regular(path))
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{path} cannot be read ({error}), which is needed to identify the run; restore it from a copy"
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file; only the start of those that are too long."""
    try:
        with open_regular(path) as file:
            while line := file.readline(MOST_LINE_BYTES):
                rest = line
                while len(rest) == MOST_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MOST_LINE_BYTES)
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
