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

from aiohttp import BodyPartReader, web
from aiohttp.multipart import MultipartReader

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.server.api.endpoint import Call
from lorasmith.server.api_shapes import SkippedFile, UploadAnswer
from lorasmith.server.assistant import RefusedError
from lorasmith.server.error_answers import TooLargeError
from lorasmith.server.server_context import ServerContext
from lorasmith.server.upload_folder import upload_folder

__all__ = ["MOST_FILES", "MOST_FILE_BYTES", "MOST_REQUEST_BYTES", "add_files"]

MOST_FILE_BYTES = 100 * 2**20
"""Of a picture."""
MOST_TEXT_BYTES = 80_000
"""Of a caption."""
MOST_REQUEST_BYTES = 20 * 2**30
"""Of all files of a request."""
MOST_FILES = 4000
"""Of a request, captions included."""
_BLOCK = 2**18
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
    if not call.request.content_type.startswith("multipart/"):
        raise OptionError("files are sent as multipart/form-data; send them as a form")
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
    count = total = 0
    try:
        reader = await request.multipart()
        while (part := await reader.next()) is not None:
            if isinstance(part, MultipartReader):
                raise OptionError("files are sent one by one in a form, got a form within a form; send them plainly")
            if not part.filename:
                await part.release()
                continue
            count += 1
            if count > MOST_FILES:
                raise TooLargeError(f"a request must have at most {MOST_FILES:,} files; send the others in another one")
            path = folder / str(count)
            is_text = part.filename.lower().endswith(_TEXTS)
            size, is_kept = await _received(part, path, MOST_TEXT_BYTES if is_text else MOST_FILE_BYTES)
            total += size
            if total > MOST_REQUEST_BYTES:
                raise TooLargeError(f"a request must have at most {MOST_REQUEST_BYTES // 2**30} GiB; send less at once")
            limit = f"{MOST_TEXT_BYTES // 1000} kB" if is_text else f"{MOST_FILE_BYTES // 2**20} MB"
            yield part.filename, path, "" if is_kept else f"is larger than {limit}; make it smaller"
    except (ValueError, AssertionError) as error:  # aiohttp's for bodies that are no form
        if isinstance(error, LorasmithError):
            raise
        raise OptionError("the body of the request is no complete form; send it again") from error


async def _received(part: BodyPartReader, path: Path, most: int) -> tuple[int, bool]:
    """Write a file to disk; returns its size, and whether it is at most `most` bytes and was kept."""
    size = 0
    with path.open("wb") as file:
        while block := await part.read_chunk(_BLOCK):
            size += len(block)
            if size > MOST_REQUEST_BYTES:
                raise TooLargeError(f"a request must have at most {MOST_REQUEST_BYTES // 2**30} GiB; send less")
            if size > most:
                continue
            try:
                file.write(block)
            except OSError as error:
                rule = f"an upload cannot be written ({error.strerror})"
                raise OutputError(f"{rule}; free some space and send it again") from error
    if size > most:
        path.unlink(missing_ok=True)
    return size, size <= most
