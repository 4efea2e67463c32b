"""Files held to the model that they are for, named or released, and mended files written safely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OutputError
from lorasmith.families.loading import released_names
from lorasmith.families.model import Model
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.formats.metadata import sha256_body
from lorasmith.toolbox.check import check_lora, fix_lora

KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def released_lora(path: Path, title: str, layer: str) -> None:
    names = released_names(title)
    assert names is not None
    out, inside = names.weight_shapes[layer]
    weights = AdapterWeights("lora", {"down": torch.ones(4, inside), "up": torch.ones(out, 4)}, 2.0)
    save_lora(path, AdapterState({ModuleRef(DENOISER, layer): weights}), names, metadata={"ss_x": "1"})


@pytest.mark.parametrize(
    ("title", "layer"),
    [
        ("Stable Diffusion 1.x", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("Stable Diffusion 2.x", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
        ("Flux.1", "single_transformer_blocks.3.proj_out"),
    ],
)
def test_a_file_is_held_to_the_released_model_of_its_family(tmp_path: Path, title: str, layer: str) -> None:
    released_lora(tmp_path / "x.safetensors", title, layer)
    checked = check_lora(tmp_path / "x.safetensors")
    assert checked.family == checked.compared_with == title
    assert checked.is_fine
    assert not [one for one in checked.findings if "no place" in one.problem or "layers are not" in one.problem]


def test_a_file_for_other_sizes_is_no_fault_of_the_file(tmp_path: Path) -> None:
    roles = {"lora_down.weight": torch.ones(4, 768), "lora_up.weight": torch.ones(64, 4), "alpha": torch.tensor(4.0)}
    save_file({f"{KEY}.{role}": tensor for role, tensor in roles.items()}, tmp_path / "x.safetensors")
    checked = check_lora(tmp_path / "x.safetensors")
    assert checked.is_fine
    assert "its layers are not those of the released sd1 model" in [one.problem for one in checked.findings]


def test_a_model_of_another_family_is_a_fault(tmp_path: Path) -> None:
    released_lora(tmp_path / "x.safetensors", "Flux.1", "single_transformer_blocks.3.proj_out")
    checked = check_lora(tmp_path / "x.safetensors", "lorasmith-tiny")
    assert not checked.is_fine
    assert checked.findings[0].is_error
    assert "has no place in the sd1 model" in checked.findings[0].problem


def test_a_family_without_released_names_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    base = "lora_unet_layers_0_attention_out"
    save_file({f"{base}.lora_down.weight": torch.ones(4, 64)}, tmp_path / "x.safetensors")
    checked = check_lora(tmp_path / "x.safetensors")
    assert (checked.family, checked.compared_with) == ("Lumina", None)
    assert [one.problem.split(":")[0] for one in checked.findings] == [f"{base} is damaged"]


def test_a_mended_file_keeps_its_metadata_and_has_its_own_hash(tmp_path: Path, tiny: Model) -> None:
    path = next(path for path in tiny.names.denoiser if path.endswith("attn1.to_q"))
    size = tiny.names.weight_shapes[path]
    good = {"down": torch.ones(4, size[1]), "up": torch.ones(size[0], 4)}
    state = AdapterState(
        {
            ModuleRef(DENOISER, path): AdapterWeights("lora", good, 2.0),
            ModuleRef(DENOISER, path.replace("to_q", "to_k")): AdapterWeights(
                "lora", {**good, "up": torch.zeros(size[0], 4)}, 2.0
            ),
        }
    )
    save_lora(tmp_path / "a.safetensors", state, tiny.names, metadata={"ss_seed": "3"})
    checked = check_lora(tmp_path / "a.safetensors", "lorasmith-tiny")
    with pytest.raises(LoraError, match="has no faults that --fix repairs; add --notes"):
        fix_lora(checked, tmp_path / "b.safetensors")
    fixed = fix_lora(checked, tmp_path / "b.safetensors", notes=True)
    assert fixed.left_out == (f"lora_unet_{path.replace('to_q', 'to_k').replace('.', '_')}",)
    mended = load_lora(tmp_path / "b.safetensors", tiny.names)
    assert [ref.path for ref in mended.adapters] == [path]
    assert mended.metadata["ss_seed"] == "3"
    assert mended.metadata["sshs_model_hash"] == sha256_body(tmp_path / "b.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        fix_lora(checked, tmp_path / "a.safetensors", notes=True)
    fix_lora(checked, tmp_path / "a.safetensors", notes=True, overwrite=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_faults_that_a_repair_brings_to_light_are_repaired_too(tmp_path: Path, tiny: Model) -> None:
    """The alpha that most modules have is 1 while one module is damaged and another's is 0, and 4 afterwards."""
    paths = [path for path in tiny.names.denoiser if path.endswith("attn1.to_q")]
    alphas = [1.0, 1.0, 0.0, 4.0, 4.0]
    tensors = {}
    for path, alpha in zip(paths, alphas, strict=False):
        size = tiny.names.weight_shapes[path]
        base = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{base}.lora_down.weight"] = torch.ones(4, size[1])
        tensors[f"{base}.lora_up.weight"] = torch.ones(size[0], 4)
        tensors[f"{base}.alpha"] = torch.tensor(alpha)
    del tensors[f"lora_unet_{paths[0].replace('.', '_')}.lora_up.weight"]
    tensors[f"lora_unet_{paths[1].replace('.', '_')}.alpha"] = torch.tensor(torch.nan)
    save_file(tensors, tmp_path / "a.safetensors")

    fixed = fix_lora(check_lora(tmp_path / "a.safetensors", "lorasmith-tiny"), tmp_path / "b.safetensors", notes=True)
    assert fixed.left_out == tuple(f"lora_unet_{path.replace('.', '_')}" for path in sorted(paths[:2]))
    assert fixed.changed == (f"lora_unet_{paths[2].replace('.', '_')}",)
    whole = load_file(tmp_path / "b.safetensors")[f"{fixed.changed[0]}.lora_up.weight"]
    assert torch.equal(whole, torch.ones_like(whole))

    again = check_lora(tmp_path / "b.safetensors", "lorasmith-tiny")
    assert [one.problem for one in again.findings if one.mend is not None] == []
    assert again.is_fine


