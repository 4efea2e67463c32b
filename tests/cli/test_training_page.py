"""What the pages that `docs/training.md` lists show can be typed."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.core.blocks import units
from lorasmith.core.placement import best_device
from lorasmith.core.quantized_products import has_products
from lorasmith.training.memory import compilation
from tests.cli.test_stopped_runs import interrupted
from tests.covering import slow_except

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
NAMES = ("training", "subjects", "sliders", "text-encoders", "resuming", "validation", "previews", "optimizers")
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for name in (*NAMES, "noise-levels", "memory", "speed")
}
COMMANDS = re.findall(
    r"^    lorasmith (train .*(?:lorasmith-tiny|sd15).*)$", "\n".join(PAGES.values()), flags=re.MULTILINE
)


@pytest.mark.slow
@pytest.mark.parametrize("command", slow_except(COMMANDS, *COMMANDS[::4]))
def test_commands_run(lorasmith: Command, photos: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # machine code for twenty blocks takes minutes,
    monkeypatch.setattr(compilation, "units", lambda model: units(model)[-1:])  # and graphs of all of them seconds
    for word, package in (("Prodigy", "prodigyopt"), ("tensorboard", "tensorboard")):
        if word in command:
            pytest.importorskip(package)
    for pair in ("high", "low", "better", "worse"):
        shutil.copytree(photos, photos.with_name(pair))
    arguments = shlex.split(command.replace("sd15.safetensors", "lorasmith-tiny"))
    short = ["--steps", "1", "--warmup-steps", "1", "--preview-steps", "1", "--targets", "mid_block.*.attn2.to_q"]
    ran = lorasmith(*arguments, *short)

    assert ran.code == 0, ran.err
    device, products = best_device(), re.search(r"--products (\w+)", command)
    is_idle = "--offloading" in command and device.type == "cpu"
    is_idle |= "--cuda-graphs" in command and device.type == "cpu"
    is_idle |= products is not None and not has_products(products[1], device)
    assert ("has no effect" in ran.out) == is_idle


@pytest.mark.slow
def test_code_of_the_users_is_typed_and_typed_again_to_resume(
    lorasmith: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = PAGES["optimizers"].split("## Your own\n")[1]
    code, command = re.search(
        r"```python\n(.*?)```\n\n    PYTHONPATH=\. lorasmith (.*?)\n\n", section, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    (tmp_path / "own_rates.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = shlex.split(command)
    short = ["--steps", "3", "--targets", "mid_block.*.attn2.to_q", "--output", "run", "--no-previews"]
    with interrupted(signal.SIGINT, at=1):
        stopped = lorasmith(*arguments, *short)
    rights = [
        word for name in ("gentle", "decaying", "huber", "noisier") for word in ("--allow-import", f"own_rates:{name}")
    ]
    assert f"lorasmith resume run {' '.join(rights)}" in stopped.out, stopped.err
    monkeypatch.delitem(sys.modules, "own_rates")
    refused = lorasmith("resume", "run", "--allow-import", "own_rates:gentle")
    assert refused.code == 1 and "got 'own_rates:decaying': importing it would run code" in refused.err
    assert "own_rates" not in sys.modules
    resumed = lorasmith("resume", "run", *rights)
    assert "The run in run continues from step 1, bit-identically" in resumed.out, resumed.err
    reproduced = lorasmith("reproduce", "run/photos.safetensors", *rights)
    assert "are bit-identical" in reproduced.out, reproduced.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_going_on_and_repeating_run_as_shown(lorasmith: Command, photos: Path) -> None:
    train, resume, *others = re.findall(r"^    lorasmith (.*)$", PAGES["resuming"], flags=re.MULTILINE)
    again, _, _, longer, dry, reproduce = map(shlex.split, others)
    assert (resume, again[-1], longer[-2], dry[-1]) == ("resume runs/dog", "--fresh", "--steps", "--dry-run")
    short = ["--steps", "2", "--targets", "mid_block.*.attn2.to_q"]
    with interrupted(signal.SIGINT, at=1):
        stopped = lorasmith(*shlex.split(train.replace("sd15.safetensors", "lorasmith-tiny")), *short)
    assert "  lorasmith resume runs/dog" in stopped.out, stopped.err
    resumed = lorasmith(*shlex.split(resume))
    assert "The run in runs/dog continues from step 1, bit-identically" in resumed.out, resumed.err
    assert "initial weights are the same" in lorasmith(*dry).out
    assert "are bit-identical" in lorasmith(*reproduce).out
