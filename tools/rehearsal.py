"""Try what `tools.release` built as users will: in fresh environments, from the files alone, without a compiler.

Packages of others come from the index, or from uv's cache (`UV_OFFLINE=1`); Lorasmith's own come from the files, which
is checked. In each environment the demo trains, is trained again and stopped, and has to end with the same bits when it
is resumed; and the node pack is imported against its stand-in for ComfyUI. The next step is publishing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
EXTRAS = "demo,editor,gguf,heic,likeness,optimizers,video"
STEPS = 20
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")

_SAME = """
import sys
from safetensors.torch import load_file
one, other = (load_file(next(folder.glob("*.safetensors"))) for folder in map(__import__("pathlib").Path, sys.argv[1:]))
assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)
"""
_PACK = """
import importlib.util, sys
proof, pack = sys.argv[1:]
sys.path.insert(0, proof)
import stand_in
stand_in.install()
spec = importlib.util.spec_from_file_location("pack", pack + "/__init__.py")
sys.modules["pack"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(len(module.NODE_CLASS_MAPPINGS))
"""


class Environment(NamedTuple):
    """A Python, and the versions of packages that it gets."""

    python: str
    versions: str

    @property
    def constraints(self) -> Path:
        return ROOT / ("constraints-oldest.txt" if self.versions == "oldest" else "constraints.txt")


ENVIRONMENTS = (
    Environment("3.13", "newest"),
    Environment("3.11", "oldest"),
    Environment("3.12", "oldest"),
    Environment("3.11", "newest"),
    Environment("3.12", "newest"),
)
"""The oldest versions are for Python 3.11 and 3.12, as constraints-oldest.txt says."""


def rehearse(files: Path) -> Iterator[str]:
    """Lines of a table in Markdown, one for each environment. Raises RuntimeError if something fails in one."""
    _find_pythons()
    yield "| Python | packages | torch | installed | demo | stopped | resumed |"
    yield "|---|---|---|---|---|---|---|"
    for one in ENVIRONMENTS:
        with tempfile.TemporaryDirectory(prefix="lorasmith-rehearsal-") as folder:
            found = _tried(one, files, Path(folder))
        seconds = " | ".join(f"{value:.0f} s" for value in found.seconds.values())
        yield f"| {one.python} | {one.versions}, {found.packages} | {found.torch} | {seconds} |"


def _find_pythons() -> None:
    """Raise RuntimeError unless each Python is installed, before the first of them takes its minutes."""
    wanted = sorted({one.python for one in ENVIRONMENTS})
    command = (sys.executable, "-m", "uv", "--quiet", "python", "find", "--no-python-downloads")
    found = {one: subprocess.run([*command, one], capture_output=True, check=False).returncode == 0 for one in wanted}
    if missing := [one for one, is_there in found.items() if not is_there]:
        raise RuntimeError(f"uv finds no Python {', '.join(missing)}; put them on the path")


class Tried(NamedTuple):
    """What was seen in an environment."""

    packages: int
    torch: str
    seconds: Mapping[str, float]


def _tried(one: Environment, files: Path, folder: Path) -> Tried:
    python, lorasmith = folder / "env" / "bin" / "python", folder / "env" / "bin" / "lorasmith"
    environ = _bare_environment(folder)
    seconds = {}
    uv = [sys.executable, "-m", "uv", "--quiet"]
    began = time.monotonic()
    _run(*uv, "venv", "--python", one.python, str(folder / "env"), cwd=folder)
    wheels = {path.name.partition("-")[0]: path for path in files.glob("*.whl")}
    named = [f"lorasmith[{EXTRAS}] @ {wheels.pop('lorasmith').as_uri()}", *map(str, wheels.values())]
    install = ("pip", "install", "--no-build", "--python", str(python), "--constraint", str(one.constraints))
    _run(*uv, *install, *named, cwd=folder)
    seconds["installed"] = time.monotonic() - began
    frozen = _run(*uv, "pip", "freeze", "--python", str(python), cwd=folder).splitlines()
    if elsewhere := [line for line in frozen if line.startswith("lorasmith") and files.as_uri() not in line]:
        raise RuntimeError(f"these are not installed from {files}: {elsewhere}")

    demo = (str(lorasmith), "demo", "--steps", str(STEPS), "--output")
    seconds["demo"] = _timed(*demo, "whole", cwd=folder, env=environ)
    began = time.monotonic()
    _stop(*demo, "stopped", folder=folder, environ=environ)
    seconds["stopped"] = time.monotonic() - began
    seconds["resumed"] = _timed(str(lorasmith), "resume", "stopped", "--as-recorded", cwd=folder, env=environ)
    _run(str(python), "-c", _SAME, "whole", "stopped", cwd=folder, env=environ)
    _run(sys.executable, "-m", "zipfile", "-e", str(next(files.glob("lorasmith-nodes-*.zip"))), "pack", cwd=folder)
    proof = ROOT / "comfyui-lorasmith" / "proof"
    _run(str(python), "-c", _PACK, str(proof), "pack", cwd=folder, env=environ)
    if (called := folder / "compilers").exists():
        raise RuntimeError(f"a compiler was called: {called.read_text()}")
    torch = next(line.partition("==")[2] for line in frozen if line.startswith("torch=="))
    return Tried(len(frozen), torch, seconds)


def _bare_environment(folder: Path) -> dict[str, str]:
    """Variables of a new user, whose compilers fail and leave a file `compilers`."""
    tools = folder / "tools"
    tools.mkdir()
    for name in COMPILERS:
        script = tools / name
        script.write_text(f'#!/bin/sh\necho "{name} $*" >> {shlex.quote(str(folder / "compilers"))}\nexit 1\n')
        script.chmod(0o755)
    ours = re.compile(r"PYTHON|LORASMITH|VIRTUAL_ENV|HF_|XDG_|MPL")
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    path = os.pathsep.join([str(tools), "/usr/bin", "/bin"])
    # Two runs are compared to the bit, and each would choose its threads by what other programs leave free.
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, "HOME": str(folder / "home"), "PATH": path, **fixed}


def _run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _timed(*command: str, cwd: Path, env: Mapping[str, str]) -> float:
    began = time.monotonic()
    _run(*command, cwd=cwd, env=env)
    return time.monotonic() - began


def _stop(*command: str, folder: Path, environ: Mapping[str, str]) -> None:
    """Run a training, and stop it after its third step."""
    events = folder / command[-1] / "events.jsonl"
    with subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        while run.poll() is None and not (events.is_file() and _steps(events) >= 3):
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        output = run.communicate()[0].decode()
    if run.returncode != 128 + signal.SIGTERM or _steps(events) >= STEPS:
        raise RuntimeError(f"{shlex.join(command)} was to be stopped, but ended with {run.returncode}:\n{output}")


def _steps(events: Path) -> int:
    lines = events.read_text("utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return sum(one["event"] == "StepDone" for one in found)
