"""Endpoints about models to begin with: the shelf, downloads from the hub, and model files that are sent.

The hub is asked by `POST /downloads/check`, `POST /downloads` and `PUT /hub-token` alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.server.access import serves_others
from lorasmith.server.endpoint import Call, Endpoint
from lorasmith.server.models.model_shapes import (
    AddedModel,
    CaptionerList,
    DownloadAnswer,
    DownloadBody,
    DownloadCheck,
    DownloadList,
    HubTokenBody,
    ModelListAnswer,
    ReleaseMemory,
    RemovedDownload,
    ShelfAnswer,
    StoredToken,
)
from lorasmith.server.request_handling import ServerContext, form_parts, received, upload_folder

MOST_MODEL_BYTES = 200 * 2**30


async def _models(context: ServerContext, call: Call) -> Any:
    device = context.dispatcher.device()
    return await context.assistant.ask("models", device=device.get("name"))


async def _shelf(context: ServerContext, call: Call) -> Any:
    device = context.dispatcher.device()
    return await context.assistant.ask("shelf", device=device.get("name"), card_bytes=device.get("memory_bytes"))


async def _memory(context: ServerContext, call: Call) -> Any:
    device = context.dispatcher.device()
    return await context.assistant.ask("shelf_memory", name=call.path("name"), card_bytes=device.get("memory_bytes"))


async def _download(context: ServerContext, call: Call) -> DownloadAnswer:
    wanted: DownloadBody = call.body
    found = await context.assistant.ask("download_files", **asdict(wanted))
    return context.downloads.add(f"{wanted.kind}:{wanted.name}", found["title"], found["files"])


async def _downloads(context: ServerContext, call: Call) -> DownloadList:
    return DownloadList(downloads=context.downloads.list())


async def _cancel(context: ServerContext, call: Call) -> DownloadAnswer:
    return context.downloads.cancel(call.path("id"))


async def _forget(context: ServerContext, call: Call) -> RemovedDownload:
    context.downloads.forget(call.path("id"))
    return RemovedDownload(id=call.path("id"))


async def _store_token(context: ServerContext, call: Call) -> Any:
    if serves_others(context.config):
        raise OptionError(
            "a token of the hub is stored only by pages of the machine that the server runs on; run hf auth login there"
        )
    return await context.assistant.ask("store_hub_token", token=call.body.token)


async def _add_model(context: ServerContext, call: Call) -> Any:
    with upload_folder(context.config.base) as folder:
        async for part in form_parts(call.request):
            if part.filename:
                await context.assistant.ask("check_model_name", file=part.filename)  # before it is received
                path = folder / "model"
                await received(part, path, at_most=MOST_MODEL_BYTES, read_at_most=MOST_MODEL_BYTES)
                return await context.assistant.ask("add_model", file=part.filename, temporary=str(path))
    raise OptionError("the form holds no file; send one")


MODEL_ROUTES = (
    Endpoint("GET", "/models", "The models in the model folders.", handler=_models, answer=ModelListAnswer),
    Endpoint("GET", "/shelf", "Released models to begin with.", handler=_shelf, answer=ShelfAnswer),
    Endpoint(
        "GET",
        "/captioners",
        "What writes captions: what is here, and what can be downloaded.",
        question="captioners",
        answer=CaptionerList,
    ),
    Endpoint(
        "GET",
        "/shelf/{name}/memory",
        "The memory of training one of them; takes some seconds the first time.",
        handler=_memory,
        answer=ReleaseMemory,
    ),
    Endpoint(
        "POST",
        "/models",
        "Add a model file to the folder for what it holds; nothing there is replaced.",
        handler=_add_model,
        upload=True,
        answer=AddedModel,
        status=201,
    ),
    Endpoint("GET", "/downloads", "The downloads since the server started.", handler=_downloads, answer=DownloadList),
    Endpoint(
        "POST",
        "/downloads/check",
        "Ask the hub for the sizes of what would be downloaded, and whether it may be.",
        question="check_download",
        body=DownloadBody,
        answer=DownloadCheck,
    ),
    Endpoint(
        "POST",
        "/downloads",
        "Download from the hub; what an earlier download left is continued.",
        handler=_download,
        body=DownloadBody,
        answer=DownloadAnswer,
        status=201,
    ),
    Endpoint(
        "POST",
        "/downloads/{id}/cancel",
        "Stop a download; what has arrived stays for the next one.",
        handler=_cancel,
        answer=DownloadAnswer,
    ),
    Endpoint(
        "DELETE",
        "/downloads/{id}",
        "Remove a download that has ended from the list.",
        handler=_forget,
        answer=RemovedDownload,
    ),
    Endpoint(
        "PUT",
        "/hub-token",
        "Store an access token of the hub where its own programs keep it.",
        handler=_store_token,
        body=HubTokenBody,
        answer=StoredToken,
    ),
)
