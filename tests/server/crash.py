"""Servers and workers that are killed at random moments must lose no job, run none twice, and train the same bytes.

    python -m tests.server.crash --kills 50

Each trial queues a training on a folder and a graph that trains, and starts a server. The server, its worker or both
are killed (SIGKILL) after random times; a killed server is started again at once, while the worker of the old one may
still save its run. Whatever is interrupted is continued. In the end every job must be completed, no two processes may
have had one at the same time, no process may be left, and the LoRAs and the losses of all steps must be those of jobs
that nobody disturbed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.queue import JobStore
from lorasmith.server.http_server import running
from lorasmith.server.server_config import ServerConfig
from tests.server.fakes import fake_config, is_alive

ROOT = Path(__file__).parents[2]

TRAINING: dict[str, Any] = {
    "sources": [{"path": "input/fox"}],
    "model": "lorasmith-tiny",
    "name": "fox",
    "settings": {
        "steps": 12,
        "rank": 4,
        "targets": "attention",
        "seed": 3,
        "save_state_every": 2,
        "previews": "",
        "validation_share": 0.0,
        "training_dtype": "fp32",
    },
}
GRAPH: dict[str, Any] = {
    "prompt": {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "lorasmith-tiny.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a fox"}},
        "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}},
        "4": {
            "class_type": "TrainLoraNode",
            "inputs": {
                "model": ["1", 0],
                "latents": ["3", 0],
                "positive": ["2", 0],
                "steps": 8,
                "learning_rate": 0.0005,
                "rank": 4,
                "targets": "attention",
                "training_dtype": "fp32",
                "existing_lora": "[None]",
            },
        },
        "5": {"class_type": "SaveLoRA", "inputs": {"lora": ["4", 0], "prefix": "loras/graph", "steps": ["4", 2]}},
    }
}
JOBS = {"training": ("train", TRAINING), "graph": ("graph", GRAPH)}


def queue(base: Path) -> None:
    """A base folder with two jobs that wait."""
    shutil.copytree(BUILT_IN_BASE / "input" / "fox", base / "input" / "fox")
    store = JobStore(base / "user" / "lorasmith" / "jobs.sqlite3")
    for name, (kind, request) in JOBS.items():
        store.add(kind, request, id=name)  # type: ignore[arg-type]
    store.close()


async def serve_until_done(config: ServerConfig) -> None:
    """Run the jobs, and continue what is interrupted, until all have ended."""
    async with running(config) as (context, _):
        with context.hub.subscribe(kinds={"job"}) as changes:
            for job in context.store.ended(states=("interrupted",)):
                context.dispatcher.proceed(job.id)
            while any(context.store.counts()[state] for state in ("pending", "running", "interrupted")):
                changed = await anext(changes)
                if changed.data["state"] == "interrupted":
                    context.dispatcher.proceed(changed.data["id"])


def watched_worker() -> None:
    """A worker that notes it if another process runs the same job."""
    from lorasmith.runs import worker

    run = worker._run

    def watched(kinds: Any, jobs: Any, *others: Any) -> Any:
        with open(f"{jobs[0]['id']}.watch", "a") as file:  # noqa: PTH123
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                Path("twice").write_text(jobs[0]["id"])
            file.write(f"{os.getpid()}\n")
            file.flush()
            return run(kinds, jobs, *others)

    worker._run = watched
    worker.main()


class Server:
    """A server process in a base folder, and the workers that it has had."""

    def __init__(self, base: Path) -> None:
        self._base = base
        self._pids: set[int] = set()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, or start it again."""
        command = [sys.executable, "-m", "tests.server.crash", "--serve", str(self._base)]
        with (self._base / "server.txt").open("a") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)
        self._pids.add(self.process.pid)

    @property
    def worker(self) -> int | None:
        """Process id of the worker that has the lock, or had it."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._base / "user" / "lorasmith" / "worker-0.pid").read_text())
            self._pids.add(pid)
            return pid
        return None

    def kill(self, what: str) -> bool:
        """Kill the server, its worker or both; whether there was something to kill."""
        assert self.process is not None
        if self.process.poll() is not None:
            return False
        worker = self.worker
        pids = [*([worker] if what != "server" and worker else []), *([self.process.pid] if what != "worker" else [])]
        alive = [pid for pid in pids if is_alive(pid)]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if what != "worker":
            self.process.wait()
            self.start()
        return bool(alive)

    def wait(self, seconds: float = 300) -> None:
        """Wait until all jobs are done, and check that no process is left."""
        assert self.process is not None
        code = self.process.wait(seconds)
        assert code == 0, (self._base / "server.txt").read_text()[-3000:]
        self.worker  # noqa: B018 - noted
        end = time.monotonic() + 20
        while left := [pid for pid in self._pids if is_alive(pid)]:
            assert time.monotonic() < end, f"left running: {left}"
            time.sleep(0.05)


def results(base: Path) -> dict[str, Any]:
    """The LoRA and losses of each job; all must be complete."""
    from tests.training.crash import check_readable, outcome

    store = JobStore(base / "user" / "lorasmith" / "jobs.sqlite3")
    try:
        found = {}
        for name in JOBS:
            job = store.get(name)
            assert job.state == "completed", f"{name} is {job.state}: {job.error}"
            assert job.run is not None
            folder = base / job.run
            check_readable(folder)
            (lora,) = [path for path in folder.glob("*.safetensors") if path.name != "preview.safetensors"]
            lora.rename(folder / "lora.safetensors")
            found[name] = outcome(folder)
        return found
    finally:
        store.close()


class Trials:
    """Disturbs jobs and compares what they come to.

    Args:
        work: folder for the base folders.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        base = self._base("reference")
        start = time.monotonic()
        Server(base).wait()
        self._seconds = time.monotonic() - start
        self._reference = results(base)

    def trial(self, chance: random.Random, *, most_kills: int = 6) -> int:
        """Two jobs, disturbed one to `most_kills` times; returns how often. Raises AssertionError if it shows."""
        base = self._base("trial")
        server = Server(base)
        kills = 0
        for _ in range(chance.randint(1, most_kills)):
            time.sleep(chance.uniform(0, self._seconds))
            kills += server.kill(chance.choice(["server", "worker", "both"]))
        server.wait()
        assert not (base / "twice").exists(), "two processes had one job"
        for name, found in results(base).items():
            assert found.same_as(self._reference[name]), f"{name}: another result after {kills} kills"
        return kills

    def _base(self, name: str) -> Path:
        base = self._work / name
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        queue(base)
        return base


@contextlib.contextmanager
def trials() -> Iterator[Trials]:
    """Trials in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lorasmith-server-") as folder:
        yield Trials(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        watched_worker()
        return
    if arguments.serve is not None:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        worker = (sys.executable, "-P", "-m", "tests.server.crash", "--work")
        config = fake_config(arguments.serve, worker_command=worker, silence_s=60.0, grace_s=60.0)
        asyncio.run(serve_until_done(config))
        return
    chance = random.Random(arguments.seed)
    kills = runs = 0
    start = time.monotonic()
    with trials() as trial:
        while kills < arguments.kills:
            kills += trial.trial(chance)
            runs += 1
            print(f"\r{kills} kills in {runs} trials, {time.monotonic() - start:.0f} s", end="", flush=True)
    print(
        f"\n{runs} trials of {len(JOBS)} jobs, {kills} kills: every job was completed, none ran twice at once, and each"
        " ended with the tensors and losses of the job that was never disturbed."
    )


if __name__ == "__main__":
    main()
