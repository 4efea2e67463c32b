"""A small sweep, and run folders as its runs leave them, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasmith.runs.sweep_file import Sweep, read_sweep
from lorasmith.training.events import Outcome, Previewed, RunFinished, RunStarted, StepDone, Validated, encoded
from lorasmith.training.storage.records import RunRecord

FILE = """
model = "lorasmith-tiny"
sources = "photos"
name = "cat"
validation_share = 0.2
steps = 4
resolution = 32
targets = "*.attn2.to_q"
validation_draws = 2

[grid]
"""


def sweep_of(folder: Path, table: str = "rank = [2, 4]\nlearning_rate = [1e-4, 3e-4]\n") -> Sweep:
    """The sweep in `sweep.toml`, which is written."""
    (folder / "sweep.toml").write_text(FILE + table, encoding="utf-8")
    return read_sweep(folder / "sweep.toml")


def names_of(sweep: Sweep) -> list[str]:
    return list(sweep.runs)


def left_by(
    sweep: Sweep,
    name: str,
    output: Path,
    losses: Sequence[float] = (),
    *,
    outcome: Outcome | None = Outcome.FINISHED,
    base_loss: float = 1.0,
    held_out: str = "0" * 32,
    previews: Sequence[Path] = (),
    **asked: Any,
) -> Path:
    """The folder of a run that has taken a step, and was validated, for each of the losses."""
    folder = output / name
    folder.mkdir(parents=True)
    record = RunRecord(
        title="cat",
        source=sweep.runs[name].to_record(),
        asked={**asdict(sweep.runs[name].config), **asked},
        fingerprint={"held_out": held_out, "config": {"validation_draws": 2}},
    )
    (folder / "run.json").write_text(record.to_text())
    about: dict[str, Any] = {"low": -0.1, "high": 0.1, "best": False, "best_step": 1, "verdict": "so"}
    events: list[Any] = [
        RunStarted(steps=4, steps_before=0, samples=4, adapters=1, parameters=9, device="cpu", dtype="fp32", at=1.0)
    ]
    for step, loss in enumerate(losses, start=1):
        events.append(StepDone(step=step, loss=loss, grad_norm=0.1, at=10.0 * step))
        events.append(Validated(step=step, loss=loss, base_loss=base_loss, at=10.0 * step, **about))
    if previews:
        (folder / "samples").mkdir()
        for strength in (0.0, 1.0):
            prompts, paths = tuple(f"prompt {path.stem}" for path in previews), tuple(str(path) for path in previews)
            events.append(Previewed(step=len(losses), strength=strength, prompts=prompts, paths=paths, at=1.0))
    if outcome is not None:
        events.append(RunFinished(step=len(losses), reason=outcome, at=10.0 * len(losses)))
        (folder / "cat.safetensors").touch()
    (folder / "events.jsonl").write_text("".join(f"{encoded(one)}\n" for one in events))
    return folder


def ended_with(name: str, output: Path, error: str) -> None:
    """What a run on a cluster leaves when it fails, and what every run of earlier versions left."""
    (output / "logs").mkdir(parents=True, exist_ok=True)
    (output / "logs" / f"{name}.json").write_text(json.dumps({"exit_code": 1, "error": error}))
