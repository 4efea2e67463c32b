"""The folder of a run: everything needed to repeat it, everything that happened, everything that came out.

run.json        configuration, model, data and versions
events.jsonl    one event a line, as it happened
<name>.safetensors, loss.png    what came out
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from lorasmith.core.errors import OutputError
from lorasmith.core.files import ensure_folder, write_atomic
from lorasmith.training.events import Event, as_json

__all__ = ["RunFolder", "versions"]


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    packages = ("lorasmith", "torch", "diffusers", "transformers", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


class RunFolder:
    """Writes a run's records.

    Args:
        path: the folder; it is made if missing.
        record: content of `run.json`.

    Raises:
        OutputError: it cannot be written.
    """

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        self.path = ensure_folder(path)
        if (path / "run.json").exists():
            raise OutputError(f"{path} already holds a run; choose another output, or move that one away")
        write_atomic(path / "run.json", json.dumps({**record, "versions": versions()}, indent=2, ensure_ascii=False))
        self._events: TextIO | None = None

    def __call__(self, event: Event) -> None:
        """Append an event; as an event handler."""
        try:
            if self._events is None:
                self._events = (self.path / "events.jsonl").open("w", encoding="utf-8")
            self._events.write(json.dumps(as_json(event)) + "\n")
        except OSError as error:
            raise OutputError(
                f"{self.path / 'events.jsonl'} cannot be written ({error.strerror}); free some space and start again"
            ) from error

    def close(self) -> None:
        """Flush and close the event log."""
        if self._events is not None:
            self._events.close()
            self._events = None
