"""Uploads: files of a multipart body, streamed to disk one by one and handed to the assistant, which checks them.

Nothing but pictures and captions is kept, and no name of a sender is used before the assistant has made it safe. A text
belongs to the picture that was sent beside it with the same stem, whatever that is called now, or else to the one that
is there.
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
from lorasmith.server.error_answers import TooLargeError
from lorasmith.server.server_context import ServerContext
from lorasmith.server.upload_folder import form_parts, received, upload_folder

MOST_FILE_BYTES = 100 * 2**20
"""Of a picture."""
MOST_TEXT_BYTES = 80_000
"""Of a caption."""
MOST_REQUEST_BYTES = 20 * 2**30
"""Of all files of a request."""
MOST_FILES = 4000
"""Of a request, captions included."""
_TEXTS = (".txt", ".caption")


@dataclass
class _Received:
    """What has become of the files so far.

    Attributes:
        added: names of new files.
        skipped: files that were not kept.
        renamed: names of new files by those that they were sent under.
        pictures: name in the dataset by the stem that a picture was sent under, in lower case.
        texts: captions, which wait for all pictures: their names and where they are.
    """

    added: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
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
    """The answer, or the reason for which one file is not kept; what concerns the dataset ends the request."""
    try:
        answer: dict[str, str] = await context.assistant.ask(question, **arguments)
    except RefusedError as error:
        if error.kind in ("UnknownFileError", "InternalError"):
            raise
        return {"skipped": error.message}
    return answer


async def _files(request: web.Request, folder: Path) -> AsyncIterator[tuple[str, Path, str]]:
    """Each file of a form: the name that was sent, where it is, and why it is not kept (empty if it may be)."""
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
