"""The page about a folder of images: problems to fix before training, with the pictures concerned.

Self-contained like the report of a run: no scripts, no network, embedded pictures. Its input is plain data, which
`runs.data_check` collects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.core.printable import count_text
from lorasmith.report.markup import Html, command, definitions, document, folded, section, table, tag

_FIGURE = 40  # pixels of the longer side of a size, drawn


@dataclass(frozen=True, kw_only=True)
class PictureCard:
    """A picture with remarks."""

    name: str
    about: str  # its sizes, in a line
    caption: str = ""
    marks: Sequence[str] = ()  # problems of the picture, in a word or two each
    is_kept: bool = False  # the one to keep of several
    remarks: Sequence[str] = ()  # problems of the caption
    # the trained part as shares of width and height: left, top, right, bottom
    crop: tuple[float, float, float, float] | None = None
    picture: tuple[str, int, int] | None = None  # data URI, width and height; None if unreadable
    controls: tuple[str, int, int] | None = None  # those of an edit model, side by side


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A problem of the data, with the pictures concerned."""

    title: str  # in a few words
    problem: str  # in a sentence, as is `remedy`
    remedy: str
    groups: Sequence[Sequence[PictureCard]] = ()  # pictures that resemble each other are a group
    is_grouped: bool = False  # whether the groups are set apart from each other
    more: int = 0  # number of pictures that are not shown
    files: Sequence[tuple[str, str]] = ()  # name and reason of files without a picture


@dataclass(frozen=True)
class SizeRow:
    """A size in training, in pixels."""

    width: int
    height: int
    images: int
    samples: int  # with repeats


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Content of the page."""

    title: str  # name of the folder
    status: str  # in a word or two
    mood: str  # `good` or `fair`, for the colour of the status
    verdict: str  # in a sentence
    summary: str  # folder, model and sizes, in a line
    facts: Mapping[str, str] = field(default_factory=dict)
    troubles: Sequence[Trouble] = ()  # the gravest first
    commands: Mapping[str, str] = field(default_factory=dict)  # command line by purpose
    sizes: Sequence[SizeRow] = ()  # the most frequent first
    sizes_are: str = ""  # how sizes are chosen, in a sentence
    steps: Mapping[str, str] = field(default_factory=dict)  # arithmetic of the number of steps
    captions: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[PictureCard] = ()  # pictures without problems
    others_more: int = 0  # number of these that are not shown
    notes: Sequence[str] = ()  # one sentence each


def data_page(report: DataReport) -> str:
    """The page. All text in `report` is escaped."""
    return document(
        f"{report.title} · data check",
        _header(report),
        [_trouble(number, trouble) for number, trouble in enumerate(report.troubles, start=1)],
        section("Next", [command(line, what) for what, line in report.commands.items()]),
        section("Steps", definitions(report.steps)),
        section("Sizes", *_sizes(report)),
        section("Captions", definitions(report.captions)),
        section("Notes", tag("ul", [tag("li", note) for note in report.notes]) if report.notes else None),
        section("Other pictures", *_others(report)),
    )


def _header(report: DataReport) -> Html:
    contents = [
        tag(
            "li",
            tag("a", trouble.title, href=f"#look-{number}"),
            tag("span", f" · {_sentence(trouble.problem)}.", class_="faint"),
        )
        for number, trouble in enumerate(report.troubles, start=1)
    ]
    return tag(
        "header",
        tag("p", "Data check", class_="kicker"),
        tag("h1", report.title),
        tag("p", tag("span", report.status, class_=f"status {report.mood}"), " ", report.summary, class_="summary"),
        tag("p", report.verdict, class_="verdict"),
        definitions(report.facts, class_="facts"),
        tag("ol", contents, class_="contents") if contents else None,
    )


def _trouble(number: int, trouble: Trouble) -> Html:
    files = [(tag("span", name, class_="name"), reason) for name, reason in trouble.files]
    return section(
        trouble.title,
        tag("p", f"{_sentence(trouble.problem)}.", class_="problem"),
        tag("p", tag("b", "Remedy: "), _with_flags(f"{trouble.remedy}."), class_="remedy"),
        table(("File", "Why"), files, label=trouble.title, wordy=True) if files else None,
        tag("div", [_gallery(shots) for shots in trouble.groups], class_="groups" if trouble.is_grouped else None),
        _more(trouble.more),
        id=f"look-{number}",
    )


def _gallery(shots: Sequence[PictureCard]) -> Html:
    return tag("div", [_shot(shot) for shot in shots], class_="shots")


def _shot(shot: PictureCard) -> Html:
    caption = shot.caption if shot.caption else tag("i", "no caption")
    marks = [tag("li", mark) for mark in shot.marks]
    marks += [tag("li", "the one to keep", class_="kept")] if shot.is_kept else []
    return tag(
        "figure",
        tag("div", _framed(shot), tag("ul", marks, class_="marks") if marks else None, class_="frame"),
        tag(
            "figcaption",
            tag("b", shot.name),
            tag("span", shot.about, class_="about"),
            tag("span", caption, class_="said"),
            [tag("span", remark, class_="odd") for remark in shot.remarks],
        ),
        class_="shot",
    )


def _framed(shot: PictureCard) -> Html:
    if shot.picture is None:
        return tag("span", "no picture", class_="missing")
    crop = None
    if shot.crop is not None:
        left, top, right, bottom = (100 * share for share in shot.crop)
        place = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
        crop = tag("div", class_="crop", style=place)
    image = tag("div", _image(shot.picture, shot.name), crop, class_="whole")
    if shot.controls is None:
        return image
    before = tag("div", _image(shot.controls, f"control of {shot.name}"), class_="whole")
    return tag("div", before, image, class_="pair")


def _image(picture: tuple[str, int, int], about: str) -> Html:
    uri, width, height = picture
    return tag("img", src=uri, alt=about, width=width, height=height)


def _sizes(report: DataReport) -> list[Html]:
    if not report.sizes:
        return []
    most = max(row.images for row in report.sizes)
    rows = [
        (
            tag("span", _outline(row), f"{row.width}×{row.height}", class_="size"),
            tag("div", tag("div", style=f"width:{100 * row.images / most:.1f}%"), class_="bar"),
            f"{row.images:,}",
            f"{row.samples:,}",
        )
        for row in report.sizes
    ]
    columns = ("Size in training", "", "Images", "In an epoch")
    return [tag("p", report.sizes_are), table(columns, rows, label="Sizes in training", numbers=(2, 3))]


def _outline(row: SizeRow) -> Html:
    factor = _FIGURE / max(row.width, row.height)
    shape = f"width:{row.width * factor:.0f}px;height:{row.height * factor:.0f}px"
    return tag("span", tag("span", style=shape, class_="outline"), class_="outlined")


def _others(report: DataReport) -> list[Html]:
    if not report.others:
        return []
    count = len(report.others) + report.others_more
    title = f"{count_text(count, 'picture')} with nothing to look at"
    return [folded(title, _gallery(report.others), _more(report.others_more))]


def _more(count: int) -> Html | None:
    return tag("p", f"{count:,} more {'is' if count == 1 else 'are'} not shown.", class_="summary") if count else None


def _with_flags(text: str) -> list[object]:
    """Text in which command flags do not break at their hyphens."""
    parts = re.split(r"(--[\w-]+)", text)
    return [tag("code", part, class_="flag") if number % 2 else part for number, part in enumerate(parts)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
