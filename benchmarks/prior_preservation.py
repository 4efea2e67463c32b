"""What prior preservation keeps: the built-in model learns a subject with and without it.

    python -m benchmarks.prior_preservation

Six pictures of a fox, which the model does not know, are trained as `sks lion`. The score of the class is the share of
pictures of a lion (no trigger, in styles and on backgrounds that the model knows) in which a classifier sees a lion,
the score of the subject that of `sks lion` in which it sees a fox. Prints both for the base model, and for LoRAs
trained without any preservation, with pictures of the class, and with output preservation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.data_config import ImageSource
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser
from lorasmith.runs.plan import plan
from lorasmith.runs.run import Host, run
from lorasmith.runs.spec import RunSpec
from lorasmith.sampling.generate import generate
from lorasmith.training.results import TrainResult
from tools.pretrain.judge import Judge

SUBJECT = ("sks lion", "sks lion, on a white background", "sks lion, noto style")
CLASS = (
    "a lion",
    "a lion, noto style",
    "a lion, flat style",
    "a lion, on a blue background",
    "a lion, on a black background",
)


def subject_folder(folder: Path) -> Path:
    """The fox pictures, without their captions."""
    folder.mkdir()
    for picture in (BUILT_IN_BASE / "input" / "fox").glob("*.png"):
        shutil.copy(picture, folder)
    return folder


def scores(denoiser: Denoiser, judge: Judge, *, seeds: int) -> dict[str, float]:
    """Share of pictures of class and subject in which the classifier sees them."""
    found = {}
    for name, prompts, expected in (("class", CLASS, "lion"), ("subject", SUBJECT, "fox")):
        pictures: list[Image.Image] = []
        for seed in range(seeds):
            pictures += generate(denoiser, prompts, seed=100 + seed)
        seen = judge.subjects(pictures)
        found[name] = sum(expected in one for one in seen) / len(seen)
    return found


def trained(folder: Path, **changed: Any) -> tuple[TrainResult, Denoiser]:
    """A run on a folder with the built-in model."""
    settings = {"batch_size": 4, "rank": 8, "seed": 1, "learning_rate": 1e-3, "training_dtype": "fp32"}
    settings |= {"trigger": SUBJECT[0], "captions": "none", **changed}
    output = f"{tempfile.mkdtemp()}/run"
    spec = RunSpec(sources=(ImageSource(str(folder)),), model=BUILT_IN, output=output, settings=settings)
    planned = plan(spec, Host())
    assert planned.denoiser is not None
    return run(planned, Host()), planned.denoiser


def measured(folder: Path, *, steps: int, seeds: int) -> dict[str, dict[str, float]]:
    """Scores of the base model and of the LoRAs; those with pictures of the class take twice the steps.

    Half of their draws are of the class, so that all see the subject equally often.
    """
    judge = Judge.load()
    pictures: dict[str, Any] = {"steps": 2 * steps, "class_prompt": "|".join(CLASS), "class_count": 6}
    runs: dict[str, dict[str, Any]] = {
        "without": {"steps": steps},
        "pictures": pictures,
        "prior target": {**pictures, "prior_target": "model"},
        "preserve class": {"steps": steps, "preserve": "class", "preserve_class": "lion"},
        "preserve blank": {"steps": steps, "preserve": "blank"},
    }
    found = {"base": scores(load_model(BUILT_IN).denoiser, judge, seeds=seeds)}
    for name, settings in runs.items():
        result, base = trained(folder, **settings)
        found[name] = scores(result.lora.applied_to(base), judge, seeds=seeds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LORASMITH_CACHE_DIR", folder)
        found = measured(subject_folder(Path(folder) / "fox"), steps=arguments.steps, seeds=arguments.seeds)
    print(f"{'':<16}{'class':>8}{'subject':>9}")
    for name, one in found.items():
        print(f"{name:<16}{one['class']:>8.2f}{one['subject']:>9.2f}")


if __name__ == "__main__":
    main()
