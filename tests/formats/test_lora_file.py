from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats.container import read_safetensors, write_safetensors
from lorasmith.formats.inspect import faults_of
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import StrangerReason, Unapplied, load_lora, save_lora, state_from_tensors, unapplied
from lorasmith.formats.metadata import sha256_body
from lorasmith.formats.names import ModelNames, OriginalName
from lorasmith.formats.spelling import KOHYA, ModuleTensors, spelled

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"


def test_layouts_may_mix_in_one_file(tmp_path: Path, unet_names, make_state) -> None:
    tensors = {}
    for layout, path in zip(("kohya", "comfy", "diffusers"), (TO_Q, TO_K, MID), strict=True):
        tensors |= LAYOUTS[layout].write(make_state(unet_names, [path]), unet_names)
    tensors["lora_te_unheard_of.lora_down.weight"] = torch.ones(2, 2)
    tensors["something"] = torch.ones(1)
    write_safetensors(tmp_path / "x.safetensors", tensors, {"k": "v"})
    state = load_lora(tmp_path / "x.safetensors", unet_names)
    assert {ref.path for ref in state.adapters} == {TO_Q, TO_K, MID}
    assert state.unknown.keys() == {"lora_te_unheard_of.lora_down.weight", "something"}
    assert unapplied(state, unet_names) == [
        Unapplied("lora_te_unheard_of", "text_encoder", StrangerReason.MODULE),
        Unapplied("something", DENOISER, StrangerReason.SUFFIX),
    ]
    assert state.metadata == {"k": "v"}


def test_a_module_that_is_addressed_twice_is_refused(unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q])
    kohya = LAYOUTS["kohya"].write(state, unet_names)
    twice = {**kohya, **{key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in kohya.items()}}
    with pytest.raises(LoraError, match=f"two for {TO_Q}"):
        state_from_tensors(twice, {}, unet_names)
    with pytest.raises(LoraError, match=f"in different layouts, for {TO_Q}"):
        state_from_tensors({**kohya, **LAYOUTS["comfy"].write(state, unet_names)}, {}, unet_names)


def test_a_lora_for_another_family_is_refused_by_name(tmp_path: Path, unet_names, flux_names, make_state) -> None:
    save_lora(tmp_path / "flux.safetensors", make_state(flux_names), flux_names)
    with pytest.raises(LoraError, match=r"looks like a LoRA for Flux\.1, and none of its 9 modules fits .* sd1 model"):
        load_lora(tmp_path / "flux.safetensors", unet_names)
    save_lora(tmp_path / "sd.safetensors", make_state(unet_names, [TO_Q]), unet_names)
    with pytest.raises(LoraError, match="looks like a LoRA for Stable Diffusion, and none"):
        load_lora(tmp_path / "sd.safetensors", flux_names)


def test_a_lora_for_the_same_modules_of_other_widths_is_refused(tmp_path: Path, unet_names, make_state) -> None:
    attention = [path for path in unet_names.weight_shapes if ".attn" in path and ".to_" in path]
    wider = {
        path: (shape[0], 1024) if path.endswith(("attn2.to_k", "attn2.to_v")) else shape
        for path, shape in unet_names.weight_shapes.items()
    }
    save_lora(tmp_path / "x.safetensors", make_state(replace(unet_names, weight_shapes=wider), attention), unet_names)
    with pytest.raises(
        LoraError, match=r"LoRA for Stable Diffusion 2\.x: 8 of its 32 modules, such as lora_unet_.*to_k"
    ):
        load_lora(tmp_path / "x.safetensors", unet_names)
    # Without a table of shapes everything is taken as it comes.
    state = load_lora(tmp_path / "x.safetensors", replace(unet_names, weight_shapes={}))
    assert len(state.adapters) == 32


def test_a_few_modules_of_another_shape_are_left_aside(tmp_path: Path, unet_names, make_state) -> None:
    nine_channels = replace(unet_names, weight_shapes={**unet_names.weight_shapes, "conv_in": (32, 9, 3, 3)})
    save_lora(tmp_path / "inpaint.safetensors", make_state(nine_channels), unet_names)
    state = load_lora(tmp_path / "inpaint.safetensors", unet_names)
    assert unapplied(state, unet_names) == [Unapplied("lora_unet_conv_in", DENOISER, StrangerReason.SHAPE)]
    assert len(state.unknown) == 3


