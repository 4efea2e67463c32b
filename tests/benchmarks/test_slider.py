from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prior_preservation import subject_folder
from benchmarks.slider import brightness, drawn


@pytest.mark.slow
def test_the_strength_of_a_slider_is_the_amount_of_its_attribute(tmp_path: Path) -> None:
    found = drawn(subject_folder(tmp_path / "fox"), steps=100, seeds=2)
    amounts = [brightness(pictures) for pictures in found.values()]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[0] > amounts[3] + 40 > amounts[-1] + 60
