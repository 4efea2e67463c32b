"""Endpoints about datasets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.options import Option, options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.server.api.endpoint import Call, Endpoint, Query
from lorasmith.server.api.job_answers import uses_dataset
from lorasmith.server.api.uploads import add_files
from lorasmith.server.api_shapes import (
    CaptionBody,
    CaptionEdit,
    Changed,
    DataCheckAnswer,
    DatasetAnswer,
    DatasetList,
    DatasetRow,
    NameBody,
    RemovedAnswer,
    UploadAnswer,
)
from lorasmith.server.contained_files import send_file
from lorasmith.server.jobs import JobStateError
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.server_disk import disk_space
from lorasmith.training.config import TrainConfig

_OPTIONS = {**options_of(DataConfig), **options_of(TrainConfig)}
_WIDTH = 2048


async def _datasets(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("datasets")


async def _create(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("create_dataset", name=call.body.name)


async def _dataset(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("dataset", name=call.path("name"))


async def _remove(context: ServerContext, call: Call) -> Any:
    name = call.path("name")
    users = (job for job in context.store.unfinished(name) if uses_dataset(job, context.config.base, name))
    if (job := next(users, None)) is not None:
        raise JobStateError(
            f"{name} is the dataset of {job.request.get('name') or 'a graph'}, a job that is {job.state}; cancel that "
            "job first"
        )
    return await context.assistant.ask("remove_dataset", name=name)


async def _remove_image(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("remove_image", name=call.path("name"), file=call.path("file"))


async def _captions(context: ServerContext, call: Call) -> Any:
    body: CaptionBody = call.body
    edits = {file: CaptionEdit(caption=one) if isinstance(one, str) else one for file, one in body.items()}
    captions = {file: asdict(one) for file, one in edits.items()}
    with disk_space(context.config.base, sum(len(one.caption.encode()) for one in edits.values())):
        return await context.assistant.ask("set_captions", name=call.path("name"), captions=captions)


async def _image(context: ServerContext, call: Call) -> web.StreamResponse:
    """The picture, or a thumbnail, which is made again only when the file has changed."""
    name, file = call.path("name"), call.path("file")
    width = call.number("width", 0, most=_WIDTH)
    path = Path(await context.assistant.ask("picture_file", name=name, file=file))
    if not width:
        return send_file(path)
    status = path.stat()
    tag = hashlib.sha256(f"{path} {status.st_mtime_ns} {status.st_size} {width}".encode()).hexdigest()[:32]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache"}
    if any(one.value == tag for one in call.request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    content = await context.assistant.ask("thumbnail", name=name, file=file, width=width)
    return web.Response(body=content, content_type="image/webp", headers=headers)


async def _check(context: ServerContext, call: Call) -> Any:
    query = {name: text for name, text in call.request.query.items() if name != "token"}
    model, trigger = query.pop("model", None), query.pop("trigger", "")
    settings = {name: _value(name, text) for name, text in query.items()}
    return await context.assistant.ask(
        "check_dataset", name=call.path("name"), model=model or None, trigger=trigger, settings=settings
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


DATASET_ENDPOINTS = (
    Endpoint(method="GET", path="/datasets", summary="All datasets.", handler=_datasets, answer=DatasetList),
    Endpoint(
        method="POST",
        path="/datasets",
        summary="Make a dataset, a folder below input; the answer has its name.",
        handler=_create,
        body=NameBody,
        answer=DatasetRow,
        status=201,
    ),
    Endpoint(
        method="GET",
        path="/datasets/{name}",
        summary="The pictures of a dataset with their captions.",
        handler=_dataset,
        answer=DatasetAnswer,
    ),
    Endpoint(
        method="DELETE",
        path="/datasets/{name}",
        summary="Move a dataset to the removed things.",
        handler=_remove,
        answer=RemovedAnswer,
    ),
    Endpoint(
        method="POST",
        path="/datasets/{name}/images",
        summary="Add pictures, and captions beside them; each file of the form is checked by its content.",
        handler=add_files,
        upload=True,
        answer=UploadAnswer,
    ),
    Endpoint(
        method="GET",
        path="/datasets/{name}/images/{file}",
        summary="A picture, or a small upright version of it.",
        handler=_image,
        query=(Query("width", "Pixels of the small version's longest edge, at most 2048.", "integer"),),
        content="image/*",
    ),
    Endpoint(
        method="DELETE",
        path="/datasets/{name}/images/{file}",
        summary="Move a picture, its caption and its mask to the removed things.",
        handler=_remove_image,
        answer=RemovedAnswer,
    ),
    Endpoint(
        method="PUT",
        path="/datasets/{name}/captions",
        summary="Store captions by the names of their pictures, where they are still those that were seen.",
        handler=_captions,
        body=CaptionBody,
        answer=Changed,
    ),
    Endpoint(
        method="GET",
        path="/datasets/{name}/check",
        summary="What to look at in a dataset before training.",
        handler=_check,
        query=(
            Query("model", "Model whose sizes and tokenizer count; usual ones without it."),
            Query("trigger", "Phrase in front of captions that lack it."),
            Query(
                "resolution", "Side in pixels; all other settings of data and training may be given, too.", "integer"
            ),
        ),
        answer=DataCheckAnswer,
    ),
)
