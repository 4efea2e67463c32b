"""Registries of adapters, layouts, families, samplers and nodes by name, with suggestions for misspelt names."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar

from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.extensions import KINDS, Extension, entry_points_of, extension_at

T = TypeVar("T")

_OWN = "lorasmith"
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
    """Things of one kind by name, ignoring case; aliases resolve to the registered name.

    Things of extensions (`core.extensions`) follow the built-in ones. Their names are known from the metadata of
    installed packages; a package is imported when its thing is asked for.

    Args:
        kind: singular noun for error messages.
        error: exception raised for unknown names, and for things that cannot be used.
        group: kind of extensions that add to it, one of `KINDS`; empty if none may.
        names: names of the built-in things, if `home` is imported for things alone; else for names as well.
        home: module whose import registers the built-in things.
        checked: returns the thing for an extension's object of a name; raises TypeError if it is none.
    """

    def __init__(
        self,
        kind: str,
        error: type[LorasmithError] = OptionError,
        *,
        group: str = "",
        names: Iterable[str] = (),
        home: str = "",
        checked: Callable[[str, Any], T] | None = None,
    ) -> None:
        assert not group or group in KINDS, group
        self.kind = kind
        self.group = group
        self._error = error
        self._home = home
        self._checked = checked
        self._names = tuple(names)
        self._things: dict[str, T] = {}
        self._canonical = {name.casefold(): name for name in self._names}
        self._before: dict[str, tuple[str, ...]] = {}
        self._points: dict[str, EntryPoint] = {}  # of extensions, by name
        self._modules: dict[str, str] = {}  # that registered an extension in this process, by name
        self._faults: dict[str, str] = {}  # why an extension cannot be used
        self._is_complete = not group  # the names of extensions are known
        self._loading: set[tuple[int, str]] = set()  # threads that import extensions, with their names
        self._usable: Mapping[str, T] = {}
        self._changing = threading.RLock()  # never held while something is imported, which has a lock of its own
        if group:
            REGISTRIES[group] = self

    def register(
        self, name: str, *aliases: str, before: Sequence[str] = (), module: str | None = None
    ) -> Callable[[T], T]:
        """Decorator that registers a thing under `name` and every alias.

        Each name can be registered once; a module that registers an extension again, as a cell of a notebook does when
        it is run again, replaces it.

        `before` are names of things that this one precedes where order counts, besides those of its attribute `before`.
        `module` is the name of the registering module, by default the thing's.
        """

        def add(thing: T) -> T:
            origin = getattr(thing, "__module__", type(thing).__module__) if module is None else module
            is_own = _package_of(origin) == _OWN
            if not is_own:
                self._complete()
            for key in (name, *aliases):
                self._refuse_twice(key, origin)
            if is_own:
                self._add(name, thing, aliases)
                return thing
            try:
                self._add(name, self._accepted(name, thing), aliases, before)
            except TypeError as error:
                message = f"{self.kind} {name!r} cannot be registered: {error}; see docs/extending.md"
                raise self._error(message) from error
            if name not in self._points:
                self._modules[name] = origin
            return thing

        return add

    def canonical(self, name: str) -> str:
        """The registered spelling of `name` (any case, or an alias). Raises the registry's error if unknown."""
        if not self._is_complete:
            self._complete()
        try:
            return self._canonical[name.casefold()]
        except KeyError:
            names = list(self)
            raise self._error(
                f"unknown {self.kind} {name!r}{nearest(name, names)}; known are {', '.join(names)}"
            ) from None

    def extension(self, name: str) -> Extension | None:
        """Who brings the thing of a registered name, if it is an extension's; None for a built-in thing."""
        name = self.canonical(name)
        if name in self._points:
            return extension_at(self._points[name])
        return Extension(kind=self.group, name=name) if name in self._modules else None

    def preceded(self, name: str) -> tuple[str, ...]:
        """Names of the things that a registered one precedes on purpose."""
        return self._before[name]

    def imported(self, name: str) -> bool:
        """Whether looking up a registered name imports nothing."""
        return self.canonical(name) in self._things

    def fault_of(self, point: EntryPoint) -> str:
        """Why the thing of an entry point cannot be used, in a sentence; empty if it can. Imports it."""
        name = self.canonical(point.name)
        if self._points.get(name) is not point:
            return self._twice(name, extension_at(point).source)
        try:
            self[name]
        except LorasmithError as error:
            return str(error)
        return ""

    def __getitem__(self, name: str) -> T:
        name = self.canonical(name)
        if name not in self._things:
            self._load(name)
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        self._complete()
        return isinstance(name, str) and name.casefold() in self._canonical

    def __iter__(self) -> Iterator[str]:
        self._complete()
        return iter(dict.fromkeys((*self._names, *self._things, *self._points)))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def items(self) -> Iterable[tuple[str, T]]:
        """Registered names and things, in order, without extensions that cannot be used."""
        return self.usable().items()

    def usable(self) -> Mapping[str, T]:
        """Things by registered name, in order, without extensions that cannot be used; all others are imported."""
        if self._usable:
            return self._usable
        self._complete()
        if any(name not in self._things for name in self._names):
            import_module(self._home)
        for name in [*self._points]:
            if name not in self._things and name not in self._faults and self._import_of(name) not in self._loading:
                with contextlib.suppress(LorasmithError):
                    self._load(name)
        with self._changing:
            self._usable = self._ordered()
            return self._usable

    def _complete(self) -> None:
        """Learn the names of built-in things and of extensions."""
        if self._is_complete:
            return
        if self._home and not self._names:
            import_module(self._home)
        with self._changing:
            for point in entry_points_of(self.group):
                self._announce(point)
            self._is_complete = True

    def _announce(self, point: EntryPoint) -> None:
        """Take the name of an entry point, unless another thing has it."""
        other = self._canonical.setdefault(point.name.casefold(), point.name)
        if self._points.get(other) is point:
            return
        if other in self._points:
            self._faults[other] = self._twice(other, extension_at(point).source)
        elif (other not in self._things and other not in self._names) or self._registered_by(other, point):
            self._points[other] = point

    def _registered_by(self, name: str, point: EntryPoint) -> bool:
        """Whether the package of an entry point registered a name itself."""
        return _package_of(self._modules.get(name, "")) == _package_of(point.module)

    def _refuse_twice(self, key: str, module: str) -> None:
        """Raise OptionError if another thing has a name already."""
        taken = self._canonical.get(key.casefold())
        if taken is None or (taken in self._names and taken not in self._things and _package_of(module) == _OWN):
            return
        if self.group and key == taken and self._modules.get(taken) == module:  # a notebook's cell that is run again
            return
        point = self._points.get(taken)
        if point is not None and taken not in self._things and _package_of(module) in (_OWN, _package_of(point.module)):
            if _package_of(module) == _OWN:  # known before the built-in thing, which has the name
                del self._points[taken]
            return
        raise OptionError(self._twice(key, f"the module {module}"))

    def _twice(self, name: str, other: str) -> str:
        taken = self._canonical[name.casefold()]
        first = f"the module {self._modules[taken]}" if taken in self._modules else _OWN
        if taken in self._points:
            first = extension_at(self._points[taken]).source
        return f"{self.kind} {name!r} is registered twice, by {first} and by {other}; uninstall or rename one of them"

    def _load(self, name: str) -> None:
        """Import the thing of a name. Raises the registry's error if it is an extension that cannot be used."""
        if (point := self._points.get(name)) is None:
            import_module(self._home)
            return
        mine = self._import_of(name)
        if name not in self._faults and mine not in self._loading:
            self._loading.add(mine)
            try:
                thing = point.load()
                if name not in self._things:  # else its module registered it
                    thing = self._accepted(name, thing)
                with self._changing:
                    if name not in self._things:  # else another thread was first
                        self._add(name, thing)
                return
            except (Exception, SystemExit) as error:  # other people's code, which may raise anything
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._faults[name] = (
                    f"the {self.kind} {name!r} of {extension_at(point).source} cannot be used ({reason}); update or "
                    "uninstall that package"
                )
            finally:
                self._loading.discard(mine)
        raise self._error(self._faults.get(name, f"the {self.kind} {name!r} is asked for by its own import"))

    def _import_of(self, name: str) -> tuple[int, str]:
        return threading.get_ident(), name

    def _accepted(self, name: str, thing: Any) -> T:
        if self._checked is not None:
            return self._checked(name, thing)
        if self.group and not callable(thing):
            raise TypeError("it must be a function")
        found: T = thing
        return found

    def _add(self, name: str, thing: T, aliases: Iterable[str] = (), before: Iterable[str] = ()) -> None:
        preceded = tuple(map(self.canonical, (*before, *getattr(thing, "before", ()))))
        with self._changing:
            self._things[name] = thing
            self._before[name] = preceded
            self._usable = {}
            self._canonical |= {key.casefold(): name for key in (name, *aliases)}

    def _ordered(self) -> Mapping[str, T]:
        names = [name for name in dict.fromkeys((*self._names, *self._things)) if name in self._things]
        for name, preceded in self._before.items():
            if later := [other for other in preceded if other in names]:
                names.remove(name)
                names.insert(min(map(names.index, later)), name)
        return {name: self._things[name] for name in names}


