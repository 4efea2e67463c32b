"""The application as it is served, on a base folder, with a scripted worker in place of those that import torch."""

from __future__ import annotations

import asyncio
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.runs.child_process import ChildOwner
from lorasmith.runs.presets import PRESETS, recipe_settings
from lorasmith.runs.queue import Job, JobState
from lorasmith.runs.spec import RunSpec
from lorasmith.runs.view import RunView
from lorasmith.server import event_streams
from lorasmith.server.datasets.dataset_answers import dataset
from lorasmith.server.datasets.dataset_change_answers import set_captions
from lorasmith.server.datasets.dataset_shapes import CaptionEdit
from lorasmith.server.http_server import make_app
from lorasmith.server.jobs.job_shapes import Draft
from lorasmith.server.questions import answer, load_questions
from lorasmith.server.request_handling import ServerContext
from lorasmith.server.server_config import ServerConfig
from lorasmith.training.events import Outcome
from tests.launched import LONG_S
from tests.server.api_server import LocalAssistant
from tests.server.fakes import server_context
from tests.server.pages.run_folders import ScriptedRun, write_finished_run, write_record
from tests.server.pages.scripted_worker import ScriptedProcess

PICTURES = BUILT_IN_BASE / "input" / "fox"
DEVICE = {"name": "cuda:0", "title": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30}

TRAINING = {"name": "fox", "model": "lorasmith-tiny", "sources": [{"path": "input/fox"}], "settings": {}}
"""A job that trains."""

T = TypeVar("T")


