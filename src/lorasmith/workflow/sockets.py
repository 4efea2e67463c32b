"""Inputs and outputs of nodes: types and accepted values.

Socket types are ComfyUI's names. `INT`, `FLOAT`, `STRING`, `BOOLEAN` and `COMBO` are scalars that can be values in a
workflow file; all other types (`MODEL`, `LATENT`, ...) are only linked. `INT,FLOAT` accepts either, `*` anything, and
all `MATCH` sockets of one node have the same type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import Option
from lorasmith.core.registry import nearest

ANY = "*"  # matches every type

MATCH = "COMFY_MATCHTYPE_V3"  # any type, but the same for all such sockets of a node

SCALARS: Mapping[str, type] = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool, "COMBO": str}
"""Types whose values a workflow file may contain."""

Options: TypeAlias = Collection[str] | Callable[[Folders], Sequence[str]]


@dataclass(frozen=True)
class Grow:
    """An input that repeats: `<name>.<prefix>0`, `<name>.<prefix>1`, ... between `min` and `max` times.

    With `names` the repetitions are `<name>.<one of the names>` instead, one for each.
    """

    prefix: str
    _: KW_ONLY
    min: int = 1
    max: int = 10
    names: tuple[str, ...] = ()

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The short names of all repetitions."""
        return self.names or tuple(f"{self.prefix}{index}" for index in range(self.max))


@dataclass(frozen=True)
class Output:
    """An output of a node.

    Attributes:
        type: socket type.
        name: shown in editors; the type by default.
        is_list: whether the value is a list, whose items are processed one by one.
        tooltip: one sentence.
    """

    type: str
    name: str = ""
    _: KW_ONLY
    is_list: bool = False
    tooltip: str = ""

    @property
    def label(self) -> str:
        return self.name or self.type


