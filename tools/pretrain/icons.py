"""Icon sets in Iconify's JSON format, drawn at any size."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from tools.pretrain.data import FXEMOJI

_IN_FXEMOJI = {
    "fox": "foxsmiling",
    "wolf": "wolfface",
    "tiger-face": "tiger",
    "mouse-face": "mouse",
    "spouting-whale": "spurtingwhale",
    "ear-of-corn": "earofmaize",
    "hot-pepper": "chilipepper",
    "locomotive": "steamlocomotive",
    "castle": "europeancastle",
}
"""Its names of some concepts; other names are those of the other sets without hyphens."""


class IconSets:
    """Icon sets that npm installed (`@iconify-json/...`), loaded as they are asked for.

    Args:
        node_modules: npm's folder.
    """

    def __init__(self, node_modules: Path) -> None:
        self._folder = node_modules / "@iconify-json"
        self._sets: dict[str, Any] = {}

    def has(self, icon_set: str, name: str) -> bool:
        """Whether the set draws this concept."""
        return self._icon(icon_set, name) is not None

    def render(self, icon_set: str, name: str, size: int) -> Image.Image:
        """An icon as RGBA, `size` pixels wide and high."""
        contents, icon = self._contents(icon_set), self._icon(icon_set, name)
        if icon is None:
            raise KeyError(f"{icon_set} has no icon {name}")
        left, top, width, height = (
            icon.get(key, contents.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" '
            f'height="{size}" viewBox="{left} {top} {width} {height}" color="black">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
        image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.LANCZOS)

    def _icon(self, icon_set: str, name: str) -> dict[str, Any] | None:
        contents = self._contents(icon_set)
        if icon_set == FXEMOJI:
            name = _IN_FXEMOJI.get(name, name.replace("-", ""))
        while name not in contents["icons"] and name in contents.get("aliases", {}):
            name = contents["aliases"][name]["parent"]
        icon: dict[str, Any] | None = contents["icons"].get(name)
        return icon

    def _contents(self, icon_set: str) -> dict[str, Any]:
        if icon_set not in self._sets:
            self._sets[icon_set] = json.loads((self._folder / icon_set / "icons.json").read_text("utf-8"))
        contents: dict[str, Any] = self._sets[icon_set]
        return contents
