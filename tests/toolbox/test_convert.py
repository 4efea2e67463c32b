"""Files from layout to layout: what is exact stays so, what is not is refused or said, and no model has to be there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OutputError
from lorasmith.families.loading import released_names
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.formats.metadata import sha256_body
from lorasmith.formats.names import ModelNames
from lorasmith.toolbox import convert
from lorasmith.toolbox.convert import convert_lora
from tests.covering import slow_except

TINY = "lorasmith-tiny"
ENCODER = "text_model.encoder.layers.0.self_attn.q_proj"


def adapter(shape: tuple[int, ...], *, rank: int = 4, alpha: float = 2.0, seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(shape) - 2)
    down = torch.rand(rank, *shape[1:], generator=generator)
    return AdapterWeights("lora", {"down": down, "up": torch.rand(shape[0], rank, *ones, generator=generator)}, alpha)


def some_lora(names: ModelNames, count: int = 8, *, alpha: float = 2.0) -> AdapterState:
    paths = [path for path, shape in names.weight_shapes.items() if len(shape) > 1]
    chosen = paths[:: max(1, len(paths) // count)]
    return AdapterState({ModuleRef(DENOISER, path): adapter(names.weight_shapes[path], alpha=alpha) for path in chosen})


PAIRS = list(itertools.permutations(LAYOUTS, 2))


def change(weights: AdapterWeights) -> Tensor:
    up, down = (weights.tensors[name].flatten(1).double() for name in ("up", "down"))
    return up @ down * ((weights.alpha or len(down)) / len(down))


@pytest.mark.slow_after(2)
@pytest.mark.parametrize("alpha", slow_except([2.0, 3.0], 3.0))
@pytest.mark.parametrize(("first", "second"), slow_except(PAIRS, *PAIRS[::6]))
def test_there_and_back_again(tmp_path: Path, tiny: Model, first: str, second: str, alpha: float) -> None:
    state = some_lora(tiny.names, alpha=alpha)
    layers = dict(tiny.components.text_encoders["text_encoder"].named_modules())
    layer = layers.get(ENCODER) or layers[ENCODER.removeprefix("text_model.")]
    state.adapters[ModuleRef("text_encoder", ENCODER)] = adapter(tuple(layer.weight.shape), alpha=alpha)
    save_lora(tmp_path / "a", state, tiny.names, layout=first)
    convert_lora(tmp_path / "a", second, tmp_path / "b", TINY)
    done = convert_lora(tmp_path / "b", first, tmp_path / "c", TINY)
    assert done.modules == len(state.adapters)
    assert not done.losses
    before, after = (load_lora(tmp_path / name, tiny.names) for name in "ac")
    multiplied_in = {"diffusers", "ai-toolkit"} & {first, second}
    exact = alpha == 2.0 or not multiplied_in  # a scale of a half loses nothing, 3/4 may round
    for ref, weights in before.adapters.items():
        if exact:
            torch.testing.assert_close(change(after.adapters[ref]), change(weights), rtol=0, atol=0)
        else:
            torch.testing.assert_close(change(after.adapters[ref]), change(weights), rtol=1e-6, atol=0)


def test_the_body_of_a_converted_file_is_that_of_a_saved_one(tmp_path: Path, tiny: Model) -> None:
    save_lora(tmp_path / "kohya", some_lora(tiny.names), tiny.names, layout="kohya", metadata={"ss_steps": "7"})
    save_lora(tmp_path / "comfy", some_lora(tiny.names), tiny.names, layout="comfy")
    convert_lora(tmp_path / "kohya", "comfy", tmp_path / "converted", TINY)
    assert sha256_body(tmp_path / "converted") == sha256_body(tmp_path / "comfy")
    metadata = read_safetensors(tmp_path / "converted")[1]
    assert metadata["ss_steps"] == "7"
    assert metadata["sshs_model_hash"] == sha256_body(tmp_path / "comfy")


def lokr_of_fused_layers() -> tuple[AdapterState, ModelNames]:
    names = released_names("Flux.1")
    assert names is not None
    lokr = {"lokr_w1": torch.ones(48, 48), "lokr_w2": torch.ones(64, 64)}
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    adapters = {
        ModuleRef(DENOISER, path): AdapterWeights("lokr", {name: t * (i + 1) for name, t in lokr.items()}, 1.0)
        for i, path in enumerate(paths)
    }
    proj = ModuleRef(DENOISER, "transformer_blocks.0.attn.to_out.0")
    return AdapterState({**adapters, proj: adapter((3072, 3072))}), names


def test_what_cannot_be_fused_is_refused_or_written_with_a_warning(tmp_path: Path) -> None:
    state, names = lokr_of_fused_layers()
    save_lora(tmp_path / "a.safetensors", state, names, layout="comfy")
    with pytest.raises(
        LoraError, match=r"cannot be converted for kohya .* without loss \(3 modules, such as .*q, k, v"
    ):
        convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
    done = convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "b.safetensors", lossy=True)
    assert (done.modules, len(done.losses)) == (4, 1)
    keys = {key.split(".")[0] for key in read_safetensors(tmp_path / "b.safetensors")[0]}
    assert "lycoris_transformer_blocks_0_attn_to_q" in keys
    assert "lora_unet_double_blocks_0_img_attn_proj" in keys


def test_what_a_layout_has_no_place_for_is_left_out_by_choice_alone(tmp_path: Path, tiny: Model) -> None:
    state = some_lora(tiny.names)
    state.differences[ModuleRef(DENOISER, "conv_norm_out")] = {
        "weight": torch.ones(tiny.names.weight_shapes["conv_norm_out"])
    }
    state.unknown["stranger.lora_down.weight"] = torch.ones(2, 2)
    save_lora(tmp_path / "a.safetensors", state, tiny.names)
    with pytest.raises(LoraError, match="conv_norm_out: diffusers has no differences"):
        convert_lora(tmp_path / "a.safetensors", "diffusers", tmp_path / "b", TINY)
    with pytest.raises(LoraError, match="stranger: the model has no place for it"):
        convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "b", TINY)
    done = convert_lora(tmp_path / "a.safetensors", "diffusers", tmp_path / "b", TINY, lossy=True)
    assert len(done.losses) == 2
    assert done.modules == len(state.adapters)
    assert all(key.startswith("unet.") for key in read_safetensors(tmp_path / "b")[0])


def test_nothing_left_is_no_file(tmp_path: Path, tiny: Model) -> None:
    norms = AdapterState(differences={ModuleRef(DENOISER, "conv_norm_out"): {"bias": torch.ones(1)}})
    size = tiny.names.weight_shapes["conv_norm_out"]
    norms.differences[ModuleRef(DENOISER, "conv_norm_out")] = {"bias": torch.ones(size)}
    save_lora(tmp_path / "a.safetensors", norms, tiny.names)
    with pytest.raises(LoraError, match=r"nothing of a\.safetensors can be converted for PEFT"):
        convert_lora(tmp_path / "a.safetensors", "peft", tmp_path / "b", TINY, lossy=True)
    assert not (tmp_path / "b").exists()


def test_portable_has_one_alpha_for_attention(tmp_path: Path, tiny: Model) -> None:
    paths = [path for path in tiny.names.denoiser if ".attn1.to_" in path]
    state = AdapterState(
        {
            ModuleRef(DENOISER, path): adapter(tiny.names.weight_shapes[path], alpha=1.0 if index == 0 else 4.0)
            for index, path in enumerate(paths)
        }
    )
    save_lora(tmp_path / "a.safetensors", state, tiny.names, layout="kohya")
    done = convert_lora(tmp_path / "a.safetensors", "portable", tmp_path / "b.safetensors", TINY)
    assert not done.notes
    again = load_lora(tmp_path / "b.safetensors", tiny.names)
    assert {weights.alpha for weights in again.adapters.values()} == {4.0}
    plain = convert_lora(tmp_path / "a.safetensors", "kohya", tmp_path / "c.safetensors", TINY)
    assert ["most frequent one" in note for note in plain.notes] == [True]


def test_private_metadata(tmp_path: Path, tiny: Model) -> None:
    header = {"workflow": "secret", "ss_tag_frequency": "secret", "ss_seed": "3", "ss_sd_model_name": "/secret/m.ckpt"}
    save_lora(tmp_path / "a.safetensors", some_lora(tiny.names), tiny.names, metadata=header)
    convert_lora(tmp_path / "a.safetensors", "comfy", tmp_path / "b.safetensors", TINY, private=True)
    metadata = read_safetensors(tmp_path / "b.safetensors")[1]
    assert "secret" not in json.dumps(metadata)
    assert (metadata["ss_seed"], metadata["ss_sd_model_name"]) == ("3", "m.ckpt")


def test_nothing_is_written_over_unasked(tmp_path: Path, tiny: Model) -> None:
    save_lora(tmp_path / "a.safetensors", some_lora(tiny.names), tiny.names)
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        convert_lora(tmp_path / "a.safetensors", "comfy", tmp_path / "a.safetensors", TINY)
    assert (tmp_path / "a.safetensors").read_bytes() == before
    convert_lora(tmp_path / "a.safetensors", "comfy", tmp_path / "a.safetensors", TINY, overwrite=True)
    assert LAYOUTS["comfy"].detects(read_safetensors(tmp_path / "a.safetensors")[0])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"lora_unet_layers_0_attention_out": 64},
            "looks like a LoRA for Lumina, whose names are no",
        ),
        ({"model.layers.0.odd": 64}, "is for a model whose names are not known here; name the model with --model"),
    ],
)
def test_names_that_nothing_tells(tmp_path: Path, keys: dict[str, int], said: str) -> None:
    from safetensors.torch import save_file

    save_file(
        {f"{base}.lora_{role}.weight": torch.ones(4, size) for base, size in keys.items() for role in ("down", "up")},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LoraError, match=said):
        convert_lora(tmp_path / "x.safetensors", "comfy", tmp_path / "y.safetensors")


def test_a_model_of_other_sizes_is_asked_for(tmp_path: Path, tiny: Model) -> None:
    paths = ["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"]
    from safetensors.torch import save_file

    save_file(
        {f"{base}.lora_{role}.weight": torch.ones(4, 768) for base in paths for role in ("down", "up")},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(LoraError, match="is for a model of other sizes than the released sd1; name its model"):
        convert_lora(tmp_path / "x.safetensors", "comfy", tmp_path / "y.safetensors")


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    base = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{base}.lora_down.weight": torch.ones(4, 768), f"{base}.lora_up.weight": torch.ones(320, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    opened: list[Path] = []
    read = convert.read_lora_tensors
    monkeypatch.setattr(convert, "read_lora_tensors", lambda path: opened.append(path) or read(path))
    assert convert_lora(tmp_path / "x.safetensors", "comfy", tmp_path / "y.safetensors").modules == 1
    assert opened == [tmp_path / "x.safetensors"]
