"""Runs that are killed at random moments, or whose states rot on the disk, must end as if nothing had happened.

    python -m tests.training.crash --kills 200 --flips 100

Each trial trains in a child process, which is killed (SIGKILL, nothing is told to it) after a random time, or by
itself in the middle of writing a random file; the run is started again, killed again, and in the end let through. Then
the LoRA must have the tensors, and the log the losses, of the run that was never killed. After each kill every file is
looked at: none may be unreadable.

The case `encoding` trains on a folder of pictures with an empty cache, so that most of its kills hit while pictures and
captions are encoded. An evaluation that is killed is started again in the same way: it must end with the files of the
one that was never killed, an earlier one must be there all the time, and nothing else may be left.

Each flip is one bit of one of the states of a stopped run, anywhere in the file. Resuming must pass the damaged state
over by name, use the other one, and end with the tensors and losses of the run that was never touched. Run states are
the only binary files that a run reads back: those of encoded images and captions have `tests/data/crash_cache.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import LorasmithError
from lorasmith.core.files import restore_folders
from lorasmith.data.data_config import ImageSource
from lorasmith.data.dataset import EncodedCaptions, EncodedDataset, Sample
from lorasmith.evaluation import likeness
from lorasmith.evaluation.evaluation_record import DrawingSettings
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Model
from lorasmith.formats import container
from lorasmith.formats.container import read_safetensors
from lorasmith.runs.evaluate import evaluate, subject_of
from lorasmith.runs.library import train
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host
from lorasmith.runs.run import run as start
from lorasmith.runs.spec import RunSpec
from lorasmith.training.events import Event, Resumed, StepDone, Warned
from lorasmith.training.storage.run_folder import RunFolder
from lorasmith.training.storage.run_states import load_state

_BASE: dict[str, Any] = {
    "steps": 10,
    "rank": 4,
    "targets": "attention",
    "learning_rate": 1e-3,
    "seed": 3,
    "save_state_every": 2,
    "validation_share": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "buckets": {"batch_size": 3, "training_dtype": "bf16"},
    "accumulation": {"batch_size": 2, "grad_accumulation_steps": 2, "training_dtype": "fp32", "schedule": "cosine"},
    "average": {"ema_decay": 0.9, "training_dtype": "bf16", "warmup_steps": 4},
    "dropout": {"batch_size": 2, "rank_dropout": 0.3, "module_dropout": 0.2, "training_dtype": "fp32"},
    "validation": {
        "batch_size": 2,
        "validation_share": 0.3,
        "validate_every": 3,
        "validation_draws": 2,
        "ema_decay": 0.8,
        "save_state_every": 1,
        "training_dtype": "fp32",
    },
    "slider": {"slider_positive": "a red apple", "slider_negative": "a bus", "training_dtype": "fp32"},
    "pairs": {"pairs": "slider", "preserve": "blank", "ema_decay": 0.9, "training_dtype": "fp32"},
    "preference": {"pairs": "dpo", "batch_size": 2, "rank_dropout": 0.3, "training_dtype": "bf16"},
    "averages": {"post_hoc_ema": 5, "ema_decay": 0.8, "training_dtype": "bf16"},
    "encoding": {
        "trigger": "sks",
        "flip": True,
        "resolution": 64,
        "steps": 2,
        "previews": "",
        "training_dtype": "fp32",
    },
}
"""Settings of the runs, over `_BASE`; the samples are of several sizes."""

_PICTURES = 12  # of the case `encoding`


@dataclass(frozen=True)
class Outcome:
    """What a run left: the tensors of the LoRA and of its averages, and the loss of each step from its log."""

    tensors: dict[str, Tensor]
    losses: dict[int, float]

    def same_as(self, other: Outcome) -> bool:
        """To the bit."""
        return (
            self.losses == other.losses
            and self.tensors.keys() == other.tensors.keys()
            and all(torch.equal(tensor, other.tensors[name]) for name, tensor in self.tensors.items())
        )


def samples(model: Model) -> EncodedDataset:
    """Seven samples of two sizes with three captions."""
    g = torch.Generator().manual_seed(0)
    captions = [model.text_encoder.encode(text) for text in ("a cat", "a red apple, noto style", "")]
    return EncodedDataset(
        tuple(
            Sample(torch.randn(4, 8, 8 + 4 * (index % 2), generator=g), captions[index % 3], f"{index}.png")
            for index in range(7)
        ),
        EncodedCaptions(model.text_encoder.encode),
    )


def run(model: Model, data: EncodedDataset, case: str, folder: Path, **options: Any) -> None:
    """Train, or go on."""
    settings = _BASE | CASES[case]
    if case == "encoding":
        os.environ["LORASMITH_CACHE_DIR"] = str(folder.with_name(f"{folder.name}-cache"))
        images = (ImageSource(str(pictures(folder.with_name("pictures")))),)
        spec = RunSpec(sources=images, model=BUILT_IN, name="lora", output=str(folder), settings=settings)
        start(plan(spec.resolved(), Host()), Host())
        return
    if "pairs" in settings:
        data = replace(data, samples=tuple(replace(one, opposite=one.latents.flip(-1)) for one in data.samples))
    train(model, data, output=folder, **settings, **options)


def pictures(folder: Path) -> Path:
    """A folder of pictures of noise with captions, made if it is not there."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
        for index in range(_PICTURES):
            pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"a cat on {index} mats")
    return folder


