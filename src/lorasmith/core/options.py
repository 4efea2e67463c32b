"""One declaration per option: type, default, range and one sentence of meaning.

Command-line flags, node inputs, the server's schema and the reference pages are derived from these declarations. An
option is a field of a frozen dataclass:

    @dataclass(frozen=True, kw_only=True)
    class TrainConfig:
        steps: int = option(500, min=1, max=100_000, help="Number of optimizer updates.")

        def __post_init__(self) -> None:
            check_options(self)

It may inherit options from other such classes; `SHARED` of a class has details that all options declared there share.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import NamedCode, is_import_path
from lorasmith.core.registry import Registry, nearest


@dataclass(frozen=True)
class Option:
    """The declaration of one setting."""

    name: str  # snake_case, the same in the library, CLI, nodes and server
    type: type  # `int`, `float`, `str` or `bool`
    default: Any  # None means "resolved at run time", and is then accepted as a value
    help: str  # one or two sentences, with the unit if there is one
    min: float | None = None  # inclusive, as is `max`
    max: float | None = None
    step: float | None = None  # granularity offered by editors; values between steps are accepted
    choices: Collection[str] = ()  # of a string, matched ignoring case; a registry's are its names at the time
    code: str = ""  # what may be passed in Python or named by its import path besides the choices, in words
    group: str = ""  # heading in the help
    changes_numbers: bool = True  # can affect computed numbers
    is_path: bool = False  # the text names a file or folder
    is_many: bool = False  # a tuple of any number of values, each of which is checked
    is_prompt: bool = False  # private runs show neither prompts nor paths
    is_main: bool = False  # pages and help show it before the others
    # "typed": refused in requests to a server, as it names files or starts programs; "graph": only graphs use it
    door: Literal["any", "typed", "graph"] = "any"
    of_model: bool = False  # concerns the frozen model and its passes, and is shared by runs over one model
    trains_alone: bool = False  # refused in runs that train together over one model
    of_fresh: bool = False  # has an effect only on layers without an adapter
    costs: bool = False  # affects the cost of a step
    short: str = ""  # abbreviation in names of runs

    def check(self, value: Any) -> Any:
        """`value` in the option's own type. Raises OptionError if type or range does not fit."""
        if value is None and self.default is None:
            return None
        if self.is_many:
            each = dataclasses.replace(self, is_many=False, default="")
            return tuple(map(each.check, value)) if isinstance(value, list | tuple) else (each.check(value),)
        if self.code and (callable(value) or isinstance(value, NamedCode)):
            return NamedCode.of(value) if callable(value) else value
        value = self._typed(value)
        if self.choices or self.code:
            folded = {choice.casefold(): choice for choice in self.choices}
            if value.casefold() not in folded:
                if self.code and is_import_path(value):
                    return value
                known = (
                    f"one of {', '.join(self.choices)}" if self.choices else "of an extension, and none is installed"
                )
                raise OptionError(f"{self.name} must be {known}, got {value!r}{nearest(value, self.choices)}")
            return folded[value.casefold()]
        if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
            raise OptionError(f"{self.name} must be {self.range_text()}, got {value!r}")
        return value

    def offers(self, value: str) -> bool:
        return value.casefold() in map(str.casefold, self.choices)

    def range_text(self) -> str:
        """The allowed range in words, such as `between 1 and 128`."""
        if self.min is not None and self.max is not None:
            return f"between {self.min} and {self.max}"
        return f"at least {self.min}" if self.min is not None else f"at most {self.max}"

    def _typed(self, value: Any) -> Any:
        wanted = self.type
        if isinstance(value, Real) and hasattr(value, "item"):  # a number of numpy
            value = value.item()
        if wanted is bool and isinstance(value, bool):
            return value
        if wanted is str and (isinstance(value, str) or (self.is_path and isinstance(value, os.PathLike))):
            return os.fspath(value)
        if wanted in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            # Integers are checked first: one of 400 digits does not fit a float.
            if wanted is int and (isinstance(value, int) or value.is_integer()):
                return int(value)
            if wanted is float and abs(value) <= sys.float_info.max:
                return float(value)
        if self.code:
            raise OptionError(
                f"{self.name} must be a name, an import path or, in Python, {self.code}, got "
                f"an object of class {type(value).__name__}"
            )
        article = "an" if wanted is int else "a"
        raise OptionError(f"{self.name} must be {article} {_TYPE_NAMES[wanted]}, got {value!r}")


def option(default: Any, *, help: str, **details: Any) -> Any:
    """A dataclass field that declares an `Option`; name, type and (of a `Literal`) choices are those of the field."""
    return dataclasses.field(default=default, metadata={"option": {"help": help, **details}})


def options_of(config: type) -> Mapping[str, Option]:
    """The options that a configuration dataclass declares, in order."""
    return _options_of(config)


@functools.cache
def _options_of(config: type) -> Mapping[str, Option]:
    hints = typing.get_type_hints(config)
    shared: dict[str, Mapping[str, Any]] = {}  # by option, of the class that declares it
    for declaring in reversed(config.__mro__):
        for name in inspect.get_annotations(declaring):
            shared.setdefault(name, vars(declaring).get("SHARED", {}))
    return types.MappingProxyType(
        {
            field.name: _declared(
                field.name, hints[field.name], field.default, {**shared[field.name], **field.metadata["option"]}
            )
            for field in dataclasses.fields(config)
            if "option" in field.metadata
        }
    )


def check_options(config: Any) -> None:
    """`__post_init__` of configuration dataclasses: checks and normalises every field. Raises OptionError."""
    for name, declared in options_of(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, str) and len(value) > _LONGEST:
            raise OptionError(f"{name} must have at most {_LONGEST:,} characters, got {len(value):,}")
        object.__setattr__(config, name, declared.check(value))


def config_from(config: type, values: Mapping[str, Any]) -> Any:
    """An instance of `config` from a mapping. Raises OptionError for unknown keys, with the nearest known name."""
    options = options_of(config)
    for key in values:
        if key not in options:
            raise OptionError(f"unknown option {key!r}{nearest(key, options)}; known are {', '.join(options)}")
    return config(**values)


def changed(config: Any) -> dict[str, Any]:
    """The options of a configuration that differ from their defaults."""
    values = {name: getattr(config, name) for name in options_of(type(config))}
    return {name: value for name, value in values.items() if value != options_of(type(config))[name].default}


def short_repr(config: Any, *first: str) -> str:
    """`__repr__` of configuration dataclasses: the texts in `first`, then what differs from the defaults."""
    facts = [*first, *(f"{name}={value!r}" for name, value in changed(config).items())]
    return f"{type(config).__name__}({', '.join(facts)})"


_LONGEST = 20_000
"""Maximum characters of a setting, few enough for every pattern and parser that reads it."""


def _declared(name: str, annotation: Any, default: Any, details: Mapping[str, Any]) -> Option:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):  # such as `int | None`
        annotation = next(arm for arm in typing.get_args(annotation) if arm is not type(None))
    if typing.get_origin(annotation) is tuple:
        details, annotation = {**details, "is_many": True}, typing.get_args(annotation)[0]
    if typing.get_origin(annotation) is typing.Literal:
        details = {**details, "choices": typing.get_args(annotation)}
        annotation = str
    choices = details.get("choices", ())
    choices = choices if isinstance(choices, Registry) else tuple(choices)
    return Option(name=name, type=annotation, default=default, **{**details, "choices": choices})


_TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false value"}
