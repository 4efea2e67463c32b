from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import typer
from family_cases import fill_files
from original_models import save
from safetensors.torch import save_file
from transformer_models import TINY
from typer.testing import CliRunner

from lorasmith.cli import models as models_command
from lorasmith.core.folders import Folders
from lorasmith.runs.model_list import ModelList, list_models
from tests.families.flux_parts import comfyui_folder, denoiser, t5


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> ModelList:
    """A folder with a whole Flux.1, one that lacks its T5, one of an unsupported kind, and files of nobody."""
    base = comfyui_folder(tmp_path_factory.mktemp("comfyui"))
    place = base / "models" / "diffusion_models"
    tensors = denoiser(1)
    wide = {**tensors, "txt_in.weight": torch.zeros(256, 32)}
    save_file({name: tensor.half() for name, tensor in wide.items()}, place / "other-width.safetensors")
    save_file({**tensors, "img_in.weight": torch.zeros(256, 128)}, place / "canny.safetensors")
    save_file(t5(width=48), base / "models" / "text_encoders" / "nobodys.safetensors")
    save_file({"a.weight": torch.zeros(2, 2)}, base / "models" / "vae" / "odd.safetensors")
    (base / "models" / "vae" / "cut.safetensors").write_bytes(b"cut")
    return list_models(Folders(base))


def test_models_come_with_the_parts_that_fit_them(found: ModelList) -> None:
    models = {one.path.name: one for one in found.models}
    assert list(models) == ["flux1-dev.safetensors", "other-width.safetensors", "lorasmith-tiny.safetensors"]
    flux, other, tiny = models.values()
    assert (flux.family, flux.precision, flux.place, flux.is_whole) == (
        "Flux.1",
        "fp32",
        "models/diffusion_models",
        True,
    )
    files = {part.component: part.path and part.path.name for part in flux.parts}
    assert files == {
        "text_encoder": "clip_l.safetensors", "text_encoder_2": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"
    }  # fmt: skip
    assert (other.precision, other.is_whole) == ("fp16", False)
    assert [(part.kind, part.usual_file) for part in other.missing] == [("t5xxl", "t5xxl_fp16.safetensors")]
    assert tiny.is_whole and {part.path for part in tiny.parts} == {tiny.path}


def test_what_fits_no_model_is_listed_apart(found: ModelList) -> None:
    assert [(one.path.name, one.what) for one in found.unused] == [
        ("nobodys.safetensors", "text encoder t5xxl of width 48")
    ]
    unknown = {one.path.name: one.what for one in found.unknown}
    assert set(unknown) == {"odd.safetensors", "cut.safetensors", "canny.safetensors"}
    assert "of no supported architecture" in unknown["odd.safetensors"]
    assert "with 64 (dev, schnell, Kontext) and 384 (Fill) are supported" in unknown["canny.safetensors"]


def test_an_empty_folder_has_the_built_in_model_alone(tmp_path: Path) -> None:
    found = list_models(Folders(tmp_path))
    assert [one.place for one in found.models] == ["the package"]
    assert (found.unused, found.unknown) == ((), ())


def test_edit_models_are_told_by_their_names_or_tensors(tmp_path: Path) -> None:
    fill_files(tmp_path)
    dev = TINY["flux1"].saved(tmp_path)["transformer"]
    shutil.copy(dev, dev.with_name("flux1-dev-kontext_fp8_scaled.safetensors"))
    TINY["flux2-klein"].saved(tmp_path)
    qwen = TINY["qwen-image"].saved(tmp_path)["transformer"]
    shutil.copy(qwen, qwen.with_name("qwen_image_edit_2509_bf16.safetensors"))
    told = {**TINY["qwen-image"].denoiser_tensors(), "__index_timestep_zero__": torch.zeros(0)}
    save(qwen.with_name("repacked.safetensors"), told)
    app = typer.Typer()
    models_command.register(app)
    shown = CliRunner().invoke(app, ["models", "--base-dir", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    lines = [line.strip() for line in shown.output.splitlines()]
    for file, told in {
        "flux1-dev.safetensors": "no edit model, by its name (--edit kontext if it is)",
        "flux1-dev-kontext_fp8_scaled.safetensors": "edit model kontext, by its name (--edit none if it is not)",
        "qwen_image_bf16.safetensors": "no edit model, by its name (--edit edit-2511 or edit-2509 or edit if it is)",
        "qwen_image_edit_2509_bf16.safetensors": "edit model edit-2509, by its name (--edit none if it is not)",
        "repacked.safetensors": "edit model edit-2511, by its tensors (--edit none if it is not)",
        "flux1-fill-dev.safetensors": "paints what a mask covers, by its tensors",
        "flux-2-klein-base-4b.safetensors": "takes pictures to edit or refer to, as all of its family",
    }.items():
        (at,) = [index for index, line in enumerate(lines) if line.startswith(file)]
        assert told in lines[at : at + 3], lines
