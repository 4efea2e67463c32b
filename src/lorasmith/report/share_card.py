"""A picture to share of a LoRA: what the base model draws beside what the LoRA draws, and how to ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from lorasmith.report.contact_sheet import load_font, wrapped
from lorasmith.report.pictures import encoded

WIDTH, _MARGIN, _GAP, _ROUND = 1200, 48, 12, 18
_INK, _FAINT, _GROUND, _ACCENT = "#f5f0e8", "#a79e92", "#161412", "#ff6b3d"  # of the page's dark theme
MOST_PROMPTS = 3


def share_card(rows: Sequence[tuple[str, Image.Image, Image.Image]], *, title: str, facts: str) -> bytes:
    """A PNG file without metadata, `WIDTH` pixels wide.

    Args:
        rows: a prompt with its picture of the base model and that of the LoRA; at most `MOST_PROMPTS` are shown.
        title: what was learnt.
        facts: what to write, step and model, in a line.
    """
    assert rows
    shown = list(rows[:MOST_PROMPTS])
    inner = WIDTH - 2 * _MARGIN
    columns = max(2, len(shown))  # a single prompt has both of its pictures side by side
    side = (inner - _GAP * (columns - 1)) // columns
    small = load_font(18)
    lines = [wrapped(prompt, small, side, max_lines=2) for prompt, *_ in shown]
    head, labels = 122, 34
    high = 1 if len(shown) == 1 else 2
    prompts = 24 * max(map(len, lines)) + 12
    card = Image.new("RGB", (WIDTH, 2 * _MARGIN + head + high * (labels + side + _GAP) + prompts - _GAP), _GROUND)
    pen = ImageDraw.Draw(card)
    for text, font, above, colour in ((title, load_font(50, bold=True), -8, _INK), (facts, load_font(22), 62, _FAINT)):
        pen.text((_MARGIN, _MARGIN + above), "".join(wrapped(text, font, inner, max_lines=1)), fill=colour, font=font)
    pen.text((WIDTH - _MARGIN - small.getlength("Lorasmith"), _MARGIN), "Lorasmith", fill=_FAINT, font=small)
    rounded = Image.new("L", (side, side))
    ImageDraw.Draw(rounded).rounded_rectangle((0, 0, side - 1, side - 1), _ROUND, fill=255)
    for column, (_, *pictures) in enumerate(shown):
        for row, (caption, picture) in enumerate(zip(("Without", "With the LoRA"), pictures, strict=True)):
            place, line = (row, 0) if high == 1 else (column, row)
            x, y = _MARGIN + place * (side + _GAP), _MARGIN + head + line * (labels + side + _GAP)
            if high == 1 or column == 0:
                pen.text((x, y), caption, fill=_ACCENT if row else _FAINT, font=load_font(20, bold=row == 1))
            card.paste(
                ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS), (x, y + labels), rounded
            )
        below = card.height - _MARGIN - prompts + 12
        for number, text in enumerate(lines[column]):
            pen.text((_MARGIN + column * (side + _GAP), below + 24 * number), text, fill=_INK, font=small)
    return encoded(card, "PNG", optimize=True)
