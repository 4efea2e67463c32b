"""PEFT's layout, with PEFT as the judge: what is written here, PEFT loads; what PEFT saved is read here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OutputError
from lorasmith.formats.layouts.adapter_config import stated_alphas
from lorasmith.formats.layouts.layout import LAYOUTS
from lorasmith.formats.lora_file import load_lora, save_lora
from lorasmith.formats.names import OriginalName
from lorasmith.formats.spelling import grouped
from tests.processor_time import processor_time

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_K = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
ENCODER = "text_model.encoder.layers.1.mlp.fc1"


def loaded(model: nn.Module, folder: Path) -> nn.Module:
    """The model with PEFT's adapter, after checking that PEFT found a place for each tensor and a tensor for each."""
    from peft import PeftConfig, inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict

    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    tensors = {k.removeprefix("base_model.model."): t for k, t in load_peft_weights(str(folder), "cpu").items()}
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if any(part in key for part in ("lora_", "hada_", "lokr_"))]
    return model


def applied_changes(model: nn.Module) -> dict[str, Tensor]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        path: module.get_delta_weight("default").detach().flatten(1).double()
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def mixed(names, make_state, make_adapter, algorithm: str, paths=None) -> AdapterState:
    state = make_state(names, paths, algorithm=algorithm, rank=4, alpha=2.0)
    generator = torch.Generator().manual_seed(1)
    for path, rank, alpha in ((TO_Q, 2, 3.0), (FF, 4, 1.5)):
        adapter = make_adapter(names.weight_shapes[path], algorithm, rank, alpha, generator)
        state.adapters[ModuleRef(DENOISER, path)] = adapter
    return state


@pytest.mark.parametrize("algorithm", ["lora", "loha"])
def test_peft_applies_every_module(tmp_path, make_unet, unet_names, make_state, make_adapter, delta, algorithm) -> None:
    state = mixed(unet_names, make_state, make_adapter, algorithm)
    save_lora(tmp_path / "x", state, unet_names, layout="peft")
    changes = applied_changes(loaded(make_unet(), tmp_path / "x"))
    assert changes.keys() == {ref.path for ref in state.adapters}
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(changes[ref.path], delta(weights), rtol=1e-5, atol=1e-7)
    again = load_lora(tmp_path / "x", unet_names)
    for ref, weights in state.adapters.items():
        assert again.adapters[ref].alpha == weights.alpha
        assert all(torch.equal(again.adapters[ref].tensors[name], one) for name, one in weights.tensors.items())


def lokr(sizes: tuple[int, int, int, int], rank: int | None, alpha: float, seed: int) -> AdapterWeights:
    """LoKr of factors (out_l, in_m) and (out_k, in_n), the second of a rank or whole."""
    generator = torch.Generator().manual_seed(seed)
    out_l, in_m, out_k, in_n = sizes
    tensors = {"lokr_w1": torch.rand(out_l, in_m, generator=generator)}
    if rank is None:
        tensors["lokr_w2"] = torch.rand(out_k, in_n, generator=generator)
    else:
        tensors["lokr_w2_a"] = torch.rand(out_k, rank, generator=generator)
        tensors["lokr_w2_b"] = torch.rand(rank, in_n, generator=generator)
    return AdapterWeights("lokr", tensors, alpha)


def change(weights: AdapterWeights) -> Tensor:
    tensors = {name: tensor.double() for name, tensor in weights.tensors.items()}
    if "lokr_w2" in tensors:
        return torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    assert weights.alpha is not None
    return torch.kron(tensors["lokr_w1"], second) * weights.alpha / tensors["lokr_w2_b"].shape[0]


