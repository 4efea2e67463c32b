"""The queue and its history, which survive everything."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorasmith.runs.queue import (
    STATES,
    DuplicateJobError,
    JobStateError,
    JobStore,
    KeyTakenError,
    QueueFullError,
    StoreError,
    UnknownJobError,
    jobs_in,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "user" / "jobs.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    store = JobStore(path)
    yield store
    store.close()


def names(store: JobStore) -> list[str]:
    return [str(job.request["name"]) for job in store.pending()]


def test_a_job_is_kept_as_it_was_added(store: JobStore) -> None:
    id = str(uuid.uuid4())
    job = store.add("graph", {"prompt": {"1": {"x": [1.5, None, "ü"]}}}, id=id, client_id="me")
    assert job == store.get(id) == store.find(id)
    assert (job.kind, job.state, job.client_id, job.attempts, job.ended) == ("graph", "pending", "me", 0, None)
    assert job.request == {"prompt": {"1": {"x": [1.5, None, "ü"]}}}
    assert store.add("train", {}).id != id
    with pytest.raises(DuplicateJobError, match=id):
        store.add("graph", {}, id=id)
    with pytest.raises(UnknownJobError, match="no job nowhere"):
        store.get("nowhere")
    assert store.find("nowhere") is None


def test_jobs_are_started_in_order_each_once(store: JobStore) -> None:
    added = {name: store.add("train", {"name": name}) for name in "abc"}
    front = store.add("train", {"name": "first"}, front=True)
    store.add("train", {"name": "before that"}, front=True)
    store.add("train", {"name": "between"}, number=1.5)
    assert front.number < 0 < added["a"].number
    assert names(store) == ["before that", "first", "a", "between", "b", "c"]
    store.move(added["c"].id, front=True)
    store.move(front.id, front=False)
    assert names(store) == ["c", "before that", "a", "between", "b", "first"]
    started = []
    while jobs := store.claim("w"):
        (job,) = jobs
        assert job.state == "running" and job.attempts == 1 and job.started is not None
        started.append(job.request["name"])
    assert started == ["c", "before that", "a", "between", "b", "first"]
    assert [job.request["name"] for job in store.running()] == started
    with pytest.raises(JobStateError, match="only a waiting job"):
        store.move(front.id, front=True)


def test_an_ended_job_is_history_and_can_be_queued_again(store: JobStore) -> None:
    a, b = store.add("train", {"name": "a"}), store.add("train", {"name": "b"})
    store.claim("w")
    store.set_run(a.id, "runs/a-001")
    with pytest.raises(JobStateError, match="running"):
        store.requeue(a.id)
    ended = store.finish(a.id, "paused", outputs={"1": {"images": []}}, messages=[["m", {}]], error={"kind": "K"})
    assert (ended.state, ended.outputs, ended.run) == ("paused", {"1": {"images": []}}, "runs/a-001")
    assert ended.messages == [["m", {}]] and ended.error == {"kind": "K"} and ended.ended is not None
    again = store.requeue(a.id)
    assert again.state == "pending" and again.error is None
    assert names(store) == ["a", "b"], "at its old place"
    (claimed,) = store.claim("w")
    assert claimed.id == a.id and claimed.attempts == 2
    assert claimed.run == "runs/a-001" and claimed.outputs == {} and claimed.messages == []
    assert b.state == "pending"


def test_history_is_read_in_pages_and_by_state(store: JobStore) -> None:
    ids = []
    for state in ("completed", "failed", "cancelled", "completed"):
        ids.append(store.add("train", {}).id)
        store.claim("w")
        store.finish(ids[-1], state)  # type: ignore[arg-type]
    assert [job.id for job in store.ended()] == ids[::-1]
    assert [job.id for job in store.ended(newest=False)] == ids
    assert [job.id for job in store.ended(2, 1)] == ids[::-1][1:3]
    assert [job.id for job in store.ended(states=("completed",))] == [ids[3], ids[0]]
    assert store.counts() == dict.fromkeys(STATES, 0) | {"completed": 2, "failed": 1, "cancelled": 1}


def test_running_jobs_are_never_removed(store: JobStore) -> None:
    running, waiting, done = (store.add("train", {}) for _ in range(3))
    assert [job.id for job in store.claim("w")] == [running.id]
    store.finish(done.id, "completed")
    assert store.remove([running.id, waiting.id, "nowhere", done.id]) == [waiting.id, done.id]
    assert [store.find(one.id) is not None for one in (running, waiting, done)] == [True, False, False]


def test_queue_and_history_have_limits(path: Path) -> None:
    store = JobStore(path, most_pending=3, most_ended=2)
    paused = store.add("train", {})
    store.finish(paused.id, "paused")
    ids = []
    for _ in range(4):
        ids.append(store.add("train", {}).id)
        store.finish(ids[-1], "completed")
    assert [job.id for job in store.ended(states=("completed",))] == ids[:1:-1]
    assert store.get(paused.id).state == "paused", "it is to be continued"
    for _ in range(3):
        store.add("train", {})
    with pytest.raises(QueueFullError, match="at most 3 jobs may wait, and 3 do"):
        store.add("train", {})
    store.close()


def test_what_a_dead_server_left_running_is_interrupted(path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from lorasmith.runs.queue import JobStore
store = JobStore(Path({str(path)!r}))
for name in "ab":
    store.add("train", {{"name": name}}, id=name)
store.claim("w")
store.set_run("a", "runs/a-001")
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    store = JobStore(path)
    a = store.get("a")
    assert (a.state, a.run, a.attempts, a.error["kind"]) == ("interrupted", "runs/a-001", 1, "Interrupted")  # type: ignore[index]
    assert a.ended is not None
    assert names(store) == ["b"]
    store.close()


def test_a_full_disk_changes_nothing_and_says_so(path: Path, store: JobStore) -> None:
    job = store.add("train", {"name": "a"})
    store._database.execute("PRAGMA max_page_count = 1")  # SQLite's own way to run out of space
    with pytest.raises(StoreError, match="is full") as caught:
        store.add("train", {"text": "x" * 10**6})
    assert caught.value.is_full and "\n" not in str(caught.value)
    assert names(store) == ["a"]
    store._database.execute("PRAGMA max_page_count = 100000")
    assert [one.id for one in store.claim("w")] == [job.id]


def test_an_error_of_a_disk_without_space_is_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be written"):
        JobStore(path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="is full") as caught:
        JobStore(path)
    assert caught.value.is_full


def test_damaged_databases_and_those_of_later_versions_are_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="is damaged"):
        JobStore(path)
    path.unlink()
    JobStore(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreError, match="later version"):
        JobStore(path)


def test_the_fastest_measurement_of_a_week_is_kept(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that other programs slowed down does not replace it."""

    def kept() -> float:
        found = store.measurement("s")
        assert found is not None and found["measured_at"] == pytest.approx(time.time(), abs=60)
        return found["seconds_per_step"]  # type: ignore[no-any-return]

    assert store.measurement("s") is None
    for seconds, fastest in ((2.0, 2.0), (1.0, 1.0), (3.0, 1.0)):
        store.set_measurement("s", {"seconds_per_step": seconds})
        assert kept() == fastest
    later = time.time() + 8 * 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    store.set_measurement("s", {"seconds_per_step": 3.0})
    assert kept() == 3.0


