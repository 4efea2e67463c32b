"""Tokens with names and roles: who may read, train or administer, in a file of digests.

A token is random, so its digest tells nothing of it. The file is read again when it changes: a token that is removed is
refused from then on, and so are its cookies. Once there was a file, a server without a readable one refuses everybody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from lorasmith.core.errors import OptionError
from lorasmith.core.files import Stamp, ensure_folder, read_regular, stamp_of, write_atomic
from lorasmith.core.registry import nearest

Role: TypeAlias = Literal["read", "train", "administer"]
ROLES: tuple[Role, ...] = get_args(Role)  # each may do what those before it may

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""Name of the token of the request that is answered; empty without one."""

_MOST_BYTES = 2**20
_LONGEST_NAME = 60


@dataclass(frozen=True)
class NamedToken:
    """A token without itself; `sha256` is its digest in hexadecimal."""

    name: str
    role: Role
    sha256: str
    created: float = 0.0

    @property
    def cookie(self) -> str:
        """What a browser keeps in its place."""
        return hmac.new(self.sha256.encode(), b"lorasmith session", hashlib.sha256).hexdigest()

    def is_shown(self, token: str) -> bool:
        """Whether a text is this token; in constant time."""
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).hexdigest()
        return hmac.compare_digest(digest, self.sha256)


class TokenFile:
    """The tokens in a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: Stamp | None = None
        self._tokens: tuple[NamedToken, ...] = ()
        self.is_used = path.is_file()  # stays True, so that a lost file opens nothing

    def tokens(self) -> tuple[NamedToken, ...]:
        """Those that are valid now; none if the file cannot be read."""
        stamp = stamp_of(self._path)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._tokens = read_tokens(self._path)
            except OptionError:
                self._tokens = ()
            self.is_used = self.is_used or self._path.is_file()
        return self._tokens


def read_tokens(path: Path) -> tuple[NamedToken, ...]:
    """The tokens of a file, none if it is missing. Raises OptionError if it is malformed."""
    try:
        entries = json.loads(read_regular(path, at_most=_MOST_BYTES))["tokens"]
        found = tuple(NamedToken(**entry) for entry in entries)
        if not all(token.role in ROLES and len(bytes.fromhex(token.sha256)) == 32 and token.name for token in found):
            raise ValueError("a token without name, role or digest")
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OptionError(f"{path} cannot be read as tokens ({error}); restore it, or remove it") from error
    return found


def new_token(path: Path, name: str, role: str) -> str:
    """Add a token to a file, and return it; it is nowhere else. Raises OptionError."""
    if not name or len(name) > _LONGEST_NAME or not name.isprintable():
        raise OptionError(f"a token's name must have 1 to {_LONGEST_NAME} printable characters, got {name[:80]!r}")
    if role not in ROLES:
        raise OptionError(f"a token's role must be of {', '.join(ROLES)}, got {role[:40]!r}{nearest(role, ROLES)}")
    known = read_tokens(path)
    if any(token.name == name for token in known):
        raise OptionError(f"there is a token with the name {name}; remove it first, or choose another name")
    token = secrets.token_urlsafe(32)
    _write(path, (*known, NamedToken(name, role, hashlib.sha256(token.encode()).hexdigest(), time.time())))
    return token


def remove_token(path: Path, name: str) -> None:
    """Remove a token from a file; the file stays, so that nobody else gets in. Raises OptionError."""
    known = read_tokens(path)
    left = tuple(token for token in known if token.name != name)
    if len(left) == len(known):
        raise OptionError(f"there is no token with the name {name[:80]!r}; see {path}")
    _write(path, left)


def _write(path: Path, tokens: tuple[NamedToken, ...]) -> None:
    ensure_folder(path.parent)
    write_atomic(path, json.dumps({"tokens": [asdict(token) for token in tokens]}, indent=2) + "\n")
    path.chmod(0o600)
