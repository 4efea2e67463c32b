"""A process whose attempt was given up writes nothing to a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.core.errors import OutputError
from lorasmith.core.fence import StaleAttemptError, check_fence_sometimes, fenced
from lorasmith.core.files import atomic_folder, write_atomic
from lorasmith.training.events import RolledBack
from lorasmith.training.storage.run_folder import RunFolder

ROLLED = RolledBack(step=2, to_step=1, images=(), rate_factor=0.5, message="m")


@pytest.mark.parametrize("found", ["3", None, "", "20"])
def test_a_late_process_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    monkeypatch.setattr("lorasmith.core.fence._PAUSE_S", 0.0)
    note, target, folder = tmp_path / "attempts" / "job", tmp_path / "lora.safetensors", tmp_path / "pictures"
    write_atomic(note, "2")
    run = RunFolder(tmp_path)
    with fenced(note, 2):
        write_atomic(target, "of attempt 2")
        with atomic_folder(folder) as fresh:
            (fresh / "1.png").write_bytes(b"2")
        run(ROLLED)
        note.unlink()
        if found is not None:
            note.write_text(found)
        log = (tmp_path / "events.jsonl").read_bytes()
        with pytest.raises(StaleAttemptError, match="attempt 2 of this job was given up"):
            write_atomic(target, "late")
        with pytest.raises(StaleAttemptError), atomic_folder(folder) as fresh:
            (fresh / "1.png").write_bytes(b"late")
        with pytest.raises(StaleAttemptError):
            run(ROLLED)
    run.close()
    assert (target.read_text(), (folder / "1.png").read_bytes()) == ("of attempt 2", b"2")
    assert (tmp_path / "events.jsonl").read_bytes() == log
    write_atomic(target, "without a fence")


def test_a_note_that_cannot_be_read_is_said_and_looked_at_once_a_second(tmp_path: Path) -> None:
    note = tmp_path / "job"
    note.write_text("1")
    with fenced(note, 1):
        write_atomic(tmp_path / "x", "")
        note.write_text("2")
        check_fence_sometimes()  # it has looked just now
        note.unlink()
        note.mkdir()
        with pytest.raises(OutputError, match="cannot be read"):
            write_atomic(tmp_path / "x", "")
