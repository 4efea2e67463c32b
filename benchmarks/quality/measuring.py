"""Runs of a recipe on a task, what the pictures of each checkpoint show, and the folder that keeps it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import lorasmith as ls
from benchmarks.bases import clock_of
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.sights import FeatureSight, JudgeSight, Sight, dino_features, seen
from benchmarks.quality.subjects import BUILT_IN, Prompt, Task, folder_tasks
from lorasmith.core.errors import OutputError, TrainingError
from lorasmith.core.files import locked, write_atomic
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.core.placement import best_device
from lorasmith.data.dataset import EncodedDataset
from lorasmith.evaluation import measures
from lorasmith.evaluation.evaluation_record import NOISES
from lorasmith.evaluation.likeness import features
from lorasmith.evaluation.recognition import recogniser_of
from lorasmith.evaluation.verdict import Drawn, measured, scores, training_facts, verdict
from lorasmith.families.conditionings import collate
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.library import load_dataset, train
from lorasmith.sampling.generate import generate, to_images
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.samplers import sigmas_for
from tools.pretrain.data import CONCEPTS, short_name, with_article
from tools.pretrain.transformer import DRAWING_TRANSFORMER, DrawingTransformer

MEASURING = 2
"""Counted up when the same run would give other numbers: by other pictures, measures or steps of training."""

RECORD = Path(__file__).with_name("outcomes.jsonl")
"""What was measured of earlier runs, a line each, without their pictures; no folder makes them again."""

DRAWN_SEEDS = (1, 2, 3)  # of the trigger alone
ASKED_SEEDS = range(1, 7)  # of which the first ones are used from which the base model draws the wish
_EVALUATION_SEEDS = range(11, 11 + NOISES)
_SAMPLING_STEPS = 4  # the judge sees as much in such drawings as in those of twenty
_BATCH = 12  # pictures that are drawn at once
TINY = "lorasmith-tiny"
JUDGED = (TINY, DRAWING_TRANSFORMER)  # names of models whose drawings the judge knows
_KEPT_EACH = 20  # each run draws three of the sixty concepts without the trigger; runs share them out
_SHOWN = (0, 1, 3, 5)  # pictures that are kept: the trigger, and prompts


@dataclass(frozen=True)
class Setting:
    """What runs have in common: `subjects`, `clip` and `dino` are folders; `comfyui` a checkout and its Python."""

    looks: tuple[int, ...]  # pictures seen at each checkpoint
    model: str = TINY
    subjects: Path | None = None
    clip: Path | None = None
    dino: Path | None = None
    comfyui: tuple[Path, Path] | None = None

    @property
    def network(self) -> str:
        """The model's name in tables."""
        return Path(self.model).stem

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
    """A run: a recipe on so many pictures of a task, until `length` pictures are seen, the last of the looks for 0."""

    recipe: str
    task: str
    pictures: int
    seed: int
    factor: float
    changes: Mapping[str, Any] = field(default_factory=dict)
    in_comfyui: bool = False
    length: int = 0
    is_evaluated: bool = False
    is_captioned: bool = False  # whether captions say what a picture shows besides the trigger

    def settings(self, setting: Setting) -> dict[str, Any]:
        """Of the training."""
        recipe = RECIPES[self.recipe].at(self.factor, is_transformer=setting.network == DRAWING_TRANSFORMER)
        # What the small models train in is the fastest one for them on a CPU, and the same for all.
        return {"training_dtype": "fp32" if setting.subjects is None else "auto", **recipe, **self.changes}

    def looks(self, setting: Setting) -> list[int]:
        """Pictures seen at each of its checkpoints."""
        return [one for one in setting.looks if one <= (self.length or setting.looks[-1])]


