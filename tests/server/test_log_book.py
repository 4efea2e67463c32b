"""Lines of the child processes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from aiohttp.http_exceptions import BadHttpMessage

from lorasmith.server.hub import Hub, LogBook


def test_lines_are_remembered_written_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.server.hub._MOST_BYTES", 2_000)
    hub, path = Hub(), tmp_path / "user" / "server.log"
    log = LogBook(path, hub)
    with hub.subscribe(kinds={"log"}) as lines:
        for number in range(100):
            log.add("worker", f"line {number} \x1b[2J")
        assert len(lines) == 100
    assert log.entries[-1]["m"] == "line 99 \\u001b[2J" and "T" in log.entries[-1]["t"]
    assert path.read_text().splitlines()[-1].endswith("worker: line 99 \\u001b[2J")
    assert path.stat().st_size < 2_200 and (tmp_path / "user" / "server.log.1").stat().st_size < 2_200


def test_a_log_that_cannot_be_written_costs_nothing_else(tmp_path: Path) -> None:
    log = LogBook(tmp_path / "server.log", Hub())
    (tmp_path / "server.log").mkdir()
    log.add("worker", "x" * 100_000)
    assert len(log.entries[0]["m"]) == 4_000


def test_records_of_packages_are_lines_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = LogBook(tmp_path / "server.log", Hub())
    logger = logging.getLogger("aiohttp.server")

    async def main() -> None:
        with log.receiving("aiohttp", "asyncio"):
            for error in (BadHttpMessage("malformed"), ConnectionResetError("gone"), KeyError("a bug")):
                try:
                    raise error
                except Exception:
                    logger.exception("Error handling request")
            await asyncio.to_thread(logging.getLogger("asyncio").error, "of a thread")
            logger.info("nothing to see")
            await asyncio.sleep(0)

    asyncio.run(main())
    lines = [one["m"] for one in log.entries]
    assert lines[0] == "Error handling request" and lines[-2:] == ["KeyError: 'a bug'", "of a thread"]
    assert not any("malformed" in line or "gone" in line for line in lines)
    assert capsys.readouterr().err == ""
    assert logger.parent is not None and logger.parent.propagate and not logger.parent.handlers
