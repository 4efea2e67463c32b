"""What `docs/training.md` shows can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Command = Callable[..., Any]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    lorasmith (train .*)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(lorasmith: Command, photos: Path, command: str) -> None:
    for word, package in (("Prodigy", "prodigyopt"), ("tensorboard", "tensorboard")):
        if word in command:
            pytest.importorskip(package)
    arguments = shlex.split(command.replace("sd15.safetensors", "lorasmith-tiny"))
    short = ["--steps", "1", "--warmup-steps", "1", "--preview-steps", "1", "--targets", "mid_block.*.attn2.to_q"]
    ran = lorasmith(*arguments, *short)

    assert ran.code == 0, ran.err
    idle = "--offloading" in command and not torch.cuda.is_available()  # it is for GPUs
    assert ("changes nothing" in ran.out) == idle
