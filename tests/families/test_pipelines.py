"""A loaded diffusers pipeline is a model, and stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sdxl_models
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformer_models import Case

from lorasmith.core.errors import ModelError
from lorasmith.core.folders import BUILT_IN_BASE
from lorasmith.data.dataset import EncodedDataset, Sample
from lorasmith.families.loading import load_model
from lorasmith.families.locating import BUILT_IN, built_in_models
from lorasmith.families.model import Model
from lorasmith.runs.library import train
from lorasmith.sampling.generate import generate


def small_pipeline(**settings: Any) -> Any:
    """diffusers' pipeline of the built-in model, as diffusers leaves it."""
    from diffusers import StableDiffusionPipeline

    configs = str(BUILT_IN_BASE / "models" / "configs" / BUILT_IN)
    file = str(built_in_models()[BUILT_IN])
    return StableDiffusionPipeline.from_single_file(file, config=configs, local_files_only=True, **settings)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return small_pipeline(torch_dtype=torch.float32)


@pytest.fixture
def pipe(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def state_of(pipe: Any) -> list[Any]:
    """Everything of a pipeline's modules that training may change."""
    found: list[Any] = []
    for name, module in modules_of(pipe).items():
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            place = (tensor.data_ptr(), tensor.stride(), tensor.device, tensor.dtype, tensor.requires_grad)
            found.append((name, path, place, tensor.detach().contiguous().numpy().tobytes(), tensor.grad))
        for path, layer in module.named_modules():
            hooks = [len(layer._forward_hooks), len(layer._forward_pre_hooks), len(layer._backward_hooks)]
            found.append((name, path, layer.training, hooks, sorted(layer.__dict__), type(layer)))
    return found


def tensors_of(modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for part, module in modules.items():
        yield from ((f"{part}.{name}", tensor) for name, tensor in module.state_dict().items())


def copied(model: Model, pipe: Any) -> list[str]:
    """Tensors of a model that are not those of a pipeline."""
    theirs = {tensor.data_ptr() for _, tensor in tensors_of(modules_of(pipe))}
    return [name for name, one in tensors_of(model.components.modules()) if one.data_ptr() not in theirs]


@pytest.mark.slow
def test_every_family_is_recognised_and_no_weight_is_copied(case: Case) -> None:
    pipe = case.tiny.made()
    before = state_of(pipe)
    model = load_model(pipe)
    assert model.family is case.ours.family
    assert model.title == case.tiny.pipeline
    assert model.components.modules().keys() == case.ours.components.modules().keys()
    assert copied(model, pipe) == []
    assert model.defaults == case.ours.defaults
    assert model.components.latent == case.ours.components.latent
    assert model.components.parameterization == case.ours.components.parameterization

    ours, theirs = (one.text_encoder.encode("a red fox") for one in (case.ours, model))
    assert {name: one.shape for name, one in ours.tensors.items()} == {
        name: one.shape for name, one in theirs.tensors.items()
    }
    x = torch.randn(1, *model.components.latent.shape(64, 64))
    expected, found = (one.denoiser.predict(x, torch.tensor([0.5]), ours).detach() for one in (case.ours, model))
    assert torch.equal(expected, found)
    assert state_of(pipe) == before


@pytest.mark.slow
def test_stable_diffusion_xl_is_recognised(sdxl: Model, sdxl_file: Path, tmp_path: Path) -> None:
    pipe = sdxl_models.diffusers_pipeline(sdxl_file, tmp_path)
    model = load_model(pipe)
    assert model.family is sdxl.family
    assert list(model.components.text_encoders) == ["text_encoder", "text_encoder_2"]
    assert copied(model, pipe) == []
    ours, theirs = (one.text_encoder.encode("a red fox") for one in (sdxl, model))
    assert all(torch.allclose(theirs.tensors[name], one, atol=1e-5) for name, one in ours.tensors.items())


def test_a_pipeline_stays_as_it_was_whatever_is_done_with_its_model(pipe: Any) -> None:
    calls = []
    pipe.unet.train().requires_grad_(True)
    pipe.text_encoder.requires_grad_(False)
    pipe.unet.register_forward_hook(lambda *_: calls.append("unet"))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append("vae"))
    add_hook_to_module(pipe.text_encoder, ModelHook())  # as diffusers' offloading does
    padding = pipe.tokenizer.backend_tokenizer.to_str()
    before = state_of(pipe)

    model = load_model(pipe)
    assert not hasattr(model.components.text_encoders["text_encoder"], "_hf_hook")
    assert not any(one.requires_grad for part in model.components.modules().values() for one in part.parameters())
    assert not any(part.training for part in model.components.modules().values())
    data = EncodedDataset((Sample(torch.randn(4, 8, 8), model.text_encoder.encode("a fox"), "1.png"),))
    result = train(model, data, steps=2, rank=2, targets="all")
    generate(result.lora.applied_to(model.denoiser), "a fox", steps=2, width=64, height=64)
    assert state_of(pipe) == before
    assert pipe.tokenizer.backend_tokenizer.to_str() == padding
    assert calls == [], "its hooks are for its own calls"


@pytest.mark.slow
def test_a_run_on_a_pipeline_is_that_on_its_file(pipe: Any, tiny: Model) -> None:
    data = EncodedDataset((Sample(torch.randn(4, 8, 8), tiny.text_encoder.encode("a fox"), "1.png"),))
    settings: dict[str, Any] = {"steps": 3, "rank": 2, "learning_rate": 1e-3, "targets": "attention"}
    runs = [train(model, data, **settings).losses for model in (tiny, load_model(pipe))]
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_compiled_parts_are_those_that_were_compiled(pipe: Any) -> None:
    plain = pipe.unet
    pipe.unet = torch.compile(plain)
    model = load_model(pipe)
    pipe.unet = plain
    assert copied(model, pipe) == []


def test_half_precision_is_shared_too() -> None:
    pipe = small_pipeline(torch_dtype=torch.float16)
    model = load_model(pipe)
    assert {one.dtype for one in model.components.denoiser.parameters()} == {torch.float16}
    assert copied(model, pipe) == []
    converted = load_model(pipe, dtype=torch.float32)
    assert {one.dtype for one in converted.components.denoiser.parameters()} == {torch.float32}
    assert {one.dtype for one in pipe.unet.parameters()} == {torch.float16}


@pytest.mark.slow_after(1)
@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_pipelines_for_other_tasks_have_the_same_parts(pipe: Any, name: str) -> None:
    import diffusers

    other = getattr(diffusers, name)(**pipe.components, requires_safety_checker=False)
    assert load_model(other).family.name == "sd1"


def test_a_pipeline_of_another_name_is_known_by_its_base(pipe: Any) -> None:
    from diffusers import StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):  # type: ignore[misc]
        pass

    assert load_model(Mine(**pipe.components, requires_safety_checker=False)).family.name == "sd1"


