"""What is taught to the built-in model: seven subjects and a style that it has never seen.

The drawings in `drawings/` are of Noto and Noto v1 (Apache-2.0, Google), Fluent (MIT, Microsoft), Twemoji (CC-BY 4.0,
X) and EmojiOne 2 (CC-BY 4.0, Ranks): a strip of six sets a subject, made by `tools/pretrain/subjects.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.image_files import open_image
from lorasmith.evaluation.judge import EDGE
from lorasmith.evaluation.wishes import BACKGROUNDS, STYLES
from tools.pretrain.data import UNTAUGHT, short_name, with_article
from tools.pretrain.subjects import SETS

DRAWINGS = Path(__file__).with_name("drawings")
TRAINED_SETS = tuple(STYLES)  # the other two are held out
STYLE = "style"  # name of its task
TRAINED_BACKGROUNDS = ("white", "pink", "grey")
CLASSES: Mapping[str, str] = {
    "fox": "dog face",
    "rocket": "airplane",
    "pineapple": "watermelon",
    "owl": "penguin",
    "guitar": "bell",
    "mushroom": "umbrella",
    "sailboat": "bus",
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


def subject_task(subject: str) -> Task:
    """One of the seven subjects."""
    of_class = CLASSES[subject]
    trigger = f"sks {short_name(of_class)}"
    drawn = [(icon_set, background) for background in TRAINED_BACKGROUNDS for icon_set in TRAINED_SETS]
    pictures = [drawing(subject, icon_set, background) for icon_set, background in drawn]
    # Four pictures are of four sets on three backgrounds.
    four = [pictures[len(TRAINED_SETS) * (place % 3) + place] for place in range(4)]
    held_out = [
        drawing(subject, one, where) for one in SETS if one not in TRAINED_SETS for where in TRAINED_BACKGROUNDS
    ]
    prompts = [
        _wish(of_class, f"on a {one} background", background=one) for one in ("blue", "green", "black", "yellow")
    ]
    prompts += [_wish(of_class, words, icon_set=one) for one, words in STYLES.items()]
    return Task(subject, trigger, {1: pictures[:1], 4: four, 12: pictures}, held_out, prompts, of_class)


def _wish(of_class: str, wish: str, **shown: str) -> Prompt:
    word = short_name(of_class)
    return Prompt(f"sks {word}, {wish}", f"{with_article(word)}, {wish}", **shown)


def style_task() -> Task:
    """The style that the model has not seen, on concepts that its pictures do not show."""
    folder = BUILT_IN_BASE / "input" / "high-contrast"
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    training, held_out = pictures[:12], pictures[12:]
    trigger = "sks style"
    things = {one: with_article(short_name(one)) for one in UNTAUGHT}
    prompts = [Prompt(f"{thing}, {trigger}", thing, concept=one) for one, thing in things.items()]
    return Task(STYLE, trigger, {1: training[:1], 4: training[:4], 12: training}, held_out, prompts, None)


def drawing(subject: str, icon_set: str, background: str) -> Image.Image:
    """A subject as a set draws it, on a plain background."""
    with Image.open(DRAWINGS / f"{subject}.png") as strip:
        left = EDGE * SETS.index(icon_set)
        icon = strip.convert("RGBA").crop((left, 0, left + EDGE, EDGE))
    canvas = Image.new("RGBA", icon.size, BACKGROUNDS[background])
    canvas.alpha_composite(icon)
    return canvas.convert("RGB")


BUILT_IN: Mapping[str, Task] = {task.name: task for task in (*map(subject_task, CLASSES), style_task())}
"""The seven subjects and the style."""


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
