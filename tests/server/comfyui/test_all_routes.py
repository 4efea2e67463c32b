from __future__ import annotations

import asyncio
import re
from pathlib import Path

from lorasmith.server import jobs, request_parts
from lorasmith.server.comfyui import websocket
from lorasmith.server.comfyui.all_routes import PREFIXES, routes
from tests.server.fake_server import serving

PAGE = (Path(__file__).parents[3] / "docs" / "comfyui-server.md").read_text(encoding="utf-8")


def test_the_page_lists_every_route(tmp_path: Path) -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_the_page_has_the_limits() -> None:
    assert f"{request_parts.MAX_JSON_BYTES // 2**20} MiB of JSON" in PAGE
    assert f"{request_parts.MAX_UPLOAD_BYTES // 2**20} MiB in an uploaded file" in PAGE
    assert f"beyond {jobs.MOST_PENDING:,} that wait; the last {jobs.MOST_ENDED:,} that ended" in PAGE
    assert f"beyond {websocket.MOST_SOCKETS} connections" in PAGE
