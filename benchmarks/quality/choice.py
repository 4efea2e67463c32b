"""Whether `lorasmith evaluate` picks a good checkpoint, on runs of the built-in model that are far too long.

    python -m benchmarks.quality.choice --folder /tmp/choice --json choice.json
    python -m benchmarks.quality.choice --folder /tmp/choice --runs fox/0 owl/3

Each run saves ten checkpoints, which draw the trigger and the benchmark's prompts. Long runs have the default rate and
see six times as many pictures as the benchmark's; fast ones have four to six times that rate. The evaluation sees the
pictures of as many seeds as it draws by default, and recommends one. The judge scores all by fidelity times adherence
with the pictures of twelve other seeds; of wishes those count which the base model itself fulfils from the same noise.
By that score, the recommended checkpoint falls short of the best one; so do the last one, and the one that the judge
finds best by the seeds that the evaluation sees. The rule was chosen with the long runs. Runs whose rate is so low
that nothing is learnt must get no recommendation. What is in the folder already is not made again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.bases import machine
from benchmarks.quality.measuring import TINY, checkpoints, encoded
from benchmarks.quality.sights import JudgeSight, seen
from benchmarks.quality.subjects import DEVELOPMENT, Task, subject_task
from benchmarks.results import Results, add_json
from lorasmith.evaluation.evaluation_record import NOISES
from lorasmith.evaluation.recognition import recogniser_of
from lorasmith.evaluation.verdict import measured, training_facts, verdict
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.drawing import with_loras
from lorasmith.sampling.generate import generate

CHECKPOINTS = 10  # of each run
SEEDS = range(11, 11 + NOISES + 12)  # the first ones are seen by the evaluation, the others by the judge
WHO = ("evaluate", "the last one", "the judge by the same seeds")
SAMPLING_STEPS = 4
NEAR = 0.05  # of the best score, within which a choice is good


@dataclass(frozen=True)
class Run:
    """A run on four pictures of a subject."""

    subject: str
    seed: int
    rate: float | None = None  # None for the default, which is 0.0014 here, falling to 0
    every: int = 8  # steps of a checkpoint

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.seed}"


_RATES = (0.005, 0.006, 0.007, 0.008)
_SUBJECTS = ("fox", "rocket", "pineapple", "owl", "guitar")
FAST = [
    Run(subject, seed, _RATES[(seed * len(_SUBJECTS) + place) % 4])
    for seed in (0, 1)
    for place, subject in enumerate(_SUBJECTS)
]
LONG = [Run(subject, 2, every=24) for subject in DEVELOPMENT] + [
    Run(one, 3, every=24) for one in ("fox", "owl", "guitar")
]
NOTHING = [Run("fox", 5, 1e-6), Run("rocket", 5, 1e-5), Run("owl", 5, 2e-5)]


def main() -> None:
    known = {run.name: run for run in (*FAST, *LONG, *NOTHING)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of LoRAs, and of what is known of their pictures")
    parser.add_argument("--runs", nargs="+", default=[*known], choices=[*known], metavar="SUBJECT/SEED")
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    bench = Bench()
    columns = {"run": "", "rate": "", "recommended step": "", "its score": ".2f", "best step": "d"}
    results.table(
        {**columns, "best score": ".2f", **{f"{who} short by": ".0%" for who in WHO}},
        "The recommended checkpoint, and the best one by the judge",
    )
    short: dict[str, list[tuple[float, ...]]] = {"fast": [], "long": []}
    refused: list[bool] = []
    for run in (known[name] for name in arguments.runs):
        chosen, values, by = bench.run(run, arguments.folder / run.name)
        if run in NOTHING:
            refused.append(chosen is None)
        else:
            short["fast" if run in FAST else "long"].append(by)
        best = values.index(max(values))
        results.add(
            run.name,
            "default" if run.rate is None else f"{run.rate:g}",
            "none" if chosen is None else str((chosen + 1) * run.every),
            None if chosen is None else values[chosen],
            (best + 1) * run.every,
            values[best],
            *([None] * len(WHO) if run in NOTHING else by),
        )
    results.table(
        {"runs": "", "number": "d", "who chooses": "", "well": "d", "mean short by": ".0%"},
        f"Chosen well: within {NEAR:.0%} of the best checkpoint; none if nothing was learnt",
    )
    for name, rows in short.items():
        for place, who in enumerate(WHO if rows else ()):
            by_run = [row[place] for row in rows]
            results.add(name, len(rows), who, sum(one <= NEAR for one in by_run), statistics.mean(by_run))
    if refused:
        results.add("nothing learnt", len(refused), WHO[0], sum(refused), None)


class Bench:
    """The built-in model, and the judge."""

    def __init__(self) -> None:
        self._model, self._judge = load_model(TINY), JudgeSight()
        self._sight = recogniser_of(is_built_in=True)

    def run(self, run: Run, folder: Path) -> tuple[int | None, list[float], tuple[float, ...]]:
        """The place of the recommended checkpoint, the score of each, and by how much each of `WHO` falls short."""
        task = subject_task(run.subject)
        loras = _trained(run, self._model, folder)
        texts = [task.trigger, *(one.text for one in task.prompts)]
        base, *drawn = (self._drawn(texts, folder, one) for one in ("base", *(one.name for one in loras)))
        pictures = self._sight.features(list(task.training[4]))
        before = seen(self._sight, task, base[:NOISES])
        found = [measured(seen(self._sight, task, one[:NOISES]), before, pictures) for one in drawn]
        chosen = verdict(found, training_facts(pictures, before)).best
        fulfilled, judged = self._judged(task, base)[1], [self._judged(task, one) for one in drawn]
        by_same, values = (
            [_score(*one, fulfilled, some) for one in judged] for some in (slice(NOISES), slice(NOISES, None))
        )
        picked = (chosen, len(values) - 1, by_same.index(max(by_same)))
        return chosen, values, tuple(1.0 if one is None else 1 - values[one] / max(values) for one in picked)

    def _judged(self, task: Task, rows: Sequence[Sequence[Image.Image]]) -> tuple[Tensor, Tensor]:
        """Probability of the subject, and whether wishes are fulfilled, by seed and prompt."""
        fidelity = torch.tensor([[self._judge.fidelity(task, [one]) for one in row] for row in rows])
        return fidelity, torch.tensor([[*map(self._judge.shows, task.prompts, row[1:])] for row in rows])

    def _drawn(self, texts: Sequence[str], folder: Path, name: str) -> list[list[Image.Image]]:
        """Pictures of a LoRA, or of the base model, by seed and prompt."""
        known = folder / f"{name}.pictures.safetensors"
        if not known.exists():
            loras = [(folder / name, 1.0)] if (folder / name).exists() else []
            denoiser, encoder = with_loras(self._model.denoiser, self._model.text_encoder, loras)
            asked = [(text, seed) for seed in SEEDS for text in texts]
            prompts, seeds = zip(*asked, strict=True)
            drawn = generate(denoiser, prompts, text_encoder=encoder, seed=seeds, steps=SAMPLING_STEPS)
            pixels = torch.stack([torch.from_numpy(np.array(one)) for one in drawn])
            save_file({"pictures": pixels.unflatten(0, (len(SEEDS), -1))}, known)
        return [[Image.fromarray(one.numpy()) for one in row] for row in load_file(known)["pictures"]]


def _score(fidelity: Tensor, shows: Tensor, fulfilled: Tensor, seeds: slice) -> float:
    """Fidelity times adherence, of some seeds."""
    return float(fidelity[seeds].mean() * shows[seeds][fulfilled[seeds]].float().mean())


def _trained(run: Run, model: Model, folder: Path) -> list[Path]:
    steps = range(run.every, run.every * CHECKPOINTS + 1, run.every)
    files = [*(folder / f"one-step{step:08}.safetensors" for step in steps[:-1]), folder / "one.safetensors"]
    if not all(file.exists() for file in files):
        task, rates = subject_task(run.subject), {} if run.rate is None else {"learning_rate": run.rate}
        checkpoints(model, encoded(model, task, 4), task, folder, steps=steps, seed=run.seed, batch_size=4, **rates)
    return files


if __name__ == "__main__":
    main()
