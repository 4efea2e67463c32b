"""A worker of a sweep without torch: what each run does is in `acts.json` of the current folder, by its name."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from lorasmith.runs.child_process import channel_of_child


def main() -> None:
    channel = channel_of_child()
    channel.receive()
    if Path("broken").exists():
        sys.exit("no module named torch")
    acts = json.loads(Path("acts.json").read_text())
    stop = threading.Event()
    messages: list[list[dict[str, str]] | None] = []
    arrived = threading.Semaphore(0)

    def receive() -> None:
        while (message := channel.receive()) is not None:
            if message[0]["type"] == "jobs":
                messages.append(message[0]["jobs"])
                arrived.release()
        stop.set()
        messages.append(None)
        arrived.release()

    threading.Thread(target=receive, daemon=True).start()
    while True:
        channel.send({"type": "ready"})
        arrived.acquire()
        jobs = messages.pop(0)
        if jobs is None:
            os._exit(0)
        print("sees", os.environ.get("CUDA_VISIBLE_DEVICES"), "beside", len(jobs) - 1, flush=True)
        for job in jobs:
            end = {"type": "ended", "id": job["id"], "state": "completed"}
            match acts.get(job["id"], "finish"):
                case "fail":
                    error = {"kind": "DataError", "message": "there is no usable image"}
                    end |= {"state": "failed", "error": error}
                case "crash":
                    print("Segfault", flush=True)
                    os._exit(3)
                case "crash once":
                    if not Path("crashed").exists():
                        Path("crashed").touch()
                        os._exit(3)
                case "wait":
                    stop.wait()
                    Path("saved").touch()
                    end["state"] = "cancelled"
                case "deaf":
                    time.sleep(60)
            channel.send(end)


main()
