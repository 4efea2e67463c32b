from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.new_word import ALONE, WORD, score
from benchmarks.prior_preservation import subject_folder, trained
from lorasmith.runs.drawing import with_loras
from tools.pretrain.judge import Judge


@pytest.mark.slow
def test_the_word_alone_brings_the_subject(tmp_path: Path) -> None:
    settings = {**ALONE, "new_word_vectors": 2, "previews": ""}
    result, base = trained(subject_folder(tmp_path / "fox"), steps=100, trigger=WORD, **settings)
    judge, encoder = Judge.load(), base.base.text_encoder
    assert score(base, encoder, judge, seeds=2) == 0
    assert score(*with_loras(base, encoder, [(result.lora, 1.0)]), judge, seeds=2) > 0.3
