"""Jobs reach workers, one each, and what happens to workers costs no job."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorasmith.runs.queue import Job, JobStateError, UnknownJobError
from lorasmith.server import dispatcher, server_disk
from lorasmith.server.hub import Notice, Subscription
from lorasmith.server.request_handling import ServerContext
from tests.launched import LONG_S
from tests.server.fakes import CPU, dispatching, ended, fake_context, is_alive, until


@pytest.fixture
def context(tmp_path: Path) -> Any:
    return dispatching(tmp_path)


def waiting(subscription: Subscription) -> list[Notice]:
    return list(subscription._waiting)


async def started(context: ServerContext, job: Job) -> Job:
    await until(lambda: context.store.get(job.id).state == "running")
    return context.store.get(job.id)


async def test_jobs_run_one_after_another_on_one_worker_and_are_reported(context: ServerContext) -> None:
    with context.hub.subscribe(kinds={"job", "queue", "view"}) as everything:
        jobs = [context.dispatcher.submit("train", {"name": str(one)}, client_id="me") for one in range(3)]
        steps = context.dispatcher.submit("train", {"do": "steps", "steps": 3}, front=True, client_id="other")
        done = [await ended(context, job) for job in jobs]
        notices = waiting(everything)
    assert [job.state for job in done] == ["completed"] * 3
    assert len({job.outputs["pid"] for job in done}) == 1
    changes = [(one.job_id, one.data["state"]) for one in notices if one.kind == "job"]
    assert changes[:4] == [(job.id, "pending") for job in (*jobs, steps)]
    assert changes[4:] == [(job.id, state) for job in (steps, *jobs) for state in ("running", "completed")]
    views = [one for one in notices if one.kind == "view"]
    assert [one.data["view"]["step"] for one in views] == [0, 1, 2]
    assert {(one.client_id, one.binary, one.droppable) for one in views} == {("other", b"picture", True)}
    assert context.hub.views(steps.id) == views[-1:]
    queues = [one.data for one in notices if one.kind == "queue"]
    assert queues[3] == {"pending": 4, "running": 0} and queues[-1] == {"pending": 0, "running": 0}
    assert any("this is printed, not sent, by cpu" in one["m"] for one in context.log.entries)
    assert "this is printed" in context.config.log.read_text()


async def test_stopping_pausing_and_continuing(context: ServerContext) -> None:
    dispatcher = context.dispatcher
    first, second = (dispatcher.submit("train", {"do": "wait"}) for _ in range(2))
    await started(context, first)
    assert dispatcher.cancel(second.id, pause=True)
    assert context.store.get(second.id).state == "paused"
    assert not dispatcher.cancel("nowhere") and not dispatcher.cancel(second.id, pause=True)
    with pytest.raises(JobStateError, match="is running"):
        dispatcher.proceed(first.id)
    assert dispatcher.cancel(first.id, pause=True)
    paused = await ended(context, first)
    assert (paused.state, paused.run, paused.error) == ("paused", "runs/x-001", None)
    assert dispatcher.proceed(first.id).id == first.id
    await started(context, first)
    assert dispatcher.interrupt()
    assert (await ended(context, first)).state == "cancelled"
    assert context.store.get(first.id).attempts == 2
    assert not dispatcher.interrupt()
    dispatcher.proceed(second.id)
    await started(context, second)
    again = dispatcher.retry(first.id)
    assert again.id != first.id and again.request == first.request and again.state == "pending"
    assert dispatcher.cancel(again.id)
    assert context.store.get(again.id).state == "cancelled"
    with pytest.raises(UnknownJobError):
        dispatcher.retry("nowhere")


async def test_a_measurement_makes_room_for_whatever_else_is_queued(context: ServerContext) -> None:
    dispatcher = context.dispatcher
    measured = dispatcher.submit("measure", {"do": "wait"})
    await started(context, measured)
    waiting = dispatcher.submit("measure", {"do": "wait"})
    assert context.store.get(measured.id).state == "running"  # it makes none for another one
    training = dispatcher.submit("train", {"do": "wait"})
    await started(context, training)
    assert context.store.get(measured.id).state == "cancelled"
    assert context.store.get(waiting.id).state == "pending"  # it came first, and waits for the training
    dispatcher.cancel(training.id)
    await started(context, waiting)
    dispatcher.proceed(training.id)
    await started(context, training)
    dispatcher.cancel(training.id)
    await ended(context, training)


async def test_an_evaluation_follows_a_training_and_gives_way_to_whatever_else_is_queued(
    context: ServerContext,
) -> None:
    dispatcher, store = context.dispatcher, context.store
    await context.assistant.start()
    first = dispatcher.submit("train", {"do": "wait", "evaluate": True})
    second = dispatcher.submit("train", {"do": "wait"})
    await started(context, first)
    dispatcher.cancel(first.id)  # stopped and kept
    await started(context, second)
    evaluation = await until(lambda: next(iter(store.about("runs/x-001")), None))
    measured = dispatcher.submit("measure", {"do": "wait"})
    third = dispatcher.submit("train", {"do": "wait"})
    dispatcher.cancel(second.id)
    await started(context, third)  # which was queued later
    assert store.get(evaluation.id).state == "pending"
    dispatcher.cancel(third.id)
    await started(context, evaluation)
    assert store.get(measured.id).state == "pending"
    drawn = dispatcher.submit("draw", {"do": "wait"})
    await started(context, drawn)
    assert store.get(evaluation.id).state == "pending"  # again
    dispatcher.cancel(drawn.id)
    await started(context, evaluation)
    dispatcher.cancel(evaluation.id)
    await ended(context, evaluation)
    assert store.get(evaluation.id).state == "cancelled"
    await context.assistant.stop()


async def test_a_run_of_a_sweep_is_repeated_in_it_unless_it_is_complete(context: ServerContext) -> None:
    request, states = {"name": "x", "output": "runs/s/rank-2"}, ("failed", "completed")
    for state in states:
        job = context.store.add("train", request, sweep="s", varied={"rank": 2})
        context.store.finish(job.id, state)
        again = context.dispatcher.retry(job.id)
        assert (again.sweep, again.request["output"]) == (("s", "runs/s/rank-2") if state == "failed" else (None, None))
        context.dispatcher.cancel(again.id)


async def test_a_failed_graph_is_in_the_history_before_its_last_event(context: ServerContext) -> None:
    seen = []
    with context.hub.subscribe(kinds={"graph"}) as graphs:
        job = context.dispatcher.submit("graph", {"do": "fail"})
        notice = await anext(graphs)
        seen = [notice.data["event"], context.store.get(job.id).state]
    assert seen == ["ExecutionFailed", "failed"]
    assert context.store.get(job.id).error == {"kind": "NodeError", "message": "no"}


async def test_a_worker_that_dies_costs_its_attempt_alone(context: ServerContext) -> None:
    dispatcher = context.dispatcher
    with context.hub.subscribe(kinds={"graph"}) as graphs:
        crashing, following = dispatcher.submit("graph", {"do": "crash"}), dispatcher.submit("train", {})
        lost = await ended(context, crashing)
        assert lost.state == "interrupted" and lost.error is not None
        assert "exit status 3" in lost.error["message"] and str(context.config.log) in lost.error["message"]
        assert [one.data["event"] for one in waiting(graphs)] == ["ExecutionFailed"]
        assert [event for event, _ in lost.messages] == ["execution_error"]
    assert (await ended(context, following)).state == "completed"
    hanging = dispatcher.submit("train", {"do": "wait"})
    await started(context, hanging)
    (pid,) = dispatcher.worker_pids()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: context.store.get(hanging.id).attempts == 2)  # it has waited again by itself
    assert dispatcher.worker_pids() != [pid]
    assert any("SIGKILL" in one["m"] for one in context.log.entries)


async def test_a_job_waits_again_until_it_loses_workers_without_progress(context: ServerContext) -> None:
    states = context.config.base / "runs" / "x-001" / "states"
    states.mkdir(parents=True)
    job = context.dispatcher.submit("train", {"do": "crash"})
    context.store.set_run(job.id, "runs/x-001")
    lost = await ended(context, job)
    assert (lost.state, lost.attempts, lost.losses) == ("interrupted", 5, 4)
    assert "exit status 3" in str(lost.error)
    assert not any((context.config.folder / "attempts").iterdir())
    made = states / "00000002.safetensors"
    made.touch()
    os.utime(made, (2**32, 2**32))  # a state that is newer than each attempt
    job = context.dispatcher.proceed(job.id)
    await until(lambda: context.store.get(job.id).attempts > 12)
    context.store.remove([])
    made.unlink()
    assert (await ended(context, job)).state == "interrupted"


@pytest.mark.parametrize(
    ("terms", "kind", "sentence"),
    [
        ({"deadline": 1.0}, "DeadlineError", "had to end by 1970-01-01"),
        ({"limits": {"minutes": 1e-4}}, "LimitError", r"at most 0\.0001 minutes"),
        ({"limits": {"steps": 99}}, "LimitError", "at most 99 steps, its limit, and came to 100"),
        ({"limits": {"memory_bytes": 4999}}, "LimitError", "at most 4,999 memory_bytes"),
    ],
)
async def test_a_job_beyond_its_terms_is_stopped_and_saved(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch, terms: dict[str, Any], kind: str, sentence: str
) -> None:
    monkeypatch.setattr(dispatcher, "_CLOCK_S", 0.05)
    view = {"step": 1, "steps": 100, "metrics": [{"name": "memory", "value": 5000}]}
    job = context.dispatcher.submit("train", {"do": "wait", "view": view}, **terms)
    done = await ended(context, job)
    assert done.state == "failed" and done.error is not None and done.error["kind"] == kind
    assert re.search(sentence, done.error["message"]) and context.store.get(job.id).attempts <= 1
    fitting = {"deadline": 2.0**33, "limits": {"minutes": 60, "steps": 100, "memory_bytes": 5000}}
    other = context.dispatcher.submit("train", {"do": "wait", "view": view}, **fitting)
    await until(lambda: context.hub.views(other.id))
    await asyncio.sleep(0.2)
    assert context.store.get(other.id).state == "running"


async def test_a_waiting_job_fails_at_its_deadline(context: ServerContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "_CLOCK_S", 0.05)
    running = context.dispatcher.submit("train", {"do": "wait"})
    await started(context, running)
    late = context.dispatcher.submit("train", {}, deadline=time.time() + 0.3)
    done = await ended(context, late)
    assert (done.state, done.attempts, (done.error or {})["kind"]) == ("failed", 0, "DeadlineError")
    assert context.store.get(running.id).state == "running"


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
async def test_a_worker_that_sends_no_heartbeat_is_replaced(tmp_path: Path) -> None:
    async with dispatching(tmp_path, silence_s=20.0) as context:
        job = context.dispatcher.submit("train", {"do": "wait"})
        await started(context, job)
        (pid,) = context.dispatcher.worker_pids()
        os.kill(pid, signal.SIGSTOP)
        child = context.dispatcher._supervisor.workers[0].process._child

        def is_over() -> bool:
            assert child is not None
            child.heard = -LONG_S  # as if it had been silent for long
            return not is_alive(pid)

        await until(is_over)
        await until(lambda: context.store.get(job.id).attempts == 2)
        assert any("no heartbeat for 20 seconds" in one["m"] for one in context.log.entries)
        context.dispatcher.cancel(job.id)
        after = context.dispatcher.submit("train", {})
        assert (await ended(context, after)).state == "completed"


async def test_a_worker_that_does_not_stop_is_killed_when_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("lorasmith.runs.supervisor.time", SimpleNamespace(monotonic=lambda: now[0]))
    async with dispatching(tmp_path, patience_s=10.0) as context:
        job = context.dispatcher.submit("train", {"do": "wait deaf"})
        await started(context, job)
        (pid,) = context.dispatcher.worker_pids()
        assert context.dispatcher.cancel(job.id) and context.dispatcher.cancel(job.id)
        await asyncio.sleep(0.05)
        assert is_alive(pid), "a double click kills nothing"
        now[0] = 10.0
        assert context.dispatcher.cancel(job.id)
        assert (await ended(context, job)).state == "cancelled"
        assert not is_alive(pid)


async def test_each_gpu_has_a_worker_that_sees_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    gpus = [{"name": f"cuda:{number}", "title": "GPU", "memory_bytes": 2**30} for number in range(2)]
    async with dispatching(tmp_path, devices=gpus) as context:
        jobs = [context.dispatcher.submit("train", {"do": "wait"}) for _ in range(3)]
        await until(lambda: len(context.store.running()) == 2)
        shown = context.dispatcher.devices()
        assert [one["job"] for one in shown] == [jobs[0].id, jobs[1].id] or {one["job"] for one in shown} == {
            job.id for job in jobs[:2]
        }
        assert [(one["name"], one["visible_there"], one["state"]) for one in shown] == [
            ("cuda:0", "3", "busy"),
            ("cuda:1", "5", "busy"),
        ]
        assert context.store.get(jobs[2].id).state == "pending"
        assert context.dispatcher.cancel(jobs[0].id)
        await started(context, jobs[2])


async def test_stopping_the_server_interrupts_and_nothing_is_lost(tmp_path: Path) -> None:
    async with dispatching(tmp_path) as context:
        running, queued = (context.dispatcher.submit("train", {"do": "wait"}) for _ in range(2))
        await started(context, running)
        (pid,) = context.dispatcher.worker_pids()
    assert not is_alive(pid)
    after = fake_context(tmp_path)
    found = after.store.get(running.id)
    assert (found.state, found.run, found.attempts) == ("interrupted", "runs/x-001", 1)
    assert found.error == {
        "kind": "Interrupted",
        "message": "the server was stopped while the job was running; continue it",
    }
    assert [job.id for job in after.store.pending()] == [queued.id]
    after.store.close()


async def test_an_end_that_finds_the_disk_full_is_recorded_later(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasmith.runs.supervisor.AGAIN_S", 0.1)
    database = context.store._database
    job = context.dispatcher.submit("measure", {"do": "wait"})
    await started(context, job)
    # Without room for a page, not even the log of the database grows.
    context.store._database = Full(database)  # type: ignore[assignment]
    context.dispatcher.cancel(job.id)
    await until(lambda: any("is full" in one["m"] for one in context.log.entries))
    assert context.store.get(job.id).state == "running"
    context.store._database = database
    assert (await ended(context, job)).state == "cancelled"
    measured = context.dispatcher.submit("measure", {"do": "measure"})
    await ended(context, measured)
    assert (context.store.measurement("s") or {})["seconds_per_step"] == 1.5


class Full:
    """A database on a full disk: reading works."""

    def __init__(self, database: Any) -> None:
        self._database = database

    def execute(self, statement: str, *values: Any) -> Any:
        if statement.startswith("UPDATE"):
            self._database.execute("PRAGMA max_page_count = 1")
            try:
                return self._database.execute("CREATE TABLE larger AS SELECT zeroblob(1000000)")
            finally:
                self._database.execute("PRAGMA max_page_count = 1000000")
        return self._database.execute(statement, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)


async def test_the_first_page_has_a_model_ready_until_something_is_queued(context: ServerContext) -> None:
    def said(text: str) -> int:
        return sum(text in one["m"] for one in context.log.entries)

    with context.dispatcher.watched():
        with context.dispatcher.watched():
            await until(lambda: said("warmed"))
        assert not said("freed")
    await until(lambda: said("freed"))
    await ended(context, context.dispatcher.submit("train", {}))
    with context.dispatcher.watched():
        pass
    await ended(context, context.dispatcher.submit("train", {"do": "steps", "steps": 1}))
    assert (said("warmed"), said("freed")) == (1, 1)


async def test_a_machine_without_gpus_waits_for_no_answer_about_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "has_no_gpu", lambda: True)
    async with dispatching(tmp_path, devices=None) as context:  # whose assistant is not started
        with context.dispatcher.watched():
            await until(lambda: any("warmed" in one["m"] for one in context.log.entries))
        assert context.dispatcher.device()["name"] == "cpu"


async def test_devices_come_from_the_assistant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "has_no_gpu", lambda: False)
    context = fake_context(tmp_path, devices=None)
    await context.assistant.start()
    await context.dispatcher.start()
    await until(context.dispatcher.devices)
    assert {**context.dispatcher.devices()[0], **CPU} == context.dispatcher.devices()[0]
    context.dispatcher.free(unload_models=True)
    await until(lambda: context.dispatcher.devices()[0]["state"] == "ready")
    context.dispatcher.free(free_memory=True)
    await until(lambda: any("freed" in one["m"] for one in context.log.entries))
    await context.dispatcher.stop()
    await context.assistant.stop()
    context.store.close()


async def test_a_job_leaves_the_last_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = fake_context(tmp_path)
    free = SimpleNamespace(free=server_disk.SPARE_BYTES + 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    job = context.dispatcher.submit("train", {"name": "x" * 900})
    with pytest.raises(server_disk.DiskFullError, match="less than 1 GiB of the disk"):
        context.dispatcher.submit("train", {"name": "x" * 1000})
    context.store.finish(job.id, "completed")  # what happens to jobs is always recorded
    context.store.close()
