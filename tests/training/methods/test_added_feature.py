"""A feature is its section of settings, its method and their registration: every door finds it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lorasmith

ADDED, ROOT = Path(__file__).with_name("added"), Path(__file__).parents[3]


def test_a_feature_is_found_at_every_door(tmp_path: Path) -> None:
    source, without = Path(lorasmith.__file__).parent, shutil.ignore_patterns("pages")  # but with compiled modules
    package = shutil.copytree(source, tmp_path / "lorasmith", ignore=without)
    methods = package / "training" / "methods"
    for name in ("erasure.py", "erasure_settings.py"):
        shutil.copy(ADDED / name, methods)
    registration = methods / "method_settings.py"
    text = registration.read_text()
    for before, after in (
        ("@dataclass", "from lorasmith.training.methods.erasure_settings import ErasureSettings\n\n\n@dataclass"),
        ("    OwnMethodSettings, ", "    ErasureSettings, OwnMethodSettings, "),
        ("METHODS = (\n", 'METHODS = (\n    "erasure.Erasure",\n'),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    registration.write_text(text)
    path = os.pathsep.join((str(tmp_path), str(ROOT), *filter(None, sys.path)))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(ADDED / "doors.py")]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found.pop("loss") > 0
    assert found == {
        "help": True,
        "page": True,
        "node": True,
        "slider": "True",
        "strengths": [-1.0, 1.0],
        "prompt": "a dog",
        "idle": ["erase_guidance 2 has no effect without erase."],
        "advice": True,
        "together": "runs that train together take plain steps, got erase; leave it out, or train apart",
    }
