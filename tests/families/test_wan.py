"""What is particular to Wan: clips, time and text as its network sees them, experts, and variants that are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import tiny_wan
import torch
from original_models import save
from safetensors.torch import load_file
from tiny_parts import TinyFamily, randomized
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import DataError, LoraError, ModelError
from lorasmith.core.placement import placed
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.wan import Wan
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import matches
from lorasmith.formats.spelling import guessed_family
from lorasmith.runs.drawing import experts_of
from lorasmith.runs.library import train
from lorasmith.sampling.generate import to_images
from lorasmith.sampling.sample import prepare_noise, sample_latents
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.toolbox.merge import fold_into
from lorasmith.toolbox.model_files import open_model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import plan_job
from lorasmith.training.lora_handle import Lora
from tests.covering import slow_except

FRAMES = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    tiny = {"wan": tiny_wan.WAN, "wan22-5b": tiny_wan.WAN_5B}
    return {name: one.saved(tmp_path_factory.mktemp(name)) for name, one in tiny.items()}


@pytest.fixture(scope="module", params=["wan", "wan22-5b"])
def pair(request: pytest.FixtureRequest, files: dict[str, dict[str, Path]]) -> tuple[TinyFamily, Model]:
    tiny = {"wan": tiny_wan.WAN, "wan22-5b": tiny_wan.WAN_5B}[request.param]
    return tiny, tiny.loaded(files[request.param])


@pytest.fixture(scope="module")
def wan(files: dict[str, dict[str, Path]]) -> Model:
    return tiny_wan.WAN.loaded(files["wan"])


def given(model: Model, batch: int = 1) -> Conditioning:
    context = models.seeded("context", (batch, 512, 32), seed=0)
    return Conditioning({"context": context})


@torch.no_grad()
def test_a_clip_is_predicted_as_in_diffusers_with_the_time_of_each_token(pair: tuple[TinyFamily, Model]) -> None:
    """WanPipeline gives the tokens of 5B a time each, which is the same for all where no frame is given."""
    tiny, model = pair
    latents = models.seeded("latents", (1, *model.components.latent.shape(64, 96, FRAMES)), seed=0)
    assert latents.shape[2] == 2
    level = model.components.schedule.at_sigma(torch.tensor([0.6]))
    context = given(model).tensors["context"]
    ours = model.denoiser.predict(latents, level.time, given(model))
    tokens = latents[0, 0].numel() // 4
    for time in (torch.tensor([600.0]), torch.full((1, tokens), 600.0)):
        theirs = tiny.parts()["transformer"](latents, time, context).sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_clip_is_drawn_as_by_the_pipeline(pair: tuple[TinyFamily, Model], guidance: float) -> None:
    tiny, model = pair
    shape = (1, *model.components.latent.shape(64, 96, FRAMES))
    sigmas = sigmas_for(model.components.schedule, "simple", 3)
    noise = prepare_noise(5, shape)
    encoded = [model.text_encoder.encode(text) for text in ("a fox", "")]
    latents = sample_latents(
        model.denoiser.predict,
        schedule=model.components.schedule,
        parameterization="flow",
        positive=encoded[:1],
        negative=encoded[1:],
        latents=torch.zeros(shape),
        noise=noise,
        sigmas=sigmas,
        sampler="euler",
        cfg=guidance,
        seed=5,
    )
    pixels = model.autoencoder.decode_frames(model.components.latent.from_model(latents))
    ours = [np.asarray(one, dtype=int) for one in to_images(pixels[0].movedim(1, 0))]
    arguments = {"latents": noise, "sigmas": sigmas[:-1].tolist(), "num_inference_steps": 3, "num_frames": FRAMES}
    arguments |= {"height": 64, "width": 96, "prompt": "a fox", "negative_prompt": ""}
    theirs = [np.asarray(one, dtype=int) for one in tiny_wan.frames_of(tiny.made(), arguments, guidance)]
    assert len(ours) == len(theirs) == FRAMES
    assert max(np.abs(mine - other).max() for mine, other in zip(ours, theirs, strict=True)) <= 1
    assert np.abs(ours[0] - ours[-1]).mean() > 1, "frames differ"


@pytest.mark.slow
def test_a_clip_has_the_pipelines_latents(pair: tuple[TinyFamily, Model]) -> None:
    """Those of a clip that diffusers' autoencoder encodes, with the constants of its configuration."""
    tiny, model = pair
    clip = models.seeded("clip", (1, 3, FRAMES, 64, 96), seed=0, std=0.4).clamp(-1, 1)
    vae = tiny.parts()["vae"]
    mean, deviation = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    theirs = (vae.encode(clip).latent_dist.mode() - mean) / deviation
    ours = model.components.latent.to_model(model.autoencoder.encode(clip))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_time_is_a_thousand_times_sigma_and_stays_exact(wan: Model) -> None:
    schedule = wan.components.schedule
    assert schedule.shift == 8
    assert schedule.at_sigma(torch.tensor([0.9985])).time.item() == pytest.approx(998.5)
    times = torch.tensor([998.5])
    seen: list[Tensor] = []

    def denoiser(timestep: Tensor, hidden_states: Tensor, **_: object) -> tuple[Tensor]:
        seen.append(timestep)
        return (hidden_states,)

    latents = torch.zeros(1, 16, 1, 4, 4, dtype=torch.bfloat16)
    wan.family.predict(denoiser, latents, times, Conditioning({"context": torch.zeros(1, 512, 32)}))  # type: ignore[arg-type]
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], times)


