"""A new word on the built-in model: what the word alone brings, and with a LoRA.

    python -m benchmarks.new_word

Six pictures of a fox, which the model does not know by name, are trained as the word `sks`. The score is the share of
pictures of the word in which a classifier sees a fox, for the base model, for the word trained alone (textual
inversion), for a LoRA alone, and for both (pivotal tuning), each at the same number of steps.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.prior_preservation import subject_folder, trained
from lorasmith.families.model import Denoiser, TextEncoder
from lorasmith.runs.drawing import with_loras
from lorasmith.sampling.generate import generate
from tools.pretrain.judge import Judge

WORD = "sks"
PROMPTS = (WORD, f"{WORD}, on a white background", f"{WORD}, noto style")
ALONE: dict[str, Any] = {"new_word": WORD, "targets": "none"}


def score(denoiser: Denoiser, encoder: TextEncoder, judge: Judge, *, seeds: int) -> float:
    """Share of pictures of the word in which the classifier sees a fox."""
    pictures = []
    for seed in range(seeds):
        pictures += generate(denoiser, PROMPTS, text_encoder=encoder, seed=100 + seed)
    seen = judge.subjects(pictures)
    return sum("fox" in one for one in seen) / len(seen)


def measured(folder: Path, *, steps: int, seeds: int) -> dict[str, float]:
    """Scores by what was trained."""
    judge = Judge.load()
    runs: dict[str, dict[str, Any]] = {
        "word": {**ALONE, "new_word_vectors": 1},
        "word of 2 vectors": {**ALONE, "new_word_vectors": 2},
        "LoRA": {},
        "both": {"new_word": WORD},
    }
    found: dict[str, float] = {}
    for name, settings in runs.items():
        result, base = trained(folder, steps=steps, trigger=WORD, previews="", **settings)
        if not found:
            found["base"] = score(base, base.base.text_encoder, judge, seeds=seeds)
        found[name] = score(*with_loras(base, base.base.text_encoder, [(result.lora, 1.0)]), judge, seeds=seeds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LORASMITH_CACHE_DIR", folder)
        found = measured(subject_folder(Path(folder) / "fox"), steps=arguments.steps, seeds=arguments.seeds)
    for name, one in found.items():
        print(f"{name:<20}{one:>6.2f}")


if __name__ == "__main__":
    main()
