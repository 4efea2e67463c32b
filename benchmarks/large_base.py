"""What a base folder of thousands costs the server's assistant: lists of runs, a log of a gigabyte, many photos.

Each question is asked twice or more, in this process: the first time as after a start, then again.

    python -m benchmarks.large_base
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.results import Results, add_json
from lorasmith.core.folders import Folders
from lorasmith.server.questions import answer, load_questions
from lorasmith.training.events import Outcome, RunFinished, RunStarted, encoded
from lorasmith.training.storage.records import ModelRecord, RunRecord, SampleRecord

_BEGIN = 1.79e9
_RECORD = RunRecord(
    title="dog",
    source={"command": "train", "model": "lorasmith-tiny", "folder": "input/dog", "name": "dog"},
    model=ModelRecord(name="lorasmith-tiny", family="sd1"),
    config={"steps": 40, "algorithm": "LoRA", "rank": 16},
    samples=tuple(SampleRecord(name=f"{number}.png", caption="a dog", latents=(4, 8, 8)) for number in range(20)),
).to_text()


def main() -> None:
    arguments = _arguments()
    load_questions()
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        for number in range(arguments.runs):
            _run(base / "runs" / f"dog-{number:06}", 40, at=_BEGIN + number)
        _run(base / "output" / "runs" / "long", arguments.log_mb * 2**20 // len(_step(10**6, 0.0)), at=_BEGIN)
        _photos(base / "input" / "many", arguments.photos)
        os.chdir(base)
        results = Results(arguments)
        results.table({"": "", "first, s": ".3f", "again, s": ".3f"})
        long = {"id": "output/runs/long"}
        for label, question, given in (
            (f"GET /runs?limit=100 of {arguments.runs:,}", "runs", {"limit": 100}),
            ("GET /runs", "runs", {}),
            (f"GET /runs/ID, a log of {arguments.log_mb:,} MB", "run", long),
            ("its report", "run_page", long),
            ("its stream's view", "run_view", long),
            (f"GET /datasets/NAME of {arguments.photos:,}", "dataset", {"name": "many"}),
            ("its check", "check_dataset", {"name": "many"}),
        ):
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                answer(question, given, Folders(base))
                seconds.append(time.perf_counter() - begin)
            results.add(label, seconds[0], min(seconds[1:]))
        os.chdir("/")


def _run(folder: Path, steps: int, *, at: float) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(_RECORD, encoding="utf-8")
    os.utime(folder / "run.json", (at, at))
    start = RunStarted(
        at=at, steps=steps, steps_before=0, samples=20, adapters=16, parameters=10**6, device="cpu", dtype="fp32"
    )
    with (folder / "events.jsonl").open("w", encoding="utf-8") as log:
        log.write(encoded(start) + "\n")
        log.writelines(_step(step, at) for step in range(1, steps + 1))
        log.write(encoded(RunFinished(at=at + steps, step=steps, reason=Outcome.FINISHED)) + "\n")


def _step(step: int, at: float) -> str:
    """A line as `encoded` writes it, of eight samples."""
    draws = ", ".join(f"[{(step + place) % 20}, 0.{place}5, {0.1 + 1 / step:.16f}]" for place in range(8))
    return (
        f'{{"event": "StepDone", "version": 1, "at": {at + step}, "step": {step}, "loss": {0.1 + 1 / step}, '
        f'"grad_norm": 1.0, "learning_rate": 0.0001, "draws": [{draws}], "noise_scale": 0.0, "memory_bytes": 1000}}\n'
    )


def _photos(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        content = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(content, "JPEG")
        (folder / f"{number:06}.jpg").write_bytes(content.getvalue())
        (folder / f"{number:06}.txt").write_text(f"a photo of thing {number}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--log-mb", type=int, default=1024)
    parser.add_argument("--photos", type=int, default=10_000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
