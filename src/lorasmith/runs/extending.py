"""Registering things of one's own, and the list of what installed packages add."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar, overload

from lorasmith.core.arguments import typed_arguments
from lorasmith.core.errors import OptionError
from lorasmith.core.extensions import KINDS, Extension, entry_points, extension_at
from lorasmith.core.registry import REGISTRIES, Registry, nearest

T = TypeVar("T")

_MODULES = {
    "adapters": "adapters.catalogue",
    "inits": "adapters.catalogue",
    "families": "families.base",
    "layouts": "formats.layouts.layout",
    "encoders": "families.parts.encoders",
    "autoencoders": "families.parts.autoencoders",
    "optimizers": "training.optim.update_rules",
    "schedules": "training.optim.update_rules",
    "losses": "diffusion.loss_functions",
    "methods": "training.methods.own_method_settings",
    "weightings": "core.choices",
    "timesteps": "core.choices",
    "samplers": "sampling.samplers",
    "sigma_schedules": "sampling.samplers",
    "captioners": "data.captioners",
    "nodes": "workflow.node",
}
"""Where the registry of each kind is made, with which its built-in things are found."""


@overload
def register(kind: str, name: str, *, before: str | Sequence[str] = ()) -> Callable[[T], T]: ...
@overload
def register(kind: str, name: str, thing: T, *, before: str | Sequence[str] = ()) -> T: ...
@typed_arguments
def register(kind: str, name: str, thing: T | None = None, *, before: str | Sequence[str] = ()) -> T | Callable[[T], T]:
    """Add an algorithm, a family, an optimizer or another thing to those of this process.

    Packages add things by entry points instead, which every process finds, workers and servers included: the group is
    `lorasmith.` and the kind, the name is the thing's, the object is the thing. docs/extending.md has the contracts.

    Args:
        kind: `adapters`, `inits`, `families`, `layouts`, `encoders`, `autoencoders`, `optimizers`, `schedules`,
            `losses`, `methods`, `weightings`, `timesteps`, `samplers`, `sigma_schedules`, `captioners` or `nodes`.
        name: by which settings, files and commands name the thing; case is ignored.
        thing: what the kind asks for. Without one, the result is a decorator.
        before: names of things of the kind that this one precedes, where order counts: a family is asked before these
            whether a file is its own.

    Returns:
        The thing, unchanged, or the decorator.

    Raises:
        OptionError: the kind is unknown, the name is empty, or another thing has the name.
        LorasmithError: the thing does not fulfil the contract of its kind.
    """
    module = str(sys._getframe(2).f_globals.get("__name__", ""))
    if not name.strip():
        raise OptionError(f"a thing of the kind {kind} must have a name, got none; choose one")
    names = (before,) if isinstance(before, str) else tuple(before)
    add = registry_of(kind).register(name, before=names, module=module)
    return add if thing is None else add(thing)


def registry_of(kind: str) -> Registry[Any]:
    """The registry of a kind of extensions. Raises OptionError for unknown kinds."""
    if kind not in KINDS:
        raise OptionError(f"unknown kind of extension {kind!r}{nearest(kind, KINDS)}; use one of {', '.join(KINDS)}")
    import_module(f"lorasmith.{_MODULES[kind]}")
    return REGISTRIES[kind]


@dataclass(frozen=True, kw_only=True)
class InstalledExtension(Extension):
    """A thing that an installed package brings."""

    fault: str = ""  # why it cannot be used, in a sentence; empty if it can


def installed_extensions() -> list[InstalledExtension]:
    """The things that installed packages bring; each is imported."""
    found = []
    for point in entry_points():
        extension = extension_at(point)
        try:
            fault = registry_of(extension.kind).fault_of(point)
        except OptionError as error:
            fault = str(error)
        found.append(InstalledExtension(**vars(extension), fault=fault))
    return found