def test_peft_applies_lokr_whose_factors_it_would_choose(tmp_path: Path, make_unet, unet_names) -> None:
    refs = {path: ModuleRef(DENOISER, path) for path in (TO_Q, TO_K, FF)}
    assert [unet_names.weight_shapes[path] for path in refs] == [(32, 32), (32, 48), (64, 256)]
    state = AdapterState(
        {
            refs[TO_Q]: lokr((4, 4, 8, 8), 2, 3.0, 0),
            refs[TO_K]: lokr((4, 4, 8, 12), None, 5.0, 1),  # whole factors: alpha means nothing
            refs[FF]: lokr((4, 4, 16, 64), 8, 2.0, 2),
        }
    )
    assert not LAYOUTS["peft"].losses(state, unet_names)
    save_lora(tmp_path / "x", state, unet_names, layout="peft")
    assert json.loads((tmp_path / "x" / "adapter_config.json").read_text())["decompose_factor"] == 4
    changes = applied_changes(loaded(make_unet(), tmp_path / "x"))
    again = load_lora(tmp_path / "x", unet_names)
    for ref, weights in state.adapters.items():
        torch.testing.assert_close(changes[ref.path], change(weights), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(change(again.adapters[ref]), change(weights), rtol=1e-6, atol=0)
    state.adapters[refs[FF]] = lokr((2, 4, 32, 64), 8, 2.0, 2)
    (loss,) = LAYOUTS["peft"].losses(state, unet_names)
    assert (loss.module, "decompose_factor, here 4" in loss.reason) == (refs[FF], True)


@pytest.mark.parametrize(
    "options", [{}, {"decompose_both": True, "r": 2, "decompose_factor": 8}, {"r": 64, "alpha": 5}]
)
def test_what_pefts_lokr_saved_is_read_and_written_again(tmp_path, make_unet, unet_names, options) -> None:
    from peft import LoKrConfig, get_peft_model

    targets = ["to_q", "to_k", "conv1", "proj_in"]
    config = LoKrConfig(**{"r": 4, "alpha": 2, "target_modules": targets, "init_weights": False, **options})
    torch.manual_seed(0)
    model = get_peft_model(make_unet(), config)
    model.save_pretrained(str(tmp_path / "theirs"))
    state = load_lora(tmp_path / "theirs", unet_names)
    assert not state.unknown
    assert not LAYOUTS["peft"].losses(state, unet_names)
    save_lora(tmp_path / "ours", state, unet_names, layout="peft")
    ours, theirs = applied_changes(loaded(make_unet(), tmp_path / "ours")), applied_changes(model.base_model.model)
    assert ours.keys() == theirs.keys() == {ref.path for ref in state.adapters}
    for path, expected in theirs.items():
        torch.testing.assert_close(ours[path], expected, rtol=1e-5, atol=1e-6)


def test_dora_is_read_and_given_back(tmp_path: Path, make_unet, unet_names) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], use_dora=True)
    torch.manual_seed(0)
    model = get_peft_model(make_unet(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.rand_like(parameter) + 0.1
    model.save_pretrained(str(tmp_path / "theirs"))
    state = load_lora(tmp_path / "theirs", unet_names)
    save_lora(tmp_path / "ours", state, unet_names, layout="peft")
    ours = loaded(make_unet(), tmp_path / "ours")
    for (name, mine), other in zip(
        ours.state_dict().items(), model.base_model.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other), name
    del state.adapters[ModuleRef(DENOISER, TO_Q)].tensors["dora_scale"]
    with pytest.raises(LoraError, match=r"attn1\.to_q: PEFT gives DoRA's magnitudes to all modules of a LoRA or to no"):
        save_lora(tmp_path / "odd", state, unet_names, layout="peft")
    assert not (tmp_path / "odd").exists()


def test_a_path_that_ends_another_is_chosen_alone(tmp_path: Path, flux_names, make_state) -> None:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model = {**flux_names.denoiser, "proj_out": OriginalName("final_layer.linear")}
    names = replace(flux_names, denoiser=model, weight_shapes={**flux_names.weight_shapes, "proj_out": (64, 24)})
    for paths in (["norm_out.linear", "proj_out"], ["single_transformer_blocks.0.proj_out"]):
        save_lora(tmp_path / "x", make_state(names, paths), names, layout="peft")
        config = PeftConfig.from_pretrained(str(tmp_path / "x"))
        assert [path for path in sorted(model) if check_target_module_exists(config, path)] == paths


def test_text_encoders_have_a_folder_of_their_own(tmp_path: Path, unet_names, make_state, make_adapter) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    state = make_state(unet_names, [TO_Q])
    adapter = make_adapter((32, 16), "lora", 2, 1.0, torch.Generator().manual_seed(0))
    state.adapters[ModuleRef("text_encoder", ENCODER)] = adapter
    save_lora(tmp_path / "x", state, unet_names, layout="peft")
    assert load_lora(tmp_path / "x", unet_names).adapters.keys() == state.adapters.keys()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=99, bos_token_id=97, eos_token_id=98, **sizes))
    changes = applied_changes(loaded(encoder, tmp_path / "x" / "text_encoder"))
    assert [path.removeprefix("text_model.") for path in changes] == [ENCODER.removeprefix("text_model.")]


