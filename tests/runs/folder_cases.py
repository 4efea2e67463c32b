"""Runs on small folders of images, and ways to change what they have written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lorasmith.data.sources import ImageSource
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.hashes import sha256_body
from lorasmith.formats.metadata import RUN_ENTRY
from lorasmith.runs.folder_run import PreparedRun, prepare
from lorasmith.runs.recorded_run import Rights
from lorasmith.runs.spec import RunSpec
from lorasmith.training.events import Event

CONFIRMED = Rights(files=True)
"""The pictures of these runs lie outside the folder in which the tests run."""


def pictures(folder: Path, number: int, *, seed: int = 0) -> Path:
    """A folder of noise pictures."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for index in range(number):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def asked(images: Path, **settings: Any) -> RunSpec:
    """A run of five quick steps, named `cat`."""
    quick = {"rank": 2, "targets": "*.attn2.to_q", "steps": 5, "schedule": "cosine", "previews": "", "resolution": 32}
    sources = (ImageSource(str(images)),)
    return RunSpec(sources=sources, model="lorasmith-tiny", name="cat", settings={**quick, **settings}).resolved()


def prepared(images: Path, **settings: Any) -> PreparedRun:
    """That run, ready to begin."""
    return prepare(asked(images, **settings))


class Audience:
    """Hears events, and asks a run to stop once a step is done."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: list[Event] = []
        self._stop_at = stop_at

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def cancelled(self) -> bool:
        return self._stop_at is not None and any(getattr(event, "step", 0) >= self._stop_at for event in self.events)

    def names(self) -> list[str]:
        return list(dict.fromkeys(type(event).__name__ for event in self.events))


def tensors_of(folder: Path) -> str:
    """Hash of the tensors that a run made."""
    return sha256_body(folder / "cat.safetensors")


def with_record(folder: Path, **changes: object) -> None:
    """Change `run.json`; what is a mapping is laid over what is there."""
    record = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) and value else value
    (folder / "run.json").write_text(json.dumps(record))


def with_metadata(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a LoRA says of the run that made it."""
    tensors, metadata = read_safetensors(path)
    run = json.loads(metadata[RUN_ENTRY])
    change(run)
    write_safetensors(path, tensors, {**metadata, RUN_ENTRY: json.dumps(run)})
