"""What methods are for, on the built-in model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prior_preservation import scores, subject_folder, trained
from benchmarks.slider import brightness, drawn
from tools.pretrain.judge import Judge


@pytest.mark.slow
def test_the_strength_of_a_slider_is_the_amount_of_its_attribute(tmp_path: Path) -> None:
    found = drawn(subject_folder(tmp_path / "fox"), steps=100, seeds=2)
    amounts = [brightness(pictures) for pictures in found.values()]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > amounts[3] + 40 > amounts[-1] + 60


@pytest.mark.slow
def test_a_preserved_class_is_still_drawn_beside_the_subject(tmp_path: Path) -> None:
    settings = {"steps": 100, "preserve": "class", "preserve_class": "lion"}
    result, base = trained(subject_folder(tmp_path / "fox"), **settings)
    found = scores(result.lora.applied_to(base), Judge.load(), seeds=1)
    assert found["class"] >= 0.8 and found["subject"] >= 0.6
