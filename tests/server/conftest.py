"""Tests that are coroutines, the servers that are open while one runs, and a finished run of the page."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lorasmith.core.folders import Folders
from lorasmith.data.data_config import ImageSource
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from tests.server.api_server import api
from tests.server.fake_server import serving

SETTINGS = {
    "rank": 2,
    "targets": "attention",
    "steps": 4,
    "save_every": 2,
    "validation_share": 0.5,
    "validate_every": 2,
}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a coroutine, with those of its fixtures that are servers entered for it."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None

    async def run() -> None:
        async with contextlib.AsyncExitStack() as opened:
            given: dict[str, Any] = {}
            for name in pyfuncitem._fixtureinfo.argnames:
                value = pyfuncitem.funcargs[name]
                is_server = isinstance(value, contextlib.AbstractAsyncContextManager)
                given[name] = await opened.enter_async_context(value) if is_server else value
            await pyfuncitem.obj(**given)

    asyncio.run(run())
    return True


@pytest.fixture
def server(tmp_path: Path) -> Any:
    """A server whose jobs nobody runs."""
    return serving(tmp_path)


@pytest.fixture
def client(tmp_path: Path) -> Any:
    """The API with in-process answers."""
    return api(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the dataset `dog` and the finished run `runs/dog-001`; not to be changed."""
    base = tmp_path_factory.mktemp("trained") / "base"
    folder = base / "input" / "dog"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a dog on grass")
    previews = {"previews": "a dog", "preview_steps": 1, "preview_every": 4, "preview_strengths": "1"}
    settings = {"resolution": 32, "trigger": "sks dog", **SETTINGS, **previews}
    output = str(base / "runs" / "dog-001")
    spec = RunSpec(sources=(ImageSource(str(folder)),), model="lorasmith-tiny", output=output, settings=settings)
    run(plan(spec, Host()), Host())
    return base


@pytest.fixture
def base(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the current folder, as it is the assistant's."""
    copy = Path(shutil.copytree(trained, tmp_path / "base"))
    record = copy / "runs" / "dog-001" / "run.json"
    record.write_text(record.read_text().replace(str(trained), str(copy)))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def installation(base: Path) -> Folders:
    return Folders(base)
