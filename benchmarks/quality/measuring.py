"""Runs of a recipe on a task, and what the pictures of each checkpoint show."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.subjects import Prompt, Task
from lorasmith.data.dataset import EncodedDataset
from lorasmith.evaluation import measures
from lorasmith.evaluation.likeness import features
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.library import load_dataset, train
from lorasmith.sampling.generate import generate
from tools.pretrain.data import CONCEPTS, HELD_OUT_STYLE, short_name, with_article
from tools.pretrain.judge import SETS, SUBJECTS, Judge, tensors
from tools.pretrain.quality import background_of

DRAWN_SEEDS = (1, 2, 3, 4)  # of the trigger alone
SAMPLING_STEPS = 8
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
KEPT_CONCEPTS = CONCEPTS[::5]
"""Concepts whose pictures without the trigger should stay as they were; the first seed draws all sixty."""


@dataclass(frozen=True)
class Job:
    """A run: a recipe on so many pictures of a task."""

    recipe: str
    task: str
    pictures: int
    seed: int
    factor: float = 10.0
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """What was measured of a LoRA; shares and cosines are from 0 to 1."""

    looks: int  # pictures seen
    seconds: float  # of training, processor time
    fidelity: float  # probability of the subject, by the judge
    likeness: float  # to held-out drawings
    adherence: float  # share of the prompts whose further wish is fulfilled
    diversity: float
    memorisation: float  # how much nearer the nearest trained picture is than the nearest held-out one
    drift: float  # of pictures without the trigger
    bleed: float  # share of pictures of the class, without the trigger, in which the class is not seen any more


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    job: Job
    checkpoints: tuple[Checkpoint, ...]
    strengths: tuple[float, ...]  # fidelity of the last one at each of STRENGTHS
    pictures: tuple[Image.Image, ...] = ()  # of the last one: the trigger, and the prompts


class Bench:
    """The built-in model, the judge, and what the base draws."""

    def __init__(self) -> None:
        self.model: Model = load_model("lorasmith-tiny")
        self.judge = Judge.load()
        self._data: dict[tuple[str, int], EncodedDataset] = {}
        self._base: dict[str, Image.Image] = {}

    def run(self, job: Job, task: Task, looks: Sequence[int]) -> Outcome:
        """Train, and measure after each number of looks."""
        settings = {"rank": 16, **RECIPES[job.recipe].at(job.factor), **job.changes}
        batch = int(settings["batch_size"])
        data = self._encoded(task, job.pictures)
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            result = train(
                self.model,
                data,
                output=folder,
                title="one",
                trigger=task.trigger,
                steps=looks[-1] // batch,
                save_every=looks[0] // batch,
                validation_share=0.0,
                previews="",
                seed=job.seed,
                save_state_every=0,
                **settings,
            )
            seconds = time.process_time() - began
            files = {look: Path(folder) / f"one-step{look // batch:08}.safetensors" for look in looks}
            files[looks[-1]] = result.path if result.path is not None else files[looks[-1]]
            found = [self._measured(task, job, files[look], look, seconds * look / looks[-1]) for look in looks]
            return Outcome(job, tuple(one for one, _ in found), self._strengths(task, files[looks[-1]]), found[-1][1])

    def _encoded(self, task: Task, number: int) -> EncodedDataset:
        key = (task.name, number)
        if key not in self._data:
            pairs = [(picture, task.trigger) for picture in task.training[number]]
            self._data[key] = load_dataset(pairs, self.model, progress=False)
        return self._data[key]

    def _drawn(self, prompts: Sequence[str], lora: Path | None, seed: int, strength: float = 1.0) -> list[Image.Image]:
        base = self.model
        loras = [] if lora is None else [(lora, strength)]
        denoiser, encoder = with_loras(base.denoiser, base.text_encoder, loras)
        return generate(denoiser, prompts, text_encoder=encoder, seed=seed, steps=SAMPLING_STEPS)

    def _from_base(self, prompts: Sequence[str], seed: int) -> list[Image.Image]:
        missing = [one for one in prompts if f"{seed} {one}" not in self._base]
        if missing:
            drawn = self._drawn(missing, None, seed)
            self._base |= {f"{seed} {one}": picture for one, picture in zip(missing, drawn, strict=True)}
        return [self._base[f"{seed} {one}"] for one in prompts]

    def _measured(
        self, task: Task, job: Job, lora: Path, looks: int, seconds: float
    ) -> tuple[Checkpoint, tuple[Image.Image, ...]]:
        plain = [self._drawn([task.trigger], lora, seed)[0] for seed in DRAWN_SEEDS]
        asked = self._drawn([one.text for one in task.prompts], lora, 1)
        kept = [with_article(short_name(one)) for one in KEPT_CONCEPTS]
        of_class = [] if task.of_class is None else [with_article(short_name(task.of_class))]
        without = self._drawn([*kept, *of_class], lora, 1)
        base = self._from_base([*kept, *of_class], 1)
        drawn, training = features(plain), _features_of(task.name, job.pictures)
        held_out = _features_of(task.name, 0)
        class_seen = self.judge.subjects(without[len(kept) :])
        return Checkpoint(
            looks=looks,
            seconds=seconds,
            fidelity=self._fidelity(task, [*plain, *asked]),
            likeness=measures.likeness(drawn, held_out),
            adherence=statistics.mean(self._fulfilled(task, asked)),
            diversity=measures.diversity(drawn) or 0.0,
            memorisation=measures.nearest(drawn, training) - measures.nearest(drawn, held_out),
            drift=measures.drift(features(base[: len(kept)]), features(without[: len(kept)])),
            bleed=sum(one != task.of_class for one in class_seen) / max(1, len(class_seen)),
        ), (*plain, *asked)

    def _strengths(self, task: Task, lora: Path) -> tuple[float, ...]:
        return tuple(self._fidelity(task, self._drawn([task.trigger], lora, 1, strength)) for strength in STRENGTHS)

    def _fidelity(self, task: Task, pictures: Sequence[Image.Image]) -> float:
        """Mean probability of the subject, or of the style."""
        subjects, styles = self.judge(tensors(pictures))
        if task.is_style:
            return float(styles.softmax(1)[:, SETS.index(HELD_OUT_STYLE)].mean())
        return float(subjects.softmax(1)[:, SUBJECTS.index(task.name)].mean())

    def _fulfilled(self, task: Task, pictures: Sequence[Image.Image]) -> list[bool]:
        subjects, styles = self.judge.subjects(pictures), self.judge.styles(pictures)
        return [
            _is_fulfilled(prompt, picture, subject, style)
            for prompt, picture, subject, style in zip(task.prompts, pictures, subjects, styles, strict=True)
        ]


def _is_fulfilled(prompt: Prompt, picture: Image.Image, subject: str, style: str) -> bool:
    if prompt.background is not None:
        return background_of(picture) == prompt.background
    return style == prompt.icon_set if prompt.icon_set is not None else subject == prompt.concept


@cache
def _features_of(task: str, pictures: int) -> Any:
    """Features of so many pictures for training, or of the held-out ones for 0."""
    from benchmarks.quality.subjects import all_tasks

    [found] = [one for one in all_tasks() if one.name == task]
    return features(found.training[pictures] if pictures else found.held_out)
