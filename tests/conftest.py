"""What many rooms' tests share: the built-in model, and no network."""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import io
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
import typer.main
from hypothesis import HealthCheck, settings
from matplotlib.figure import Figure
from PIL import Image

from lorasmith.core.extras import TINY
from lorasmith.evaluation import likeness
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, ModelFiles
from lorasmith.families.model import Model
from lorasmith.runs.memory_estimate import MemoryEstimate, estimate_memory
from lorasmith.training import processor_way
from lorasmith.training.config import TrainConfig
from lorasmith.training.memory import compilation
from lorasmith.training.results import TrainResult
from tests.covering import cases, grouped
from tests.installed import forget_extensions
from tests.refusing import refuse_network

# Examples are counted, not timed: a busy machine makes no test fail.
EXAMPLES: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("default run", max_examples=20, **EXAMPLES)
settings.register_profile("all tests", max_examples=100, **EXAMPLES)


@pytest.fixture(autouse=True)
def previews_unmeasured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither previews nor photos are compared by their features, which takes a second, unless a test asks for it."""
    if "previews_measured" not in request.fixturenames:
        monkeypatch.setattr(likeness, "is_installed", lambda: False)


@pytest.fixture(autouse=True)
def processors_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No format or number of threads is chosen by how long a step takes, or by what other programs do."""
    monkeypatch.setattr(processor_way, "_WORTH_STEPS", math.inf)
    monkeypatch.setattr(processor_way, "busy_processors", float)


@pytest.fixture
def previews_measured() -> None:
    """Runs compare their previews with the images; skips where the extra `likeness` is missing."""
    if not likeness.is_installed():
        pytest.skip("the extra likeness is not installed")


def slow_wanted(config: pytest.Config) -> bool:
    return "not slow" not in config.getoption("markexpr")


def pytest_configure(config: pytest.Config) -> None:
    if TINY.trouble:
        raise pytest.UsageError(f"most tests use the built-in model, but {TINY.trouble}")
    settings.load_profile("all tests" if slow_wanted(config) else "default run")


for _name in [*os.environ]:  # of libraries that no module above imports
    if _name.startswith(("HF_", "TRANSFORMERS_", "DIFFUSERS_", "WANDB_", "DISABLE_TELEMETRY", "DO_NOT_TRACK")):
        del os.environ[_name]
_attempts: list[str] = []
refuse_network(_attempts.append)


@pytest.fixture(autouse=True)
def network_attempts() -> Iterator[list[str]]:
    """Attempts of a test to reach other machines, which are refused; those that it leaves there are an error."""
    _attempts.clear()
    yield _attempts
    assert _attempts == []


def pytest_collection_finish() -> None:
    """The imported libraries have a million objects: the garbage collector need not visit them again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    for logger in logging.root.manager.loggerDict.values():  # six times a test, pytest enters each that does not
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch"):
            logger.propagate = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cases of `pairwise` marks; the slow ones only where slow tests are wanted, as making them takes time, too."""
    axes = {name: axis for mark in metafunc.definition.iter_markers("pairwise") for name, axis in mark.kwargs.items()}
    if axes:
        together, full = metafunc.definition.get_closest_marker("together"), slow_wanted(metafunc.config)
        rows = grouped(axes, *together.args, full=full) if together else cases(axes, full=full)
        metafunc.parametrize(tuple(axes), rows)


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """All rows of a `together` test; an error names its row."""
    mark = pyfuncitem.get_closest_marker("rows")
    if mark is None:
        return None
    axes = [name for mark in pyfuncitem.iter_markers("pairwise") for name in mark.kwargs]
    names = inspect.signature(pyfuncitem.obj).parameters
    for row in mark.args[0]:
        values = pyfuncitem.funcargs | dict(zip(axes, row.values, strict=True))
        try:
            pyfuncitem.obj(**{name: values[name] for name in names})
        except Exception as error:
            error.add_note(f"in the case {row.id}")
            raise
    return True