@dataclass(frozen=True)
class Input:
    """An input of a node.

    Attributes:
        name: key in the workflow file and keyword of the node function.
        type: socket type.
        optional: whether a workflow may omit it; the default is then the declared one, or the function's.
        default: initial value in editors; None for none.
        min, max, step: inclusive bounds and granularity of numbers.
        options: choices of a COMBO, fixed or a function of the folders.
        accept: checks text, or a COMBO's values instead of the list: returns the accepted spelling or raises a
            LorasmithError. For file names with a place, such as `cat.png [output]`, and those of new files.
        file: finds the file or folder that a value names, if any; a result also depends on its size and time.
        multiline: whether text may have several lines.
        force_input: whether a scalar is shown as a socket only.
        tooltip: one or two sentences.
        advanced: whether editors show it only on request.
        extras: additional options for editors (`image_upload`, `control_after_generate`).
        may_lack: whether older workflows lack it although editors require it; they get the default.
        grow: set if the input repeats; the function receives a dict by short name (`input0`, ...).
    """

    name: str
    type: str
    _: KW_ONLY
    optional: bool = False
    default: Any = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    options: Options = ()
    accept: Callable[[str, Folders], str] | None = None
    file: Callable[[Folders, str], Path | None] | None = None
    multiline: bool | None = None
    force_input: bool = False
    tooltip: str = ""
    advanced: bool = False
    extras: Mapping[str, Any] = field(default_factory=dict)
    may_lack: bool = False
    grow: Grow | None = None

    @classmethod
    def from_option(cls, option: Option, **overrides: Any) -> Input:
        """The input for an `Option`, optional if that has no default; `overrides` replace attributes."""
        kind = "COMBO" if option.choices else next(name for name, known in SCALARS.items() if known is option.type)
        declared = cls(
            option.name,
            kind,
            optional=option.default is None,
            default=option.default,
            min=option.min,
            max=option.max,
            step=option.step,
            options=option.choices,
            tooltip=option.help,
        )
        return replace(declared, **overrides)

    def expanded(self) -> tuple[Input, ...]:
        """The inputs of a workflow file for this one: itself, or each repetition."""
        if self.grow is None:
            return (self,)
        return tuple(
            replace(self, name=f"{self.name}.{suffix}", optional=self.optional or index >= self.grow.min, grow=None)
            for index, suffix in enumerate(self.grow.suffixes)
        )

    def choices(self, folders: Folders) -> tuple[str, ...]:
        """The current options of a COMBO."""
        return tuple(self.options(folders) if callable(self.options) else self.options)

    @property
    def scalar_types(self) -> tuple[str, ...]:
        return tuple(kind for kind in _members(self.type) if kind in SCALARS)

    def check(self, value: Any, folders: Folders) -> Any:
        """A workflow file's value in the declared type and spelling. LorasmithError if it does not fit or must be a
        link.
        """
        if self.type in (ANY, MATCH):
            return value
        if not self.scalar_types:
            raise OptionError(f"{self.name} must be linked to an output of type {self.type}, got {value!r}")
        *others, last = self.scalar_types
        for kind in others:
            try:
                return self._check_as(kind, value, folders)
            except OptionError:
                continue  # a union accepts values of any of its types; the error is that of the last one
        return self._check_as(last, value, folders)

    def check_linked(self, value: Any, folders: Folders) -> Any:
        """Check a linked value: scalars as by `check`, objects not at all."""
        only_scalars = len(self.scalar_types) == len(_members(self.type))
        return self.check(value, folders) if only_scalars else value

    def _check_as(self, kind: str, value: Any, folders: Folders) -> Any:
        # Option accepts None if None is the default, so a missing default must be another value here.
        plain = Option(self.name, SCALARS[kind], default=..., help=self.tooltip, min=self.min, max=self.max)
        if kind == "BOOLEAN" and isinstance(value, str):
            value = _WRITTEN.get(value.casefold(), value)
        if kind in ("INT", "FLOAT") and isinstance(value, str) and "STRING" not in self.scalar_types:
            value = _number(value)
        checked = plain.check(value)
        if self.accept is not None:
            return self.accept(checked, folders)
        return self._choice(checked, folders) if kind == "COMBO" else checked

    def _choice(self, value: str, folders: Folders) -> str:
        choices = self.choices(folders)
        if value in choices:
            return value
        # Workflows from Windows have backslashes in subfolders.
        folded = {choice.casefold(): choice for choice in choices}
        found = folded.get(value.casefold()) or folded.get(value.casefold().replace("\\", "/"))
        if found is not None:
            return found
        if not choices:
            try:
                if self.file is not None:
                    self.file(folders, value)
            except LorasmithError as error:  # it names the folder
                raise OptionError(f"{self.name} has nothing to choose from: {error}") from error
            raise OptionError(f"{self.name} has nothing to choose from, got {value!r}; unlink it or leave it out")
        shown = ", ".join(choices[:_MAX_SHOWN]) + (", ..." if len(choices) > _MAX_SHOWN else "")
        # Choices that depend on the folders are files there, and their names.
        remedy = "; add it to the base folder, or name the folder that has it with --base-dir"
        raise OptionError(
            f"{self.name} must be one of {shown}, got {value!r}{nearest(value, choices)}"
            f"{remedy if callable(self.options) else ''}"
        )


def socket(type: str, **attributes: Any) -> Any:
    """An input of a node, as the default of the keyword that names it; `attributes` are those of `Input`."""
    return Input("", type, **attributes)


def types_match(received: str, wanted: str) -> bool:
    """Whether an output of type `received` fits an input of type `wanted`: they share a type, or one is `*`."""
    ours, theirs = set(_members(received)), set(_members(wanted))
    return bool(ours & theirs) or not {ANY, MATCH}.isdisjoint(ours | theirs)


def _number(text: str) -> int | float | str:
    """The number in a text; the text itself if it is not a number, or not one that could be an input."""
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text.strip()):
        return text
    return int(text) if _WHOLE.fullmatch(text.strip()) else float(text)


def _members(union: str) -> list[str]:
    return [member.strip() for member in union.split(",")]


_MAX_SHOWN, _LONGEST_NUMBER = 12, 40
_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WRITTEN = {"true": True, "false": False, "none": False}  # booleans that some editors write as text