def test_what_is_no_lora_is_refused(tmp_path: Path, unet_names) -> None:
    write_safetensors(tmp_path / "x.safetensors", {"model.diffusion_model.out.0.weight": torch.ones(2)})
    with pytest.raises(LoraError, match="is not a LoRA: none of its 1 tensors"):
        load_lora(tmp_path / "x.safetensors", unet_names)
    with pytest.raises(LoraError, match="must hold adapter_model"):
        load_lora(tmp_path, unet_names)
    with pytest.raises(LoraError, match="does not exist"):
        load_lora(tmp_path / "nothing", unet_names)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_load_and_save_without_a_change_gives_the_same_bytes(tmp_path: Path, unet_names, make_state, layout) -> None:
    state = make_state(unet_names, dtype=torch.bfloat16)
    state.unknown["other"] = torch.ones(2, dtype=torch.float16)
    save_lora(tmp_path / "a", state, unet_names, layout=layout, metadata={"ss_x": "1", "workflow": "{}"})
    read = load_lora(tmp_path / "a", unet_names)
    inner = "adapter_model.safetensors" if LAYOUTS[layout].in_folder else ""
    assert read.metadata["sshs_model_hash"] == sha256_body(tmp_path / "a" / inner)
    save_lora(tmp_path / "b", read, unet_names, layout=layout)
    assert (tmp_path / "a" / inner).read_bytes() == (tmp_path / "b" / inner).read_bytes()


def test_a_file_without_metadata_gets_none(tmp_path: Path, unet_names, make_state) -> None:
    write_safetensors(tmp_path / "a", LAYOUTS["comfy"].write(make_state(unet_names), unet_names))
    save_lora(tmp_path / "b", load_lora(tmp_path / "a", unet_names), unet_names, layout="comfy")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_headers_alpha_stays_behind_when_the_layout_changes(tmp_path: Path, unet_names, make_state, delta) -> None:
    state = make_state(unet_names, alpha=1.0)
    save_lora(tmp_path / "a", state, unet_names, layout="diffusers")
    read = load_lora(tmp_path / "a", unet_names)
    save_lora(tmp_path / "b", read, unet_names, layout="Kohya")
    assert read_safetensors(tmp_path / "b")[1] == {}
    for ref, weights in load_lora(tmp_path / "b", unet_names).adapters.items():
        torch.testing.assert_close(delta(weights), delta(state.adapters[ref]), rtol=1e-5, atol=1e-8)


def test_dtype_is_that_of_the_file_but_exact_for_alpha(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q], alpha=387.0)
    state.unknown["other"] = torch.ones(2)
    save_lora(tmp_path / "x", state, unet_names, dtype=torch.bfloat16)
    tensors = dict(read_safetensors(tmp_path / "x")[0])
    assert tensors.pop("other").dtype == torch.float32
    alpha = next(tensors.pop(key) for key in list(tensors) if key.endswith(".alpha"))
    assert float(alpha) == 387.0
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("oft_diag", r"is an OFT of LyCORIS before 2\.0 \(oft_diag\), .* is not read; train it again"),
        ("oft_blocks.0", r"is an OFT of sd-scripts for Flux \(oft_blocks\.0\), .* is not read; use it with sd-scripts"),
    ],
)
def test_formats_that_are_not_read_are_refused_by_name(tmp_path: Path, unet_names, suffix: str, said: str) -> None:
    tensors = {f"lora_unet_{TO_Q.replace('.', '_')}.{name}": torch.zeros(8, 4, 4) for name in (suffix, "alpha")}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(LoraError, match=said):
        load_lora(tmp_path / "x.safetensors", unet_names)


PREFIXES = ("transformer.", "diffusion_model.", "base_model.model.", "", "lora_transformer_", "lycoris_", "lora_unet_")


def spelt(prefix: str, path: str) -> str:
    return prefix + (path.replace(".", "_") if prefix.endswith("_") else path)


def test_an_output_projection_may_lack_its_number(flux_names, make_adapter) -> None:
    for prefix in PREFIXES:
        path = "transformer_blocks.1.attn.to_out.0"
        weights = make_adapter(flux_names.weight_shapes[path], "lora", 4, 2.0, torch.Generator().manual_seed(0))
        base = spelt(prefix, path.removesuffix(".0"))
        tensors = {f"{base}.lora_{role}.weight": tensor for role, tensor in weights.tensors.items()}
        state = state_from_tensors(tensors | {f"{base}.alpha": torch.tensor(2.0)}, {}, flux_names)
        assert not state.unknown
        assert [ref.path for ref in state.adapters] == [path]


def test_projections_that_diffusers_fuses_are_read(flux_names, make_adapter, merged) -> None:
    """q, k and v of one adapter, a LoKr with magnitudes as SimpleTuner writes it."""
    for algorithm in ["lora", "lokr"]:
        for prefix in PREFIXES:
            paths = [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]
            rows, columns = flux_names.weight_shapes[paths[0]]
            whole = make_adapter((3 * rows, columns), algorithm, 4, 2.0, torch.Generator().manual_seed(0))
            base = spelt(prefix, "transformer_blocks.1.attn.to_qkv")
            tensors = {f"{base}{suffix}": tensor for suffix, tensor in spelled(ModuleTensors(whole), KOHYA).items()}
            magnitudes = torch.arange(1.0, 3 * rows + 1)[:, None]
            if algorithm == "lokr":
                tensors[f"{base}.dora_scale"] = magnitudes
            state = state_from_tensors(tensors, {}, flux_names)
            assert not state.unknown
            parts = [state.adapters[ModuleRef(DENOISER, path)] for path in paths]
            zero = torch.zeros(rows, columns)
            bare = [
                AdapterWeights(p.algorithm, {n: t for n, t in p.tensors.items() if n != "dora_scale"}, p.alpha)
                for p in parts
            ]
            found = torch.cat([merged(part, zero) for part in bare])
            torch.testing.assert_close(found, merged(whole, torch.zeros(3 * rows, columns)), rtol=1e-5, atol=1e-6)
            if algorithm == "lokr":
                assert torch.equal(torch.cat([part.tensors["dora_scale"] for part in parts]), magnitudes)


