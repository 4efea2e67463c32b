from __future__ import annotations

from pathlib import Path

from lorasmith.server.comfyui.all_routes import MODEL_KINDS
from lorasmith.server.dispatcher import RefusedError
from tests.server.fake_server import Played


def put(path: Path, content: bytes = b"some") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


async def test_models_are_listed_by_kind(server: Played, tmp_path: Path) -> None:
    put(tmp_path / "models" / "loras" / "sub" / "a.safetensors")
    put(tmp_path / "models" / "embeddings" / "word.safetensors")
    put(tmp_path / "models" / "upscale_models" / "x.pth")
    kinds = await server.get("/models")
    assert {*MODEL_KINDS, "upscale_models"} == {*kinds}
    assert await server.get("/models/loras") == ["sub/a.safetensors"]
    assert "lorasmith-tiny.safetensors" in await server.get("/api/models/checkpoints")
    assert await server.get("/models/clip") == await server.get("/models/text_encoders")
    assert await server.get("/embeddings") == ["word"]
    await server.get("/models/none", status=404)
    await server.get("/models/..%2F..", status=404)
    folders = {one["name"]: one["folders"] for one in await server.get("/experiment/models")}
    assert str(tmp_path / "models" / "loras") in folders["loras"]
    (file,) = await server.get("/experiment/models/loras")
    assert (file["name"], file["pathIndex"], file["size"]) == ("sub/a.safetensors", 0, 4)
    await server.get("/experiment/models/none", status=404)


async def test_metadata_is_read_by_the_assistant(server: Played) -> None:
    server.assistant.answers["file_metadata"] = {"a": "b"}
    assert await server.get("/view_metadata/loras?filename=a.safetensors") == {"a": "b"}
    await server.get("/view_metadata/loras?filename=a.ckpt", status=404)
    await server.get("/view_metadata/loras", status=404)
    await server.get("/view_metadata/none?filename=a.safetensors", status=404)
    server.assistant.answers["file_metadata"] = None
    await server.get("/view_metadata/loras?filename=a.safetensors", status=404)
    server.assistant.answers["file_metadata"] = RefusedError("ModelError", "no such file")
    await server.get("/view_metadata/loras?filename=../a.safetensors", status=404)


async def test_pictures_of_models_are_files_beside_them(server: Played, tmp_path: Path) -> None:
    put(tmp_path / "models" / "loras" / "a.safetensors")
    put(tmp_path / "models" / "loras" / "a.preview.png", b"picture")
    put(tmp_path / "models" / "secret.png")
    async with server.http.get("/experiment/models/preview/loras/0/a.safetensors") as answer:
        assert (await answer.read(), answer.content_type) == (b"picture", "image/png")
    for path in ("loras/0/b.safetensors", "loras/9/a.safetensors", "none/0/a.safetensors", "loras/x/a.safetensors"):
        await server.get(f"/experiment/models/preview/{path}", status=404)
    await server.get("/experiment/models/preview/loras/0/..%2Fsecret.safetensors", status=403)
