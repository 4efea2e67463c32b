from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from PIL import Image

from lorasmith.report.pictures import PictureTable
from lorasmith.report.sweep_page import RankedRun, SweepReport, UnrankedRun, sweep_report


def ranked(index: int, **changes: object) -> RankedRun:
    facts: dict[str, object] = {
        "name": f"rank-{index}_rate-3e-4",
        "settings": [index, 3e-4, None, True],
        "loss": 0.5 + index / 100,
        "base_loss": 1.0,
        "best_step": 10,
        "time": "3 min",
        "lora": f"rank-{index}/cat.safetensors",
        "link": f"rank-{index}/report.html",
        "validations": [(5, 0.9), (10, 0.5 + index / 100)],
    }
    return RankedRun(**{**facts, **changes})  # type: ignore[arg-type]


def page(**changes: object) -> str:
    facts: dict[str, object] = {
        "title": "my sweep",
        "summary": "2 complete",
        "verdict": "rank-1 is the best.",
        "varied": ["rank", "learning_rate", "trigger", "flip"],
        "ranked": [ranked(1), ranked(2)],
    }
    return sweep_report(SweepReport(**{**facts, **changes}))  # type: ignore[arg-type]


def test_the_ranking_has_settings_changes_and_links() -> None:
    text = page()
    assert text.index("rank-1_rate-3e-4") < text.index("rank-2_rate-3e-4")
    row = re.sub(r"<[^>]+>", "|", text[text.index('<a href="rank-1/') : text.index('<a href="rank-2/')])
    assert [cell for cell in row.split("|") if cell][:9] == [
        "rank-1_rate-3e-4", "1", "0.0003", "default", "yes", "0.51", "−49.0 %", "10", "3 min",
    ]  # fmt: skip
    assert "which are the same for all runs" in text
    assert "by different held-out images" in page(comparable=False)


def test_the_page_is_self_contained_and_escapes() -> None:
    text = page(
        title="<script>alert(1)</script>",
        ranked=[ranked(1, name="$x$<b>", link=None)],
        unranked=[UnrankedRun("a", "failed", 3, "<img src=x onerror=alert(1)>")],
    )
    assert "<script" not in text and "<img" not in text and "<b>" not in text
    assert "default-src 'none'" in text
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', text) == []


@pytest.mark.usefixtures("figures_drawn")
def test_curves_are_relative_to_the_base_model_with_a_name_for_the_first_eight() -> None:
    many = [ranked(index) for index in range(1, 12)]
    text = page(ranked=many)
    assert text.count('role="img"') == 2, "for wide and narrow screens"
    assert "Held-out loss over the steps of 11 runs" in text
    drawn = text[text.index("<svg") :]
    assert drawn.count("var(--raw)") >= 3 * 2, "the last three have no colour of their own"
    assert text == page(ranked=many)
    assert "<svg" not in page(ranked=[ranked(1, base_loss=math.nan)]) and "<svg" not in page(ranked=[])


def test_runs_that_are_not_ranked_are_apart() -> None:
    text = page(
        ranked=[],
        unranked=[
            UnrankedRun("x", "failed", 3, "no memory"),
            UnrankedRun("y", "complete"),
            UnrankedRun("z", "waiting"),
        ],
    )
    assert "Ranking" not in text and "Failed and unfinished" in text
    assert 'class="bad">failed' in text and "no memory" in text and "no held-out loss was measured" in text


def test_pictures_are_embedded(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    table = PictureTable(["a fox"], [("rank-1", [tmp_path / "a.png"])], "Pictures by prompt")
    assert page(pictures=table).count("<img") == 1
    sheet = PictureTable((), [("", [tmp_path / "a.png"])], "Sheet")
    assert page(sheets=[("rank-1", table), ("rank-2", sheet)]).count("<img") == 2
