"""Uploads: files of a multipart body, streamed to disk one by one, then checked by the assistant.

Only pictures and captions are kept, and a sent name is not used until the assistant has sanitised it. A caption belongs
to the picture with the same stem in the same request, whatever that is renamed to, or else to the one in the dataset.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from aiohttp import web

from lorasmith.server.api.endpoint import Call
from lorasmith.server.api_shapes import SkippedFile, UploadAnswer
from lorasmith.server.assistant import RefusedError
from lorasmith.server.request_handling import ServerContext, TooLargeError, form_parts, received, upload_folder

MOST_FILE_BYTES = 100 * 2**20  # of a picture
MOST_TEXT_BYTES = 80_000  # of a caption
MOST_REQUEST_BYTES = 20 * 2**30  # of all files of a request
MOST_FILES = 4000  # of a request, captions included
_TEXTS = (".txt", ".caption")


@dataclass
class _Received:
    """The files received so far."""

    added: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # new names by the names as sent
    pictures: dict[str, str] = field(default_factory=dict)  # names in the dataset by sent stem in lower case
    # names and paths of captions, which wait for all pictures
    texts: list[tuple[str, Path]] = field(default_factory=list)


async def add_files(context: ServerContext, call: Call) -> UploadAnswer:
    """Add pictures and captions to a dataset."""
    name = call.path("name")
    await context.assistant.ask("check_changes", name=name)  # before anything is received
    received = _Received()
    with upload_folder(context.config.base) as folder:
        async for sent, path, fault in _files(call.request, folder):
            file = PurePosixPath(sent.replace("\\", "/"))
            if fault:
                received.skipped.append(SkippedFile(file=file.name, reason=fault))
            elif file.suffix.lower() in _TEXTS:
                received.texts.append((sent, path))
                continue
            else:
                answer = await _asked(context, "add_image", name=name, file=sent, temporary=str(path))
                if kept := answer.get("added") or answer.get("same"):
                    received.pictures.setdefault(file.stem.casefold(), kept)
                _note(received, file.name, answer)
            path.unlink(missing_ok=True)
        for sent, path in received.texts:
            file = PurePosixPath(sent.replace("\\", "/"))
            image = received.pictures.get(file.stem.casefold(), "")
            answer = await _asked(context, "add_caption", name=name, file=sent, temporary=str(path), image=image)
            _note(received, file.name, answer)
    return UploadAnswer(added=tuple(received.added), skipped=tuple(received.skipped), renamed=received.renamed)


def _note(received: _Received, sent: str, answer: dict[str, str]) -> None:
    if (added := answer.get("added")) is None:
        received.skipped.append(SkippedFile(file=sent, reason=answer["skipped"]))
        return
    received.added.append(added)
    if added != sent:
        received.renamed[sent] = added


async def _asked(context: ServerContext, question: str, **arguments: Any) -> dict[str, str]:
    """The answer, or the reason why one file is skipped; errors of the whole dataset are raised."""
    try:
        answer: dict[str, str] = await context.assistant.ask(question, **arguments)
    except RefusedError as error:
        if error.kind in ("UnknownFileError", "InternalError"):
            raise
        return {"skipped": error.message}
    return answer


async def _files(request: web.Request, folder: Path) -> AsyncIterator[tuple[str, Path, str]]:
    """Each file of a form: its sent name, its path, and why it is skipped (empty if it is not)."""
    count, left = 0, MOST_REQUEST_BYTES
    async for part in form_parts(request):
        if not part.filename:
            continue  # the next part skips the rest of this one
        count += 1
        if count > MOST_FILES:
            raise TooLargeError(f"a request must have at most {MOST_FILES:,} files; send the others in another one")
        path = folder / str(count)
        is_text = part.filename.lower().endswith(_TEXTS)
        most = MOST_TEXT_BYTES if is_text else MOST_FILE_BYTES
        size = await received(part, path, at_most=most, read_at_most=left)
        left -= size
        limit = f"{MOST_TEXT_BYTES // 1000} kB" if is_text else f"{MOST_FILE_BYTES // 2**20} MB"
        yield part.filename, path, "" if size <= most else f"is larger than {limit}; make it smaller"
