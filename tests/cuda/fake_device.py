"""A process with a CUDA device that is not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.cuda.costs import Cost
from tests.cuda.tracing import Traced

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


def compiler_of_stub() -> str | None:
    """The C++ compiler that `build` takes; None if it or torch's headers are missing."""
    return shutil.which(os.environ.get("CXX", "g++")) if (TORCH / "include").is_dir() else None


def build(compiler: str, library: Path) -> None:
    """Compile `fake_cuda.cpp`."""
    flags = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{TORCH / 'include'}", f"-L{TORCH / 'lib'}"]
    libraries = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = [compiler, *flags, str(HERE / "fake_cuda.cpp"), *libraries, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


class FakeDevice:
    """The process that traces steps."""

    def __init__(self, library: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", "-m", "tests.cuda.process", str(library)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE.parents[1]
        )

    def traced(self, family: str, samples: int = 2, *, is_masked: bool = False, **settings: Any) -> Traced:
        """Steps on a small model of a family; keywords as of `tracing.traced`."""
        return self._answer(family=family, samples=samples, is_masked=is_masked, settings=settings)

    def floor(self, family: str, samples: int = 2) -> Traced:
        """The floor of a small model of a family."""
        return self._answer(family=family, samples=samples, is_masked=False, settings=None)

    def costs(
        self, name: str, side: int, samples: int = 1, *, blocks: Sequence[int] = (), **settings: Any
    ) -> dict[str, Cost]:
        """What a gradient of a model of full size costs, by kind; latents are `side` wide and high."""
        found = self._answer(
            family=name, samples=samples, is_masked=False, settings=settings, blocks=blocks, side=side
        ).costs
        return {kind: Cost(*numbers) for kind, numbers in found.items()}

    def _answer(self, **request: Any) -> Traced:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(request)}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the process ended, status {self._process.wait()}"
        found = json.loads(line)
        assert "error" not in found, found["error"]
        return Traced(**found)

    def close(self) -> None:
        self._process.communicate()  # the end of its input is its end
