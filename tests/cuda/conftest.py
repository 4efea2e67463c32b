"""A CUDA device that is not there, built once for all processes of a test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from lorasmith.data.dataset import EncodedDataset
from lorasmith.families.model import Model
from tests.cuda.fake_device import FakeDevice, build, compiler_of_stub
from tests.training.random_samples import of_one_size


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fake_cuda.cpp`, compiled; skips where there is no compiler."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub of a CUDA device is built on Linux alone")
    if (compiler := compiler_of_stub()) is None:
        pytest.skip("the stub of a CUDA device needs a C++ compiler and torch's headers")
    own = tmp_path_factory.getbasetemp()
    built = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "libfakecuda.so"
    with FileLock(f"{built}.lock"):
        if not built.is_file():
            build(compiler, built)
    return built


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
