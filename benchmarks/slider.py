"""A slider on the built-in model: the background of a picture, from white to black by the LoRA's strength.

    python -m benchmarks.slider [--picture docs/images/slider.png]

Trained from prompts on pictures of a fox, which are not learnt. Prints the mean brightness (0 to 255) of pictures of
the neutral prompt at each strength, and draws one seed at all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.prior_preservation import subject_folder, trained
from lorasmith.sampling.generate import generate

NEUTRAL = "a lion, on a blue background"
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def drawn(folder: Path, *, steps: int, seeds: int) -> dict[float, list[Image.Image]]:
    """Pictures of the neutral prompt by strength of the slider."""
    ends: dict[str, Any] = {
        "slider_positive": "a lion, on a black background",
        "slider_negative": "a lion, on a white background",
        "slider_neutral": NEUTRAL,
        "slider_guidance": 1.0,
    }
    result, base = trained(folder, steps=steps, learning_rate=5e-4, trigger="", **ends)
    return {
        strength: [
            picture
            for seed in range(seeds)
            for picture in generate(result.lora.applied_to(base, strength=strength), [NEUTRAL], seed=seed)
        ]
        for strength in STRENGTHS
    }


def brightness(pictures: list[Image.Image]) -> float:
    """Mean of all their pixels."""
    return float(np.mean([np.asarray(one.convert("L")).mean() for one in pictures]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = drawn(subject_folder(Path(folder) / "fox"), steps=arguments.steps, seeds=arguments.seeds)
    for strength, pictures in found.items():
        print(f"{strength:>5}{brightness(pictures):>8.1f}")
    if arguments.picture:
        side = 2 * found[0.0][0].width
        strip = Image.new("RGB", (side * len(found), side))
        for number, pictures in enumerate(found.values()):
            strip.paste(pictures[0].resize((side, side)), (side * number, 0))
        strip.save(arguments.picture, optimize=True)


if __name__ == "__main__":
    main()
