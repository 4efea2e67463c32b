"""The queue of jobs, its history, what was measured, and drafts of jobs, in SQLite, which survive crashes.

A server has `<base>/user/lorasmith/jobs.sqlite3`, a sweep of the command line `queue.sqlite3` in its folder (WAL). Only
one process writes it, from the thread of its event loop; each call is one short transaction, durable when it returns.
Others may read it (`jobs_in`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import quote

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import ensure_folder
from lorasmith.training.config import cost_options

JobKind: TypeAlias = Literal["graph", "train", "measure", "draw", "evaluate", "caption"]
JobState: TypeAlias = Literal["pending", "running", "completed", "failed", "cancelled", "paused", "interrupted"]
STATES: tuple[JobState, ...] = get_args(JobState)
ACTIVE: tuple[JobState, ...] = ("running", "pending")
ENDED: tuple[JobState, ...] = tuple(state for state in STATES if state not in ACTIVE)
"""States of jobs that are neither queued nor running."""

MOST_PENDING = 10_000  # waiting jobs
MOST_ENDED = 2_000  # ended jobs that are kept, the newest; paused and interrupted ones are always kept, to be continued

MOST_WAITING_BYTES = MOST_ENDED_BYTES = 256 * 2**20
"""Of the requests of jobs that wait or can be continued, and of all data of ended ones."""

MOST_NOTICES = 1_000  # of a job that wait, besides those of its states
MOST_NOTICE_PAUSE_S = 3600.0

_MOST_LOOKS = 20_000  # thousands of steps of SQLite's machine for reading a database of others
_FASTEST_S = 7 * 86_400.0  # that the fastest measurement is kept
_SMALL_BYTES = 2**16  # smaller requests are queued even beyond `MOST_WAITING_BYTES`
WORKER_ENDED = "WorkerEnded"  # kind of the error of a job whose worker crashed
_REMOVABLE: tuple[JobState, ...] = ("completed", "failed", "cancelled")
_VERSION = 3  # 2: columns of sweeps; 3: terms of clients
_DISK = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
_LEAST_FREE = 128 * 2**10  # SQLite reports a full disk as such only where a write fails, not for its shared memory


class StoreError(LorasmithError):
    """The database cannot be read or written; `is_full` if the disk is full."""

    def __init__(self, message: object, *, is_full: bool = False) -> None:
        super().__init__(message)
        self.is_full = is_full


class QueueFullError(LorasmithError):
    """Too many waiting jobs, or too large ones."""


class DuplicateJobError(LorasmithError):
    """A job with this id exists."""


class KeyTakenError(LorasmithError):
    """A client's key was used for another request, or its job was removed."""


class UnknownJobError(LorasmithError):
    """No job has this id."""


