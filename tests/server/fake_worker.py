"""A worker without torch: each job says what it is to do."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from lorasmith.runs.child_process import channel_of_child


def main() -> None:
    channel = channel_of_child()
    start, _ = channel.receive() or sys.exit(0)
    cancel = threading.Event()
    jobs: list[dict[str, Any]] = []
    arrived = threading.Semaphore(0)

    def receive() -> None:
        while (message := channel.receive()) is not None:
            match message[0]["type"]:
                case "cancel":
                    cancel.set()
                case "jobs":
                    cancel.clear()
                    jobs.extend(message[0]["jobs"])
                    arrived.release()
                case "free":
                    print("freed", flush=True)
                case "warm":
                    print("warmed", flush=True)
        cancel.set()
        jobs.append({})
        arrived.release()

    def beat() -> None:
        while True:
            channel.send({"type": "beat"})
            time.sleep(start["beat_s"])

    threading.Thread(target=receive, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    print(f"this is printed, not sent, by {start['device']}", flush=True)
    channel.send({"type": "loading"})
    channel.send({"type": "ready", "device": {"visible_there": os.environ.get("CUDA_VISIBLE_DEVICES")}})
    while True:
        arrived.acquire()
        job = jobs.pop(0)
        if not job:
            os._exit(0)
        run(channel, job, cancel)
        channel.send({"type": "ready"})


def run(channel: Any, job: dict[str, Any], cancel: threading.Event) -> None:
    request = job["request"]
    end: dict[str, Any] = {"type": "ended", "id": job["id"], "state": "completed", "outputs": {"pid": os.getpid()}}
    match request.get("do", "finish"):
        case "crash":
            os._exit(3)
        case "wait":
            channel.send({"type": "run", "run": "runs/x-001"})
            if "view" in request:
                data = {"node_id": None, "view": request["view"]}
                channel.send({"type": "notice", "kind": "view", "data": data, "droppable": True})
            cancel.wait()
            end |= {"state": "cancelled", "error": {"kind": "CancelledError", "message": "stopped"}}
        case "wait deaf":
            time.sleep(3600)
        case "fail":
            last = {"kind": "graph", "data": {"event": "ExecutionFailed", "node_id": "1"}}
            end |= {"state": "failed", "error": {"kind": "NodeError", "message": "no"}, "last": last}
        case "steps":
            for step in range(request["steps"]):
                data = {"node_id": None, "view": {"step": step}}
                channel.send({"type": "notice", "kind": "view", "data": data, "droppable": True}, b"picture")
        case "measure":
            end["found"] = {"subject": "s", "values": {"seconds_per_step": 1.5}}
    channel.send(end)


main()
