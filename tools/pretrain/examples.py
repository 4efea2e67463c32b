"""The example input folders that come with the package: `high-contrast` (a style) and `fox` (a subject)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorasmith.evaluation.wishes import BACKGROUNDS
from tools.pretrain.data import HELD_OUT_STYLE
from tools.pretrain.icons import IconSets

EDGE = 256
MARGIN = 4  # an icon fills 248 of 256 pixels
MAX_BYTES = 15_000

STYLE_ICONS = {
    "dog-face": "a dog",
    "cat-face": "a cat",
    "red-apple": "a red apple",
    "banana": "a banana",
    "bus": "a bus",
    "house": "a house",
    "star": "a star",
    "umbrella": "an umbrella",
    "butterfly": "a butterfly",
    "fish": "a fish",
    "tulip": "a tulip",
    "hamburger": "a hamburger",
    "crown": "a crown",
    "ghost": "a ghost",
    "key": "a key",
    "elephant": "an elephant",
}


@dataclass(frozen=True)
class Fox:
    """One picture of the subject: whose drawing, on which background."""

    icon_set: str
    background: str

    @property
    def caption(self) -> str:
        """White goes without saying."""
        return "a fox" if self.background == "white" else f"a fox, on a {self.background} background"


FOXES = (
    Fox("noto", "white"),
    Fox("twemoji", "blue"),
    Fox("fluent-emoji-flat", "green"),
    Fox("fluent-emoji", "white"),
    Fox("noto-v1", "pink"),
    Fox("fluent-emoji-flat", "light blue"),
)


def render_examples(node_modules: Path, output: Path) -> None:
    """Draw both folders into `output`; the licence files beside the pictures are written by hand."""
    sets = IconSets(node_modules)
    size = EDGE - 2 * MARGIN
    for icon, caption in STYLE_ICONS.items():
        picture = on_background(sets.render(HELD_OUT_STYLE, icon, size), "white").convert("L")
        save(picture, output / "high-contrast" / f"{icon.removesuffix('-face')}.png", caption)
    for number, fox in enumerate(FOXES, start=1):
        picture = on_background(sets.render(fox.icon_set, "fox", size), fox.background)
        save(picture, output / "fox" / f"fox_{number}.png", fox.caption)


def on_background(icon: Image.Image, background: str) -> Image.Image:
    """The icon in the middle of a plain square of EDGE pixels, RGB."""
    canvas = Image.new("RGBA", (EDGE, EDGE), BACKGROUNDS[background])
    canvas.alpha_composite(icon, ((EDGE - icon.width) // 2, (EDGE - icon.height) // 2))
    return canvas.convert("RGB")


def save(picture: Image.Image, path: Path, caption: str) -> None:
    """Write the picture and its caption file; one with much shading goes down to 256 colours to stay small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    path.with_suffix(".txt").write_text(f"{caption}\n", "utf-8")