class ServedPage:
    """The application in a thread of its own; its assistant answers there, by the real functions on the base folder.

    Attributes:
        folders: of the base folder.
        assistant: with answers to make up, and what it was asked.
        context: the parts of the server, to be used inside `do`.
        processes: that the server has started.
    """

    def __init__(self, base: Path) -> None:
        load_questions()
        self.base = base
        base.mkdir(exist_ok=True)
        self.folders = Folders(base)
        self.assistant = LocalAssistant(self.folders)
        self.made_up.update(plan=self._plan, check_dataset=self._check, shelf_memory=_memory)
        self.port = 0
        self.context: ServerContext
        self.processes: list[ScriptedProcess] = []
        self._loop = asyncio.new_event_loop()
        self._runner: web.AppRunner | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def new_process(self, command: Any, owner: ChildOwner, **_: Any) -> ScriptedProcess:
        """In place of `ChildProcess`."""
        self.processes.append(ScriptedProcess(owner))
        return self.processes[-1]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    @property
    def made_up(self) -> dict[str, Any]:
        """Answers to questions: a value, an error to raise, or a function of the arguments."""
        return self.assistant.made_up

    def of(self, question: str) -> list[dict[str, Any]]:
        """The arguments that a question was asked with."""
        return [arguments for name, arguments in self.assistant.asked if name == question]

    def do(self, act: Callable[[], T]) -> T:
        """Call something in the thread of the server."""
        if threading.current_thread() is self._thread:
            return act()

        async def call() -> T:
            return act()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(LONG_S)

    def start(self) -> None:
        asyncio.run_coroutine_threadsafe(self._started(), self._loop).result(LONG_S)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stopped(), self._loop).result(LONG_S)

    def close(self) -> None:
        if self._runner is not None:
            self.stop()
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(LONG_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add_dataset(self, name: str = "fox", number: int = 4) -> Path:
        """A dataset of pictures of foxes, all but the second with captions."""
        folder = self.base / "input" / name
        folder.mkdir(parents=True)
        for index, one in enumerate(sorted(PICTURES.glob("*.png"))[:number]):
            shutil.copyfile(one, folder / one.name)
            if index != 1:
                (folder / one.name).with_suffix(".txt").write_text(f"a red fox, picture {index}")
        return folder

    def captions(self, name: str = "fox") -> list[str]:
        """The stored captions of a dataset."""
        return [one.caption for one in dataset(self.folders, name).images]

    def photos(self, name: str = "fox") -> list[str]:
        """The files of a dataset."""
        return [one.file for one in dataset(self.folders, name).images]

    def draft(self, name: str, **changes: Any) -> dict[str, Any]:
        """What is chosen for a training on a dataset, after changes as of another page."""

        def change() -> dict[str, Any]:
            stored, _ = self.context.store.draft(name)
            if changes:
                stored = {**asdict(Draft()), **stored, **changes}
                self.context.dispatcher.set_draft(name, stored)
            return stored

        return self.do(change)

    def add_run(self, id: str = "runs/fox-001", **more: Any) -> Path:
        """A finished run, as `write_finished_run`."""
        return write_finished_run(self.base, id, **more)

    def advise(self, id: str) -> None:
        """Advice on two pictures of a run, which would need hundreds of steps with their draws."""
        told = {"reason": "Its loss stays 2.6 times that of the others at the same noise levels.", "drawn_less": ""}
        never = {**told, "file": "fox_2.png", "finding": "never learnt", "remedy": "Look at its caption."}
        by_heart = {"file": "fox_3.png", "finding": "learnt by heart", "remedy": "Draw it less often, or leave it out."}
        advice = [never, {**told, **by_heart, "drawn_less": "fox_3.png=0.1"}]
        self.made_up["run"] = lambda **given: {
            **answer("run", given, self.folders), **({"advice": advice} if given["id"] == id else {})
        }  # fmt: skip

    def add_job(self, state: JobState = "pending", *, run: str | None = None) -> Job:
        """A training in a state; one that waits is not taken by the worker."""

        def add() -> Job:
            store = self.context.store
            job = store.add("train", TRAINING)
            if run is not None:
                store.set_run(job.id, run)
            if state != "pending":
                store.finish(job.id, state)
            return store.get(job.id)

        return self.do(add)

    def submit(self) -> Job:
        """A training that the worker takes, if it does nothing else."""
        return self.do(lambda: self.context.dispatcher.submit("train", TRAINING))

    @property
    def streams(self) -> int:
        """The number of open streams of events."""
        return len(event_streams._open)

    def taken(self) -> ScriptedJob:
        """The next job that the worker has taken, but for measurements; waits for it."""
        worker = next(one for one in self.processes if "device" in one.first and one.is_running)
        return ScriptedJob(self, worker, worker.jobs.get(timeout=LONG_S))

    def download(self, **progress: Any) -> None:
        """Have the last download report how far it is: file, done_bytes, total_bytes, bytes_per_s, is_checking."""
        self.do(lambda: self._downloads()[-1].tell("progress", **progress))

    def end_download(self, state: str = "completed", error: str = "") -> None:
        def end() -> None:
            process = self._downloads()[-1]
            process.tell("ended", state=state, error={"message": error} if error else None)
            process.end()

        self.do(end)

    def _downloads(self) -> list[ScriptedProcess]:
        return [one for one in self.processes if "files" in one.first]

    def _plan(self, spec: dict[str, Any], card_bytes: int, device: str) -> dict[str, Any]:
        """A plan with settings that are checked, and numbers that are not computed, which would take seconds."""
        preset, given = PRESETS.get(spec.get("preset", "")), spec["settings"]
        recipe = {} if preset is None else recipe_settings(preset, images=4, given=given)
        settings = {**recipe, **given}
        RunSpec(settings=settings).requested(self.folders)
        steps, rank = settings.get("steps", 500), settings.get("rank", 16)
        return {
            "steps": steps, "seen": steps, "epochs": steps / 4, "rank": rank, "resolution": 64, "images": 4,
            "held_out": 0,
            "parameters": rank * 76_000, "memory_bytes": 600_000_000, "fits": True, "memory_settings": {}, "notes": [],
            "seconds_per_step": None, "seconds": None, "slowdown": 1.0, "measured_at": None,
            "distilled": "", "usual_adapter": "", "recipe": recipe,
            "teaches": spec.get("kind") or ("subject" if recipe else ""),
            "teaches_because": "" if spec.get("kind") or not recipe else "all pictures are of sks",
        }  # fmt: skip

    def trains_four_fifths(self) -> None:
        """Of each picture, as of wide ones."""
        crop = {"x": 0.1, "y": 0, "width": 0.8, "height": 1}

        def check(**given: Any) -> Any:
            found = self._check(**given)
            return {**found, "images": {file: {**one, "crop": crop} for file, one in found["images"].items()}}

        self.made_up["check_dataset"] = check

    def _check(self, name: str, **given: Any) -> Any:
        """The check of a dataset without a model, whose vocabulary would take seconds to load."""
        return answer("check_dataset", {"name": name, **given, "model": None, "edit": None}, self.folders)

    async def _started(self) -> None:
        config = ServerConfig(base=self.base, devices=(DEVICE,))
        self.context = server_context(config, self.assistant)
        self._runner = web.AppRunner(make_app(self.context), access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=sys.platform != "win32").start()
        self.port = self._runner.addresses[0][1]
        await self.context.dispatcher.start()

    async def _stopped(self) -> None:
        assert self._runner is not None
        context = self.context
        await context.downloads.stop()
        await context.dispatcher.stop()
        context.hub.close()
        await self._runner.cleanup()
        self._runner = None
        context.store.close()
        others = [one for one in asyncio.all_tasks() if one is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0.02)  # transports close in the next rounds of the loop


def _memory(name: str, card_bytes: int) -> dict[str, Any]:
    fits = name != "flux.1-dev"
    return {"memory_bytes": (10 if fits else 90) * 2**30, "fits": fits, "encoders_fit": True}


class ScriptedJob:
    """A job that the worker has taken, and what the worker reports of it."""

    def __init__(self, served: ServedPage, worker: ScriptedProcess, job: Mapping[str, Any]) -> None:
        self.id: str = job["id"]
        self.request: Mapping[str, Any] = job["request"]
        self._served, self._worker = served, worker
        self._run: str | None = job["run"]

    def tell(self, type: str, **message: Any) -> None:
        self._served.do(lambda: self._worker.tell(type, **message))

    def notice(self, kind: str, data: Mapping[str, Any]) -> None:
        self.tell("notice", kind=kind, data=data, droppable=True)

    def progress(self, value: int, maximum: int = 8) -> None:
        self.notice("progress", {"value": value, "maximum": maximum})

    def end(self, state: str = "completed", **end: Any) -> None:
        self._served.do(lambda: self._worker.ended(self.id, state, **end))

    def caption(self, *files: str) -> dict[str, dict[str, str]]:
        """Write captions of photos, as a captioner does; returns what was written."""
        name, seen = self.request["name"], self.request["photos"]
        text = ", ".join(filter(None, (self.request["trigger"], "written")))
        for done, file in enumerate(files):
            self.progress(done, len(seen))
            set_captions(self._served.folders, name, {file: CaptionEdit(caption=text, seen=seen[file])})
            self.notice("dataset", {"name": name})
        return {file: {"before": seen[file], "caption": text} for file in files}

    def prepare(self, *lines: str) -> None:
        """Report what happens before there is a run."""
        self.notice("view", {"node_id": None, "view": {**RunView().to_json(), "preparation": lines}})

    def train(self) -> ScriptedRun:
        """Begin the run that a job asks for, or go on with it."""
        base, name = self._served.base, self.request["name"]
        if self._run is None:
            self._run = f"runs/{name}-001"
            dataset = Path(self.request["sources"][0]["path"]).name
            settings = {name: value for name, value in self.request["settings"].items() if name != "controls"}
            write_record(base, self._run, [], **{"dataset": dataset, **settings})
        run = self._run
        self.tell("run", run=run)
        found = ScriptedRun(
            base / run, lambda view: self.notice("view", {"node_id": None, "view": {**view, "run": run}})
        )
        self._worker.before_cancel = lambda: found.finish(Outcome.CANCELLED)
        return found
