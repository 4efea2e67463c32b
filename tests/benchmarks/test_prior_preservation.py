from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prior_preservation import measured, subject_folder


@pytest.mark.slow
def test_pictures_of_the_class_keep_it_and_so_does_preservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORASMITH_CACHE_DIR", str(tmp_path / "cache"))
    found = measured(subject_folder(tmp_path / "fox"), steps=100, seeds=4)
    assert found["without"]["class"] < 0.5, "else there is nothing to keep"
    for name in ("pictures", "prior target", "preserve class"):
        assert abs(found[name]["class"] - found["base"]["class"]) <= 0.1, name
        assert found[name]["subject"] > 0.8 > found["base"]["subject"], name
