"""Renders the example input folders from public emoji sets: `high-contrast` (a style) and `fox` (a subject).

Run by hand when the pictures change; README.md says how. Needs resvg-py and Pillow, and the icon sets as npm packages.
"""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

EDGE = 256
MARGIN = 4  # an icon fills 248 of 256 pixels
MAX_BYTES = 15_000

STYLE_SET = "fluent-emoji-high-contrast"
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
    """One picture of the subject: whose drawing, on which background (name and colour)."""

    icon_set: str
    background: str
    colour: tuple[int, int, int]

    @property
    def caption(self) -> str:
        """White goes without saying."""
        return "a fox" if self.background == "white" else f"a fox, on a {self.background} background"


FOXES = (
    Fox("noto", "white", (255, 255, 255)),
    Fox("twemoji", "blue", (50, 100, 220)),
    Fox("fluent-emoji-flat", "green", (70, 170, 80)),
    Fox("fluent-emoji", "white", (255, 255, 255)),
    Fox("noto-v1", "pink", (250, 170, 205)),
    Fox("fluent-emoji-flat", "light blue", (150, 215, 245)),
)


def main() -> None:
    """Render both folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("node_modules", type=Path, help="folder that npm installed the icon sets into")
    parser.add_argument("output", type=Path, help="folder for the two example folders")
    arguments = parser.parse_args()
    sets = IconSets(arguments.node_modules)

    for icon, caption in STYLE_ICONS.items():
        picture = on_background(sets.render(STYLE_SET, icon), (255, 255, 255)).convert("L")
        save(picture, arguments.output / "high-contrast" / f"{icon.removesuffix('-face')}.png", caption)
    for number, fox in enumerate(FOXES, start=1):
        picture = on_background(sets.render(fox.icon_set, "fox"), fox.colour)
        save(picture, arguments.output / "fox" / f"fox_{number}.png", fox.caption)


class IconSets:
    """Icon sets in Iconify's JSON format, loaded as they are asked for."""

    def __init__(self, node_modules: Path) -> None:
        self._folder = node_modules / "@iconify-json"
        self._sets: dict[str, Any] = {}

    def render(self, icon_set: str, name: str) -> Image.Image:
        """An icon as RGBA, EDGE minus the margins wide and high."""
        if icon_set not in self._sets:
            self._sets[icon_set] = json.loads((self._folder / icon_set / "icons.json").read_text("utf-8"))
        contents = self._sets[icon_set]
        name = contents.get("aliases", {}).get(name, {}).get("parent", name)
        icon = contents["icons"][name]
        left, top, width, height = (
            icon.get(key, contents.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        size = EDGE - 2 * MARGIN
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" '
            f'height="{size}" viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_background(icon: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The icon in the middle of a plain square of EDGE pixels, RGB."""
    canvas = Image.new("RGBA", (EDGE, EDGE), colour)
    canvas.alpha_composite(icon, ((EDGE - icon.width) // 2, (EDGE - icon.height) // 2))
    return canvas.convert("RGB")


def save(picture: Image.Image, path: Path, caption: str) -> None:
    """Write the picture and its caption file; a picture with much shading goes down to 256 colours to stay small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)
    path.with_suffix(".txt").write_text(f"{caption}\n", "utf-8")


if __name__ == "__main__":
    main()
