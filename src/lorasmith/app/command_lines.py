"""Command lines to copy, for the console, `run.json` and the report: to repeat a run, resume it, or use its LoRA."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["arguments_for", "command_line", "flag", "generate_command", "negated_flag", "resume_command"]


def command_line(arguments: Sequence[object]) -> str:
    """A command line with all arguments quoted, as captions may contain shell syntax."""
    texts = list(map(str, arguments))
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)


def generate_command(
    model: object, lora: Path, prompt: str, *, text_encoders: Sequence[str] = (), vae: str | None = None
) -> str:
    """The command that draws a picture with a LoRA.

    Args:
        model: path, hub id or name of the base model.
        lora: the file.
        prompt: of the picture.
        text_encoders, vae: files of the model's parts.
    """
    parts = arguments_for({"text_encoder": text_encoders, **({"vae": vae} if vae else {})})
    return command_line(["lorasmith", "generate", "--model", model, *parts, "--lora", lora, "--prompt", prompt])


def resume_command(run: Path) -> str:
    """The command that resumes the run in a folder."""
    return command_line(["lorasmith", "resume", run])


def arguments_for(values: Mapping[str, Any]) -> list[str]:
    """Command-line arguments for option values by name; a bool becomes a switch, a sequence a repeated option."""
    arguments: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else negated_flag(name))
        elif isinstance(value, (list, tuple)):
            arguments += [part for one in value for part in (flag(name), str(one))]
        else:
            arguments += [flag(name), str(value)]
    return arguments


def flag(option: str) -> str:
    """`--batch-size` for `batch_size`."""
    return "--" + option.replace("_", "-")


def negated_flag(option: str) -> str:
    """`--no-stratified` for `stratified`."""
    return "--no-" + option.replace("_", "-")
