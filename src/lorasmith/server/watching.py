"""What watches a server from outside: `/healthz` for whoever restarts it, `/metrics` in Prometheus' text format.

Counters begin at 0 with the process, as Prometheus expects. Reasons of failures are the kinds of errors.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from aiohttp import web

from lorasmith.runs.queue import StoreError
from lorasmith.server.meter import WAITS_S
from lorasmith.server.request_handling import ServerContext

HEALTH = "/healthz"  # answered without the token, as programs that restart a server have none

_STATES = ("starting", "waiting", "loading", "ready", "busy", "gone")


def routes(context: ServerContext) -> list[web.RouteDef]:
    """Both routes."""

    async def health(request: web.Request) -> web.Response:
        headers = {"Cache-Control": "no-store"}
        try:
            context.store.queue_counts()
        except StoreError:  # says the path, which is for those with the token
            return web.json_response({"status": "the queue cannot be read"}, status=503, headers=headers)
        status = "draining" if context.dispatcher.is_draining else "ok"
        return web.json_response({"status": status}, headers=headers)

    async def metrics(request: web.Request) -> web.Response:
        text = "".join(_metrics(context))
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return web.Response(body=text.encode(), headers={"Content-Type": kind, "Cache-Control": "no-store"})

    return [web.get(HEALTH, health), web.get("/metrics", metrics)]


def _metrics(context: ServerContext) -> Iterable[str]:
    store, meter, devices = context.store, context.dispatcher.meter, context.dispatcher.devices()
    yield _family("build_info", "gauge", "The version.", [({"version": version("lorasmith")}, 1)])
    states = [({"state": state}, count) for state, count in store.counts().items()]
    yield _family("jobs", "gauge", "Jobs in queue and history by state.", states)
    yield _family(
        "oldest_wait_seconds", "gauge", "How long the oldest waiting job waits.", [({}, store.oldest_wait_s())]
    )
    ends = [({"kind": kind, "state": state}, count) for (kind, state), count in sorted(meter.ended.items())]
    yield _family("jobs_ended_total", "counter", "Attempts of jobs that ended.", ends)
    reasons = [({"reason": reason}, count) for reason, count in sorted(meter.failures.items())]
    yield _family("failures_total", "counter", "Attempts that failed or lost their worker, by kind of error.", reasons)
    steps = [({"device": device}, count) for device, count in sorted(meter.steps.items())]
    yield _family("steps_total", "counter", "Training steps that were reported.", steps)
    buckets = [({"le": f"{bound:g}"}, meter.waits[bound]) for bound in WAITS_S]
    name = "wait_seconds"
    yield _family(
        name, "histogram", "From being queued to the first start.", [*buckets, ({"le": "+Inf"}, meter.started)]
    )
    yield f"lorasmith_{name}_sum {_number(meter.wait_s)}\nlorasmith_{name}_count {meter.started}\n"
    for entry, help in (("memory_bytes", "Size of its memory."), ("free_bytes", "Free memory when it was last ready.")):
        known = [(_of(device), device[entry]) for device in devices if device.get(entry) is not None]
        yield _family(f"device_{entry}", "gauge", help, known)
    at = [({**_of(device), "state": state}, int(device["state"] == state)) for device in devices for state in _STATES]
    yield _family("device_state", "gauge", "1 for the state in which its worker is.", at)
    free = shutil.disk_usage(context.config.base).free
    yield _family("disk_free_bytes", "gauge", "Of the disk with the base folder.", [({}, free)])


def _of(device: Mapping[str, Any]) -> dict[str, str]:
    return {"device": str(device["name"]), "title": str(device.get("title", ""))}


def _family(name: str, kind: str, help: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> str:
    """The lines of a metric; its name gets a prefix, samples of a histogram the suffix of buckets."""
    lines = [f"# HELP lorasmith_{name} {help}", f"# TYPE lorasmith_{name} {kind}"]
    suffix = "_bucket" if kind == "histogram" else ""
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"lorasmith_{name}{suffix}{'{' + inside + '}' if inside else ''} {_number(value)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
