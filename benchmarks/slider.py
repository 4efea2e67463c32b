"""A slider on the built-in model: the background of a picture, from white to black by the LoRA's strength.

    python -m benchmarks.slider [--pairs] [--picture docs/images/slider.png]

Trained from prompts on pictures of a fox, which are not learnt; or with --pairs from pictures of a lion, each once on
black and once on white, under the neutral prompt. Prints the mean brightness (0 to 255) of pictures of the neutral
prompt at each strength, and draws one seed at all of them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.prior_preservation import subject_folder, trained
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.sampling.generate import generate

NEUTRAL = "a lion, on a blue background"
STRENGTHS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
ENDS = ("a lion, on a black background", "a lion, on a white background")
FROM_PROMPTS = {
    "slider_positive": ENDS[0],
    "slider_negative": ENDS[1],
    "slider_neutral": NEUTRAL,
    "slider_guidance": 1.0,
    "trigger": "",
}


def pair_folder(folder: Path, *, count: int = 6, first: int = 100) -> Path:
    """A folder with pictures of the positive end, and in `control` those of the negative one, of the same noise."""
    (folder / "control").mkdir(parents=True)
    base = load_model(BUILT_IN)
    for number in range(count):
        for place, prompt in zip((folder, folder / "control"), ENDS, strict=True):
            generate(base, prompt, seed=first + number)[0].save(place / f"{number}.png")
    return folder


def drawn(folder: Path, *, steps: int, seeds: int, **settings: Any) -> dict[float, list[Image.Image]]:
    """Pictures of the neutral prompt by strength of a slider with these settings."""
    result, base = trained(folder, steps=steps, **{"learning_rate": 5e-4, **settings})
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
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--focus", type=float, default=1.0, help="pair_focus of --pairs")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, settings = Path(name) / "fox", dict[str, Any](FROM_PROMPTS)
        if arguments.pairs:
            settings = {"pairs": "slider", "pair_focus": arguments.focus, "trigger": NEUTRAL}
        folder = pair_folder(folder) if arguments.pairs else subject_folder(folder)
        found = drawn(folder, steps=arguments.steps, seeds=arguments.seeds, **settings)
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
