"""What is found in damaged and odd files, and that mending mends it and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.formats.acceptance import misread_alphas
from lorasmith.formats.inspect import FileFault, faults_of
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import state_from_tensors
from lorasmith.formats.metadata import sshs_hashes

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
FLAT = "lora_unet_" + BLOCK.replace(".", "_")
TO_Q, TO_K = f"{FLAT}_attn1_to_q", f"{FLAT}_attn1_to_k"


@pytest.fixture
def tensors(unet_names, make_state) -> dict[str, Tensor]:
    """A flawless LoRA on every layer that sd-scripts trains, in kohya's layout."""
    paths = [path for path, shape in unet_names.weight_shapes.items() if ".attentions." in path and len(shape) > 1]
    return LAYOUTS["kohya"].write(make_state(unet_names, paths), unet_names)


def findings(tensors: Mapping[str, Tensor], names=None, metadata=None) -> list[FileFault]:
    return faults_of(tensors, metadata or {}, names, is_model_sure=True)


def mended(tensors: Mapping[str, Tensor], found: list[FileFault]) -> dict[str, Tensor]:
    result = dict(tensors)
    for finding in found:
        assert finding.mend is not None, finding
        result = {key: tensor for key, tensor in result.items() if key not in finding.mend.left_out}
        result |= {key: change(tensors.get(key)) for key, change in finding.mend.changed.items()}
    return result


def test_a_flawless_file_has_no_findings(tensors, unet_names) -> None:
    assert findings(tensors, unet_names) == []