class JobStateError(LorasmithError):
    """The state of a job does not allow this."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job. Times are in seconds since the epoch; `started` and `ended` are of the last attempt."""

    id: str  # a UUID in lower case
    kind: JobKind
    # `interrupted`: its worker or server ended; like `paused` and `cancelled`, it can be continued
    state: JobState = "pending"
    number: float = 0.0  # place in the queue, lowest first
    # `{prompt, extra_data, targets, outputs_to_execute, workflow}`, a `RunSpec`, `{model, settings, ...}`,
    # or what `server.runs` makes of drawings, by kind
    request: Mapping[str, Any] = field(default_factory=dict)
    client_id: str | None = None
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    # of graphs, by node, for user interfaces; of other jobs, their results
    outputs: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Sequence[Any]] = ()  # `[event, data]` each, as in ComfyUI's history
    error: Mapping[str, Any] | None = None  # `{kind, message, ...}` of a job that failed or was interrupted
    run: str | None = None  # id of its run: the folder relative to the base folder
    attempts: int = 0
    device: str | None = None  # of the last attempt
    sweep: str | None = None  # the sweep that it is a run of
    varied: Mapping[str, Any] = field(default_factory=dict)  # its settings among those that the sweep varies
    together: str | None = None  # jobs with the same text train together, over one model
    key: str | None = None  # by which its client knows it; it waits again whenever its server ended
    priority: int = 0  # higher ones first
    deadline: float | None = None  # seconds since the epoch by which it must have ended
    limits: Mapping[str, Any] = field(default_factory=dict)  # `steps`, `minutes` and `memory_bytes`, each optional
    spent_s: float = 0.0  # in earlier attempts
    losses: int = 0  # workers lost in a row without a new run state
    notify: str | None = None  # URL that receives a notice of each change
    submitter: str | None = None  # name of the token by which it was queued

    @property
    def gives_way(self) -> bool:
        """Whether the server queued it by itself, so that it makes room for every other job."""
        return self.kind == "measure" or (self.kind == "evaluate" and bool(self.request.get("gives_way")))

    @property
    def failure(self) -> str | None:
        """The sentence of its error; empty without one, None before it has ended."""
        if self.state in ACTIVE:
            return None
        is_lost = self.error is not None and self.error.get("kind") == WORKER_ENDED
        return str((self.error or {}).get("message", "")) if self.state == "failed" or is_lost else ""

    def summary(self) -> dict[str, Any]:
        """The job without request, outputs and messages, but with its name and model."""
        return {
            **{name: getattr(self, name) for name in _SUMMARISED},
            "error": None if self.error is None else {key: self.error.get(key) for key in ("kind", "message")},
            "name": self.request.get("name") if self.sweep is None else PurePath(self.request["output"]).name,
            "model": self.request.get("model"),
            "about": self.request.get("run") if self.kind in ("draw", "evaluate") else None,
            "wish": self.request.get("wish") if self.kind == "draw" else None,
            "gives_way": self.gives_way,
        }


