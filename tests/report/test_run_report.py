"""The page, from plain data: whole, safe, and right for runs of which little is known."""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.report import curves
from lorasmith.report.curves import Curves, loss_figure, quantile_figure
from lorasmith.report.markup import Html, document, tag
from lorasmith.report.pictures import PictureTable, data_uri, picture_table, thinned
from lorasmith.report.run_report import Advice, ImageAdvice, RunReport, Setting, ValidationRow, run_report

pytestmark = pytest.mark.usefixtures("figures_drawn")

NAN = math.nan
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & \'"'
VOID = {"br", "col", "hr", "img", "meta"}


@dataclass(frozen=True)
class Looks:
    name: str
    draws: int
    first: float
    last: float
    relative: float
    standing: str


@dataclass(frozen=True)
class Quantiles:
    bins: tuple[float, ...] = (0.0, 0.5, 1.0)
    steps: tuple[int, ...] = (10, 20)
    losses: tuple[tuple[float | None, ...], ...] = ((1.0, 0.1), (0.8, None))


class Page(HTMLParser):
    """Elements, attributes and text; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def page(**parts) -> Page:
    given = {"title": "fox", "status": "Finished", "mood": "good", "verdict": "Still learning", "summary": "LoRA"}
    return Page(run_report(RunReport(**(given | parts))))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.linear_gradient("L").resize((600, 300)).save(path)
    return path


def whole(text: str, picture: Path) -> dict:
    """Every part of a report, with `text` wherever text can be."""
    return {
        "title": text,
        "mood": "good",
        "status": text,
        "verdict": text,
        "summary": text,
        "facts": {text: text},
        "files": {text: text},
        "commands": {text: text},
        "curves": Curves(losses=[0.5, 0.4], rates=[1e-3, 1e-4], validations=[(2, 0.45)], base_loss=0.5, faults=[2]),
        "validations": [ValidationRow(2, 0.45, 0.5, -0.06, -0.04)],
        "quantiles": Quantiles(),
        "before_after": PictureTable([text], [(text, [picture])], text),
        "progress": PictureTable([], [("", [picture])], text),
        "images": [Looks(text, 20, 1.0, 0.5, 1.0, text)],
        "settings": [Setting(text, text, "other", text), Setting(text, text, text, text)],
        "data": {text: text},
        "captions": [(text, text)],
        "environment": {text: text},
        "notes": [(text, text, 3)],
    }


def test_no_text_becomes_markup(picture: Path) -> None:
    hostile, plain = page(**whole(HOSTILE, picture)), page(**whole("plain", picture))
    assert hostile.tags == plain.tags
    assert "script" not in hostile.tags
    assert [key for _, key, _ in hostile.attributes] == [key for _, key, _ in plain.attributes]
    assert hostile.text.count(HOSTILE) == plain.text.count("plain")


def test_the_page_needs_nothing_else_and_speaks(picture: Path) -> None:
    text = run_report(RunReport(**whole("plain", picture)))
    found = Page(text)
    links = {value for _, key, value in found.attributes if key in ("src", "href", "xlink:href", "data", "action")}
    assert all(link.startswith(("data:image/", "#")) for link in links)
    [policy] = [value for name, key, value in found.attributes if (name, key) == ("meta", "content") and "src" in value]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text)
    assert found.tags.count("h1") == 1 and found.tags.count("h2") == 11
    pictures = found.tags.count("img") + found.tags.count("svg")
    named = [value for name, key, value in found.attributes if (name, key) in {("img", "alt"), ("svg", "aria-label")}]
    assert len(named) == pictures == 6 and all(named)
    assert ("html", "lang", "en") in found.attributes
    scopes = [value for name, key, value in found.attributes if (name, key) == ("th", "scope")]
    assert len(scopes) == found.tags.count("th") and set(scopes) == {"row", "col"}
    assert len(set(found.ids)) == len(found.ids), "two elements have one id"
    assert ("table", "style", "--columns: 1") in found.attributes, "by which its pictures are of one width"


def test_pictures_come_before_what_is_said_of_them(picture: Path) -> None:
    parts = whole("plain", picture) | {"verdict": "The loss fell", "notes": [("Fault", "It broke.", 3)]}
    text = run_report(RunReport(**parts))
    said = [text.index(f">{words}<") for words in ("The loss fell", "Notes", "In numbers")]
    assert text.rindex("<img") < said[0] and said == sorted(said)


def test_parts_that_a_run_lacks_have_no_heading() -> None:
    found = page()
    assert found.tags.count("h2") == 1, "only the loss, which says that there is none"
    assert "No step was completed" in found.text
    assert "Notes" not in found.text


def test_any_losses_are_drawn() -> None:
    losses = [NAN, 0.3, math.inf, *[0.3] * 5000]
    drawn = loss_figure(Curves(losses=losses, rates=[1e-3] * len(losses)), label="loss")
    assert drawn.count("<svg") == 2 and len(drawn) < 400_000
    assert quantile_figure(Quantiles(losses=((None, -0.1), (0.2, 0.3)))).count("<svg") == 2


def test_a_figure_takes_its_colours_from_the_page() -> None:
    shown = Curves(losses=[0.5, 0.4, 0.3], rates=[3e-3, 2e-3, 1e-3], validations=[(3, 0.4)], base_loss=0.5, faults=[2])
    drawn = loss_figure(shown, label="loss")
    assert set(re.findall(r"var\((--[\w-]+)\)", drawn)) == {
        "--raw", "--smooth", "--held-out", "--grid", "--faint", "--bad",
    }  # fmt: skip
    assert not re.findall(r"#[0-9a-f]{6}\b", drawn)
    assert "--bad" not in loss_figure(Curves(losses=[0.5]), label="loss")


def test_a_figure_is_drawn_once_for_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def figure(*losses: float) -> str:
        return loss_figure(Curves(losses=losses), label="loss")

    first, other = figure(0.25, NAN, 0.5), figure(0.25, NAN, 0.75)
    monkeypatch.setattr(curves, "_svg", None)
    assert figure(0.25, float("nan"), 0.5) == first != other


def test_the_learning_rate_is_drawn_only_where_it_changes() -> None:
    same, other = (Curves(losses=[0.3, 0.2], rates=rates) for rates in ([6.99993e-4] * 2, [1e-3, 5e-4]))
    assert not same.rate_varies and other.rate_varies
    assert "The learning rate was 0.0007 throughout" in page(curves=same).text
    assert "throughout" not in page(curves=other).text


@pytest.mark.parametrize("losses", [(), ((None, None),) * 2, ((0.1, 0.2),)])
def test_without_quantiles_there_is_no_heading(losses) -> None:
    assert "Loss by noise level" not in page(quantiles=Quantiles(steps=(1,) * len(losses), losses=losses)).text


def test_validations_in_numbers() -> None:
    rows = [ValidationRow(100, 0.4, 0.5, -0.15, -0.05), ValidationRow(1200, 0.55, 0.5, 0.01, NAN)]
    curves = Curves(losses=[0.4] * 1200, validations=[(row.step, row.loss) for row in rows], base_loss=0.5)
    text = page(curves=curves, validations=rows).text
    assert "100 (best)0.4−20.0 %−30.0 % to −10.0 %" in text
    assert "1,2000.55+10.0 %+2.0 % to –" in text


def test_images_that_need_a_look_come_first() -> None:
    images = [Looks(f"good-{index}", 30, 1.0, 0.5, 0.9 + index / 100, "learnt") for index in range(30)]
    images += [Looks("dull", 30, 1, 0.1, 0.2, "memorised"), Looks("odd", 30, 2, 2, 3.0, "never fit")]
    images += [Looks("unseen", 0, NAN, NAN, NAN, "too few draws")]
    advice = Advice(
        (
            ImageAdvice("odd", "never learnt", "It stays high.", "Look at it."),
            ImageAdvice("dull", "learnt by heart", "It fell.", "Draw it less.", "dull=0.1"),
        ),
        "odd is never learnt",
    )
    text = page(images=images, advice=advice).text
    assert "odd is never learnt. It stays high. Look at it.dull is learnt by heart" in text
    assert "To draw less: --image-repeats dull=0.1" in text
    order = [text.index(name) for name in ("odd", "dull", "good-29", "good-12", "13 more images", "good-11", "unseen")]
    assert order == sorted(order)
    said = page(images=images[:30], advice=Advice(summary="None of 30 images stands out.")).text
    assert "None of 30 images stands out." in said and "To draw less" not in said


def test_settings_that_were_changed_come_first() -> None:
    settings = [
        Setting("seed", 0, 0, "Decides."),
        Setting("rank", 8, 16, "Size."),
        Setting("learning_rate", 7e-4, None),
        Setting("dora", True, False),
    ]
    text = page(settings=settings).text
    assert "rank816Size." in text and "learning_rate0.0007default" in text and "dorayesno" in text
    assert text.index("dora") < text.index("1 settings at their default") < text.index("seed")


def test_a_picture_is_scaled_and_missing_ones_are_said(tmp_path: Path, picture: Path) -> None:
    uri, width, height = data_uri(picture, 320) or pytest.fail("not read")
    assert (width, height) == (320, 160) and uri.startswith("data:image/webp;base64,")
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no picture")
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.png")
    paths = [picture, *(tmp_path / f"{name}.png" for name in ("broken", "text", "gone", "pipe")), None]
    drawn = picture_table(PictureTable(["p"] * 6, [("row", paths)], "about"))
    assert drawn.count("<img") == 1 and drawn.count("no picture") == 5
    sizes = [
        picture_table(PictureTable(["p"], [("row", [picture])] * rows, "x")).count('width="208"') for rows in (9, 41)
    ]
    assert sizes == [0, 41], "many are smaller"


def test_thinning_keeps_the_ends() -> None:
    assert thinned(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert thinned([1, 2], 5) == [1, 2]


def test_markup_is_escaped_unless_it_says_that_it_is_markup() -> None:
    assert tag("p", "a < b", None, ["c", Html("<br>")], title='"&') == '<p title="&quot;&amp;">a &lt; bc<br></p>'
    assert tag("img", alt="x", class_=None) == '<img alt="x">'
    assert "<title>&lt;/title&gt;</title>" in document("</title>")


def test_pages_have_no_control_characters() -> None:
    assert tag("p", "a\x1b\u202e\ud800<\n", title="\x9b") == '<p title="\\u009b">a\\u001b\\u202e\\ud800&lt;\n</p>'
