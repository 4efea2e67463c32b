"""Parameters read from files one at a time are those of the loaded model, whatever the file's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorasmith.core.adapter_state import DENOISER, ModuleRef
from lorasmith.core.errors import ModelError
from lorasmith.families.model import Model
from lorasmith.toolbox.model_files import ModelReader, Parameter, open_model


def parts_of(model: Model) -> dict[str, nn.Module]:
    return {DENOISER: model.components.denoiser, **model.components.text_encoders}


def assert_same(files: ModelReader, model: Model) -> None:
    """Every parameter of the loaded model is found, and has the bits that it has there."""
    loaded = {
        (component, name if component == DENOISER or name.startswith("text_model.") else f"text_model.{name}"): tensor
        for component, module in parts_of(model).items()
        for name, tensor in module.named_parameters()
    }
    found = {(p.module.component, f"{p.module.path}.{p.name}"): p for p in files.places}
    assert found.keys() == loaded.keys()
    for key, tensor in loaded.items():
        read = files.read(found[key])
        assert torch.equal(read.to(tensor.dtype), tensor), key
    assert files.names.denoiser == model.names.denoiser
    assert files.names.text_encoders == model.names.text_encoders
    assert files.parameterization == model.components.parameterization


def test_the_built_in_model(tiny: Model) -> None:
    assert_same(open_model("lorasmith-tiny"), tiny)


def test_a_diffusers_folder(folder: Path, tiny: Model) -> None:
    files = open_model(folder)
    assert_same(files, tiny)
    assert {file.name for file in files.files()} == {"diffusion_pytorch_model.safetensors", "model.safetensors"}


def test_fused_projections_of_a_transformer(flux_file: Path, flux: Model) -> None:
    assert_same(open_model(flux_file), flux)


def test_fused_projections_of_a_text_encoder(sd2_file: Path, sd2: Model) -> None:
    files = open_model(sd2_file)
    assert_same(files, sd2)
    place = files.places[Parameter(ModuleRef("text_encoder", "text_model.encoder.layers.0.self_attn.k_proj"), "weight")]
    assert place.tensor == "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    assert place.rows == slice(64, 128)


def test_rows_whose_halves_change_places(flux_file: Path) -> None:
    place = open_model(flux_file).places[Parameter(ModuleRef(DENOISER, "norm_out.linear"), "weight")]
    assert isinstance(place.rows, torch.Tensor)
    assert place.rows.tolist() == [*range(256, 512), *range(256)]


def test_a_folder_in_shards(folder: Path, tiny: Model, tmp_path: Path) -> None:
    copy = tmp_path / "sharded"
    shutil.copytree(folder, copy)
    whole = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, copy / "unet" / file)
    index = {"weight_map": {name: file for file, chosen in shards.items() for name in chosen}}
    (copy / "unet" / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()

    assert_same(open_model(copy), tiny)


def test_layers_have_no_weights(flux_file: Path, folder: Path) -> None:
    for source in (flux_file, folder):
        assert all(p.is_meta for module in open_model(source).modules.values() for p in module.parameters())


def test_what_a_model_predicts_is_read_from_a_folder(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "epsilon"
    shutil.copytree(folder, copy)
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "epsilon"}))
    assert open_model(copy).parameterization == "epsilon"


def broken(copy: Path, case: str) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    match case:
        case "no index":
            (copy / "model_index.json").unlink()
        case "unknown pipeline":
            (copy / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
        case "no denoiser":
            (copy / "unet" / "config.json").unlink()
        case "damaged configuration":
            (copy / "unet" / "config.json").write_text("{")
        case "no model's name":
            (copy / "unet" / "config.json").write_text('{"_class_name": "logging"}')
        case "settings of another class":
            (copy / "unet" / "config.json").write_text(
                '{"_class_name": "UNet2DConditionModel", "block_out_channels": []}'
            )
        case "pickled weights":
            weights.rename(weights.with_suffix(".bin"))
        case _:
            tensors = load_file(weights)
            tensors.pop("conv_in.weight")
            save_file(tensors, weights)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no index", "is not a diffusers model"),
        ("unknown pipeline", "of an unsupported architecture"),
        ("no denoiser", "config.json"),
        ("damaged configuration", "config.json is not valid JSON"),
        ("no model's name", "logging is not a model"),
        ("settings of another class", "cannot be read as a diffusers model"),
        ("pickled weights", "must hold its weights as safetensors"),
        ("a tensor is missing", "lack conv_in.weight"),
    ],
)
def test_a_folder_that_cannot_be_used_is_a_sentence(folder: Path, tmp_path: Path, case: str, sentence: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    broken(copy, case)
    with pytest.raises(ModelError, match=sentence):
        open_model(copy)


def test_files_that_are_no_models_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        open_model(tmp_path / "none.safetensors")
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(ModelError, match="of no supported architecture"):
        open_model(tmp_path / "odd.safetensors")
