"""Registration of questions, and calls by name with arguments from JSON."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry
from lorasmith.core.typed_json import typed

_F = TypeVar("_F", bound=Callable[..., Any])

QUESTIONS: Registry[Callable[..., Any]] = Registry("question")
"""The functions by name. Each takes `Folders`, then keyword arguments of the types of `core.typed_json`, and returns a
JSON value or bytes. A LorasmithError that it raises reaches the asker; its `findings` or `details` do, too."""


def question(function: _F) -> _F:
    """Decorator: registers a function as the question of its name."""
    QUESTIONS.register(function.__name__)(function)
    return function


def load_questions() -> Registry[Callable[..., Any]]:
    """Register all questions: every module beside this one is imported."""
    import lorasmith.server.questions as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "answering":
            importlib.import_module(f"{package.__name__}.{module.name}")
    return QUESTIONS


def answer(name: str, arguments: Mapping[str, Any], folders: Folders) -> Any:
    """The answer to a question.

    Args:
        name: of the question.
        arguments: JSON values by name.
        folders: passed to the function.

    Raises:
        OptionError: an argument is unknown, missing or of another type.
        LorasmithError: there is no such question, or as the function.
    """
    function = QUESTIONS[name]
    hints = typing.get_type_hints(function)
    _, *parameters = inspect.signature(function).parameters.values()
    known = {one.name: one for one in parameters}
    if unknown := next((one for one in arguments if one not in known), None):
        raise OptionError(f"{name} takes {', '.join(known) or 'no arguments'}, got {unknown!r}; leave it out")
    missing = (one.name for one in parameters if one.default is one.empty and one.name not in arguments)
    if (lacking := next(missing, None)) is not None:
        raise OptionError(f"{name} needs {lacking}; give it")
    try:
        given = {key: typed(value, hints.get(key, Any), key) for key, value in arguments.items()}
    except ValueError as error:
        raise OptionError(f"{error}; correct it") from error
    return function(folders, **given)
