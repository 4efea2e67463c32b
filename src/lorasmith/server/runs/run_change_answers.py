"""Changes of runs by hand: what they are called, starred and noted, in `marks.json` of their folder; their removal and
return.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict

from lorasmith.core.errors import OptionError, OutputError
from lorasmith.core.files import is_folder, write_atomic
from lorasmith.core.folders import Folders
from lorasmith.server.datasets.dataset_folders import UnknownFileError, is_name
from lorasmith.server.datasets.dataset_shapes import RemovedAnswer
from lorasmith.server.questions import question
from lorasmith.server.runs.run_list_answers import MARKS, PLACES, marks_of, run_folder_of, shown_marks
from lorasmith.server.runs.run_shapes import RunMarks
from lorasmith.server.server_disk import disk_space, put_folder_back, removed_folder, set_aside
from lorasmith.training.storage.run_folder import RunFolder

_MOST_TITLE, _MOST_NOTE = 100, 4_000  # characters
_CHANGING = threading.Lock()


@question
def mark_run(
    folders: Folders, id: str, *, title: str | None = None, starred: bool | None = None, note: str | None = None
) -> RunMarks:
    """Store what a run is called (empty: its folder's name), whether it is starred, and a note; None leaves each as it
    is. Raises UnknownFileError, OptionError for long texts, and OutputError.
    """
    folder = run_folder_of(folders, id)
    for name, text, most in (("title", title, _MOST_TITLE), ("note", note, _MOST_NOTE)):
        if text is not None and len(text) > most:
            raise OptionError(f"a {name} must have at most {most:,} characters, got {len(text):,}; shorten it")
    with _CHANGING:
        there = marks_of(folder)
        run_marks = shown_marks(
            RunMarks(
                title=there.title if title is None else title,
                starred=there.starred if starred is None else starred,
                note=there.note if note is None else note,
            )
        )
        text = json.dumps(asdict(run_marks), ensure_ascii=False)
        with disk_space(folder, len(text)):
            write_atomic(folder / MARKS, text + "\n")
    return run_marks


@question
def remove_run(folders: Folders, id: str) -> RemovedAnswer:
    """Move a run to the removed things. Raises UnknownFileError, and OutputError while a process trains it."""
    folder = run_folder_of(folders, id)
    if RunFolder(folder).is_training:
        raise OutputError(f"{id} is being trained; stop it first")
    with _CHANGING:
        removed = set_aside(folders.base, [folder], folder.name)
    return RemovedAnswer(removed=(removed / folder.name).relative_to(folders.base).as_posix())


@question
def restore_run(folders: Folders, id: str, *, removed: str) -> RunMarks:
    """Move a removed run back to its place. Raises UnknownFileError, and OutputError if another run is there now."""
    parent, target = removed_folder(folders.base), folders.base / id
    place, _, name = id.rpartition("/")
    outer, _, _ = place.rpartition("/")
    is_place = is_name(name) and (place in PLACES or (outer in PLACES and is_folder(target.parent)))
    stored, _, last = removed.rpartition("/")
    with _CHANGING:
        try:
            if not is_place or last != name:
                raise FileNotFoundError
            put_folder_back(folders.base, stored, target, is_run=True)
        except FileNotFoundError:
            raise UnknownFileError(f"there is no removed run {removed!r} of {id!r}; look into {parent}") from None
        except FileExistsError:
            raise OutputError(
                f"there is another run {id} now; move the removed one back by hand, from {folders.base / removed}"
            ) from None
    return marks_of(target)
