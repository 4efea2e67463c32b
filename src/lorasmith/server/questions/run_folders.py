"""Runs as folders below the base folder: their paths, and the LoRAs in them.

Runs are in `<base>/runs` (of the page and the command line) and in `<base>/output/runs` (of graphs). A run's id is its
folder relative to the base folder, such as `runs/dog-001`. Runs of two experts of a model share a folder, such as
`runs/dog-001/high_noise`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from lorasmith.app.drawing import EXPERTS
from lorasmith.app.run_page import is_own
from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import is_regular
from lorasmith.core.folders import Folders
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.hashes import sha256_file
from lorasmith.formats.metadata import steps_of
from lorasmith.server.api_shapes import SavedLora
from lorasmith.server.questions.dataset_questions import UnknownFileError, is_name
from lorasmith.training.runs.history import RECORD, RunHistory
from lorasmith.training.runs.records import RunRecord
from lorasmith.training.runs.run_folder import RunFolder

PLACES = ("runs", "output/runs")  # parents of runs, relative to the base folder


def run_folder_of(folders: Folders, id: str, *, is_begun: bool = True) -> Path:
    """The folder of a run; unless `is_begun`, its record need not exist yet. Raises UnknownFileError."""
    place, _, name = id.rpartition("/")
    names: tuple[str, ...] = (name,)
    if name in EXPERTS and place not in PLACES:
        place, _, outer = place.rpartition("/")
        names = (outer, name)
    folder = folders.base.joinpath(place, *names)
    if place in PLACES and all(map(is_name, names)):
        base = folders.base.resolve()
        roots = (base, (folders.base / place).resolve())
        if (is_regular(folder / RECORD) or not is_begun) and any(
            folder.resolve().is_relative_to(root) for root in roots
        ):
            return folder
    raise UnknownFileError(f"there is no run {id!r}; choose one of the list")


def all_runs(folders: Folders) -> Iterator[tuple[str, Path]]:
    """Every run's id and folder."""
    for place in PLACES:
        parent = folders.base / place
        names = sorted(entry.name for entry in os.scandir(parent)) if parent.is_dir() else []
        for id in (f"{place}/{name}{inner}" for name in names for inner in ("", *(f"/{one}" for one in EXPERTS))):
            with contextlib.suppress(UnknownFileError):
                yield id, run_folder_of(folders, id)


def saves_of(folder: Path, record: RunRecord) -> Iterator[SavedLora]:
    """The saved LoRAs of a run, ordered by step."""
    own = re.compile(rf"{re.escape(record.title)}(-best|-step\d+)?")
    found = []
    for path in folder.glob("*.safetensors"):
        match = own.fullmatch(path.stem)
        if match and is_own(path, folder) and (step := _steps(str(path), stamp_of(path))) is not None:
            found.append(SavedLora(step=step, file=path.name, bytes=path.stat().st_size, best=match[1] == "-best"))
    yield from sorted(found, key=lambda one: (one.step, one.file))


def is_trainable_on(history: RunHistory) -> bool:
    """Whether a longer run can continue from the end of a run."""
    is_complete = history.outcome is not None and history.outcome.is_final
    return (
        is_complete
        and history.record.source.get("command") == "train"
        and bool(RunFolder(history.folder).states().paths())
    )


def stamp_of(path: Path) -> tuple[int, int]:
    """Time of change and size of a file, as a cache key; zeros if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def digest_of(path: Path) -> str:
    """SHA-256 of a file, cached until it changes."""
    return _digest_once(str(path), stamp_of(path))


@functools.lru_cache(maxsize=5000)
def _steps(path: str, stamp: tuple[int, int]) -> int | None:
    """Steps of a LoRA; None if it cannot be read."""
    try:
        return steps_of(check_safetensors(Path(path)).metadata, Path(path).name)
    except LorasmithError:
        return None


@functools.lru_cache(maxsize=1000)
def _digest_once(path: str, stamp: tuple[int, int]) -> str:
    return sha256_file(Path(path))
