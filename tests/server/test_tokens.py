"""Named tokens: each role may do what it may and nothing else, however it is asked for."""

from __future__ import annotations

import hashlib
import json
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from yarl import URL

from lorasmith.cli.main import app
from lorasmith.core.errors import OptionError
from lorasmith.server import access
from lorasmith.server.access import access_of
from lorasmith.server.server_config import ServerConfig
from lorasmith.server.tokens import ROLES, new_token, read_tokens, remove_token
from tests.server.fake_server import GOOD, Played, serving
from tests.server.test_access import routes_of, status_of

ADMINISTERED = {
    ("POST", "/lorasmith/v1/drain"), ("POST", "/lorasmith/v1/models"), ("POST", "/lorasmith/v1/downloads"),
    ("POST", "/lorasmith/v1/downloads/x/cancel"), ("DELETE", "/lorasmith/v1/downloads/x"),
    ("DELETE", "/lorasmith/v1/datasets/x"), ("DELETE", "/lorasmith/v1/runs/x"), ("PUT", "/lorasmith/v1/hub-token"),
}  # fmt: skip
AT = "/lorasmith/v1"


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "WRONG_TOKEN_DELAY_S", 0.0)


def file_of(base: Path) -> Path:
    return ServerConfig(base=base).tokens_file


@asynccontextmanager
async def with_roles(base: Path) -> AsyncIterator[tuple[Played, dict[str, dict[str, str]]]]:
    """A server, and the headers of a token for each role."""
    tokens = {role: new_token(file_of(base), f"the one to {role}", role) for role in ROLES}
    async with serving(base) as server:
        yield server, {role: {"Authorization": f"Bearer {token}"} for role, token in tokens.items()}


async def test_each_route_needs_its_role(tmp_path: Path) -> None:
    async with with_roles(tmp_path) as (server, headers):
        found = routes_of(server)
        assert set(found) >= ADMINISTERED
        for method, path in found:
            if path in ("/lorasmith/login", "/healthz"):
                continue
            assert await status_of(server, method, path) == 401, (method, path)
            changes = method not in ("GET", "HEAD") and path != f"{AT}/plans"
            if changes:
                assert await status_of(server, method, path, headers=headers["read"]) == 403, (method, path)
            if (method, path) in ADMINISTERED:
                assert await status_of(server, method, path, headers=headers["train"]) == 403, (method, path)
        assert not server.context.dispatcher.is_draining
        assert await status_of(server, "GET", f"{AT}/jobs", headers=headers["read"]) == 200
        assert await status_of(server, "POST", "/prompt", json={"prompt": GOOD}, headers=headers["train"]) == 200
        assert await status_of(server, "POST", f"{AT}/drain", json={}, headers=headers["administer"]) == 200


async def test_a_role_is_not_widened_by_the_spelling_of_a_request(tmp_path: Path) -> None:
    async with with_roles(tmp_path) as (server, headers):
        for path in (
            f"{AT}/%64rain", f"{AT}//drain", f"/{AT}/drain", f"{AT}/./drain", f"{AT}/jobs/../drain", f"{AT}/drain/",
            f"{AT}/drain?x=/plans", f"{AT}/drain#plans", f"{AT}/DRAIN", f"{AT}/drain;x",
        ):  # fmt: skip
            for role in ("read", "train"):
                status = await status_of(
                    server,
                    "POST",
                    URL(f"http://127.0.0.1:{server.port}{path}", encoded=True),
                    json={},
                    headers=headers[role],
                )
                assert status in (403, 404), (path, role)
        more = {"X-HTTP-Method-Override": "POST", "X-Original-URL": f"{AT}/drain", "X-Forwarded-User": "admin"}
        assert await status_of(server, "POST", f"{AT}/drain", headers={**headers["train"], **more}) == 403
        assert await status_of(server, "GET", f"{AT}/drain", headers={**headers["train"], **more}) in (404, 405)
        both = {"Authorization": headers["read"]["Authorization"], "Cookie": "lorasmith=administer"}
        assert await status_of(server, "POST", f"{AT}/drain", headers=both) == 403
        assert not server.context.dispatcher.is_draining


