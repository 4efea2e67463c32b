"""A model with LoRAs folded in is the model with LoRAs applied, and otherwise the very same file."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import cases
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorasmith.adapters.patch import patches_merged
from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError, OutputError
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors, read_safetensors
from lorasmith.toolbox import merge
from lorasmith.toolbox.merge import fold_into
from lorasmith.toolbox.model_files import Parameter, open_model
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except


def applied_weights(model: Model, loras: Sequence[tuple[Path, float]]) -> dict[str, Tensor]:
    """Every parameter while LoRAs are applied, by component and name."""
    denoiser, encoder = model.denoiser, model.text_encoder
    for path, strength in loras:
        lora = Lora.load(path, model)
        denoiser, encoder = (
            lora.applied_to(denoiser, strength=strength),
            lora.applied_to_text(encoder, strength=strength),
        )
    weights = {}
    for component, module, patches in (
        (DENOISER, denoiser.module, denoiser.patches),
        *(
            (name, module, [patch for target, patch in encoder.patches if target == name])
            for name, module in model.components.text_encoders.items()
        ),
    ):
        with patches_merged(module, patches):
            weights |= {f"{component}.{name}": tensor.detach().clone() for name, tensor in module.named_parameters()}
    return weights


def parameters(model: Model) -> dict[str, Tensor]:
    parts: dict[str, nn.Module] = {DENOISER: model.components.denoiser, **model.components.text_encoders}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.named_parameters()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors are not equal to the bit."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


def random_lora(model: Model, path: Path, algorithm: str = "lora", layout: str = "kohya", **settings: object) -> Path:
    shapes = cases.shapes_of(model, (*cases.ATTENTION, "attn.to_k", "attn.add_q_proj", "proj_mlp", "norm_out.linear"))
    state = cases.lora_state(shapes, algorithm, **settings)
    biased = next(ref for ref in shapes if ref.component == DENOISER)
    bias = torch.randn(shapes[biased][0], generator=torch.Generator().manual_seed(9))
    differences = {} if layout == "diffusers" else {biased: {"bias": bias}}  # diffusers has none
    return cases.saved(path, AdapterState(state.adapters, differences), model.names, layout)


@pytest.mark.parametrize(
    ("algorithm", "variant"),
    slow_except([("lora", ""), ("loha", ""), ("oft", ""), ("lora", "dora")], ("lora", "dora")),
)
def test_a_single_file_has_the_weights_of_the_applied_lora(
    tiny_file: Path, tiny: Model, tmp_path: Path, algorithm: str, variant: str
) -> None:
    parts = [(random_lora(tiny, tmp_path / "a.safetensors", algorithm, layout="comfy", variant=variant), 0.7)]
    report = fold_into(open_model(tiny_file), parts, tmp_path / "out.safetensors")
    folded = load_model(report.output)

    assert same_bits(parameters(folded), applied_weights(tiny, parts)) == []
    assert len(same_bits(parameters(folded), parameters(tiny))) == report.modules + 1  # one has a bias, too
    assert not report.left_out


@pytest.mark.slow
def test_several_are_folded_in_order(tiny_file: Path, tiny: Model, tmp_path: Path) -> None:
    parts = [
        (random_lora(tiny, tmp_path / "a.safetensors", "oft"), 1.0),
        (random_lora(tiny, tmp_path / "b.safetensors", seed=4, layout="diffusers"), -0.4),
        (random_lora(tiny, tmp_path / "c.safetensors", "loha", seed=5), 0.6),
    ]
    output = fold_into(open_model(tiny_file), parts, tmp_path / "out.safetensors").output

    assert same_bits(parameters(load_model(output)), applied_weights(tiny, parts)) == []


def test_everything_else_is_copied_byte_by_byte(sd2_file: Path, sd2: Model, tmp_path: Path) -> None:
    parts = [(random_lora(sd2, tmp_path / "a.safetensors"), 0.5)]
    output = fold_into(open_model(sd2_file), parts, tmp_path / "out.safetensors").output
    before, after = load_file(sd2_file), load_file(output)

    assert list(check_safetensors(sd2_file).tensors.items()) == list(check_safetensors(output).tensors.items())
    changed = set(same_bits(before, after))
    assert all(name.endswith((".weight", "in_proj_weight", ".bias")) for name in changed)
    assert 0 < len(changed) < len(before) / 4
    metadata = check_safetensors(output).metadata
    assert metadata == {"modelspec.title": "small", "lorasmith.history": "folded in a.safetensors:0.5"}


@pytest.mark.slow
def test_a_half_precision_model_is_rounded_once(sd2_file: Path, sd2: Model, tmp_path: Path) -> None:
    """One LoRA in fp16 has the bits of applying it; of its text encoder's fused projection only a third changes."""
    parts = [(random_lora(sd2, tmp_path / "a.safetensors"), 0.5)]
    folded = load_model(
        fold_into(open_model(sd2_file), parts, tmp_path / "out.safetensors").output, dtype=torch.float16
    )
    expected = applied_weights(sd2, parts)
    assert same_bits(parameters(folded), expected) == []


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_fused_projections_get_their_rows(flux_file: Path, flux: Model, tmp_path: Path, layout: str) -> None:
    parts = [(random_lora(flux, tmp_path / "a.safetensors", layout=layout, rank=3), 1.5)]
    output = fold_into(open_model(flux_file), parts, tmp_path / "out.safetensors").output

    assert same_bits(parameters(load_model(output)), applied_weights(flux, parts)) == []
    names = set(same_bits(load_file(flux_file), load_file(output)))
    assert {"double_blocks.0.img_attn.qkv.weight", "final_layer.adaLN_modulation.1.weight"} <= names


