"""Questions by name, with arguments from JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.server import questions
from lorasmith.server.questions import answer, load_questions, question

FOLDERS = Folders(Path("base"))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(questions, "QUESTIONS", Registry("question"))

    @question
    def sized(folders: Folders, *, name: str, sizes: list[int], width: int | None = None) -> list[object]:
        return [folders.base.name, name, sizes, width]

    yield


def test_arguments_have_the_types_of_the_function() -> None:
    assert answer("sized", {"name": "a", "sizes": [1, 2]}, FOLDERS) == ["base", "a", [1, 2], None]
    assert answer("sized", {"name": "a", "sizes": [], "width": 3}, FOLDERS) == ["base", "a", [], 3]


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("sizes", {}, "unknown question 'sizes' .did you mean 'sized'"),
        ("sized", {"name": "a"}, "sized needs sizes; give it"),
        ("sized", {"name": 1, "sizes": []}, "name must be text, got 1"),
        ("sized", {"name": "a", "sizes": ["x"]}, r"sizes\[0\] must be an integer, got 'x'"),
        ("sized", {"name": "a", "sizes": [], "hight": 1}, "sized takes name, sizes, width, got 'hight'"),
        ("sized", {"name": "a", "sizes": [], "folders": 1}, "got 'folders'"),
    ],
)
def test_others_are_refused_in_a_sentence(name: str, arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        answer(name, arguments, FOLDERS)


def test_every_module_of_questions_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert "devices" in load_questions()
    (found,) = answer("devices", {}, FOLDERS)[:1]
    assert found["memory_bytes"] > 2**20 and found["name"]
