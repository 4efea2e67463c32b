"""Independent clients against a real server; the interpreter of their environment is in LORASMITH_CLIENTS_PYTHON."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launched import environment
from tests.peers.protocol_clients import CLIENTS

ROOT = Path(__file__).parents[3]
PYTHON = os.environ.get("LORASMITH_CLIENTS_PYTHON")
MODULES = {
    "comfyui_workflow_client": "comfyuiclient",
    "comfyui_autograph": "autograph",
    "comfyui_cli": "comfyui.comfyui_cli",
}
"""Names of modules, where they are not the client's."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a worker."""
    base = tmp_path_factory.mktemp("base")
    command = [sys.executable, "-m", "lorasmith", "serve", "--base-dir", str(base), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(PYTHONUNBUFFERED="1")) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert "http://" in line, line
            yield f"http://{line.partition('http://')[2].split()[0]}"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_draws_a_picture(client: str, address: str) -> None:
    if PYTHON is None:
        pytest.skip("LORASMITH_CLIENTS_PYTHON names no interpreter with the clients")
    module = MODULES.get(client, client)
    if subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{client} is not installed for {PYTHON}")
    script = ROOT / "tests" / "peers" / "protocol_clients.py"
    ran = subprocess.run(
        [PYTHON, str(script), client, address], capture_output=True, text=True, check=False, timeout=180
    )
    print(f"{client}: {ran.stdout.strip().splitlines()[-1:]}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
