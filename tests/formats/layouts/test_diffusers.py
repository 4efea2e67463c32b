"""diffusers' layout, and diffusers and PEFT themselves as judges of it and of kohya's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats import lora_file
from lorasmith.formats.container import write_safetensors
from lorasmith.formats.inspect import faults_of
from lorasmith.formats.layouts.adapter_config import ADAPTER_METADATA
from lorasmith.formats.layouts.diffusers import DiffusersLayout
from lorasmith.formats.names import ModelNames, OriginalName
from lorasmith.training.lora_handle import Lora

LAYOUT = DiffusersLayout()
TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"


def mixed_state(names, make_state, make_adapter, *, attention_alpha: float) -> AdapterState:
    """Every module of the UNet, of different ranks and alphas."""
    state = make_state(names, rank=4, alpha=2.0)
    generator = torch.Generator().manual_seed(1)
    for path, rank, alpha in ((TO_Q, 2, attention_alpha), ("conv_in", 3, 6.0), ("time_embedding.linear_1", 4, 1.0)):
        adapter = make_adapter(names.weight_shapes[path], "lora", rank, alpha, generator)
        state.adapters[ModuleRef(DENOISER, path)] = adapter
    return state


def applied_changes(model: nn.Module) -> dict[str, Tensor]:
    """ΔW by module path, as PEFT adds it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        path: module.get_delta_weight(module.active_adapters[0]).flatten(1).double()
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def answer(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(latents, 500, torch.randn(1, 7, 48, generator=generator)).sample


def merged(unet: nn.Module, state: AdapterState, delta) -> nn.Module:
    for ref, weights in state.adapters.items():
        weight = unet.get_submodule(ref.path).weight
        with torch.no_grad():
            weight += delta(weights).reshape(weight.shape).to(weight.dtype)
    return unet


# Of kohya's files diffusers takes an attention projection's alpha for the most frequent one of the file; in its own
# layout, and in a portable file, alphas may differ anywhere.
@pytest.mark.parametrize(("layout", "attention_alpha"), [("kohya", 2.0), ("portable", 1.0), ("diffusers", 1.0)])
def test_diffusers_applies_every_module_of_a_unet(
    tmp_path: Path, make_unet, unet_names, make_state, make_adapter, delta, layout, attention_alpha
) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    state = mixed_state(unet_names, make_state, make_adapter, attention_alpha=attention_alpha)
    lora_file.save_lora(tmp_path / "x.safetensors", state, unet_names, layout=layout)
    tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", return_lora_metadata=True
    )
    assert (metadata is not None) == (layout == "diffusers")
    unet, base = make_unet(), make_unet()
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(tensors, alphas, unet, metadata=metadata)

    changes = applied_changes(unet)
    assert changes.keys() == {ref.path for ref in state.adapters}
    assert len(changes) == len([shape for shape in unet_names.weight_shapes.values() if len(shape) > 1])
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(changes[ref.path], delta(weights), rtol=1e-5, atol=1e-7)
    expected, before = answer(merged(make_unet(), state, delta)), answer(base)
    assert (expected - before).norm() > 0.1 * before.norm()
    assert (answer(unet) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(("layout", "odd"), [("kohya", 2.0), ("portable", 3.0), ("diffusers", 3.0)])
def test_diffusers_applies_text_encoder_modules(tmp_path: Path, unet_names, make_adapter, delta, layout, odd) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=99, **sizes)).eval()
    generator = torch.Generator().manual_seed(1)
    state = AdapterState(
        {
            ModuleRef("text_encoder", path): make_adapter(
                {"fc1": (32, 16), "fc2": (16, 32)}.get(path.rsplit(".")[-1], (16, 16)),
                "lora",
                4,
                odd if path.endswith(("0.self_attn.q_proj", "mlp.fc2")) else 2.0,
                generator,
            )
            for path in unet_names.paths("text_encoder")
        }
    )
    lora_file.save_lora(tmp_path / "x.safetensors", state, unet_names, layout=layout)
    tensors, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(tensors, alphas, encoder, metadata=metadata)
    changes = applied_changes(encoder)
    assert len(changes) == len(state.adapters) == 12
    for ref, weights in state.adapters.items():
        path = ref.path if ref.path in changes else ref.path.removeprefix("text_model.")
        torch.testing.assert_close(changes[path], delta(weights), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_diffusers_understands_transformers_with_fused_rows(
    tmp_path: Path, wide_flux_names, make_state, layout
) -> None:
    from diffusers.loaders import FluxLoraLoaderMixin

    blocks = [path for path in wide_flux_names.denoiser if "blocks" in path]
    state = make_state(wide_flux_names, blocks, rank=2, alpha=1.0)
    lora_file.save_lora(tmp_path / "x.safetensors", state, wide_flux_names, layout=layout)
    tensors = FluxLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="x.safetensors")
    assert tensors.keys() == {f"transformer.{path}.lora_{side}.weight" for path in blocks for side in "AB"}
    for ref, weights in state.adapters.items():
        read = [tensors[f"transformer.{ref.path}.lora_{side}.weight"] for side in "AB"]
        probe = torch.linspace(-1, 1, read[0].shape[1])
        expected = 0.5 * weights.tensors["up"] @ (weights.tensors["down"] @ probe)
        torch.testing.assert_close(read[1] @ (read[0] @ probe), expected, rtol=1e-4, atol=1e-4)


