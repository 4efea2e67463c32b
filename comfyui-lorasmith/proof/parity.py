"""Loss and gradient of a step beside those of ComfyUI's own node, on its noise and its starting weights."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import checkout
import families

SEED = 7
RANK = 8


def numbers(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, on its noise and its starting weights."""
    model, (latents, positive) = families.model_of(family), families.data_of(family)
    size = families.FAMILIES[family].size
    before = pictures(model, positive, size=size)
    checkout.pack()
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith

    trained = ComfyModel(model)
    samples = trained.samples(latents, positive)
    trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
    right = _or_why_not(lambda: _right_step(model, latents, positive, trainer))
    shipped = _or_why_not(lambda: built_in_step(model, latents, positive, trainer.weights))
    result: dict[str, Any] = {}
    with trainer:
        if isinstance(right, str):
            result["built-in fails"] = right
        else:
            losses, gradients = our_step(trainer, right, samples)
            result["loss"] = abs(losses - right["loss"]) / right["loss"]
            result["gradient"] = distance(gradients, right["gradients"])
            of_shipped = shipped if isinstance(shipped, str) else distance(gradients, shipped["gradients"])
            result["gradient as shipped"] = of_shipped
        attached = predicted(trainer)
    lora = tensors_of(trainer.lora)
    left_out, merged = with_their_loader(model, lora, trained, trainer)
    result["keys"], result["left out"] = len(lora), left_out
    result["merged"] = float((merged - attached).norm() / attached.norm())
    result["same bits"] = torch.equal(before, pictures(model, positive, size=size))
    try:
        with trainer:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    result["same bits after an error"] = torch.equal(before, pictures(model, positive, size=size))
    return result