def outcome(folder: Path) -> Outcome:
    """What a finished run left."""
    tensors = {
        f"{path.name} {name}": tensor
        for path in (folder / "lora.safetensors", *sorted(folder.glob("averages/*.safetensors")))
        for name, tensor in read_safetensors(path)[0].items()
    }
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "StepDone"]
    assert [event["step"] for event in steps] == sorted({event["step"] for event in steps}), "steps in the log twice"
    return Outcome(tensors, {event["step"]: event["loss"] for event in steps})


def check_readable(folder: Path) -> int:
    """Read everything that a killed run left, half-written temporary files aside; returns the number of files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    for path in files:
        if path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines(keepends=True):
                assert not line.endswith("\n") or json.loads(line), path  # the last line may be cut short
    return len(files)


class Trials:
    """Kills runs and compares what they come to.

    Args:
        work: folder for the runs.
    """

    def __init__(self, work: Path) -> None:
        self._work = work
        self._model = load_model(BUILT_IN)
        self._data = samples(self._model)
        self._references: dict[str, tuple[Outcome, float]] = {}

    def trial(self, case: str, chance: random.Random, *, most_kills: int = 3) -> int:
        """One run with one to `most_kills` kills; returns how many hit. Raises AssertionError if anything is wrong."""
        reference, seconds = self._reference(case)
        folder = self._work / "trial"
        for path in (folder, folder.with_name("trial-cache")):
            shutil.rmtree(path, ignore_errors=True)
        hits = 0
        for _ in range(chance.randint(1, most_kills)):
            killer = _in_a_write(chance) if chance.random() < 0.5 else None
            child = self._start(case, folder, killer)
            if killer is None:
                child.join(chance.uniform(0, 1.1 * seconds))
                child.kill()
            child.join()
            assert child.exitcode in (0, -signal.SIGKILL), f"{case}: exit status {child.exitcode}"
            if folder.exists():
                check_readable(folder)
            hits += child.exitcode != 0
            if RunFolder(folder).is_done:
                assert (folder / "report.html").is_file(), f"{case}: complete without a report"
                break
        else:
            self._finish(lambda: run(self._model, self._data, case, folder))
        assert outcome(folder).same_as(reference), f"{case}: another result after {hits} kills"
        return hits

    def evaluated(self, chance: random.Random, *, most_kills: int = 3) -> int:
        """One evaluation with kills; returns how many hit. Raises AssertionError if anything is wrong."""
        folder = self._work / "evaluated"
        if not (folder / "reference").exists():
            train(self._model, self._data, output=folder / "run", trigger="cat", save_every=1, **(_BASE | {"steps": 2}))
            begun = time.monotonic()
            self._finish(lambda: evaluation(self._model, folder / "run", folder / "reference"))
            self._seconds = time.monotonic() - begun
        there, hits = folder / "trial", 0
        shutil.rmtree(there, ignore_errors=True)
        if is_second := chance.random() < 0.5:
            shutil.copytree(folder / "reference", there)
        for _ in range(chance.randint(1, most_kills)):
            child = _forked(lambda: evaluation(self._model, folder / "run", there))
            child.join(chance.uniform(0, 1.1 * self._seconds))
            child.kill()
            child.join()
            hits += child.exitcode != 0
            restore_folders(folder)
            assert not is_second or contents(there) == contents(folder / "reference"), "the earlier one has gone"
        self._finish(lambda: evaluation(self._model, folder / "run", there))
        assert contents(there) == contents(folder / "reference"), "another evaluation"
        left = {path.name for path in folder.iterdir()} - {"run", "reference", "trial", "run-pictures"}
        assert not left, f"an evaluation that was killed left {left}"
        return hits

    def _finish(self, work: Callable[[], object]) -> None:
        child = _forked(work)
        child.join()
        assert child.exitcode == 0, f"exit status {child.exitcode}"

    def flip(self, case: str, chance: random.Random) -> None:
        """One bit flipped in a state of a stopped run. Raises AssertionError if it is not noticed, or used."""
        reference, _ = self._reference(case)
        folder = self._work / "flipped"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._stopped(case), folder)
        path = chance.choice(sorted((folder / "states").glob("*.safetensors")))
        steps = sorted(int(one.stem.removeprefix("step-")) for one in path.parent.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(content))
        if chance.random() < 0.3:  # the header is a small part of the file
            bit = chance.randrange(8 * (8 + int.from_bytes(content[:8], "little")))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            load_state(path)
        except LorasmithError:
            pass
        else:
            raise AssertionError(f"{case}: bit {bit} of {path.name} is not noticed")
        events: list[Event] = []
        run(self._model, self._data, case, folder, on_event=events.append)
        is_newest = path.stem == f"step-{steps[-1]:06}"
        start = steps[-2] if is_newest else steps[-1]
        said = [one.message for one in events if isinstance(one, Warned) and "run state is skipped" in one.message]
        assert [path.name in message for message in said] == [True] * is_newest, f"{case}: {said}"
        assert [one.step for one in events if isinstance(one, Resumed)] == [start], f"{case}: bit {bit} of {path.name}"
        assert outcome(folder).same_as(reference), f"{case}: another result after bit {bit} of {path.name}"

    def _stopped(self, case: str) -> Path:
        """The folder of a run that was stopped after six of its steps, with two states; not to be changed."""
        folder = self._work / f"stopped-{case}"
        if not folder.exists():
            taken: list[Event] = []
            stop = lambda: any(isinstance(one, StepDone) and one.step == 6 for one in taken)  # noqa: E731
            run(self._model, self._data, case, folder, on_event=taken.append, cancelled=stop)
        return folder

    def _reference(self, case: str) -> tuple[Outcome, float]:
        """The run that is not killed, and the seconds it took."""
        if case not in self._references:
            folder = self._work / f"reference-{case}"
            start = time.monotonic()
            self._finish(lambda: run(self._model, self._data, case, folder))
            self._references[case] = outcome(folder), time.monotonic() - start
        return self._references[case]

    def _start(self, case: str, folder: Path, killer: Callable[[], None] | None) -> multiprocessing.Process:
        def work() -> None:
            if killer is not None:
                killer()
            run(self._model, self._data, case, folder)

        return _forked(work)


def _forked(work: Callable[[], object]) -> multiprocessing.Process:
    """A process that works in silence, forked, so that the model is loaded once for hundreds of runs."""

    def alone() -> None:
        torch.set_num_threads(1)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        work()

    process = multiprocessing.get_context("fork").Process(target=alone)
    process.start()
    return process


def evaluation(model: Model, run: Path, output: Path) -> None:
    """Evaluate the LoRAs of a run by a wish, in coarse colours in place of a network's features."""
    likeness.features = lambda given: F.normalize(likeness.colours(given), dim=1)
    evaluate(model, subject_of([run], images=pictures(run.with_name("run-pictures"))), _DRAWING, output)


