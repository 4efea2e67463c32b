"""No door uses the network unless asked to: no telemetry, no look for updates, no download that nobody named.

`conftest.py` holds all tests of the default run to it, without the variables that switch off downloads and telemetry of
libraries. Here are processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.launched import environment

HOOK = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tests.refusing import refuse_network
sys.path.pop(0)
refuse_network(lambda attempt: print(attempt, sys.argv, file=open(os.environ["ATTEMPTS"], "a")))
"""


@pytest.fixture
def refusing(tmp_path: Path) -> dict[str, str]:
    """The environment of a process without a network; attempts are in the file `attempts`."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    kept = environment(ATTEMPTS=str(tmp_path / "attempts"), HOME=str(tmp_path), LORASMITH_CACHE_DIR=str(tmp_path / "c"))
    return {**kept, "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), kept["PYTHONPATH"]])}


def attempts(folder: Path) -> str:
    file = folder / "attempts"
    return file.read_text() if file.exists() else ""


def test_the_hook_refuses_and_records(tmp_path: Path, refusing: dict[str, str]) -> None:
    code = "import socket; socket.create_connection(('198.51.100.7', 9))"
    done = subprocess.run([sys.executable, "-c", code], env=refusing, capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr and "198.51.100.7" in attempts(tmp_path)


def test_the_server_and_its_page(tmp_path: Path, refusing: dict[str, str]) -> None:
    command = [sys.executable, "-m", "lorasmith", "serve", "--port", "0", "--json", "--base-dir", str(tmp_path)]
    with subprocess.Popen(command, env=refusing, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            text = ""
            while not text.rstrip().endswith("}"):
                line = server.stdout.readline()
                assert line, text
                text += line
            address = json.loads(text)["address"]
            for path in ("/", "/object_info", "/lorasmith/v1/models"):
                with urllib.request.urlopen(address + path) as answer:
                    assert answer.status == 200 and answer.read()
        finally:
            server.terminate()
    assert attempts(tmp_path) == ""
