"""A Ray cluster whose machines, head and server are killed at random must lose no job, do none twice, and train the
same bits.

    python -m tests.server.cluster_crash --jobs 200 --clients 10 --kills 40

Three machines are network namespaces of this one (`benchmarks.hosts`), each with a Ray node; the first has the head and
`lorasmith serve`, and clients are on a fourth. Clients queue jobs with keys, some twice, and again as long as no server
answers. All processes of a machine, those of the head, or the server are killed (SIGKILL) after random times in which a
job runs, and started again a second later, as by systemd. In the end every job must be completed, each in one run
folder whose LoRA and losses are those of a job that nobody disturbed on a server without a cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.hosts import Host, hosts, missing
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.runs.queue import Job, JobStore, StoreError, jobs_in
from tests.launched import environment
from tests.server.crash import TRAINING

_SEEDS = 5  # of different jobs
_TOKEN = "of-the-chaos-of-a-cluster"
_PORT, _RAY_PORT = 8188, 6379
_WORKERS = 2
_PAUSE_S = 1.0  # before what was killed is started again
_LEFT_S = 60.0  # for the processes of workers to end after their server


class Kept:
    """A process on a host that is started again whenever it ends."""

    def __init__(self, host: Host, command: Sequence[object], log: Path) -> None:
        self.host, self._command, self._log = host, command, log
        self._again = 0.0
        self._is_wanted = True
        self.starts = 0
        self.look()

    def look(self) -> None:
        """Start it if it does not run and its pause has passed."""
        if self.starts and self.process.poll() is None:
            self._again = time.monotonic() + _PAUSE_S
        elif self._is_wanted and time.monotonic() >= self._again:
            with self._log.open("a") as log:
                self.process = self.host.start(self._command, env=environment(), stdout=log, stderr=log)
            self.starts += 1

    def kill(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid)
            for process in (found, *found.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()

    def kill_alone(self) -> None:
        """Kill it, but none of its children."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Have it end by itself, and start it no more."""
        self._is_wanted = False
        self.process.send_signal(signal.SIGINT)
        self.process.wait(_LEFT_S)


class Cluster:
    """Three machines with Ray nodes, of which the first has the head and the server, and one of clients."""

    def __init__(self, work: Path, machines: Sequence[Host]) -> None:
        self.base = _base(work / "base")
        self._work = work
        *self._nodes, self._clients = machines
        self._address = f"{machines[0].address}:{_RAY_PORT}"
        self.head = self._ray(machines[0], "--head", f"--port={_RAY_PORT}", "--include-dashboard=false")
        self.machines = [self._ray(machine, f"--address={self._address}") for machine in self._nodes[1:]]
        workers = f"{self._address}?cpus=1&workers={_WORKERS}"
        served = ("--workers", workers, "--listen", machines[0].address, "--port", _PORT, "--token", _TOKEN)
        self.server = Kept(machines[0], _lorasmith(self.base, *served), work / "server.txt")
        self.kept = [self.head, *self.machines, self.server]

    def clients(self, jobs: int, count: int, seed: int) -> subprocess.Popen[str]:
        """A process with all clients, which ends when all jobs have."""
        url = f"http://{self._nodes[0].address}:{_PORT}"
        command = [sys.executable, "-m", "tests.server.cluster_crash", "--client", url, "--jobs", jobs]
        own = ["--clients", count, "--seed", seed]
        with (self._work / "clients.txt").open("a") as log:
            return self._clients.start([*command, *own], env=environment(), stdout=log, stderr=log)

    def disturbances(self) -> dict[str, Callable[[], None]]:
        return {
            "machine 2": self.machines[0].host.kill,
            "machine 3": self.machines[1].host.kill,
            "head": self.head.kill,
            "server": self.server.kill_alone,
        }

    def is_training(self) -> bool:
        """Whether the database says that a job runs: only then does a kill disturb one."""
        with contextlib.suppress(StoreError):  # it is being made, or written
            return any(job.state == "running" for job in jobs_in(_database(self.base)))
        return False

    def check_nothing_is_left(self) -> None:
        """No worker may be left some time after the server has ended."""
        end = time.monotonic() + _LEFT_S
        while left := [one for one in self._programs() if "lorasmith.runs" in one]:
            assert time.monotonic() < end, f"left running: {left}"
            time.sleep(0.5)

    def _programs(self) -> list[str]:
        found = []
        for pid in (pid for host in self._nodes for pid in host.processes):
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(psutil.Process(pid).cmdline()))
        return found

    def _ray(self, host: Host, *own: str) -> Kept:
        folder = self._work / f"ray-{host.name}"
        place = (f"--node-ip-address={host.address}", f"--temp-dir={folder}", "--num-cpus=1", "--num-gpus=0")
        small = ("--object-store-memory=80000000", "--disable-usage-stats")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *own, *place, *small]
        return Kept(host, command, self._work / f"ray-{host.name}.txt")


