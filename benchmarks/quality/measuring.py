"""Runs of a recipe on a task, and what the pictures of each checkpoint show."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import lorasmith as ls
from benchmarks.quality.recipes import AVERAGE, RECIPES, STRENGTH
from benchmarks.quality.sights import FeatureSight, JudgeSight, Sight, dino_features, seen
from benchmarks.quality.subjects import BUILT_IN, Prompt, Task, folder_tasks
from lorasmith.core.files import write_atomic
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import EncodedDataset
from lorasmith.evaluation import measures
from lorasmith.evaluation.evaluation_record import NOISES
from lorasmith.evaluation.likeness import features
from lorasmith.evaluation.recognition import recogniser_of
from lorasmith.evaluation.verdict import Drawn, measured, scores, training_facts
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.library import load_dataset, train
from lorasmith.sampling.generate import generate
from lorasmith.toolbox.average import average_run
from tools.pretrain.data import CONCEPTS, short_name, with_article
from tools.pretrain.transformer import DRAWING_TRANSFORMER, DrawingTransformer

DRAWN_SEEDS = (1, 2, 3)  # of the trigger alone
ASKED_SEEDS = range(1, 7)  # of which the first ones are used from which the base model draws the wish
ASKED_EACH = 2
_STRENGTH_SEEDS = range(11, 11 + NOISES)
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TINY = "lorasmith-tiny"
JUDGED = (TINY, DRAWING_TRANSFORMER)  # names of models whose drawings the judge knows
_KEPT_EACH = 20  # each run draws three of the sixty concepts without the trigger; runs share them out


@dataclass(frozen=True)
class Setting:
    """What all runs have in common: `subjects`, `clip` and `dino` are folders; `comfyui` a checkout and its Python."""

    looks: tuple[int, ...]  # pictures seen at each checkpoint
    model: str = TINY
    subjects: Path | None = None
    clip: Path | None = None
    dino: Path | None = None
    comfyui: tuple[Path, Path] | None = None
    folder: Path | None = None  # where outcomes are kept

    def tasks(self) -> Mapping[str, Task]:
        """What is taught."""
        return BUILT_IN if self.subjects is None else folder_tasks(self.subjects)

    def sight(self) -> Sight:
        """What looks at the pictures."""
        if self.subjects is None:
            return JudgeSight()
        return FeatureSight(features if self.dino is None else dino_features(self.dino), self.clip)


@dataclass(frozen=True)
class Job:
    """A run: a recipe on so many pictures of a task."""

    recipe: str
    task: str
    pictures: int
    seed: int
    factor: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    in_comfyui: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What was measured of a LoRA, each from 0 to 1 but memorisation."""

    looks: int  # pictures seen
    seconds: float  # of training, processor time
    fidelity: float  # of the subject, by the sight
    likeness: float  # to held-out pictures
    adherence: float | None  # to what prompts ask for besides the subject, by the sight
    diversity: float
    memorisation: float  # how much nearer the nearest trained picture is than the nearest held-out one
    drift: float  # of pictures without the trigger
    bleed: float | None  # of the class without the trigger, by the sight; None for a style


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    job: Job
    checkpoints: tuple[Checkpoint, ...]
    strengths: tuple[float, ...]  # fidelity of the last one at each of STRENGTHS, of the first seed
    pictures: tuple[Image.Image, ...]  # of the last one: the trigger, and each prompt


def outcomes_of(jobs: Sequence[Job], setting: Setting, workers: int) -> Iterator[Outcome]:
    """The outcome of each job in order, of as many processes with a thread each."""
    with multiprocessing.get_context("spawn").Pool(workers, _prepare, (setting,)) as pool:
        yield from pool.imap(_run, jobs)


def encoded(model: Model, task: Task, pictures: int) -> EncodedDataset:
    """So many pictures of a task, with its trigger as their caption."""
    return load_dataset([(one, task.trigger) for one in task.training[pictures]], model, progress=False)


def checkpoints(
    model: Model, data: EncodedDataset, task: Task, folder: Path, *, steps: Sequence[int], seed: int, **settings: Any
) -> list[Path]:
    """Train in a folder; returns the LoRA after each of `steps`, multiples of the first."""
    train(
        model,
        data,
        output=folder,
        title="one",
        trigger=task.trigger,
        steps=steps[-1],
        save_every=steps[0],
        validation_share=0.0,
        previews="",
        seed=seed,
        save_state_every=0,
        **settings,
    )
    return [*(folder / f"one-step{step:08}.safetensors" for step in steps[:-1]), folder / "one.safetensors"]


def _prepare(setting: Setting) -> None:
    global _bench  # noqa: PLW0603 - of a worker process
    torch.set_num_threads(1)
    os.environ["LORASMITH_CACHE_DIR"] = tempfile.mkdtemp()
    ls.register("families", DRAWING_TRANSFORMER, DrawingTransformer)
    _bench = Bench(setting)


