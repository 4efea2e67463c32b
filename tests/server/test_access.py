from __future__ import annotations

import asyncio
import base64
import re
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from yarl import URL

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import is_reserved
from lorasmith.core.foreign_json import parse_foreign_json
from lorasmith.server import access, request_handling
from lorasmith.server.access import Access, access_of, is_loopback
from lorasmith.server.request_handling import MAX_JSON_BYTES, read_body
from lorasmith.server.server_config import ServerConfig
from tests.server.fake_server import GOOD, Played, serving
from tests.server.fakes import until

TOKEN = "a long secret"
FOREIGN = "https://evil.example"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong tokens are refused at once."""
    monkeypatch.setattr(access, "WRONG_TOKEN_DELAY_S", 0.0)


def routes_of(server: Played) -> list[tuple[str, str]]:
    """Method and an address of every route, with something in the place of each variable."""
    found = []
    for route in server.app.router.routes():
        assert route.resource is not None
        path = re.sub(r"\{[^}]*\}", "x", route.resource.canonical)
        found.append(("GET" if route.method == "*" else route.method, path))
    assert ("POST", "/prompt") in found
    assert ("GET", "/editor/api/object_info") in found
    return found


async def status_of(server: Played, method: str, path: str | URL, **options: Any) -> int:
    async with server.http.request(method, path, allow_redirects=False, **options) as answer:
        return answer.status


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8188", "localhost.evil.example", "192.168.1.5", "127.0.0.1@evil.example", ""]
)
async def test_every_route_refuses_a_foreign_host(server: Played, host: str) -> None:
    # Its own Origin does not help a page whose name was made to point here.
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    paths = routes_of(server) if host == "evil.example" else [("GET", "/prompt"), ("POST", "/prompt")]
    for method, path in paths:
        assert await status_of(server, method, path, headers=headers) in (400, 403), (method, path)
    with pytest.raises(aiohttp.WSServerHandshakeError):
        await server.http.ws_connect("/ws", headers=headers)
    assert server.context.store.pending() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": FOREIGN},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "file://"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
async def test_every_write_refuses_a_foreign_origin(server: Played, headers: dict[str, str]) -> None:
    for method, path in routes_of(server) if headers == {"Origin": FOREIGN} else [("POST", "/prompt")]:
        # A page may be opened from anywhere; pictures, scripts and streams are not for pages of others.
        if method != "GET" or path in ("/view", "/lorasmith/v1/events", "/editor/", "/api/history"):
            assert await status_of(server, method, path, headers=headers) == 403, (method, path)
    opened = headers | {"Sec-Fetch-Mode": "navigate"}
    assert [await status_of(server, method, "/queue", headers=opened) for method in ("GET", "POST")] == [200, 403]
    for path in ("/ws", "/api/ws", "/editor/ws"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await server.http.ws_connect(path, headers=headers)
        assert caught.value.status == 403


async def test_a_page_of_this_server_and_programs_may_write(server: Played) -> None:
    for name in ("127.0.0.1", "localhost", "[::1]"):
        headers = {"Host": f"{name}:{server.port}", "Origin": f"http://{name}:{server.port}"}
        await server.post("/prompt", {"prompt": GOOD}, headers={**headers, "Sec-Fetch-Site": "same-origin"})
    await server.post("/prompt", {"prompt": GOOD})
    forwarded = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
    await server.post("/prompt", {"prompt": GOOD}, headers=forwarded)
    async with server.http.ws_connect("/ws", headers=forwarded) as socket:
        assert "status" in (await socket.receive()).data


async def test_every_route_needs_the_token(tmp_path: Path) -> None:
    async with serving(tmp_path, token=TOKEN) as server:
        for method, path in routes_of(server):
            if path not in ("/lorasmith/login", "/healthz"):
                assert await status_of(server, method, path) == 401, (method, path)
        for path in ("/nowhere", "/prompt?token=wrong", "/prompt?token="):
            assert await status_of(server, "GET", path) == 401


async def test_the_token_is_taken_from_each_place_where_clients_put_it(tmp_path: Path) -> None:
    async with serving(tmp_path, token=TOKEN) as server:
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for headers, status in (
            ({"Authorization": f"Bearer {TOKEN}"}, 200),
            ({"Authorization": f"bearer {TOKEN}"}, 200),
            ({"Authorization": f"Basic {basic}"}, 200),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Basic !!!"}, 401),
            ({"Authorization": "Basic é"}, 401),
            ({"Authorization": "Bearer é"}, 401),
            ({"Cookie": "lorasmith=é"}, 401),
            ({"Authorization": f"Basic {base64.b64encode(b'me:wrong').decode()}"}, 401),
            ({"Authorization": TOKEN}, 401),
            ({"Cookie": f"lorasmith={TOKEN}"}, 401),
        ):
            assert await status_of(server, "GET", "/prompt", headers=headers) == status, headers
        async with server.http.get("/prompt", params={"token": TOKEN}) as answer:
            assert answer.status == 200
            cookie = answer.cookies["lorasmith"]
        assert cookie["httponly"]
        assert cookie["samesite"] == "Strict"
        assert TOKEN not in cookie.value
        assert await status_of(server, "GET", "/prompt", headers={"Cookie": f"lorasmith={cookie.value}"}) == 200
        async with server.http.ws_connect("/ws", params={"token": TOKEN}) as socket:
            assert "status" in (await socket.receive()).data


async def test_a_browser_exchanges_the_token_for_a_cookie(tmp_path: Path) -> None:
    async with serving(tmp_path, token=TOKEN) as server:
        page = {"Accept": "text/html"}
        async with server.http.get("/?a=1", params={"token": TOKEN}, headers=page, allow_redirects=False) as answer:
            assert (answer.status, answer.headers["Location"]) == (303, "/?a=1")
            assert "lorasmith" in answer.cookies
        async with server.http.get("/", headers=page) as answer:
            assert answer.status == 401
            assert "<form" in await answer.text()
        form = aiohttp.FormData({"token": TOKEN}, default_to_multipart=True)
        for data in ({"token": "wrong"}, {"token": TOKEN, "more": "x" * 10_000}, form, f"token={TOKEN}"):
            assert await status_of(server, "POST", "/lorasmith/login", data=data) == 401
        assert (
            await status_of(server, "POST", "/lorasmith/login", data={"token": TOKEN}, headers={"Origin": FOREIGN})
            == 403
        )
        async with server.http.post("/lorasmith/login", data={"token": TOKEN}, allow_redirects=False) as answer:
            assert answer.status == 303
            assert "lorasmith" in answer.cookies and not answer.cookies["lorasmith"]["secure"]
        forwarded = {"token": TOKEN}, {"X-Forwarded-Proto": "https"}
        async with server.http.get("/prompt", params=forwarded[0], headers=forwarded[1]) as answer:
            assert answer.cookies["lorasmith"]["secure"]


async def test_every_answer_has_the_headers_of_safety(server: Played) -> None:
    for method, path in (("GET", "/prompt"), ("GET", "/nowhere"), ("PUT", "/prompt"), ("POST", "/prompt")):
        async with server.http.request(method, path) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "script" not in policy
            assert "frame-ancestors 'none'" in policy
            assert "http" not in policy
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_no_page_of_another_site_is_let_in_by_cors(server: Played) -> None:
    headers = {"Origin": FOREIGN, "Access-Control-Request-Method": "POST"}
    async with server.http.options("/prompt", headers=headers) as answer:
        assert answer.status == 403
        assert not any(name.startswith("Access-Control") for name in answer.headers)


def test_secrets_are_in_no_answer_and_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with serving(tmp_path, token=TOKEN) as server:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            for path in ("/system_stats", "/internal/logs", "/internal/logs/raw", "/settings", "/features"):
                async with server.http.get(path, headers=headers) as answer:
                    assert TOKEN not in await answer.text()
            assert not any(TOKEN in path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())

    asyncio.run(main())
    assert TOKEN not in caplog.text


async def test_bodies_are_limited(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_body.__kwdefaults__["at_most"] == MAX_JSON_BYTES
    monkeypatch.setitem(read_body.__kwdefaults__, "at_most", 1000)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    for path in ("/prompt", "/settings", "/userdata/x.json"):
        assert await status_of(server, "POST", path, data=b" " * 2000) == 413
        assert await status_of(server, "POST", path, data=parts()) == 413


@pytest.mark.parametrize(
    ("listen", "host", "known"),
    [
        ("127.0.0.1", "127.0.0.1:8188", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "localhost.", True),
        ("127.0.0.1", "[::1]:8188", True),
        ("127.0.0.1", "192.168.1.5", False),
        ("0.0.0.0", "192.168.1.5:8188", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", "gpu.lan", False),
        ("127.0.0.1", "gpu.lan", False),
        ("gpu.lan", "gpu.lan:8188", True),
        ("127.0.0.1", None, False),
        ("127.0.0.1", "localhost:port", False),
        ("127.0.0.1", "localhost/x", False),
        ("127.0.0.1", "x@localhost", False),
    ],
)
def test_known_hosts(listen: str, host: str | None, known: bool) -> None:
    assert Access("token", listen).knows_host(host) is known


def test_further_names_are_known(tmp_path: Path) -> None:
    rules = access_of(ServerConfig(base=tmp_path, names=("GPU.example",)))
    assert rules.knows_host("gpu.example:8188")
    assert rules.knows_host("gpu.EXAMPLE")
    assert not rules.knows_host("evil.example")


async def test_pages_behind_a_proxy_may_write(tmp_path: Path) -> None:
    async with serving(tmp_path, token=TOKEN, names=("gpu.example",)) as server:
        headers = {"Host": "gpu.example", "Origin": "https://gpu.example", "Authorization": f"Bearer {TOKEN}"}
        await server.post("/prompt", {"prompt": GOOD}, headers=headers)
        await server.post("/prompt", {"prompt": GOOD}, headers=headers | {"Origin": FOREIGN}, status=403)


def test_a_server_that_others_reach_needs_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "gpu.lan", "::"):
        for token in (None, ""):
            with pytest.raises(OptionError, match="--token"):
                access_of(ServerConfig(base=tmp_path, host=host, token=token))
        assert access_of(ServerConfig(base=tmp_path, host=host, token=TOKEN)).token == TOKEN
    for host in ("0.0.0.0", "127.0.0.1"):
        with pytest.raises(OptionError, match=r"--token must have at least 12 characters, got 11; make one with"):
            access_of(ServerConfig(base=tmp_path, host=host, token="x" * 11))


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.5", "gpu.lan")))


async def test_wrong_tokens_are_refused_late_and_end_their_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    async def noted(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(access, "WRONG_TOKEN_DELAY_S", 7.0)
    async with serving(tmp_path, token=TOKEN) as server:
        with monkeypatch.context() as patch:
            patch.setattr("lorasmith.server.access.asyncio.sleep", noted)
            wrong: list[tuple[str, str, dict[str, Any]]] = [
                ("GET", "/prompt?token=wrong", {}),
                ("GET", "/prompt", {"headers": {"Authorization": "Bearer wrong"}}),
                ("GET", "/prompt", {"headers": {"Cookie": "lorasmith=wrong"}}),
                ("POST", "/lorasmith/login", {"data": {"token": "wrong"}}),
            ]
            for method, path, options in wrong:
                async with server.http.request(method, path, **options) as answer:
                    assert answer.status == 401 and answer.headers["Connection"] == "close"
            assert waits == [7.0] * 4
            for path, status in (("/prompt", 401), (f"/prompt?token={TOKEN}", 200)):
                assert await status_of(server, "GET", path) == status
            assert await status_of(server, "GET", "/prompt", headers={"Host": "evil.example"}) == 403
        assert waits == [7.0] * 4


async def test_a_body_that_stops_arriving_is_cut_off(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handling, "IDLE_TIMEOUT_S", 0.1)
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nabc'
    form = "multipart/form-data; boundary=x"
    cases = [
        ("/prompt", "application/json", b'{"prompt"'),
        ("/userdata/x.json", "application/json", b"x"),
        ("/lorasmith/v1/datasets", "application/json", b"{"),
        ("/upload/image", form, part),
        ("/upload/image", form, b"--x\r\nContent-"),
        ("/lorasmith/v1/datasets/dog/images", form, part),
    ]
    server.assistant.answers["check_changes"] = True
    for path, kind, begun in cases:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
        writer.write(head.encode() + begun)
        assert b" 408 " in await reader.readline(), path
        writer.close()
        await writer.wait_closed()


async def test_an_upload_that_moves_may_take_long(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handling, "IDLE_TIMEOUT_S", 100.0)

    async def slowly() -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        time = loop.time
        pieces = (b'{"a": 1', b" ", b" ", b"}")
        for number, piece in enumerate(pieces):
            yield piece
            arrived = len(b"".join(pieces[: number + 1]))
            await until(lambda arrived=arrived: sum(request_handling._bodies.values()) == arrived)  # type: ignore[misc]
            # A minute passes.
            monkeypatch.setattr(loop, "time", lambda passed=60.0 * (number + 1): time() + passed)

    assert await status_of(server, "POST", "/settings", data=slowly()) == 200


async def test_large_bodies_are_parsed_outside_of_the_event_loop(
    server: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []

    def parsed(content: bytes) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return parse_foreign_json(content)

    for module in ("endpoint", "request_handling"):
        monkeypatch.setattr(f"lorasmith.server.{module}.parse_foreign_json", parsed)
    for path in ("/settings", "/lorasmith/v1/datasets"):
        for size, is_main in ((10, True), (100_000, False)):
            await status_of(server, "POST", path, json={"name": "x" * size})
            assert threads.pop() is is_main, (path, size)


async def test_bodies_that_are_read_have_a_limit_together(server: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handling, "_MOST_BODIES_BYTES", 1500)
    first = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b'{"a": 1' + b" " * 1000
        await first.wait()
        yield b"}"

    waiting = asyncio.create_task(status_of(server, "POST", "/settings", data=half()))
    await until(lambda: sum(request_handling._bodies.values()) > 1000)
    assert await status_of(server, "POST", "/settings", data=b"{" + b" " * 600 + b"}") == 429
    first.set()
    assert await waiting == 200 and not request_handling._bodies
    assert await status_of(server, "POST", "/settings", data=b"{" + b" " * 600 + b"}") == 200


def test_a_client_that_does_not_read_an_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handling, "IDLE_TIMEOUT_S", 0.01)
    ended: list[None] = []

    class Unread:
        async def write(self, data: bytes) -> None:
            await asyncio.Event().wait()

    request = SimpleNamespace(transport=SimpleNamespace(abort=lambda: ended.append(None)))
    with pytest.raises(ConnectionResetError):
        asyncio.run(request_handling.send(request, Unread(), b"x"))  # type: ignore[arg-type]
    assert ended == [None]


HOSTILE = {
    "a zero byte": "a%00b",
    "a device": "con",
    "a device with a suffix": "COM1.png",
    "the home": "~",
    "a home": "~root%2Fx",
    "a share": "%5C%5Chost%5Cshare",
    "a share with another slash": "%2F%5Chost%5Cshare",
    "a pipe": "%5C%5C.%5Cpipe%5Cx",
    "a drive": "C%3A%5Cx",
    "a folder above": "..%2F..%2Fx",
    "no text": "%ff%fe",
    "half of a pair": "%ed%a0%80",
    "a long name": "x" * 300,
}


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])
async def test_no_name_makes_a_route_fail(tmp_path: Path, share: int) -> None:
    """Each route with a share of the names, or with all."""
    async with serving(tmp_path / "base") as server:
        server.assistant.answers |= {"check_changes": True, "encoded_picture": b"x", "file_metadata": None}
        before = {*tmp_path.rglob("*")}
        fields = ["filename", "subfolder", "type", "dir", "path", "id", "model", "width", "after", "max_items", "node"]
        headers = {"X": "é", "Authorization": "Basic é", "If-None-Match": "é", "Range": "é", "Cookie": "é=é"}
        for index, route in enumerate(server.app.router.routes()):
            assert route.resource is not None
            path = route.resource.canonical
            if path.startswith(("/api/", "/editor/")) or path.endswith(("/ws", "/events")):
                continue
            for case, name in [*HOSTILE.items()][index % share :: share]:
                filled = re.sub(r"\{[^}]*\}", name, path) + "?" + "&".join(f"{one}={name}" for one in fields)
                for body in (b"", name.encode()) if route.method in ("POST", "PUT", "PATCH") else (None,):
                    method, url = route.method.replace("*", "GET"), URL(filled, encoded=True)
                    status = await status_of(server, method, url, headers=headers, data=body)
                    assert status < 500, (route.method, filled[:200], case, status)
        written = {path for path in {*tmp_path.rglob("*")} - before if path.is_file()}
        assert all(path.is_relative_to(tmp_path / "base" / "user") for path in written)
        assert not any(is_reserved(path.name) for path in written)
