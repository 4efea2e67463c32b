"""Access control: host names, origins, the token, and the security headers of every response.

A page of another site can send requests to a server on this machine, and a foreign name can be made to resolve to it
(DNS rebinding). So `Host` must name this server, and a request from a page must come from a page of this server
(`Origin`, `Sec-Fetch-Site`), unless it navigates to one. Clients other than browsers send neither header and need none.
Without a token only this machine reaches the server; with one, or with tokens that have names and roles
(`server/tokens.py`), every request carries it: as a bearer token, as the
password of basic authentication, in a cookie, or once in the address (`?token=`), which is exchanged for the cookie.
The cookie holds a digest, so that the token stays out of the browser's storage.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from lorasmith.core.errors import OptionError
from lorasmith.server.endpoint import PREFIX
from lorasmith.server.request_handling import ServerContext, error_response, in_time
from lorasmith.server.server_config import ServerConfig
from lorasmith.server.tokens import CALLER, ROLES, NamedToken, Role, TokenFile, read_tokens
from lorasmith.server.watching import HEALTH

CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
"""Default `Content-Security-Policy`: no scripts, and nothing is loaded."""

LEAST_TOKEN = 12  # characters
WRONG_TOKEN_DELAY_S = 1.0  # seconds until a wrong token is refused; the connection is closed then

_MOST_LOGIN_BYTES = 10_000


@dataclass(frozen=True)
class Access:
    """Who may send requests to a server."""

    token: str | None = None  # None: no token is required
    listen: str = "127.0.0.1"  # address that the server listens on
    names: frozenset[str] = frozenset()  # further host names, such as that of a proxy
    file: TokenFile | None = None  # of tokens with names

    def knows_host(self, header: str | None) -> bool:
        """Whether a `Host` header names this server. Its port may differ, as forwarded ports do."""
        name = _host_name(header)
        if name is None:
            return False
        if name in _LOOPBACK or name == self.listen.casefold() or name in self.names:
            return True
        if is_loopback(self.listen):
            return False
        return _is_address(name) or name in _machine_names()  # an address cannot be rebound, a name can

    @property
    def needs_token(self) -> bool:
        return self.token is not None or (self.file is not None and self.file.is_used)

    def caller(self, request: web.Request) -> Caller | None:
        """Who sends a request: by its token, or anybody if none is required; None for a wrong token or none."""
        named = self.file.tokens() if self.file is not None else ()
        if not self.needs_token:
            return Caller()
        for text in (request.query.get("token"), _from_header(request.headers.get("Authorization", ""))):
            if text is not None and (found := self.of_token(text)) is not None:
                return found
        cookie = request.cookies.get(_COOKIE, "")
        if self.token is not None and _same(cookie, self.cookie):
            return Caller(cookie=self.cookie)
        return next((_caller(token) for token in named if _same(cookie, token.cookie)), None)

    def of_token(self, text: str) -> Caller | None:
        """Whose token a text is."""
        if self.token is not None and _same(text, self.token):
            return Caller(cookie=self.cookie)
        for token in self.file.tokens() if self.file is not None else ():
            if token.is_shown(text):
                return _caller(token)
        return None

    def shows_token(self, request: web.Request) -> bool:
        """Whether a request carries some token, a wrong one too."""
        shown = request.query.get("token"), _from_header(request.headers.get("Authorization", ""))
        return any(text is not None for text in (*shown, request.cookies.get(_COOKIE)))

    @property
    def cookie(self) -> str:
        return hmac.new((self.token or "").encode(), b"lorasmith session", hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Who sends a request; without named tokens everybody administers."""

    name: str = ""
    role: Role = "administer"
    cookie: str = ""  # for browsers


def _caller(token: NamedToken) -> Caller:
    return Caller(token.name, token.role, token.cookie)


