"""The folder of a run: whose it is, which one goes on, and what a kill or another machine leaves in it."""

from __future__ import annotations

import errno
import os
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.errors import OutputError
from lorasmith.training.events import Event, Outcome, RunFinished, Warned, encoded
from lorasmith.training.storage import run_folder
from lorasmith.training.storage.fingerprint import Fingerprint
from lorasmith.training.storage.records import RunRecord, read_history
from lorasmith.training.storage.run_folder import RunFolder, claimed_run, unfinished_run

FINGERPRINT: Fingerprint = {"config": {"seed": 3}, "data": "d"}
HERE, THERE = {"device": "cpu"}, {"device": "H100"}


def record(environment: dict[str, Any] = HERE, title: str = "cat") -> RunRecord:
    return RunRecord(title=title, fingerprint=FINGERPRINT, environment=environment)


def unfinished(path: Path, title: str = "cat") -> Path:
    """A run with a saved state, killed."""
    (path / "states" / "step-000002").mkdir(parents=True)
    (path / "run.json").write_text(record(title=title).to_text())
    return path


@pytest.fixture(autouse=True)
def with_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run states are folders here, with nothing in them to continue from."""
    monkeypatch.setattr(run_folder.RunStates, "paths", lambda self: [*self._folder_of_test.iterdir()], raising=True)
    monkeypatch.setattr(run_folder.RunStates, "newest", lambda self, tell: None)
    made = run_folder.RunStates.__init__

    def remember(self: Any, folder: Path, **options: Any) -> None:
        made(self, folder, **options)
        self._folder_of_test = folder

    monkeypatch.setattr(run_folder.RunStates, "__init__", remember)


def test_a_folder_is_moved_aside_with_no_file_in_it_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename, told = unfinished(tmp_path / "run"), Path.rename, list[Event]()

    def unless_open(self: Path, target: Path) -> Path:
        RunFolder(self).check_free()  # Windows refuses while its lock is held
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", unless_open)
    with claimed_run(RunFolder(path), record(), fresh=True, on_event=told.append) as state:
        assert state is None
    assert isinstance(told[0], Warned) and "was moved to" in told[0].message
    assert (tmp_path / "run-old-1" / "states").is_dir()


def test_a_folder_that_is_trained_in_or_cannot_be_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = unfinished(tmp_path / "run")
    with (
        RunFolder(path).claimed(),
        pytest.raises(OutputError, match="in use by a run in another process"),
        claimed_run(RunFolder(path), record(), fresh=True),
    ):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(
        OutputError, match=r"cannot be renamed to run-old-1 \(Permission denied\); close programs that use"
    ):
        RunFolder(path).move_aside()


def test_a_folder_that_cannot_be_written_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = unfinished(tmp_path / "cat-001"), Path.open

    def refuse(self: Path, mode: str = "r", **options: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert RunFolder(path).is_busy
    assert unfinished_run(tmp_path, "cat", FINGERPRINT) is None


def test_the_newest_of_a_title_is_the_one_with_the_largest_number(tmp_path: Path) -> None:
    for name in ("cat-999", "cat-1000", "cat-1000-old-1", "cat-2000x", "cats-3000", "cat.4000"):
        unfinished(tmp_path / name)
    assert unfinished_run(tmp_path, "cat", FINGERPRINT) == tmp_path / "cat-1000"
    unfinished(tmp_path / "cat_01001")
    assert unfinished_run(tmp_path, "cat", FINGERPRINT) == tmp_path / "cat_01001"
    assert unfinished_run(tmp_path, "c.t", FINGERPRINT) is None


def test_every_environment_that_a_run_went_on_in_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for environment in (HERE, THERE, HERE):
        with claimed_run(folder := RunFolder(path), record(environment), fresh=False):
            pass
    assert folder.record().all_environments == (HERE, THERE)
    assert folder.record().environment == HERE


def test_what_a_killed_run_left_half_done_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(unfinished(tmp_path))
    left = [tmp_path / ".loss.png.x.tmp", tmp_path / "states" / ".step.tmp", tmp_path / "preview.safetensors"]
    for path in left:
        path.touch()
    with folder.claimed():
        assert not any(path.exists() for path in left)
    # That of a run which ended by itself is a LoRA of this name.
    (tmp_path / "preview.safetensors").touch()
    (tmp_path / "events.jsonl").write_text(encoded(RunFinished(step=2, reason=Outcome.FINISHED)) + "\n")
    with folder.claimed():
        assert (tmp_path / "preview.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes are others there")
@pytest.mark.parametrize("name", [".lock", "states", "samples", "events.jsonl", "states/step-000001.safetensors"])
def test_a_folder_that_leads_elsewhere_is_not_used(tmp_path: Path, name: str) -> None:
    path, elsewhere = unfinished(tmp_path / "run"), tmp_path / "elsewhere"
    if name == "states":
        (path / "states").rename(elsewhere)
    (path / name).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link or a pipe"), claimed_run(RunFolder(path), record(), fresh=False):
        pass
    assert not elsewhere.is_file()
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(OutputError, match="is a link or a pipe"):
        RunFolder(path).check_free()


def test_a_log_with_bytes_that_are_no_text_is_read(tmp_path: Path) -> None:
    first, last = (encoded(Warned(message=message)).encode() for message in "AB")
    (unfinished(tmp_path) / "events.jsonl").write_bytes(first + b"\n\xff\xfe\x00\n" + last + b"\n")
    RunFolder(tmp_path).rewind(0)
    assert [event.message for event in read_history(tmp_path).of(Warned)] == ["A", "B"]


def test_a_full_disk_costs_the_events_of_that_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Disk(FileIO):
        free = 10**6

        def write(self, data: Any) -> int:
            written = super().write(data[: Disk.free])
            if not written:
                raise OSError(errno.ENOSPC, "No space left on device")
            Disk.free -= written
            return written

    folder = RunFolder(unfinished(tmp_path))
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Disk(path, "ab"))
    for message, free in (("A", 10**6), ("B", 30), ("C", 0), ("D", 10**6)):
        Disk.free = free
        folder(Warned(message=message))
    folder.release()
    monkeypatch.undo()
    assert [event.message for event in read_history(tmp_path).of(Warned)] == ["A", "D"]
