from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web
from yarl import URL

from lorasmith.core.options import options_of
from lorasmith.data.data_config import DataConfig
from lorasmith.server.api_routes import ENDPOINTS, routes
from lorasmith.server.endpoint import PREFIX, api_document
from lorasmith.server.request_handling import ServerContext
from lorasmith.training.config import TrainConfig
from tests.server.api_server import AT, api

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return api_document(ENDPOINTS)


def test_the_document_and_the_routes_agree(document: dict[str, Any]) -> None:
    context: Any = ServerContext.__new__(ServerContext)
    served = {
        (one.method, re.sub(r"\{(\w+)[^}]*\}", r"{\1}", one.path.removeprefix(PREFIX)))
        for one in routes(context)
        if isinstance(one, web.RouteDef) and one.method != "*"
    }
    said = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert served == said and len(served) == len(ENDPOINTS)


def test_each_reference_leads_somewhere(document: dict[str, Any]) -> None:
    text = json.dumps(document)
    found = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert found and found == document["components"]["schemas"].keys()


def test_each_part_of_a_path_is_a_parameter(document: dict[str, Any]) -> None:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            given = [one["name"] for one in operation.get("parameters", []) if one["in"] == "path"]
            assert given == re.findall(r"\{(\w+)\}", path)
            assert operation["summary"].endswith(".")


def test_the_page_names_each_endpoint() -> None:
    rows = set(re.findall(r"^\| `(GET|POST|PUT|DELETE) (\S+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows == {(one.method, one.plain_path) for one in ENDPOINTS}


async def test_the_server_answers_with_the_document_settings_and_its_state(tmp_path: Path) -> None:
    async with api(tmp_path) as client:
        assert await client.ask("GET", "/openapi.json") == json.loads(json.dumps(api_document(ENDPOINTS)))
        found = await client.ask("GET", "/settings?images=10")
        settings = {one["name"]: one for group in found["groups"] for one in group["settings"]}
        assert settings.keys() < {**options_of(DataConfig), **options_of(TrainConfig)}.keys()
        assert settings["rank"]["type"] == "integer" and settings["rank"]["main"]
        assert settings["algorithm"]["choices"] and settings["learning_rate"]["default"] is None
        assert [one["name"] for one in found["presets"]] == ["quick", "balanced", "thorough"]
        assert found["presets"][1]["settings"]["steps"] == 400
        status = await client.ask("GET", "/status")
        assert status["ready"] and status["devices"] == [] and status["disk_free_bytes"] > 0
        assert status["base_dir"] == str(tmp_path)
        assert "there is no GET /nothing" in await client.error("GET", "/nothing", status=404)
        assert "there is no DELETE /status" in await client.error("DELETE", "/status", status=404)


def test_the_api_needs_no_torch() -> None:
    code = "import sys, lorasmith.server.api_routes; print(sorted({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("share", [3, pytest.param(1, marks=pytest.mark.slow)])
async def test_no_name_makes_an_endpoint_fail(tmp_path: Path, network_attempts: list[str], share: int) -> None:
    """With the real functions behind the endpoints; all other routes are in `tests/server/test_access.py`."""
    hostile = ("a%00b", "con", "~", "~root%2Fx", "%5C%5Chost%5Cshare", "C%3A%5Cx", "..%2F..%2Fx", "%ff", "%ed%a0%80")
    base = tmp_path / "base"
    async with api(base) as client:
        for index, endpoint in enumerate(ENDPOINTS):
            if endpoint.content == "text/event-stream":
                continue
            for name in hostile[index % share :: share]:
                path = re.sub(r"\{[^}]*\}", name, endpoint.path)
                query = "&".join(f"{one.name}={name}" for one in endpoint.query)
                plain = unquote(name, errors="replace")
                bodies: list[Any] = [None]
                if dataclasses.is_dataclass(endpoint.body):
                    bodies = [{one.name: plain} for one in dataclasses.fields(endpoint.body)]
                    bodies.append({"model": "lorasmith-tiny", "folder": plain})
                    bodies.append({"model": "lorasmith-tiny", "dataset": plain, "name": plain})
                    bodies.append({"model": plain, "dataset": "fox", "settings": {"existing_lora": plain}})
                elif endpoint.body is not None:
                    bodies = [{plain: plain}]
                for body in bodies:
                    url = URL(f"{AT}{path}?{query}", encoded=True)
                    async with client.http.request(endpoint.method, url, json=body) as answer:
                        assert answer.status < 500, (endpoint.method, url, body, await answer.text())
            if endpoint.path == "/hub-token":  # the hub says whether a token is one
                network_attempts.clear()
            assert network_attempts == [], endpoint
        made = {path for path in base.rglob("*") if path.is_file() and "jobs.sqlite3" not in path.name}
        assert made == set() and {*tmp_path.iterdir()} == {base}