_DRAWING = DrawingSettings(prompts=("on a red background",), steps=1, noises=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _in_a_write(chance: random.Random) -> Callable[[], None]:
    """Has a process kill itself while it writes a safetensors file: behind a random number of pieces of all of them."""
    pieces = int(chance.expovariate(1 / 400))

    def arm() -> None:
        original = container.serialised
        left = pieces

        def deadly(tensors: Any, metadata: Any) -> Iterator[bytes]:
            nonlocal left
            for piece in original(tensors, metadata):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield piece

        container.serialised = deadly

    return arm


@contextmanager
def trials() -> Iterator[Trials]:
    """Trials in a temporary folder."""
    torch.set_num_threads(1)  # forking a process whose thread pool is awake would leave the child without it
    with tempfile.TemporaryDirectory(prefix="lorasmith-crash-") as folder:
        yield Trials(Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "evaluation"], default=[*CASES, "evaluation"])
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    kills = runs = 0
    start = time.monotonic()
    with trials() as trial:
        while kills < arguments.kills:
            case = arguments.cases[runs % len(arguments.cases)]
            kills += trial.evaluated(chance) if case == "evaluation" else trial.trial(case, chance)
            runs += 1
            print(f"\r{kills} kills in {runs} runs, {time.monotonic() - start:.0f} s", end="", flush=True)
        for flips in range(1, arguments.flips + 1):
            trial.flip([*CASES][flips % 5], chance)
            print(f"\r{flips} flipped bits, {time.monotonic() - start:.0f} s" + " " * 20, end="", flush=True)
    print(f"\n{arguments.flips} flipped bits in run states: each was noticed, and none used.")
    print(f"{runs} runs, {kills} kills: each ended with the tensors and losses of the run that was never killed.")


if __name__ == "__main__":
    main()
