"""Types of the arguments of the library's functions, checked against their annotations where they are called."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from lorasmith.core.errors import OptionError
from lorasmith.core.printable import described
from lorasmith.core.registry import nearest

P = ParamSpec("P")
R = TypeVar("R")


def typed_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an argument of another type than its annotation, or of an unknown name, is an OptionError."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        signature = inspect.signature(function)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            for name in kwargs.keys() - signature.parameters.keys():
                raise OptionError(
                    f"{function.__qualname__} has no argument {name!r}{nearest(name, signature.parameters)}; "
                    f"help(lorasmith.{function.__qualname__}) lists them"
                )
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # whose own error names it
        check_arguments(bound, typing.get_type_hints(function), function.__qualname__)
        return function(*args, **kwargs)

    return checked


def check_arguments(given: Mapping[str, object], hints: Mapping[str, Any], function: str) -> None:
    """Raise OptionError for a value that is not of its hint's type; names without a hint are not checked."""
    for name, value in given.items():
        if name in hints and not _is_of(value, hints[name]):
            words = " or ".join(dict.fromkeys(_words(hints[name])))
            raise OptionError(f"{name} must be {words}, got {described(value)}; help(lorasmith.{function}) explains it")


_NUMBERS = {int: numbers.Integral, float: numbers.Real}


def _is_of(value: object, hint: Any) -> bool:
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_of(value, arm) for arm in arms)
    if origin is Literal:
        return value in arms
    if origin is collections.abc.Callable:
        return callable(value)
    if origin is collections.abc.Sequence:
        return (
            isinstance(value, collections.abc.Sequence)
            and not isinstance(value, str | bytes)
            and all(_is_of(item, arms[0]) for item in value)
        )
    if origin is collections.abc.Mapping:
        return isinstance(value, Mapping) and all(
            _is_of(item, arm) for pair in value.items() for item, arm in zip(pair, arms, strict=True)
        )
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(arms) and all(map(_is_of, value, arms))
    if hint in _NUMBERS:
        return isinstance(value, _NUMBERS[hint]) and not isinstance(value, bool)
    found = origin or hint
    if hint is Any or not isinstance(found, type) or getattr(found, "_is_protocol", False):
        return True  # types that say nothing of a value
    return isinstance(value, found)


_WORDS: dict[Any, str] = {
    str: "a text",
    os.PathLike: "a path",
    int: "an integer",
    float: "a number",
    bool: "True or False",
    type(None): "None",
    collections.abc.Callable: "a function",
    collections.abc.Mapping: "a mapping",
}


def _words(hint: Any) -> list[str]:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return [word for arm in typing.get_args(hint) for word in _words(arm)]
    if origin is Literal:
        return [repr(arm) for arm in typing.get_args(hint)]
    if origin is collections.abc.Sequence:
        return [f"a list (each {' or '.join(dict.fromkeys(_words(typing.get_args(hint)[0])))})"]
    found = origin or hint
    name = getattr(found, "__name__", str(found))
    return [_WORDS.get(found) or f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"]
