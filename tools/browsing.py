"""A real `lorasmith serve` and a Chromium to open its page in, for tests, benchmarks and pictures."""

from __future__ import annotations

import base64
import contextlib
import mimetypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Of Chromium, which has neither a display nor a network."""

_STOP_S = 90.0


@dataclass(frozen=True)
class Served:
    """A server that runs: its address, with a slash at its end, and its process id."""

    address: str
    pid: int


@contextlib.contextmanager
def served(base: Path, *options: str) -> Iterator[Served]:
    """Inside the context, `lorasmith serve` runs on a base folder, with further options; its end is that of Ctrl-C."""
    base.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "lorasmith", "serve", "--base-dir", str(base), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " is at " not in line:
            process.kill()
            raise RuntimeError(f"the server did not start: {line}{process.stdout.read()}")
        yield Served(line.split()[3].rstrip("/") + "/", process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def chromium() -> str | None:
    """The Chromium of this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


@contextlib.contextmanager
def opened_browser() -> Iterator[Any]:
    """Inside the context, a Chromium of Playwright's is open, without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


def drop(page: Any, files: Sequence[Path], *, onto: str = "main") -> None:
    """Drop files on a part of a page, as somebody who drags them out of a folder."""
    found = [
        [path.name, mimetypes.guess_type(path)[0] or "", base64.b64encode(path.read_bytes()).decode()] for path in files
    ]
    transfer = page.evaluate_handle(
        """files => {
          const transfer = new DataTransfer();
          for (const [name, type, content] of files) {
            const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
            transfer.items.add(new File([bytes], name, { type }));
          }
          return transfer;
        }""",
        found,
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event(onto, event, {"dataTransfer": transfer})
