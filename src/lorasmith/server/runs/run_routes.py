"""Endpoints about runs: their records, files and results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiohttp import web

from lorasmith.core.errors import OptionError
from lorasmith.runs.queue import ACTIVE, JobStateError
from lorasmith.server.access import serves_others
from lorasmith.server.contained_files import UNTRUSTED, send_zip
from lorasmith.server.datasets.dataset_routes import MOST_FILE_BYTES, WIDTH_QUERY, send_picture
from lorasmith.server.datasets.dataset_shapes import RemovedAnswer, RestoreBody
from lorasmith.server.endpoint import Call, Endpoint, Query, json_response, queueing
from lorasmith.server.event_streams import run_events
from lorasmith.server.request_handling import ServerContext, form_parts, number_in, received, upload_folder
from lorasmith.server.runs.run_shapes import (
    DrawingBody,
    DrawingFacts,
    EvaluationAnswer,
    EvaluationBody,
    GalleryAnswer,
    GalleryBody,
    HubFolder,
    HubFolderBody,
    HubUpload,
    HubUploadBody,
    InstallBody,
    InstalledLora,
    KeptControl,
    MarksBody,
    RequestAnswer,
    RequestBody,
    RunAnswer,
    RunList,
    RunMarks,
    TrainOnBody,
)


def _jobs(context: ServerContext) -> dict[str, str]:
    """Ids of the running jobs by run."""
    return {job.run: job.id for job in context.store.running() if job.run}


async def _runs(context: ServerContext, call: Call) -> Any:
    limit = number_in(call.request, "limit", at_least=1)
    return await context.assistant.ask("runs", jobs=_jobs(context), limit=limit)


async def _run(context: ServerContext, call: Call) -> Any:
    return await context.assistant.ask("run", id=call.path("id"), jobs=_jobs(context))


async def _remove(context: ServerContext, call: Call) -> Any:
    """Move a run to the removed things; a job that could continue it is given up."""
    id = call.path("id")
    jobs = context.store.of_run(id)
    if (job := next((job for job in jobs if job.state in ACTIVE), None)) is not None:
        raise JobStateError(f"{id} is trained by a job that is {job.state}; stop that job first")
    answer = await context.assistant.ask("remove_run", id=id)
    for job in jobs:
        context.dispatcher.cancel(job.id)  # if it is paused or interrupted
    return answer


async def _file(context: ServerContext, call: Call) -> web.StreamResponse:
    named = {"id": call.path("id"), "path": call.path("path")}
    path = Path(await context.assistant.ask("run_file", **named))
    return await send_picture(context, call, path, "run_thumbnail", named)


async def _report(context: ServerContext, call: Call) -> web.StreamResponse:
    page = await context.assistant.ask("run_page", id=call.path("id"))
    # The page shows untrusted data: no scripts, no network, and an opaque origin.
    headers = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"{UNTRUSTED}; style-src 'unsafe-inline'; img-src data:",
    }
    return web.Response(body=page, content_type="text/html", charset="utf-8", headers=headers)


async def _graph(context: ServerContext, call: Call) -> web.StreamResponse:
    found = await context.assistant.ask("run_graph", id=call.path("id"))
    return json_response(found if call.text("notes") in ("1", "true") else found["prompt"])


async def _card(context: ServerContext, call: Call) -> web.StreamResponse:
    card = await context.assistant.ask("run_card", id=call.path("id"))
    return web.Response(body=card, content_type="image/png", headers={"Cache-Control": "no-store"})


async def _write_hub_folder(context: ServerContext, call: Call) -> Any:
    found = await context.assistant.ask("write_hub_folder", **call.arguments)
    return {**found, "can_upload": found["can_upload"] and not serves_others(context.config)}


async def _hub_folder(context: ServerContext, call: Call) -> web.StreamResponse:
    found = await context.assistant.ask("hub_folder_files", id=call.path("id"))
    files = {f"{found['title']}/{name}": Path(path) for name, path in found["files"].items()}
    return await send_zip(call.request, files, name=f"{found['title']}.zip")


async def _upload_hub_folder(context: ServerContext, call: Call) -> Any:
    if serves_others(context.config):
        raise OptionError(
            "a LoRA is uploaded to the hub only by pages of the machine that the server runs on, whose login it uses; "
            "download the folder"
        )
    return await context.assistant.ask("upload_hub_folder", **call.arguments)


async def _add_control(context: ServerContext, call: Call) -> Any:
    id = call.path("id")
    await context.assistant.ask("drawing_facts", id=id)  # before anything is received
    with upload_folder(context.config.base) as folder:
        async for part in form_parts(call.request):
            if part.filename:
                path = folder / "control"
                await received(part, path, at_most=MOST_FILE_BYTES, read_at_most=MOST_FILE_BYTES)
                return await context.assistant.ask("keep_control", id=id, temporary=str(path))
    raise OptionError("an upload must have a file, got none; send a picture")


RUN_ROUTES = (
    Endpoint(
        "GET",
        "/runs",
        "All runs below the base folder, the newest first.",
        handler=_runs,
        query=(Query("limit", "Answer so many alone, starred ones before others; quick in a long list.", "integer"),),
        answer=RunList,
    ),
    Endpoint(
        "GET",
        "/runs/{id}",
        "A run with all that its report says; its id is percent-encoded, such as runs%2Fdog-001.",
        handler=_run,
        answer=RunAnswer,
    ),
    Endpoint(
        "PUT",
        "/runs/{id}/marks",
        "Change what a run is called, whether it is starred, and a note.",
        question="mark_run",
        body=MarksBody,
        answer=RunMarks,
    ),
    Endpoint("DELETE", "/runs/{id}", "Move a run to the removed things.", handler=_remove, answer=RemovedAnswer),
    Endpoint(
        "POST",
        "/runs/{id}/restore",
        "Move a removed run back.",
        question="restore_run",
        body=RestoreBody,
        answer=RunMarks,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/events",
        "What is shown of a run, as its log grows.",
        handler=run_events,
        content="text/event-stream",
    ),
    Endpoint(
        "GET",
        "/runs/{id}/files/{path:.+}",
        "A file of a run: a picture to look at, everything else to download.",
        handler=_file,
        query=(WIDTH_QUERY,),
        content="*/*",
    ),
    Endpoint(
        "GET", "/runs/{id}/report", "The report of a run, a page without scripts.", handler=_report, content="text/html"
    ),
    Endpoint(
        "GET",
        "/runs/{id}/graph",
        "A graph in API format that does the same as a run.",
        handler=_graph,
        query=(Query("notes", "Answer {prompt, notes}: the graph, and where it does otherwise.", "boolean"),),
        answer=dict[str, Any],
    ),
    Endpoint(
        "POST",
        "/runs/{id}/install",
        "Copy a LoRA of a run into models/loras.",
        question="install_run",
        body=InstallBody,
        answer=InstalledLora,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/drawing",
        "What drawing with the LoRA of a run takes; an error if it cannot be drawn with here.",
        question="drawing_facts",
        answer=DrawingFacts,
    ),
    Endpoint(
        "POST",
        "/runs/{id}/controls",
        "Store a picture to edit, of at most 100 MB, which later drawings name.",
        handler=_add_control,
        answer=KeptControl,
        upload=True,
        status=201,
    ),
    queueing(
        "/runs/{id}/drawing",
        "Queue a job that draws a prompt without and with the LoRA of a run, from the same noise.",
        "draw",
        "draw_request",
        DrawingBody,
    ),
    Endpoint(
        "POST",
        "/runs/{id}/requests",
        "Have a run that trains draw previews, save its LoRA, or draw a prompt, after the step that it takes.",
        question="request_of_run",
        body=RequestBody,
        answer=RequestAnswer,
        status=202,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/evaluation",
        "Which LoRA of a run is good: what was drawn with each, and the recommendation.",
        question="run_evaluation",
        answer=EvaluationAnswer,
    ),
    queueing(
        "/runs/{id}/evaluation",
        "Queue a job that draws with each LoRA of a run and recommends one, in place of an earlier evaluation.",
        "evaluate",
        "evaluation_request",
        EvaluationBody,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/gallery",
        "Grids of pictures of a run, a prompt each, by step and strength.",
        question="run_gallery",
        answer=GalleryAnswer,
    ),
    queueing(
        "/runs/{id}/gallery",
        "Queue a job that draws a grid: a prompt with the LoRAs of a run at several strengths, and without one.",
        "draw",
        "grid_request",
        GalleryBody,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/card",
        "A picture to share: what the base model draws, what the LoRA draws, trigger, strength and model.",
        handler=_card,
        content="image/png",
    ),
    Endpoint(
        "POST",
        "/runs/{id}/hub-folder",
        "Write a folder to share a LoRA of a run with, as the Hugging Face hub expects it, and list what is in it.",
        handler=_write_hub_folder,
        body=HubFolderBody,
        answer=HubFolder,
    ),
    Endpoint(
        "GET",
        "/runs/{id}/hub-folder",
        "That folder as a ZIP file.",
        handler=_hub_folder,
        content="application/zip",
    ),
    Endpoint(
        "POST",
        "/runs/{id}/hub-upload",
        "Upload that folder with the login of the hub's own client; the repository is private unless `public` is true.",
        handler=_upload_hub_folder,
        body=HubUploadBody,
        answer=HubUpload,
    ),
    queueing(
        "/runs/{id}/train-on",
        "Queue a job that trains on from the end of a run.",
        "train",
        "train_on_request",
        TrainOnBody,
    ),
)
