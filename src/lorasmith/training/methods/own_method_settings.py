"""Settings of a method that an extension or a program brings."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lorasmith.core.named_code import Code
from lorasmith.core.options import option
from lorasmith.core.registry import Registry
from lorasmith.training.section import Consequences, Section


def _as_maker(name: str, thing: Any) -> Callable[..., Any]:
    """The class of a registered method."""
    base = pkgutil.resolve_name(f"{__package__}.method:Method")
    if not (isinstance(thing, type) and issubclass(thing, base)):
        raise TypeError(f"it must be a subclass of {base.__module__}.{base.__qualname__}")
    return thing


OWN_METHODS: Registry[Callable[..., Any]] = Registry("method", group="methods", checked=_as_maker)
"""Methods of extensions; none is built in."""


@dataclass(frozen=True, kw_only=True)
class OwnMethodSettings(Section, group="Methods", costs=True):
    """A method of an extension or of a program."""

    method: Code | None = option(
        None,
        choices=OWN_METHODS,
        code="a class of methods or a function that makes one",
        help="Further method of training, of an installed extension, or a class of your own by its import path, "
        "module:Class (docs/extending.md).",
    )
    method_args: str | None = option(
        None, help="Arguments of the method, separated by blanks, such as weight=0.5 text='a dog'."
    )

    def own_idle(self) -> Iterator[str]:
        if self.method is None:
            yield from self.has_no_effect("method_args", without="method")

    def own_consequences(self) -> Consequences:
        return Consequences(takes_further_passes="method" if self.method else "")
