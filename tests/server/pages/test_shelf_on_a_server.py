"""The shelf on a real server, with a hub on the loopback: a model is asked for, downloaded, interrupted by the end of
the server, continued, and there to be trained; damaged, gated and refused ones say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from tests.fake_hub import TOKEN, FakeHub, hub
from tests.server.pages.conftest import PagesOpener, assert_legible
from tests.server.pages.test_page_on_a_server import PATIENCE_MS
from tools.browsing import served

pytestmark = pytest.mark.slow

MODEL = (BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors").read_bytes()
SDXL = "stabilityai/stable-diffusion-xl-base-1.0/sd_xl_base_1.0.safetensors"
FLUX = "black-forest-labs/FLUX.1-dev/flux1-dev.safetensors"


def shelf_of(open_pages: PagesOpener, address: str) -> Any:
    page = open_pages(f"{address}#/new/fox/model")
    page.set_default_timeout(PATIENCE_MS)
    page.locator(".release").first.wait_for()
    return page


def get(page: Any, title: str) -> Any:
    """Press the button of a card; the dialog that opens."""
    page.get_by_role("button", name=title).click()
    return page.get_by_role("dialog")


def asked(found: FakeHub) -> int:
    return len(found.requests)


def test_a_model_comes_from_the_hub(
    browser: Any, open_pages: PagesOpener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, home = tmp_path / "ComfyUI", tmp_path / "home"
    (base / "input" / "fox").mkdir(parents=True)
    (base / "input" / "fox" / "fox.png").write_bytes((BUILT_IN_BASE / "input/fox/fox_1.png").read_bytes())
    target = base / "models" / "checkpoints" / "sd_xl_base_1.0.safetensors"
    part = target.with_name(f"{target.name}.part")
    with hub({SDXL: MODEL, FLUX: b"x"}) as found:
        found.gated = {"black-forest-labs/FLUX.1-dev"}
        found.refused = {"comfyanonymous/flux_text_encoders": 404}
        for name, value in {"HF_ENDPOINT": found.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)

        with served(base) as running:
            page = shelf_of(open_pages, running.address)
            assert asked(found) == 0  # not a byte before it is wanted
            dialog = get(page, "Get it: Stable Diffusion XL 1.0")
            dialog.get_by_text("stabilityai/stable-diffusion-xl-base-1.0, into models/checkpoints").wait_for()
            assert found.bytes_asked == []

            # Two pieces of what the hub's library writes arrive, and no more: then the page is loaded again, and the
            # server ends.
            found.held_after = 22 * 2**20
            found.gate.clear()
            dialog.get_by_role("button", name="Download").click()
            page.get_by_text("21 MB of 24 MB").wait_for()
            page.reload()
            page.get_by_text("21 MB of 24 MB").wait_for()
            page.close()

        found.gate.set()
        assert part.stat().st_size == 20 * 2**20 and not target.exists()
        with served(base) as running:
            page = shelf_of(open_pages, running.address)
            get(page, "Continue: Stable Diffusion XL 1.0").get_by_role("button", name="Download 3 MB").click()
            page.get_by_role("radio", name="sd_xl_base_1.0").wait_for()
            assert target.read_bytes() == MODEL and not part.exists()
            assert found.bytes_asked[-1] == 20 * 2**20

            # What is damaged gets no name.
            target.unlink()
            page.get_by_role("button", name="Look again").click()
            found.corrupted = True
            get(page, "Get it: Stable Diffusion XL 1.0").get_by_role("button", name="Download").click()
            page.get_by_text("its SHA-256 differs), so it was deleted; get it again").wait_for()
            assert not target.exists() and not part.exists()
            found.corrupted = False

            # A licence is to be accepted: where, and the token that is stored is huggingface_hub's.
            dialog = get(page, "Get it: Flux.1 dev")
            link = dialog.get_by_role("link", name=f"{found.address}/black-forest-labs/FLUX.1-dev")
            link.wait_for()
            assert_legible(page, "gated")
            dialog.get_by_label("Access token").fill("hf_" + "y" * 34)
            dialog.get_by_role("button", name="Store the token").click()
            dialog.get_by_text("The hub does not know this token").wait_for()
            dialog.get_by_label("Access token").fill(TOKEN)
            dialog.get_by_role("button", name="Store the token").click()
            dialog.get_by_text(
                "does not have clip_l.safetensors any more; look for it there"
            ).wait_for()  # the next file
            assert (home / "token").read_text() == TOKEN
            page.keyboard.press("Escape")

            with urlopen(f"{running.address}lorasmith/v1/downloads") as answer:
                assert [one["state"] for one in json.load(answer)["downloads"]] == ["failed"]
            log = base / "user" / "lorasmith" / "server.log"
            assert not log.exists() or TOKEN not in log.read_text()
