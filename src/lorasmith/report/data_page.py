"""The page about a folder of images: what to look at before training, with the pictures concerned.

Self-contained like the report of a run: no scripts, no network, embedded pictures. Its input is plain data, which
`app.data_check_page` collects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorasmith.core.sizes import count_text
from lorasmith.report.markup import Html, command, definitions, document, folded, section, table, tag

_FIGURE = 40  # pixels of the longer side of a size, drawn


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A picture with what there is to say of it.

    Attributes:
        name: of the file.
        about: its sizes, in a line.
        caption: for the text encoder; empty for none.
        marks: what is wrong with the picture, in a word or two each.
        is_kept: whether it is the one to keep of several.
        remarks: what is wrong with the caption.
        crop: the part that is trained, as shares of width and height: left, top, right, bottom; None for all of it.
        picture: data URI, width and height; None if it could not be read.
    """

    name: str
    about: str
    caption: str = ""
    marks: Sequence[str] = ()
    is_kept: bool = False
    remarks: Sequence[str] = ()
    crop: tuple[float, float, float, float] | None = None
    picture: tuple[str, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something to look at.

    Attributes:
        title: in a few words.
        problem, remedy: in a sentence each.
        groups: the pictures concerned; those that resemble each other are a group.
        is_grouped: whether the groups are set apart from each other.
        more: number of pictures that are not shown.
        files: name and reason of files without a picture.
    """

    title: str
    problem: str
    remedy: str
    groups: Sequence[Sequence[Shot]] = ()
    is_grouped: bool = False
    more: int = 0
    files: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class SizeRow:
    """A size in training.

    Attributes:
        width, height: in pixels.
        images: number of images of this size.
        samples: the same, repeats included.
    """

    width: int
    height: int
    images: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Content of the page.

    Attributes:
        title: name of the folder.
        status: result in a word or two.
        mood: `good` or `fair`, for the colour of the status.
        verdict: result in a sentence.
        summary: folder, model and sizes, in a line.
        facts: the most important numbers.
        troubles: what to look at, the gravest first.
        commands: purpose and command line.
        sizes: sizes in training, the most frequent first.
        sizes_are: what sizes follow from, in a sentence.
        steps: names and values of the arithmetic of steps.
        captions: names and values on captions.
        others: pictures of which there is nothing to say.
        others_more: number of these that are not shown.
        notes: remarks, one sentence each.
    """

    title: str
    status: str
    mood: str
    verdict: str
    summary: str
    facts: Mapping[str, str] = field(default_factory=dict)
    troubles: Sequence[Trouble] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    sizes: Sequence[SizeRow] = ()
    sizes_are: str = ""
    steps: Mapping[str, str] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[Shot] = ()
    others_more: int = 0
    notes: Sequence[str] = ()


def data_page(report: DataReport) -> str:
    """The page. All text in `report` is escaped."""
    return document(
        f"{report.title} · data check",
        _header(report),
        [_trouble(number, one) for number, one in enumerate(report.troubles, start=1)],
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
            tag("a", one.title, href=f"#look-{number}"),
            tag("span", f" · {_sentence(one.problem)}.", class_="faint"),
        )
        for number, one in enumerate(report.troubles, start=1)
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


def _gallery(shots: Sequence[Shot]) -> Html:
    return tag("div", [_shot(one) for one in shots], class_="shots")


def _shot(shot: Shot) -> Html:
    said = shot.caption if shot.caption else tag("i", "no caption")
    marks = [tag("li", mark) for mark in shot.marks]
    marks += [tag("li", "the one to keep", class_="kept")] if shot.is_kept else []
    return tag(
        "figure",
        tag(
            "div",
            _framed(shot),
            tag("ul", marks, class_="marks") if marks else None,
            class_="frame",
        ),
        tag(
            "figcaption",
            tag("b", shot.name),
            tag("span", shot.about, class_="about"),
            tag("span", said, class_="said"),
            [tag("span", remark, class_="odd") for remark in shot.remarks],
        ),
        class_="shot",
    )


def _framed(shot: Shot) -> Html:
    if shot.picture is None:
        return tag("span", "no picture", class_="missing")
    uri, width, height = shot.picture
    image = tag("img", src=uri, alt=shot.name, width=width, height=height)
    if shot.crop is None:
        return tag("div", image, class_="whole")
    left, top, right, bottom = (100 * share for share in shot.crop)
    place = f"left:{left:.2f}%;top:{top:.2f}%;width:{right - left:.2f}%;height:{bottom - top:.2f}%"
    return tag("div", image, tag("div", class_="crop", style=place), class_="whole")


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
    """A rectangle of the same shape."""
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
    """Text whose flags of commands are not broken at their hyphens."""
    parts = re.split(r"(--[\w-]+)", text)
    return [tag("code", part, class_="flag") if number % 2 else part for number, part in enumerate(parts)]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
