"""Runs at URLs, on a machine that has nothing of them: `training.storage.run_mirror` without a run."""

from __future__ import annotations

from pathlib import Path

from lorasmith.core.errors import OutputError
from lorasmith.runs.run import RUNS, Host
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.storage.run_mirror import checked_mirror, mirror_of, restore, title_of, upload


def output_for(url: str) -> str | None:
    """The folder of a run that is mirrored to a URL and has no output: the same each time, so that it is found again.

    None for a URL that ends in /, to which the name of a new folder is added. Raises OptionError.
    """
    return None if checked_mirror(url).endswith("/") else str(RUNS / title_of(url))


def fetched(url: str, host: Host) -> tuple[Path, bool]:
    """The folder below runs/ of the run at a URL, fetched if it is further there; and whether the run is complete.

    Raises OptionError for a URL that is none of a mirror, OutputError if there is no run, or it cannot be fetched.
    """
    folder = RunFolder(RUNS / title_of(checked_mirror(url)))
    folder.claim()
    try:
        restore(url, folder, host.on_event)
        if not folder.exists:
            raise OutputError(f"{url} holds no run that Lorasmith mirrored; check the address")
        return folder.path, folder.is_done
    finally:
        folder.release()


def uploaded(path: Path, url: str) -> bool:
    """Upload the run in a folder, if it is complete; returns whether it is. Raises OptionError and OutputError."""
    folder = RunFolder(path)
    if not folder.is_done:
        return False
    upload(mirror_of(checked_mirror(url), path), folder)
    return True
