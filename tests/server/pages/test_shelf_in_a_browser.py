"""The shelf of models in a browser: what is offered, what is asked before the first byte, and files that one has
already. The hub's part is made up; test_shelf_on_a_server.py asks one on the loopback, also for gated models.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.server.dispatcher import RefusedError
from lorasmith.server.questions import answer
from tests.families.flux_parts import denoiser
from tests.families.original_models import save
from tests.server.pages.conftest import assert_legible, choose_files, expected, until
from tests.server.pages.served_page import ServedPage

Opener = Callable[..., Any]
pytestmark = pytest.mark.slow

LARGE = {"file": "model.safetensors", "done_bytes": 2 * 2**30, "total_bytes": 6 * 2**30, "bytes_per_s": 50.0 * 2**20}


@pytest.fixture
def shelf(served: ServedPage, open_page: Opener) -> Callable[..., Any]:
    """Opens the shelf; a part of Z-Image is here, and the model of Flux.1 without its other files."""
    folder = served.base / "models" / "diffusion_models"
    folder.mkdir(parents=True)
    save(folder / "flux1-dev.safetensors", denoiser())
    part = folder / "z_image_bf16.safetensors.part"
    part.touch()
    os.truncate(part, 4_200_000_000)
    served.add_dataset()
    file = {"file": "model.safetensors", "repository": "maker/model", "folder": "models/checkpoints"}
    row = {**file, "size_bytes": 6_940_000_000, "kept_bytes": 0}
    served.made_up["check_download"] = {"title": "A model", "files": [row], "free_bytes": 10**11}
    served.made_up["download_files"] = {"title": "A model", "files": [{**file, "path": "x"}]}

    def shelf_of(**asked: Any) -> Any:
        found = answer("shelf", asked, served.folders)
        z_image = next(one for one in found["models"] if one["name"] == "z-image")
        for one in z_image["files"]:
            one["found"] = one["part"] != "denoiser"
        return found

    served.made_up["shelf"] = shelf_of

    def opened(**looks: Any) -> Any:
        page = open_page("#/new/fox/model", **looks)
        page.get_by_text("Get a model").click()
        page.get_by_text("Too large for this machine").wait_for()
        return page

    return opened


def card_of(page: Any, title: str) -> Any:
    return page.locator(".release").filter(has=page.get_by_role("heading", name=title, exact=True))


def test_a_model_is_offered_asked_about_and_downloaded(served: ServedPage, shelf: Callable[..., Any]) -> None:
    page = shelf()
    card = card_of(page, "Stable Diffusion XL 1.0")
    card.get_by_text(re.compile("Fits into|for a LoRA|Not for this computer")).wait_for()
    assert "6.9 GB to download" in card.inner_text()
    assert card.get_by_role("link").get_attribute("href").endswith("stable-diffusion-xl-base-1.0")
    kept = card_of(page, "Z-Image")
    assert "Here already: text encoder, autoencoder. Missing: model." in kept.inner_text()
    assert "4.2 GB are here" in kept.inner_text()
    assert served.of("check_download") == []

    card.get_by_role("button", name="Get it: Stable Diffusion XL 1.0").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("maker/model, into models/checkpoints").wait_for()
    assert_legible(page, "dialog")
    assert served.of("download_files") == []
    dialog.get_by_role("button", name="Download 6.9 GB").click()
    card.get_by_text("Asking the hub").wait_for()
    served.download(**LARGE)
    card.get_by_text("2.1 GB of 6.4 GB · 52 MB a second").wait_for()
    assert_legible(page, "download")
    page.reload()
    page.get_by_text("2.1 GB of 6.4 GB").wait_for()  # open, as something is on its way
    served.download(**LARGE, is_checking=True)
    card.get_by_text("Checking model.safetensors").wait_for()
    arrived = served.base / "models" / "checkpoints" / "arrived.safetensors"
    arrived.parent.mkdir()
    shutil.copyfile(BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors", arrived)
    served.end_download()
    page.get_by_role("radio", name="arrived").wait_for()


def test_each_model_says_how_long_it_takes_and_one_is_for_this_computer(served: ServedPage, open_page: Opener) -> None:
    """Before any download: with the built-in model alone, the one to get is named."""

    def timed(**asked: Any) -> Any:
        found = answer("shelf", asked, served.folders)
        for one in found["models"]:
            one["seconds"], one["best"] = 10 * 86_400.0, one["name"] == "z-image"
            if one["best"]:
                one["seconds"] = 5400.0
        return found

    served.made_up["shelf"] = timed
    page = open_page("#/models")
    cards = page.locator(".release")
    best = cards.filter(has_text="Suggested")
    expected(best).to_have_count(1)
    expected(best).to_contain_text("About 1 hour 30 min for a LoRA")
    expected(cards.filter(has_text="Not for this computer: days")).to_have_count(cards.count() - 1)
    expected(cards.filter(has_text="Fits into")).to_have_count(0)
    expected(cards.filter(has_text="edits pictures").first).to_be_attached()
    assert_legible(page)


def test_a_download_is_cancelled_or_fails_with_a_sentence(served: ServedPage, shelf: Callable[..., Any]) -> None:
    page = shelf(width=390, scheme="dark")
    page.get_by_role("button", name="Continue: Z-Image").click()
    page.get_by_role("button", name="Download").click()
    card = card_of(page, "Z-Image")
    card.get_by_role("button", name="Cancel the download").click()
    card.get_by_role("button", name="Continue: Z-Image").click()
    page.get_by_role("button", name="Download").click()
    card.get_by_role("button", name="Cancel the download").wait_for()
    served.end_download("failed", "the connection broke; get it again to continue")
    card.get_by_text("The connection broke; get it again to continue").wait_for()
    assert_legible(page, "failed")
    card.get_by_role("button", name="Close").click()
    card.get_by_text("The connection broke").wait_for(state="detached")


def test_without_a_network_it_says_where_files_go(served: ServedPage, shelf: Callable[..., Any]) -> None:
    whole = served.made_up["check_download"]
    told = {"file": "model.safetensors", "page": "https://hub.example/maker/model", "folder": "/models/checkpoints"}
    served.made_up["check_download"] = RefusedError("NoNetworkError", "no internet", {"files": [told]})
    page = shelf(width=390, scheme="dark")
    page.get_by_role("button", name="Get it: Stable Diffusion XL 1.0").click()
    alert = page.get_by_role("dialog").get_by_role("alert")
    alert.get_by_text("No internet just now. Try again, or add the files yourself:").wait_for()
    assert alert.get_by_role("listitem").inner_text() == " of ".join(
        [told["file"], f"{told['page']} into {told['folder']}"]
    )
    assert_legible(page, "no network")
    served.made_up["check_download"] = whole
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("button", name="Download 6.9 GB").wait_for()


def test_a_full_disk_is_said_before_the_first_byte(served: ServedPage, shelf: Callable[..., Any]) -> None:
    served.made_up["check_download"]["free_bytes"] = 10**9
    page = shelf()
    page.get_by_role("button", name="Get it: Stable Diffusion XL 1.0").click()
    page.get_by_text("6.9 GB do not fit: the disk has 1 GB free.").wait_for()
    page.get_by_role("button", name="Download").click(force=True)
    assert served.of("download_files") == []


def test_missing_parts_of_a_model_are_one_press_away(served: ServedPage, shelf: Callable[..., Any]) -> None:
    page = shelf()
    page.get_by_role("button", name="Get what is missing of flux1-dev").click()
    page.get_by_role("button", name="Download").click()
    until(lambda: bool(served.of("download_files")))
    assert served.of("download_files") == [{"kind": "model", "name": "flux1-dev.safetensors"}]
    page.get_by_role("button", name="Cancel the download").wait_for()


def test_files_that_are_no_models_are_named_first(served: ServedPage, shelf: Callable[..., Any]) -> None:
    folder = served.base / "models" / "checkpoints"
    folder.mkdir()
    (folder / "page.safetensors").write_text("<!DOCTYPE html>")
    page = shelf(width=390)
    for view in ("#/new/fox/model", "#/models"):
        page.goto(served.address + view)
        said = page.get_by_text("page.safetensors in models/checkpoints: is a web page, not a model")
        said.wait_for()
        models = page.get_by_text("lorasmith-tiny").first.bounding_box()
        assert said.bounding_box()["y"] < models["y"]
        assert_legible(page, view)


def test_a_file_that_one_has_is_sent(shelf: Callable[..., Any], tmp_path: Path) -> None:
    mine, odd = tmp_path / "mine.safetensors", tmp_path / "odd.safetensors"
    shutil.copyfile(BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors", mine)
    odd.write_bytes(b"x" * 1000)
    page = shelf()
    choose_files(page.get_by_role("button", name="Choose a file"), odd)
    page.get_by_role("alert").filter(has_text="cannot be used").wait_for()
    choose_files(page.get_by_role("button", name="Choose a file"), mine)
    page.get_by_text("mine.safetensors is in models/checkpoints.").wait_for()
    page.get_by_role("radio", name="mine").wait_for()
