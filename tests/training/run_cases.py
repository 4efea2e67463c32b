"""Run folders as a run leaves them, written in a moment: records, events and pictures, without training anything."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lorasmith.training.config import TrainConfig
from lorasmith.training.events import (
    Event,
    Outcome,
    Previewed,
    RolledBack,
    RunFinished,
    RunStarted,
    Shrunk,
    StepDone,
    Validated,
    Warned,
    encoded,
)

PROMPTS = ("a lion", "a skull", "a red heart", "a <b>robot</b>")
HOSTILE = "<script>alert(\"x\")</script> & 'co'; $(rm -rf ~)"
BEGIN = 1_790_000_000.0


def damaged(value: Any, chance: random.Random, odd: Sequence[Any]) -> Any:
    """A copy of a JSON value in which a part is replaced by one of `odd`, or left out."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < 0.2:
        return chance.choice(odd)
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = chance.choice(list(items))
    if chance.random() < 0.2:
        del items[key]
    else:
        items[key] = damaged(items[key], chance, odd)
    return items if isinstance(value, dict) else list(items.values())


def write_run(
    folder: Path,
    events: Sequence[Event],
    *,
    title: str = "fox",
    captions: Sequence[str] = ("a fox",),
    more: Mapping[str, Any] = {},
    **settings: object,
) -> Path:
    """A run folder with a record and a log of `events`; `settings` are those of the run, `more` is in its record."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "title": title,
        "model": {"name": "lorasmith-tiny", "path": "/models/tiny.safetensors", "family": "sd1"},
        "config": asdict(TrainConfig(**{"learning_rate": 7e-4, **settings})),  # type: ignore[arg-type]
        "steps_before": 0,
        "samples": [
            {"name": f"picture-{index:02}", "caption": caption, "latents": [4, 16, 16 + 2 * (index % 3)]}
            for index, caption in enumerate(captions)
        ],
        "adapters": {"down_blocks.0": 1000},
        "environment": {"versions": {"python": "3.11.2", "lorasmith": "0.1.0", "torch": "2.9.0"}},
        **more,
    }
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    log_events(folder, events)
    return folder


def log_events(folder: Path, events: Sequence[Event]) -> None:
    lines = list(map(encoded, events))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def started(steps: int, *, samples: int = 1, at: float = BEGIN) -> RunStarted:
    return RunStarted(
        steps=steps,
        steps_before=0,
        samples=samples,
        adapters=133,
        parameters=610_864,
        device="cpu",
        dtype="fp32",
        at=at,
    )


def steps_done(first: int, last: int, *, total: int, images: int = 1, batch: int = 4) -> list[StepDone]:
    """Steps whose loss falls with noise, at a cosine rate, each looking at `batch` images."""
    rng = np.random.default_rng(first)
    events = []
    for step in range(first, last + 1):
        level = 0.22 + 0.18 * math.exp(-step / (total / 4))
        draws = []
        for index in range(batch):
            quantile = (index + float(rng.random())) / batch
            image = (step * batch + index) % images
            trouble = 2.5 if image == images - 1 else 1.0 - 0.75 * (image == 2) * min(1, step / total * 2)
            loss = level * trouble * (0.4 + 3 * (1 - quantile) ** 4) * float(rng.lognormal(0, 0.2))
            draws.append((image, quantile, loss))
        events.append(
            StepDone(
                step=step,
                loss=float(np.mean([loss for _, _, loss in draws])),
                grad_norm=0.3,
                learning_rate=7e-4 * 0.5 * (1 + math.cos(math.pi * step / total)),
                draws=tuple(draws),
                at=BEGIN + 0.8 * step,
            )
        )
    return events


def validated(step: int, *, total: int, best_step: int) -> Validated:
    """Held-out loss that falls until `best_step` and rises after it."""
    base = 0.412
    loss = base * (0.86 + 0.14 * ((step - best_step) / total) ** 2 * 3)
    verdict = "still learning" if step <= best_step else f"best at {best_step}, overfitting since"
    return Validated(
        step=step, loss=loss, base_loss=base, low=loss - base - 0.012, high=loss - base + 0.013,
        best=step <= best_step, best_step=min(step, best_step), verdict=verdict, at=BEGIN + 0.8 * step,
    )  # fmt: skip


def picture(path: Path, text: str, colour: tuple[int, int, int], edge: int = 192) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0.4, 1, edge)[:, None, None] * np.array(colour)[None, None] * np.ones((1, edge, 1))
    image = Image.fromarray(ramp.astype(np.uint8))
    ImageDraw.Draw(image).text((8, 8), text, fill="white")
    image.save(path)
    return path


def previewed(folder: Path, step: int, strength: float, prompts: Sequence[str] = PROMPTS) -> Previewed:
    """The event and its pictures."""
    paths = []
    for index, prompt in enumerate(prompts):
        tint = (90 + 30 * index, min(255, 60 + step), int(80 + 170 * strength))
        name = f"step-{step:06}-{strength:g}-{index + 1}.png"
        paths.append(str(picture(folder / "samples" / name, prompt, tint)))
    return Previewed(step=step, prompts=tuple(prompts), paths=tuple(paths), strength=strength, at=BEGIN + 0.8 * step)


def whole_run(folder: Path, *, total: int = 400, images: int = 18) -> Path:
    """A run with all there is: validations, a roll-back, less memory, previews, early stop, hostile captions."""
    end = total * 4 // 5
    fault, back = total // 4 + 7, total // 4
    looks = [validated(step, total=total, best_step=total // 2) for step in range(0, end + 1, total // 10)]
    shown = [previewed(folder, 0, 0.0)] + [previewed(folder, step, 1.0) for step in range(total // 4, end, total // 4)]
    shown += [previewed(folder, end, 0.5), previewed(folder, end, 1.0)]
    numbers = [*steps_done(1, end, total=total, images=images), *looks, *shown]
    numbers.sort(key=lambda event: event.at)
    rolled = RolledBack(
        step=fault, to_step=back, images=("picture-03", "picture-07"), rate_factor=0.5, at=BEGIN + 0.8 * fault,
        message=f"The loss of step {fault} was NaN (picture-03, picture-07); back to step {back} at half the rate.",
    )  # fmt: skip
    shrunk = Shrunk(
        step=1,
        micro_batch=2,
        checkpoint_depth=0,
        message="Memory ran out; two images at a time from now on.",
        at=BEGIN + 1,
    )
    place = next(index for index, event in enumerate(numbers) if isinstance(event, StepDone) and event.step == fault)
    again = [event for event in numbers[:place] if isinstance(event, StepDone) and event.step > back]
    events = [
        started(total, samples=images), Warned(message=f"A note with {HOSTILE} in it.", at=BEGIN), shrunk,
        *numbers[:place], rolled, *again, *numbers[place:],
        RunFinished(step=end, reason=Outcome.STOPPED, at=BEGIN + 0.8 * end),
    ]  # fmt: skip
    captions = [HOSTILE, *(f"a fox, pose {index}" for index in range(1, images))]
    write_run(folder, events, captions=captions, steps=total, batch_size=4, schedule="cosine", patience=3)
    (folder / "fox.safetensors").write_bytes(b"\0" * 1_300_000)
    (folder / "fox-best.safetensors").write_bytes(b"\0" * 1_300_000)
    return folder
