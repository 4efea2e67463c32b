"""Requests to a run while it trains: files in a folder of its own, so that every door and every program can make them.

    requests/preview        draw previews after this step
    requests/save           save the LoRA of this step
    requests/draw-ID.json   draw a prompt, a `DrawRequest`

A request is carried out between two steps and removed; those that are left when the run ends are removed, too. It
changes neither weights nor random numbers. The files are untrusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.files import is_regular, read_regular, write_atomic
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.printable import first_line
from lorasmith.core.typed_json import typed
from lorasmith.training.events import PromptDrawn, Warned
from lorasmith.training.loop import Loop, Watcher
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.watchers import LoraWatch, PreviewWatch

REQUESTS = "requests"
Request = Literal["preview", "save"]

_DRAWN = re.compile(r"draw-([0-9a-f]{1,32})\.json")
_MOST_BYTES = 100_000
_MOST_WAITING = 100


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """A prompt to draw without and with the LoRA, from the same noise."""

    prompt: str
    strength: Annotated[float, "of the LoRA"] = 1.0
    seed: Annotated[int, "of the noise"] = 0
    control: Annotated[str, "name of the picture to edit, in the folder of what is tried; empty for none"] = ""
    lora: Annotated[str, "name of a file that the run has saved; empty for the weights as they are"] = ""


def request(run: Path, what: Request | DrawRequest) -> str:
    """Ask the process that trains in a folder for previews, for the LoRA, or for a drawing; returns the request's id.

    OptionError if nobody trains there, or too many requests wait; OutputError if the folder cannot be written.
    """
    folder = RunFolder(run)
    if not folder.exists or not folder.is_training:
        raise OptionError(f"a request is for a run that is being trained, and {run} is not; name another one")
    if isinstance(what, str):
        write_atomic(run / REQUESTS / what, b"")
        return what
    if len(_files(run)) >= _MOST_WAITING:
        raise OptionError(f"at most {_MOST_WAITING} drawings may wait for a run; let some be drawn first")
    id = uuid.uuid4().hex
    write_atomic(run / REQUESTS / f"draw-{id}.json", json.dumps(asdict(what), ensure_ascii=False))
    return id


class RequestWatch(Watcher):
    """Carries out the requests in the folder of a run.

    `previews` is None for a run that draws none. `save` saves the LoRA at `lora`, from which `draw` draws; without it,
    it draws with the saved LoRA that the request names. It returns the files, and a note.
    """

    def __init__(
        self,
        run: Path,
        lora: Path,
        saves: LoraWatch,
        save: Callable[[Loop, Path], None],
        previews: PreviewWatch | None,
        draw: Callable[[DrawRequest, Path | None], tuple[Sequence[Path], str]],
    ) -> None:
        self._run, self._lora = run, lora
        self._saves, self._save, self._previews, self._draw = saves, save, previews, draw
        self._waiting: list[Path] = []

    def due(self, loop: Loop) -> bool:
        self._waiting = _files(self._run) if loop.step < loop.steps else []
        kinds = {file.name for file in self._waiting} - {"save"}
        self.needs_frozen_model = bool(kinds)
        self.needs_bare_model = bool(kinds - {"preview"}) or (
            bool(kinds) and (self._previews is None or self._previews.needs_bare_model)
        )
        return bool(self._waiting)

    def __call__(self, loop: Loop) -> None:
        for file in self._waiting:
            drawing = _drawing(file)
            file.unlink(missing_ok=True)
            if file.name == "save":
                self._saves(loop)
            elif file.name == "preview":
                if self._previews is None:
                    loop.emit(Warned(message="A preview was requested, but this run draws none; set previews."))
                elif not self._previews.due(loop):  # else it was called before
                    self._previews(loop)
            elif drawing is None:
                loop.emit(Warned(message=f"The request {file.name} cannot be read; make it again."))
            else:
                loop.emit(self._drawn(loop, file, drawing))

    def end(self, loop: Loop) -> None:
        for file in _files(self._run):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is none, or it has files of others
            (self._run / REQUESTS).rmdir()

    def _drawn(self, loop: Loop, file: Path, asked: DrawRequest) -> PromptDrawn:
        files: Sequence[Path] = ()
        note = error = ""
        try:
            with contextlib.ExitStack() as stack:
                if not asked.lora:
                    stack.callback(self._lora.unlink, missing_ok=True)
                    with loop.engine.exported():
                        self._save(loop, self._lora)
                files, note = self._draw(asked, None if asked.lora else self._lora)
        except Exception as failure:  # any: a drawing must not end training
            is_ours = isinstance(failure, LorasmithError)
            error = str(failure) if is_ours else f"{type(failure).__name__}: {first_line(failure)}"
        match = _DRAWN.fullmatch(file.name)
        return PromptDrawn(
            id=match[1] if match else "",
            step=loop.step,
            lora=asked.lora,
            prompt=asked.prompt,
            strength=asked.strength,
            seed=asked.seed,
            paths=tuple(map(str, files)),
            note=note,
            error=error,
        )


def drawings_waiting(run: Path) -> dict[str, DrawRequest]:
    """The drawings that a run was asked for and has not drawn yet, by the id of their request, the oldest first."""
    found = ((_DRAWN.fullmatch(file.name), _drawing(file)) for file in _files(run))
    return {match[1]: drawing for match, drawing in found if match and drawing}


def _files(run: Path) -> list[Path]:
    """The requests that wait, LoRAs first, in the order of their age."""
    return [path for *_, path in sorted(_stamped(run))]


def _stamped(run: Path) -> Iterator[tuple[int, float, str, Path]]:
    try:
        entries = list(os.scandir(run / REQUESTS))
    except OSError:  # there are none
        return
    for entry in entries:
        order = {"save": 0, "preview": 1}.get(entry.name, 2 if _DRAWN.fullmatch(entry.name) else None)
        path = Path(entry.path)
        if order is not None and not entry.is_symlink() and is_regular(path):
            with contextlib.suppress(OSError):
                yield order, entry.stat().st_mtime, entry.name, path


def _drawing(file: Path) -> DrawRequest | None:
    """The request in a file; None if it cannot be read."""
    if not _DRAWN.fullmatch(file.name):
        return None
    try:
        return typed(parse_foreign_json(read_regular(file, at_most=_MOST_BYTES)), DrawRequest)
    except (OSError, ValueError):
        return None
