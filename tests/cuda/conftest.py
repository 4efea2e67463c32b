"""A CUDA device that is not there, built once for all processes of a test run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from tests.cuda.tracing import Traced
from tests.training.random_samples import of_one_size

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fake_cuda.cpp`, compiled; skips where there is no compiler."""
    compiler, include = shutil.which(os.environ.get("CXX", "g++")), TORCH / "include"
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub of a CUDA device is built on Linux alone")
    if compiler is None or not include.is_dir():
        pytest.skip("the stub of a CUDA device needs a C++ compiler and torch's headers")
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    built = shared / "libfakecuda.so"
    with FileLock(f"{built}.lock"):
        if not built.is_file():
            flags = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{include}", f"-L{TORCH / 'lib'}"]
            libraries = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
            command = [compiler, *flags, str(HERE / "fake_cuda.cpp"), *libraries, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert not done.returncode, done.stderr
    return built


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


@pytest.fixture(scope="session")
def device(library: Path) -> Iterator[FakeDevice]:
    """A CUDA device with nothing behind it, in a process of its own."""
    fake = FakeDevice(library)
    yield fake
    fake.close()


@pytest.fixture(scope="session")
def dataset(tiny: Model) -> EncodedDataset:
    """Six samples of random latents with real captions."""
    return of_one_size(tiny)
