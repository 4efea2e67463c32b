"""Models that come as several files, from the outside: flags for the parts, parts that are found, and runs repeated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.families.base import FAMILIES
from lorasmith.runs.memory_estimate import MemoryEstimate
from tests.families.flux_parts import comfyui_folder

Command = Callable[..., Any]
QUICK = ("--steps", 2, "--rank", 2, "--targets", "*.attn.to_q", "--resolution", 64, "--validation-share", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return comfyui_folder(tmp_path_factory.mktemp("comfyui"))


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """`models` of a ComfyUI folder of its own."""
    return Path(shutil.copytree(made, tmp_path / "comfyui")) / "models"


@pytest.mark.slow
def test_a_run_finds_its_parts_and_is_repeated_with_them(
    lorasmith: Command, photos: Path, models: Path, tmp_path: Path
) -> None:
    ran = lorasmith(
        "train", photos, "--model", "flux1-dev.safetensors", "--base-dir", models.parent, *QUICK, "--output", "run"
    )
    assert ran.code == 0, ran.err
    for line in (
        "text encoder: clip_l.safetensors (found in models/text_encoders)",
        "text encoder: t5xxl_fp16.safetensors (found in models/text_encoders)",
        "autoencoder: ae.safetensors (found in models/vae)",
    ):
        assert line in ran.out, line
    encoders = [str(models / "text_encoders" / name) for name in ("clip_l.safetensors", "t5xxl_fp16.safetensors")]
    vae, denoiser = str(models / "vae" / "ae.safetensors"), str(models / "diffusion_models" / "flux1-dev.safetensors")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["source"]["text_encoders"], record["source"]["vae"]) == (encoders, vae)
    assert record["model"]["files"]["text_encoder_2"] == encoders[1]
    drawing = f"lorasmith generate --model {denoiser} --text-encoder {encoders[0]} --text-encoder {encoders[1]} --vae"
    assert drawing in ran.out
    report = (tmp_path / "run" / "report.html").read_text()
    assert drawing in report and drawing.replace("generate", f"train {photos}") in report

    again = lorasmith("reproduce", "run/photos.safetensors", "--output", "again")
    assert again.code == 0, again.out + again.err
    assert "are bit-identical" in again.out
    moved = shutil.move(models / "vae" / "ae.safetensors", tmp_path / "moved.safetensors")
    assert "ae.safetensors does not exist" in lorasmith("reproduce", "run/photos.safetensors", "--dry-run").err
    dry = lorasmith("reproduce", "run/photos.safetensors", "--dry-run", "--vae", moved)
    assert "initial weights are the same" in dry.out, dry.err


def test_a_missing_part_is_refused_with_the_file_to_get(
    lorasmith: Command, photos: Path, models: Path, tmp_path: Path
) -> None:
    (models / "text_encoders" / "t5xxl_fp16.safetensors").unlink()
    (models / "text_encoders" / "broken.safetensors").write_bytes(b"broken")
    ran = lorasmith("train", photos, "--model", "flux1-dev.safetensors", "--base-dir", models.parent, *QUICK)

    assert ran.code == 1
    assert "Flux.1 needs the text encoder t5xxl" in ran.err and "t5xxl_fp16.safetensors" in ran.err
    assert "broken.safetensors in models/text_encoders is skipped" in ran.out
    assert not (tmp_path / "runs").exists()


def test_models_are_listed_with_their_parts(lorasmith: Command, models: Path) -> None:
    (models / "vae" / "ae.safetensors").unlink()
    (models / "vae" / "odd.safetensors").write_bytes(b"odd")
    ran = lorasmith("models", "--base-dir", models.parent)
    assert ran.code == 0, ran.err
    for line in (
        "Flux.1",
        "  flux1-dev.safetensors (",
        " MB, fp32) in models/diffusion_models",
        "    with clip_l.safetensors, t5xxl_fp16.safetensors",
        "    missing: kl (usually ae.safetensors)",
        "  lorasmith-tiny.safetensors (",
        "    whole",
        "Not recognised",
        "  odd.safetensors in models/vae: ",
    ):
        assert line in ran.out, line
    parsed = json.loads(lorasmith("models", "--base-dir", models.parent, "--json").out)
    assert [one["is_whole"] for one in parsed["models"]] == [False, True]


def test_a_desktops_part_of_the_card_is_left_to_it(
    lorasmith: Command, monkeypatch: pytest.MonkeyPatch, tiny_estimate: MemoryEstimate
) -> None:
    """The built-in model fits a card of 1 GiB, of which the driver takes half, but not beside a desktop."""
    monkeypatch.setattr("lorasmith.runs.memory_estimate.estimate_memory", lambda *_, **__: tiny_estimate)
    for flags, drives_display, left in (
        ((), False, 0),
        ((), True, 768),
        (("--desktop",), False, 768),
        (("--no-desktop",), True, 0),
    ):
        monkeypatch.setattr("lorasmith.core.placement.drives_display", lambda says=drives_display: says)
        ran = lorasmith("plan", "--model", "lorasmith-tiny", "--memory", 1, *flags)
        assert ("Desktop   768 MiB are left to it" in ran.out) is bool(left)
        assert ("Fits 1.0 GiB" in ran.out, ran.code) == ((False, 1) if left else (True, 0))
        ran = lorasmith("plan", "--model", "lorasmith-tiny", "--memory", 1, *flags, "--json")
        assert json.loads(ran.out)["desktop_bytes"] == left * 2**20


@pytest.mark.slow
def test_known_families_are_listed_with_their_files(lorasmith: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = lorasmith("models", "--known")
    assert ran.code == 0
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    (line,) = (line for line in ran.out.splitlines() if line.startswith("Krea 2"))
    assert line.split() == ["Krea", "2", "12.8", "B", "qwen3vl_4b_bf16", "qwen_image_vae", "1024", "px"]
    listed = json.loads(lorasmith("models", "--known", "--json").out)
    assert {one["title"] for one in listed} == {one.title for _, one in FAMILIES.items() if one.released is not None}