async def test_a_job_shows_by_whom_it_was_queued(tmp_path: Path) -> None:
    async with with_roles(tmp_path) as (server, headers):
        forged = {"prompt": GOOD, "submitter": "root", "extra_data": {"submitter": "root"}}
        for role in ("train", "administer"):
            await server.post("/prompt", forged, headers=headers[role])
        jobs = (await server.get(f"{AT}/jobs", headers=headers["read"]))["jobs"]
        assert [one["submitter"] for one in jobs] == ["the one to train", "the one to administer"]


async def test_a_removed_token_and_its_cookie_are_refused_at_once(tmp_path: Path) -> None:
    token = new_token(file_of(tmp_path), "anna", "read")
    (kept,) = read_tokens(file_of(tmp_path))
    assert token not in file_of(tmp_path).read_text()
    async with serving(tmp_path) as server:
        async with server.http.get("/prompt", params={"token": token}) as answer:
            cookie = {"Cookie": f"lorasmith={answer.cookies['lorasmith'].value}"}
        async with server.http.post("/lorasmith/login", data={"token": token}, allow_redirects=False) as answer:
            assert answer.status == 303 and answer.cookies["lorasmith"].value in cookie["Cookie"]
        assert await status_of(server, "GET", "/prompt", headers=cookie) == 200
        for wrong in (
            kept.sha256,
            kept.cookie,
            hashlib.sha256(kept.sha256.encode()).hexdigest(),
            "anna",
            "",
            token[:-1],
        ):
            assert await status_of(server, "GET", "/prompt", headers={"Authorization": f"Bearer {wrong}"}) == 401
            assert await status_of(server, "GET", "/prompt", headers={"Cookie": f"lorasmith={wrong}"}) == (
                200 if wrong == kept.cookie else 401
            )
        remove_token(file_of(tmp_path), "anna")
        for shown in (cookie, {"Authorization": f"Bearer {token}"}):
            assert await status_of(server, "GET", "/prompt", headers=shown) == 401
        bruno = {"Authorization": f"Bearer {new_token(file_of(tmp_path), 'bruno', 'train')}"}
        assert await status_of(server, "GET", "/prompt", headers=bruno) == 200  # without a restart


@pytest.mark.parametrize("left", [None, "", "{}", '{"tokens": [{"name": "a", "role": "root", "sha256": "00"}]}', "[1]"])
async def test_a_file_that_is_lost_or_damaged_lets_nobody_in(tmp_path: Path, left: str | None) -> None:
    token = {"Authorization": f"Bearer {new_token(file_of(tmp_path), 'anna', 'administer')}"}
    async with serving(tmp_path) as server:
        assert await status_of(server, "GET", "/prompt", headers=token) == 200
        if left is None:
            file_of(tmp_path).unlink()
        else:
            file_of(tmp_path).write_text(left)
        for headers in (token, {}, {"Authorization": "Bearer "}, {"Cookie": "lorasmith="}):
            assert await status_of(server, "GET", "/prompt", headers=headers) == 401
    if left is not None:
        with pytest.raises(OptionError, match="cannot be read as tokens"):
            access_of(ServerConfig(base=tmp_path))


def run(base: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["serve", "--base-dir", str(base), *arguments, "--json"])


def test_tokens_are_added_and_removed_by_the_command(tmp_path: Path) -> None:
    found = json.loads(run(tmp_path, "--new-token", "anna=b=train").stdout)
    assert found["name"] == "anna=b" and len(found["token"]) >= 43
    if sys.platform != "win32":
        assert stat.S_IMODE(file_of(tmp_path).stat().st_mode) == 0o600
    assert access_of(ServerConfig(base=tmp_path, host="0.0.0.0")).needs_token
    for given, said in (
        ("anna=b=read", "there is a token with the name"), ("x=root", "must be of read, train, administer"),
        ("=look", "must have 1 to 60 printable"), ("x", "must have 1 to 60 printable"),
    ):  # fmt: skip
        assert said in json.loads(run(tmp_path, "--new-token", given).stdout)["error"]["message"]
    assert "no token with the name" in run(tmp_path, "--remove-token", "bruno").stdout
    assert json.loads(run(tmp_path, "--remove-token", "anna=b").stdout)["removed"] == "anna=b"
    assert read_tokens(file_of(tmp_path)) == () and file_of(tmp_path).is_file()
    with pytest.raises(OptionError, match="would let everyone in that network train"):
        access_of(ServerConfig(base=tmp_path, host="0.0.0.0"))
    assert access_of(ServerConfig(base=tmp_path)).needs_token, "its last token was removed, not its protection"
