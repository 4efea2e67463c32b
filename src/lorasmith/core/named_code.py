"""Functions and classes of users in settings: passed in Python, or named by an import path that the user types.

A setting is text everywhere: in files, records, fingerprints and on the command line. What Python code passes becomes
a `NamedCode`, its name as text, which carries the object. An import path is `module:name` or `module.name`; importing
runs code, so that one in a file counts only if the user types it too (`training.config.names_alone`).
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorasmith.core.errors import OptionError
from lorasmith.core.printable import one_line_of
from lorasmith.core.registry import Registry, nearest

T = TypeVar("T")
Code = str | Callable[..., Any]
"""What a setting of this kind takes; it holds the text."""

# In linear time, whatever the text: it has a dot or a colon, and at most one colon.
_PATH = re.compile(r"(?=\w+[.:])[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*)?")


class NamedCode(str):
    """The name of a function or class, such as `my_package.losses:huber`, with the object itself."""

    code: Any

    @classmethod
    def of(cls, code: Callable[..., Any]) -> NamedCode:
        name = cls(_name_of(code))
        name.code = code
        return name

    def __deepcopy__(self, memo: object) -> NamedCode:
        return self


def is_import_path(name: str) -> bool:
    """Whether a text is `module:name` or `module.name`."""
    return _PATH.fullmatch(name) is not None


def package_of(path: str) -> str:
    """The outermost package of an import path, or of a `NamedCode`."""
    return re.split("[.:]", path, maxsplit=1)[0]


def code_of(name: Code, known: Registry[T]) -> T | Any:
    """What a setting names: the object that Python passed, a registered one, or the one imported from its path.

    Raises OptionError for unknown names, and for paths that cannot be imported.
    """
    if isinstance(name, NamedCode):
        return name.code
    if not isinstance(name, str):
        return name
    return _imported(name, known.kind) if is_import_path(name) and name not in known else known[name]


_SEPARATORS = ", \t\r\n"
_PAIR = re.compile(r"(?:^|(?<=[\s,]))([A-Za-z_]\w*)\s*=")  # in linear time, whatever the text


def parsed_arguments(
    text: str, code: Callable[..., Any], name: str, *, setting: str, ours: Mapping[str, str]
) -> dict[str, Any]:
    """`betas=(0.9, 0.99) eps=1e-7` as a mapping; values are Python literals, separators spaces or commas.

    `setting` has the text, `name` is that of the code; arguments in `ours` belong to the settings that it maps them to.
    Raises OptionError for other text, and for arguments that the code lacks.
    """
    before, *pairs = _PAIR.split(text)
    if before := before.strip(_SEPARATORS):
        raise OptionError(
            f"{setting} must be name=value, separated by blanks, such as betas=(0.9,0.99) eps=1e-7, got {before!r}"
        )
    known = inspect.signature(code).parameters.keys() - ours.keys()
    values: dict[str, Any] = {}
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if key in ours:
            raise OptionError(f"{setting} must not have {key}, which is for the setting {ours[key]}; use that")
        if key not in known:
            listed = f"has {', '.join(sorted(known))}" if known else "has none"
            raise OptionError(f"{name} has no argument {key!r}{nearest(key, known)}; it {listed}")
        if key in values:
            raise OptionError(f"{setting} must have each argument once, got {key} twice; leave one out")
        try:
            values[key] = ast.literal_eval(value.strip(_SEPARATORS))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise OptionError(
                f"{key} of {setting} must be a number, True, False, None, a text in quotes or a tuple of those, "
                f"got {value.strip()!r}"
            ) from None
    return values


def _imported(path: str, kind: str) -> Any:
    """The object at an import path; `kind` is for messages."""
    where, _, what = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        found = module = importlib.import_module(where)
    except Exception as error:  # a module may raise any kind
        raise OptionError(
            f"{kind} must be a known name or the import path of something installed, got {path!r}: "
            f"{one_line_of(error)}; install {package_of(path)}, or add its folder to PYTHONPATH"
        ) from error
    try:
        for part in what.split("."):
            found = getattr(found, part)
    except AttributeError:
        others = (name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise OptionError(f"{where} has no {kind} {what!r}{nearest(what, others)}; correct the name") from None
    return found


def _name_of(code: Any) -> str:
    if isinstance(code, functools.partial):
        arguments = [*map(_shown, code.args), *(f"{name}={_shown(value)}" for name, value in code.keywords.items())]
        return f"{_name_of(code.func)}({', '.join(arguments)})"
    if not hasattr(code, "__qualname__"):  # an object that is called
        return f"{_name_of(type(code))}()"
    return f"{getattr(code, '__module__', '')}:{code.__qualname__}"  # methods of built-in classes have no module


def _shown(value: Any) -> str:
    """An argument as text that is the same in every process."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_shown, value))})"
    if callable(value):
        return _name_of(value)
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
