"""Command lines to copy, for the console and the report: to repeat a run, resume it, or use its LoRA.

What is copied into a shell is one command, whatever is in it: captions, paths and names may be a stranger's.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.core.printable import printable


def command_line(arguments: Sequence[object], *, windows: bool = os.name == "nt") -> str:
    """A command line with all arguments quoted.

    Control characters, which can act on a terminal when pasted, become escapes.

    Args:
        arguments: program and arguments.
        windows: whether it is for the shells of Windows.
    """
    quote = _quoted_on_windows if windows else shlex.quote
    return " ".join(quote(printable(one, limit=sys.maxsize, keep="\n")) for one in arguments)


def _quoted_on_windows(text: str) -> str:
    """An argument for cmd.exe and PowerShell, which agree on no way to write the characters replaced here."""
    if re.fullmatch(r"[\w.:=/\\+-]+", text, flags=re.ASCII):
        return text
    plain = re.sub(r"[\"“”„%!$`\n]", "_", text)
    return f'"{plain}\\"' if plain.endswith("\\") else f'"{plain}"'


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


def resume_command(run: Path, rights: Sequence[str] = ()) -> str:
    """The command that resumes the run in a folder, with arguments that let its record name files and more."""
    return command_line(["lorasmith", "resume", positional(run), *rights])


def positional(argument: object) -> str:
    """A path as an argument that is no flag, whatever its name."""
    return f"./{argument}" if str(argument).startswith("-") else str(argument)


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
