"""Settings of a server, and paths of its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasmith.core.folders import Folders
from lorasmith.runs.supervisor import WORKER_COMMAND, WorkerConfig

LOOPBACK = "127.0.0.1"

FOLDER = Path("user", "lorasmith")  # the server's own folder, relative to the base folder


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server."""

    base: Path  # absolute
    extra_model_paths: Path | None = None
    follow_links: bool = False  # whether links out of the base folder are followed
    host: str = LOOPBACK
    port: int = 8188  # 0: a free one
    token: str | None = None  # required beyond loopback
    names: Sequence[str] = ()  # further host names, such as that of a proxy
    pictures_from: Sequence[str] = ()  # addresses below which jobs may name pictures
    notify: str | None = None  # URL that receives notices of all jobs
    notify_hosts: Sequence[str] = ()  # further hosts that jobs may name for theirs
    notify_secret: str | None = None  # that notices are signed with
    logs_json: bool = False  # whether lines of the log are JSON objects
    silence_s: float = 60.0  # without a heartbeat, after which a child process is restarted
    patience_s: float = 10.0  # after a cancel, from which a second cancel kills the worker
    grace_s: float = 60.0  # for a worker to save its run when the server stops
    worker_command: Sequence[str] = WORKER_COMMAND
    assistant_command: Sequence[str] = WORKER_COMMAND
    devices: Sequence[Mapping[str, Any]] | None = None  # `{"name", "title", ...}` each; None: as the assistant reports

    @property
    def folder(self) -> Path:
        return self.base / FOLDER

    def folders(self) -> Folders:
        """The folders of models and images, read again. Raises OptionError, as `Folders.load`."""
        return Folders.load(self.base, extra_model_paths=self.extra_model_paths, follow_links=self.follow_links)

    def all_notify_hosts(self) -> tuple[str, ...]:
        """Hosts that notices may be sent to, with the port unless it is the usual one."""
        from lorasmith.server.notices import host_of

        return (*self.notify_hosts, *([host_of(self.notify)] if self.notify else []))

    @property
    def tokens_file(self) -> Path:
        """The digests of tokens with names."""
        return self.folder / "tokens.json"

    @property
    def address_note(self) -> Path:
        """A file with the address of the server that runs here."""
        return self.folder / "server.address"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    @property
    def workers(self) -> WorkerConfig:
        extra = self.extra_model_paths
        return WorkerConfig(
            start={
                "kinds": "server",
                "base": str(self.base),
                "extra_model_paths": None if extra is None else str(extra),
                "follow_links": self.follow_links,
            },
            cwd=self.base,
            log=self.log,
            locks=self.folder,
            fences=self.folder / "attempts",
            command=self.worker_command,
            silence_s=self.silence_s,
            patience_s=self.patience_s,
            grace_s=self.grace_s,
        )

    @property
    def assistant(self) -> WorkerConfig:
        """Of the worker without a device, which answers questions."""
        return replace(self.workers, command=self.assistant_command, grace_s=2.0)
