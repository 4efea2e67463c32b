"""Extensions: which things installed packages add to registries, and how files record those that a run used.

A package adds a thing by an entry point: the group is `lorasmith.` and a kind, the name is the thing's, the object is
the thing. Groups and names are read from the metadata of installed packages; no extension is imported here.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Annotated

from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.core.typed_json import typed

KINDS: Mapping[str, str] = {
    "adapters": "algorithm",
    "families": "model family",
    "inits": "init",
    "layouts": "LoRA layout",
    "encoders": "text encoder",
    "autoencoders": "autoencoder",
    "optimizers": "optimizer",
    "schedules": "learning-rate schedule",
    "losses": "loss function",
    "methods": "method",
    "weightings": "loss weighting",
    "timesteps": "timestep distribution",
    "samplers": "sampler",
    "sigma_schedules": "sigma schedule",
    "captioners": "captioner",
    "nodes": "node",
}
"""Kind of thing, as in the group of its entry points → noun for messages."""

HEADER_ENTRY = "lorasmith.extensions"
"""Entry of a LoRA's metadata with the extensions that its run used."""

_PREFIX = "lorasmith."
_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")  # names that pip takes, and nothing else


@dataclass(frozen=True, kw_only=True)
class Extension:
    """A thing that does not come with Lorasmith."""

    kind: Annotated[str, "group of its entry point without `lorasmith.`, such as `adapters`"]
    name: Annotated[str, "registered name"]
    package: Annotated[str, "distribution that brings it; empty for what a program registered itself"] = ""
    version: Annotated[str, "of that distribution"] = ""

    @property
    def source(self) -> str:
        """The distribution and its version, or the program."""
        return f"{self.package} {self.version}".strip() if self.package else "the running program (ls.register)"


def extension_at(point: EntryPoint) -> Extension:
    """The extension of an entry point."""
    assert point.dist is not None
    return Extension(
        kind=point.group.removeprefix(_PREFIX), name=point.name, package=point.dist.name, version=point.dist.version
    )


def entry_points() -> tuple[EntryPoint, ...]:
    """The entry points of all extensions, by package. Of packages of one name the first on the path counts."""
    with _SCANNING:  # the same objects for all threads
        return _scanned()


_SCANNING = threading.Lock()


@cache
def _scanned() -> tuple[EntryPoint, ...]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for distribution in distributions():
        try:
            if f"[{_PREFIX}" in (distribution.read_text("entry_points.txt") or ""):
                found.setdefault(distribution.name.casefold(), _points_of(distribution))
        except Exception as error:  # of any kind, by what is damaged
            warnings.warn(
                f"extensions of {getattr(distribution, '_path', distribution)} are left out, as its metadata cannot be "
                f"read ({type(error).__name__}: {error}); install that package again or remove the folder",
                stacklevel=2,
            )
    return tuple(point for _, points in sorted(found.items()) for point in points)


def _points_of(distribution: Distribution) -> tuple[EntryPoint, ...]:
    points = tuple(point for point in distribution.entry_points if point.group.startswith(_PREFIX))
    for point in points:
        _ = point.module  # raises if its text is no object's
    return points


def entry_points_of(kind: str) -> tuple[EntryPoint, ...]:
    """The entry points of a kind."""
    return tuple(point for point in entry_points() if point.group == f"{_PREFIX}{kind}")


def recorded_extensions(metadata: Mapping[str, str]) -> tuple[Extension, ...]:
    """The extensions that the run of a LoRA used, from its metadata; none if that entry is missing or damaged."""
    if HEADER_ENTRY not in metadata:
        return ()
    try:
        return typed(parse_foreign_json(metadata[HEADER_ENTRY]), tuple[Extension, ...])
    except ValueError:
        return ()


def as_json(extensions: Iterable[Extension]) -> list[dict[str, str]]:
    """Extensions as JSON values."""
    return [asdict(extension) for extension in extensions]


def remedy_for(needed: Sequence[Extension]) -> str:
    """`the algorithm IA3 of the package P 0.1, which is not installed; if you trust it, run: pip install P`.

    `needed` are extensions that are missing. A file of a stranger may name them.
    """
    first = needed[0]
    what = f"the {KINDS.get(first.kind, 'extension')} {first.name[:80]!r}"
    more = f" (and {len(needed) - 1} more)" if len(needed) > 1 else ""
    if not first.package:
        return f"{what}{more}, which the program that trained it registered; load it from that program"
    if not _PACKAGE.fullmatch(first.package):
        return f"{what}{more} of a package without a valid name; ask for its name"
    version = f" {first.version}" if re.fullmatch(r"[\w.+!-]{1,40}", first.version) else ""
    return (
        f"{what}{more} of the package {first.package}{version}, which is not installed; if you trust it, run: "
        f"pip install {first.package}"
    )
