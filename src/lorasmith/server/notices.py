"""Sends notices of jobs to other programs: signed JSON by POST, at least once, in order for each job.

A notice is stored by the transaction that changes its job (`runs/queue.py`). It is sent until its receiver answers with
a status of 200 to 299, after longer and longer pauses, for a day. Requests go to hosts that the operator named and
nowhere else: redirects are not followed, proxies of the environment are not used, and names that lead to addresses of
this machine or of the link, unless they say so, are refused when the connection is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from lorasmith.core.errors import OptionError
from lorasmith.core.printable import printable
from lorasmith.runs.queue import JobStore, StoreError

LEAST_SECRET = 12  # characters
SIGNATURE = "Lorasmith-Signature"

_POLL_S, _TIMEOUT_S = 0.5, 10.0
_FIRST_PAUSE_S, _GIVEN_UP_S = 2.0, 24 * 3600.0
_MOST_AT_ONCE = 16
_LONGEST_URL = 2_000
_PORTS = {"http": 80, "https": 443}


def checked_url(url: str, hosts: Collection[str]) -> str:
    """A URL for notices, whose host (or `host:port`) is one of `hosts`. Raises OptionError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    name = parts.hostname or ""
    plain = len(url) <= _LONGEST_URL and url.isascii() and url.isprintable() and not set(url) & set(" \\")
    if parts.scheme not in _PORTS or not name or parts.username is not None or parts.fragment or not plain:
        raise OptionError(
            "notify must be an http or https address without user, password and fragment, such as "
            f"https://example.org/hook, got {printable(url, limit=100)}; correct it"
        )
    host = host_of(url)
    if {host, f"{name}:{port or _PORTS[parts.scheme]}"}.isdisjoint(host.casefold() for host in hosts):
        shown = printable(host, limit=100)
        raise OptionError(
            f"notices may be sent to hosts that the operator allows, and {shown} is none; have the server started with "
            f"--notify-host {shown}"
        )
    return url


def host_of(url: str) -> str:
    """The host of a URL as `checked_url` compares it, with its port unless that is the usual one."""
    try:
        parts = urlsplit(url)
        usual = parts.port in (None, _PORTS.get(parts.scheme))
        return (parts.hostname or "") if usual else f"{parts.hostname}:{parts.port}"
    except ValueError:
        return ""


def signature(secret: str, at: int, body: bytes) -> str:
    """The value of the header `SIGNATURE`: HMAC-SHA256 over time, a dot, and the body."""
    digest = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"


class NoticeSender:
    """Sends what is due, for several jobs at once and for each in order."""

    def __init__(self, store: JobStore, secret: str, hosts: Collection[str], log: Callable[[str], object]) -> None:
        self._store = store
        self._secret = secret
        self._hosts = hosts
        self._log = log
        self._sending: dict[str, asyncio.Task[None]] = {}  # by job
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop; what was not received is sent by the next server."""
        tasks = [*([self._task] if self._task is not None else []), *self._sending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        connector = aiohttp.TCPConnector(resolver=_CheckedResolver(), limit_per_host=4)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
        ) as session:
            while True:
                with contextlib.suppress(StoreError):  # whoever uses the queue next says it
                    for notice in self._store.due_notices(_MOST_AT_ONCE):
                        job = notice["job"]
                        if job not in self._sending and len(self._sending) < _MOST_AT_ONCE:
                            self._sending[job] = asyncio.create_task(self._send(session, notice))
                await asyncio.sleep(_POLL_S)

    async def _send(self, session: aiohttp.ClientSession, notice: Mapping[str, Any]) -> None:
        """Send a notice, and those of its job that follow at once."""
        try:
            with contextlib.suppress(StoreError):  # it is sent again: receivers know its number
                fault = await self._fault(session, notice)
                if not fault:
                    self._store.end_notice(notice["sequence"])
                elif time.time() - notice["created"] >= _GIVEN_UP_S:
                    self._log(f"a notice of job {notice['job']} was not received for a day ({fault}) and is given up")
                    self._store.end_notice(notice["sequence"])
                else:
                    if not notice["tries"]:
                        self._log(f"a notice of job {notice['job']} was not received ({fault}); it is sent again")
                    self._store.delay_notice(notice["sequence"], _FIRST_PAUSE_S * 2 ** min(notice["tries"], 20))
        finally:
            self._sending.pop(notice["job"], None)

    async def _fault(self, session: aiohttp.ClientSession, notice: Mapping[str, Any]) -> str:
        """Send a notice once; returns why it was not received, empty if it was."""
        at = int(time.time())
        facts = {"notice": notice["sequence"], "at": notice["created"], **json.loads(notice["body"])}
        body = json.dumps(facts).encode()
        headers = {"Content-Type": "application/json", SIGNATURE: signature(self._secret, at, body)}
        try:
            url = checked_url(notice["url"], self._hosts)  # the operator may have changed what is allowed
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                if 300 <= answer.status < 400:
                    return f"it is redirected by status {answer.status}, which is not followed"
                return "" if 200 <= answer.status < 300 else f"the answer has status {answer.status}"
        except TimeoutError:
            return f"no answer within {_TIMEOUT_S:g} seconds"
        except (aiohttp.ClientError, OSError, OptionError, ValueError) as error:
            return printable(str(error) or type(error).__name__, limit=300)


class _CheckedResolver(AbstractResolver):
    """Resolves names, and refuses addresses of this machine and of the link for names that do not say so."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for resolved in found:
            address = ipaddress.ip_address(resolved["host"].partition("%")[0])
            address = getattr(address, "ipv4_mapped", None) or address
            is_local = address.is_loopback and host.casefold() != "localhost"
            if is_local or address.is_link_local or address.is_unspecified or address.is_multicast:
                raise OSError(f"{host} leads to {address}, which is not for notices")
        return found

    async def close(self) -> None:
        await self._resolver.close()
