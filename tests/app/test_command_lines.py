from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasmith.app.command_lines import arguments_for, command_line, generate_command, resume_command


def test_switches_are_flags_and_other_values_follow_theirs() -> None:
    values = {"batch_size": 2, "rslora": True, "stratified": False, "targets": "", "final_rate": 0.0}
    assert arguments_for(values) == [
        "--batch-size", "2", "--rslora", "--no-stratified", "--targets", "", "--final-rate", "0.0"
    ]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="other quotes there")
def test_what_is_copied_is_one_command() -> None:
    assert command_line(["echo", "$(rm -rf ~); 'x'"]) == """echo '$(rm -rf ~); '"'"'x'"'"''"""
    assert resume_command(Path("my run")) == "lorasmith resume 'my run'"
    drawn = generate_command("m.safetensors", Path("a b.safetensors"), "a cat")
    assert drawn == "lorasmith generate --model m.safetensors --lora 'a b.safetensors' --prompt 'a cat'"