def extensions_of(used: Iterable[tuple[Registry[Any], object]]) -> Iterator[Extension]:
    """The extensions among things by registry and name; names that are not registered are passed over."""
    for registry, name in used:
        if isinstance(name, str) and name in registry and (extension := registry.extension(name)) is not None:
            yield extension


def missing(extensions: Iterable[Extension]) -> list[Extension]:
    """Those of a file's extensions that this process does not have."""
    return [extension for extension in extensions if not _is_here(extension)]


def _is_here(extension: Extension) -> bool:
    registry, name = REGISTRIES.get(extension.kind), extension.name.casefold()
    if registry is not None and name in registry:
        return True
    return any(point.name.casefold() == name for point in entry_points_of(extension.kind))


def instance_of(kind: type, attribute: str = "name") -> Callable[[str, Any], Any]:
    """The rule of a registry that its things are of a type, and have their name as an attribute; a class is called."""

    def checked(name: str, thing: Any) -> Any:
        found = thing() if isinstance(thing, type) and issubclass(thing, kind) else thing
        if not isinstance(found, kind) or getattr(found, attribute) != name:
            raise TypeError(f"it must be a {kind.__module__}.{kind.__qualname__} whose {attribute} is {name!r}")
        return found

    return checked


def _package_of(module: str) -> str:
    return module.partition(".")[0]


REGISTRIES: dict[str, Registry[Any]] = {}
"""The registries that extensions may add to, by kind, of the modules that are imported."""
