"""Runs as they leave their folders, and runs that train: records, logs, LoRAs and pictures, without a model."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation.evaluation_record import EVALUATION, EVALUATION_RECORD
from lorasmith.formats.container import write_safetensors
from lorasmith.runs.gallery import GALLERY
from lorasmith.runs.run_images import thumbnail_of
from lorasmith.runs.view import RunView
from lorasmith.training.events import (
    Event,
    LikenessMeasured,
    LoraSaved,
    Outcome,
    Previewed,
    PromptDrawn,
    RunFinished,
    Sketched,
    StepDone,
    Validated,
    encoded,
)
from lorasmith.training.run_requests import REQUESTS
from lorasmith.training.storage.records import read_history
from lorasmith.training.storage.run_folder import RunFolder
from tests.training.run_cases import BEGIN, picture, started, write_run

PROMPTS = ("a photo of foxy in the snow", "foxy <b>as</b> a knight, oil painting")
STEPS = 60
SKETCH = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
BEST = 50
"""The step with the lowest held-out loss."""


def write_record(
    base: Path,
    id: str,
    events: Sequence[Event],
    *,
    dataset: str = "fox",
    trigger: str = "foxy",
    captions: Sequence[str] = ("a red fox",) * 4,
    **settings: Any,
) -> Path:
    """The folder of a run on four pictures of a dataset, by `lorasmith train` on the built-in model."""
    settings = {"steps": STEPS, **settings}
    name = id.rpartition("/")[2].rpartition("-")[0]
    source = {"command": "train", "model": "lorasmith-tiny", "folder": str(base / "input" / dataset), "name": name}
    images = [
        {"name": f"fox_{number}.png", "caption": caption, "use": "held out" if number == 4 else "trained"}
        for number, caption in enumerate(captions, start=1)
    ]
    more = {"source": {**source, "trigger": trigger}, "asked": settings, "data": {"images": images}}
    samples = [f"fox_{number}.png" for number in range(1, 4)]
    folder = write_run(base / id, events, title=name, more=more, **settings)
    record = json.loads((folder / "run.json").read_text())
    record["samples"] = [{**record["samples"][0], "name": sample} for sample in samples]
    (folder / "run.json").write_text(json.dumps(record))
    for index, image in enumerate(images):
        small(BUILT_IN_BASE / "input" / "fox" / image["name"], thumbnail_of(folder, index))
    return folder


def small(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def save_lora(folder: Path, step: int, name: str) -> Path:
    """A LoRA of a step, which differs from those of others."""
    path = folder / f"{name}.safetensors"
    write_safetensors(path, {"x": torch.full((4,), float(step))}, {"lorasmith.steps": str(step)})
    return path


def previewed(folder: Path, step: int, strength: float = 1.0, prompts: Sequence[str] = PROMPTS) -> Previewed:
    """Previews of a step, and their pictures."""
    paths = []
    for number in range(1, len(prompts) + 1):
        path = folder / "samples" / f"{step}-{strength}-{number}.png"
        paths.append(str(picture(path, "", (90 * number, step % 256, int(60 * abs(strength))), edge=64)))
    shown = {"prompts": tuple(prompts), "paths": tuple(paths), "sampling_steps": 20}
    return Previewed(step=step, strength=strength, at=BEGIN + step, **shown)


def step_done(step: int, loss: float | None = None, **more: Any) -> StepDone:
    value = 0.12 + 0.3 * math.exp(-step / 20) + 0.05 * math.sin(7.3 * step) if loss is None else loss
    return StepDone(step=step, loss=value, grad_norm=0.1, learning_rate=1e-4, at=BEGIN + step, **more)


def events_of(
    folder: Path,
    steps: int = STEPS,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5),
    prompts: Sequence[str] = PROMPTS,
) -> list[Event]:
    """The events of a training that goes well: held-out images improve until `BEST`, previews of three steps, those of
    the last one, or of a slider, at all strengths.
    """
    number = int(folder.name[-3:])  # later runs began later
    first = started(steps, samples=3, at=BEGIN + number / 100)
    events: list[Event] = [first, previewed(folder, 0, 0.0, prompts)]
    for step in range(1, steps + 1):
        events.append(step_done(step))
        if step % 10 == 0:
            loss = 0.2 + 0.25 * math.exp(-step / 20) + max(0, 0.002 * (step - BEST))
            events.append(
                Validated(
                    step=step, loss=loss, base_loss=0.45, low=-0.2, high=-0.05, best=step <= BEST,
                    best_step=min(step, BEST), at=BEGIN + step,
                    verdict="the LoRA improves on held-out images, most at step 50; a little overfitting after that",
                )
            )  # fmt: skip
        if step % 20 == 0:
            shown = strengths if step == steps or min(strengths) < 0 else (1.0,)
            events += [previewed(folder, step, strength, prompts) for strength in shown]
            likeness = 0.6 - 0.3 * math.exp(-step / 20)
            events.append(LikenessMeasured(step=step, likeness=likeness, own=0.64, adherence=0.9, at=BEGIN + step))
    return events


def write_finished_run(
    base: Path,
    id: str,
    *,
    outcome: Outcome = Outcome.FINISHED,
    strengths: Sequence[float] = (0.0, 0.5, 1.0, 1.5),
    prompts: Sequence[str] = PROMPTS,
    **settings: Any,
) -> Path:
    """A run of 60 steps that kept its LoRAs of the steps 40, 50 and 60, and can be trained further."""
    folder = base / id
    end = RunFinished(step=STEPS, reason=outcome, at=BEGIN + STEPS)
    write_record(base, id, [*events_of(folder, STEPS, strengths, prompts), end], **settings)
    name = id.rpartition("/")[2].rpartition("-")[0]
    save_lora(folder, STEPS, name)
    for step in (40, BEST):
        save_lora(folder, step, f"{name}-step{step:08}")
    save_lora(folder / "states", STEPS, f"step-{STEPS:06}")
    return folder


class ScriptedRun:
    """A run that trains: this process has its folder, and its log grows by what a test shows. `publish` receives its
    view, as of a run of the server's worker.
    """

    def __init__(self, folder: Path, publish: Callable[[Mapping[str, Any]], object] = lambda view: None) -> None:
        self.folder = folder
        self._publish = publish
        self._view = RunView()
        self._owned = contextlib.ExitStack()
        self._owned.enter_context(RunFolder(folder).claimed())
        for event in read_history(folder).events:
            self._view.take(event)

    def show(self, *events: Event) -> None:
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as log:
            for event in events:
                log.write(encoded(event) + "\n")
                log.flush()
                self._view.take(event)
        self._publish(self._view.to_json())

    def sketch(self) -> None:
        """Show the next picture as it is drawn so far, which is in no log."""
        self._view.take(Sketched(picture=SKETCH))
        self._publish(self._view.to_json())

    def take_steps(self, *, to: int) -> None:
        self.show(*(step_done(step) for step in range(self._view.step + 1, to + 1)))

    def preview(self, step: int, strength: float = 1.0) -> None:
        """Take the steps up to one, and show previews of it."""
        self.take_steps(to=step)
        self.show(previewed(self.folder, step, strength))

    def serve_requests(self) -> list[Any]:
        """Do what it was asked for, as between two steps; returns the requests."""
        asked = []
        for file in sorted((self.folder / REQUESTS).iterdir()):
            step = self._view.step
            asked.append(json.loads(file.read_text() or "null") or file.name)
            if file.name == "save":
                name = f"{json.loads((self.folder / 'run.json').read_text())['title']}-step{step:08}"
                self.show(LoraSaved(step=step, path=str(save_lora(self.folder, step, name))))
            elif file.name == "preview":
                self.show(previewed(self.folder, step))
            else:
                wanted = asked[-1]
                paths = tuple(str(picture(self.folder / "tried" / f"{step}-{n}.png", "", (200, 90, n))) for n in (1, 2))
                given = {name: wanted[name] for name in ("prompt", "strength", "seed", "lora")}
                self.show(PromptDrawn(id=file.stem.removeprefix("draw-"), step=step, paths=paths, **given))
            file.unlink()
        return asked

    def finish(self, outcome: Outcome = Outcome.FINISHED) -> None:
        """End the run with a LoRA, unless it has ended."""
        if self._view.outcome is not None:
            return
        name = json.loads((self.folder / "run.json").read_text())["title"]
        save_lora(self.folder, self._view.step, name)
        self.show(RunFinished(step=self._view.step, reason=outcome))
        self.close()

    def close(self) -> None:
        """Release the folder."""
        self._owned.close()


def write_evaluation(folder: Path, *, trigger: str = "foxy") -> dict[str, Any]:
    """An evaluation of the LoRAs of the steps 40 and 60, which recommends the first."""
    measures = {"likeness": 0.6, "adherence": 0.9, "diversity": 0.1, "memorisation": 0.0, "drift": 0.1, "bleed": None}
    name = json.loads((folder / "run.json").read_text())["title"]
    loras = [
        {"file": file, "label": f"step {step}", "step": step, "measures": {**measures, "change": 0.2},
         "pictures": [f"lora-{step}-1.png", f"lora-{step}-2.png"]}
        for step, file in ((40, f"{name}-step00000040.safetensors"), (60, f"{name}.safetensors"))
    ]  # fmt: skip
    found = {
        "title": folder.name, "model": "lorasmith-tiny", "trigger": trigger, "seed": 0, "sampling_steps": 20,
        "prompts": [trigger, f"{trigger}, <b>on</b> a beach"], "base": ["base-1.png", "base-2.png"], "loras": loras,
        "training": {"count": 4, "self_likeness": 0.6, "base_likeness": 0.4},
        "verdict": {"outcome": "use", "best": 0, "ignored_from": 1, "copied": False},
        "sentence": "Use step 40: it looks like your pictures; from step 60 on prompts are ignored.",
    }  # fmt: skip
    for file in (*found["base"], *(one for lora in loras for one in lora["pictures"])):
        picture(folder / EVALUATION / file, "", (40, 120, 200), edge=64)
    (folder / EVALUATION / EVALUATION_RECORD).write_text(json.dumps(found))
    return found


def write_grid(folder: Path, request: Mapping[str, Any]) -> None:
    """The grid that a job was asked for, with its pictures."""
    stem = f"{GALLERY}/grid-{len(request['text']):08x}"
    cells = [
        {"step": step, "strength": strength, "file": f"{stem}-{step}-{strength}.webp"}
        for step, _ in request["loras"]
        for strength in request["strengths"]
    ]
    grid = {"wish": request["wish"], "prompt": request["text"], "seed": 0, "base": f"{stem}.webp", "cells": cells}
    (folder / GALLERY).mkdir(exist_ok=True)
    for file in (grid["base"], *(cell["file"] for cell in cells)):
        Image.new("RGB", (32, 32), "teal").save(folder / file)
    (folder / f"{stem}.json").write_text(json.dumps(grid))