def _run(job: Job) -> Outcome:
    """The outcome of a job, from the folder of outcomes if it is there."""
    if _bench.setting.folder is None:
        return _bench.run(job)
    name = hashlib.sha256(repr((replace(_bench.setting, folder=None), job)).encode()).hexdigest()[:16]
    numbers, strip = (_bench.setting.folder / f"{name}.{kind}" for kind in ("json", "png"))
    if numbers.exists():
        known = json.loads(numbers.read_text("utf-8"))
        with Image.open(strip) as opened:
            edge = opened.height
            pictures = [opened.crop((left, 0, left + edge, edge)) for left in range(0, opened.width, edge)]
        checkpoints = tuple(Checkpoint(**one) for one in known["checkpoints"])
        return Outcome(job, checkpoints, tuple(known["strengths"]), tuple(pictures))
    outcome = _bench.run(job)
    joined([one.resize((one.height, one.height)) for one in outcome.pictures]).save(strip)
    kept = {"checkpoints": [asdict(one) for one in outcome.checkpoints], "strengths": outcome.strengths}
    write_atomic(numbers, json.dumps(kept))
    return outcome


def joined(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height side by side."""
    strip = Image.new("RGB", (sum(one.width for one in pictures), pictures[0].height))
    left = 0
    for one in pictures:
        strip.paste(one, (left, 0))
        left += one.width
    return strip


class Bench:
    """A model, what looks at its pictures, and what the base draws."""

    def __init__(self, setting: Setting) -> None:
        self.model, self.sight = load_model(setting.model), setting.sight()
        self.setting, self._tasks = setting, setting.tasks()
        # The judge sees as much in drawings of four steps as in those of twenty.
        self._steps = 4 if setting.subjects is None else None
        self._data: dict[tuple[str, int], EncodedDataset] = {}
        self._base: dict[tuple[str, int], Image.Image] = {}
        self._seeds: dict[str, list[tuple[Prompt, int]]] = {}
        self._features: dict[tuple[str, int], Tensor] = {}

    def run(self, job: Job) -> Outcome:
        """Train, and measure after each number of looks."""
        task, looks = self._tasks[job.task], self.setting.looks
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            files = (self._trained_in_comfyui if job.in_comfyui else self._trained)(job, task, Path(folder))
            seconds = time.process_time() - began
            tried = job.changes.get(STRENGTH, (1.0,))
            found = [
                self._measured(task, job, file, self._best(task, job, file, tried), look, seconds * look / looks[-1])
                for look, file in zip(looks, files, strict=True)
            ]
            strengths = self._strengths(task, files[-1]) if job.seed == 0 else ()
        return Outcome(job, tuple(one for one, _ in found), strengths, found[-1][1])

    def _trained(self, job: Job, task: Task, folder: Path) -> list[Path]:
        """The file of each checkpoint."""
        settings = {**RECIPES[job.recipe].at(job.factor), **job.changes}
        length = settings.pop(AVERAGE, None)
        settings.pop(STRENGTH, None)
        if settings.get("preserve") == "class":
            settings["preserve_class"] = task.trigger.removeprefix("sks ")
        steps = [look // int(settings.get("batch_size", 1)) for look in self.setting.looks]
        data = self._encoded(task, job.pictures)
        files = checkpoints(self.model, data, task, folder, steps=steps, seed=job.seed, **settings)
        if length is not None:
            files[-1] = average_run(folder, folder / "average.safetensors", sigma_rel=length).output
        return files

    def _trained_in_comfyui(self, job: Job, task: Task, folder: Path) -> list[Path]:
        """The same of ComfyUI's own node, in a process of its own."""
        assert self.setting.comfyui is not None
        checkout, python = self.setting.comfyui
        data = self._encoded(task, job.pictures)
        inputs = {
            "latents": torch.stack([one.latents for one in data]),
            "context": torch.cat([one.conditioning.tensors["context"] for one in data]),
        }
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
        files = [folder / f"{look}.safetensors" for look in self.setting.looks]
        request = {
            "checkout": str(checkout),
            "model": str(BUILT_IN_BASE / "models" / "checkpoints" / f"{TINY}.safetensors"),
            "inputs": str(folder / "inputs.safetensors"),
            "settings": {"learning_rate": RECIPES[job.recipe].at(job.factor)["learning_rate"], "seed": job.seed},
            "files": dict(zip(self.setting.looks, map(str, files), strict=True)),
        }
        command = [str(python), str(Path(__file__).with_name("in_comfyui.py"))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(
            command, input=json.dumps(request), text=True, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        return files

    def _encoded(self, task: Task, number: int) -> EncodedDataset:
        key = (task.name, number)
        if key not in self._data:
            self._data[key] = encoded(self.model, task, number)
        return self._data[key]

    def _drawn(self, asked: Sequence[tuple[str, int]], lora: Path | None, strength: float = 1.0) -> list[Image.Image]:
        """A picture of each prompt and seed."""
        base = self.model
        loras = [] if lora is None else [(lora, strength)]
        denoiser, encoder = with_loras(base.denoiser, base.text_encoder, loras)
        prompts, seeds = zip(*asked, strict=True)
        return generate(denoiser, prompts, text_encoder=encoder, seed=seeds, steps=self._steps)

    def _from_base(self, asked: Sequence[tuple[str, int]]) -> list[Image.Image]:
        if missing := [one for one in asked if one not in self._base]:
            self._base |= zip(missing, self._drawn(missing, None), strict=True)
        return [self._base[one] for one in asked]

    def _place(self, job: Job) -> int:
        """Number of a subject and seed, the same for all recipes."""
        return [*self._tasks].index(job.task) + len(self._tasks) * job.seed

    def _asked(self, task: Task) -> list[tuple[Prompt, int]]:
        """Prompts, each with the first noises from which the base model itself draws what they ask for."""
        if task.name not in self._seeds:
            self._seeds[task.name] = [(one, seed) for one in task.prompts for seed in self._fulfilled(one)]
        return self._seeds[task.name]

    def _fulfilled(self, prompt: Prompt) -> Iterator[int]:
        pictures = ((seed, *self._from_base([(prompt.text, seed)])) for seed in ASKED_SEEDS)
        return islice((seed for seed, one in pictures if self.sight.shows(prompt, one)), ASKED_EACH)

    def _measured(
        self, task: Task, job: Job, lora: Path, strength: float, looks: int, seconds: float
    ) -> tuple[Checkpoint, tuple[Image.Image, ...]]:
        pairs = self._asked(task)
        prompts = [one for one, _ in pairs]
        kept = [with_article(short_name(one)) for one in CONCEPTS[self._place(job) % _KEPT_EACH :: _KEPT_EACH]]
        of_class = [] if task.of_class is None else [with_article(short_name(task.of_class))]
        untaught = [(one, 1) for one in (*kept, *of_class)]
        texts = [(task.trigger, seed) for seed in DRAWN_SEEDS] + [(one.text, seed) for one, seed in pairs]
        drawn = iter(self._drawn([*texts, *untaught], lora, strength))
        plain, asked, without = [*islice(drawn, len(DRAWN_SEEDS))], [*islice(drawn, len(pairs))], [*drawn]
        base = self._from_base(untaught)
        firsts = dict(reversed([*zip(prompts, asked, strict=True)]))
        found, held_out = features(plain), self._features_of(task, 0)
        return Checkpoint(
            looks=looks,
            seconds=seconds,
            fidelity=self.sight.fidelity(task, [*plain, *asked]),
            likeness=measures.likeness(found, held_out),
            adherence=self.sight.adherence(prompts, asked),
            diversity=measures.diversity(found) or 0.0,
            memorisation=measures.nearest(found, self._features_of(task, job.pictures))
            - measures.nearest(found, held_out),
            drift=measures.drift(features(base[: len(kept)]), features(without[: len(kept)])),
            bleed=self.sight.bleed(task, base[len(kept) :], without[len(kept) :]),
        ), (plain[0], *(firsts[one] for one in task.prompts if one in firsts))

    def _best(self, task: Task, job: Job, lora: Path, strengths: Sequence[float]) -> float:
        """The strength at which `lorasmith evaluate` scores a LoRA best, by other noises than those of the measures."""
        if len(strengths) == 1:
            return strengths[0]
        sight = recogniser_of(is_built_in=self.setting.subjects is None)
        texts = [task.trigger, *(one.text for one in task.prompts)]
        asked = [(text, seed) for seed in _STRENGTH_SEEDS for text in texts]

        def drawn(pictures: Sequence[Image.Image]) -> Drawn:
            each = iter(pictures)
            return seen(sight, task, [[*islice(each, len(texts))] for _ in _STRENGTH_SEEDS])

        base, pictures = drawn(self._from_base(asked)), sight.features(list(task.training[job.pictures]))
        found = [measured(drawn(self._drawn(asked, lora, one)), base, pictures) for one in strengths]
        by_strength = scores(found, training_facts(pictures, base))
        return strengths[by_strength.index(max(by_strength))]

    def _strengths(self, task: Task, lora: Path) -> tuple[float, ...]:
        return tuple(
            self.sight.fidelity(task, self._drawn([(task.trigger, 1)], lora, strength)) for strength in STRENGTHS
        )

    def _features_of(self, task: Task, pictures: int) -> Tensor:
        """Features of so many pictures for training, or of the held-out ones for 0."""
        key = (task.name, pictures)
        if key not in self._features:
            self._features[key] = features(task.training[pictures] if pictures else task.held_out)
        return self._features[key]