_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    number REAL NOT NULL,
    request TEXT NOT NULL,
    client_id TEXT,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    outputs TEXT NOT NULL DEFAULT '{}',
    messages TEXT NOT NULL DEFAULT '[]',
    error TEXT,
    run TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    sweep TEXT,
    varied TEXT NOT NULL DEFAULT '{}',
    together TEXT,
    key TEXT,
    priority INTEGER NOT NULL DEFAULT 0,
    deadline REAL,
    limits TEXT NOT NULL DEFAULT '{}',
    spent_s REAL NOT NULL DEFAULT 0,
    losses INTEGER NOT NULL DEFAULT 0,
    notify TEXT,
    submitter TEXT
);
CREATE INDEX IF NOT EXISTS jobs_queue ON jobs (state, number, sequence);
CREATE INDEX IF NOT EXISTS jobs_ended ON jobs (ended);
CREATE INDEX IF NOT EXISTS jobs_sweep ON jobs (sweep);
CREATE INDEX IF NOT EXISTS jobs_deadline ON jobs (deadline) WHERE deadline IS NOT NULL;
CREATE TABLE IF NOT EXISTS keys (
    key TEXT PRIMARY KEY,
    job TEXT NOT NULL,
    digest TEXT NOT NULL,
    created REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS notices (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL,
    url TEXT NOT NULL,
    created REAL NOT NULL,
    body TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS notices_job ON notices (job, sequence);
CREATE TABLE IF NOT EXISTS measurements (
    subject TEXT PRIMARY KEY,
    found TEXT NOT NULL,
    measured REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS drafts (
    dataset TEXT PRIMARY KEY,
    draft TEXT NOT NULL,
    version INTEGER NOT NULL DEFAULT 1
);
"""

_TRIGGERED = """
CREATE TRIGGER IF NOT EXISTS notices_{name} AFTER {event} ON jobs WHEN NEW.notify IS NOT NULL AND {condition} BEGIN
    INSERT INTO notices (job, url, created, body) VALUES (
        NEW.id, NEW.notify, (julianday('now') - 2440587.5) * 86400.0, json_object(
            'kind', 'state', 'job', NEW.id, 'key', NEW.key, 'name', json_extract(NEW.request, '$.name'),
            'state', NEW.state, 'attempt', NEW.attempts, 'device', NEW.worker, 'run', NEW.run,
            'error', CASE WHEN NEW.error IS NULL THEN NULL ELSE json_object(
                'kind', json_extract(NEW.error, '$.kind'), 'message', json_extract(NEW.error, '$.message')) END,
            'outputs', json(NEW.outputs)));
END
"""
_TRIGGERS = (
    _TRIGGERED.format(name="added", event="INSERT", condition="1"),
    _TRIGGERED.format(name="changed", event="UPDATE OF state", condition="OLD.state != NEW.state"),
)
"""A notice is stored in the transaction that changes a job, so that none is lost or sent for nothing."""

_ADDED = {
    "sweep": "TEXT",
    "varied": "TEXT NOT NULL DEFAULT '{}'",
    "together": "TEXT",
    "key": "TEXT",
    "priority": "INTEGER NOT NULL DEFAULT 0",
    "deadline": "REAL",
    "limits": "TEXT NOT NULL DEFAULT '{}'",
    "spent_s": "REAL NOT NULL DEFAULT 0",
    "losses": "INTEGER NOT NULL DEFAULT 0",
    "notify": "TEXT",
    "submitter": "TEXT",
}
"""Columns that databases of earlier versions lack."""

_SWEEP_COLUMNS = (
    "id, kind, state, number, request, client_id, created, started, ended, outputs, messages, error, run, attempts, "
    "worker AS device, sweep, varied, together"
)
"""Those that every version has in the queue of a sweep."""
_COLUMNS = f"{_SWEEP_COLUMNS}, key, priority, deadline, limits, spent_s, losses, notify, submitter"
_SUMMARISED = (
    "id", "kind", "state", "number", "client_id", "created", "started", "ended", "run", "attempts", "key", "priority",
    "deadline", "limits", "submitter",
)  # fmt: skip
_PRIORITY_STEP = 1e9
"""Places in the queue that a priority is worth: more than there are jobs."""
_KEPT_KEYS_S = 30 * 86_400.0  # that the key of a client is known
_LISTED_COLUMNS = _COLUMNS.replace(
    "request,", "json_remove(request, '$.prompt', '$.workflow', '$.extra_data') AS request,"
)
"""Without the graphs of requests, which may have megabytes each."""
_JSON = ("request", "outputs", "messages", "error", "varied", "limits")
_GIVES_WAY = "(kind = 'evaluate' AND json_extract(request, '$.gives_way') IS NOT NULL)"
"""Of evaluations that the server queued by itself."""


class JobStore:
    """The jobs in the database at `path`, None for one in memory. Every method raises StoreError if it cannot be read
    or written. Opening it marks jobs left `running` by an earlier process as `interrupted`; interrupted runs of sweeps,
    jobs with a key, and evaluations that nobody asked for, wait again.
    """

    def __init__(self, path: Path | None, *, most_pending: int = MOST_PENDING, most_ended: int = MOST_ENDED) -> None:
        self.is_in_memory = path is None
        self._path = path or Path(":memory:")
        self._most_pending = most_pending
        self._most_ended = most_ended
        if path is not None:
            ensure_folder(path.parent)
        with self._explained():
            self._database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self._database.close()
            raise

    def _open(self) -> None:
        with self._explained():
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise StoreError(
                f"{self._path} is of a later version of Lorasmith; install that one, or move the file away"
            )
        with self._writing() as database:
            there = {row["name"] for row in database.execute("PRAGMA table_info(jobs)")}
            for name, type in _ADDED.items() if there else ():
                if name not in there:
                    database.execute(f"ALTER TABLE jobs ADD COLUMN {name} {type}")
            for statement in filter(str.strip, _SCHEMA.split(";")):
                database.execute(statement)
            for statement in _TRIGGERS:
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
            error = {"kind": "Interrupted", "message": "the server ended while the job was running; continue it"}
            database.execute(
                "UPDATE jobs SET state = 'interrupted', ended = ?, error = ? WHERE state = 'running'",
                (time.time(), json.dumps(error)),
            )
            database.execute(
                "UPDATE jobs SET state = 'pending', ended = NULL, error = NULL "
                f"WHERE state = 'interrupted' AND (sweep IS NOT NULL OR {_GIVES_WAY} OR "
                "(key IS NOT NULL AND json_extract(error, '$.kind') = ?))",
                (error["kind"],),
            )
            database.execute("DELETE FROM keys WHERE created < ?", (time.time() - _KEPT_KEYS_S,))

    def close(self) -> None:
        self._database.close()

    def add(
        self,
        kind: JobKind,
        request: Mapping[str, Any],
        *,
        id: str | None = None,
        client_id: str | None = None,
        front: bool = False,
        number: float | None = None,
        sweep: str | None = None,
        varied: Mapping[str, Any] | None = None,
        together: str | None = None,
        key: str | None = None,
        digest: str = "",
        priority: int = 0,
        deadline: float | None = None,
        limits: Mapping[str, Any] | None = None,
        notify: str | None = None,
        submitter: str | None = None,
    ) -> Job:
        """Queue a new job. `id` is a UUID in lower case, None for a new one. `front` puts it before all others, by a
        negative number, and so does a higher priority. `key` is a new one, as `of_key` says, and `digest` that of its
        request. Raises QueueFullError and DuplicateJobError.
        """
        id, text = id or str(uuid.uuid4()), json.dumps(request)
        with self._writing() as database:
            (waiting,) = database.execute("SELECT count(*) FROM jobs WHERE state = 'pending'").fetchone()
            if waiting >= self._most_pending:
                raise QueueFullError(
                    f"at most {self._most_pending:,} jobs may wait, and {waiting:,} do; wait, or remove some of them"
                )
            if len(text) > _SMALL_BYTES:
                (kept,) = database.execute(
                    f"SELECT total(length(request)) FROM jobs WHERE state NOT IN ({_marks(_REMOVABLE)})", _REMOVABLE
                ).fetchone()
                if kept + len(text) > MOST_WAITING_BYTES:
                    most = f"{MOST_WAITING_BYTES // 2**20} MiB"
                    raise QueueFullError(
                        f"waiting and paused jobs may have at most {most} together; wait, or remove some"
                    )
            if database.execute("SELECT 1 FROM jobs WHERE id = ?", (id,)).fetchone():
                raise DuplicateJobError(f"a job's id must be a new one, got {id}; leave it out")
            now = time.time()
            values = (
                *(id, kind, text, client_id, now, sweep, json.dumps(varied or {}), together),
                *(key, priority, deadline, json.dumps(limits or {}), notify, submitter),
            )
            added = database.execute(
                "INSERT INTO jobs (id, kind, state, number, request, client_id, created, sweep, varied, together, "
                "key, priority, deadline, limits, notify, submitter) "
                "VALUES (?,?,'pending',0,?,?,?,?,?,?,?,?,?,?,?,?)",
                values,
            )
            if key is not None:
                database.execute("INSERT INTO keys VALUES (?,?,?,?)", (key, id, digest, now))
            place = added.lastrowid or 0
            chosen = place - priority * _PRIORITY_STEP
            if front:
                (least,) = database.execute("SELECT min(number) FROM jobs WHERE state = 'pending'").fetchone()
                chosen = min(float(-place), least - 1)
            chosen = chosen if number is None else number
            database.execute("UPDATE jobs SET number = ? WHERE id = ?", (chosen, id))
        return self.get(id)

    def of_key(self, key: str, digest: str) -> Job | None:
        """The job that was queued with a client's key, None for a new key. Raises KeyTakenError if it was queued for
        another request, or removed.
        """
        with self._explained():
            row = self._database.execute("SELECT job, digest FROM keys WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        if row["digest"] != digest:
            raise KeyTakenError(f"key {key!r} was used for another request, job {row['job']}; choose a new key")
        if (job := self.find(row["job"])) is None:
            raise KeyTakenError(f"the job of key {key!r} has ended and was removed; choose a new key to repeat it")
        return job

    def find(self, id: str) -> Job | None:
        return next(iter(self._select("WHERE id = ?", (id,))), None)

    def get(self, id: str) -> Job:
        """Raises UnknownJobError."""
        if (job := self.find(id)) is None:
            raise UnknownJobError(f"there is no job {id}; it may have been removed")
        return job

    def pending(self) -> list[Job]:
        """Waiting jobs, the next one first."""
        return self._select("WHERE state = 'pending' ORDER BY number, sequence")

    def running(self) -> list[Job]:
        """Running jobs, oldest first."""
        return self._select("WHERE state = 'running' ORDER BY started, sequence")

    def unfinished(self, text: str) -> list[Job]:
        """Running, waiting and resumable jobs whose request contains a text, ignoring case."""
        states = (*ACTIVE, "paused", "interrupted")
        pattern = re.sub(r"([%_\\])", r"\\\1", json.dumps(text)[1:-1])
        return self._select(
            f"WHERE state IN ({_marks(states)}) AND request LIKE ? ESCAPE '\\'", (*states, f"%{pattern}%")
        )

    def sweeps(self) -> dict[str, dict[JobState, int]]:
        """The number of runs by state, of each sweep, the newest first."""
        found: dict[str, dict[JobState, int]] = {}
        with self._explained():
            rows = self._database.execute(
                "SELECT sweep, state, count(*), min(created) AS since FROM jobs WHERE sweep IS NOT NULL "
                "GROUP BY sweep, state ORDER BY since DESC"
            ).fetchall()
        for sweep, state, count, _ in rows:
            found.setdefault(sweep, {})[state] = count
        return found

    def of_sweep(self, sweep: str) -> list[Job]:
        """The runs of a sweep, in its order."""
        return self._select("WHERE sweep = ? ORDER BY sequence", (sweep,))

    def of_run(self, run: str) -> list[Job]:
        """The jobs that train a run or have trained it, oldest first."""
        return self._select("WHERE run = ? ORDER BY sequence", (run,))

    def about(self, run: str) -> list[Job]:
        """The jobs that draw with the LoRAs of a run or evaluate them: active ones, then ended ones, the last first."""
        return self._select(
            "WHERE kind IN ('draw', 'evaluate') AND json_extract(request, '$.run') = ? "
            "ORDER BY ended IS NOT NULL, ended DESC, number, sequence",
            (run,),
            columns=_LISTED_COLUMNS,
        )

    def active(self, limit: int, offset: int = 0, states: Collection[JobState] = ACTIVE) -> list[Job]:
        """Running jobs, oldest first, then waiting ones in queue order, without the graphs of requests."""
        return self._select(
            f"WHERE state IN ({_marks(states)}) ORDER BY state = 'pending', "
            "CASE state WHEN 'running' THEN started ELSE number END, sequence LIMIT ? OFFSET ?",
            (*states, limit, offset),
            columns=_LISTED_COLUMNS,
        )

    def ended(
        self, limit: int | None = None, offset: int = 0, states: Collection[JobState] = ENDED, *, newest: bool = True
    ) -> list[Job]:
        """Ended jobs, without the graphs of their requests, sorted by end, newest or oldest first."""
        order = "DESC" if newest else "ASC"
        return self._select(
            f"WHERE state IN ({_marks(states)}) ORDER BY ended {order}, sequence {order} LIMIT ? OFFSET ?",
            (*states, -1 if limit is None else limit, offset),
            columns=_LISTED_COLUMNS,
        )

    def lines(self, states: Collection[JobState]) -> list[Job]:
        """All jobs in some states in queue order, without reading large columns."""
        rest = f"WHERE state IN ({_marks(states)}) ORDER BY number, sequence"
        return self._select(rest, (*states,), columns="id, kind, state, number, created, started, ended")

    def counts(self) -> dict[JobState, int]:
        """Number of jobs by state, zeros included."""
        with self._explained():
            found = dict(self._database.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in STATES}

    def queue_counts(self) -> dict[str, int]:
        """Numbers of running and waiting jobs."""
        counts = self.counts()
        return {state: counts[state] for state in ACTIVE}

    def overdue(self) -> list[Job]:
        """Waiting jobs whose deadline has passed."""
        return self._select("WHERE deadline <= ? AND state = 'pending'", (time.time(),), columns=_LISTED_COLUMNS)

    def oldest_wait_s(self) -> float:
        """How long the oldest waiting job waits, in seconds; 0 if none does."""
        with self._explained():
            (created,) = self._database.execute("SELECT min(created) FROM jobs WHERE state = 'pending'").fetchone()
        return 0.0 if created is None else max(0.0, time.time() - created)

    def claim(self, device: str) -> list[Job]:
        """Start the next waiting job on a device, and those that train together with it; empty if there is none.
        Evaluations that nobody asked for come after all others, and measurements after these.
        """
        with self._writing() as database:
            row = database.execute(
                "SELECT id, together FROM jobs WHERE state = 'pending' "
                f"ORDER BY kind = 'measure', {_GIVES_WAY}, number, sequence LIMIT 1"
            ).fetchone()
            if row is None:
                return []
            rows = database.execute(
                "SELECT id FROM jobs WHERE id = ? OR (state = 'pending' AND together = ?) ORDER BY number, sequence",
                tuple(row),
            ).fetchall()
            ids = [id for (id,) in rows]
            database.execute(
                "UPDATE jobs SET state = 'running', started = ?, ended = NULL, error = NULL, outputs = '{}', "
                f"messages = '[]', attempts = attempts + 1, worker = ? WHERE id IN ({_marks(ids)})",
                (time.time(), device, *ids),
            )
        return [self.get(id) for id in ids]

    def finish(
        self,
        id: str,
        state: JobState,
        *,
        outputs: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        messages: Sequence[Sequence[Any]] = (),
        attempt: int | None = None,
    ) -> Job:
        """End a job in a state of `ENDED`; with the number of an attempt, only if that one is running. Raises
        UnknownJobError if it was removed.
        """
        now = time.time()
        with self._writing() as database:
            database.execute(
                "UPDATE jobs SET spent_s = spent_s + CASE state WHEN 'running' THEN max(0, ? - started) ELSE 0 END, "
                "state = ?, ended = ?, outputs = ?, error = ?, messages = ? "
                "WHERE id = ? AND (? IS NULL OR (attempts = ? AND state = 'running'))",
                (
                    *(now, state, now, json.dumps(outputs or {}), None if error is None else json.dumps(error)),
                    *(json.dumps(messages), id, attempt, attempt),
                ),
            )
            database.execute(
                "DELETE FROM jobs WHERE sequence IN (SELECT sequence FROM (SELECT sequence, row_number() OVER newest "
                "AS place, sum(length(request) + length(outputs) + length(messages)) OVER newest AS size FROM jobs "
                f"WHERE state IN ({_marks(_REMOVABLE)}) WINDOW newest AS (ORDER BY ended DESC, sequence DESC)) "
                "WHERE place > ? OR (place > 1 AND size > ?))",
                (*_REMOVABLE, self._most_ended, MOST_ENDED_BYTES),
            )
        return self.get(id)

    def set_run(self, id: str, run: str) -> None:
        with self._writing() as database:
            database.execute("UPDATE jobs SET run = ? WHERE id = ?", (run, id))

    def requeue(self, id: str, *, losses: int = 0) -> Job:
        """Queue an ended job again, at its place. Raises UnknownJobError, and JobStateError if it has not ended."""
        with self._writing() as database:
            job = self.get(id)
            if job.state not in ENDED:
                raise JobStateError(f"a job that is {job.state} cannot be queued again; wait until it has ended")
            database.execute(
                "UPDATE jobs SET state = 'pending', ended = NULL, error = NULL, losses = ? WHERE id = ?", (losses, id)
            )
        return self.get(id)

    def move(self, id: str, front: bool) -> Job:
        """Move a waiting job to the front or the end. Raises UnknownJobError and JobStateError."""
        with self._writing() as database:
            job = self.get(id)
            if job.state != "pending":
                raise JobStateError(f"only a waiting job can be moved, and this one is {job.state}")
            least, most = database.execute(
                "SELECT min(number), max(number) FROM jobs WHERE state = 'pending'"
            ).fetchone()
            number = min(least, 0.0) - 1 if front else most + 1
            database.execute("UPDATE jobs SET number = ? WHERE id = ?", (number, id))
        return self.get(id)

    def remove(self, ids: Collection[str]) -> list[str]:
        """Remove jobs that are not running; returns the removed ids."""
        removed = []
        with self._writing() as database:
            for id in ids:
                if database.execute("DELETE FROM jobs WHERE id = ? AND state != 'running'", (id,)).rowcount:
                    removed.append(id)
        return removed

    def add_notice(self, job: Job, body: Mapping[str, Any]) -> None:
        """Store a notice of a job that has a `notify`, besides those of its states, unless very many wait."""
        with self._writing() as database:
            (waiting,) = database.execute("SELECT count(*) FROM notices WHERE job = ?", (job.id,)).fetchone()
            if waiting < MOST_NOTICES:
                values = (job.id, job.notify, time.time(), json.dumps({"job": job.id, "key": job.key, **body}))
                database.execute("INSERT INTO notices (job, url, created, body) VALUES (?,?,?,?)", values)

    def due_notices(self, limit: int) -> list[dict[str, Any]]:
        """The first notice of each job, if it is due: `sequence`, `job`, `url`, `created`, `body`, `tries`."""
        now = time.time()
        with self._explained():
            rows = self._database.execute(
                "SELECT sequence, job, url, created, body, tries FROM notices WHERE sequence IN "
                "(SELECT min(sequence) FROM notices GROUP BY job) AND (due <= ? OR due > ?) ORDER BY due LIMIT ?",
                (now, now + MOST_NOTICE_PAUSE_S, limit),  # later ones are of a clock that was set back
            ).fetchall()
        return [dict(row) for row in rows]

    def end_notice(self, sequence: int) -> None:
        """Forget a notice that was received, or given up."""
        with self._writing() as database:
            database.execute("DELETE FROM notices WHERE sequence = ?", (sequence,))

    def delay_notice(self, sequence: int, seconds: float) -> None:
        """Note a failed attempt; the next one is due after `seconds`, at most `MOST_NOTICE_PAUSE_S`."""
        with self._writing() as database:
            due = time.time() + min(seconds, MOST_NOTICE_PAUSE_S)
            database.execute("UPDATE notices SET tries = tries + 1, due = ? WHERE sequence = ?", (due, sequence))

    def set_measurement(self, subject: str, found: Mapping[str, Any]) -> None:
        """Store the values of a measurement, with its time as `measured`, unless those of the last week are faster.

        Other programs make steps slower, and nothing makes them faster.
        """
        with self._writing() as database:
            kept = database.execute(
                "SELECT found FROM measurements WHERE subject = ? AND measured > ?", (subject, time.time() - _FASTEST_S)
            ).fetchone()
            if kept is not None and json.loads(kept["found"])["seconds_per_step"] <= found["seconds_per_step"]:
                return
            database.execute(
                "INSERT OR REPLACE INTO measurements (subject, found, measured) VALUES (?, ?, ?)",
                (subject, json.dumps(found), time.time()),
            )

    def measurement(self, subject: str) -> dict[str, Any] | None:
        """The kept values of a measured subject, or None."""
        with self._explained():
            row = self._database.execute(
                "SELECT found, measured FROM measurements WHERE subject = ?", (subject,)
            ).fetchone()
        return None if row is None else {**json.loads(row["found"]), "measured_at": row["measured"]}

    def draft(self, dataset: str) -> tuple[dict[str, Any], int]:
        """What is chosen for a training on a dataset that is not queued yet, and how often it was stored."""
        with self._explained():
            row = self._database.execute("SELECT draft, version FROM drafts WHERE dataset = ?", (dataset,)).fetchone()
        return ({}, 0) if row is None else (json.loads(row["draft"]), row["version"])

    def set_draft(self, dataset: str, draft: Mapping[str, Any] | None) -> int:
        """Store the draft of a dataset, and return its version, from 1; None removes it."""
        with self._writing() as database:
            if draft is None:
                database.execute("DELETE FROM drafts WHERE dataset = ?", (dataset,))
            else:
                database.execute(
                    "INSERT INTO drafts (dataset, draft) VALUES (?, ?) "
                    "ON CONFLICT (dataset) DO UPDATE SET draft = excluded.draft, version = version + 1",
                    (dataset, json.dumps(draft)),
                )
        return self.draft(dataset)[1]

    def _select(self, rest: str, values: Sequence[Any] = (), *, columns: str = _COLUMNS) -> list[Job]:
        with self._explained():
            rows = self._database.execute(f"SELECT {columns} FROM jobs {rest}", tuple(values)).fetchall()
        return [_job(row) for row in rows]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, rolled back if the block raises."""
        with self._explained():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Converts SQLite's errors to StoreErrors."""
        try:
            yield
        except sqlite3.Error as error:
            raise _explained(self._path, error) from error


def jobs_in(path: Path) -> list[Job]:
    """The jobs in a database that another process may be writing, in their order; it may be a stranger's, so that it
    is only read, and read in bounded time. Raises StoreError.
    """
    database = None
    try:
        # Without its log nobody has it open, and reading must not make one.
        how = "mode=ro" if path.with_name(f"{path.name}-wal").exists() else "mode=ro&immutable=1"
        database = sqlite3.connect(f"file:{quote(str(path.absolute()))}?{how}", uri=True, timeout=1.0)
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_WAITING_BYTES)
        database.set_progress_handler(
            itertools.chain(itertools.repeat(0, _MOST_LOOKS), itertools.repeat(1)).__next__, 1000
        )
        database.execute("PRAGMA trusted_schema = OFF")
        database.row_factory = sqlite3.Row
        kind = database.execute("SELECT type FROM sqlite_master WHERE name = 'jobs'").fetchone()
        if kind is None or kind[0] != "table":
            raise StoreError(f"{path} has no jobs; move it away")
        found = [_job(row) for row in database.execute(f"SELECT {_SWEEP_COLUMNS} FROM jobs ORDER BY number, sequence")]
        for job in found:
            objects = isinstance(job.request, dict) and isinstance(job.varied, dict)
            if not (isinstance(job.id, str) and job.state in STATES and objects):
                raise ValueError("a job without id, state, request or settings")
            if not isinstance(job.error, dict | None):
                raise ValueError("an error that is not an object")
        return found
    except sqlite3.Error as error:
        raise _explained(path, error) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise StoreError(f"{path} is damaged ({error}); move it away") from error
    finally:
        if database is not None:
            database.close()


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    for name in _JSON:
        if values.get(name) is not None:
            values[name] = json.loads(values[name])
    return Job(**values)


def _free_bytes(path: Path) -> float:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return math.inf


def _explained(path: Path, error: sqlite3.Error) -> StoreError:
    code = getattr(error, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary == sqlite3.SQLITE_FULL or (primary in _DISK and _free_bytes(path) < _LEAST_FREE):
        return StoreError(f"the disk with {path} is full, nothing was changed; free some space", is_full=True)
    if primary in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return StoreError(f"{path} is damaged ({error}); restore it from a copy, or move it away to start without jobs")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return StoreError(f"{path} cannot be written ({error}); check the permissions of its folder")
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(f"{path} is in use by another program; close it")
    return StoreError(f"{path} cannot be used ({error}), nothing was changed; check the disk")


def measurement_subject(model: str, settings: Mapping[str, Any], device: str) -> str:
    """The key of a measurement in `JobStore`; leaves out settings that do not affect the cost of a step. `settings` are
    those of training and data, `device` is a type such as `cuda`.
    """
    relevant = {**{name: setting.default for name, setting in cost_options().items()}, "resolution": None}
    chosen = {name: settings.get(name, default) for name, default in relevant.items()}
    return json.dumps({"model": model, "settings": chosen, "device": device.partition(":")[0]}, sort_keys=True)