def test_other_kinds_are_refused(tmp_path: Path, unet_names, make_state) -> None:
    folder = tmp_path / "x"
    save_lora(folder, make_state(unet_names, [TO_Q]), unet_names, layout="peft")
    for config, said in (
        ('{"peft_type": "OFT"}', "this one is OFT, which turns a layer's inputs"),
        ('{"peft_type": "IA3"}', "this one is IA3;"),
        ('{"init_lora_weights": "pissa_niter_4"}', "started with pissa_niter_4, which changed the model's own weights"),
        ("nonsense", "must be a JSON object"),
    ):
        (folder / "adapter_config.json").write_text(config)
        with pytest.raises(LoraError, match=said):
            load_lora(folder, unet_names)


def test_what_has_no_place_in_a_folder(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q, TO_K])
    with pytest.raises(OutputError, match=r"is a folder, and x\.safetensors is the name of a file"):
        save_lora(tmp_path / "x.safetensors", state, unet_names, layout="peft")
    state.adapters[ModuleRef(DENOISER, TO_K)] = make_state(unet_names, [TO_K], algorithm="oft").adapters[
        ModuleRef(DENOISER, TO_K)
    ]
    with pytest.raises(LoraError, match=f"{TO_K}: PEFT has no oft like this one; choose another layout"):
        save_lora(tmp_path / "y", state, unet_names, layout="peft")


def test_keys_cannot_lead_out_of_the_folder(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names, [TO_Q])
    state.unknown["../../outside/x.lora_A.weight"] = torch.ones(1)
    save_lora(tmp_path / "x", state, unet_names, layout="peft")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "x",
    ]


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ('{"lora_alpha": NaN}', "must be a JSON object"),
        ('{"r":' * 50_000, "must be a JSON object"),
        ({"lora_alpha": 10**30}, "must be a JSON object"),
        ({"lora_alpha": 1e30}, "and is 1e\\+30"),
        ({"lora_alpha": True}, "and is True"),
        ({"lora_alpha": "8"}, "and is '8'"),
        ({"r": 0}, "a rank must be at least 1, and is 0"),
        ({"alpha_pattern": {"to_q": 1e30}}, "and is 1e\\+30"),
        ({"rank_pattern": {"to_q": -4}}, "at least 1, and is -4"),
        ({"alpha_pattern": {"(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)(a|b)" + "|c" * 9: 1}}, "repeats too much"),
        ({"alpha_pattern": {"a?" * 30 + "b": 1}}, "repeats too much"),
        ({"alpha_pattern": {f"a{index}|b": 1 for index in range(101)}}, "more than 100 regular expressions"),
        ({"alpha_pattern": {".*x.*y.*z": 1}}, "could take minutes"),
    ],
)
def test_numbers_and_patterns_of_a_configuration_are_bounded(tmp_path, unet_names, fields, said: str) -> None:
    (tmp_path / "x").mkdir()
    base = f"base_model.model.{'x.' * 200}to_q"
    tensors = {f"{base}.lora_A.weight": torch.ones(4, 32), f"{base}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
    text = fields if isinstance(fields, str) else json.dumps({**CONFIG, **fields})
    (tmp_path / "x" / "adapter_config.json").write_text(text)
    with pytest.raises(LoraError, match=said):
        load_lora(tmp_path / "x", unet_names)


def test_thousands_of_patterns_take_a_moment() -> None:
    names = [f"blocks.{index}.attn.to_q" for index in range(5_000)]
    fields = {"lora_alpha": 1, "r": 4, "alpha_pattern": {name: index for index, name in enumerate(names, start=1)}}
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 1) for name in names}
    with processor_time(at_most_s=2):
        alphas = stated_alphas(tensors, grouped(tensors), {"lora_adapter_metadata": json.dumps(fields)})
    assert list(alphas.values()) == list(range(1, 5_001))