def test_a_file_without_faults_is_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    released_lora(path, "Stable Diffusion 1.x", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    with pytest.raises(LoraError, match=r"x\.safetensors has no faults, and there is nothing for --fix to repair"):
        fix_lora(check_lora(path), tmp_path / "y.safetensors")


def test_folders_are_not_mended(tmp_path: Path, tiny: Model) -> None:
    released_lora(
        tmp_path / "x.safetensors", "Stable Diffusion 1.x", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    )
    names = released_names("Stable Diffusion 1.x")
    assert names is not None
    save_lora(tmp_path / "x", load_lora(tmp_path / "x.safetensors", names), names, layout="peft")
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    save_file({**tensors, "odd": torch.ones(1)}, tmp_path / "x" / "adapter_model.safetensors")
    checked = check_lora(tmp_path / "x")
    assert not checked.is_fine
    with pytest.raises(LoraError, match="is a folder, and --fix repairs files alone"):
        fix_lora(checked, tmp_path / "y.safetensors")


def test_a_repair_takes_out_nothing_but_the_module_at_fault(tmp_path: Path) -> None:
    """Of a model of other sizes than the released one, whose projector alone fits."""
    names = released_names("Krea 2")
    assert names is not None
    generator = torch.Generator().manual_seed(0)
    projector = "text_fusion.projector"
    sizes = {f"transformer_blocks.{block}.attn.{part}": (32, 32) for block in range(3) for part in ("to_q", "to_gate")}
    tensors = {
        f"transformer.{path}.lora_{role}.weight": torch.randn(shape, generator=generator)
        for path, (out, inside) in {**sizes, projector: names.weight_shapes[projector]}.items()
        for role, shape in (("A", (1, inside)), ("B", (out, 1)))
    }
    bad = "transformer.transformer_blocks.1.attn.to_q"
    tensors[f"{bad}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "a.safetensors")

    checked = check_lora(tmp_path / "a.safetensors")
    assert any("have no place in the released krea2 model" in one.problem for one in checked.findings)
    fixed = fix_lora(checked, tmp_path / "b.safetensors", notes=True)

    assert fixed.left_out == (bad,)
    assert [finding.problem for finding in fixed.findings] == [
        f"{bad}.lora_A.weight holds NaN or infinity, which spoils every picture"
    ]
    mended = load_file(tmp_path / "b.safetensors")
    assert mended.keys() == {key for key in tensors if not key.startswith(bad)}
    assert all(torch.equal(mended[key], tensors[key]) for key in mended)


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("algorithm", ["lora", "dora", "glora"])
def test_an_effect_is_measured_against_the_weights_of_a_named_model(
    tmp_path: Path, tiny: Model, algorithm: str
) -> None:
    path = next(path for path in tiny.names.denoiser if path.endswith("attn1.to_q"))
    weight = tiny.denoiser.module.get_submodule(path).weight.detach().float()
    out, inside = weight.shape
    generator = torch.Generator().manual_seed(0)

    def found(size: float) -> list[str]:
        """What is said of a LoRA that changes the weight by about this much of its size."""
        down, up = torch.randn(4, inside, generator=generator), torch.randn(out, 4, generator=generator)
        up *= size * weight.norm() / (up @ down).norm()
        tensors = {"down": down, "up": up}
        if algorithm == "dora":
            tensors["dora_scale"] = (weight + up @ down).norm(dim=1, keepdim=True)
        if algorithm == "glora":
            tensors = {"a1": torch.zeros(inside, 4), "a2": torch.randn(4, inside), "b1": up, "b2": down}
        kind = "lora" if algorithm == "dora" else algorithm
        state = AdapterState({ModuleRef(DENOISER, path): AdapterWeights(kind, tensors, 4.0)})
        save_lora(tmp_path / "a.safetensors", state, tiny.names)
        checked = check_lora(tmp_path / "a.safetensors", "lorasmith-tiny")
        return [one.problem for one in checked.findings if one.is_error]

    assert found(2e-6) == ["it changes no weight by more than 2e-06 of its size, which no picture shows"]
    assert found(1e-2) == []
