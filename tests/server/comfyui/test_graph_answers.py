from __future__ import annotations

import io
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorasmith.core.errors import DataError, GraphError, ModelError
from lorasmith.core.folders import Folders
from lorasmith.server.comfyui import graph_answers as questions


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def saved(path: Path, mode: str = "RGBA", size: tuple[int, int] = (4, 3), **options: object) -> str:
    colour = (200, 100, 50, 128)[: len(mode)]
    Image.new(mode, size, colour).save(path, **options)
    return str(path)


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_definitions_of_all_nodes_or_of_one(folders: Folders) -> None:
    everything = json.loads(questions.object_info(folders))
    assert {"KSampler", "TrainLoraNode", "SaveImage"} <= everything.keys()
    assert json.loads(questions.object_info(folders, node="KSampler")) == {"KSampler": everything["KSampler"]}
    assert questions.object_info(folders, node="Nothing") == b"{}"


def test_prompts_are_checked_and_converted(folders: Folders) -> None:
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    found = questions.check_prompt(folders, prompt=prompt)
    assert found.error is not None and found.error["type"] == "prompt_outputs_failed_validation"
    assert found.node_errors.keys() == {"1"}
    refused = questions.check_prompt(folders, prompt=prompt, targets=[]).error
    assert refused is not None and refused["type"] == "prompt_no_outputs"
    node = {"id": 5, "type": "PreviewAny", "mode": 0}
    assert (
        questions.prompt_of_workflow(folders, workflow={"nodes": [node], "links": []})["5"]["class_type"]
        == "PreviewAny"
    )
    with pytest.raises(GraphError):
        questions.prompt_of_workflow(folders, workflow={"nodes": [{}], "links": []})


def test_nodes_are_documented(folders: Folders) -> None:
    page = questions.node_documentation(folders, node="TrainLoraNode")
    assert page is not None
    assert page.startswith("# Train LoRA")
    assert questions.node_documentation(folders, node="Nothing") is None


def test_metadata_of_files(folders: Folders) -> None:
    tiny = questions.file_metadata(folders, kind="checkpoints", name="lorasmith-tiny.safetensors")
    assert tiny is not None
    assert "lorasmith.architecture" in tiny
    with pytest.raises(ModelError):
        questions.file_metadata(folders, kind="checkpoints", name="none.safetensors")


def test_pictures_by_channel_and_format(folders: Folders, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png")
    plain, colours, alpha = (
        opened(questions.encoded_picture(folders, path=path, channel=channel)) for channel in ("rgba", "rgb", "a")
    )
    assert plain.convert("RGBA").getpixel((0, 0)) == (200, 100, 50, 128)
    assert colours.getpixel((0, 0)) == (200, 100, 50)
    assert alpha.convert("RGBA").getpixel((0, 0)) == (0, 0, 0, 128)
    for kind in ("webp", "jpeg", "png"):
        assert opened(questions.encoded_picture(folders, path=path, format=kind)).format == kind.upper()
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(DataError):
        questions.encoded_picture(folders, path=str(text))


def test_a_picture_of_huge_sides_is_refused_by_its_header(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert questions._MOST_PIXELS < 8001**2
    monkeypatch.setattr(questions, "_MOST_PIXELS", 1_000_000)
    path = Path(saved(tmp_path / "a.png", size=(1_001, 1_000)))
    path.write_bytes(path.read_bytes()[:60])  # whoever decoded it would say that it is cut short
    with pytest.raises(DataError, match="at most 1 million pixels, got 1001×1000"):
        questions.encoded_picture(folders, path=str(path))
    with pytest.raises(DataError, match="at most 1 million pixels, got 1001×1000"):
        questions.masked_picture(folders, original=str(path), mask=str(path))


def test_large_pictures_are_converted_one_at_a_time(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, encoded = saved(tmp_path / "a.png"), questions._encoded
    now, most = [], []

    def counted(*arguments: object) -> bytes:
        now.append(None)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return encoded(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(questions, "_encoded", counted)
    for pixels, wanted in ((2**24, 4), (1, 1)):
        most.clear()
        monkeypatch.setattr("lorasmith.data.image_files._LARGE_PIXELS", pixels)
        started = threading.Barrier(4)

        def ask() -> None:
            started.wait()  # noqa: B023
            questions.encoded_picture(folders, path=path)

        with ThreadPoolExecutor(4) as threads:
            for one in [threads.submit(ask) for _ in range(4)]:
                one.result()
        assert max(most) <= wanted and len(most) == 4


def test_a_picture_without_transparency_is_opaque(folders: Folders, tmp_path: Path) -> None:
    alpha = opened(questions.encoded_picture(folders, path=saved(tmp_path / "a.png", "RGB"), channel="a"))
    assert alpha.convert("RGBA").getpixel((0, 0)) == (0, 0, 0, 255)


def test_a_mask_replaces_transparency_and_keeps_colours_and_metadata(folders: Folders, tmp_path: Path) -> None:
    metadata = PngInfo()
    metadata.add_text("prompt", "{}")
    original = saved(tmp_path / "a.png", pnginfo=metadata)
    Image.new("RGBA", (4, 3), (0, 0, 0, 7)).save(tmp_path / "mask.png")
    masked = opened(questions.masked_picture(folders, original=original, mask=str(tmp_path / "mask.png")))
    assert masked.getpixel((0, 0)) == (200, 100, 50, 7)
    assert masked.info["prompt"] == "{}"
    other = saved(tmp_path / "other.png", size=(5, 5))
    with pytest.raises(DataError, match="size"):
        questions.masked_picture(folders, original=original, mask=other)
