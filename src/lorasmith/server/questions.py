"""Registration of questions, whose answers may be types of the API, and calls by name with arguments from JSON."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from lorasmith import server
from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.core.typed_json import json_values, typed
from lorasmith.server.job_reporter import finite

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")

QUESTIONS: Registry[Callable[..., Any]] = Registry("question")
"""The functions by name. Each takes `Folders`, then keyword arguments of the types of `core.typed_json`, and returns a
type of the API, a JSON value or bytes. Its LorasmithErrors reach the server, with their `findings` or `details`.
"""


def question(function: _F) -> _F:
    """Decorator: registers a function as the question of its name."""
    QUESTIONS.register(function.__name__)(function)
    return function


def shaped(kind: type[_T], source: object, **more: Any) -> _T:
    """A dataclass with the attributes of `source` that have the names of its fields, and `more`."""
    names = [field.name for field in fields(cast(Any, kind))]
    return kind(**{**{name: getattr(source, name) for name in names if hasattr(source, name)}, **more})


def load_questions() -> Registry[Callable[..., Any]]:
    """Import every module `..._answers` of the server, which registers all questions."""
    for module in pkgutil.walk_packages(server.__path__, f"{server.__name__}."):
        if module.name.endswith("_answers"):
            importlib.import_module(module.name)
    return QUESTIONS


def answer(name: str, arguments: Mapping[str, Any], folders: Folders) -> Any:
    """The answer to a question: JSON values with finite numbers, or bytes. Raises OptionError for a bad argument, and
    as the function.
    """
    function = QUESTIONS[name]
    hints = typing.get_type_hints(function)
    _, *parameters = inspect.signature(function).parameters.values()
    known = {parameter.name: parameter for parameter in parameters}
    if unknown := next((argument for argument in arguments if argument not in known), None):
        raise OptionError(f"{name} takes {', '.join(known) or 'no arguments'}, got {unknown!r}; leave it out")
    missing = (
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.name not in arguments
    )
    if (lacking := next(missing, None)) is not None:
        raise OptionError(f"{name} needs {lacking}; give it")
    try:
        typed_arguments = {key: typed(value, hints.get(key, Any), key) for key, value in arguments.items()}
    except ValueError as error:
        raise OptionError(f"{error}; correct it") from error
    found = function(folders, **typed_arguments)
    return found if isinstance(found, bytes) else finite(json_values(found, _plain))


def _plain(value: Any) -> str:
    """A text of a subclass, such as a `Reason`, which msgspec does not encode, as a plain one."""
    if isinstance(value, str):
        return str(value)
    raise TypeError(f"an answer must be made of JSON values, got {type(value).__name__}")
