"""The built-in model as a diffusers folder, and small models of other families."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import models
import pytest
import torch
from safetensors.torch import save_file

from lorasmith.families.loading import load_model
from lorasmith.families.locating import built_in_models
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.toolbox import model_files
from lorasmith.toolbox.model_files import ModelReader
from tests.families.original_models import SD2

READ = model_files._single_file


@functools.lru_cache(maxsize=4)
def _read_once(path: Path, _changed_ns: int) -> ModelReader:
    return READ(path)


@pytest.fixture(autouse=True)
def models_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands where in a model's file is found once for each file: it takes longer than most tests."""

    def single_file(path: Path) -> ModelReader:
        return _read_once(path, path.stat().st_mtime_ns) if path.is_file() else READ(path)

    monkeypatch.setattr(model_files, "_single_file", single_file)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as a single file in fp32, in which nothing that is folded in is rounded."""
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    tensors, metadata = read_safetensors(built_in_models()["lorasmith-tiny"])
    save_file({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="session")
def folder(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as diffusers saves it. Nothing may change it."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    components = tiny.components
    components.denoiser.save_pretrained(path / "unet")
    components.vae.save_pretrained(path / "vae")
    components.text_encoders["text_encoder"].save_pretrained(path / "text_encoder")
    components.tokenizers["text_encoder"].save_pretrained(path / "tokenizer")
    for name, content in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "prediction_type": "v_prediction",
        },
    }.items():  # fmt: skip
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Flux.1 with random weights, whose projections are fused."""
    path = tmp_path_factory.mktemp("models") / "flux.safetensors"
    save_file(models.tiny_flux_checkpoint(0), path)
    return path


@pytest.fixture(scope="session")
def flux(flux_file: Path) -> Model:
    return load_model(flux_file)


@pytest.fixture(scope="session")
def sd2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion 2 in fp16, whose text encoder is OpenCLIP's, with fused projections."""
    path = tmp_path_factory.mktemp("models") / "sd2.safetensors"
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in SD2.tensors().items()}
    save_file(tensors, path, {"modelspec.title": "small", "modelspec.hash_sha256": "0xabc"})
    return path


@pytest.fixture(scope="session")
def sd2(sd2_file: Path) -> Model:
    return load_model(sd2_file, dtype=torch.float16)
