"""The example workflows as templates of ComfyUI's editor: an index, and a graph and a thumbnail each.

The editor reads `templates/index.json`, opens `templates/<name>.json` and shows `templates/<name>-1.webp`. Graphs are
the package's examples (`nodes/example_workflows.py`); `tools/template_pictures.py` draws the pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.core.printable import count_text

if TYPE_CHECKING:
    from lorasmith.nodes.example_workflows import Example

PICTURES = Path(__file__).parent / "editor" / "templates"


@dataclass(frozen=True)
class Template:
    """An example workflow with the title on its card."""

    name: str
    title: str
    example: Example

    @property
    def description(self) -> str:
        """One or two sentences without file names: the editor shows hyphens and underscores as spaces."""
        says = f"Trains {self.example.title}." if not self.example.title[0].isupper() else f"{self.example.title}."
        needs = len(self.example.needs)
        if not needs:
            return f"{says} Runs at once, with the built in model."
        return f"{says} Needs {count_text(needs, 'model file')}, named in the loaders."

    @property
    def picture(self) -> Path:
        return PICTURES / f"{self.name}-1.webp"


def templates() -> dict[str, Template]:
    """Every template by name, those that need no other file first."""
    from lorasmith.nodes.example_workflows import examples  # imported late, to start fast

    return {one.name: Template(one.name, one.card, one) for one in examples()}


def index() -> list[dict[str, Any]]:
    """The editor's list of templates, in two groups: those that need no other file first."""
    listed = templates().values()
    groups = {
        "Start here": [one for one in listed if not one.example.needs],
        "Models": [one for one in listed if one.example.needs],
    }
    return [
        {
            "moduleName": "default",
            "type": "image",
            "category": "Lorasmith",
            "title": title,
            "isEssential": title == "Start here",
            "templates": [_card(one) for one in members],
        }
        for title, members in groups.items()
    ]


def template_file(name: str) -> Path | str | None:
    """The file `templates/<name>`: a path, or JSON text; None if there is none."""
    if name == "index.json":
        return json.dumps(index())
    if name == "index_logo.json":  # logos of model makers; none here
        return "{}"
    known = templates()
    if (stem := name.removesuffix("-1.webp")) != name and stem in known:
        return known[stem].picture
    if (stem := name.removesuffix(".json")) != name and stem in known:
        return known[stem].example.editor_path
    return None


def _card(one: Template) -> dict[str, Any]:
    return {
        "name": one.name,
        "title": one.title,
        "mediaType": "image",
        "mediaSubtype": "webp",
        "description": one.description,
        "tags": ["LoRA", "Training"],
        "openSource": True,
    }
