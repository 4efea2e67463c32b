"""Command lines to copy, for the console and the report: to repeat a run, resume it, or use its LoRA.

Captions, paths and names are untrusted; whatever they contain, what is copied into a shell stays one command.
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
    """A command line with all arguments quoted, for the shells of Windows or for POSIX shells.

    Control characters, which can act on a terminal when pasted, become escapes.
    """
    quote = _quoted_on_windows if windows else shlex.quote
    return " ".join(quote(printable(argument, limit=sys.maxsize, keep="\n")) for argument in arguments)


def _quoted_on_windows(text: str) -> str:
    """An argument for cmd.exe and PowerShell, which have no common way to write the characters replaced here."""
    if re.fullmatch(r"[\w.:=/\\+-]+", text, flags=re.ASCII):
        return text
    plain = re.sub(r"[\"“”„%!$`\n]", "_", text)
    return f'"{plain}\\"' if plain.endswith("\\") else f'"{plain}"'


def generate_command(
    model: object,
    lora: Path,
    prompt: str,
    *,
    text_encoders: Sequence[str] = (),
    vae: str | None = None,
    edit: str | None = None,
    controls: Sequence[object] = (),
    mask: object = None,
    frames: int = 1,
) -> str:
    """The command that draws a picture, or a clip of several frames, with a LoRA.

    `model` is a path, a hub id or a built-in name; `controls` are the pictures that an edit model edits or refers to,
    `mask` is what a model paints that fills masks.
    """
    named = {name: value for name, value in (("vae", vae), ("edit", edit)) if value}
    parts = arguments_for({"text_encoder": text_encoders, **named})
    drawn = {**({} if mask is None else {"mask": mask}), **({"frames": frames} if frames > 1 else {})}
    pictures = arguments_for({"control": controls, **drawn})
    return command_line(
        ["lorasmith", "generate", "--model", model, *parts, "--lora", lora, *pictures, "--prompt", prompt]
    )


def resume_command(run: Path, rights: Sequence[str] = ()) -> str:
    """The command that resumes the run in a folder, with the flags of the rights that it needs (`rights_needed`)."""
    return command_line(["lorasmith", "resume", positional(run), *rights])


def positional(argument: object) -> str:
    """A path as an argument that is not taken for a flag, whatever its name."""
    return f"./{argument}" if str(argument).startswith("-") else str(argument)


def arguments_for(values: Mapping[str, Any]) -> list[str]:
    """Command-line arguments for option values by name; a bool becomes a switch, a sequence a repeated option."""
    arguments: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else negated_flag(name))
        elif isinstance(value, (list, tuple)):
            arguments += [part for item in value for part in (flag(name), str(item))]
        else:
            arguments += [flag(name), str(value)]
    return arguments


def flag(option: str) -> str:
    """`--batch-size` for `batch_size`."""
    return "--" + option.replace("_", "-")


def negated_flag(option: str) -> str:
    """`--no-stratified` for `stratified`."""
    return "--no-" + option.replace("_", "-")
