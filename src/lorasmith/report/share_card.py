"""A picture to share of a LoRA: what the base model draws beside what the LoRA draws, and how to ask for it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from lorasmith.report.contact_sheet import load_font, wrapped
from lorasmith.report.pictures import encoded

WIDTH, _MARGIN, _GAP = 1200, 48, 16
_INK, _FAINT, _FRAME, _GROUND, _ACCENT = "#1f2933", "#52606d", "#d9dee3", "#ffffff", "#1f5fa8"
MOST_PROMPTS = 3


def share_card(rows: Sequence[tuple[str, Image.Image, Image.Image]], *, title: str, facts: str) -> bytes:
    """A PNG file without metadata, `WIDTH` pixels wide.

    Args:
        rows: a prompt with its picture of the base model and that of the LoRA; at most `MOST_PROMPTS` are shown.
        title: such as the trigger.
        facts: strength, step and model, in a line.
    """
    assert rows
    shown = list(rows[:MOST_PROMPTS])
    inner = WIDTH - 2 * _MARGIN
    side = (inner - _GAP) // 2 if len(shown) == 1 else (inner - _GAP * (len(shown) - 1)) // len(shown)
    head, label, foot = 132, 34, 40
    pairs_side_by_side = len(shown) == 1
    rows_high = 1 if pairs_side_by_side else 2
    prompt_height = 58
    height = 2 * _MARGIN + head + rows_high * (label + side + _GAP) + prompt_height + foot
    card = Image.new("RGB", (WIDTH, height), _GROUND)
    pen = ImageDraw.Draw(card)
    pen.rectangle((0, 0, WIDTH, 10), fill=_ACCENT)
    name = wrapped(title, load_font(46, bold=True), inner, max_lines=1)
    pen.text((_MARGIN, _MARGIN), "".join(name), fill=_INK, font=load_font(46, bold=True))
    line = wrapped(facts, load_font(22), inner, max_lines=1)
    pen.text((_MARGIN, _MARGIN + 66), "".join(line), fill=_FAINT, font=load_font(22))
    top = _MARGIN + head
    for column, (prompt, base, tuned) in enumerate(shown):
        for row, (caption, picture) in enumerate((("Without the LoRA", base), ("With the LoRA", tuned))):
            x = _MARGIN + (row if pairs_side_by_side else column) * (side + _GAP)
            y = top + (0 if pairs_side_by_side else row * (label + side + _GAP))
            if pairs_side_by_side or column == 0:
                pen.text((x, y), caption, fill=_FAINT if row == 0 else _ACCENT, font=load_font(20, bold=row == 1))
            cut = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
            card.paste(ImageOps.expand(cut.crop((1, 1, side - 1, side - 1)), 1, _FRAME), (x, y + label))
        lines = wrapped(prompt, load_font(18), inner if pairs_side_by_side else side, max_lines=2)
        below = top + rows_high * (label + side + _GAP) - 6
        for number, text in enumerate(lines):
            pen.text((_MARGIN + column * (side + _GAP), below + 24 * number), text, fill=_INK, font=load_font(18))
    pen.text((_MARGIN, height - _MARGIN - 14), "Trained with Lorasmith", fill=_FAINT, font=load_font(18))
    return encoded(card, "PNG", optimize=True)
