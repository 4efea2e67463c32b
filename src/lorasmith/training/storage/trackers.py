"""Logging of losses and rates to TensorBoard and Weights & Biases.

Their files are in the folder of the run, so that a resumed run continues the same curves. A run does not depend on
them: a tracker that fails causes one warning and is not called again.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.files import ensure_folder, write_atomic
from lorasmith.core.options import options_of
from lorasmith.core.printable import first_line, printable
from lorasmith.training.config import TrainConfig
from lorasmith.training.events import Event, EventHandler, LikenessMeasured, StepDone, Validated, Warned

_PACKAGES = {"tensorboard": ("tensorboard", "TensorBoard"), "wandb": ("wandb", "Weights & Biases")}
_PROJECT = "lorasmith"
_NO_METRICS = frozenset({"at", "step", "draws", "noise_scale", "memory_bytes"})  # fields of `StepDone`


def tracker_for(name: str, folder: Path, title: str, config: Mapping[str, Any], *, on_event: EventHandler) -> Tracker:
    """Start a tracker, `tensorboard` or `wandb`. Raises OptionError if it does not start, and OutputError."""
    package, spoken = _PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        raise OptionError(
            f"track {name} needs the package {package}, which is not installed; run `pip install {package}`, or set "
            "track to none"
        )
    try:
        started = _tensorboard(folder, title, config) if name == "tensorboard" else _wandb(folder, title, config)
    except OptionError:
        raise
    except Exception as error:  # any: from a package, a server or a login
        raise OptionError(f"{spoken} does not start ({first_line(error)}); fix that, or set track to none") from error
    return Tracker(started, spoken, on_event)


class Tracker:
    """An event handler that logs losses and rates; if it fails, `on_event` receives a `Warned`."""

    def __init__(self, tracker: Any, spoken: str, on_event: EventHandler) -> None:
        self._tracker = tracker
        self._spoken = spoken
        self._emit = on_event

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepDone):
            numbers = {f"train/{name}": value for name, value in vars(event).items() if name not in _NO_METRICS}
            if event.noise_scale:
                numbers["train/gradient_noise_scale"] = event.noise_scale
            self._log(numbers, event.step)
        elif isinstance(event, Validated):
            self._log({"validation/loss": event.loss, "validation/base_loss": event.base_loss}, event.step)
        elif isinstance(event, LikenessMeasured):
            numbers = {"likeness/previews": event.likeness, "likeness/adherence": event.adherence}
            self._log({name: value for name, value in numbers.items() if value is not None}, event.step)

    def close(self) -> None:
        """Send the remaining numbers; a second call does nothing."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            self._guarded(tracker.finish)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if self._tracker is not None:
            self._guarded(self._tracker.log, numbers, step=step)

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> None:
        """Call the tracker; after its first failure, reported as a warning, it is disabled."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # a full disk, a lost network, a bug in the package: the run continues
            self._tracker = None
            self._emit(
                Warned(message=f"{self._spoken} failed ({first_line(error)}) and is disabled; training continues.")
            )


def _tensorboard(folder: Path, title: str, config: Mapping[str, Any]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(ensure_folder(folder) / "tensorboard")
    # Not as hyperparameters: TensorBoard makes one more run of them each time, and refuses None.
    rows = [f"| {name} | {printable(value)} |" for name, value in {"title": title, **config}.items()]
    writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)
    return _TensorBoard(writer)


class _TensorBoard:
    """A writer with the methods of a run of Weights & Biases."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def _wandb(folder: Path, title: str, config: Mapping[str, Any]) -> Any:
    wandb: Any = importlib.import_module("wandb")
    remembered = ensure_folder(folder / "wandb") / "run-id"
    if not remembered.exists():
        write_atomic(remembered, secrets.token_hex(8))
    number = remembered.read_text(encoding="utf-8")
    private = {name for name, declared in options_of(TrainConfig).items() if declared.is_path or declared.is_prompt}
    sent = {name: value for name, value in config.items() if not (config.get("private") and name in private)}
    chosen = wandb.setup().settings  # WANDB_PROJECT, WANDB_NAME and the package's settings files
    return wandb.init(
        project=chosen.project or _PROJECT,
        name=chosen.run_name or printable(title, limit=128),  # the server's limit
        id=number,
        resume="allow",
        dir=str(folder),
        config=sent,
        settings={
            "silent": True,
            "disable_git": True,
            "disable_code": True,
        },  # only numbers and settings are uploaded
    )
