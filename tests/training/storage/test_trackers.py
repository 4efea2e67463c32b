"""Numbers handed to trackers, read back; and trackers that are missing, refuse or fail."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.training.events import Event, Outcome, RunFinished, StepDone, Validated, Warned
from lorasmith.training.storage.trackers import Tracker, tracker_for

CONFIG = {"rank": 8, "alpha": None, "previews": "a lion", "existing_lora": "/home/me/a.safetensors", "private": False}


def step(number: int) -> StepDone:
    return StepDone(step=number, loss=1 / number, grad_norm=0.5, learning_rate=1e-3)


def look(number: int) -> Validated:
    return Validated(
        step=number, loss=0.4, base_loss=0.5, low=-0.2, high=-0.1, best=True, best_step=number, verdict="still learning"
    )


def refuse(event: Event) -> None:
    raise AssertionError(f"nothing is wrong, but {event}")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


@needs_tensorboard
def test_tensorboard_shows_what_it_was_told(tmp_path: Path) -> None:
    tracker = tracker_for("tensorboard", tmp_path, "fox", CONFIG, on_event=refuse)
    for event in (step(1), step(2), look(2), Warned(message="x"), RunFinished(step=2, reason=Outcome.FINISHED)):
        tracker(event)
    tracker.close()
    tracker.close()
    resumed = tracker_for("tensorboard", tmp_path, "fox", CONFIG, on_event=refuse)
    resumed(step(4))
    resumed.close()
    assert all(path.is_file() for path in (tmp_path / "tensorboard").iterdir()), "one run, not several below it"
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(1, 1.0), (2, 0.5), (4, 0.25)]
    assert found["train/learning_rate"] == [(number, pytest.approx(1e-3)) for number in (1, 2, 4)]
    assert found["train/grad_norm"] == [(1, 0.5), (2, 0.5), (4, 0.5)]
    assert found["validation/loss"] == [(2, pytest.approx(0.4))] and "validation/base_loss" in found


class Logs:
    """A W&B run that remembers; with `broken` it fails from that step on."""

    def __init__(self, broken: int | None = None) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0
        self.broken = broken

    def log(self, values: dict[str, float], step: int) -> None:
        if self.broken is not None and step >= self.broken:
            raise ConnectionError("no route to host.\nsecond line")
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package; what `init` was called with."""
    calls: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Logs:
        calls.append(arguments)
        return Logs()

    def setup() -> SimpleNamespace:
        found = SimpleNamespace(project=os.environ.get("WANDB_PROJECT"), run_name=os.environ.get("WANDB_NAME"))
        return SimpleNamespace(settings=found)

    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    module = ModuleType("wandb")
    module.setup = setup  # type: ignore[attr-defined]
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path: Path, wandb: list[dict[str, Any]]) -> None:
    for _ in range(2):
        tracker = tracker_for("wandb", tmp_path / "one", "fox", CONFIG, on_event=refuse)
        tracker(step(1))
        tracker.close()
    tracker_for("wandb", tmp_path / "two", "fox", CONFIG, on_event=refuse).close()
    first, second, other = wandb
    assert first["id"] == second["id"] != other["id"]
    assert (first["project"], first["name"], first["resume"]) == ("lorasmith", "fox", "allow")
    assert first["config"] == CONFIG
    assert first["settings"]["disable_git"] and first["settings"]["disable_code"]


def test_a_private_run_keeps_paths_and_prompts_from_the_network_and_wandbs_own_settings_count(
    tmp_path: Path, wandb: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "foxes")
    monkeypatch.setenv("WANDB_NAME", "monday")
    tracker_for("wandb", tmp_path, "fox", CONFIG | {"private": True}, on_event=refuse).close()
    assert wandb[0]["config"] == {"rank": 8, "alpha": None, "private": True}
    assert (wandb[0]["project"], wandb[0]["name"]) == ("foxes", "monday")


def test_a_tracker_that_fails_says_so_once_and_is_left_alone() -> None:
    said: list[Event] = []
    logs = Logs(broken=2)
    tracker = Tracker(logs, "Weights & Biases", said.append)
    for event in (step(1), step(2), look(2), step(3)):
        tracker(event)
    tracker.close()
    assert [number for _, number in logs.logged] == [1] and logs.finished == 0
    [warning] = said
    assert isinstance(warning, Warned)
    assert warning.message == ("Weights & Biases failed (no route to host) and is disabled; training continues.")


def test_a_warning_that_comes_back_to_the_tracker_goes_nowhere() -> None:
    said: list[Event] = []

    def tell(event: Event) -> None:
        said.append(event)
        tracker(event)
        tracker(step(9))

    tracker = Tracker(Logs(broken=0), "TensorBoard", tell)
    tracker(step(1))
    assert len(said) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        OptionError, match=rf"^track {name} needs the package {name}, .*; run `pip install {name}`, or set"
    ):
        tracker_for(name, tmp_path, "fox", CONFIG, on_event=refuse)


def test_a_tracker_that_does_not_start_is_said_before_training(tmp_path: Path, wandb: list[dict[str, Any]]) -> None:
    def init(**arguments: Any) -> Logs:
        raise RuntimeError("api_key not configured (no-tty). Call wandb.login()")

    sys.modules["wandb"].init = init  # type: ignore[attr-defined]
    with pytest.raises(
        OptionError, match=r"^Weights & Biases does not start \(api_key not configured.*; fix that, or set"
    ):
        tracker_for("wandb", tmp_path, "fox", CONFIG, on_event=refuse)