def test_a_summary_names_what_lists_show(store: JobStore) -> None:
    job = store.add("train", {"name": "dog", "model": "sd15", "sources": []})
    store.claim("w")
    shown = store.finish(job.id, "failed", error={"kind": "K", "message": "m", "traceback": ["long"]}).summary()
    assert (shown["name"], shown["model"], shown["state"]) == ("dog", "sd15", "failed")
    assert shown["error"] == {"kind": "K", "message": "m"}
    assert "request" not in shown and "outputs" not in shown


def test_lines_are_jobs_in_the_order_of_the_queue_without_what_is_large(store: JobStore) -> None:
    jobs = [store.add("train", {"name": str(one)}, front=one == 1) for one in range(3)]
    store.finish(jobs[2].id, "completed")
    lines = store.lines(("pending", "completed"))
    assert [line.id for line in lines] == [jobs[1].id, jobs[0].id, jobs[2].id]
    assert (lines[0].state, lines[0].number, lines[2].state) == ("pending", jobs[1].number, "completed")
    assert lines[2].ended is not None and store.lines(()) == []


def test_requests_have_a_limit_together(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.runs.queue.MOST_WAITING_BYTES", 500_000)
    monkeypatch.setattr("lorasmith.runs.queue.MOST_ENDED_BYTES", 500_000)
    large = {"trigger": "x" * 200_000}
    paused = store.add("train", large)
    store.finish(paused.id, "paused")
    first = store.add("train", large)
    with pytest.raises(QueueFullError, match="waiting and paused jobs may have at most"):
        store.add("train", large)
    small = store.add("train", {})
    ids = [first.id, small.id]
    for id in ids:
        store.finish(id, "completed")
    for _ in range(3):
        ids.append(store.add("train", large).id)
        store.finish(ids[-1], "completed")
    assert [job.id for job in store.ended(states=("completed",))] == ids[:-3:-1]
    assert store.get(paused.id).state == "paused", "it is to be continued"


def test_lists_have_no_graphs(store: JobStore) -> None:
    request = {"name": "n", "prompt": {"1": {}}, "workflow": {}, "extra_data": {"x": "y"}}
    store.finish(store.add("graph", request).id, "completed")
    store.add("graph", request)
    assert [job.request for job in (*store.active(4), *store.ended())] == [{"name": "n"}] * 2
    assert store.pending()[0].request == request


def test_jobs_that_train_together_start_together(store: JobStore) -> None:
    for name, group in (("a", "1"), ("b", None), ("c", "1"), ("d", None)):
        store.add("train", {"name": name}, together=group, sweep="s", varied={"rank": 4})
    assert [job.request["name"] for job in store.claim("cuda:0")] == ["a", "c"]
    assert [job.request["name"] for job in store.claim("cpu")] == ["b"]
    assert next((job.device, job.varied) for job in store.running()) == ("cuda:0", {"rank": 4})
    assert store.sweeps() == {"s": {"pending": 1, "running": 3}}
    assert [job.request["name"] for job in store.of_sweep("s")] == ["a", "b", "c", "d"]


def test_runs_of_a_sweep_wait_again_after_their_server_ended(path: Path) -> None:
    store = JobStore(path)
    for name, sweep in (("a", "s"), ("b", None), ("c", "s"), ("d", "s")):
        store.add("train", {}, id=name, sweep=sweep)
    for _ in range(3):
        store.claim("w")
    store.finish("c", "cancelled")
    store.close()
    states = [job.state for job in map(JobStore(path).get, "abcd")]
    assert states == ["pending", "interrupted", "cancelled", "pending"]


TERMS = ("key", "priority", "deadline", "limits", "spent_s", "losses", "notify", "submitter")


@pytest.mark.parametrize(("version", "added"), [(1, ("sweep", "varied", "together", *TERMS)), (2, TERMS)])
def test_a_database_of_an_earlier_version_is_read_on(
    path: Path, store: JobStore, version: int, added: tuple[str, ...]
) -> None:
    store.add("train", {"name": "a"}, id="a")
    for index in ("jobs_sweep", "jobs_deadline"):
        store._database.execute(f"DROP INDEX {index}")
    for trigger in ("notices_added", "notices_changed"):
        store._database.execute(f"DROP TRIGGER {trigger}")
    for table in ("keys", "notices"):
        store._database.execute(f"DROP TABLE {table}")
    for column in added:
        store._database.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    store._database.execute(f"PRAGMA user_version = {version}")
    store.close()
    if version == 2:  # the queue of a sweep by an earlier version, which nobody writes any more
        assert [job.id for job in jobs_in(path)] == ["a"]
    again = JobStore(path)
    assert (again.get("a").request, again.get("a").sweep, again.get("a").varied) == ({"name": "a"}, None, {})
    again.close()


def test_a_key_is_one_job_as_long_as_it_is_known(path: Path, store: JobStore) -> None:
    assert store.of_key("k", "digest") is None
    job = store.add("train", {"name": "a"}, key="k", digest="digest")
    assert store.of_key("k", "digest") == job and job.key == "k"
    with pytest.raises(KeyTakenError, match="'k' was used for another request"):
        store.of_key("k", "other")
    with pytest.raises(StoreError):
        store.add("train", {}, key="k", digest="digest")
    assert names(store) == ["a"]
    store.remove([job.id])
    with pytest.raises(KeyTakenError, match="was removed"):
        store.of_key("k", "digest")
    store._database.execute("UPDATE keys SET created = 0")
    store.close()
    again = JobStore(path)
    assert again.of_key("k", "digest") is None
    again.close()


def test_jobs_with_a_key_wait_again_after_their_server_ended(path: Path, store: JobStore) -> None:
    for name in ("lost", "stopped", "running"):
        store.add("train", {}, id=name, key=name)
        store.claim("w")
    store.finish("lost", "interrupted", error={"kind": "WorkerEnded", "message": "five times"})
    store.finish("stopped", "interrupted", error={"kind": "Interrupted", "message": "the server was stopped"})
    store.close()
    again = JobStore(path)
    assert [again.get(name).state for name in ("lost", "stopped", "running")] == ["interrupted", "pending", "pending"]
    again.close()


def test_a_higher_priority_is_started_first_and_the_front_before_all(store: JobStore) -> None:
    for name, priority in (("low", -1), ("a", 0), ("high", 5), ("b", 0), ("higher", 6), ("high too", 5)):
        store.add("train", {"name": name}, priority=priority)
    store.add("train", {"name": "front"}, front=True)
    assert names(store) == ["front", "higher", "high", "high too", "a", "b", "low"]
    assert [job.request["name"] for job in store.active(9)] == names(store)
    (claimed,) = store.claim("w")
    assert (claimed.request["name"], store.claim("w")[0].priority) == ("front", 6)


def test_the_end_of_an_attempt_that_was_given_up_changes_nothing(store: JobStore) -> None:
    job = store.add("train", {})
    store.claim("w")
    store.finish(job.id, "interrupted", attempt=1)
    store.requeue(job.id, losses=1)
    assert store.finish(job.id, "completed", attempt=1).state == "pending"
    (again,) = store.claim("w")
    assert (again.attempts, again.losses) == (2, 1)
    assert store.finish(job.id, "completed", attempt=1, outputs={"late": True}).state == "running"
    ended = store.finish(job.id, "completed", attempt=2)
    assert (ended.state, ended.outputs) == ("completed", {}) and ended.spent_s >= 0


def test_minutes_of_all_attempts_are_added(store: JobStore) -> None:
    job = store.add("train", {})
    for _ in range(2):
        store.claim("w")
        store._database.execute("UPDATE jobs SET started = started - 60")
        store.finish(job.id, "paused")
        store.requeue(job.id)
    assert 120 <= store.get(job.id).spent_s < 120 + 60


def test_another_process_reads_the_jobs_while_they_are_written(path: Path, store: JobStore) -> None:
    jobs = [store.add("train", {"name": name}, sweep="s", varied={"rank": 2}) for name in "ab"]
    store.claim("cpu")
    assert [(job.id, job.state, job.varied) for job in jobs_in(path)] == [
        (jobs[0].id, "running", {"rank": 2}), (jobs[1].id, "pending", {"rank": 2}),
    ]  # fmt: skip
    store.close()
    assert len(jobs_in(path)) == 2 and sorted(one.name for one in path.parent.iterdir()) == [path.name]


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("CREATE TABLE other (x)", "has no jobs"),
        (f"CREATE VIEW jobs AS {ENDLESS}", "has no jobs"),
        (f"CREATE TABLE jobs (x); CREATE VIEW y AS {ENDLESS}", "cannot be used"),
        (None, "cannot be written|damaged"),
    ],
)
def test_a_database_of_a_stranger_is_read_in_bounded_time(path: Path, script: str | None, sentence: str) -> None:
    path.parent.mkdir()
    if script is None:
        path.write_bytes(b"no database" * 1000)
    else:
        database = sqlite3.connect(path)
        database.executescript(script)
        database.close()
    with pytest.raises(StoreError, match=sentence):
        jobs_in(path)


@pytest.mark.parametrize(
    "column",
    [
        "request = '['",
        "request = '[1]'",
        "varied = '[' || hex(zeroblob(100000))",
        "error = '\"x\"'",
        "id = x'00'",
        "state = 'asleep'",
    ],
)
def test_damaged_jobs_of_a_stranger_are_refused(path: Path, store: JobStore, column: str) -> None:
    store.add("train", {})
    store._database.execute(f"UPDATE jobs SET {column}")
    with pytest.raises(StoreError, match="is damaged"):
        jobs_in(path)
