"""Preferences on the built-in model: of two pictures of a lion, the one on black is preferred to the one on white.

    python -m benchmarks.preference [--beta 5000]

Trained with DPO on pairs under a caption without a background. Prints, for the base model and the LoRA, the share of
other pairs that the preferred picture wins (its loss falls more than its opposite's, on the same noise), and the mean
brightness (0 to 255) of pictures of the caption.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.prior_preservation import trained
from benchmarks.slider import brightness, pair_folder
from lorasmith.data.encoding import load_dataset
from lorasmith.families.model import Denoiser
from lorasmith.sampling.generate import generate
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.validation import Validator

CAPTION = "a lion"


def measured(folder: Path, *, steps: int, seeds: int, **settings: object) -> dict[str, tuple[float, float]]:
    """Share of pairs won, and brightness, of the base model and of a LoRA."""
    train, other = pair_folder(folder / "train"), pair_folder(folder / "other", first=200)
    result, base = trained(train, steps=steps, trigger=CAPTION, pairs="dpo", **{"learning_rate": 5e-4, **settings})
    data = load_dataset(other, base.base, trigger=CAPTION, controls="opposite")
    rejected = [replace(one, latents=one.opposite) for one in data if one.opposite is not None]

    def margins(model: Denoiser) -> torch.Tensor:
        """By how much the loss of the opposite is above the preferred picture's, (pairs, draws)."""
        job = plan_job(model, TrainConfig(training_dtype="fp32"), "cpu")
        of_each = [
            Validator(job.model, samples, draws=8, batch_size=8, device=torch.device("cpu"), dtype=torch.float32)
            for samples in (data.samples, rejected)
        ]
        with job.model.frozen(job.config, job.way):
            preferred, opposite = (one() for one in of_each)
        return opposite - preferred

    found = {}
    before = margins(base)
    for name, model in (("base", base), ("dpo", result.lora.applied_to(base))):
        change = margins(model) - before
        won = ((change > 0).float() + 0.5 * (change == 0)).mean()
        pictures = [one for seed in range(seeds) for one in generate(model, [CAPTION], seed=seed)]
        found[name] = (float(won), brightness(pictures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, default=5000.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), steps=arguments.steps, seeds=arguments.seeds, dpo_beta=arguments.beta)
    print(f"{'':<6}{'won':>6}{'brightness':>12}")
    for name, (won, light) in found.items():
        print(f"{name:<6}{won:>6.2f}{light:>12.1f}")


if __name__ == "__main__":
    main()