def test_a_fused_adapter_that_cannot_be_cut_is_named_and_its_model_is_not_doubted(
    tmp_path: Path, flux_names, make_state
) -> None:
    paths = [f"transformer_blocks.0.attn.{part}" for part in ("to_out.0", "to_q")]
    tensors = LAYOUTS["diffusers"].write(make_state(flux_names, paths), flux_names)
    rows, columns = flux_names.weight_shapes[paths[1]]
    base = "lycoris_transformer_blocks_1_attn_to_qkv"
    tensors |= {f"{base}.lokr_w1": torch.ones(2, 2), f"{base}.lokr_w2": torch.ones(3 * rows // 2, columns // 2)}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    state = load_lora(tmp_path / "x.safetensors", flux_names)
    (part,) = unapplied(state, flux_names)
    assert part == Unapplied(base, DENOISER, StrangerReason.FUSED)
    assert "separate q, k and v" in part.reason.remedy
    for sure in (True, False):
        (finding,) = [one for one in faults_of(tensors, {}, flux_names, is_model_sure=sure) if base in one.problem]
        assert "separate q, k and v" in finding.remedy
        assert finding.mend is None


@pytest.mark.parametrize("factor", [4, 6, 8, 12, 16])
@pytest.mark.parametrize("magnitudes", [False, True], ids=["plain", "dora"])
def test_a_lokr_on_the_fused_projections_of_grouped_queries(tmp_path: Path, factor: int, magnitudes: bool) -> None:
    """Krea 2 has 6144 rows of queries, 1536 of keys and of values: a factor of 4, 8 or 16 has blocks across them."""
    rows = {"to_q": 6144, "to_k": 1536, "to_v": 1536}
    shapes = {f"transformer_blocks.0.attn.{part}": (count, 48) for part, count in rows.items()}
    names = ModelNames("krea2", {path: OriginalName(path) for path in shapes}, "transformer", weight_shapes=shapes)
    base = "lycoris_transformer_blocks_0_attn_to_qkv"
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(factor, 4, generator=generator), torch.randn(9216 // factor, 12, generator=generator)
    tensors = {f"{base}.lokr_w1": w1, f"{base}.lokr_w2": w2}
    tensors |= {f"{base}.dora_scale": torch.rand(9216, 1, generator=generator)} if magnitudes else {}
    state = state_from_tensors(tensors, {}, names)
    if factor % 6:
        assert not state.adapters and state.unknown.keys() == tensors.keys()
        write_safetensors(tmp_path / "x.safetensors", tensors, {})
        with pytest.raises(LoraError, match=r"fused layers that cannot be cut, .*; train it with separate q, k"):
            load_lora(tmp_path / "x.safetensors", names)
        return
    save_lora(tmp_path / "saved.safetensors", state, names)
    again = load_lora(tmp_path / "saved.safetensors", names)
    whole = torch.kron(w1, w2).split(list(rows.values()))
    for path, part in zip(shapes, whole, strict=True):
        tensors = again.adapters[ModuleRef(DENOISER, path)].tensors
        assert torch.equal(torch.kron(tensors["lokr_w1"], tensors["lokr_w2"]), part)


def test_a_name_is_doubted_where_the_model_is_the_right_one(flux_names, make_state) -> None:
    """And the model, where it has fewer blocks or nothing else of the file."""
    layer = "transformer.transformer_blocks.{}.attn.{}.lora_{}.weight"
    known = LAYOUTS["diffusers"].write(
        make_state(flux_names, [f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v")]), flux_names
    )

    def why(block: int, part: str, others: Mapping[str, Tensor]) -> StrangerReason:
        pair = {layer.format(block, part, "A"): torch.ones(2, 24), layer.format(block, part, "B"): torch.ones(24, 2)}
        (found,) = unapplied(state_from_tensors({**others, **pair}, {}, flux_names), flux_names)
        return found.reason

    assert why(0, "to_anything", known) is StrangerReason.NAME
    assert why(7, "to_q", known) is StrangerReason.MODULE
    assert why(0, "to_anything", {}) is StrangerReason.MODULE