def peft_unet(make_unet, **options) -> nn.Module:
    from peft import LoraConfig

    unet = make_unet()
    targets = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "time_embedding.linear_1"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=targets, **options))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) * 0.1
    return unet


PATTERNS = {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 6, r"^mid_block.*\.to_k": 1}}


@pytest.mark.parametrize(
    ("options", "saver"),
    [({"use_rslora": True}, "adapter"), *((PATTERNS, saver) for saver in ("adapter", "pipeline", "peft"))],
    ids=["rslora", "adapter", "pipeline", "peft"],
)
def test_pefts_scale_is_read(tmp_path: Path, make_unet, unet_names, delta, options, saver) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    unet = peft_unet(make_unet, **options)
    config = unet.peft_config["default"]
    if saver == "adapter":
        unet.save_lora_adapter(str(tmp_path))
    elif saver == "pipeline":
        fields = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        StableDiffusionPipeline.save_lora_weights(
            str(tmp_path), get_peft_model_state_dict(unet), unet_lora_adapter_metadata=fields
        )
    else:
        config.save_pretrained(str(tmp_path))
        tensors = {f"base_model.model.{key}": tensor for key, tensor in get_peft_model_state_dict(unet).items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    state = lora_file.load_lora(tmp_path, unet_names)
    changes = applied_changes(unet)
    assert len(changes) > 20
    assert {ref.path for ref in state.adapters} == changes.keys()
    assert not state.unknown
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(delta(weights), changes[ref.path], rtol=1e-5, atol=1e-7)


def test_pefts_dora_is_read_and_given_back(tmp_path: Path, make_unet, unet_names) -> None:
    unet = peft_unet(make_unet, use_dora=True)
    unet.save_lora_adapter(str(tmp_path))
    state = lora_file.load_lora(tmp_path, unet_names)
    for ref, weights in state.adapters.items():
        magnitude = unet.get_submodule(ref.path).lora_magnitude_vector["default"].weight
        assert torch.equal(weights.tensors["dora_scale"].flatten(), magnitude.flatten())
        ones = (1,) * (len(unet_names.weight_shapes[ref.path]) - 1)
        assert weights.tensors["dora_scale"].shape == (unet_names.weight_shapes[ref.path][0], *ones)
    lora_file.save_lora(tmp_path / "again.safetensors", state, unet_names, layout="diffusers")
    other = make_unet()
    other.load_lora_adapter(str(tmp_path), weight_name="again.safetensors", prefix="unet")
    torch.testing.assert_close(answer(other), answer(unet), rtol=1e-4, atol=1e-5)


def test_writes_alpha_into_the_factors_and_the_header(unet_names, make_state, delta) -> None:
    state = make_state(unet_names, [TO_Q], rank=4, alpha=1.0)
    tensors = LAYOUT.write(state, unet_names)
    assert tensors.keys() == {f"unet.{TO_Q}.lora_A.weight", f"unet.{TO_Q}.lora_B.weight"}
    change = tensors[f"unet.{TO_Q}.lora_B.weight"].double() @ tensors[f"unet.{TO_Q}.lora_A.weight"].double()
    torch.testing.assert_close(change, delta(state.adapters[ModuleRef(DENOISER, TO_Q)]), rtol=1e-6, atol=0)
    fields = json.loads(LAYOUT.header(state, unet_names)[ADAPTER_METADATA])
    assert fields["unet.r"] == fields["unet.lora_alpha"] == 4
    assert fields["unet.target_modules"] == [TO_Q]


def test_small_scales_do_not_vanish_in_fp16(unet_names, make_state, delta) -> None:
    state = make_state(unet_names, [TO_Q], rank=4, alpha=4 * 2.0**-14, dtype=torch.float16)
    again = LAYOUT.read(LAYOUT.write(state, unet_names), {}, unet_names)
    ref = ModuleRef(DENOISER, TO_Q)
    torch.testing.assert_close(delta(again.adapters[ref]), delta(state.adapters[ref]), rtol=1e-3, atol=0)


def test_reads_older_and_other_spellings(unet_names, make_state) -> None:
    for down, up in [
        ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
        ("{}.lora_A.weight", "{}.lora_B.weight"),
        ("transformer.{}.lora_down.weight", "transformer.{}.lora_up.weight"),
    ]:
        state = make_state(unet_names, [TO_Q, TO_OUT], alpha=None)
        tensors = {}
        for ref, weights in state.adapters.items():
            tensors[down.format(ref.path)] = weights.tensors["down"]
            tensors[up.format(ref.path)] = weights.tensors["up"]
        again = LAYOUT.read(tensors, {}, unet_names)
        assert again.adapters.keys() == state.adapters.keys()
        assert all(weights.alpha is None for weights in again.adapters.values())


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_reads_attention_processors(unet_names, make_state, prefix) -> None:
    state = make_state(unet_names, [TO_Q, TO_OUT], alpha=None)
    names = {
        TO_Q: TO_Q.replace("to_q", "processor.to_q_lora"),
        TO_OUT: TO_OUT.replace("to_out.0", "processor.to_out_lora"),
    }
    tensors = {
        f"{prefix}{names[ref.path]}.{role}.weight": weights.tensors[role]
        for ref, weights in state.adapters.items()
        for role in ("down", "up")
    }
    assert LAYOUT.read(tensors, {}, unet_names).adapters.keys() == state.adapters.keys()


def test_alpha_tensors_count_more_than_the_header(unet_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(unet_names, [TO_Q], alpha=None), unet_names)
    tensors[f"unet.{TO_Q}.alpha"] = torch.tensor(8.0)
    header = {ADAPTER_METADATA: json.dumps({"unet.r": 4, "unet.lora_alpha": 1})}
    assert next(iter(LAYOUT.read(tensors, header, unet_names).adapters.values())).alpha == 8.0


def test_a_malformed_header_entry_is_named(unet_names, make_state) -> None:
    for header in [
        "",
        "[1]",
        '{"unet.lora_alpha": "x"}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+b": 1}}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {".*.*.*.*.*.*x": 1}}',
        "[" * 100_000,
    ]:
        tensors = LAYOUT.write(make_state(unet_names, [TO_Q]), unet_names)
        with pytest.raises(LoraError, match="the header entry lora_adapter_metadata must be JSON"):
            LAYOUT.read(tensors, {ADAPTER_METADATA: header}, unet_names)


def test_a_part_of_the_pipeline_inside_the_denoiser_has_keys_and_a_configuration_of_its_own(make_adapter) -> None:
    shapes = {"blocks.0.to_q": (8, 6), "text_conditioner.blocks.0.to_q": (6, 4), "text_conditioner.norm": (6, 6)}
    names = ModelNames(
        family="",
        denoiser={path: OriginalName(path) for path in shapes},
        peft_prefix="transformer",
        denoiser_parts=("text_conditioner",),
        weight_shapes=shapes,
    )
    generator = torch.Generator().manual_seed(0)
    state = AdapterState(
        {
            ModuleRef(DENOISER, path): make_adapter(shapes[path], "lora", rank, 1.0, generator)
            for path, rank in (("blocks.0.to_q", 2), ("text_conditioner.blocks.0.to_q", 3))
        }
    )
    tensors, header = LAYOUT.write(state, names), LAYOUT.header(state, names)
    assert {key.removesuffix(".weight").rpartition(".")[0] for key in tensors} == {
        "transformer.blocks.0.to_q",
        "text_conditioner.blocks.0.to_q",
    }
    fields = json.loads(header[ADAPTER_METADATA])
    assert (fields["transformer.r"], fields["text_conditioner.r"]) == (2, 3)
    assert fields["text_conditioner.target_modules"] == ["blocks.0.to_q"]
    assert LAYOUT.detects(tensors) == len(tensors)
    back = LAYOUT.read(tensors, header, names)
    assert back.adapters.keys() == state.adapters.keys() and not back.unknown


@pytest.mark.parametrize(
    ("header", "alpha"),
    [
        ({"transformer.lora_alpha": "8", "transformer.r": "4"}, 8.0),
        ({"transformer.lora_alpha": "8.0", "transformer.r": "4", "transformer.use_rslora": "True"}, 16.0),
        ({"lora_alpha": "8", "r": "4"}, 8.0),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"attn.to_q": 6}'}, 6.0),
        ({ADAPTER_METADATA: json.dumps({"transformer": {"lora_alpha": 8, "r": 4}})}, 8.0),
    ],
    ids=["by component", "rslora", "without a component", "patterns", "nested JSON"],
)
def test_alphas_in_entries_of_their_own(tmp_path: Path, flux_names, make_state, header, alpha: float) -> None:
    """As trainers write them whose files have no alphas, and once: a converted file has them in its factors."""
    path = "transformer_blocks.0.attn.to_q"
    tensors = LAYOUT.write(make_state(flux_names, [path], alpha=None), flux_names)
    write_safetensors(tmp_path / "x.safetensors", tensors, header)
    state = lora_file.load_lora(tmp_path / "x.safetensors", flux_names)
    assert state.adapters[ModuleRef(DENOISER, path)].alpha == alpha
    lora_file.save_lora(tmp_path / "y.safetensors", state, flux_names, layout="ai-toolkit")
    again = lora_file.load_lora(tmp_path / "y.safetensors", flux_names).adapters[ModuleRef(DENOISER, path)]
    assert (again.alpha, again.tensors.keys()) == (None, state.adapters[ModuleRef(DENOISER, path)].tensors.keys())
    kohya = lora_file.lora_tensors(state, flux_names, layout="kohya")
    assert float(next(tensor for key, tensor in kohya.items() if key.endswith(".alpha"))) == alpha