def test_what_has_no_plain_weights_is_refused_with_the_remedy(pipe: Any) -> None:
    from peft import LoraConfig

    loaded = copy.deepcopy(pipe)
    loaded.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ModelError, match=r"the unet of .* LoRAs are loaded on it; unload them \(pipe.unload_lora"):
        load_model(loaded)
    away = copy.deepcopy(pipe)
    away.text_encoder.to("meta")
    with pytest.raises(ModelError, match=r"the text_encoder of .* sequential offloading"):
        load_model(away)
    packed = copy.deepcopy(pipe)
    conv = packed.unet.conv_in
    conv.weight = nn.Parameter(conv.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="they are quantized"):
        load_model(packed)


def test_what_cannot_be_trained_is_refused(pipe: Any) -> None:
    from diffusers import DDPMPipeline

    with pytest.raises(
        ModelError, match=r"\(DDPMPipeline\) is of an unsupported architecture; lorasmith models --known"
    ):
        load_model(DDPMPipeline(pipe.unet, pipe.scheduler))
    painting = copy.deepcopy(pipe)
    kind = type(painting.unet)
    painting.unet = kind.from_config({**pipe.unet.config, "in_channels": 9})
    with pytest.raises(ModelError, match="must take latents of 4 channels"):
        load_model(painting)
    bare = copy.deepcopy(pipe)
    bare.tokenizer = None
    with pytest.raises(ModelError, match="must have the tokenizer of its text_encoder"):
        load_model(bare)
    bare.unet = None
    with pytest.raises(ModelError, match="must have a unet but has none"):
        load_model(bare)


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_a_part_is_no_pipeline(pipe: Any, part: str) -> None:
    with pytest.raises(ModelError, match="a model must be a path, a name or a loaded pipeline of diffusers, got "):
        load_model(getattr(pipe, part))


def test_parts_may_be_missing(pipe: Any) -> None:
    pipe.vae = pipe.text_encoder = None
    assert list(load_model(pipe).components.modules()) == ["denoiser"]
