"""Object stores and the web, through fsspec, which is imported when an address is used.

Names in a store are a stranger's: `checked_name` keeps them inside of a folder. Each store has its own errors, so
whatever it raises becomes one `LorasmithError` with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from lorasmith.core.errors import LorasmithError, OptionError, OutputError
from lorasmith.core.printable import printable

WEB = ("https", "http")
STORES = ("s3", "gs", "az")
"""Schemes of URLs; each of the stores is an extra of Lorasmith of the same name."""

_LONGEST_NAME = 1_000  # bytes


class UnreachableError(OutputError):
    """A store cannot be used now: another time it may."""


def is_url(path: str) -> bool:
    """Whether a path is the address of a store, such as s3://bucket/fox."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def checked_prefix(url: str) -> str:
    """An address below which others may name files, or runs are mirrored. Raises OptionError."""
    if not is_url(url) or not url.endswith("/") or not urlsplit(url).netloc:
        raise OptionError(f"an address for files must have a host or bucket and end in /, got {url!r}; correct it")
    return url


def open_store(
    url: str, error: type[LorasmithError], *, schemes: Collection[str] = (*STORES, *WEB), what: str = "pictures are"
) -> tuple[Any, str]:
    """The file system of a URL, with credentials as they are now, and the path in it. Nothing listed is remembered.

    Raises `error` for a scheme that is none of `schemes`, or whose package is missing.
    """
    scheme = url.partition("://")[0]
    if scheme not in schemes or "::" in url:
        known = ", ".join(f"{name}://" for name in schemes)
        raise error(f"{what} at {known}, got {printable(url, limit=200)}; use one of these, or a folder")
    import fsspec.core  # half a second

    try:
        with reached(url, error):
            store, path = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
            return store, str(path)
    except ImportError as missing:
        raise error(f'{scheme}:// needs a package; run pip install "lorasmith[{scheme}]"') from missing


@contextmanager
def reached(url: str, error: type[LorasmithError]) -> Iterator[None]:
    """Inside the context, whatever a store raises becomes one `error` that says why."""
    try:
        yield
    except (LorasmithError, ImportError):
        raise
    except Exception as reason:  # of any kind: each store has its own
        why = printable(str(reason).strip() or type(reason).__name__, limit=200)
        raise error(
            f"{url} cannot be used ({why}); check the address, its network, and this machine's credentials for it"
        ) from reason


def checked_name(name: str, source: str, error: type[LorasmithError]) -> str:
    """A relative name with /, which stays in its folder on every system. Raises `error`."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in parts) or len(name.encode()) > _LONGEST_NAME:
        raise error(f"{source} has a file {printable(name, limit=100)!r}, which is no name here; rename it")
    return name