def test_an_alpha_of_its_own_entry_that_is_no_number_is_named(flux_names, make_state) -> None:
    tensors = LAYOUT.write(make_state(flux_names, ["transformer_blocks.0.attn.to_q"]), flux_names)
    with pytest.raises(LoraError, match=r"the header entry transformer\.lora_alpha must be, with those beside it"):
        LAYOUT.read(tensors, {"transformer.lora_alpha": "twice"}, flux_names)


def renamed(make_state, names, prefix: str) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 without alphas under another prefix than diffusers'."""
    tensors = LAYOUT.write(make_state(names, ["transformer_blocks.0.attn.to_q"], alpha=None), names)
    flat = str.maketrans({".": "_"} if prefix.endswith("_") else {})
    return {
        f"{prefix}{base.translate(flat)}.lora_{end}": tensor
        for key, tensor in tensors.items()
        for base, end in [key.removeprefix("transformer.").split(".lora_")]
    }


def test_alphas_of_a_component_whose_keys_were_renamed(flux_names, make_state) -> None:
    """diffusers renames keys before it reads its header, and so reads it for keys of any prefix."""
    for prefix in ["diffusion_model.", "lora_unet_", "lora_transformer_", "base_model.model.", ""]:
        for header in [
            {"transformer.lora_alpha": "8", "transformer.r": "4"},
            {"unet.lora_alpha": "8", "text_encoder.lora_alpha": "2"},
            {ADAPTER_METADATA: json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})},
        ]:
            (found,) = lora_file.state_from_tensors(
                renamed(make_state, flux_names, prefix), header, flux_names
            ).adapters.values()
            assert found.alpha == 8.0


