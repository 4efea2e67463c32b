"""What the page looks like to everybody: contrast in both colour schemes, names of controls, and phones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lorasmith.training.events import Outcome
from tests.server.pages.conftest import assert_legible
from tests.server.pages.served_page import TRAINING, ServedPage

VIEWS = {
    "home": ("", ".covers .cover"),
    "sets": ("#/photos", ".cover.four"),
    "photos": ("#/new/fox/photos", ".crop"),
    "no photos": ("#/new/none", ".button.primary"),
    "model": ("#/new/fox/model", ".choice"),
    "models": ("#/models", ".release"),
    "settings": ("#/new/fox/settings", ".choice"),
    "run": ("#/runs/runs%2Ffox-001", ".easel img"),
    "advice": ("#/runs/runs%2Ffox-004", ".easel img"),
    "runs": ("#/runs", ".run-rows li"),
    "sweep": ("#/sweeps/fox-sweep-001", "table.sweep td"),
    "compare": ("#/compare/runs%2Ffox-001/runs%2Ffox-002", ".easel img"),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_text_is_legible_controls_have_names_and_nothing_sticks_out(
    served: ServedPage, open_page: Callable[..., Any], scheme: str, width: int
) -> None:
    folder = served.add_dataset()
    (folder / "fox_4.png").write_bytes((folder / "fox_3.png").read_bytes())  # a remark
    served.trains_four_fifths()
    served.add_job("interrupted")
    request = {**TRAINING, "output": "runs/fox-sweep-001/rank-8"}
    served.do(lambda: served.context.store.add("train", request, sweep="fox-sweep-001", varied={"rank": 8}))
    for number in (1, 2, 3):
        run = served.add_run(f"runs/fox-00{number}", outcome=Outcome.FAILED if number == 3 else Outcome.FINISHED)
        marks = {"title": f"fox {number}", "starred": number == 2, "note": "for mum"}
        (run / "marks.json").write_text(json.dumps(marks))
    served.add_run("runs/fox-004")
    served.advise("runs/fox-004")
    page = open_page(scheme=scheme, width=width)
    for name, (view, ready) in VIEWS.items():
        page.goto(served.address + view)
        page.wait_for_selector(ready)
        if name == "settings":
            page.get_by_text("All settings").click()
            page.get_by_text("Try several values").click()
        if name == "advice":
            if width < 500:
                page.locator(".panel-handle").click()
            page.get_by_text("2 photos to look at").click()
            page.get_by_text("Repeat less").wait_for()
        if name == "run":
            if width < 500:
                page.locator(".panel-handle").click()
            page.get_by_role("button", name="For engineers").click()
            page.wait_for_selector(".plot canvas")
        if name == "model":
            page.get_by_text("Too large for this machine").wait_for()
        assert_legible(page, name)