def samplings(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, with samplings that its own nodes and models give a MODEL."""
    checkout.pack()
    import comfy.model_base
    from comfy_extras import nodes_model_advanced as theirs
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith
    from lorasmith.core.errors import OptionError

    base, (latents, positive) = families.model_of(family), families.data_of(family)

    def of_model(kind: str, **settings: Any) -> Any:
        patched = base.clone()
        config = type("Config", (), {"sampling_settings": settings})
        made = comfy.model_base.model_sampling(config, comfy.model_base.ModelType[kind])
        patched.add_object_patch("model_sampling", made)
        return patched

    def of_node(name: str, *values: Any, patch: str = "patch", model: Any = base) -> Any:
        (patched,) = getattr(getattr(theirs, name)(), patch)(model, *values)
        return patched

    models = {
        **{kind: of_node("ModelSamplingDiscrete", kind, False) for kind in ("eps", "v_prediction", "lcm", "x0")},
        "v_prediction, zsnr": of_node("ModelSamplingDiscrete", "v_prediction", True),
        **{
            f"{kind}, continuous": of_node("ModelSamplingContinuousEDM", kind, 80.0, 0.002)
            for kind in ("eps", "v_prediction", "edm", "cosmos_rflow")
        },
        "continuous v": of_node("ModelSamplingContinuousV", "v_prediction", 500.0, 0.03),
        "cascade": of_node("ModelSamplingStableCascade", 2.0),
        "SD3": of_node("ModelSamplingSD3", 3.0),
        "AuraFlow": of_node("ModelSamplingAuraFlow", 1.73, patch="patch_aura"),
        "Flux": of_node("ModelSamplingFlux", 1.15, 0.5, 1024, 768),
        "LTXV": of_model("FLUX", shift=2.05),
    }
    if hasattr(theirs, "ModelNoiseScale"):  # older versions lack these
        models["noise scale"] = of_model("FLOW", noise_scale=7.5, shift=3.0)
    if hasattr(comfy.model_base.ModelType, "V_PREDICTION_DDPM"):
        models["CogVideoX"] = of_model("V_PREDICTION_DDPM", zsnr=True)
    result: dict[str, Any] = {}
    for name, model in models.items():
        trained = ComfyModel(model)
        samples = trained.samples(latents, positive)
        trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
        found = beside_built_in(trainer, model, latents, positive, samples)
        result |= {f"{what} {name}": value for what, value in found.items()}
    refused, unknown = 0, {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"} & {one.name for one in comfy.model_base.ModelType}
    for kind in unknown:
        try:
            ComfyModel(of_model(kind))
        except OptionError:
            refused += 1
    result["image-to-image refused"] = refused == len(unknown)
    return result


def conditionings(family: str) -> dict[str, Any]:
    """Loss and gradient beside ComfyUI's node, with conditionings that are more than a caption."""
    checkout.pack()
    import comfy_extras.nodes_train as theirs
    from lorasmith_pack.comfy_model import ComfyModel

    import lorasmith

    walk = theirs.process_cond_list
    # Which fails on the tensors of a list
    theirs.process_cond_list = lambda d, prefix="": d if isinstance(d, torch.Tensor) else walk(d, prefix)
    result: dict[str, Any] = {}
    frames = families.FAMILIES[family].frames or 1
    for kind in families.CONDITIONED.get(family, ()):
        model = families.model_of(family, conditioned=kind)
        latents, positive = families.data_of(family, conditioned=kind)
        before = pictures(model, positive, frames)
        trained = ComfyModel(model)
        samples = trained.samples(latents, positive)
        trainer = lorasmith.Trainer(trained, samples, **settings(rank=RANK))
        found: dict[str, Any] = beside_built_in(trainer, model, latents, positive, samples)
        found["same bits"] = torch.equal(before, pictures(model, positive, frames))
        (other,) = trained.samples(latents[:1], [[positive[0][0], positive[1][1]]])
        with trainer:
            one, two = (predicted(trainer, conditioning=each.conditioning) for each in (samples[0], other))
        found["heard"] = float((one - two).norm() / one.norm()) > 1e-4
        result |= {f"{name} {kind}": value for name, value in found.items()}
    return result


def beside_built_in(trainer: Any, model: Any, latents: Any, positive: Any, samples: Any) -> dict[str, float]:
    """Distances of loss and gradient of a first step from those of ComfyUI's node where it is right."""
    right = _right_step(model, latents, positive, trainer)
    with trainer:
        loss, gradients = our_step(trainer, right, samples)
    return {
        "loss": abs(loss - right["loss"]) / right["loss"],
        "gradient": distance(gradients, right["gradients"]),
    }


def _right_step(model: Any, latents: Any, positive: Any, trainer: Any) -> dict[str, Any]:
    from lorasmith_pack.gradients import kernels_with_gradients

    from lorasmith.core.kept_values import changes_allowed

    with changes_allowed(), kernels_with_gradients():
        return built_in_step(model, latents, positive, trainer.weights, checkpointing=False)


def _drop_nothing(module: torch.nn.Module) -> None:
    """Leave training mode without dropout, also of captions (PixArt, by a mask on a GPU)."""
    for part in module.modules():
        name = "p" if isinstance(part, torch.nn.Dropout) else "uncond_prob"
        if hasattr(part, name):
            setattr(part, name, 0.0)


def _or_why_not(step: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """A step of ComfyUI's own node, or the name of the error with which it fails."""
    try:
        return step()
    except Exception as error:
        return type(error).__name__


def settings(**others: Any) -> dict[str, Any]:
    """Those of ComfyUI's node."""
    return {
        "steps": 8,
        "rank": 8,
        "alpha": 1.0,
        "targets": "all",
        "objective": "x0",
        "loss_weighting": "none",
        "zero_init": "down",
        "training_dtype": "fp32",
        "max_grad_norm": 0.0,
        "learning_rate": 5e-4,
        "schedule": "constant",
        "device": "cpu",
        **others,
    }


class _Recorded:
    """An optimizer that keeps the gradients and changes nothing."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]
        self.gradients: list[torch.Tensor | None] = []

    def step(self) -> None:
        self.gradients = [None if one.grad is None else one.grad.clone() for one in self.param_groups[0]["params"]]

    def zero_grad(self) -> None:
        for one in self.param_groups[0]["params"]:
            one.grad = None


def built_in_step(
    model: Any, latents: Any, positive: Any, trained: Mapping[str, torch.Tensor], *, checkpointing: bool = True
) -> dict[str, Any]:
    """The first step of ComfyUI's node: its start, what it drew, loss, and gradients by key.

    Of layers that are not in `trained` (embeddings), which Lorasmith does not train, the LoRA is zero. Of a table of
    noise levels it draws entries, as Lorasmith does; at levels between two its network has the time of the nearest.
    """
    import comfy_extras.nodes_train as node
    from comfy.model_sampling import ModelSamplingDiscrete

    found: dict[str, Any] = {}
    make, step, setup = node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters

    def named(*arguments: Any) -> Any:
        made = setup(*arguments)
        found["keys"] = list(made[0])
        if not checkpointing:
            _drop_nothing(arguments[0].model)  # which is the node's copy
        sampling = arguments[0].get_model_object("model_sampling")
        if isinstance(sampling, ModelSamplingDiscrete):
            sigmas, between = sampling.sigmas, sampling.percent_to_sigma

            def entry(percent: float) -> float:
                return float(sigmas[int((1 - percent) * len(sigmas))]) if 0 < percent < 1 else between(percent)

            sampling.percent_to_sigma = entry
        return made

    def optimizer(name: str, parameters: Any, rate: float) -> _Recorded:
        generator = torch.Generator().manual_seed(SEED)
        parameters = list(parameters)
        for key, one in zip(found["keys"], parameters, strict=True):
            if one.ndim > 1:
                values = 0.02 * torch.randn(one.shape, generator=generator)
                one.data.zero_()
                if place(key) in trained:
                    within(one.data, trained[place(key)]).copy_(within(values, trained[place(key)]))
        found["start"] = [one.detach().clone() for one in parameters]
        found["optimizer"] = _Recorded(parameters)
        return found["optimizer"]

    def watched(
        self: Any, wrap: Any, sigmas: Any, noise: Any, latent: Any, cond: Any, indices: Any, *rest: Any, **more: Any
    ) -> Any:
        found.update(sigmas=sigmas.detach().clone(), noise=noise.clone(), latent=latent.clone(), indices=list(indices))
        return step(self, wrap, sigmas, noise, latent, cond, indices, *rest, **more)

    node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters = optimizer, watched, named
    torch.manual_seed(SEED)
    try:
        way = "default" if checkpointing else "no checkpointing"
        lora, losses, _ = built_in(model, latents, positive, way, steps=1, rank=RANK)
    finally:
        node._create_optimizer, node.TrainSampler.fwd_bwd, node._setup_lora_adapters = make, step, setup
    found["loss"] = losses["loss"][0]
    found["start"] = dict(zip(lora, found["start"], strict=True))
    found["gradients"] = dict(zip(lora, found["optimizer"].gradients, strict=True))
    return found


def built_in(model: Any, latents: Any, positive: Any, way: str = "default", **others: Any) -> Any:
    """Train by ComfyUI's own node."""
    checkout.pack()
    from lorasmith_pack.comparison import with_built_in

    given = {"learning_rate": 5e-4, "rank": 8, "seed": SEED, "training_dtype": "fp32", "lora_dtype": "fp32", **others}
    return with_built_in(model, [{"samples": torch.cat(latents)}], [positive], way, **given)


def our_step(trainer: Any, theirs: Mapping[str, Any], samples: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the same step, by ComfyUI's keys."""
    from lorasmith.training.batches import Batch

    keys = {key: place(key) for key in theirs["start"] if ".lora_" in key and place(key) in trainer.weights}
    for key, name in keys.items():
        weight = trainer.weights[name]
        weight.copy_(within(theirs["start"][key], weight).reshape(weight.shape))
    trainer.engine.flat.publish()
    model = trainer.model
    sample = samples[theirs["indices"][0]]
    clean = sample.latents[None]
    sigmas = theirs["sigmas"].float()
    if model.diffusion.parameterization != "flow":
        sigmas = sigmas / model.sampling.scale
    elif model.sampling.counts_signal:
        sigmas = sigmas / (1 + sigmas)
    level = model.diffusion.schedule.at_sigma(sigmas)
    noise = theirs["noise"].float().reshape(clean.shape)
    batch = Batch(clean, noise, level.noised(clean, noise), level, model.join([sample.conditioning]), (sample.name,))
    losses, _ = trainer.engine.gradient([batch])
    of_theirs = model.sampling.scale**2  # of whose latents the loss is
    gradients = {key: of_theirs * trainer.gradients[name].flatten(1) for key, name in keys.items()}
    return of_theirs * float(losses), gradients


def within(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The part of a factor that is of our rank, which Lorasmith caps at a layer's size."""
    flat = theirs if theirs.ndim == 2 else theirs.flatten(1)
    return flat[: ours.shape[0], : ours.flatten(1).shape[1]]


def place(key: str) -> str:
    path, _, factor = key.removeprefix("diffusion_model.").removesuffix(".weight").rpartition(".")
    return f"{path}.{factor.removeprefix('lora_')}"


def distance(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor | None]) -> float:
    both = [(tensor, theirs[key]) for key, tensor in ours.items()]
    wrong = sum(float((a - (0 if b is None else within(b.float(), a))).square().sum()) for a, b in both)
    return float((wrong / sum(float(a.square().sum()) for a, _ in both)) ** 0.5)


def predicted(trainer: Any, conditioning: Any = None) -> torch.Tensor:
    """The prediction for fixed inputs, with what is trained attached."""
    model, sample = trainer.model, trainer._data.samples[0]
    level = model.diffusion.schedule.at(torch.tensor([0.5]))
    noise = torch.randn(sample.latents[None].shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        joined = model.join([conditioning or sample.conditioning])
        found: torch.Tensor = model.predict(noise, level.time, joined)
    return found


def tensors_of(lora: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        return dict(load_file(lora.save(Path(folder) / "lora.safetensors")))


class _Counted(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.left_out += "lora key not loaded" in record.getMessage() or "NOT LOADED" in record.getMessage()


def with_their_loader(model: Any, lora: Any, trained: Any, trainer: Any) -> tuple[int, torch.Tensor]:
    """Keys that ComfyUI's loader leaves out, and the prediction with the LoRA that it loaded."""
    import comfy.sd
    from lorasmith_pack.comfy_model import ComfyModel

    count = _Counted()
    logging.getLogger().addHandler(count)
    with torch.inference_mode():
        patched, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    other = ComfyModel(patched)
    with other.loaded(torch.float32):
        # Patched within inference mode or not, a picture is drawn with these weights.
        class Other:
            model, _data = other, trainer._data

        found = predicted(Other)
    logging.getLogger().removeHandler(count)
    return count.left_out, found


def pictures(model: Any, positive: Any, frames: int = 1, size: tuple[int, ...] = (16, 16)) -> torch.Tensor:
    """What ComfyUI's sampler makes of fixed noise."""
    import comfy.sample

    latents = model.model.latent_format
    shape = (1, latents.latent_channels, *([frames] if latents.latent_dimensions == 3 else []), *size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        entry = [[positive[0][0].clone(), dict(positive[0][1])]]
        found: torch.Tensor = comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "normal", entry, entry, torch.zeros(shape), seed=5, disable_pbar=True
        )
    return found.clone()
