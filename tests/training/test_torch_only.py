"""The engine needs torch alone: it trains models that another program loaded, without diffusers or transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from importlib import metadata
ABSENT = ("diffusers", "transformers", "accelerate", "sentencepiece", "huggingface_hub", "tokenizers")
sys.modules.update(dict.fromkeys(ABSENT))  # importing them is an error
known = metadata.version
def version(name):
    if name in ABSENT:
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
from tests.training.plain_torch_run import main
main()
"""


@pytest.mark.slow
def test_a_hand_made_denoiser_trains_where_nothing_but_torch_can_be_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert found["trained"] == found["layers"]
    first, last = (sum(part) / 5 for part in (found["losses"][:5], found["losses"][-5:]))
    assert last < 0.95 * first
    assert max(abs(a - b) / b for a, b in zip(found["spared"], found["losses"], strict=True)) < 0.01
    assert found["modules"] > 50
