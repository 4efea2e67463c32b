"""What the page looks like to everybody: contrast in both colour schemes, names of controls, and phones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.pages.conftest import ServedPage, assert_legible

VIEWS = {
    "home": ("", ".card"),
    "photos": ("#/new/fox/photos", ".crop"),
    "no photos": ("#/new/none", ".button.primary"),
    "model": ("#/new/fox/model", ".choice"),
    "settings": ("#/new/fox/settings", ".choice"),
    "run": ("#/runs/runs%2Ffox-001", ".wipe img"),
    "advice": ("#/runs/runs%2Ffox-004", "text=Repeat less"),
    "runs": ("#/runs", ".run-rows li"),
    "sweep": ("#/sweeps/fox-sweep-001", "table.sweep td"),
    "compare": ("#/compare/runs%2Ffox-001/runs%2Ffox-002", ".plot canvas"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_text_is_legible_controls_have_names_and_nothing_sticks_out(
    served: ServedPage, open_page: Callable[..., Any], scheme: str, width: int
) -> None:
    served.server.measured = True
    served.server.add_dataset("fox")
    served.server.add_job("interrupted")
    served.server.sweeps.append({"id": "fox-sweep-001", "runs": 2, "states": {"completed": 1, "failed": 1}})
    for number in (1, 2, 3):
        marks = {"label": f"fox {number}", "starred": number == 2, "note": "for mum"}
        served.server.add_run(f"runs/fox-00{number}", state="failed" if number == 3 else "finished", **marks)
    served.server.add_advised_run("runs/fox-004")
    page = open_page(scheme=scheme, width=width)
    for name, (view, ready) in VIEWS.items():
        page.goto(served.address + view)
        page.wait_for_selector(ready)
        if name == "settings":
            page.get_by_text("All settings").click()
            page.get_by_text("Try several values").click()
        if name == "run":
            page.get_by_text("More", exact=True).click()
            page.get_by_role("heading", name="Details").click()
            page.wait_for_selector(".plot canvas")
        if name == "model":
            page.get_by_text("Get a model").click()
            page.get_by_text("Too large for this machine").wait_for()
        assert_legible(page, name)