DAMAGE = {
    "NaN": ({f"{TO_Q}.lora_up.weight": torch.full((32, 4), torch.nan)}, f"{TO_Q}.lora_up.weight holds NaN", True),
    "infinity in eight bits": (
        {f"{TO_Q}.lora_up.weight": torch.full((32, 4), torch.inf).to(torch.float8_e5m2)},
        f"{TO_Q}.lora_up.weight holds NaN",
        True,
    ),
    "zeros": ({f"{TO_Q}.lora_up.weight": torch.zeros(32, 4)}, f"{TO_Q} changes nothing", False),
    "no alpha": ({f"{TO_Q}.alpha": None}, f"{TO_Q} has no alpha, though others have", True),
    "alpha zero": ({f"{TO_Q}.alpha": torch.tensor(0.0)}, f"{TO_Q} has an alpha of zero", True),
    "half": ({f"{TO_Q}.lora_down.weight": None}, f"{TO_Q} is damaged: ", True),
    "stranger": ({"emb_params": torch.ones(2, 3)}, "emb_params has no name that LoRA files use", True),
    "no such module": (
        {f"lora_unet_conv_up.{role}": torch.ones(4, 4) for role in ("lora_up.weight", "lora_down.weight")}
        | {"lora_unet_conv_up.alpha": torch.tensor(2.0)},
        "lora_unet_conv_up has no place in the sd1 model",
        True,
    ),
    "another size": (
        {f"{TO_Q}.lora_down.weight": torch.ones(4, 40)},
        f"{TO_Q} has no place in the sd1 model",
        True,
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_mended(tensors, unet_names, case: str) -> None:
    changes, said, is_fault = DAMAGE[case]
    damaged = {key: tensor for key, tensor in {**tensors, **changes}.items() if tensor is not None}
    found = findings(damaged, unet_names)
    assert any(said in finding.problem and finding.is_error is is_fault for finding in found), found
    assert all(finding.remedy and "; " not in finding.problem for finding in found)
    again = mended(damaged, [finding for finding in found if finding.mend])
    assert [f for f in findings(again, unet_names) if f.is_error or said in f.problem] == []
    untouched = {key for key in tensors if not key.startswith((TO_Q, "lora_unet_conv_up"))}
    assert all(torch.equal(again[key], tensors[key]) for key in untouched)


def test_a_lora_that_was_never_trained_is_at_fault(tensors, unet_names) -> None:
    zero = {key: torch.zeros_like(tensor) if "lora_up" in key else tensor for key, tensor in tensors.items()}
    (finding,) = findings(zero, unet_names)
    assert finding.is_error
    assert finding.mend is None
    assert "all of its modules change nothing" in finding.problem


def test_a_lora_without_effect_is_at_fault(unet_names, make_state) -> None:
    """Its factors are not zero, and what they change is far below what a picture shows."""
    for algorithm in ["lora", "loha", "lokr", "oft", "difference"]:
        path = f"{BLOCK}.attn1.to_q"
        tensors = (
            LAYOUTS["kohya"].write(make_state(unet_names, [path], algorithm=algorithm, alpha=None), unet_names)
            if (algorithm != "difference")
            else {f"{TO_Q}.diff": torch.ones(32, 32)}
        )
        trained = next(
            key for key in tensors if key.endswith((".lora_up.weight", "w1_a", "lokr_w1", "oft_blocks", ".diff"))
        )
        assert not [one for one in findings(tensors) if "no picture shows" in one.problem]
        tensors[trained] = tensors[trained] * 1e-6
        (finding,) = [one for one in findings(tensors) if "no picture shows" in one.problem]
        assert finding.is_error and finding.mend is None
        assert finding.problem.startswith("it changes no weight by more than ")


def test_one_module_with_an_effect_is_enough(tensors, unet_names) -> None:
    keys = [key for key in tensors if "lora_up" in key]
    weak = {key: tensor * 1e-7 if key in keys[1:] else tensor for key, tensor in tensors.items()}
    assert not [one for one in findings(weak, unet_names) if "no picture shows" in one.problem]


def test_a_file_without_alphas_is_fine_and_can_have_them(tensors, unet_names) -> None:
    bare = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    (finding,) = findings(bare, unet_names)
    assert (finding.is_error, finding.problem) == (False, "it has no alphas, which programs take for the ranks")
    assert float(mended(bare, [finding])[f"{TO_Q}.alpha"]) == 4.0
    diffusers = LAYOUTS["diffusers"].write(state_from_tensors(tensors, {}, unet_names), unet_names)
    assert not [one for one in findings(diffusers, unet_names) if "alpha" in one.problem]


def test_a_huge_alpha_is_worth_a_note(tensors) -> None:
    tensors[f"{TO_Q}.alpha"] = torch.tensor(1024.0)
    (finding,) = findings(tensors)
    assert not finding.is_error
    assert "a huge alpha, 1024 at rank 4" in finding.problem


def test_boft_needs_an_alpha_in_comfyui(unet_names, make_adapter) -> None:
    weights = make_adapter((32, 32), "boft", 4, 0.0, torch.Generator().manual_seed(0))
    del weights.tensors["rescale"]
    state = AdapterState({ModuleRef(DENOISER, f"{BLOCK}.attn1.to_q"): weights})
    tensors = LAYOUTS["kohya"].write(state, unet_names)
    del tensors[f"{TO_Q}.alpha"]
    (finding,) = findings(tensors)
    assert finding.is_error
    assert float(mended(tensors, [finding])[f"{TO_Q}.alpha"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_alphas_that_diffusers_ignores_are_levelled(tensors, unet_names, delta, dtype) -> None:
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors[f"{TO_Q}.alpha"], tensors[f"{TO_K}.alpha"] = torch.tensor(0.5), torch.tensor(3.0)
    (finding,) = findings(tensors, unet_names)
    assert not finding.is_error
    assert finding.problem.startswith("2 modules, such as")
    before = state_from_tensors(tensors, {}, unet_names)
    after = state_from_tensors(mended(tensors, [finding]), {}, unet_names)
    assert misread_alphas(before, unet_names)
    assert not misread_alphas(after, unet_names)
    for ref, weights in before.adapters.items():
        torch.testing.assert_close(delta(after.adapters[ref]), delta(weights), rtol=1e-6, atol=0)


def test_alphas_within_a_fused_group_are_levelled(flux_names, make_state, delta) -> None:
    paths = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    tensors = {}
    for path, alpha in zip(paths, (2.0, 1.0, 2.0), strict=True):
        for role, tensor in (
            make_state(flux_names, [path], alpha=alpha).adapters[ModuleRef(DENOISER, path)].tensors.items()
        ):
            tensors[f"lora_transformer_{path.replace('.', '_')}.lora_{role}.weight"] = tensor
        tensors[f"lora_transformer_{path.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    odd = [one for one in findings(tensors, flux_names) if "another alpha than the layers" in one.problem]
    assert len(odd) == 1
    before = state_from_tensors(tensors, {}, flux_names)
    after = state_from_tensors(mended(tensors, odd), {}, flux_names)
    assert {weights.alpha for weights in after.adapters.values()} == {2.0}
    for ref, weights in before.adapters.items():
        torch.testing.assert_close(delta(after.adapters[ref]), delta(weights), rtol=1e-6, atol=0)


def test_a_stale_hash_is_noticed(tensors) -> None:
    fresh = sshs_hashes(tensors, {})
    assert findings(tensors, metadata=fresh) == []
    (finding,) = findings(tensors, metadata={**fresh, "sshs_model_hash": "0" * 64})
    assert "not those that its metadata has the hash of" in finding.problem


def test_layers_that_some_blocks_lack_are_noticed(tensors, unet_names) -> None:
    lacking = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{TO_Q}.")}
    (finding,) = findings(lacking, unet_names)
    kind = "*.attentions.*.transformer_blocks.*.attn1.to_q"
    assert finding.problem == f"it lacks 1 of 4 layers {kind}, such as {BLOCK}.attn1.to_q"
    assert not finding.is_error


def test_what_programs_leave_out_comes_with_a_layout_that_they_read(unet_names, make_state) -> None:
    tensors = LAYOUTS["comfy"].write(make_state(unet_names, [f"{BLOCK}.attn1.to_q"]), unet_names)
    notes = {one.problem: one.remedy for one in findings(tensors, unet_names) if "does not apply" in one.problem}
    assert notes == {
        "diffusers does not apply any of it as meant: it does not read ComfyUI's names of this family": (
            "convert it with `lorasmith convert --to kohya` for diffusers"
        ),
        "sd-scripts does not apply any of it as meant: it reads kohya's layout alone": (
            "convert it with `lorasmith convert --to kohya` for sd-scripts"
        ),
    }


def test_what_is_no_lora_is_one_finding() -> None:
    (finding,) = findings({"first_stage_model.x": torch.ones(2)})
    assert finding.is_error
    assert "none of the 1 tensors has a name that LoRA files use" in finding.problem


def test_two_adapters_for_one_module_are_one_finding(tensors, unet_names) -> None:
    twice = {**tensors, **{key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in tensors.items()}}
    (finding,) = findings(twice, unet_names)
    assert "two for" in finding.problem
    assert finding.remedy == "keep the tensors of one of them"


def test_names_that_few_programs_look_for_are_noted() -> None:
    for key, program in [
        ("oft_unet_mid_block_attentions_0_proj_in.oft_blocks", "sd-scripts' OFT"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs' trainer"),
        ("single_blocks.0.processor.proj_lora.down.weight", "XLabs' trainer"),
    ]:
        tensors = {key: torch.ones(2, 4, 4) if key.endswith("oft_blocks") else torch.ones(2, 4)}
        if not key.endswith("oft_blocks"):
            tensors[key.replace(".down.", ".up.")] = torch.ones(4, 2)
        (note,) = [found for found in findings(tensors) if program in found.problem]
        assert not note.is_error
        assert "--to portable" in note.remedy