@pytest.mark.parametrize(
    ("header", "entry"),
    [
        ({"unet.lora_alpha": "8", "transformer.lora_alpha": "16"}, "unet.lora_alpha"),
        ({"transformer.lora_alpha": "8", "transformer.alpha_pattern": '{"attn.to_k": 6}'}, "transformer.lora_alpha"),
        ({"alpha": "8", "rank": "4"}, "alpha"),
        ({"network_alpha": "8"}, "network_alpha"),
    ],
    ids=["two", "patterns", "alpha", "network_alpha"],
)
def test_a_scale_that_programs_do_not_agree_on_is_named(
    tmp_path: Path, flux_names, make_state, header: dict[str, str], entry: str
) -> None:
    tensors = renamed(make_state, flux_names, "diffusion_model.")
    said = [fault.problem for fault in faults_of(tensors, header, flux_names, is_model_sure=True)]
    assert any(f"its scale is unknown: by the header's {entry} it is 2," in problem for problem in said)
    state = lora_file.state_from_tensors(tensors, header, flux_names)
    assert [adapter.alpha for adapter in state.adapters.values()] == [None]
    note = Lora(state, flux_names).applied(None, None).note
    assert f"is applied with the scale 1, and by its header's {entry}" in note
    for plain in ({}, {"alpha": "4"}, {"alpha": "full"}, {"text_encoder.lora_alpha": "8"}):
        said = [fault.problem for fault in faults_of(tensors, plain, flux_names, is_model_sure=True)]
        assert not any("scale is unknown" in problem for problem in said)
        assert Lora(lora_file.state_from_tensors(tensors, plain, flux_names), flux_names).applied(None, None).note == ""
