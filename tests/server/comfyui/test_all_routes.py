from __future__ import annotations

import re
from pathlib import Path

from lorasmith.runs import queue
from lorasmith.server import access, connections, request_handling
from lorasmith.server.comfyui import websocket
from lorasmith.server.comfyui.all_routes import PREFIXES, routes
from tests.server.fake_server import serving

PAGE, API = (
    (Path(__file__).parents[3] / "docs" / name).read_text(encoding="utf-8") for name in ("comfyui-server.md", "api.md")
)


async def test_the_page_lists_every_route(tmp_path: Path) -> None:
    async with serving(tmp_path) as server:
        found = {(one.method, re.sub(r":[^}]*}", "}", one.path)) for one in routes(server.context)}
    rows = re.findall(r"^\| (`/[^|]*) \| ([A-Z, ]+) \|", PAGE, flags=re.MULTILINE)
    listed = {path: {*methods.split(", ")} for cell, methods in rows for path in re.findall(r"`([^`]+)`", cell)}
    plain = {path for _, path in found if not path.startswith(PREFIXES[1:])}
    assert {*listed} == plain
    for method, path in found:
        if path in plain:
            assert method in listed[path], (method, path)
    for prefix in PREFIXES:
        assert {("GET", f"{prefix}/queue"), ("POST", f"{prefix}/free")} <= found


def test_the_page_has_the_limits() -> None:
    assert f"{request_handling.MAX_JSON_BYTES // 2**20} MiB of JSON" in PAGE
    assert f"{request_handling.MAX_UPLOAD_BYTES // 2**20} MiB in an uploaded file" in PAGE
    assert f"beyond {queue.MOST_PENDING:,} that wait; the last {queue.MOST_ENDED:,} ended ones" in PAGE
    assert f"beyond {websocket.MOST_SOCKETS} connections" in PAGE
    most, of_one = connections.MOST_CONNECTIONS, connections.MOST_PER_ADDRESS
    assert f"{most} of all kinds ({of_one} of one address)" in PAGE and f"{most}, of one address {of_one}" in API
    assert f"last {queue.MOST_ENDED_BYTES // 2**20} MiB" in PAGE
    assert f"at least {access.LEAST_TOKEN} characters" in PAGE
    assert f"silence within a body, or of a reader of a stream | {request_handling.IDLE_TIMEOUT_S:g} seconds" in API
