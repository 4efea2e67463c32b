"""The example of the first open on a real server: one click, watched, to a LoRA that draws what it was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.evaluation.measures import learnt, likeness, self_likeness
from lorasmith.evaluation.recognition import recogniser_of
from tests.server.pages.conftest import PagesOpener
from tools.browsing import served

pytestmark = pytest.mark.slow

PATIENCE_MS = 300_000
"""For a training on a machine that does other things as well."""

LEARNT = 0.3
"""Least share of the way from what the base model draws to the training pictures, by the judge."""


def test_the_fox_is_trained_in_one_click_and_drawn(browser: Any, open_pages: PagesOpener, tmp_path: Path) -> None:
    base = tmp_path / "ComfyUI"
    with served(base) as server:
        page = open_pages(server.address)
        page.set_default_timeout(PATIENCE_MS)
        page.get_by_role("button", name="Try it with the fox").click()
        page.wait_for_url("**/#/jobs/*")
        page.goto(server.address)
        page.locator(".learning .newest").wait_for()  # watched on the wall
        page.get_by_role("link", name="a fox · built-in model").wait_for()
        page.close()
    (run,) = (base / "runs").iterdir()
    samples = run / "samples"
    last = max(samples.glob("step-*-1.png"))
    judge = recogniser_of(is_built_in=True)
    own = judge.features([Image.open(one) for one in sorted((BUILT_IN_BASE / "input" / "fox").glob("*.png"))])
    before, after = judge.features([Image.open(samples / "base-1.png"), Image.open(last)]).split(1)
    found, plain, photos = likeness(after, own), likeness(before, own), self_likeness(own)
    print(f"base {plain:.3f}, LoRA {found:.3f}, photos {photos:.3f}")
    assert learnt(found, plain, photos) > LEARNT