def role_for(method: str, path: str) -> Role:
    """The least role that a request needs, by its method and its route, such as `/lorasmith/v1/jobs/{id}`."""
    if method in ("GET", "HEAD") or (method, path) in _READS:
        return "read"
    return "administer" if (method, path) in _ADMINISTERED else "train"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address."""
    if address.casefold() in _LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False


def serves_others(config: ServerConfig) -> bool:
    """Whether others than this machine's user may send requests: it listens beyond the machine, has another name, as
    behind a proxy, or a token, which is for whoever comes through a tunnel or shares the machine.
    """
    return bool(config.token or config.names or config.tokens_file.is_file()) or not is_loopback(config.host)


def access_of(config: ServerConfig) -> Access:
    """The rules of a server. Raises OptionError if it listens beyond loopback without a token, if that is short, or if
    the file of tokens cannot be read.
    """
    named = read_tokens(config.tokens_file)
    if not config.token and not named and not is_loopback(config.host):
        raise OptionError(
            f"--listen {config.host} would let everyone in that network train here; give a secret with --token, add "
            "a token with --new-token, or leave --listen out"
        )
    if config.token and len(config.token) < LEAST_TOKEN:
        raise OptionError(
            f"--token must have at least {LEAST_TOKEN} characters, got {len(config.token)}; make one with "
            'python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    names = frozenset(name.casefold() for name in config.names)
    return Access(config.token, config.host, names, TokenFile(config.tokens_file))


def routes(context: ServerContext) -> list[web.RouteDef]:
    """The route of the login form."""
    return [web.post(_LOGIN, _login(access_of(context.config)))]


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add the security headers to a response that has none."""
    for name, value in _HEADERS.items():
        response.headers.setdefault(name, value)


def guard(context: ServerContext) -> Middleware:
    """Middleware that refuses requests without access."""
    access = access_of(context.config)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        caller = access.caller(request)
        refused = _refusal(request, access, caller)
        if refused is not None:
            if refused.status == 401 and access.shows_token(request):
                await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            refused.force_close()
            return refused
        CALLER.set("" if caller is None else caller.name)
        response = await handler(request)
        if caller is not None and caller.cookie and "token" in request.query and not response.prepared:
            return _with_cookie(request, response, caller)
        return response

    return middleware


def _refusal(request: web.Request, access: Access, caller: Caller | None) -> web.Response | None:
    """The response to a request without access; None if it has access."""
    if not access.knows_host(request.headers.get("Host")):
        return error_response(403, "host", "this server is not known by that name; use its address or localhost")
    if (_changes_something(request) or not _opens_a_page(request)) and not _is_from_here(request):
        message = "requests of pages of other sites are refused; open the page of this server"
        return error_response(403, "origin", message)
    if (request.method, request.path) in _OPEN:
        return None
    if caller is None:
        if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
            return web.Response(status=401, text=_LOGIN_PAGE, content_type="text/html")
        message = "this server needs its token: Authorization: Bearer <token>, or ?token=<token>"
        answer = error_response(401, "token", message)
        answer.headers["WWW-Authenticate"] = 'Bearer realm="lorasmith"'
        return answer
    route = request.match_info.route.resource
    needed = role_for(request.method, "" if route is None else route.canonical)
    if ROLES.index(caller.role) < ROLES.index(needed):
        message = (
            f"this needs the role {needed}, and the token {caller.name} has the role {caller.role}; ask for another"
        )
        return error_response(403, "role", message)
    return None


def _login(access: Access) -> Handler:
    async def login(request: web.Request) -> web.StreamResponse:
        # The client is not authenticated yet: only a short form without files is read.
        is_form = request.content_type == "application/x-www-form-urlencoded"
        is_short = request.content_length is not None and request.content_length <= _MOST_LOGIN_BYTES
        token = str((await in_time(request.post())).get("token", "")) if is_form and is_short else ""
        caller = access.of_token(token.strip())
        if caller is None:
            await asyncio.sleep(WRONG_TOKEN_DELAY_S)
            answer = web.Response(status=401, text=_LOGIN_PAGE, content_type="text/html")
            answer.force_close()
            return answer
        response = web.Response(status=303, headers={"Location": "/"})
        _set_cookie(request, response, caller)
        return response

    return login


