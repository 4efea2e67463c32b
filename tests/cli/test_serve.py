"""`lorasmith serve`: what is refused before anything listens."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.server import http_server
from lorasmith.server.server_config import ServerConfig


def serve(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["serve", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_beyond_this_computer_a_token_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(http_server, "serve", lambda config, **callbacks: seen.append(config))
    for address in ("0.0.0.0", "192.168.0.7", "::", "my-host"):
        said = serve("--base-dir", str(tmp_path), "--listen", address)
        assert f"--listen {address} would let everyone in that network train" in said
        assert "--token must have at least 12" in serve(
            "--base-dir", str(tmp_path), "--listen", address, "--token", "secret"
        )
        serve("--base-dir", str(tmp_path), "--listen", address, "--token", "a long secret")
    for address in ("127.0.0.1", "localhost", "::1"):
        serve("--base-dir", str(tmp_path), "--listen", address)
    assert [(one.host, one.token) for one in seen[:1]] == [("0.0.0.0", "a long secret")]
    assert [one.token for one in seen[4:]] == [None] * 3
    monkeypatch.setenv("LORASMITH_TOKEN", "from outside")
    serve("--base-dir", str(tmp_path), "--listen", "0.0.0.0")
    assert seen[-1].token == "from outside"


def test_the_address_is_printed_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def served(config: ServerConfig, *, started: Any, stopping: Any) -> None:
        started("http://127.0.0.1:1")
        stopping(0)
        stopping(1)

    monkeypatch.setattr(http_server, "serve", served)
    monkeypatch.setattr("webbrowser.open", opened.append)
    said = serve("--base-dir", str(tmp_path))
    assert "http://127.0.0.1:1" in said and str(tmp_path) in said and opened == []
    assert said.count("Stopping and saving") == 1
    serve("--base-dir", str(tmp_path), "--open")
    assert opened == ["http://127.0.0.1:1"]
    document = json.loads(CliRunner().invoke(app, ["serve", "--base-dir", str(tmp_path), "--json"]).stdout)
    assert document == {"address": "http://127.0.0.1:1", "base_dir": str(tmp_path)}


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = serve("--base-dir", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert "is taken by another program; end it, or choose another --port" in said
    assert "must be a folder" in serve("--base-dir", str(tmp_path / "nowhere"))
