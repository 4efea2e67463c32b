"""Command lines to copy, for the console, `run.json` and the report: what repeats a run, continues it, or shows it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["arguments_for", "command_line", "flag", "generate_command", "negated_flag", "resume_command"]


def command_line(arguments: Sequence[object]) -> str:
    """A command line to copy: a caption in it must not become a command of its own."""
    texts = list(map(str, arguments))
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def generate_command(model: object, lora: Path, prompt: str) -> str:
    """The command that draws a picture with a LoRA."""
    return command_line(["lorasmith", "generate", "--model", model, "--lora", lora, "--prompt", prompt])


def resume_command(run: Path) -> str:
    """The command that continues the run in a folder."""
    return command_line(["lorasmith", "resume", run])


def arguments_for(values: Mapping[str, Any]) -> list[str]:
    """The arguments that give options their `values`, by name; a switch is True or False."""
    arguments: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else negated_flag(name))
        else:
            arguments += [flag(name), str(value)]
    return arguments


def flag(option: str) -> str:
    """`--batch-size` for `batch_size`."""
    return "--" + option.replace("_", "-")


def negated_flag(option: str) -> str:
    """`--no-stratified` for `stratified`."""
    return "--no-" + option.replace("_", "-")