def _changes_something(request: web.Request) -> bool:
    return request.method not in ("GET", "HEAD") or "upgrade" in request.headers.get("Connection", "").casefold()


def _opens_a_page(request: web.Request) -> bool:
    """Whether this is a navigation; the page that started it cannot read the response."""
    return request.headers.get("Sec-Fetch-Mode") == "navigate"


def _is_from_here(request: web.Request) -> bool:
    """Whether a request comes from a page of this server, or from no page."""
    if request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        return False
    origins = request.headers.getall("Origin", [])
    if not origins:
        return True
    try:
        parts = urlsplit(origins[0])
        ports = parts.port or _PORTS.get(parts.scheme), urlsplit(f"//{request.headers['Host']}").port
    except ValueError:
        return False
    if len(origins) > 1 or parts.scheme not in _PORTS or parts.hostname is None:
        return False
    own = ports[1] or _PORTS[parts.scheme]
    return parts.hostname == _host_name(request.headers["Host"]) and ports[0] == own


def _host_name(header: str | None) -> str | None:
    """The name in a `Host` header, without its port; None if it is malformed."""
    if not header or any(mark in header for mark in "/@\\?# "):
        return None
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname.removesuffix(".") if parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _machine_names() -> frozenset[str]:
    name = socket.gethostname().casefold()
    return frozenset({name, f"{name}.local"})


def _from_header(header: str) -> str | None:
    """The token of bearer authentication, or the password of basic authentication."""
    scheme, _, value = header.strip().partition(" ")
    if scheme.casefold() == "bearer":
        return value.strip()
    if scheme.casefold() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return None


def _same(text: str, secret: str) -> bool:
    """Equality in constant time."""
    ours, theirs = (hashlib.sha256(text.encode(errors="surrogateescape")).digest() for text in (secret, text))
    return hmac.compare_digest(ours, theirs)


def _with_cookie(request: web.Request, response: web.StreamResponse, caller: Caller) -> web.StreamResponse:
    """`response` with the cookie; for a page, a redirect to its address without the token."""
    if request.method == "GET" and "text/html" in request.headers.get("Accept", ""):
        clean = request.rel_url.without_query_params("token")
        response = web.Response(status=303, headers={"Location": str(clean)})
    _set_cookie(request, response, caller)
    return response


def _set_cookie(request: web.Request, response: web.StreamResponse, caller: Caller) -> None:
    secure = "https" in (request.scheme, request.headers.get("X-Forwarded-Proto"))  # set by a proxy
    response.set_cookie(_COOKIE, caller.cookie, path="/", httponly=True, samesite="Strict", secure=secure)


_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_PORTS = {"http": 80, "https": 443}
_COOKIE = "lorasmith"
_LOGIN = "/lorasmith/login"
_READS = frozenset({("POST", f"{PREFIX}/plans")})
"""Requests besides GET that change nothing."""
_ADMINISTERED = frozenset(
    {
        *(("POST", f"{PREFIX}/{path}") for path in ("drain", "models", "downloads", "downloads/{id}/cancel")),
        *(("DELETE", f"{PREFIX}/{path}") for path in ("downloads/{id}", "datasets/{name}", "runs/{id}")),
        ("PUT", f"{PREFIX}/hub-token"),
    }
)
"""What concerns everybody: the server, its models and its secrets, and the removal of datasets and runs."""
_OPEN = frozenset({("POST", _LOGIN), ("GET", HEALTH), ("HEAD", HEALTH)})
"""What is answered without the token."""
_HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_LOGIN_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Lorasmith</title>
<body style="font:1rem system-ui;max-width:24rem;margin:20vh auto;padding:0 1rem">
<h1>Lorasmith</h1>
<p>This server needs its token. It stands in the terminal in which the server was started.</p>
<form method="post" action="/lorasmith/login">
<label>Token <input name="token" type="password" autocomplete="current-password" autofocus required></label>
<button>Open</button></form></body></html>
"""