def _lorasmith(base: Path, *arguments: object) -> list[object]:
    return [sys.executable, "-m", "lorasmith", "serve", "--base-dir", base, *arguments]


def _database(base: Path) -> Path:
    return base / "user" / "lorasmith" / "jobs.sqlite3"


def _base(base: Path) -> Path:
    shutil.copytree(BUILT_IN_BASE / "input" / "fox", base / "input" / "fox")
    return base


# ---- clients


async def _all_clients(url: str, jobs: int, count: int, seed: int) -> None:
    """Queue the jobs from some clients, and wait until all have ended."""
    headers = {"Authorization": f"Bearer {_TOKEN}"}
    async with aiohttp.ClientSession(url, headers=headers, timeout=aiohttp.ClientTimeout(total=30)) as http:
        shares = [range(number, jobs, count) for number in range(count)]
        clients = [_Client(http, random.Random(seed + number)) for number in range(count)]
        await asyncio.gather(*(client.run(share) for client, share in zip(clients, shares, strict=True)))


class _Client:
    def __init__(self, http: aiohttp.ClientSession, chance: random.Random) -> None:
        self._http, self._chance = http, chance

    async def run(self, numbers: Sequence[int]) -> None:
        waiting = []
        for number in numbers:
            await asyncio.sleep(self._chance.uniform(0, 2))
            sent = [await self._sent("POST", "/jobs", _job(number)) for _ in range(1 + (self._chance.random() < 0.2))]
            assert len({job["id"] for job in sent}) == 1, f"one key, several jobs: {sent}"
            waiting.append(sent[0]["id"])
        while waiting:
            await asyncio.sleep(1.0)
            job = await self._sent("GET", f"/jobs/{waiting[-1]}")
            if job["state"] not in ("pending", "running"):
                waiting.pop()

    async def _sent(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer to a request, which is sent again until a server answers."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError):
                async with self._http.request(method, f"/lorasmith/v1{path}", json=body) as answer:
                    assert answer.status < 500 or answer.status == 503, await answer.text()
                    if answer.status < 300:
                        found: dict[str, Any] = await answer.json()
                        return found
                    assert answer.status == 503, await answer.text()
            await asyncio.sleep(0.5)


def _job(number: int) -> dict[str, Any]:
    """The body of a request that queues a job."""
    settings = {**TRAINING["settings"], "seed": number % _SEEDS}
    return {
        "dataset": "fox",
        "model": TRAINING["model"],
        "name": f"fox-{number}",
        "key": f"job-{number}",
        "settings": settings,
    }


# ---- what must come of it


def jobs_of(base: Path) -> list[Job]:
    """All jobs of a server that has ended."""
    store = JobStore(_database(base))
    try:
        return [*store.active(10_000), *store.ended()]
    finally:
        store.close()


def results(base: Path, jobs: Sequence[Job]) -> Iterator[tuple[Job, Any]]:
    """Each job with the LoRA and the losses of its run. AssertionError if one is not complete."""
    from tests.training.crash import check_readable, outcome

    for job in jobs:
        assert job.state == "completed", f"{job.key} is {job.state}: {job.error}"
        assert job.run is not None
        check_readable(base / job.run)
        (lora,) = [path for path in (base / job.run).glob("*.safetensors") if path.name != "preview.safetensors"]
        lora.rename(base / job.run / "lora.safetensors")
        yield job, outcome(base / job.run)


def reference(work: Path) -> list[Any]:
    """What comes of a job of each seed on a server of one machine that nobody disturbs."""
    base = _base(work / "undisturbed")
    with (work / "undisturbed.txt").open("w") as log:
        command = [str(one) for one in _lorasmith(base, "--port", 0, "--token", _TOKEN, "--listen", "127.0.0.1")]
        server = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            note = base / "user" / "lorasmith" / "server.address"
            while not note.exists():
                assert server.poll() is None, (work / "undisturbed.txt").read_text()
                time.sleep(0.1)
            asyncio.run(_all_clients(note.read_text().strip(), _SEEDS, 1, 0))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
    found = {job.key: outcome for job, outcome in results(base, jobs_of(base))}
    return [found[f"job-{seed}"] for seed in range(_SEEDS)]


def disturbed(work: Path, cluster: Cluster, arguments: argparse.Namespace) -> Counter[str]:
    """Run all jobs and kill what is there; returns how often each was killed while there were jobs."""
    chance = random.Random(arguments.seed)
    kills: Counter[str] = Counter()
    ways = cluster.disturbances()
    clients = cluster.clients(arguments.jobs, arguments.clients, arguments.seed)
    began, end = time.monotonic(), time.monotonic() + 60 * arguments.minutes
    following = began + chance.uniform(0, 2 * arguments.pause)
    while clients.poll() is None:
        assert time.monotonic() < end, f"not done within {arguments.minutes} minutes; {work}"
        for kept in cluster.kept:
            kept.look()
        if time.monotonic() >= following and kills.total() < arguments.kills and cluster.is_training():
            name = chance.choice(list(ways))
            ways[name]()
            kills[name] += 1
            following = time.monotonic() + chance.uniform(0, 2 * arguments.pause)
            print(f"{time.monotonic() - began:6.0f} s: killed {name}", flush=True)
        time.sleep(0.1)
    assert clients.returncode == 0, (work / "clients.txt").read_text()[-3000:]
    cluster.server.stop()
    cluster.check_nothing_is_left()
    print(f"{time.monotonic() - began:.0f} s")
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--pause", type=float, default=15.0, help="seconds between kills, on average")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which it has failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder in which everything is left")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        asyncio.run(_all_clients(arguments.client, arguments.jobs, arguments.clients, arguments.seed))
        return
    if reason := missing():
        sys.exit(reason)
    with contextlib.ExitStack() as stack:
        folder = arguments.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="ls-"))  # for short sockets
        undisturbed = reference(folder := Path(folder))
        machines = stack.enter_context(hosts(4))
        cluster = Cluster(folder, machines)
        kills = disturbed(folder, cluster, arguments)
        jobs = jobs_of(cluster.base)
        assert len(jobs) == arguments.jobs, f"{len(jobs)} jobs in place of {arguments.jobs}"
        attempts = sum(job.attempts for job in jobs)
        assert attempts > len(jobs) or not arguments.kills, "no job was disturbed; lengthen --pause"
        runs = list((cluster.base / "runs").iterdir())
        assert len(runs) == len({job.run for job in jobs}) == len(jobs), f"{len(runs)} run folders of {len(jobs)} jobs"
        for job, found in results(cluster.base, jobs):
            assert found.same_as(undisturbed[job.request["settings"]["seed"]]), f"{job.key}: another result"
    print(json.dumps({"jobs": len(jobs), "attempts": attempts, "kills": kills}))
    print("Every job was completed once, with the tensors and losses of a job that was never disturbed.")


if __name__ == "__main__":
    main()