def test_the_shift_grows_with_the_picture(pair: tuple[TinyFamily, Model]) -> None:
    """3 at 480×832 and 5 at 720×1280, as WanPipeline's documentation says."""
    _, model = pair
    pixels = model.components.latent.downscale
    shifts = [
        model.components.schedule.resolution_shift(height // pixels, width // pixels)
        for height, width in ((480, 832), (720, 1280))
    ]
    assert shifts == pytest.approx([3, 5], rel=0.03)


@torch.no_grad()
def test_prompts_beyond_512_tokens_share_a_batch_with_others(wan: Model) -> None:
    """The network has no mask for text, and a prompt is not cut in ComfyUI."""
    texts = ["a fox", "the quick brown fox " * 45, "a mat", "the quick brown fox " * 36]
    encoded = [wan.text_encoder.encode(text) for text in texts]
    lengths = [one.tensors["context"].shape[1] for one in encoded]
    assert lengths[0] == lengths[2] == 512 < lengths[3] < lengths[1]
    latents = models.seeded("latents", (4, *wan.components.latent.shape(32, 32)), seed=0)
    times = torch.tensor([900.0, 500.0, 300.0, 20.0])
    together = wan.denoiser.predict(latents, times, wan.family.join(encoded))
    alone = [wan.denoiser.predict(latents[i : i + 1], times[i : i + 1], one) for i, one in enumerate(encoded)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_rows_after_the_prompt_are_zero_and_count(wan: Model) -> None:
    context = wan.text_encoder.encode("a fox").tensors["context"]
    words = len(wan.components.tokenizers["text_encoder"]("a fox").input_ids)
    assert context.shape == (1, 512, 32)
    assert context[0, :words].abs().sum(dim=1).min() > 0
    assert not context[0, words:].any()
    latents = models.seeded("latents", (1, *wan.components.latent.shape(32, 32)), seed=0)
    with torch.no_grad():
        whole, cut = (
            wan.denoiser.predict(latents, torch.tensor([500.0]), Conditioning({"context": one}))
            for one in (context, context[:, :words])
        )
    assert (whole - cut).abs().max() > 1e-3


def test_folders_of_other_pipelines_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanVACEPipeline"}')
    with pytest.raises(
        ModelError, match=r"must be a model of WanPipeline or WanImageToVideoPipeline, .* WanVACEPipeline; choose"
    ):
        load_model(tmp_path)


def test_parts_of_the_other_size_are_refused(files: dict[str, dict[str, Path]]) -> None:
    with pytest.raises(ModelError, match=r"kind wan22 with 48 channels, but Wan has .* wan21 .*wan_2\.1_vae"):
        load_model(files["wan"]["transformer"], vae=files["wan22-5b"]["vae"])
    with pytest.raises(ModelError, match=r"kind wan21 with 16 channels, but Wan 2\.2 5B has .* wan22 .*wan2\.2_vae"):
        load_model(files["wan22-5b"]["transformer"], vae=files["wan"]["vae"])


def test_sides_must_be_whole_patches(pair: tuple[TinyFamily, Model]) -> None:
    _, model = pair
    latents = torch.zeros(1, *model.components.latent.shape(96, 96))[..., :3, :3]
    with pytest.raises(DataError, match=rf"multiples of {model.defaults.pixel_multiple}"):
        model.denoiser.predict(latents, torch.tensor([500.0]), given(model))


def test_experts_are_known_by_their_files_names() -> None:
    family = FAMILIES["wan"]
    assert isinstance(family, Wan)
    names = {
        "wan2.2_t2v_high_noise_14B_fp8_scaled": (0.875, 1.0),
        "wan2.2_t2v_low_noise_14B_fp8_scaled": (0.0, 0.875),
        "wan2.1_t2v_1.3B_fp16": None,
    }
    for name, expected in names.items():
        found = [one.noise_range for one in family.experts if one.is_named_in(name)]
        assert found == ([] if expected is None else [expected])
    assert not FAMILIES["wan22-5b"].experts


def pipeline_of_two() -> Any:
    """diffusers' pipeline of Wan 2.2 A14B."""
    import diffusers

    parts = tiny_wan.WAN.parts()
    return diffusers.WanPipeline(
        **parts,
        transformer_2=randomized(copy.deepcopy(parts["transformer"]), seed=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=False),
        boundary_ratio=0.875,
    )


def test_a_diffusers_folder_gives_both_experts(tmp_path: Path) -> None:
    pipeline, folder = pipeline_of_two(), tmp_path / "A14B"
    pipeline.save_pretrained(folder)
    high, low = load_model(folder), load_model(folder / "transformer_2")
    for model, part, name in ((high, "transformer", "high_noise"), (low, "transformer_2", "low_noise")):
        assert model.title == f"A14B ({name})"
        assert model.named_expert is not None and model.named_expert.name == name
        assert model.files["denoiser"] == folder / part and model.files["vae"] == folder / "vae"
        theirs = getattr(pipeline, part).state_dict()
        ours = model.components.denoiser.state_dict()
        assert all(torch.equal(ours[one], theirs[one]) for one in theirs), part
    assert not torch.equal(high.components.denoiser.proj_out.weight, low.components.denoiser.proj_out.weight)  # type: ignore[union-attr, arg-type]
    assert load_model(folder / "transformer").named_expert == high.named_expert == load_model(pipeline).named_expert
    notes = plan_job(high.denoiser, TrainConfig(rank=2)).notes
    assert any(f"--low-noise-model {folder / 'transformer_2'} trains it as well" in one for one in notes)
    experts_of(high.denoiser, low.denoiser)


def test_a_lora_is_folded_into_the_expert_that_is_named(wan: Model, tmp_path: Path) -> None:
    folder = tmp_path / "A14B"
    pipeline_of_two().save_pretrained(folder)
    weights = AdapterWeights("lora", {"down": torch.ones(1, 128), "up": torch.ones(128, 1)})
    layer = "blocks.0.attn1.to_q"
    save_lora(
        tmp_path / "low.safetensors",
        AdapterState({ModuleRef(DENOISER, layer): weights}),
        wan.names,
        layout="diffusers",
        dtype=torch.float32,
        metadata={},
    )
    out = fold_into(
        open_model(folder / "transformer_2"), [(tmp_path / "low.safetensors", 1.0)], tmp_path / "out"
    ).output
    for part, change in (("", 0.0), ("transformer_2", 1.0)):
        before, after = (load_model(one / part).components.denoiser for one in (folder, out))
        difference = after.get_parameter(f"{layer}.weight") - before.get_parameter(f"{layer}.weight")
        torch.testing.assert_close(difference, torch.full_like(difference, change), rtol=0, atol=1e-5)


def test_a_diffusers_folder_of_one_has_no_experts(tmp_path: Path) -> None:
    tiny_wan.WAN.save_folder(tmp_path / "wan")
    model = load_model(tmp_path / "wan")
    assert model.title == "wan" and model.named_expert is None
    with pytest.raises(ModelError, match=r"transformer_2"):
        load_model(tmp_path / "wan" / "transformer_2")


def test_loras_of_the_second_expert_in_diffusers_are_read(wan: Model, tmp_path: Path) -> None:
    lora = train(
        wan,
        EncodedDataset((Sample(torch.zeros(wan.components.latent.shape(32, 32)), wan.text_encoder.encode(""), "0"),)),
        steps=1,
        rank=2,
        targets="attention",
        validation_share=0.0,
    ).lora
    keys = load_file(lora.save(tmp_path / "first.safetensors", layout="diffusers"))
    second = {name.replace("transformer.", "transformer_2.", 1): one.clone() for name, one in keys.items()}
    assert guessed_family({name: tuple(one.shape) for name, one in second.items()}) == "Wan"
    read = Lora.load(save(tmp_path / "second.safetensors", second), wan)
    assert read.state.unknown == {}
    first = Lora.load(tmp_path / "first.safetensors", wan).state.adapters
    assert first.keys() == read.state.adapters.keys()
    assert all(
        torch.equal(one, read.state.adapters[ref].tensors[name])
        for ref, weights in first.items()
        for name, one in weights.tensors.items()
    )
    with pytest.raises(LoraError, match=r"this one has keys for transformer\. and transformer_2\., the two experts"):
        Lora.load(save(tmp_path / "both.safetensors", {**keys, **second}), wan)


def test_kohyas_names_are_those_that_musubi_tuner_trains(wan: Model, tmp_path: Path) -> None:
    """Every matrix of a `WanAttentionBlock`, which is the default choice here too."""
    names = wan.names
    preset = wan.family.presets[wan.defaults.targets]
    adapters = {
        ModuleRef(DENOISER, path): AdapterWeights(
            "lora", {"down": torch.ones(1, shape[1]), "up": torch.ones(shape[0], 1)}
        )
        for path, shape in names.weight_shapes.items()
        if matches(path, preset.include)
    }
    file = tmp_path / "lora.safetensors"
    save_lora(file, AdapterState(adapters), names, layout="kohya", dtype=torch.float32, metadata={})
    layers = [*(f"{kind}_attn_{one}" for kind in ("self", "cross") for one in "qkvo"), "ffn_0", "ffn_2"]
    assert {key.partition(".")[0] for key in load_file(file)} == {
        f"lora_unet_blocks_{number}_{layer}" for number in (0, 1) for layer in layers
    }


def test_positions_and_modulation_stay_in_fp32(wan: Model) -> None:
    """As diffusers keeps them: bf16 has two digits for a cosine."""
    denoiser = wan.components.denoiser
    with placed(denoiser, device=torch.device("cpu"), dtype=torch.bfloat16):
        tensors = dict([*denoiser.named_parameters(), *denoiser.named_buffers()])
        precise = {name for name, one in tensors.items() if one.dtype == torch.float32}
    blocks = {f"blocks.{n}.{name}" for n in (0, 1) for name in ("scale_shift_table", "norm2.weight", "norm2.bias")}
    assert precise == {"rope.freqs_cos", "rope.freqs_sin", "scale_shift_table", *blocks}


@pytest.mark.parametrize("targets", slow_except(["all", "attention"], "all"))
def test_every_layer_trains_in_bf16(wan: Model, targets: str) -> None:
    latents = models.seeded("latents", wan.components.latent.shape(32, 32, FRAMES), seed=0)
    data = EncodedDataset((Sample(latents, wan.text_encoder.encode("a fox"), "0.png"),))
    result = train(wan, data, steps=1, rank=2, targets=targets, training_dtype="bf16", validation_share=0.0)
    assert np.isfinite(result.losses).all()
    assert all(one.tensors["up"].any() for one in result.lora.state.adapters.values())