def test_a_folder_stays_a_folder(folder: Path, tiny: Model, tmp_path: Path) -> None:
    parts = [(random_lora(tiny, tmp_path / "a.safetensors"), 0.7)]
    report = fold_into(open_model(folder), parts, tmp_path / "out")

    assert same_bits(parameters(load_model(report.output)), applied_weights(tiny, parts)) == []
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    written = {path.relative_to(report.output): path for path in report.output.rglob("*") if path.is_file()}
    assert files.keys() == written.keys()
    changed = {path.parent.name for path in files if files[path].read_bytes() != written[path].read_bytes()}
    assert changed == {"unet", "text_encoder"}
    assert not list(tmp_path.glob(".*"))


def test_other_copies_of_changed_weights_stay_behind(folder: Path, tiny: Model, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    for part, name in (("unet", "diffusion_pytorch_model.fp16.safetensors"), ("vae", "diffusion_pytorch_model.bin")):
        (copy / part / name).write_bytes(b"other")
    lora = cases.saved(tmp_path / "a.safetensors", cases.lora_state(cases.shapes_of(tiny)), tiny.names)
    report = fold_into(open_model(copy), [(lora, 1.0)], tmp_path / "out")

    assert report.skipped == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert not (report.output / report.skipped[0]).exists()
    assert (report.output / "vae" / "diffusion_pytorch_model.bin").read_bytes() == b"other"


def test_a_folder_in_shards(folder: Path, tiny: Model, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    whole = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, chosen in shards.items():
        save_file({name: tensors[name] for name in chosen}, copy / "unet" / file)
    weight_map = {name: file for file, chosen in shards.items() for name in chosen}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (copy / "unet" / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    parts = [(random_lora(tiny, tmp_path / "a.safetensors"), 0.7)]

    output = fold_into(open_model(copy), parts, tmp_path / "out").output
    assert same_bits(parameters(load_model(output)), applied_weights(tiny, parts)) == []


def test_what_is_wrong_is_a_sentence_and_nothing_is_left(flux: Model, tiny: Model, tmp_path: Path) -> None:
    model, output = open_model("lorasmith-tiny"), tmp_path / "out.safetensors"
    flux_lora, lora = random_lora(flux, tmp_path / "flux.safetensors"), random_lora(tiny, tmp_path / "a.safetensors")
    with pytest.raises(LoraError, match="looks like a LoRA for Flux"):
        fold_into(model, [(flux_lora, 1.0)], output)
    with pytest.raises(LoraError, match="every strength is 0"):
        fold_into(model, [(lora, 0.0)], output)
    with pytest.raises(OutputError, match="exists already"):
        fold_into(model, [(lora, 1.0)], lora)
    with pytest.raises(LoraError, match="does not exist"):
        fold_into(model, [(tmp_path / "none.safetensors", 1.0)], output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "flux.safetensors"]


def test_weights_too_large_for_half_precision_are_refused(sd2_file: Path, sd2: Model, tmp_path: Path) -> None:
    lora = random_lora(sd2, tmp_path / "a.safetensors", size=10.0)
    with pytest.raises(LoraError, match="too large for the model's float16"):
        fold_into(open_model(sd2_file), [(lora, 1e4)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_difference_that_the_model_has_no_place_for_is_refused(tiny: Model, tmp_path: Path) -> None:
    shapes = cases.shapes_of(tiny, ("attn1.to_q",))  # which has no bias
    ref = next(ref for ref in shapes if ref.component == DENOISER)
    state = AdapterState({}, {ModuleRef(DENOISER, ref.path): {"bias": torch.ones(shapes[ref][0])}})
    lora = cases.saved(tmp_path / "a.safetensors", state, tiny.names)
    with pytest.raises(
        LoraError, match=r"add biases to layers without one, but this one does to .*to_q, as PEFT's lora_bias=True"
    ):
        fold_into(open_model("lorasmith-tiny"), [(lora, 1.0)], tmp_path / "out.safetensors")


def test_what_the_model_lacks_is_told(tiny_file: Path, tiny: Model, tmp_path: Path) -> None:
    """Its text encoder, and modules of another kind of model."""
    tensors, metadata = read_safetensors(tiny_file)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors", metadata)
    lora = cases.saved(tmp_path / "a.safetensors", cases.lora_state(cases.shapes_of(tiny)), tiny.names)
    extra = {f"lora_te2_text_model_x.{name}": torch.ones(2, 2) for name in ("lora_down.weight", "lora_up.weight")}
    save_file({**load_file(lora), **extra}, lora)
    report = fold_into(open_model(tmp_path / "unet.safetensors"), [(lora, 1.0)], tmp_path / "out.safetensors")

    encoder = {ref.path for ref in cases.shapes_of(tiny) if ref.component != DENOISER}
    assert set(report.left_out[lora]) == encoder | extra.keys()
    assert report.modules == len(cases.shapes_of(tiny)) - len(encoder)


@pytest.fixture
def flux_folder(flux: Model, tmp_path: Path) -> Path:
    """A small Flux.1 as diffusers saves it, with both text encoders."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    folder = tmp_path / "flux"
    flux.components.denoiser.save_pretrained(folder / "transformer")
    clip = CLIPTextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, vocab_size=99
    )
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    t5 = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu")
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def test_text_encoders_that_are_not_loaded_for_training_are_folded_into(flux_folder: Path, tmp_path: Path) -> None:
    model = open_model(flux_folder)
    refs = [
        ModuleRef("text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
        ModuleRef("text_encoder_2", "encoder.block.1.layer.0.SelfAttention.q"),
    ]
    state = cases.lora_state({ref: model.places[Parameter(ref, "weight")].shape for ref in refs})
    lora = cases.saved(tmp_path / "a.safetensors", state, model.names)
    folded = open_model(fold_into(model, [(lora, 0.5)], tmp_path / "out").output)

    for parameter in model.places:
        before, after = model.read(parameter), folded.read(parameter)
        if parameter.module in refs and parameter.name == "weight":
            expected = before.double() + 0.5 * cases.weight_change(state.adapters[parameter.module])
            assert torch.allclose(after.double(), expected, atol=1e-6)
        else:
            assert torch.equal(before, after), parameter


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_more_than_some_tensors_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks there are, folding takes the memory of a few times the largest tensor."""

    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watched(*args: object, **settings: object) -> object:
        result = changed(*args, **settings)  # type: ignore[arg-type]
        peaks.append(private())
        return result

    shape = models.FluxShape(512, 1, 20, 64, 32)
    save_file({name: torch.zeros(size) for name, size in shape.tensors()}, tmp_path / "model.safetensors")
    model = open_model(tmp_path / "model.safetensors")
    layers = {ModuleRef(DENOISER, p): s for p, s in model.names.weight_shapes.items() if p.endswith("proj_mlp")}
    lora = cases.saved(tmp_path / "lora.safetensors", cases.lora_state(layers), model.names)
    changed, peaks = merge._changed, [private()]
    monkeypatch.setattr(merge, "_changed", watched)
    fold_into(model, [(lora, 1.0)], tmp_path / "out.safetensors")

    largest = max(4 * math.prod(size) for _, size in shape.tensors())
    assert len(peaks) == 21
    # The allocator keeps some of what was freed; twelve times is what there is room for in any case.
    assert max(peaks) - peaks[0] < 12 * largest < (tmp_path / "model.safetensors").stat().st_size / 3
