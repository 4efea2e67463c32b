"""The shelf of models in a browser, on made-up answers: what is offered, what is asked before the first byte, and files
that one has already.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server.pages.conftest import ServedPage, assert_legible

Opener = Callable[..., Any]
pytestmark = pytest.mark.slow


def shelf_of(open_page: Opener, served: ServedPage, **looks: Any) -> Any:
    served.server.add_dataset("fox")
    page = open_page("#/new/fox/model", **looks)
    page.get_by_text("Get a model").click()
    page.get_by_text("Too large for this machine").wait_for()
    return page


def test_a_model_is_offered_asked_about_and_downloaded(served: ServedPage, open_page: Opener) -> None:
    page = shelf_of(open_page, served)
    card = page.locator(".release").first
    assert "6.5 GiB to download" in card.inner_text() and "Fits this machine" in card.inner_text()
    assert card.get_by_role("link").get_attribute("href").endswith("stable-diffusion-xl-base-1.0")
    kept = page.locator(".release").nth(1)
    assert "Here already: autoencoder. Missing: model." in kept.inner_text()
    assert "3.9 GiB are here" in kept.inner_text()
    assert served.server.calls == [] or all("/downloads" not in path for _, path, _ in served.server.calls)

    card.get_by_role("button", name="Get it: Stable Diffusion XL 1.0").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_text("maker/model → models/checkpoints").wait_for()
    assert_legible(page, "dialog")
    assert all(path != "/lorasmith/v1/downloads" for _, path, _ in served.server.calls)
    dialog.get_by_role("button", name="Download 6.5 GiB").click()
    card.get_by_text("2 GiB of 6 GiB · 50 MiB a second").wait_for()
    assert_legible(page, "download")
    page.reload()
    page.get_by_text("2 GiB of 6 GiB").wait_for()  # open, as something is on its way
    served.server.downloads[0].update(is_checking=True)
    card.get_by_text("Checking model.safetensors").wait_for()
    served.server.models["models"].append({**served.server.models["models"][1], "name": "new", "title": "arrived"})
    served.server.downloads[0].update(state="completed")
    page.get_by_text("arrived", exact=True).first.wait_for()


def test_a_download_is_cancelled_or_fails_with_a_sentence(served: ServedPage, open_page: Opener) -> None:
    page = shelf_of(open_page, served)
    page.get_by_role("button", name="Continue: Z-Image").click()
    page.get_by_role("button", name="Download").click()
    card = page.locator(".release").nth(1)
    card.get_by_role("button", name="Cancel the download").click()
    card.get_by_role("button", name="Continue: Z-Image").click()
    page.get_by_role("button", name="Download").click()
    served.server.downloads[0].update(state="failed", error="the connection broke; get it again to continue")
    card.get_by_text("The connection broke; get it again to continue").wait_for()
    assert_legible(page, "failed")
    card.get_by_role("button", name="Close").click()
    card.get_by_text("The connection broke").wait_for(state="detached")


def test_a_gated_model_says_where_to_accept_and_takes_a_token(served: ServedPage, open_page: Opener) -> None:
    page = shelf_of(open_page, served, width=390, scheme="dark")
    page.get_by_role("button", name="Get it: Flux.1 dev").click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("link").get_attribute("href") == "https://huggingface.co/black-forest-labs/FLUX.1-dev"
    assert_legible(page, "gated")
    dialog.get_by_label("Access token").fill("hf_secret")
    dialog.get_by_role("button", name="Store the token").click()
    dialog.get_by_role("button", name="Download 6.5 GiB").wait_for()
    assert ("PUT", "/lorasmith/v1/hub-token", {"token": "hf_secret"}) in served.server.calls


def test_a_full_disk_is_said_before_the_first_byte(served: ServedPage, open_page: Opener) -> None:
    served.server.disk_free_bytes = 10**9
    page = shelf_of(open_page, served)
    page.get_by_role("button", name="Get it: Stable Diffusion XL 1.0").click()
    page.get_by_text("6.5 GiB do not fit: the disk has 954 MiB free.").wait_for()
    page.get_by_role("button", name="Download").click(force=True)
    assert served.server.downloads == []


def test_missing_parts_of_a_model_are_one_press_away(served: ServedPage, open_page: Opener) -> None:
    page = shelf_of(open_page, served)
    page.get_by_role("button", name="Get what is missing of flux1-dev.safetensors").click()
    page.get_by_role("button", name="Download").click()
    page.get_by_text("2 GiB of 6 GiB").wait_for()
    assert served.server.downloads[0]["subject"] == "model:diffusion_models/flux1-dev.safetensors"


def test_a_file_that_one_has_is_sent(served: ServedPage, open_page: Opener, tmp_path: Path) -> None:
    mine, odd = tmp_path / "mine.safetensors", tmp_path / "odd.safetensors"
    for path in (mine, odd):
        path.write_bytes(b"x" * 1000)
    page = shelf_of(open_page, served)
    page.get_by_label("A model file").set_input_files(odd)
    page.get_by_text("Odd.safetensors cannot be used; send a checkpoint.").or_(
        page.get_by_text("odd.safetensors cannot be used; send a checkpoint.")
    ).wait_for()
    page.get_by_label("A model file").set_input_files(mine)
    page.get_by_text("mine.safetensors is in models/checkpoints.").wait_for()
    page.get_by_role("radio", name="mine.safetensors").wait_for()
