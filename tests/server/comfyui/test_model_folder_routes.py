from __future__ import annotations

import asyncio
from pathlib import Path

from lorasmith.server.comfyui.all_routes import MODEL_KINDS
from lorasmith.server.dispatcher import RefusedError
from tests.server.fake_server import serving


def put(path: Path, content: bytes = b"some") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_models_are_listed_by_kind(tmp_path: Path) -> None:
    put(tmp_path / "models" / "loras" / "sub" / "a.safetensors")
    put(tmp_path / "models" / "embeddings" / "word.safetensors")
    put(tmp_path / "models" / "upscale_models" / "x.pth")

    async def main() -> None:
        async with serving(tmp_path) as server:
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

    asyncio.run(main())


def test_metadata_is_read_by_the_assistant(tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            server.assistant.answers["file_metadata"] = {"a": "b"}
            assert await server.get("/view_metadata/loras?filename=a.safetensors") == {"a": "b"}
            await server.get("/view_metadata/loras?filename=a.ckpt", status=404)
            await server.get("/view_metadata/loras", status=404)
            await server.get("/view_metadata/none?filename=a.safetensors", status=404)
            server.assistant.answers["file_metadata"] = None
            await server.get("/view_metadata/loras?filename=a.safetensors", status=404)
            server.assistant.answers["file_metadata"] = RefusedError("ModelError", "no such file")
            await server.get("/view_metadata/loras?filename=../a.safetensors", status=404)

    asyncio.run(main())


def test_pictures_of_models_are_files_beside_them(tmp_path: Path) -> None:
    put(tmp_path / "models" / "loras" / "a.safetensors")
    put(tmp_path / "models" / "loras" / "a.preview.png", b"picture")
    put(tmp_path / "models" / "secret.png")

    async def main() -> None:
        async with serving(tmp_path) as server:
            async with server.http.get("/experiment/models/preview/loras/0/a.safetensors") as answer:
                assert (await answer.read(), answer.content_type) == (b"picture", "image/png")
            for path in (
                "loras/0/b.safetensors",
                "loras/9/a.safetensors",
                "none/0/a.safetensors",
                "loras/x/a.safetensors",
            ):
                await server.get(f"/experiment/models/preview/{path}", status=404)
            await server.get("/experiment/models/preview/loras/0/..%2Fsecret.safetensors", status=403)

    asyncio.run(main())
