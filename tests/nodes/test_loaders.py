from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flux_files import save_flux_files

from lorasmith.adapters.frozen_layer import packed_layers
from lorasmith.core.errors import ModelError
from lorasmith.core.folders import Folders
from lorasmith.nodes import load_nodes
from lorasmith.workflow import object_info


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, Path]:
    return save_flux_files(tmp_path)


def test_a_checkpoint_gives_three_handles_on_one_model(bench: Any) -> None:
    (model,), (clip,), (vae,) = bench.call("CheckpointLoaderSimple", ckpt_name="lorasmith-tiny.safetensors").outputs
    assert clip.encoders.modules == model.base.components.text_encoders
    assert vae.module is model.base.components.vae
    assert model.base.title == clip.title == vae.title == "lorasmith-tiny"
    assert next(model.module.parameters()).dtype == torch.float16  # as the file has it


def test_a_missing_checkpoint_is_refused_with_the_nearest_name(bench: Any) -> None:
    with pytest.raises(ModelError, match=r"did you mean 'lorasmith-tiny.safetensors'"):
        bench.call("CheckpointLoaderSimple", ckpt_name="lorasmith-tinny")


def test_parts_are_loaded_from_their_folders(bench: Any, flux: dict[str, Path]) -> None:
    model = bench.one("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default")
    names = {"clip_name1": "t5xxl_fp16.safetensors", "clip_name2": "clip_l.safetensors"}  # in any order
    clip = bench.one("DualCLIPLoader", **names, type="flux")
    vae = bench.one("VAELoader", vae_name="ae.safetensors")
    assert model.base.family.name == clip.family.name == "flux1"
    assert model.base.components.text_encoders == {}
    assert list(clip.encoders.modules) == ["text_encoder", "text_encoder_2"]
    assert vae.latent.channels == model.base.components.latent.channels == 16
    (encoded,) = bench.one("CLIPTextEncode", text="a fox", clip=clip)
    model.check_conditionings([encoded])


@pytest.mark.slow
def test_one_encoder_is_one_of_a_family_by_its_type(bench: Any, flux: dict[str, Path]) -> None:
    for name in ("stable_diffusion", "Stable_Diffusion", "no such type"):
        clip = bench.one("CLIPLoader", clip_name="clip_l.safetensors", type=name)
        assert clip.family.name == "sd1"
    three = {f"clip_name{number}": "clip_l.safetensors" for number in (1, 2, 3)}
    assert bench.one("TripleCLIPLoader", **three).family.name == "sd1"
    assert bench.one("QuadrupleCLIPLoader", **three, clip_name4="clip_l.safetensors").family.name == "sd1"


@pytest.mark.slow
def test_an_encoder_may_stay_on_the_processor(bench: Any, flux: dict[str, Path]) -> None:
    def device(choice: str) -> Any:
        return bench.one("CLIPLoader", clip_name="clip_l.safetensors", type="flux", device=choice).device

    assert device("cpu") == torch.device("cpu")
    assert device("default") is device("gpu:7") is None


def test_a_file_of_another_part_is_refused_by_what_it_is(bench: Any, flux: dict[str, Path]) -> None:
    flux["vae"].rename(flux["clip_l"].with_name("ae.safetensors"))
    with pytest.raises(ModelError, match=r"is an autoencoder of kind kl with 16 channels"):
        bench.call("CLIPLoader", clip_name="ae.safetensors", type="flux")


@pytest.mark.parametrize(
    ("weight_dtype", "code"),
    [("fp8_e4m3fn", torch.float8_e4m3fn), ("fp8_e4m3fn_fast", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_weights_are_rounded_to_fp8_without_scales(
    bench: Any, flux: dict[str, Path], weight_dtype: str, code: torch.dtype
) -> None:
    plain = bench.one("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype="default").module
    model = bench.one("UNETLoader", unet_name="flux1-dev.safetensors", weight_dtype=weight_dtype).module
    packed = packed_layers(model)
    assert set(packed) == {path for path, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    for path, source in packed.items():
        weight = plain.get_submodule(path).weight
        assert source.tensors[0].dtype == code
        assert torch.equal(source.weight(), weight.to(code).to(weight.dtype))
    assert bool(bench.messages("info")) == weight_dtype.endswith("_fast")


def test_files_are_listed_and_older_folders_are_searched(tmp_path: Path, flux: dict[str, Path]) -> None:
    (tmp_path / "models" / "unet").mkdir()
    (tmp_path / "models" / "unet" / "old.safetensors").touch()

    def choices(node: str, name: str) -> list[str]:
        found: list[str] = object_info(load_nodes()[node], Folders(tmp_path))["input"]["required"][name][1]["options"]
        return found

    assert choices("UNETLoader", "unet_name") == ["flux1-dev.safetensors", "old.safetensors"]
    assert choices("CLIPLoader", "clip_name") == ["clip_l.safetensors", "t5xxl_fp16.safetensors"]
    assert choices("VAELoader", "vae_name") == ["ae.safetensors"]
