"""What the model is trained on: which icons of which sets, on which backgrounds, under which captions.

Kept out of everything: the style of `fluent-emoji-high-contrast`, which the demo teaches. Kept out of the text
encoder and the UNet: the subjects in HELD_OUT_SUBJECTS, which other examples teach.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorasmith.evaluation.judge import EDGE
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES

if TYPE_CHECKING:
    from tools.pretrain.icons import IconSets

ICON_SIZES = (62, 56, 50)  # an icon is drawn this large, in the middle

OTHER_SETS = ("emojione", "noto-v1")  # more pictures for the autoencoder
FXEMOJI = "fxemoji"  # Firefox OS, which no part of the model has seen
HELD_OUT_STYLE = "fluent-emoji-high-contrast"
HELD_OUT_SUBJECTS = ("fox", "rocket", "pineapple", "owl", "guitar", "mushroom", "sailboat")
UNTAUGHT = ("lion", "penguin", "skull", "red heart", "robot", "panda", "cactus", "light bulb")
"""Concepts that the pictures of the held-out style do not show: what its LoRA is tried on."""
_GROUPS_LEFT_OUT = {"people-body", "component", "flags"}

CONCEPTS = (
    "dog face", "cat face", "lion", "pig face", "rabbit face", "panda", "bear", "frog",
    "elephant", "penguin", "fish", "octopus", "crab", "turtle", "snail", "butterfly",
    "lady beetle", "sunflower", "tulip", "evergreen tree", "cactus", "red apple", "green apple", "banana",
    "strawberry", "watermelon", "lemon", "cherries", "avocado", "eggplant", "carrot", "hamburger",
    "pizza", "doughnut", "birthday cake", "ice cream", "bus", "automobile", "airplane", "star",
    "cloud", "fire", "umbrella", "snowman", "grinning face", "skull", "ghost", "alien",
    "robot", "red heart", "blue heart", "balloon", "soccer ball", "bell", "crown", "t-shirt",
    "key", "house", "gem stone", "light bulb",
)  # fmt: skip


@dataclass(frozen=True)
class Icon:
    """One drawing: the set it is from, its concept, the concept's group in emojibase."""

    icon_set: str
    concept: str
    group: str


class Icons:
    """All drawings, rendered once into a memory-mapped file.

    Attributes:
        icons: what each row shows.
        pixels: (N, sizes, 4, 64, 64) uint8, premultiplied RGBA, a row for each icon and a plane for each of ICON_SIZES.
    """

    def __init__(self, folder: Path) -> None:
        self.icons = [Icon(**entry) for entry in json.loads((folder / "icons.json").read_text("utf-8"))]
        self.pixels: NDArray[np.uint8] = np.load(folder / "icons.npy", mmap_mode="r")
        self._rows = {(icon.icon_set, icon.concept): row for row, icon in enumerate(self.icons)}

    def row(self, icon_set: str, concept: str) -> int:
        """Row of a drawing. Raises KeyError."""
        return self._rows[icon_set, concept]

    def has(self, icon_set: str, concept: str) -> bool:
        """Whether the set draws the concept."""
        return (icon_set, concept) in self._rows

    def picture(
        self, row: int, background: str = "white", *, size: int = ICON_SIZES[0], shift: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """(3, 64, 64) in [−1, 1]: the icon on a plain background, moved down and right by `shift` pixels."""
        rgba = torch.from_numpy(self.pixels[row, ICON_SIZES.index(size)].astype(np.float32)) / 255
        colour = torch.tensor(BACKGROUNDS[background], dtype=torch.float32) / 255
        return on_background(torch.roll(rgba, shift, (1, 2)), colour) * 2 - 1


def on_background(rgba: Tensor, colour: Tensor) -> Tensor:
    """(..., 3, h, w) from premultiplied RGBA (..., 4, h, w) and colours (..., 3), all in [0, 1]."""
    return rgba[..., :3, :, :] + (1 - rgba[..., 3:, :, :]) * colour[..., None, None]


def render_icons(
    node_modules: Path, folder: Path, icon_sets: Sequence[str] = (*STYLES, *OTHER_SETS, HELD_OUT_STYLE)
) -> int:
    """Draw every concept in every set that has it into `folder`; returns how many drawings there are."""
    from tools.pretrain.icons import IconSets  # needs the SVG renderer, which nothing else here does

    sets = IconSets(node_modules)
    emojibase = node_modules / "emojibase-data"
    groups = json.loads((emojibase / "meta" / "groups.json").read_text("utf-8"))["groups"]
    emoji = json.loads((emojibase / "en" / "data.json").read_text("utf-8"))
    icons: list[Icon] = []
    planes: list[NDArray[np.uint8]] = []
    for entry in emoji:
        group = groups[str(entry["group"])] if "group" in entry else "component"
        if group in _GROUPS_LEFT_OUT:
            continue
        name = slug(entry["label"])
        for icon_set in icon_sets:
            if sets.has(icon_set, name):
                drawing = _planes(sets, icon_set, name)
                if drawing[0, 3].mean() >= 3:  # a few icons come out empty
                    icons.append(Icon(icon_set, entry["label"].lower(), group))
                    planes.append(drawing)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "icons.npy", np.stack(planes))
    (folder / "icons.json").write_text(json.dumps([vars(icon) for icon in icons]), "utf-8")
    return len(icons)


def _planes(sets: IconSets, icon_set: str, name: str) -> NDArray[np.uint8]:
    """(sizes, 4, 64, 64): the icon at each size in the middle of a clear canvas, premultiplied."""
    planes = np.zeros((len(ICON_SIZES), 4, EDGE, EDGE), np.uint8)
    for plane, size in zip(planes, ICON_SIZES, strict=True):
        rgba: NDArray[Any] = np.asarray(sets.render(icon_set, name, size), np.float32).transpose(2, 0, 1)
        rgba[:3] *= rgba[3:] / 255
        corner = (EDGE - size) // 2
        plane[:, corner : corner + size, corner : corner + size] = rgba.round()
    return planes


def slug(label: str) -> str:
    """How icon sets spell an emoji's label."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", plain.lower().replace("'", "")).strip("-")


# --- captions

_NO_ARTICLE = {"broccoli", "sushi", "bread", "popcorn", "high voltage", "tennis", "fire", "cooking", "ice cream"}


@cache
def with_article(noun: str) -> str:
    """`an apple`; plurals and what cannot be counted stay bare."""
    if noun in _NO_ARTICLE or (noun.endswith("s") and not noun.endswith(("ss", "us", "bus"))):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def short_name(concept: str) -> str:
    """`cat face` is mostly called a cat."""
    faces = {"dog face", "cat face", "pig face", "rabbit face", "mouse face", "cow face", "tiger face", "monkey face"}
    return concept.removesuffix(" face") if concept in faces else concept


def caption(concept: str, icon_set: str | None, background: str, random: np.random.Generator) -> str:
    """One of the many ways to say what a picture shows.

    Args:
        concept: emojibase's label.
        icon_set: the set whose style may be named; None leaves the style out.
        background: key of BACKGROUNDS; white mostly goes without saying.
        random: decides the wording.
    """
    noun = short_name(concept) if random.random() < 0.8 else concept
    words = random.choice(
        [with_article(noun), noun, f"an emoji of {with_article(noun)}", f"{noun} icon"], p=[0.5, 0.2, 0.15, 0.15]
    )
    if icon_set in STYLES and random.random() < 0.7:
        words = f"{words}, {STYLES[icon_set]}"
    if background != "white" or random.random() < 0.3:
        words += random.choice([f", {background} background", f", on a {background} background"])
    return str(words)
