"""Files that the released LyCORIS and PEFT write: applied and merged here, beside what their own program computes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_weights, saved, weight_change
from torch import Tensor, nn

from lorasmith.adapters.patch import patches_applied
from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.model import Model
from lorasmith.formats.names import OriginalName, split
from lorasmith.formats.scales import rank_of
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.changes import layer_like, merged_weight
from lorasmith.toolbox.check import check_lora
from lorasmith.toolbox.convert import convert_lora
from lorasmith.toolbox.merge import fold_into
from lorasmith.toolbox.model_files import Parameter, open_model
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2", "down_blocks.0.resnets.0.conv1"]


@pytest.fixture(autouse=True)
def lycoris_preset() -> Iterator[None]:
    """LyCORIS keeps its preset in the class."""
    from lycoris import LycorisNetwork

    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    before = {key: value for key, value in vars(LycorisNetwork).items() if key.isupper()}
    yield
    for key, value in before.items():
        setattr(LycorisNetwork, key, value)


def randomise(parameters: Mapping[str, nn.Parameter]) -> None:
    """Moderate values; magnitudes stay near the weights' own."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(parameters.items()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_magnitude = "dora_scale" in name or "magnitude" in name
        parameter.data = parameter.data * (1 + 0.1 * noise) if is_magnitude else parameter.data + 0.2 * noise


def lycoris(
    module: nn.Module, path: Path, layers: list[str], *, prefix: str = "lycoris", ranks: Any = None, **settings: Any
) -> Callable[[], object]:
    """LyCORIS' network on `module`, saved in a file; what is returned merges it there."""
    from lycoris import LycorisNetwork, create_lycoris

    preset = {"target_module": [], "target_name": layers, "use_fnmatch": True, "enable_conv": True}
    LycorisNetwork.apply_preset({**preset, "name_algo_map": ranks or {}, "lora_prefix": prefix})
    sizes = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0}
    network = create_lycoris(module, 1.0, **{**sizes, **settings})
    network.apply_to()
    assert len(network.loras) == len(layers)
    randomise(dict(network.named_parameters()))
    network.save_weights(str(path), torch.float32, {})

    def merge() -> None:
        network.restore()
        network.merge_to(1.0)

    return merge


def peft(module: nn.Module, folder: Path, layers: list[str], *, kind: str = "LoraConfig", **settings: Any) -> Any:
    """PEFT's adapter on `module`, saved in a folder; what is returned merges it there."""
    import peft

    config = getattr(peft, kind)(target_modules=layers, **{"r": 4, **settings})
    model = peft.get_peft_model(module, config)
    randomise({name: one for name, one in model.named_parameters() if one.requires_grad})
    model.save_pretrained(str(folder))
    return model.merge_and_unload


RANKS = {LAYERS[0]: {"algo": "locon", "dim": 8, "alpha": 6.0}, LAYERS[3]: {"algo": "locon", "dim": 2, "alpha": 2.0}}
UNSCALED = {"linear_alpha": 4.0, "conv_alpha": 4.0}  # merging LoHa and LoKr, LyCORIS 4.1.3 has the scale twice
FILES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LyCORIS LoCon": (lycoris, {"algo": "locon"}),
    "LyCORIS LoCon, rank per layer": (lycoris, {"algo": "locon", "ranks": RANKS}),
    "LyCORIS DoRA": (lycoris, {"algo": "locon", "dora_wd": True}),
    "LyCORIS DoRA, per input": (lycoris, {"algo": "locon", "dora_wd": True, "wd_on_output": False}),
    "LyCORIS LoHa": (lycoris, {"algo": "loha", **UNSCALED}),
    "LyCORIS LoHa, Tucker": (lycoris, {"algo": "loha", "use_tucker": True, **UNSCALED}),
    "LyCORIS LoKr": (lycoris, {"algo": "lokr", "factor": 4, **UNSCALED}),
    "LyCORIS LoKr, DoRA": (lycoris, {"algo": "lokr", "factor": 4, "full_matrix": True, "dora_wd": True}),
    "LyCORIS OFT": (lycoris, {"algo": "diag-oft"}),
    "LyCORIS BOFT": (lycoris, {"algo": "boft"}),
    "LyCORIS GLoRA": (lycoris, {"algo": "glora"}),
    "LyCORIS Full": (lycoris, {"algo": "full"}),
    "PEFT LoRA": (peft, {"lora_alpha": 2}),
    "PEFT LoRA, rank per layer": (
        peft,
        {"lora_alpha": 2, "rank_pattern": {LAYERS[0]: 8}, "alpha_pattern": {LAYERS[3]: 6}, "use_rslora": True},
    ),
    "PEFT DoRA": (peft, {"lora_alpha": 2, "use_dora": True}),
    "PEFT LoHa": (peft, {"kind": "LoHaConfig", "alpha": 2}),
    "PEFT LoKr": (peft, {"kind": "LoKrConfig", "alpha": 2, "decompose_factor": 4}),
}
QUICK = ("LyCORIS LoCon, rank per layer", "LyCORIS LoKr, DoRA", "LyCORIS OFT", "PEFT LoRA, rank per layer", "PEFT DoRA")