def _trimming() -> Callable[[], object]:
    """A call that returns free memory to the system, as glibc then does with blocks above 1 MiB when they are freed."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: it grows to 32 MiB otherwise
        return functools.partial(libc.malloc_trim, 0)
    except (OSError, AttributeError):
        return lambda: None


_trim = _trimming()
_resident = psutil.Process().memory_info


@pytest.fixture(scope="session")
def memory_kept() -> dict[str, int]:
    """Bytes that were resident when memory was returned last."""
    return {"bytes": _resident().rss}


@pytest.fixture(scope="module", autouse=True)
def memory_returned(memory_kept: dict[str, int]) -> Iterator[None]:
    """What tests have let go of is returned behind a file, once it may be 100 MiB: looking for it takes 0.1 s."""
    yield
    if _resident().rss > memory_kept["bytes"] + 100 * 2**20:
        gc.collect()
        _trim()
        memory_kept["bytes"] = _resident().rss


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases behind the first ones of a `slow_after` mark are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        for mark in item.iter_markers("slow_after"):
            test = item.nodeid.partition("[")[0]
            seen[test] += item.get_closest_marker("slow") is None
            if seen[test] > mark.args[0]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_extensions() -> Iterator[None]:
    """What a test registered is forgotten."""
    yield
    forget_extensions()


@pytest.fixture(scope="session", autouse=True)
def autograd_started() -> None:
    """Where torch compiles before the first backward pass, processes that are forked later can have none."""
    torch.ones((), requires_grad=True).backward()


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """Encodings are cached in a folder of these tests, and commands that they start find it, too."""
    with tempfile.TemporaryDirectory(prefix="lorasmith-cache-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORASMITH_CACHE_DIR", folder)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from torch's global generator is the same each time, whatever ran before."""
    torch.default_generator.manual_seed(0)  # `torch.manual_seed` asks for every kind of device, ten thousand times
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


SAVE_FIGURE = Figure.savefig


def save_blank(figure: Figure, target: Any, *, format: str, **_: Any) -> None:
    """A picture of the figure's size with nothing on it."""
    width, height = (int(inches * figure.dpi) for inches in figure.get_size_inches())
    if format == "svg":
        target.write(f'<svg viewBox="0 0 {width} {height}"></svg>')
    else:
        Image.new("RGB", (width, height)).save(target, format)


CURVE = TrainResult._curve


@functools.cache
def blank_curve() -> bytes:
    Image.new("RGB", (1080, 600)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session", autouse=True)
def figures_blank() -> Iterator[None]:
    """Figures are made but not drawn, which takes longer than a short run; loss curves are not even made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_blank)
        has_curve = lambda result: any(map(math.isfinite, result.losses))  # noqa: E731
        patch.setattr(TrainResult, "_curve", lambda one: blank_curve() if has_curve(one) else CURVE(one))
        yield


@pytest.fixture(scope="session", autouse=True)
def files_not_flushed() -> Iterator[None]:
    """Files are written, but not waited for: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def flags_made_once() -> Iterator[None]:
    """Commands that tests run in this process share their flags, whose making takes longer than most commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made, and no machine code, which takes long; nothing compiled is left to others."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def figures_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at figures."""
    monkeypatch.setattr(Figure, "savefig", SAVE_FIGURE)
    monkeypatch.setattr(TrainResult, "_curve", CURVE)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The model that comes with the package, in fp32. Nothing may change it."""
    model = load_model(BUILT_IN)
    for module in model.components.modules().values():
        module.float()
    return model


@pytest.fixture(scope="session")
def tiny_estimate() -> MemoryEstimate:
    """The memory of a training of this model on a card of 1 GiB."""
    return estimate_memory(ModelFiles(BUILT_IN), TrainConfig(), card_bytes=2**30, resolution=64)


@pytest.fixture(scope="session")
def captions(tiny: Model) -> list[Conditioning]:
    """Three prompts, encoded."""
    with tiny.text_encoder.active():
        return [tiny.text_encoder.encode(text) for text in ("a fox", "a red bus", "a green tree")]
