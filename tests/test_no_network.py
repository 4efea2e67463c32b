"""No door uses the network unless asked to: no telemetry, no look for updates, no download that nobody named.

Processes run with an audit hook that records and refuses every address but this machine's, and without the variables
that switch off downloads and telemetry of libraries. It sees sockets of Python code, not those of native code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from tests.launched import environment

FOX = BUILT_IN_BASE / "input" / "fox"

HOOK = """
import os, sys

ALLOWED = {"127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None}

def refuse(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else None  # others are files and pipes
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in ALLOWED:
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {host} {sys.argv}\\n")
        raise PermissionError(f"no network: {event} {host}")

sys.addaudithook(refuse)
"""

DOORS = f"""
from typer.testing import CliRunner
import lorasmith as ls
from lorasmith.cli.main import app
from lorasmith.runs import doctor

doctor.LITTLE_DISK = 0  # the tests' own disk may be nearly full

def run(*arguments):
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, (arguments, done.output)

model = ls.load_model("lorasmith-tiny")
data = ls.load_dataset({str(FOX)!r}, model, trigger="sks fox", progress=False)
result = ls.train(model, data, steps=2, rank=2, progress=False)
result.lora.save("fox.safetensors")
changes = {{"Train LoRA.steps": 2, "Train LoRA.batch_size": 1, "80.steps": 1, "90.steps": 1}}
ls.run_workflow("example:single_subject", changes=changes, progress=False)
for arguments in (
    ["inspect", "fox.safetensors"], ["check", "fox.safetensors"], ["doctor"], ["models"], ["nodes"],
    ["convert", "fox.safetensors", "--to", "peft", "--model", "lorasmith-tiny", "--output", "peft"],
    ["data", "check", {str(FOX)!r}], ["plan", "--model", "lorasmith-tiny", "--memory", 8],
    ["resize", "fox.safetensors", "--rank", 1, "--output", "small.safetensors"],
    ["generate", "--model", "lorasmith-tiny", "--prompt", "a fox", "--steps", 1, "--output", "pictures"],
):
    run(*arguments)
"""


@pytest.fixture
def refusing(tmp_path: Path) -> dict[str, str]:
    """The environment of a process without a network; attempts are in the file `attempts`."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    kept = environment(ATTEMPTS=str(tmp_path / "attempts"), HOME=str(tmp_path), LORASMITH_CACHE_DIR=str(tmp_path / "c"))
    kept["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "hook"), kept["PYTHONPATH"]])
    switches = ("HF_", "TRANSFORMERS_", "DIFFUSERS_", "WANDB_", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
    return {name: value for name, value in kept.items() if not name.startswith(switches)}


def attempts(folder: Path) -> str:
    file = folder / "attempts"
    return file.read_text() if file.exists() else ""


def test_the_hook_refuses_and_records(tmp_path: Path, refusing: dict[str, str]) -> None:
    code = "import socket; socket.create_connection(('198.51.100.7', 9))"
    done = subprocess.run([sys.executable, "-c", code], env=refusing, capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr and "198.51.100.7" in attempts(tmp_path)


def test_commands_graphs_and_python(tmp_path: Path, refusing: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DOORS], env=refusing, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert attempts(tmp_path) == ""


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
