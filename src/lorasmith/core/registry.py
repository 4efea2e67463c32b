"""Registries of adapters, layouts, families, samplers and nodes by name, with suggestions for misspelt names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from lorasmith.core.errors import LorasmithError, OptionError

T = TypeVar("T")

_MOST_COMPARED, _LONGEST = 1000, 200


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string if none is close.

    Only the first thousand names of usual length are compared, as a file's may be many or long.
    """
    if len(name) > _LONGEST:
        return ""
    candidates = itertools.islice(known, _MOST_COMPARED)
    folded = {candidate.casefold(): candidate for candidate in candidates if len(candidate) <= _LONGEST}
    match = difflib.get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[match[0]]!r}?)" if match else ""


class Registry(Generic[T]):
    """Objects of one kind by name, ignoring case; aliases resolve to the registered name.

    Args:
        kind: singular noun for error messages.
        error: exception raised for unknown names.
    """

    def __init__(self, kind: str, error: type[LorasmithError] = OptionError) -> None:
        self.kind = kind
        self._error = error
        self._things: dict[str, T] = {}
        self._canonical: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[T], T]:
        """Decorator that registers an object under `name` and every alias. Each name can be registered once."""

        def add(thing: T) -> T:
            for key in (name, *aliases):
                if key.casefold() in self._canonical:
                    raise ValueError(f"{self.kind} {key!r} is registered twice")
                self._canonical[key.casefold()] = name
            self._things[name] = thing
            return thing

        return add

    def canonical(self, name: str) -> str:
        """The registered spelling of `name` (any case, or an alias). Raises the registry's error if unknown."""
        try:
            return self._canonical[name.casefold()]
        except KeyError:
            raise self._error(
                f"unknown {self.kind} {name!r}{nearest(name, self._things)}; known are {', '.join(self._things)}"
            ) from None

    def __getitem__(self, name: str) -> T:
        return self._things[self.canonical(name)]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.casefold() in self._canonical

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def items(self) -> Iterable[tuple[str, T]]:
        """Registered names and objects, in order of registration."""
        return self._things.items()
