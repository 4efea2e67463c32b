"""The page in Chinese, and in a language that a table alone adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.training.events import Outcome
from tests.covering import slow_except
from tests.fake_hub import hub_with_login
from tests.runs.test_model_card import kohya_file
from tests.server.pages.conftest import assert_legible, expected
from tests.server.pages.run_folders import write_evaluation
from tests.server.pages.served_page import ServedPage
from tests.server.pages.test_language import PAGES

Opener = Callable[..., Any]

VIEWS = {
    "home": ("", ".covers .cover"),
    "sets": ("#/photos", ".cover.four"),
    "photos": ("#/new/fox/photos", ".tile"),
    "no photos": ("#/new/none", ".button.primary"),
    "model": ("#/new/fox/model", ".choice"),
    "models": ("#/models", ".release"),
    "settings": ("#/new/fox/settings", ".choice .estimate"),
    "run": ("#/runs/runs%2Ffox-001", ".easel img"),
    "runs": ("#/runs", ".run-rows li"),
    "compare": ("#/compare/runs%2Ffox-001/runs%2Ffox-002", ".easel img"),
}
"""The main views: address, and what is there when it is drawn."""

ENGLISH = r"""() => {
  const isEnglish = (text) => /[A-Za-z]{2,} [a-z]{2,}/.test(text) && !/\p{Script=Han}/u.test(text);
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = texts.nextNode(); text; text = texts.nextNode())
    if (isEnglish(text.data) && !text.parentElement.closest("noscript")) found.push(text.data.trim());
  for (const name of ["aria-label", "title", "placeholder", "alt"])
    for (const one of document.querySelectorAll(`[${name}]`))
      if (isEnglish(one.getAttribute(name))) found.push(one.getAttribute(name));
  return [...new Set(found)];
}"""
"""Texts of a page with two English words in a row and nothing Chinese."""

NAMES = ("a red fox", "fox", "a photo of foxy", "Flux.2 klein", "zibo ", "all pictures are of")
"""How texts begin that are as they were written: names, captions, prompts, and the reason of a made-up plan."""


@pytest.mark.parametrize("width", slow_except([1200, 390], 390))
def test_the_main_views_are_in_chinese(served: ServedPage, open_page: Opener, width: int) -> None:
    served.add_dataset()
    served.add_run("runs/fox-001")
    served.add_run("runs/fox-002", outcome=Outcome.FAILED)
    page = open_page(locale="zh-CN", width=width)
    expected(page.locator("html")).to_have_attribute("lang", "zh")
    for name, (view, ready) in VIEWS.items():
        page.goto(served.address + view)
        page.wait_for_selector(ready)
        expected(page.locator(".loading")).to_have_count(0)
        if name == "settings":
            page.get_by_text("全部设置").first.click()
            page.get_by_text("尝试多个值").click()
        found = [text for text in page.evaluate(ENGLISH) if not text.startswith(NAMES)]
        assert found == [], name
        assert_legible(page, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the hub's client
@pytest.mark.parametrize("width", [1200, 390])
def test_the_dialog_of_sharing_is_in_chinese(
    served: ServedPage, open_page: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    folder = served.add_run("runs/fox-001", trigger="foxy fox")
    write_evaluation(folder, trigger="foxy fox")
    lora = kohya_file(tmp_path, **{"lorasmith.steps": "40", "ss_sd_model_name": "mine.safetensors"})
    shutil.copyfile(lora, folder / "fox-step00000040.safetensors")
    with hub_with_login(monkeypatch):
        page = open_page("#/runs/runs%2Ffox-001", locale="zh-CN", width=width)
        if width < 500:
            page.locator(".panel-handle").click()
        page.get_by_role("button", name="保留这一个").click()
        keep = page.get_by_role("dialog")
        keep.get_by_role("button", name="分享到 Hugging Face").click()
        keep.locator(".hub-files").get_by_text("README.md").wait_for()
        keep.get_by_role("checkbox").first.check()
        keep.locator(".hub-told").wait_for()
        found = [text for text in page.evaluate(ENGLISH) if not text.startswith((*NAMES, "Whether diffusers", "{"))]
        assert found == []
        assert_legible(page, "told")
        keep.get_by_label("仓库").fill("fox")
        keep.get_by_role("button", name="上传…").click()
        expected(keep.get_by_role("button", name="是的，上传")).to_be_in_viewport(ratio=1)
        assert_legible(page, "asked")


def test_a_language_is_chosen_and_remembered(served: ServedPage, open_page: Opener) -> None:
    tables = []
    page = open_page()
    page.on("request", lambda request: "/lang/" in request.url and tables.append(request.url))
    expected(page.get_by_role("link", name="Photos", exact=True)).to_be_visible()
    expected(page.locator("html")).to_have_attribute("lang", "en")
    page.reload()
    expected(page.get_by_role("link", name="Photos", exact=True)).to_be_visible()
    assert tables == []  # English loads none
    page.get_by_label("Language").select_option("zh")
    expected(page.get_by_role("link", name="照片", exact=True)).to_be_visible()
    page.reload()
    expected(page.get_by_role("link", name="照片", exact=True)).to_be_visible()
    page.get_by_label("Language").select_option("en")
    expected(page.get_by_role("link", name="Photos", exact=True)).to_be_visible()


def test_a_table_is_all_that_a_language_needs(served: ServedPage, open_page: Opener) -> None:
    """The table has plural forms, another order of holes, and not every text."""
    served.add_dataset("fox", 4)
    served.add_dataset("one", 1)
    table = {"Photos": "Fotos", "{0} pictures": {"one": "{0} Bild", "other": "{0} Bilder"}, "Loading {0}…": "{0} lädt…"}
    module = (PAGES / "lib" / "language.mjs").read_text(encoding="utf-8")
    assert '["en", "zh"]' in module
    page = open_page()
    page.route("**/lang/de.json", lambda route: route.fulfill(json=table))
    page.route(
        "**/lib/language.mjs",
        lambda route: route.fulfill(
            body=module.replace('["en", "zh"]', '["en", "de"]'), content_type="text/javascript"
        ),
    )
    page.goto(served.address + "#/photos")
    page.reload()
    page.get_by_label("Language").select_option("de")
    expected(page.get_by_role("heading", name="Fotos")).to_be_visible()
    expected(page.get_by_text("4 Bilder", exact=True)).to_be_visible()
    expected(page.get_by_text("1 Bild", exact=True)).to_be_visible()
    expected(page.get_by_role("link", name="My LoRAs")).to_be_visible()