@dataclass(frozen=True)
class Checkpoint:
    """What was measured of a LoRA, each from 0 to 1 but memorisation."""

    looks: int  # pictures seen
    seconds: float  # of training, on the CPU processor time
    fidelity: float  # of the subject, by the sight
    likeness: float  # to held-out pictures
    adherence: float | None  # to what prompts ask for besides the subject, by the sight
    diversity: float
    memorisation: float  # how much nearer the nearest trained picture is than the nearest held-out one
    drift: float  # of pictures without the trigger
    bleed: float | None  # of the class without the trigger, by the sight; None for a style
    evaluation: float | None = None  # by which `lorasmith evaluate` recommends it; None if it was not asked

    @property
    def score(self) -> float:
        """Fidelity times adherence."""
        return self.fidelity * (1.0 if self.adherence is None else self.adherence)


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    network: str
    job: Job
    checkpoints: tuple[Checkpoint, ...]
    strip: Path  # a row of square pictures a checkpoint: the trigger, and prompts


class Store:
    """Outcomes in a folder or on record, each under a digest of all that matters for its numbers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = RECORD.read_text("utf-8").splitlines() if RECORD.exists() else ()
        self._recorded = {json.loads(line)["digest"]: line for line in lines}

    def known(self, setting: Setting, job: Job) -> Outcome | None:
        """The outcome of a run, if it is there."""
        file = self.file(setting, job)
        line = file.read_text("utf-8") if file.exists() else self._recorded.get(file.stem)
        if line is None:
            return None
        found = json.loads(line)["checkpoints"]
        return Outcome(setting.network, job, tuple(Checkpoint(**one) for one in found), file.with_suffix(".png"))

    def record(self) -> None:
        """Put what the folder has on record."""
        for file in self._folder.glob("*.json"):
            found = json.loads(file.read_text("utf-8"), parse_float=lambda text: round(float(text), 4))
            self._recorded[file.stem] = json.dumps({"digest": file.stem, **found})
        write_atomic(RECORD, "".join(f"{line}\n" for _, line in sorted(self._recorded.items())))

    def file(self, setting: Setting, job: Job) -> Path:
        """Where an outcome is kept, whatever the recipe and the model are called."""
        taught = _task_digest(setting, job.task, job.pictures, job.is_captioned), _model_digest(setting.model)
        facts = [taught, job.settings(setting), job.seed, job.looks(setting), job.in_comfyui, job.is_evaluated]
        text = json.dumps([MEASURING, *facts], sort_keys=True, default=str)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"

    def keep(
        self, setting: Setting, job: Job, found: Sequence[Checkpoint], rows: Sequence[Sequence[Image.Image]]
    ) -> None:
        """Write an outcome."""
        file = self.file(setting, job)
        strip = tiles([[one.resize((64, 64)) for one in row] for row in rows])
        strip.save(file.with_suffix(".png"))
        kept = {"network": setting.network, "job": asdict(job), "checkpoints": [asdict(one) for one in found]}
        write_atomic(file, json.dumps(kept, default=str))

    def make(self, runs: Sequence[tuple[Setting, Job]], workers: int, until: float) -> None:
        """Make what is missing in order, none begun after a time; several programs may do so at once."""
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(self, runs, until)) for _ in range(workers)]
        for one in processes:
            one.start()
        for one in processes:
            one.join()
        if any(one.exitcode for one in processes):
            raise SystemExit("a process failed; its error is above, and what was made is kept")


@functools.cache
def _model_digest(name: str) -> str:
    file = BUILT_IN_BASE / "models" / "checkpoints" / f"{TINY}.safetensors" if name == TINY else Path(name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else name


@functools.cache
def _task_digest(setting: Setting, name: str, pictures: int, is_captioned: bool) -> str:
    task = setting.tasks()[name]
    found = hashlib.sha256(repr((task.trigger, [one.text for one in task.prompts])).encode())
    for one in task.training[pictures]:
        found.update(one.tobytes())
    if is_captioned:
        found.update(repr(task.shown).encode())
    return found.hexdigest()


def _work(store: Store, runs: Sequence[tuple[Setting, Job]], until: float) -> None:
    """Of a worker process: make runs that nobody has made or is making."""
    for setting, job in runs:
        if time.time() > until:
            return
        file = store.file(setting, job)
        if store.known(setting, job):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(file.with_suffix(".claim"), "another process makes this run", surely=True))
            except OutputError:
                continue
            if not file.exists():
                _prepare(setting)
                store.keep(setting, job, *_bench.run(job))
                print(f"{setting.network}: {job}", file=sys.stderr, flush=True)


def _prepare(setting: Setting) -> None:
    """In a process of one thread, whose texts and pictures are encoded by itself."""
    global _bench  # noqa: PLW0603 - of a worker process
    torch.set_num_threads(1)
    os.environ.setdefault("LORASMITH_CACHE_DIR", tempfile.mkdtemp())
    _register()
    _bench = _bench_of(setting)


@functools.cache
def _register() -> None:
    ls.register("families", DRAWING_TRANSFORMER, DrawingTransformer)


@functools.cache
def _bench_of(setting: Setting) -> Bench:
    return Bench(setting)


def encoded(model: Model, task: Task, pictures: int, *, is_captioned: bool = False) -> EncodedDataset:
    """So many pictures of a task, with its trigger as their caption, and what else they show."""
    training = task.training[pictures]
    texts = [task.trigger] * len(training)
    if is_captioned and task.shown:
        texts = [f"{task.trigger}, {one}" for one in task.shown[pictures]]
    return load_dataset([*zip(training, texts, strict=True)], model, progress=False)


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


def tiles(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for top, row in enumerate(rows):
        for left, one in enumerate(row):
            whole.paste(one, (left * width, top * height))
    return whole


class Bench:
    """A model, what looks at its pictures, and what the base draws."""

    def __init__(self, setting: Setting) -> None:
        self.model, self.sight = load_model(setting.model), setting.sight()
        self.setting, self._tasks = setting, setting.tasks()
        self._asked_each = 2 if setting.subjects is None else 1  # pictures of each prompt; others have more prompts
        self._recogniser = recogniser_of(is_built_in=setting.subjects is None)
        self._data: dict[tuple[str, int, bool], EncodedDataset] = {}
        self._base: dict[tuple[str, int], Image.Image] = {}
        self._seeds: dict[str, list[tuple[Prompt, int]]] = {}
        self._features: dict[tuple[str, int], Tensor] = {}

    def run(self, job: Job) -> tuple[list[Checkpoint], list[list[Image.Image]]]:
        """Train, and measure each checkpoint; returns the pictures that are kept of each, too.

        What cannot be trained, as its rate is too high, shows nothing.
        """
        task, looks = self._tasks[job.task], job.looks(self.setting)
        self._encoded(task, job)
        with tempfile.TemporaryDirectory() as folder:
            clock = clock_of(best_device())
            began = clock()
            try:
                files = (self._trained_in_comfyui if job.in_comfyui else self._trained)(job, task, Path(folder))
            except TrainingError:
                empty = [Image.new("RGB", (64, 64))] * len(_SHOWN)
                return [Checkpoint(one, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0) for one in looks], [empty] * len(looks)
            seconds = (clock() - began) / looks[-1]
            found = [self._measured(task, job, *one, seconds) for one in zip(files, looks, strict=True)]
        return [one for one, _ in found], [pictures for _, pictures in found]

    def _trained(self, job: Job, task: Task, folder: Path) -> list[Path]:
        """The file of each checkpoint."""
        settings = job.settings(self.setting)
        if settings.get("preserve") == "class":
            settings["preserve_class"] = task.trigger.removeprefix("sks ")
        steps = [look // int(settings.get("batch_size", 1)) for look in job.looks(self.setting)]
        return checkpoints(self.model, self._encoded(task, job), task, folder, steps=steps, seed=job.seed, **settings)

    def _trained_in_comfyui(self, job: Job, task: Task, folder: Path) -> list[Path]:
        """The same of ComfyUI's own node, in a process of its own."""
        assert self.setting.comfyui is not None
        checkout, python = self.setting.comfyui
        data = self._encoded(task, job)
        inputs = {
            "latents": torch.stack([one.latents for one in data]),
            "context": torch.cat([one.conditioning.tensors["context"] for one in data]),
        }
        save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, folder / "inputs.safetensors")
        files = {look: folder / f"{look}.safetensors" for look in job.looks(self.setting)}
        request = {
            "checkout": str(checkout),
            "model": str(BUILT_IN_BASE / "models" / "checkpoints" / f"{TINY}.safetensors"),
            "inputs": str(folder / "inputs.safetensors"),
            "settings": {"learning_rate": job.settings(self.setting)["learning_rate"], "seed": job.seed},
            "files": {look: str(file) for look, file in files.items()},
        }
        command = [str(python), str(Path(__file__).with_name("in_comfyui.py"))]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(
            command, input=json.dumps(request), text=True, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        return [*files.values()]

    def _encoded(self, task: Task, job: Job) -> EncodedDataset:
        key = (task.name, job.pictures, job.is_captioned)
        if key not in self._data:
            self._data[key] = encoded(self.model, task, job.pictures, is_captioned=job.is_captioned)
        return self._data[key]

    def _drawn(self, asked: Sequence[tuple[str, int]], lora: Path | None) -> list[Image.Image]:
        """A picture of each prompt and seed; those of the judge's models in batches, 2.5 times as fast."""
        base, loras = self.model, [] if lora is None else [(lora, 1.0)]
        denoiser, encoder = with_loras(base.denoiser, base.text_encoder, loras)
        prompts, seeds = zip(*asked, strict=True)
        if self.setting.subjects is not None:
            return generate(denoiser, prompts, text_encoder=encoder, seed=seeds)
        device, diffusion = best_device(), denoiser.diffusion
        with encoder.active(device):
            known = {text: encoder.encode(text) for text in dict.fromkeys((*prompts, ""))}
        edge, pictures = base.defaults.resolution, []
        shape = 1, *base.components.latent.shape(edge, edge, 1)
        for start in range(0, len(asked), _BATCH):
            some = slice(start, start + _BATCH)
            noise = torch.cat([prepare_noise(one, shape) for one in seeds[some]])
            with denoiser.placed(device, torch.float32):
                latents = sample_latents(
                    denoiser.predict,
                    schedule=diffusion.schedule,
                    parameterization=diffusion.parameterization,
                    positive=[collate([known[text] for text in prompts[some]], repeatable=True)],
                    negative=[collate([known[""]] * len(noise), repeatable=True)],
                    latents=torch.zeros_like(noise, device=device),
                    noise=noise,
                    sigmas=sigmas_for(diffusion.schedule, "normal", _SAMPLING_STEPS, sampler="euler"),
                    sampler="euler",
                    cfg=base.defaults.guidance,
                    seed=0,
                    dtype=torch.float32,
                )
            with base.autoencoder.active(device):
                pixels = base.autoencoder.decode_frames(base.components.latent.from_model(latents))
            pictures += to_images(pixels.squeeze(2))
        return pictures

    def _from_base(self, asked: Sequence[tuple[str, int]]) -> list[Image.Image]:
        if missing := [one for one in dict.fromkeys(asked) if one not in self._base]:
            self._base |= zip(missing, self._drawn(missing, None), strict=True)
        return [self._base[one] for one in asked]

    def _place(self, job: Job) -> int:
        """Number of a subject and seed, the same for all recipes."""
        return [*self._tasks].index(job.task) + len(self._tasks) * job.seed

    def _asked(self, task: Task) -> list[tuple[Prompt, int]]:
        """Prompts, each with the first noises from which the base model itself draws what they ask for."""
        if task.name not in self._seeds:
            found: dict[Prompt, list[int]] = {one: [] for one in task.prompts}
            for seed in ASKED_SEEDS:
                lacking = [one for one, seeds in found.items() if len(seeds) < self._asked_each]
                drawn = self._from_base([(one.text, seed) for one in lacking])
                for one, picture in zip(lacking, drawn, strict=True):
                    found[one] += [seed] * self.sight.shows(one, picture)
            self._seeds[task.name] = [(one, seed) for one, seeds in found.items() for seed in seeds]
        return self._seeds[task.name]

    def _measured(
        self, task: Task, job: Job, lora: Path, looks: int, seconds: float
    ) -> tuple[Checkpoint, list[Image.Image]]:
        pairs = self._asked(task)
        prompts = [one for one, _ in pairs]
        kept = [with_article(short_name(one)) for one in CONCEPTS[self._place(job) % _KEPT_EACH :: _KEPT_EACH]]
        of_class = [] if task.of_class is None else [with_article(short_name(task.of_class))]
        untaught = [(one, 1) for one in (*kept, *of_class)]
        texts = [(task.trigger, seed) for seed in DRAWN_SEEDS] + [(one.text, seed) for one, seed in pairs]
        evaluated = self._evaluated(task) if job.is_evaluated else []
        drawn = iter(self._drawn([*texts, *untaught, *evaluated], lora))
        plain, asked, without = ([*islice(drawn, len(some))] for some in (DRAWN_SEEDS, pairs, untaught))
        base = self._from_base(untaught)
        firsts = dict(reversed([*zip(prompts, asked, strict=True)]))
        shown = [plain[0], *(firsts.get(one, plain[0]) for one in task.prompts)]
        found, held_out = features(plain), self._features_of(task, 0)
        return Checkpoint(
            looks=looks,
            seconds=seconds * looks,
            fidelity=self.sight.fidelity(task, [*plain, *asked]),
            likeness=measures.likeness(found, held_out),
            adherence=self.sight.adherence(prompts, asked),
            diversity=measures.diversity(found) or 0.0,
            memorisation=measures.nearest(found, self._features_of(task, job.pictures))
            - measures.nearest(found, held_out),
            drift=measures.drift(features(base[: len(kept)]), features(without[: len(kept)])),
            bleed=self.sight.bleed(task, base[len(kept) :], without[len(kept) :]),
            evaluation=self._evaluation(task, job, [*drawn]) if job.is_evaluated else None,
        ), [shown[place] for place in _SHOWN if place < len(shown)]

    def _evaluated(self, task: Task) -> list[tuple[str, int]]:
        """What `lorasmith evaluate` draws of a subject, from other noises than those of the measures."""
        return [
            (text, seed) for seed in _EVALUATION_SEEDS for text in (task.trigger, *(one.text for one in task.prompts))
        ]

    def _evaluation(self, task: Task, job: Job, pictures: Sequence[Image.Image]) -> float:
        """The score by which `lorasmith evaluate` recommends a checkpoint, 0 if it never would."""
        sight, asked = self._recogniser, self._evaluated(task)

        def drawn(pictures: Sequence[Image.Image]) -> Drawn:
            each = iter(pictures)
            return seen(sight, task, [[*islice(each, len(task.prompts) + 1)] for _ in _EVALUATION_SEEDS])

        base, trained = drawn(self._from_base(asked)), sight.features(list(task.training[job.pictures]))
        found, facts = [measured(drawn(pictures), base, trained)], training_facts(trained, base)
        return scores(found, facts)[0] if verdict(found, facts).outcome == "use" else 0.0

    def _features_of(self, task: Task, pictures: int) -> Tensor:
        """Features of so many pictures for training, or of the held-out ones for 0."""
        key = (task.name, pictures)
        if key not in self._features:
            self._features[key] = features(task.training[pictures] if pictures else task.held_out)
        return self._features[key]
