"""What is taught to the built-in model: subjects and styles that its UNet has never seen.

Recipes are chosen on `DEVELOPMENT` and `DEVELOPMENT_STYLES`; `TEST` and `TEST_STYLES` are for the final run alone.

The drawings in `drawings/` are of Noto and Noto v1 (Apache-2.0, Google), Fluent (MIT, Microsoft), Twemoji (CC-BY 4.0,
X), EmojiOne 2 (CC-BY 4.0, Ranks) and Firefox OS (Apache-2.0, Mozilla): a strip of seven sets a subject, made by
`python -m tools.pretrain subjects`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.image_files import open_image
from lorasmith.evaluation.judge import EDGE
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from tools.pretrain.data import HELD_OUT_STYLE, UNTAUGHT, short_name, slug, with_article
from tools.pretrain.subjects import DEVELOPMENT, SETS, TEST

DRAWINGS = Path(__file__).with_name("drawings")
TRAINED_SETS = tuple(STYLES)  # the others are held out
STYLE = "style"  # name of the task of the style of HELD_OUT_STYLE
DEVELOPMENT_STYLES: Mapping[str, str] = {STYLE: HELD_OUT_STYLE}
TEST_STYLES: Mapping[str, str] = {f"style of {one}": one for one in SETS if one not in TRAINED_SETS}
"""The icon set of each task of a style."""
TRAINED_BACKGROUNDS = ("white", "pink", "grey")
CLASSES: Mapping[str, str] = {
    "fox": "dog face",
    "rocket": "airplane",
    "pineapple": "watermelon",
    "owl": "penguin",
    "guitar": "bell",
    "mushroom": "umbrella",
    "sailboat": "bus",
    "hibiscus": "sunflower",
    "wolf": "dog face",
    "tiger face": "cat face",
    "koala": "bear",
    "cow face": "pig face",
    "mouse face": "rabbit face",
    "rooster": "penguin",
    "spouting whale": "fish",
    "honeybee": "lady beetle",
    "spider": "crab",
    "palm tree": "cactus",
    "rose": "tulip",
    "grapes": "cherries",
    "pear": "green apple",
    "ear of corn": "banana",
    "hot pepper": "carrot",
    "french fries": "hamburger",
    "cookie": "doughnut",
    "trophy": "crown",
    "tractor": "automobile",
    "helicopter": "airplane",
    "locomotive": "bus",
    "castle": "house",
    "baseball": "soccer ball",
    "dress": "t-shirt",
    "jack-o-lantern": "skull",
    "ring": "gem stone",
    "candle": "light bulb",
    "bomb": "balloon",
}
"""The concept whose word a subject is taught with, which the model knows."""


@dataclass(frozen=True)
class Prompt:
    """A text with what its picture should show, by what the judge looks at."""

    text: str
    plain: str  # the same for the base model: without what is taught
    background: str | None = None
    icon_set: str | None = None
    concept: str | None = None


@dataclass(frozen=True)
class Task:
    """Something to teach."""

    name: str
    trigger: str
    training: Mapping[int, Sequence[Image.Image]]  # by their number
    held_out: Sequence[Image.Image]
    prompts: Sequence[Prompt]  # that ask for more than the trigger
    of_class: str | None  # the concept of the trigger's class word; None for a style
    shown: Mapping[int, Sequence[str]] = field(default_factory=dict)  # by `training`, what captions can say
    of_style: str | None = None  # the icon set of a style


def subject_task(subject: str) -> Task:
    """One of the subjects."""
    of_class = CLASSES[subject]
    trigger = f"sks {short_name(of_class)}"
    drawn = [(icon_set, background) for background in TRAINED_BACKGROUNDS for icon_set in TRAINED_SETS]
    pictures = [drawing(subject, icon_set, background) for icon_set, background in drawn]
    shown = [f"{STYLES[icon_set]}, on a {background} background" for icon_set, background in drawn]
    # Four pictures are of four sets on three backgrounds.
    places = {1: [0], 4: [len(TRAINED_SETS) * (place % 3) + place for place in range(4)], 12: range(12)}
    held_out = [
        drawing(subject, one, where)
        for one in sets_of(subject)
        if one not in TRAINED_SETS
        for where in TRAINED_BACKGROUNDS
    ]
    prompts = [
        _wish(of_class, f"on a {one} background", background=one) for one in ("blue", "green", "black", "yellow")
    ]
    prompts += [_wish(of_class, words, icon_set=one) for one, words in STYLES.items()]
    training, said = ({n: [each[one] for one in some] for n, some in places.items()} for each in (pictures, shown))
    return Task(subject, trigger, training, held_out, prompts, of_class, said)


def _wish(of_class: str, wish: str, **shown: str) -> Prompt:
    word = short_name(of_class)
    return Prompt(f"sks {word}, {wish}", f"{with_article(word)}, {wish}", **shown)


def style_task(name: str) -> Task:
    """A style that the model has not seen, on concepts that its pictures do not show.

    The pictures are the package's examples of the development style, and drawings of test subjects for the others.
    """
    icon_set = {**DEVELOPMENT_STYLES, **TEST_STYLES}[name]
    if icon_set == HELD_OUT_STYLE:
        folder = BUILT_IN_BASE / "input" / "high-contrast"
        pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    else:
        pictures = [drawing(one, icon_set, "white") for one in TEST[:16]]
    training, held_out = pictures[:12], pictures[12:]
    trigger = "sks style"
    things = {one: with_article(short_name(one)) for one in UNTAUGHT}
    prompts = [Prompt(f"{thing}, {trigger}", thing, concept=one) for one, thing in things.items()]
    numbers = {1: training[:1], 4: training[:4], 12: training}
    return Task(name, trigger, numbers, held_out, prompts, None, of_style=icon_set)


def drawing(subject: str, icon_set: str, background: str) -> Image.Image:
    """A subject as a set draws it, on a plain background."""
    icon = _icon(subject, icon_set)
    canvas = Image.new("RGBA", icon.size, BACKGROUNDS[background])
    canvas.alpha_composite(icon)
    return canvas.convert("RGB")


def sets_of(subject: str) -> list[str]:
    """The sets that draw a subject."""
    return [one for one in SETS if _icon(subject, one).getbbox() is not None]


def _icon(subject: str, icon_set: str) -> Image.Image:
    left = EDGE * SETS.index(icon_set)
    return _strip(subject).crop((left, 0, left + EDGE, EDGE))


@cache
def _strip(subject: str) -> Image.Image:
    with Image.open(DRAWINGS / f"{slug(subject)}.webp") as opened:
        return opened.convert("RGBA")


BUILT_IN: Mapping[str, Task] = {
    task.name: task
    for subjects, styles in ((DEVELOPMENT, DEVELOPMENT_STYLES), (TEST, TEST_STYLES))
    for task in (*map(subject_task, subjects), *map(style_task, styles))
}
"""All subjects and styles, those for development first."""


def folder_tasks(folder: Path) -> dict[str, Task]:
    """Tasks of a folder like DreamBooth's `dataset`: a folder of pictures a subject, and `prompts_and_classes.txt`.

    Four pictures of a subject are trained on, or all but one if there are no more; the others are held out.
    """
    lists, text = folder / "prompts_and_classes.txt", ""
    if lists.is_file():
        text = lists.read_text("utf-8")
    classes = dict(re.findall(r"^(\w+),(?!class$)([\w ]+)$", text, re.MULTILINE))
    _, *prompts = (re.findall(r"'([^']*)'\.format", part) for part in text.split("prompt_list"))
    if not classes or len(prompts) != 2:
        raise SystemExit(f"{lists} must list subjects, their classes and two lists of prompts, as DreamBooth's does")
    tasks = {}
    for name, of_class in classes.items():
        pictures = [open_image(path) for path in pictures_in(folder / name)]
        if len(pictures) < 2:
            raise SystemExit(f"{folder / name} must have at least two pictures, one of them held out")
        number = min(4, len(pictures) - 1)
        asked = [
            Prompt(one.format("sks", of_class), one.format("", of_class).replace("  ", " "))
            for one in prompts[of_class in _LIVE]
        ]
        training = {1: pictures[:1], 4: pictures[:number]}
        tasks[name] = Task(name, f"sks {of_class}", training, pictures[number:], asked, of_class)
    return tasks


_LIVE = ("cat", "dog")  # classes of the second list of prompts


def pictures_in(folder: Path) -> list[Path]:
    """Files of pictures in a folder, in order."""
    return [path for path in sorted(folder.glob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
