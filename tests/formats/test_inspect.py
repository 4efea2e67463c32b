from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.inspect import describe
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.metadata import autov2, autov3

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize("layout", ["kohya", "comfy", "diffusers"])
def test_summary(tmp_path: Path, unet_names, make_state, make_adapter, delta, layout) -> None:
    state = make_state(unet_names, [TO_Q, TO_K, "conv_in"], rank=4, alpha=4.0, dtype=torch.bfloat16)
    adapter = make_adapter((8, 8), "lora", 2, 2.0, torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    state.adapters[ModuleRef("text_encoder", "text_model.encoder.layers.1.mlp.fc1")] = adapter
    path = tmp_path / "dog_30_steps_00001_.safetensors"
    save_lora(path, state, unet_names, layout=layout, metadata={"ss_steps": "20"})
    summary = describe(path)
    assert summary.layouts == {layout: 8 if layout == "diffusers" else 12}
    assert summary.family == "Stable Diffusion"
    assert summary.components == {"denoiser": 3, "text_encoder": 1}
    assert summary.algorithms == {"lora": 4}
    assert {"attn1_to_q", "attn2_to_k", "mlp_fc1"} <= summary.layers.keys()
    assert summary.ranks == {4: 3, 2: 1}
    assert summary.alphas == {4.0: 3, 2.0: 1}
    assert summary.dtypes == {"bfloat16": summary.tensors}
    assert summary.parameters == sum(t.numel() for w in state.adapters.values() for t in w.tensors.values())
    assert summary.steps == 20
    assert summary.metadata["ss_steps"] == "20"
    assert summary.hashes["autov2"] == autov2(path)
    assert summary.hashes["autov3"] == autov3(path) == summary.metadata["sshs_model_hash"][:12]
    assert summary.size_bytes == path.stat().st_size
    assert summary.findings == ()
    first = "input_blocks.1" if layout == "comfy" else "down_blocks.0"
    changes = [delta(state.adapters[ModuleRef(DENOISER, one)]) for one in (TO_Q, TO_K)]
    expected = float(torch.stack([change.norm() for change in changes]).norm())
    assert summary.norms[f"denoiser.{first}"] == pytest.approx(expected, rel=1e-4)
    assert summary.norms["text_encoder.layers.1"] == pytest.approx(float(delta(adapter).norm()), rel=1e-4)


def test_findings(tmp_path: Path, unet_names, make_state) -> None:
    save_lora(tmp_path / "x", make_state(unet_names, [TO_Q, TO_K, "conv_in"]), unet_names, layout="diffusers")
    tensors = dict(read_safetensors(tmp_path / "x")[0])
    tensors[f"unet.{TO_Q}.lora_B.weight"].zero_()
    tensors[f"unet.{TO_K}.lora_A.weight"][0, 0] = float("inf")
    del tensors["unet.conv_in.lora_A.weight"]
    tensors["stranger"] = torch.ones(1)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "y")
    assert set(describe(tmp_path / "y").findings) == {
        f"unet.{TO_K}.lora_A.weight holds NaN or infinity, which spoils every picture",
        "unet.conv_in is damaged: unet.conv_in.lora_B.weight is part of an adapter whose down is missing",
        "stranger has no name that LoRA files use, so that programs ignore them or refuse the file",
    }


def test_other_algorithms_and_differences(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q], algorithm="lokr", rank=2)
    state.adapters.update(make_state(unet_names, [TO_K], algorithm="oft", rank=8, alpha=0.0).adapters)
    state.differences[ModuleRef(DENOISER, "conv_norm_out")] = {"weight": torch.ones(32)}
    save_lora(tmp_path / "x", state, unet_names)
    summary = describe(tmp_path / "x")
    assert summary.algorithms == {"lokr": 1, "oft": 1, "difference": 1}
    assert summary.ranks == {2: 1}
    assert summary.factors == {2: 1}
    assert summary.block_sizes == {8: 1}
    assert summary.norms.keys() == {"denoiser.down_blocks.0", "denoiser"}
    assert summary.norms["denoiser"] == pytest.approx(32**0.5)


@pytest.mark.parametrize("variant", ["dora_in", "dora_out"])
def test_magnitudes_are_told_by_what_they_are_for(tmp_path: Path, unet_names, make_adapter, variant) -> None:
    adapter = make_adapter((32, 32), "lora", 2, 1.0, torch.Generator().manual_seed(0), variant=variant)
    save_lora(tmp_path / "x", AdapterState({ModuleRef(DENOISER, TO_Q): adapter}), unet_names)
    assert describe(tmp_path / "x").magnitudes == {{"dora_in": "input", "dora_out": "output"}[variant]: 1}


def test_a_peft_folder(tmp_path: Path, unet_names, make_state, make_adapter) -> None:
    state = make_state(unet_names, [TO_Q], alpha=3.0)
    adapter = make_adapter((8, 8), "lora", 2, 2.0, torch.Generator().manual_seed(0))
    state.adapters[ModuleRef("text_encoder", "text_model.encoder.layers.1.mlp.fc1")] = adapter
    save_lora(tmp_path / "x", state, unet_names, layout="peft")
    summary = describe(tmp_path / "x")
    assert summary.layouts == {"peft": 4}
    assert summary.components == {"denoiser": 1, "text_encoder": 1}
    assert summary.alphas == {3.0: 1, 2.0: 1}
    assert summary.hashes == {}


def test_what_stands_for_a_rank_is_called_what_it_is(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_a.lokr_w1": torch.ones(4, 2),
        "lora_unet_a.lokr_w2": torch.ones(16, 32),
        "lora_unet_b.oft_blocks": torch.ones(8, 6, 6),
        "lora_unet_c.oft_blocks": torch.ones(3, 8, 8, 8),
    }
    write_safetensors(tmp_path / "x", tensors)
    summary = describe(tmp_path / "x")
    assert (summary.ranks, summary.factors, summary.block_sizes) == ({}, {4: 1}, {6: 1, 8: 1})


def test_what_is_no_lora_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", {"first_stage_model.x": torch.ones(2)})
    with pytest.raises(LoraError, match="is not a LoRA"):
        describe(tmp_path / "x")
