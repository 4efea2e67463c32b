"""Handles on models are immutable; what they say counts only while they are active."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lorasmith.adapters.frozen_layer import cast_weights
from lorasmith.adapters.patch import Patch
from lorasmith.core.adapter_state import AdapterWeights
from lorasmith.core.errors import DataError, OptionError
from lorasmith.families import model
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN
from lorasmith.families.model import Denoiser, Model, TextEncoder, left_out
from lorasmith.runs.preview_budget import whole_program
from lorasmith.sampling import generate as generating
from lorasmith.sampling.generate import Sampling
from lorasmith.training.config import TrainConfig

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FC1 = "encoder.layers.0.mlp.fc1"


def patch_for(module: nn.Module, path: str, *, bypass: bool = False) -> Patch:
    present = path if path in dict(module.named_modules()) else f"text_model.{path}"
    out, width = module.get_submodule(present).weight.shape
    generator = torch.Generator().manual_seed(0)
    tensors = {"down": torch.randn(2, width, generator=generator), "up": torch.randn(out, 2, generator=generator)}
    return Patch({present: AdapterWeights("lora", tensors)}, strength=0.5, bypass=bypass)


@torch.no_grad()
def predicted(denoiser: Denoiser) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 8, 128, generator=generator)
    return denoiser.predict(latents, torch.tensor([500.0]), Conditioning({"context": context}))


@pytest.mark.parametrize("bypass", [False, True])
def test_base_and_patched_model_are_used_side_by_side(tiny: Model, bypass: bool) -> None:
    base = tiny.denoiser
    one = base.patched(patch_for(base.module, TO_Q, bypass=bypass))
    two = one.patched(patch_for(base.module, TO_Q, bypass=bypass))
    plain = predicted(base)

    results = []
    for handle in (one, two, base, one):
        with handle.active():
            results.append(predicted(handle))

    assert base.patches == ()
    assert len(two.patches) == 2
    assert torch.equal(results[2], plain)
    assert torch.equal(results[0], results[3])
    assert not torch.allclose(results[0], plain)
    assert not torch.allclose(results[1], results[0])
    assert torch.equal(predicted(one), plain)  # outside `active` a patch does not count


def test_a_patched_text_encoder_encodes_otherwise_while_active(tiny: Model) -> None:
    base = tiny.text_encoder
    patched = base.patched("text_encoder", patch_for(tiny.components.text_encoders["text_encoder"], FC1))
    plain = base.encode("a fox").tensors["context"]

    with patched.active():
        changed = patched.encode("a fox").tensors["context"]
    with patched.active(torch.device("cpu")):
        again = patched.encode("a fox").tensors["context"]

    assert not torch.allclose(changed, plain)
    assert torch.equal(again, changed)
    assert torch.equal(base.encode("a fox").tensors["context"], plain)


@pytest.mark.parametrize("bypass", [False, True])
def test_streamed_text_encoders_have_their_patches(tiny: Model, bypass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.components.text_encoders["text_encoder"]
    patch = patch_for(module, FC1, bypass=bypass)
    [path] = patch.adapters
    changed = {"weight": torch.full_like(module.get_parameter(f"{path}.weight"), 0.01)}
    encoder = tiny.text_encoder.patched("text_encoder", replace(patch, differences={path: changed}))
    before = module.get_parameter(f"{path}.weight").clone()
    with encoder.active():
        placed = encoder.encode("a fox").tensors["context"]
    monkeypatch.setattr(TextEncoder, "_streamed", lambda self, device, *, sees: {"text_encoder"})
    with encoder.active():
        assert torch.equal(encoder.encode("a fox").tensors["context"], placed)
    assert torch.equal(module.get_parameter(f"{path}.weight"), before)


def test_the_largest_text_encoders_that_fit_are_placed() -> None:
    sizes = {"clip_l": 1, "clip_g": 3, "t5": 10}
    for free, left in {
        14: set(),
        13: {"clip_l"},
        11: {"clip_g"},
        10: {"clip_g", "clip_l"},
        9: {"t5"},
        0: {*sizes},
    }.items():
        assert left_out(sizes, free) == left


def test_a_gpu_without_room_streams_what_is_not_there_already(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, gpu = tiny.text_encoder, torch.device("cuda", 0)
    size = sum(one.nbytes for one in encoder.encoders.modules["text_encoder"].parameters())
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=device))
    monkeypatch.setattr(TextEncoder, "dtype_on", lambda self, component, device=None: torch.float32)
    for free, left in ((size, {"text_encoder"}), (2 * size, set())):
        monkeypatch.setattr(model, "free_memory", lambda device, free=free: free)
        assert encoder._streamed(gpu, sees=False) == left
    monkeypatch.setattr(model, "free_memory", lambda device: 0)
    monkeypatch.setattr(model, "device_of", lambda module: gpu)
    assert encoder._streamed(gpu, sees=False) == set()
    assert encoder._streamed(torch.device("cpu"), sees=False) == ()


def test_a_patch_for_another_component_is_not_applied(tiny: Model) -> None:
    encoder = tiny.text_encoder.patched("text_encoder_2", patch_for(tiny.components.text_encoders["text_encoder"], FC1))
    plain = tiny.text_encoder.encode("a fox").tensors["context"]

    with encoder.active():
        assert torch.equal(encoder.encode("a fox").tensors["context"], plain)


def test_results_are_in_fp32_on_the_cpu_and_free_of_any_graph(tiny: Model) -> None:
    conditioning = tiny.text_encoder.encode("a fox")
    latents = tiny.autoencoder.encode(torch.zeros(2, 3, 16, 24))
    pixels = tiny.autoencoder.decode(latents)

    assert latents.shape == (2, 4, 4, 6)
    assert pixels.shape == (2, 3, 16, 24)
    for tensor in (*conditioning.tensors.values(), latents, pixels):
        assert (tensor.dtype, tensor.device.type, tensor.requires_grad) == (torch.float32, "cpu", False)
    assert tiny.autoencoder.decode(latents * 100).abs().max() <= 1


def test_the_autoencoder_is_as_before_when_it_was_active(tiny: Model) -> None:
    before = {name: (id(p), p.data_ptr()) for name, p in tiny.components.vae.named_parameters()}
    with tiny.autoencoder.active():
        tiny.autoencoder.encode(torch.zeros(1, 3, 16, 16))

    assert {name: (id(p), p.data_ptr()) for name, p in tiny.components.vae.named_parameters()} == before


def test_handles_cannot_be_changed(tiny: Model) -> None:
    with pytest.raises(FrozenInstanceError):
        tiny.denoiser.patches = ()  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        tiny.title = "other"  # type: ignore[misc]


def test_names_are_made_once(tiny: Model) -> None:
    assert tiny.names is tiny.names
    assert tiny.names.denoiser[TO_Q].path == "middle_block.1.transformer_blocks.0.attn1.to_q"


def test_conditionings_of_other_widths_are_refused(tiny: Model) -> None:
    fitting = Conditioning({"context": torch.zeros(2, 5, 128), "guidance": torch.ones(2)})
    tiny.denoiser.check_conditionings([fitting, fitting])
    for tensors, found in (({"context": torch.zeros(1, 5, 12, 2560)}, "12×2560"), ({}, "none")):
        with pytest.raises(DataError, match=rf"must have width 128, got {found}; encode prompts with its own text enc"):
            tiny.denoiser.check_conditionings([fitting, Conditioning(tensors)])


def test_encoders_run_where_they_are_told_to(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[torch.device] = []

    @contextlib.contextmanager
    def record(
        module: nn.Module, patches: Sequence[Patch], *, device: torch.device, dtype: torch.dtype
    ) -> Iterator[None]:
        placed.append(device)
        yield

    monkeypatch.setattr(model, "placed_with_patches", record)
    monkeypatch.setattr(TextEncoder, "_streamed", lambda self, device, *, sees: ())
    monkeypatch.setattr(model, "best_device", lambda: torch.device("cuda"))
    for encoder in (tiny.text_encoder, replace(tiny.text_encoder, device=torch.device("cpu"))):
        with encoder.active():
            pass
    assert [device.type for device in placed] == ["cuda", "cpu"]


def test_prompts_of_any_text_are_encoded_and_endless_ones_refused(tiny: Model) -> None:
    assert torch.equal(
        tiny.text_encoder.encode("caf\udce9").tensors["context"], tiny.text_encoder.encode("caf?").tensors["context"]
    )
    with pytest.raises(OptionError, match="at most 20,000 characters, got 20,001"):
        tiny.text_encoder.encode("x" * 20_001)


def test_models_show_themselves_on_a_line_and_as_a_card(tiny: Model) -> None:
    named = replace(tiny, title="<b>a\nmodel</b>")
    assert "\n" not in repr(named) and repr(named).endswith(
        "Stable Diffusion 1.x, 8.8 M parameters in fp32, with text_encoder, vae)"
    )
    shown = named._repr_html_()
    assert "<b>" not in shown and "8.8 M parameters in fp32" in shown and "missing parts" not in shown
    bare = replace(tiny, components=replace(tiny.components, vae=None, text_encoders={}))
    assert "text_encoder, vae" in bare._repr_html_()

    denoiser = tiny.denoiser.patched(patch_for(tiny.components.denoiser, TO_Q))
    assert repr(denoiser) == "Denoiser(lorasmith-tiny: Stable Diffusion 1.x, a LoRA on 1 module at 0.5)"


def test_a_quantized_model_says_so() -> None:
    packed = load_model(BUILT_IN)
    cast_weights(packed.components.denoiser, torch.float8_e4m3fn)
    assert "layers quantized" in repr(packed)


@pytest.mark.parametrize(("name", "mark"), [
    ("z_image_turbo_bf16", "turbo"), ("Z-Image-Turbo", "turbo"), ("ZImageTurbo_v2", "turbo"),
    ("zimage_reTurbo", "turbo"), ("model_turbo", "turbo"), ("node-turbo", "turbo"), ("made.TURBO", "turbo"),
    ("z_image_de_turbo_v1_bf16", None), ("Z-Image-De-Turbo", None), ("ZImageDeTurbo", None), ("zimage-deturbo", None),
    ("Z-Image-Turbo-undistilled", None), ("turbo-dedistilled", None), ("Turbo_De-Distill", None),
    ("z_image_bf16", None),
    ("non-turbo", None), ("UnTurbo", None), ("tur bo", None), ("", None),
])  # fmt: skip
def test_a_distilled_model_is_known_by_its_names_unless_they_say_that_it_was_undone(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, name: str, mark: str | None
) -> None:
    monkeypatch.setattr(tiny.family, "distilled", {"turbo": 8}, raising=False)
    plain = replace(tiny, title="mine", path=None)
    assert replace(plain, title=name).distilled_mark == mark
    assert replace(plain, path=Path("turbos") / f"{name}.safetensors").distilled_mark == mark
    assert replace(plain, titles=(name,)).distilled_mark == mark
    assert replace(plain, titles=("Turbo",), title=f"{name} detURBO").distilled_mark is None


def test_a_distilled_model_draws_in_its_own_steps_without_guidance(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.family, "distilled", {"turbo": 8}, raising=False)
    assert tiny.distilled_mark is None and tiny.defaults.steps == 20 and tiny.defaults.guidance > 1
    turbo = replace(tiny, title="tiny_Turbo_bf16")
    assert (turbo.distilled_mark, turbo.defaults.steps, turbo.defaults.guidance) == ("turbo", 8, 1.0)
    asked = []

    def clips(denoiser: object, positives: object, away: object, sampling: Sampling, **others: object) -> list[object]:
        asked.append((sampling.steps, sampling.cfg))
        return []

    monkeypatch.setattr(generating, "clips", clips)
    generating.generate(turbo, "a cat")
    generating.generate(turbo, "a cat", steps=3, cfg=2.0)
    assert asked == [(8, None), (3, 2.0)]
    config = TrainConfig(previews="a cat")
    assert [whole_program(config, one).sampling_steps for one in (None, tiny, turbo)] == [20, 20, 8]
