"""Questions whose answers are types of the API, sent as JSON values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from lorasmith.server.event_json import finite
from lorasmith.server.questions.question_registry import QUESTIONS

_F = TypeVar("_F", bound=Callable[..., Any])


def shaped(function: _F) -> _F:
    """Decorator: registers a function as a question, its result converted by `plain`."""

    @functools.wraps(function)
    def asked(*args: Any, **kwargs: Any) -> Any:
        return plain(function(*args, **kwargs))

    QUESTIONS.register(function.__name__)(asked)
    return function


def plain(value: Any) -> Any:
    """A type of the API as JSON values with finite numbers; bytes are unchanged."""
    if isinstance(value, bytes):
        return value
    return finite(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value)
