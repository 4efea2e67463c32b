"""Has the server of a base folder end without stopping a job, before an update."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.server.endpoint import PREFIX
from lorasmith.server.server_config import ServerConfig

_POLL_S = 0.5
_TIMEOUT_S = 30.0


def drain(config: ServerConfig, *, waiting: Callable[[int], object] = lambda running: None) -> str:
    """Ask the server of a base folder to start no further jobs, wait until it has ended, and return the address that it
    had. `waiting` receives the number of running jobs when it changes. Raises OptionError if none runs or the token is
    wrong.
    """
    try:
        address = config.address_note.read_text(encoding="utf-8")[:100].strip()
    except OSError:
        address = ""
    if not address.startswith("http://"):
        raise OptionError(f"no server runs with the base folder {config.base}; name that of the one to drain")
    try:
        running = _ask(config, "POST", f"{address}{PREFIX}/drain")["queue"]["running"]
    except OSError as error:
        raise OptionError(f"the server at {address} does not answer ({error}); it may have ended already") from error
    waiting(running)
    while True:
        time.sleep(_POLL_S)
        try:
            now = _ask(config, "GET", f"{address}{PREFIX}/status")["queue"]["running"]
        except OSError:
            return address
        if now != running:
            running = now
            waiting(running)


def _ask(config: ServerConfig, method: str, url: str) -> Any:
    headers = {"Content-Type": "application/json"}
    if config.token:
        headers["Authorization"] = f"Bearer {config.token}"
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        # Without proxies: the server is the one that wrote its address into this folder.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise OptionError("the server needs its token; give it by LORASMITH_TOKEN or --token") from error
        raise OptionError(f"the server refused to be drained ({error}); see its log, {config.log}") from error
