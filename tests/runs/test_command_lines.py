from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorasmith.runs.command_lines import arguments_for, command_line, generate_command, resume_command


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
    edited = generate_command("m", Path("l"), "blue", edit="kontext", controls=[Path("a b.png"), "c.png"])
    assert (
        edited
        == "lorasmith generate --model m --edit kontext --lora l --control 'a b.png' --control c.png --prompt blue"
    )


def test_nothing_in_a_command_acts_on_a_terminal() -> None:
    assert command_line(["a", "x\x1b[201~\rrm \u202e"], windows=False) == r"a 'x\u001b[201~\rrm \u202e'"
    assert command_line(["a", "two\nlines"], windows=False) == "a 'two\nlines'"
    assert resume_command(Path("--track=wandb")) == "lorasmith resume ./--track=wandb"


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        (r"C:\models\m.safetensors", r"C:\models\m.safetensors"),
        ("a&calc", '"a&calc"'),
        ('a" & calc & "', '"a_ & calc & _"'),
        ("%PATH% $(calc) `n", '"_PATH_ _(calc) _n"'),
        ("a b\\", '"a b\\\\"'),
        ("a;b,c", '"a;b,c"'),
    ],
)
def test_the_shells_of_windows_run_nothing_of_an_argument(argument: str, quoted: str) -> None:
    assert command_line(["x", argument], windows=True) == f"x {quoted}"
