"""Modules of LoRA files meet under one name: in one layout by spelling, across layouts through a model's names."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.core.adapter_state import DENOISER, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.families.loading import released_names
from lorasmith.families.model import Model
from lorasmith.toolbox.lora_files import flat_shapes, read_lora, read_together, save_alike

LAYOUTS = ("kohya", "comfy", "diffusers")


@pytest.fixture
def files(tiny: Model, tmp_path: Path) -> dict[str, Path]:
    """One LoRA in each layout that is a file."""
    state = cases.lora_state(cases.shapes_of(tiny))
    return {name: cases.saved(tmp_path / f"{name}.safetensors", state, tiny.names, name) for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_is_read_as_it_is_spelled(files: dict[str, Path], tiny: Model, layout: str) -> None:
    file = read_lora(files[layout])
    assert file.layout == layout
    assert len(file.modules) == len(cases.shapes_of(tiny))
    assert not file.unknown
    assert {ref.component for ref in file.modules} == {DENOISER, "text_encoder"}


def test_two_layouts_with_the_same_paths_share_their_modules(files: dict[str, Path]) -> None:
    kohya, diffusers = read_together([files["kohya"], files["diffusers"]])
    assert kohya.modules.keys() == diffusers.modules.keys()


@pytest.mark.parametrize("other", ["comfy", "diffusers"])
def test_layouts_meet_under_the_names_of_a_model(files: dict[str, Path], tiny: Model, other: str) -> None:
    first, second = read_together([files["kohya"], files[other]], tiny.names, one_layout=True)
    assert first.modules.keys() == second.modules.keys() == cases.shapes_of(tiny).keys()


def test_layouts_that_do_not_meet_ask_for_the_model(files: dict[str, Path]) -> None:
    with pytest.raises(LoraError, match="name it with --model"):
        read_together([files["kohya"], files["comfy"]])
    with pytest.raises(LoraError, match="name it with --model"):
        read_together([files["kohya"], files["diffusers"]], one_layout=True)


def sized_for_sd1(path: Path, base: str) -> Path:
    """A LoRA of one cross-attention projection of Stable Diffusion 1.5."""
    tensors = {
        "lora_down.weight": torch.randn(2, 768),
        "lora_up.weight": torch.randn(320, 2),
        "alpha": torch.tensor(2.0),
    }
    save_file({f"{base}.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


def test_files_for_a_released_model_need_no_model(tmp_path: Path) -> None:
    kohya = sized_for_sd1(
        tmp_path / "a.safetensors", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    )
    comfy = sized_for_sd1(
        tmp_path / "b.safetensors", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    )
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    for file in read_together([kohya, comfy]):
        assert list(file.modules) == [ModuleRef(DENOISER, path)]


@pytest.mark.parametrize("title", ["Stable Diffusion 1.x", "Stable Diffusion 2.x", "Flux.1"])
def test_released_models_have_the_sizes_they_are_known_by(title: str) -> None:
    names = released_names(title)
    assert names is not None
    widths = {"Stable Diffusion 1.x": 768, "Stable Diffusion 2.x": 1024, "Flux.1": 4096}
    inputs = [s[1] for p, s in names.weight_shapes.items() if p.endswith(("attn2.to_k", "context_embedder"))]
    assert set(inputs) == {widths[title]}
    counts = {"Stable Diffusion 1.x": 12, "Stable Diffusion 2.x": 23, "Flux.1": 12}
    assert len({path.split(".")[3] for path in names.paths("text_encoder")}) == counts[title]


def test_a_family_without_a_released_model_here_is_unknown() -> None:
    assert released_names("Lumina") is None
    assert released_names("") is None


def test_shapes_are_found_by_either_spelling(tiny: Model) -> None:
    shapes = flat_shapes(tiny.names)
    path = "down_blocks.0.attentions.0.proj_in"
    original = tiny.names.denoiser[path].path
    expected = tiny.names.weight_shapes[path]
    assert shapes[ModuleRef(DENOISER, path.replace(".", "_"))] == expected
    assert shapes[ModuleRef(DENOISER, original.replace(".", "_"))] == expected


def test_files_for_different_families_are_refused(tmp_path: Path) -> None:
    sd = sized_for_sd1(
        tmp_path / "a.safetensors", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    )
    flux = sized_for_sd1(tmp_path / "b.safetensors", "lora_unet_double_blocks_0_img_attn_proj")
    with pytest.raises(LoraError, match=r"must be for the same family.*Flux\.1.*Stable Diffusion 1\.x"):
        read_together([sd, flux])


def test_a_module_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    pair = {"down": torch.ones(2, 3), "up": torch.ones(4, 2)}
    bases = ("lora_unet_mid_block_x_to_q", "unet.mid_block.x.to_q")
    tensors = {f"{base}.lora_{role}.weight": t.clone() for base in bases for role, t in pair.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="one adapter for a module"):
        read_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_alike_is_the_same_file(files: dict[str, Path], tmp_path: Path, layout: str) -> None:
    file = read_lora(files[layout])
    save_alike(tmp_path / "again.safetensors", [file], file.modules, file.metadata)
    before, after = load_file(files[layout]), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_alphas_of_a_header_are_read_and_multiplied_in(tmp_path: Path) -> None:
    base = "unet.mid_block.attentions.0.proj_in"
    down, up = torch.randn(2, 3), torch.randn(4, 2)
    save_file(
        {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up},
        tmp_path / "a.safetensors",
        {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 6}'},
    )
    file = read_lora(tmp_path / "a.safetensors")
    (module,) = file.modules.values()
    assert module.adapter is not None
    assert module.adapter.alpha == 6
    save_alike(tmp_path / "b.safetensors", [file], file.modules, file.metadata)
    written = load_file(tmp_path / "b.safetensors")
    assert "lora_adapter_metadata" not in read_lora(tmp_path / "b.safetensors").metadata
    product = written[f"{base}.lora_B.weight"] @ written[f"{base}.lora_A.weight"]
    assert torch.allclose(product, 3 * up @ down, rtol=1e-5)


def test_attention_processors_are_the_attention(tmp_path: Path) -> None:
    base = "unet.mid_block.attn1.processor.to_out_lora"
    save_file(
        {f"{base}.down.weight": torch.ones(2, 3), f"{base}.up.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors"
    )
    file = read_lora(tmp_path / "a.safetensors")
    assert list(file.modules) == [ModuleRef(DENOISER, "mid_block_attn1_to_out_0")]
    save_alike(tmp_path / "b.safetensors", [file], file.modules, {})
    assert "unet.mid_block.attn1.to_out.0.lora_A.weight" in load_file(tmp_path / "b.safetensors")


def test_a_file_without_a_lora_is_a_sentence(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="is not a LoRA"):
        read_lora(tmp_path / "a.safetensors")


def test_xlabs_names_are_told_apart_and_not_written(tmp_path: Path) -> None:
    save_file(
        {
            f"double_blocks.0.processor.{part}_lora{stream}.{role}.weight": torch.ones(2, 2)
            for part in ("qkv", "proj")
            for stream in (1, 2)
            for role in ("down", "up")
        },
        tmp_path / "x.safetensors",
    )
    assert len(read_lora(tmp_path / "x.safetensors").modules) == 4
    with pytest.raises(LoraError, match="names of XLabs' trainer, which are read and not written; convert it first"):
        read_together([tmp_path / "x.safetensors"], one_layout=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_what_is_not_finite_is_not_computed_with(tmp_path: Path, value: float) -> None:
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 4, dtype=torch.float64),
        "lora_unet_x.lora_up.weight": torch.full((6, 2), value, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match=r"lora_unet_x\.lora_up\.weight holds NaN or infinity"):
        read_lora(tmp_path / "x.safetensors")
