"""Two subjects in one LoRA, by how their captions name them: whether each trigger draws its own.

    python -m benchmarks.two_subjects
    python -m benchmarks.two_subjects --ways "two class words" --pairs fox/owl --seeds 0

Two subjects that the built-in model has never seen are taught in one run with the recipe for a subject of
docs/subjects.md, four pictures each, every picture seen as often as by a LoRA of its subject alone (`apart`). Of
pictures of each trigger, alone and with four backgrounds, the judge gives the probability of its subject (own) and of
the other one (mixed up), and `wish` is the share with the background that was asked for.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.bases import machine
from benchmarks.quality.measuring import TINY
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.subjects import BUILT_IN, CLASSES
from benchmarks.results import Results, add_json
from lorasmith.evaluation.judge import background_of, tensors
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.runs.drawing import with_loras
from lorasmith.runs.library import load_dataset, train
from lorasmith.sampling.generate import generate
from tools.pretrain.data import short_name
from tools.pretrain.judge import SUBJECTS, Judge

PICTURES = 4  # of each subject
LOOKS = (80, 160)  # of each subject's pictures at the checkpoints
BACKGROUNDS = ("blue", "green", "black", "yellow")
SAMPLING_STEPS = 4
UNET_ALONE = {"train_text_encoder": False, "text_encoder_rate": None}

Item = tuple[Image.Image, str]
Named = Callable[[str, str], tuple[str, str]]
"""Class words of two subjects → their triggers."""


@dataclass(frozen=True)
class Way:
    """How two subjects are taught."""

    named: Named = lambda one, other: (f"sks {one}", f"ohwx {other}")
    are_apart: bool = False  # a LoRA each
    has_both: bool = False  # also pictures of both, side by side
    changes: Mapping[str, Any] = field(default_factory=dict)


WAYS: Mapping[str, Way] = {
    "apart": Way(are_apart=True),
    "two class words": Way(),
    "one class word": Way(lambda one, other: (f"sks {one}", f"ohwx {one}")),
    "one rare word": Way(lambda one, other: (f"sks {one}", f"sks {other}")),
    "no class words": Way(lambda one, other: ("sks", "ohwx")),
    "two class words, also both": Way(has_both=True),
    "two class words, UNet alone": Way(changes=UNET_ALONE),
    "one class word, UNet alone": Way(lambda one, other: (f"sks {one}", f"ohwx {one}"), changes=UNET_ALONE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--pairs", nargs="+", default=["fox/owl", "pineapple/mushroom"], metavar="SUBJECT/SUBJECT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments, torch=torch.__version__, machine=machine(torch.device("cpu")))
    results.table(
        {"way": "", "pair": "", "seed": "d", "seen of each": "d", "own": ".3f", "mixed up": ".3f", "wish": ".3f"}
    )
    model, judge = load_model(TINY), Judge.load()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("LORASMITH_CACHE_DIR", folder)
        for way in arguments.ways:
            for pair in arguments.pairs:
                for seed in arguments.seeds:
                    for looks, found in _measured(model, judge, WAYS[way], pair.split("/"), seed).items():
                        results.add(way, pair, seed, looks, *found)


def _measured(
    model: Model, judge: Judge, way: Way, pair: Sequence[str], seed: int
) -> dict[int, tuple[float, float, float]]:
    """(own, mixed up, wish) by the pictures of each subject that were seen."""
    triggers = way.named(*(short_name(CLASSES[one]) for one in pair))
    items = [
        [(picture, trigger) for picture in BUILT_IN[one].training[PICTURES]]
        for one, trigger in zip(pair, triggers, strict=True)
    ]
    together = [one for each in items for one in each]
    if way.has_both:
        together += [(_both(one, other), " and ".join(triggers)) for (one, _), (other, _) in zip(*items, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            _trained(model, Path(folder) / str(number), one, way, seed)
            for number, one in enumerate(items if way.are_apart else [together])
        ]
        files = zip(*(runs if way.are_apart else runs * 2), strict=True)
        return {looks: _judged(model, judge, pair, triggers, loras) for looks, loras in zip(LOOKS, files, strict=True)}


def _trained(model: Model, folder: Path, items: Sequence[Item], way: Way, seed: int) -> list[Path]:
    """The LoRA after each number of looks, a picture a step."""
    settings = {**RECIPES["lorasmith"].at(10.0), **way.changes}
    data = load_dataset(items, model, progress=False)
    half, whole = (looks * len(items) // PICTURES for looks in LOOKS)
    train(
        model,
        data,
        output=folder,
        title="one",
        steps=whole,
        save_every=half,
        validation_share=0.0,
        previews="",
        seed=seed,
        save_state_every=0,
        progress=False,
        **settings,
    )
    return [folder / f"one-step{half:08}.safetensors", folder / "one.safetensors"]


def _both(one: Image.Image, other: Image.Image) -> Image.Image:
    """Two pictures side by side, each at half of its size."""
    half = one.width // 2
    both = Image.new("RGB", one.size, one.getpixel((0, 0)))
    for place, picture in enumerate((one, other)):
        both.paste(picture.resize((half, half)), (place * half, half // 2))
    return both


def _judged(
    model: Model, judge: Judge, pair: Sequence[str], triggers: Sequence[str], loras: Sequence[Path]
) -> tuple[float, float, float]:
    own, mixed, wishes = [], [], []
    for place, (trigger, lora) in enumerate(zip(triggers, loras, strict=True)):
        texts = [trigger, trigger, trigger, *(f"{trigger}, on a {one} background" for one in BACKGROUNDS)]
        denoiser, encoder = with_loras(model.denoiser, model.text_encoder, [(lora, 1.0)])
        seeds = [1, 2, 3, *[1] * len(BACKGROUNDS)]
        pictures = generate(denoiser, texts, text_encoder=encoder, seed=seeds, steps=SAMPLING_STEPS)
        chances = judge.subject_scores(tensors(pictures)).softmax(1).mean(0)
        own.append(float(chances[SUBJECTS.index(pair[place])]))
        mixed.append(float(chances[SUBJECTS.index(pair[1 - place])]))
        wishes += [background_of(one) == asked for one, asked in zip(pictures[3:], BACKGROUNDS, strict=True)]
    return statistics.mean(own), statistics.mean(mixed), statistics.mean(wishes)


if __name__ == "__main__":
    main()
