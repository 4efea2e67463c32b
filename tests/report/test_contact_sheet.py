from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lorasmith.report.contact_sheet import contact_sheet

RED, BLUE = (255, 0, 0), (0, 0, 255)


def solid(colour, size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def extent(sheet: Image.Image, colour) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of the pixels of a colour."""
    rows, columns = np.all(np.asarray(sheet) == colour, axis=-1).nonzero()
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_pictures_stand_in_rows_and_columns() -> None:
    colours = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]
    sheet = contact_sheet([[solid(c) for c in row] for row in colours], ["before", "after"], ["a", "b"], title="Title")
    assert sheet.mode == "RGB"
    (red, green), (blue, yellow) = [[extent(sheet, c) for c in row] for row in colours]
    assert red[0] == blue[0] and green[0] == yellow[0] > red[2]
    assert red[1] == green[1] and blue[1] == yellow[1] > red[3]


@pytest.mark.parametrize(
    ("size", "shown"),
    [((64, 64), (128, 128)), ((48, 20), (144, 60)), ((200, 100), (200, 100)), ((2048, 1024), (512, 256))],
)
def test_scale(size: tuple[int, int], shown: tuple[int, int]) -> None:
    left, top, right, bottom = extent(contact_sheet([[solid(RED, size)]], [], []), RED)
    assert (right - left, bottom - top) == shown


def test_sizes_keep_their_relation() -> None:
    sheet = contact_sheet([[solid(RED, (64, 64)), solid(BLUE, (32, 16))]], [], [])
    left, top, right, bottom = extent(sheet, BLUE)
    assert (right - left, bottom - top) == (64, 32)
    assert extent(sheet, RED)[1] < top, "smaller pictures stand in the middle of their row"


def test_short_rows_and_modes() -> None:
    rows = [[solid(RED), Image.new("RGBA", (64, 64)), Image.new("L", (64, 64), 9)], [Image.new("1", (64, 64))], []]
    sheet = contact_sheet(rows, ["a", "", "c"], [])
    assert sheet.width > 3 * 128


def test_an_empty_place_stays_empty() -> None:
    full = contact_sheet([[solid(RED), solid(BLUE)], [solid(RED), solid(RED)]], [], [])
    sheet = contact_sheet([[None, solid(BLUE)], [solid(RED), None]], [], [])
    assert sheet.size == full.size
    assert extent(sheet, BLUE) == extent(full, BLUE)
    assert extent(sheet, RED)[2] < extent(sheet, BLUE)[0]


def test_labels_are_drawn_and_wrapped() -> None:
    picture = solid(RED, (128, 128))
    plain = contact_sheet([[picture]], [], [])
    short = contact_sheet([[picture]], [], ["a dog"])
    long = contact_sheet([[picture]], [], ["a dog " * 8])
    endless = contact_sheet([[picture]], [], ["a dog " * 500])
    assert plain.width == short.width == long.width == endless.width
    assert plain.height < short.height < long.height <= endless.height < long.height + 60
    named = contact_sheet([[picture]], ["the model before training"], [])
    assert named.width > plain.width and named.height == plain.height
