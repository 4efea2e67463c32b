"""What a server is started with, and where its files are."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "LOOPBACK", "REMOVED", "TOKEN_VARIABLE", "ServerConfig"]

LOOPBACK = "127.0.0.1"

FOLDER = Path("user", "lorasmith")
"""The server's own folder, relative to the base folder."""

REMOVED = FOLDER / "removed"
"""Where removed datasets, pictures and files of the editor's user are moved to, relative to the base folder."""

TOKEN_VARIABLE = "LORASMITH_TOKEN"
"""Environment variable of the token, which child processes do not inherit."""

_PYTHON = (sys.executable, "-P")  # the base folder is the children's, and none of its files is a module


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of a server.

    Attributes:
        base: base folder, absolute.
        extra_model_paths: further folders, as in `Folders.load`.
        host: address to listen on.
        port: 0 for a free one.
        token: that requests must carry; needed beyond loopback.
        names: further host names that it is reached by, such as that of a proxy.
        silence_s: seconds without a sign of life after which a child process is replaced.
        patience_s: seconds after which a cancel that is asked again kills the worker, if it does not obey.
        grace_s: seconds that a worker has to save its run when the server stops.
        worker_command, assistant_command: command lines of the child processes.
        devices: of the workers, instead of those that the assistant reports: `{"name", "title", ...}` each.
    """

    base: Path
    extra_model_paths: Path | None = None
    host: str = LOOPBACK
    port: int = 8188
    token: str | None = None
    names: Sequence[str] = ()
    silence_s: float = 60.0
    patience_s: float = 10.0
    grace_s: float = 60.0
    worker_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.worker")
    assistant_command: Sequence[str] = (*_PYTHON, "-m", "lorasmith.server.questions.answering")
    devices: Sequence[Mapping[str, Any]] | None = None

    @property
    def folder(self) -> Path:
        """The server's own folder."""
        return self.base / FOLDER

    @property
    def log(self) -> Path:
        """The log of the child processes."""
        return self.folder / "server.log"
