"""Jobs as JSON of the API."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any

from lorasmith.runs.queue import Job
from lorasmith.server.jobs.job_shapes import JobAnswer

_TITLES = {
    "caption": "Captions",
    "draw": "Drawing",
    "evaluate": "Evaluation",
    "graph": "Workflow",
    "measure": "Measurement",
    "train": "Training",
}
_LARGE = ("prompt", "workflow", "extra_data")  # left out of lists


def job_answer(job: Job, *, with_graph: bool = True) -> dict[str, Any]:
    """A job as JSON values; without `with_graph`, a graph's request lacks its large parts."""
    facts = job_row(job)
    request = {key: value for key, value in job.request.items() if with_graph or key not in _LARGE}
    more = {"dataset": facts["dataset"], "trigger": _settings(job).get("trigger", "")} if job.kind == "train" else {}
    answer = JobAnswer(**facts, outputs=dict(job.outputs), request={**request, **more})
    return asdict(answer)


def job_row(job: Job | Mapping[str, Any]) -> dict[str, Any]:
    """A job without its request and outputs, also from the data of a notice."""
    row = job.summary() if isinstance(job, Job) else job
    if row.get("removed"):
        return dict(row)
    facts = {name: value for name, value in row.items() if name != "client_id"}  # part of ComfyUI's protocol only
    facts["title"] = facts["name"] or _TITLES.get(str(facts["kind"]), "Job")
    if isinstance(job, Job):
        facts["error"] = None if job.error is None else dict(job.error)
        facts["dataset"] = _dataset(job)
    return facts


def uses_dataset(job: Job, base: Path, name: str) -> bool:
    """Whether a job trains on a dataset, or is a graph that reads its pictures. Ignores case."""
    sources = job.request.get("sources") or ()
    named = [base / str(source.get("path", "")) for source in sources if isinstance(source, Mapping)]
    for node in (job.request.get("prompt") or {}).values():
        inputs = node.get("inputs") if isinstance(node, Mapping) else None
        values = (inputs.get(key) for key in _OF_INPUTS) if isinstance(inputs, Mapping) else ()
        named += [base / "input" / name for name in values if isinstance(name, str) and "\0" not in name]
    folder = os.path.join(os.path.realpath(base / "input" / name), "").casefold()  # noqa: PTH118 - with a slash
    return any(os.path.join(os.path.realpath(path), "").casefold().startswith(folder) for path in named)  # noqa: PTH118


_OF_INPUTS = ("folder", "image", "file")  # inputs of nodes that name files in the input folder


def _settings(job: Job) -> Mapping[str, Any]:
    settings = job.request.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _dataset(job: Job) -> str | None:
    """The dataset of a training: the folder in `input`, or the built-in one."""
    sources = job.request.get("sources")
    if not isinstance(sources, list | tuple) or not sources or not isinstance(sources[0], Mapping):
        return None
    path = PurePath(str(sources[0].get("path", "")))
    return path.name if path.parent.name == "input" else None
