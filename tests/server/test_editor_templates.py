"""Templates of the editor are the example workflows, each with a picture."""

from __future__ import annotations

import pytest
from PIL import Image

from lorasmith.nodes.example_workflows import Example, examples
from lorasmith.server.comfyui.editor_files import PICTURES, index, picture_of, template_file

TEMPLATES = examples()
CARDS = {card["name"]: card for group in index() for card in group["templates"]}


def test_every_example_is_a_template_under_a_title_of_its_own() -> None:
    assert sorted(CARDS) == sorted(one.name for one in TEMPLATES)
    assert len({card["title"] for card in CARDS.values()}) == len(CARDS)
    assert all(card["title"] != name for name, card in CARDS.items()), "a template without a title"


def test_those_that_run_at_once_come_first() -> None:
    first, second = index()
    assert [one["name"] for one in first["templates"]] == [one.name for one in examples() if not one.needs]
    assert first["isEssential"]
    assert not second["isEssential"]


@pytest.mark.parametrize("one", TEMPLATES, ids=lambda one: one.name)
def test_a_template_has_a_graph_a_picture_and_a_readable_description(one: Example) -> None:
    assert template_file(f"{one.name}.json") == one.editor_path
    picture = picture_of(one.name)
    assert picture == template_file(f"{one.name}-1.webp")
    with Image.open(picture) as opened:
        assert (opened.format, opened.width) == ("WEBP", 320)
        assert len(opened.convert("RGB").getcolors(1 << 17) or []) > 50, "an empty picture"
    assert picture.stat().st_size < 20_000
    description = CARDS[one.name]["description"]
    assert "  " not in description
    assert description.endswith(".")
    assert ("Needs" in description) == bool(one.needs)


def test_no_picture_is_left_over() -> None:
    assert {path.name for path in PICTURES.iterdir()} == {picture_of(one.name).name for one in TEMPLATES}


@pytest.mark.parametrize("name", ["", "style", "style.json/..", "../style.json", "style-2.webp", "nothing-1.webp"])
def test_other_names_are_no_templates(name: str) -> None:
    assert template_file(name) is None
