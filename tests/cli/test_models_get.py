"""`lorasmith models --get`: what it downloads; the download itself is tested in `tests/runs/test_hub_download.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorasmith.cli.main import app
from lorasmith.runs import captioner_shelf, hub_download
from lorasmith.runs.hub_download import HubFile, Progress


def test_what_is_missing_is_downloaded_to_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[HubFile] = []

    def download(files: Sequence[HubFile], *, on_progress: Any) -> None:
        got.extend(files)
        on_progress(Progress(files[0].path.name, 10**9, 2 * 10**9, 5e7))

    monkeypatch.setattr(hub_download, "download", download)
    done = CliRunner().invoke(app, ["models", "--get", "z-image", "--base-dir", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert [one.path.relative_to(tmp_path).as_posix() for one in got] == [
        "models/diffusion_models/z_image_bf16.safetensors",
        "models/text_encoders/qwen_3_4b.safetensors",
        "models/vae/ae.safetensors",
    ]
    assert json.loads(done.stdout) == {
        part: str(one.path) for part, one in zip(("denoiser", "text_encoder", "vae"), got, strict=True)
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--get", "z-imge"], "did you mean 'z-image'"), (["--get", "sdxl", "--known"], "give one of them")],
)
def test_mistakes_are_sentences(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["models", *arguments, "--base-dir", str(tmp_path)])
    assert done.exit_code == 1 and message in " ".join(done.output.split())


def test_a_captioner_is_asked_for_and_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[HubFile] = []
    place = tmp_path / "models" / "captioners" / "florence-2-base"
    files = [HubFile("florence-community/Florence-2-base", name, place / name) for name in ("a.txt", "config.json")]
    place.mkdir(parents=True)
    (place / "a.txt").touch()
    monkeypatch.setattr(captioner_shelf, "files_of", lambda repository, folder: files)
    monkeypatch.setattr(hub_download, "download", lambda files, **_: got.extend(files))
    done = CliRunner().invoke(app, ["models", "--get", "florence-2-base", "--base-dir", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    assert got == files[1:] and json.loads(done.stdout) == {"captioner": str(place)}
