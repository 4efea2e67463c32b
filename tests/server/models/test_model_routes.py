"""The shelf, downloads in a child process from a hub on the loopback, and model files that are sent."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import FormData

from lorasmith.core.folders import BUILT_IN_BASE, Folders
from lorasmith.families.base import FAMILIES
from lorasmith.families.slots import EncoderSlot, HubFolder
from lorasmith.runs import shelf
from lorasmith.server.models import downloads as server_downloads
from tests.fake_hub import FakeHub, hub
from tests.families.flux_parts import comfyui_folder
from tests.server.api_server import Client, api

CONTENT = b"weights of a text encoder" * 40_000


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    pytest.importorskip("huggingface_hub")
    with hub({"maker/model/a.safetensors": CONTENT, "maker/model/b.safetensors": b"small"}) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield found


def files_for(base: Path, *names: str) -> dict[str, Any]:
    """The answer to `download_files`."""
    files = [{"repository": "maker/model", "file": name, "path": str(base / "models" / "vae" / name)} for name in names]
    return {"title": "A model", "files": files}


async def once(client: Client, *states: str) -> dict[str, Any]:
    """The last download, as soon as it is in one of some states."""
    while True:
        found: dict[str, Any] = (await client.ask("GET", "/downloads"))["downloads"][0]
        if found["state"] in states:
            return found
        await asyncio.sleep(0.02)


async def test_a_download_goes_on_by_itself_and_is_cancelled_and_continued(
    client: Client, served: FakeHub, tmp_path: Path
) -> None:
    served.gate.clear()
    body = {"kind": "release", "name": "sdxl"}
    client.context.assistant.made_up["download_files"] = files_for(tmp_path, "a.safetensors", "b.safetensors")
    added = await client.ask("POST", "/downloads", body, status=201)
    assert (added["title"], added["state"], added["subject"]) == ("A model", "running", "release:sdxl")
    assert "already; wait for it" in await client.error("POST", "/downloads", body, status=409)
    assert "cancel it first" in await client.error("DELETE", f"/downloads/{added['id']}", status=409)
    waiting = await client.ask("POST", "/downloads", {"kind": "model", "name": "x"}, status=201)
    assert waiting["state"] == "waiting"  # one at a time
    await client.ask("POST", f"/downloads/{waiting['id']}/cancel")
    await client.ask("DELETE", f"/downloads/{waiting['id']}")
    while not served.bytes_asked:
        await asyncio.sleep(0.02)
    stopped = await client.ask("POST", f"/downloads/{added['id']}/cancel")
    assert stopped["state"] == "cancelled"
    assert "nothing to cancel" in await client.error("POST", f"/downloads/{added['id']}/cancel", status=409)
    served.gate.set()
    while client.context.downloads._all[added["id"]].child is not None:
        await asyncio.sleep(0.02)
    await client.ask("POST", "/downloads", body, status=201)
    done = await once(client, "completed", "failed")
    assert (done["error"], done["done_bytes"] <= done["total_bytes"]) == ("", True)
    assert len((await client.ask("GET", "/downloads"))["downloads"]) == 1  # the first one is continued by it
    await client.context.downloads.stop()
    assert "there is no download" in await client.error("DELETE", "/downloads/99", status=404)
    vae = tmp_path / "models" / "vae"
    assert {one.name: one.read_bytes() for one in vae.iterdir()} == {
        "a.safetensors": CONTENT,
        "b.safetensors": b"small",
    }


async def test_a_download_that_fails_says_why(
    client: Client, served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.gated = {"maker/model"}
    client.context.assistant.made_up["download_files"] = files_for(tmp_path, "a.safetensors")
    await client.ask("POST", "/downloads", {"kind": "release", "name": "sdxl"}, status=201)
    failed = await once(client, "failed", "completed")
    assert "the licence of maker/model to be accepted" in failed["error"]
    assert failed["accept"] == f"{served.address}/maker/model"
    monkeypatch.setattr(server_downloads, "COMMAND", ("/nonexistent",))
    await client.ask("POST", "/downloads", {"kind": "release", "name": "z-image"}, status=201)
    assert "it cannot be started" in (await once(client, "failed"))["error"]


async def test_nothing_is_asked_of_the_hub_before_it_is_wanted(client: Client) -> None:
    found = await client.ask("GET", "/shelf")
    rows = {one["name"]: one for one in found["models"]}
    assert {"sd1.5", "sdxl", "z-image", "flux.1-dev"} <= rows.keys()
    assert rows["flux.1-dev"]["gated"] and "Non-Commercial" in rows["flux.1-dev"]["licence"]
    assert [one["file"] for one in rows["z-image"]["files"]] == [
        "z_image_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"
    ]  # fmt: skip
    assert not any(file["found"] for row in rows.values() for file in row["files"])
    sizes = [sum(file["size_bytes"] for file in row["files"]) for row in found["models"]]
    assert sizes == sorted(sizes)
    assert "did you mean 'sdxl'" in await client.error("POST", "/downloads", {"kind": "release", "name": "sdxxl"})
    assert "no model 'x'" in await client.error("POST", "/downloads", {"kind": "model", "name": "x"})


async def test_a_token_is_stored_by_pages_of_this_machine_alone(tmp_path: Path, client: Client) -> None:
    client.context.assistant.made_up["store_hub_token"] = {"stored": True}
    assert await client.ask("PUT", "/hub-token", {"token": "hf_x"}) == {"stored": True}
    async with api(tmp_path / "other", host="0.0.0.0", token="t" * 12) as other:
        assert "run hf auth login there" in await other.error("PUT", "/hub-token", {"token": "hf_x"})
        assert other.context.assistant.asked == []


def sent(name: str, content: bytes) -> FormData:
    form = FormData()
    form.add_field("file", io.BytesIO(content), filename=name)
    return form


async def test_a_model_file_that_is_sent_goes_where_it_belongs(client: Client, tmp_path: Path) -> None:
    model = (BUILT_IN_BASE / "models" / "checkpoints" / "lorasmith-tiny.safetensors").read_bytes()
    added = await client.ask("POST", "/models", status=201, data=sent("My-model.safetensors", model))
    assert added == {
        "file": "My-model.safetensors", "place": "models/checkpoints", "model": "My-model.safetensors"
    }  # fmt: skip
    again = await client.error("POST", "/models", status=409, data=sent("my-MODEL.safetensors", model))
    assert "already; rename the other one" in again
    assert "a model must be a file" in await client.error("POST", "/models", data=sent("model.ckpt", b"x"))
    assert "cannot be used" in await client.error("POST", "/models", data=sent("broken.safetensors", b"x"))
    nothing = FormData({"name": "x"}, default_to_multipart=True)
    assert "holds no file" in await client.error("POST", "/models", data=nothing)
    assert (tmp_path / "models" / "checkpoints" / "My-model.safetensors").read_bytes() == model
    uploads = tmp_path / "user" / "lorasmith" / "uploads"
    assert [one for one in uploads.rglob("*") if one.is_file()] == []


def test_what_a_release_needs_is_on_the_hub_or_in_its_file() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([\d.]+) \| \[", page, flags=re.MULTILINE)
    assert rows == [
        (name, release.title, f"{shelf.gigabytes_of(family, release):.1f}")
        for name, (family, release) in shelf.releases().items()
    ]
    for family, release in shelf.releases().values():
        for component, slot in family.slots.items():
            slot = release.encoders.get(component, slot)
            assert component in release.holds or slot.hub is not None, (release.name, component)
        assert release.hub.path.count("/") >= 1 and release.card.count("/") == 1
    slots = [slot for _, family in FAMILIES.items() for slot in family.slots.values() if slot.hub is not None]
    places = {(slot.usual_file, slot.hub) for slot in slots}
    assert len({name for name, _ in places}) == len(places)  # a file is in one place
    assert all(" " not in slot.usual_file for slot in slots)
    assert HubFolder("owner/name/deep/in", 1.0).file("x") == ("owner/name", "deep/in/x")
    assert isinstance(FAMILIES["flux1"].text_encoders["text_encoder_2"], EncoderSlot)


@pytest.mark.slow
def test_the_memory_of_a_release_is_known_before_it_is_there(tmp_path: Path) -> None:
    found = shelf.memory_of("wan-2.1-1.3b")
    assert 2.7e9 < found.weights["none"] < 3.0e9  # bf16
    assert found.text_encoders == {"text_encoder": 6_740_000_000}
    assert found.fits and found.encoders_fit


async def test_parts_that_are_here_are_not_missing(tmp_path: Path) -> None:
    base = comfyui_folder(tmp_path)
    found = shelf.wanted_files(Folders(base), "flux.1-dev")
    here = {one.component: one.found and one.found.name for one in found.files}
    assert here == {
        "denoiser": "flux1-dev.safetensors", "text_encoder": None, "text_encoder_2": None, "vae": "ae.safetensors"
    }  # fmt: skip
    assert [one.hub.path.name for one in found.missing] == ["clip_l.safetensors", "t5xxl_fp16.safetensors"]
    assert {one.hub.path.parent for one in found.missing} == {base / "models" / "text_encoders"}

    (base / "models" / "text_encoders" / "t5xxl_fp16.safetensors").unlink()
    async with api(base) as client:
        flux = next(one for one in (await client.ask("GET", "/models"))["models"] if one["title"] == "flux1-dev")
        assert flux["missing"] == [{"part": "text_encoder_2", "usual_file": "t5xxl_fp16.safetensors", "on_hub": True}]
        files = await client.context.assistant.ask("download_files", kind="model", name=flux["name"])
        assert [one["repository"] for one in files["files"]] == ["comfyanonymous/flux_text_encoders"]
        assert "nothing of lorasmith-tiny is missing" in await client.error(
            "POST", "/downloads/check", {"kind": "model", "name": "lorasmith-tiny"}
        )
