"""Endpoints about datasets, and uploads to them.

Files of a multipart body are streamed to disk one by one, then checked by the assistant. Only pictures and captions are
kept, and a sent name is not used until the assistant has sanitised it. A caption belongs to the picture with the same
stem in the same request, whatever that is renamed to, or else to the one in the dataset.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.options import Option, options_of
from lorasmith.data.data_config import CAPTION_SUFFIXES, DataConfig
from lorasmith.runs.queue import JobStateError
from lorasmith.server.contained_files import send_file
from lorasmith.server.datasets.dataset_folders import MASK
from lorasmith.server.datasets.dataset_shapes import (
    CaptionBody,
    CaptionEdit,
    CaptioningBody,
    Changed,
    Crop,
    CroppedAnswer,
    DataCheckAnswer,
    DatasetAnswer,
    DatasetList,
    DatasetRow,
    FilesBody,
    FormatsAnswer,
    NameBody,
    PairBody,
    RemovedAnswer,
    RestoreBody,
    SkippedFile,
    UploadAnswer,
)
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.endpoint import Call, Endpoint, Query, queueing
from lorasmith.server.hub import Notice
from lorasmith.server.jobs.job_rows import uses_dataset
from lorasmith.server.questions import shaped
from lorasmith.server.request_handling import ServerContext, TooLargeError, form_parts, received, upload_folder
from lorasmith.server.server_disk import disk_space
from lorasmith.training.config import TrainConfig

MOST_FILE_BYTES = 100 * 2**20  # of a picture
MOST_TEXT_BYTES = 80_000  # of a caption
MOST_REQUEST_BYTES = 20 * 2**30  # of all files of a request
MOST_FILES = 4000  # of a request, captions included


@dataclass
class _Received:
    """The files received so far."""

    added: list[str] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # new names by the names as sent
    replaced: dict[str, str] = field(default_factory=dict)  # where files were moved to, by the names of the new ones
    pictures: dict[str, str] = field(default_factory=dict)  # names in the dataset by sent stem in lower case
    # questions with names and paths of captions and masks, which wait for all pictures
    others: list[tuple[str, str, Path]] = field(default_factory=list)


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
            elif file.suffix.lower() in CAPTION_SUFFIXES:
                received.others.append(("add_caption", sent, path))
                continue
            elif file.stem.lower().endswith(MASK):
                received.others.append(("add_mask", sent, path))
                continue
            else:
                answer = await _asked(context, "add_image", name=name, file=sent, temporary=str(path))
                is_control = "/" in answer.get("added", "")
                if not is_control and (kept := answer.get("added") or answer.get("same")):
                    received.pictures.setdefault(file.stem.casefold(), kept)
                _note(received, "/".join(file.parts[-2:]) if is_control else file.name, answer)
            path.unlink(missing_ok=True)
        for question, sent, path in received.others:
            file = PurePosixPath(sent.replace("\\", "/"))
            stem = file.stem.casefold().removesuffix(MASK) if question == "add_mask" else file.stem.casefold()
            image = received.pictures.get(stem, "")
            answer = await _asked(context, question, name=name, file=sent, temporary=str(path), image=image)
            _note(received, file.name, answer)
    return shaped(UploadAnswer, received)


def _note(received: _Received, sent: str, answer: dict[str, str]) -> None:
    if (added := answer.get("added")) is None:
        received.skipped.append(SkippedFile(file=sent, reason=answer["skipped"]))
        return
    received.added.append(added)
    if "replaced" in answer:
        received.replaced[added] = answer["replaced"]
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
        is_text = part.filename.lower().endswith(CAPTION_SUFFIXES)
        most = MOST_TEXT_BYTES if is_text else MOST_FILE_BYTES
        size = await received(part, path, at_most=most, read_at_most=left)
        left -= size
        limit = f"{MOST_TEXT_BYTES // 1000} kB" if is_text else f"{MOST_FILE_BYTES // 2**20} MB"
        yield part.filename, path, "" if size <= most else f"is larger than {limit}; make it smaller"


_OPTIONS = {**options_of(DataConfig), **options_of(TrainConfig)}
_WIDTH = 2048


async def _remove(context: ServerContext, call: Call) -> Any:
    name = call.path("name")
    users = (job for job in context.store.unfinished(name) if uses_dataset(job, context.config.base, name))
    if (job := next(users, None)) is not None:
        raise JobStateError(
            f"{name} is the dataset of {job.request.get('name') or 'a graph'}, a job that is {job.state}; cancel that "
            "job first"
        )
    removed = await context.assistant.ask("remove_dataset", name=name)
    context.dispatcher.set_draft(name, None)  # a later dataset of this name begins without it
    return removed


async def _captions(context: ServerContext, call: Call) -> Any:
    body: CaptionBody = call.body
    edits = {
        file: CaptionEdit(caption=caption) if isinstance(caption, str) else caption for file, caption in body.items()
    }
    captions = {file: asdict(edit) for file, edit in edits.items()}
    with disk_space(context.config.base, sum(len(edit.caption.encode()) for edit in edits.values())):
        return await context.assistant.ask("set_captions", name=call.path("name"), captions=captions)


async def _image(context: ServerContext, call: Call, *, control: bool = False) -> web.StreamResponse:
    """The picture or control, or a thumbnail, which is made again only when the file has changed."""
    named = {"name": call.path("name"), "file": call.path("file"), **({"control": True} if control else {})}
    for flag in ("original", "mask"):
        if call.text(flag) == "true":
            named[flag] = True
    path = Path(await context.assistant.ask("picture_file", **named))
    return await send_picture(context, call, path, "thumbnail", named)


async def send_picture(
    context: ServerContext, call: Call, path: Path, question: str, named: Mapping[str, Any]
) -> web.StreamResponse:
    """A file as it is, or with a `width` the answer to a question that makes it smaller."""
    width = call.number("width", 0, most=_WIDTH)
    if not width:
        return send_file(path)
    status = path.stat()
    tag = hashlib.sha256(f"{path} {status.st_mtime_ns} {status.st_size} {width}".encode()).hexdigest()[:32]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    if any(match.value == tag for match in call.request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    content = await context.assistant.ask(question, **named, width=width)
    return web.Response(body=content, content_type="image/webp", headers=headers)


async def _datasets(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("datasets", name=call.request.query.get("name") or None)


async def _check(context: ServerContext, call: Call) -> Any:
    query = {name: text for name, text in call.request.query.items() if name != "token"}
    model, trigger, edit = query.pop("model", None), query.pop("trigger", ""), query.pop("edit", None)
    settings = {name: _value(name, text) for name, text in query.items()}
    name = call.path("name")

    def publish(done: int, total: int) -> None:
        context.hub.publish(Notice(kind="check", data={"name": name, "done": done, "total": total}, droppable=True))

    return await context.assistant.ask(
        "check_dataset",
        publish,
        name=name,
        model=model or None,
        edit=edit or None,
        trigger=trigger,
        settings=settings,
    )


def _value(name: str, text: str) -> Any:
    """A setting in a query, converted to its type. Raises OptionError."""
    option: Option | None = _OPTIONS.get(name)
    if option is None or option.type is str:  # an unknown name is refused later, with suggestions
        return text
    try:
        return parse_foreign_json(text)
    except ValueError as error:
        raise OptionError(f"{name} must be a number, true or false, got {json.dumps(text[:40])}; correct it") from error


WIDTH_QUERY = Query("width", "Pixels of the small version's longest edge, at most 2048.", "integer")

DATASET_ROUTES = (
    Endpoint(
        "GET",
        "/datasets",
        "All datasets.",
        handler=_datasets,
        query=(Query("name", "Answer that one alone."),),
        answer=DatasetList,
    ),
    Endpoint("GET", "/formats", "Files that can be added to datasets.", question="formats", answer=FormatsAnswer),
    Endpoint(
        "POST",
        "/datasets",
        "Make a dataset, a folder below input; the answer has its name.",
        question="create_dataset",
        body=NameBody,
        answer=DatasetRow,
        status=201,
        changes_dataset=True,
    ),
    Endpoint(
        "GET",
        "/datasets/{name}",
        "The pictures of a dataset with their captions.",
        question="dataset",
        answer=DatasetAnswer,
    ),
    Endpoint(
        "DELETE",
        "/datasets/{name}",
        "Move a dataset to the removed things.",
        handler=_remove,
        answer=RemovedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "POST",
        "/datasets/{name}/images",
        "Add pictures, and captions beside them; each file of the form is checked by its content. A picture before an "
        "edit is named `control/` and as the picture after it, a mask `1.mask.png` as the picture `1`.",
        handler=add_files,
        upload=True,
        answer=UploadAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "GET",
        "/datasets/{name}/images/{file}",
        "A picture, or a small upright version of it.",
        handler=_image,
        query=(
            WIDTH_QUERY,
            Query("original", "Whether a cropped picture is shown as it was before.", "boolean"),
            Query("mask", "Whether its mask is shown, white inside.", "boolean"),
        ),
        content="image/*",
    ),
    Endpoint(
        "DELETE",
        "/datasets/{name}/images/{file}",
        "Move a picture, its caption and its mask to the removed things.",
        question="remove_image",
        answer=RemovedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "PUT",
        "/datasets/{name}/images/{file}/crop",
        "Crop a picture to a part of its original, which is kept; all of it brings the original back.",
        question="crop_image",
        body=Crop,
        answer=CroppedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "DELETE",
        "/datasets/{name}/images/{file}/mask",
        "Move the mask of a picture to the removed things.",
        question="remove_mask",
        answer=RemovedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "POST",
        "/datasets/{name}/remove",
        "Move pictures, their captions and their masks to the removed things, from where they return together.",
        question="remove_images",
        body=FilesBody,
        answer=RemovedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "POST",
        "/datasets/{name}/restore",
        "Move removed files back into the dataset that they were removed from, or the dataset itself.",
        question="restore_removed",
        body=RestoreBody,
        answer=Changed,
        changes_dataset=True,
    ),
    Endpoint(
        "GET",
        "/datasets/{name}/controls/{file}",
        "A picture before an edit, or a small upright version of it.",
        handler=functools.partial(_image, control=True),
        query=(WIDTH_QUERY,),
        content="image/*",
    ),
    Endpoint(
        "PUT",
        "/datasets/{name}/controls",
        "Give a picture before an edit to another picture.",
        question="pair_control",
        body=PairBody,
        answer=Changed,
        changes_dataset=True,
    ),
    Endpoint(
        "DELETE",
        "/datasets/{name}/controls/{file}",
        "Move a picture before an edit to the removed things.",
        question="remove_control",
        answer=RemovedAnswer,
        changes_dataset=True,
    ),
    Endpoint(
        "PUT",
        "/datasets/{name}/captions",
        "Store captions by the names of their pictures, where they are still those that were seen.",
        handler=_captions,
        body=CaptionBody,
        answer=Changed,
        changes_dataset=True,
    ),
    queueing(
        "/datasets/{name}/captioning",
        "Queue a job that writes captions. Its outputs have each that it wrote, and the one that was there before.",
        "caption",
        "captioning_request",
        CaptioningBody,
    ),
    Endpoint(
        "GET",
        "/datasets/{name}/check",
        "What to look at in a dataset before training.",
        handler=_check,
        query=(
            Query("model", "Model whose sizes and tokenizer count; usual ones without it."),
            Query("edit", "Edit variant that the model is, or none; its name says so without it."),
            Query("trigger", "Phrase in front of captions that lack it."),
            Query(
                "resolution", "Side in pixels; all other settings of data and training may be given, too.", "integer"
            ),
        ),
        answer=DataCheckAnswer,
    ),
)