def predicted(module: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    width = module.config.cross_attention_dim
    latents = torch.randn((1, 4, 8, 8), generator=generator)
    context = torch.randn((1, 7, width), generator=generator)
    with torch.no_grad():
        return module(latents, torch.tensor([400.0]), context).sample


@pytest.mark.parametrize("name", slow_except(list(FILES), *QUICK))
def test_a_file_of_another_program_is_what_it_is_there(tiny: Model, tiny_file: Path, tmp_path: Path, name: str) -> None:
    program, settings = FILES[name]
    theirs, file = copy.deepcopy(tiny.components.denoiser), tmp_path / "theirs.safetensors"
    bare = predicted(theirs)
    merge = program(theirs, file, LAYERS, **settings)
    expected = predicted(theirs)
    assert (expected - bare).abs().max() > 0.01

    lora = Lora.load(file, tiny)
    assert not lora.state.unknown
    assert {ref.path for ref in (lora.state.adapters or lora.state.differences)} == set(LAYERS)
    applied = lora.applied_to(tiny.denoiser, bypass=True)
    with patches_applied(applied.module, applied.patches):
        found = predicted(applied.module)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    merge()
    folded = open_model(fold_into(open_model(tiny_file), [(file, 1.0)], tmp_path / "out.safetensors").output)
    for path in LAYERS:
        ours = folded.read(Parameter(ModuleRef(DENOISER, path), "weight"))
        torch.testing.assert_close(ours, theirs.get_submodule(path).weight, rtol=1e-4, atol=1e-5)


ENCODER_LAYERS = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
ENCODER_FILES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LyCORIS": (lycoris, {"algo": "locon", "prefix": "lora_te"}),
    "PEFT": (peft, {"lora_alpha": 2}),
}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", ENCODER_FILES)
def test_a_lora_of_a_text_encoder_alone(tiny: Model, tiny_file: Path, tmp_path: Path, name: str) -> None:
    """Read, applied, converted and merged; the denoiser stays as it is."""
    program, settings = ENCODER_FILES[name]
    own = tiny.components.text_encoders["text_encoder"]
    theirs, file = copy.deepcopy(own), tmp_path / "theirs.safetensors"
    layers = [path for path, _ in theirs.named_modules() if path.endswith(tuple(ENCODER_LAYERS))]
    merge = program(theirs, file, layers, **settings)
    tokens = tiny.components.tokenizers["text_encoder"]("a red fox", return_tensors="pt").input_ids

    def encoded(module: nn.Module) -> Tensor:
        with torch.no_grad():
            return module(tokens).last_hidden_state

    expected = encoded(theirs)
    assert (expected - encoded(own)).abs().max() > 0.01
    checked = check_lora(file, tiny_file)
    assert checked.is_fine, checked.findings
    convert_lora(file, "portable", tmp_path / "portable.safetensors", tiny_file)
    for one in (file, tmp_path / "portable.safetensors"):
        lora = Lora.load(one, tiny)
        assert {ref.component for ref in lora.state.adapters} == {"text_encoder"} and not lora.state.unknown
        encoder = lora.applied_to_text(tiny.text_encoder)
        with patches_applied(own, [patch for _, patch in encoder.patches]):
            torch.testing.assert_close(encoded(own), expected, rtol=1e-4, atol=1e-4)

    merge()
    before = open_model(tiny_file)
    folded = open_model(fold_into(before, [(file, 1.0)], tmp_path / "out.safetensors").output)
    changed = {one for one in before.places if not torch.equal(before.read(one), folded.read(one))}
    assert {(one.module.component, one.name) for one in changed} == {("text_encoder", "weight")}
    assert len(changed) == len(layers)
    for one in changed:
        path = next(path for path in layers if one.module.path.endswith(path.removeprefix("text_model.")))
        torch.testing.assert_close(folded.read(one), theirs.get_submodule(path).weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["kohya", "comfy", "diffusers", "ai-toolkit", "peft", "portable"])
def test_a_rank_for_each_layer_passes_through_every_layout(
    tiny: Model, tiny_file: Path, tmp_path: Path, layout: str
) -> None:
    """Ranks 1 to 4 with three alphas: the same weights when they are read again."""
    shapes = {ModuleRef(DENOISER, path): tiny.names.weight_shapes[path] for path in LAYERS}
    adapters = {
        ref: random_weights(shape, rank=number + 1, alpha=(None, 1.0, 6.0)[number % 3], seed=number)
        for number, (ref, shape) in enumerate(shapes.items())
    }
    given = saved(tmp_path / "given.safetensors", AdapterState(adapters), tiny.names, "kohya")
    target = tmp_path / ("folder" if layout == "peft" else "other.safetensors")
    convert_lora(given, layout, target, tiny_file)
    read = Lora.load(target, tiny).state.adapters
    assert {ref: rank_of(weights) for ref, weights in read.items()} == {ref: n + 1 for n, ref in enumerate(shapes)}
    for ref, weights in adapters.items():
        torch.testing.assert_close(weight_change(read[ref]), weight_change(weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_magnitudes_of_a_fused_layer_belong_to_its_parts(algorithm: str) -> None:
    """DoRA of q, k and v in one layer is DoRA of each, as its magnitudes are those of output rows."""
    rows, columns = 12, 8
    weights = random_weights((3 * rows, columns), algorithm, seed=1, size=0.3)
    if algorithm == "lokr":
        factors = {"lokr_w1": (6, 2), "lokr_w2": (3 * rows // 6, columns // 2)}
        weights = replace(weights, tensors={name: torch.randn(shape) for name, shape in factors.items()})
    magnitudes = 1 + torch.rand(3 * rows, 1)
    dora = replace(weights, tensors={**weights.tensors, "dora_scale": magnitudes})
    base = torch.randn(3 * rows, columns)
    places = [OriginalName("qkv", rows=(start, start + rows)) for start in range(0, 3 * rows, rows)]
    parts = split(dora, places)
    assert parts is not None

    def merged(one: AdapterWeights | None, weight: Tensor) -> Tensor:
        return merged_weight(ModuleTensors(one), layer_like(None, weight), weight, 1.0)

    found = torch.cat([merged(part, piece) for part, piece in zip(parts, base.split(rows), strict=True)])
    torch.testing.assert_close(found, merged(dora, base))
    torch.testing.assert_close(found.norm(dim=1, keepdim=True), magnitudes)
