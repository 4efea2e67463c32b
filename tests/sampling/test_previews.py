from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import ModelError, OptionError
from lorasmith.families.model import Denoiser, Model, TextEncoder
from lorasmith.sampling.generate import Sampling, generate
from lorasmith.sampling.previews import Previewer, parse_prompts, parse_strengths
from lorasmith.sampling.sample import SamplingCancelledError
from lorasmith.training.lora_handle import Lora

PROMPTS = ("a lion", "a red heart")
HOW = Sampling(seed=5, steps=3)
ENCODER_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


def noisy(component: str, path: str, width: int) -> dict[ModuleRef, AdapterWeights]:
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, width, generator=g), torch.randn(width, 2, generator=g)
    return {ModuleRef(component, path): AdapterWeights("lora", {"down": down * 0.1, "up": up * 0.1}, alpha=2.0)}


@pytest.fixture(scope="module")
def saved(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file that visibly changes what the built-in model draws."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    width = tiny.denoiser.module.get_submodule(path).in_features
    state = AdapterState(adapters=noisy(DENOISER, path, width))
    return Lora(state, tiny.names).save(tmp_path_factory.mktemp("lora") / "saved.safetensors")


@pytest.fixture
def make(tiny: Model) -> Callable[..., Previewer]:
    def build(**settings: Any) -> Previewer:
        defaults: dict[str, Any] = {
            "load": lambda path, strength: Lora.load(path, tiny).applied_to(tiny.denoiser, strength=strength),
            "strengths": (0.5, 1.0),
            "sampling": HOW,
        }
        return Previewer(tiny.denoiser, PROMPTS, **(defaults | settings))

    return build


def same(ours: list[Image.Image], theirs: list[Image.Image]) -> bool:
    return [one.tobytes() for one in ours] == [one.tobytes() for one in theirs]


@pytest.mark.parametrize(
    ("strength", "dtype"),
    [
        (0.5, torch.float32),
        pytest.param(1.0, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1.0, torch.float32, marks=pytest.mark.slow),
        pytest.param(0.5, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_pictures_are_those_that_users_will_get(
    make: Callable[..., Previewer], tiny: Model, saved: Path, strength: float, dtype: torch.dtype
) -> None:
    drawn = make(sampling=replace(HOW, dtype=dtype)).draw(saved, strength)
    adapted = Lora.load(saved, tiny).applied_to(tiny.denoiser, strength=strength)
    assert same(drawn, generate(adapted, PROMPTS, seed=5, steps=3, dtype=dtype))
    assert not same(drawn, generate(tiny, PROMPTS, seed=5, steps=3, dtype=dtype))


@pytest.mark.slow
def test_a_patched_model_is_the_base(make: Callable[..., Previewer], tiny: Model, saved: Path) -> None:
    patched = Lora.load(saved, tiny).applied_to(tiny.denoiser)
    previewer = Previewer(patched, PROMPTS, load=lambda path, strength: patched, sampling=HOW)
    assert same(previewer.draw(None), make().draw(saved))


@pytest.mark.slow
def test_the_base_is_drawn_once(
    make: Callable[..., Previewer], tiny: Model, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previewer = make()
    base = previewer.draw(None)
    assert same(base, generate(tiny, PROMPTS, seed=5, steps=3))
    monkeypatch.setattr(Denoiser, "predict", None)
    assert previewer.draw(saved, 0.0) is base


def test_prompts_are_encoded_at_the_start_alone(
    make: Callable[..., Previewer], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previewer = make()
    monkeypatch.setattr(TextEncoder, "encode", None)
    assert len(previewer.draw(saved)) == len(previewer.draw(None)) == 2


@pytest.mark.slow
def test_a_text_encoder_in_the_file_counts_at_each_strength(
    make: Callable[..., Previewer], tiny: Model, saved: Path, tmp_path: Path
) -> None:
    width = tiny.components.text_encoders["text_encoder"].config.hidden_size
    both = {**Lora.load(saved, tiny).state.adapters, **noisy("text_encoder", ENCODER_LAYER, width)}
    path = Lora(AdapterState(adapters=both), tiny.names).save(tmp_path / "both.safetensors")
    lora, plain = Lora.load(path, tiny), tiny.text_encoder
    previewer = make(encoder=lambda strength: lora.applied_to_text(plain, strength=strength))
    pictures = {}
    for strength in (0.5, 1.0):
        expected = generate(
            lora.applied_to(tiny.denoiser, strength=strength),
            PROMPTS,
            text_encoder=lora.applied_to_text(plain, strength=strength),
            seed=5,
            steps=3,
        )
        pictures[strength] = previewer.draw(path, strength)
        assert same(pictures[strength], expected)
    assert not same(make().draw(path), pictures[1.0]), "the text encoder's part must be seen"
    assert same(previewer.draw(None), make().draw(None))


def test_model_and_random_state_are_left_as_they_were(make: Callable[..., Previewer], tiny: Model, saved: Path) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.denoiser.module.state_dict().items()}
    homes = [parameter.data_ptr() for parameter in tiny.denoiser.module.parameters()]
    state = torch.get_rng_state()
    make(sampling=replace(HOW, dtype=torch.bfloat16)).draw(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.data_ptr() for parameter in tiny.denoiser.module.parameters()] == homes
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.denoiser.module.state_dict().items())


def test_cancelling_is_honoured(make: Callable[..., Previewer], saved: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(SamplingCancelledError):
        make(cancelled=lambda: next(asked)).draw(saved)


def test_models_without_autoencoder_or_text_encoder_are_refused_at_the_start(tiny: Model) -> None:
    blind = replace(tiny, components=replace(tiny.components, vae=None))
    deaf = replace(tiny, components=replace(tiny.components, text_encoders={}, tokenizers={}))
    for model, sentence in ((blind, "needs an autoencoder for pictures"), (deaf, "needs the text encoder clip_l")):
        with pytest.raises(ModelError, match=sentence):
            Previewer(model.denoiser, PROMPTS, load=lambda path, strength, model=model: model.denoiser, sampling=HOW)


def test_prompts_in_a_text() -> None:
    for text, prompts in [
        (None, ()),
        (" | \n ", ()),
        ("a cat", ("a cat",)),
        ("a cat | (a dog:1.2), red|", ("a cat", "(a dog:1.2), red")),
        ("a cat\r\n\na dog|a cow", ("a cat", "a dog", "a cow")),
    ]:
        assert parse_prompts(text) == prompts


def test_too_many_prompts_are_refused() -> None:
    assert len(parse_prompts("x|" * 64)) == 64
    with pytest.raises(OptionError, match="at most 64 prompts, got 65"):
        parse_prompts("x\n" * 65)


def test_strengths_in_a_text() -> None:
    for text, strengths in [
        ("0.5,1", (0.5, 1.0)),
        ("1, 1,,0, -0.5 ", (-0.5, 1.0)),
        ("", ()),
        ("10,-10", (-10.0, 10.0)),
    ]:
        assert parse_strengths(text) == strengths


def test_what_is_no_strength_is_refused() -> None:
    for text in ["full", "1;2", "nan", "inf", "10.1", "-11"]:
        with pytest.raises(OptionError, match=rf"between -10 and 10, got '{text}'; write them like 0.5,1"):
            parse_strengths(f"1,{text}")
