"""What T-LoRA keeps of a prompt when one picture is trained: the built-in model learns a fox from one drawing.

    python -m benchmarks.tlora

The picture, a fox on white, is trained as `sks lion` by LoRA and by T-LoRA. The score of the subject is the share of
pictures of `sks lion` in which a classifier sees a fox; that of backgrounds the share whose corners have the colour of
the prompt, that of styles the share in which a classifier sees the style of the prompt. All rows have equal steps.
`all ranks` is the T-LoRA as other programs apply it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.prior_preservation import SUBJECT, subject_folder, trained
from lorasmith.core.adapter_state import AdapterState
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser
from lorasmith.sampling.generate import generate
from tools.pretrain.judge import Judge

COLOURS = ("black", "blue", "red", "yellow")
DRAWN_IN = ("twemoji", "fluent-emoji-flat", "fluent-emoji")
RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, rank dropout": {"rank_dropout": 0.5},
    "T-LoRA": {"tlora": "plain"},
    "T-LoRA, least 8": {"tlora": "plain", "tlora_min_rank": 8},
    "T-LoRA, orthogonal": {"tlora": "orthogonal"},
}


def scores(denoiser: Denoiser, judge: Judge, *, seeds: int) -> dict[str, float]:
    """Shares of pictures with the subject, with the background and in the style of their prompts."""
    backgrounds = [f"{SUBJECT[0]}, on a {colour} background" for colour in COLOURS]
    styles = [f"{SUBJECT[0]}, {STYLES[name]}" for name in DRAWN_IN]
    prompts = [SUBJECT[0], *backgrounds, *styles]
    pictures = [picture for seed in range(seeds) for picture in generate(denoiser, prompts, seed=100 + seed)]
    by_prompt = {prompt: pictures[number :: len(prompts)] for number, prompt in enumerate(prompts)}
    seen = judge.subjects(pictures)
    on = [
        corner(one) == colour for prompt, colour in zip(backgrounds, COLOURS, strict=True) for one in by_prompt[prompt]
    ]
    like = [
        one == name for prompt, name in zip(styles, DRAWN_IN, strict=True) for one in judge.styles(by_prompt[prompt])
    ]
    return {
        "subject": sum(one == "fox" for one in seen) / len(seen),
        "background": sum(on) / len(on),
        "style": sum(like) / len(like),
    }


def corner(picture: Image.Image) -> str:
    """The named colour that is nearest to that of the corners."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    edge = max(1, len(pixels) // 10)
    corners = [
        pixels[rows, columns]
        for rows in (slice(edge), slice(-edge, None))
        for columns in (slice(edge), slice(-edge, None))
    ]
    mean = np.mean([one.reshape(-1, 3).mean(0) for one in corners], axis=0)
    return min(BACKGROUNDS, key=lambda name: float(np.abs(mean - np.array(BACKGROUNDS[name])).sum()))


def measured(folder: Path, *, steps: int, seeds: int, rank: int) -> dict[str, dict[str, float]]:
    """Scores of the base model and of each run."""
    judge = Judge.load()
    found = {"base": scores(load_model(BUILT_IN).denoiser, judge, seeds=seeds)}
    for name, settings in RUNS.items():
        result, base = trained(folder, steps=steps, rank=rank, previews="", **settings)
        found[name] = scores(result.lora.applied_to(base), judge, seeds=seeds)
        if name == "T-LoRA":
            state: AdapterState = replace(result.lora.state, metadata={})
            whole = replace(result.lora, state=state)
            found["T-LoRA, all ranks"] = scores(whole.applied_to(base), judge, seeds=seeds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LORASMITH_CACHE_DIR", folder)
        pictures = subject_folder(Path(folder) / "fox")
        for other in sorted(pictures.iterdir())[1:]:
            other.unlink()
        found = measured(pictures, steps=arguments.steps, seeds=arguments.seeds, rank=arguments.rank)
    print(f"{'':<22}{'subject':>9}{'background':>12}{'style':>8}")
    for name, one in found.items():
        print(f"{name:<22}{one['subject']:>9.2f}{one['background']:>12.2f}{one['style']:>8.2f}")


if __name__ == "__main__":
    main()
