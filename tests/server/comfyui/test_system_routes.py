from __future__ import annotations

from lorasmith.server.comfyui.all_routes import PREFIXES
from tests.server.fake_server import Played


async def test_system_stats_name_a_device_even_before_workers_run(server: Played) -> None:
    found = await server.get("/system_stats")
    assert found["system"]["comfyui_version"].count(".") == 2
    assert found["system"]["ram_total"] > found["system"]["ram_free"] > 0
    assert found["devices"][0]["type"] == "cpu"
    gpu = {"name": "cuda:1", "title": "Some GPU", "memory_bytes": 8, "free_bytes": 5}
    server.context.dispatcher.devices = lambda: [gpu]  # type: ignore[method-assign]
    (device,) = (await server.get("/system_stats"))["devices"]
    assert device == {
        "name": "Some GPU",
        "type": "cuda",
        "index": 1,
        "vram_total": 8,
        "vram_free": 5,
        "torch_vram_total": 8,
        "torch_vram_free": 5,
    }


async def test_the_editor_gets_an_answer_to_all_that_it_asks(server: Played) -> None:
    for prefix in PREFIXES:
        words = await server.get(f"{prefix}/i18n")
        assert "Lorasmith" in words["en"]["rightSidePanel"]["missingNodePacks"]["ossManagerDisabledHint"]
        for path in ("workflow_templates", "global_subgraphs", "node_replacements"):
            assert await server.get(f"{prefix}/{path}") == {}
        assert (await server.get(f"{prefix}/features"))["supports_preview_metadata"] is True
        assert await server.get(f"{prefix}/internal/files/input") == []
        assert "loras" in await server.get(f"{prefix}/internal/folder_paths")
        assert await server.get(f"{prefix}/users") == {"storage": "server", "migrated": True}


async def test_the_log_is_shown(server: Played) -> None:
    server.context.log.add("worker", "a line")
    raw = await server.get("/internal/logs/raw")
    assert [one["m"] for one in raw["entries"]] == ["a line\n"]
    assert raw["size"].keys() == {"cols", "rows"}
    assert (await server.get("/internal/logs")).endswith(" - a line\n")
