"""Nodes that sample: KSampler, its parts as nodes of their own, and those that replace a model's noise schedule, which
training and sampling both follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorasmith.adapters.frozen_layer import sampling_dtype
from lorasmith.core.errors import CancelledError, ModelError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.placement import best_device
from lorasmith.core.registry import Registry, nearest
from lorasmith.diffusion.schedule import EXPONENTIAL_STEPS, DiscreteSchedule, FlowSchedule, ResolutionShift
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.forms import Diffusion, LatentFormat
from lorasmith.families.model import Denoiser
from lorasmith.nodes.values import Latent, check_latents, first_frames, for_model, latent_of, with_frames
from lorasmith.sampling.sample import SamplingCancelledError, prepare_noise, sample_latents
from lorasmith.sampling.samplers import SAMPLERS, SIGMA_SCHEDULES, flux2_sigmas, sigmas_for
from lorasmith.workflow import NodeContext, Output, node, socket

# fmt: off
_SAMPLERS = (
    "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0",
    "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm",
    "lcm", "ipndm", "ipndm_v", "deis", "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp", "gradient_estimation", "gradient_estimation_cfg_pp", "er_sde", "seeds_2",
    "seeds_3", "sa_solver", "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
)
_SCHEDULERS = (
    "simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic",
    "kl_optimal",
)
# fmt: on


def _available(registry: Registry[Any], listed: Sequence[str]) -> Callable[[str, Folders], str]:
    """A check that accepts registered names, and refuses others, such as ComfyUI's, before the graph runs."""

    def accept(name: str, folders: Folders) -> str:
        if name in registry:
            return registry.canonical(name)
        known = name.casefold() in listed
        what = f"the {registry.kind} {name} of ComfyUI is not available here" if known else f"no such {registry.kind}"
        hint = "" if known else f": {name!r}{nearest(name, registry)}"
        raise OptionError(f"{what}{hint}; use one of {', '.join(registry)}")

    return accept


def _choice(registry: Registry[Any], listed: Sequence[str]) -> Any:
    """An input that lists ComfyUI's names, and those of extensions."""
    return socket("COMBO", options=tuple(dict.fromkeys((*listed, *registry))), accept=_available(registry, listed))


_SEED = socket("INT", default=0, min=0, max=2**64 - 1, extras={"control_after_generate": True})
SAMPLER_NAME = _choice(SAMPLERS, _SAMPLERS)
SCHEDULER = _choice(SIGMA_SCHEDULES, _SCHEDULERS)
_STEPS = socket("INT", default=20, min=1, max=10000)
_CFG = socket("FLOAT", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 is none.")
_DENOISE = socket(
    "FLOAT",
    default=1.0,
    min=0.0,
    max=1.0,
    step=0.01,
    tooltip="Part of the schedule to sample; below 1 the result keeps features of the latents.",
)


@dataclass(frozen=True)
class Guider:
    """A model with the prompts that guide it (ComfyUI's GUIDER)."""

    model: Denoiser
    positive: Sequence[Conditioning]
    negative: Sequence[Conditioning] = ()  # unused if `cfg` is 1
    cfg: float = 1.0  # guidance scale

    def check(self) -> None:
        """Raise DataError for prompts of another model's text encoders."""
        self.model.check_conditionings([*self.positive, *(self.negative if self.cfg != 1 else ())])


@dataclass(frozen=True)
class Noise:
    """Initial noise (ComfyUI's NOISE); `seed` is also that of the noise which samplers add between steps."""

    seed: int
    is_empty: bool = False  # zeros

    def of_shape(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape)) if self.is_empty else prepare_noise(self.seed, shape)


def sampled(
    context: NodeContext, guider: Guider, latent: Latent, noise: Noise, *, sampler: str, sigmas: Tensor
) -> tuple[Latent, Latent]:
    """Sample latents; returns them, and the clean ones that the last step predicted, both unscaled.

    Empty latents get the channels and size of the model's. With fewer than two `sigmas` the latents are returned as
    they are. DataError if latents or prompts are from another model; CancelledError if the run was cancelled.
    """
    model = guider.model
    form = model.base.components.latent
    guider.check()
    start = _fitted(context, latent, form)
    mask, frames = latent.get("noise_mask"), first_frames(latent, model.base)
    if len(sigmas) < 2:
        return latent_of(start, mask=mask), latent_of(start, mask=mask)
    device = best_device()
    dtype = sampling_dtype(model.module, device)
    clean = start

    def keep(step: int, total: int, predicted: Tensor) -> None:
        nonlocal clean
        clean = predicted
        context.progress(step + 1, total)

    try:
        with model.placed(device, dtype):
            result = sample_latents(
                model.predict,
                schedule=model.diffusion.schedule,
                parameterization=model.diffusion.parameterization,
                positive=[for_model(conditioning, model.base, start, frames) for conditioning in guider.positive],
                negative=[for_model(conditioning, model.base, start, frames) for conditioning in guider.negative],
                latents=(form.to_model(start) if start.count_nonzero() else start).to(device),
                noise=noise.of_shape(start.shape),
                sigmas=sigmas,
                sampler=sampler,
                cfg=guider.cfg,
                seed=noise.seed,
                dtype=dtype,
                mask=_mask_of(start, mask) if frames is None else None,
                callback=keep,
                cancelled=context.cancelled,
            )
    except SamplingCancelledError as error:
        raise CancelledError(str(error)) from error
    last, predicted = (latent_of(form.from_model(latents.cpu()), mask=mask) for latents in (result, clean))
    return last, predicted


def _mask_of(samples: Tensor, noise_mask: Tensor | None) -> Tensor | None:
    """A LATENT's mask for its latents, (batch, 1, [frames,] height, width); shorter batches are repeated."""
    if noise_mask is None:
        return None
    frames = noise_mask.unsqueeze(2) if noise_mask.ndim == 4 else noise_mask
    flat = functional.interpolate(frames.movedim(2, 1).flatten(0, 1), size=samples.shape[-2:], mode="bilinear")
    mask = flat.unflatten(0, (len(frames), -1)).movedim(1, 2)
    mask = mask.repeat(-(-len(samples) // len(mask)), 1, 1, 1, 1)[: len(samples)]
    found: Tensor = mask.squeeze(2) if samples.ndim == 4 else mask
    return found


def _fitted(context: NodeContext, latent: Latent, form: LatentFormat) -> Tensor:
    """Latents in fp32 in the shape of the model's; raises DataError for those of another model."""
    samples = latent["samples"].float()
    if samples.count_nonzero():
        samples = with_frames(samples, form)
        check_latents(samples, form)
        return samples
    times = samples.shape[2] if samples.ndim == 5 else 1
    if times > 1 and not form.time_downscale:
        context.warn(
            f"the empty latents have {times} frames, but this model makes pictures, so that one is sampled; set length "
            "to 1"
        )
        times = 1
    scale = latent.get("downscale_ratio_spacial", form.downscale) / form.downscale
    height, width = (round(side * scale) * form.downscale for side in samples.shape[-2:])
    return torch.zeros(len(samples), *form.shape(height, width, 1 + (times - 1) * form.time_downscale))


@node("KSampler", "KSampler", "model/sampling", outputs=["LATENT"])
def ksampler(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    seed: int = _SEED,
    steps: int = _STEPS,
    cfg: float = _CFG,
    sampler_name: str = SAMPLER_NAME,
    scheduler: str = SCHEDULER,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    latent_image: Latent = socket("LATENT"),
    denoise: float = _DENOISE,
) -> tuple[Latent]:
    """Sample latents for the prompts, from noise or from noised latents."""
    sigmas = sigmas_for(model.diffusion.schedule, scheduler, steps, denoise=denoise, sampler=sampler_name)
    guider = Guider(model, positive, negative, cfg)
    result, _ = sampled(context, guider, latent_image, Noise(seed), sampler=sampler_name, sigmas=sigmas)
    return (result,)


@node("KSamplerAdvanced", "KSampler (Advanced)", "model/sampling", outputs=["LATENT"])
def ksampler_advanced(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    add_noise: str = socket("COMBO", options=("enable", "disable"), tooltip="Disable it to continue another sampler."),
    noise_seed: int = _SEED,
    steps: int = _STEPS,
    cfg: float = _CFG,
    sampler_name: str = SAMPLER_NAME,
    scheduler: str = SCHEDULER,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    latent_image: Latent = socket("LATENT"),
    start_at_step: int = socket("INT", default=0, min=0, max=10000, tooltip="First step, counted from 0."),
    end_at_step: int = socket("INT", default=10000, min=0, max=10000, tooltip="Step before which to stop."),
    return_with_leftover_noise: str = socket(
        "COMBO",
        options=("disable", "enable"),
        tooltip="Return noisy latents where sampling stops early, for another sampler to continue.",
    ),
) -> tuple[Latent]:
    """Take some of the steps of a run, so that several samplers share it."""
    sigmas = sigmas_for(model.diffusion.schedule, scheduler, steps, sampler=sampler_name)
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1]
        if return_with_leftover_noise == "disable":
            sigmas[-1] = 0
    guider, noise = Guider(model, positive, negative, cfg), Noise(noise_seed, is_empty=add_noise == "disable")
    result, _ = sampled(context, guider, latent_image, noise, sampler=sampler_name, sigmas=sigmas[start_at_step:])
    return (result,)


_RESULTS = (
    Output("LATENT", "output"),
    Output("LATENT", "denoised_output", tooltip="The clean latents that the last step predicted."),
)
_PATCH = 16  # pixels of a Flux.2 patch in each direction


@node("SamplerCustom", "SamplerCustom", "model/sampling/custom", outputs=_RESULTS)
def sampler_custom(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    add_noise: bool = socket("BOOLEAN", default=True, tooltip="Disable it to continue another sampler."),
    noise_seed: int = _SEED,
    cfg: float = _CFG,
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    sampler: str = socket("SAMPLER"),
    sigmas: Tensor = socket("SIGMAS"),
    latent_image: Latent = socket("LATENT"),
) -> tuple[Latent, Latent]:
    """Sample latents with a sampler and sigmas of other nodes."""
    guider, noise = Guider(model, positive, negative, cfg), Noise(noise_seed, is_empty=not add_noise)
    return sampled(context, guider, latent_image, noise, sampler=sampler, sigmas=sigmas)


@node("SamplerCustomAdvanced", "SamplerCustomAdvanced", "model/sampling/custom", outputs=_RESULTS)
def sampler_custom_advanced(
    context: NodeContext,
    *,
    noise: Noise = socket("NOISE"),
    guider: Guider = socket("GUIDER"),
    sampler: str = socket("SAMPLER"),
    sigmas: Tensor = socket("SIGMAS"),
    latent_image: Latent = socket("LATENT"),
) -> tuple[Latent, Latent]:
    """Sample latents with all parts from other nodes."""
    return sampled(context, guider, latent_image, noise, sampler=sampler, sigmas=sigmas)


@node("BasicGuider", "Basic Guider", "model/sampling/guiders", outputs=["GUIDER"])
def basic_guider(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    conditioning: list[Conditioning] = socket("CONDITIONING"),
) -> tuple[Guider]:
    """Follow a prompt without a negative one."""
    return (Guider(model, conditioning),)


@node("CFGGuider", "CFG Guider", "model/sampling/guiders", outputs=["GUIDER"])
def cfg_guider(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    positive: list[Conditioning] = socket("CONDITIONING"),
    negative: list[Conditioning] = socket("CONDITIONING"),
    cfg: float = _CFG,
) -> tuple[Guider]:
    """Follow a prompt and avoid a negative one."""
    return (Guider(model, positive, negative, cfg),)


@node("KSamplerSelect", "KSamplerSelect", "model/sampling/samplers", outputs=["SAMPLER"])
def ksampler_select(context: NodeContext, *, sampler_name: str = SAMPLER_NAME) -> tuple[str]:
    """Choose a sampler."""
    return (sampler_name,)


@node("RandomNoise", "RandomNoise", "model/sampling/noise", outputs=["NOISE"])
def random_noise(context: NodeContext, *, noise_seed: int = _SEED) -> tuple[Noise]:
    """Noise of a seed."""
    return (Noise(noise_seed),)


@node("DisableNoise", "DisableNoise", "model/sampling/noise", outputs=["NOISE"], search_aliases=["zero noise"])
def disable_noise(context: NodeContext) -> tuple[Noise]:
    """No noise, to continue another sampler."""
    return (Noise(0, is_empty=True),)


@node("BasicScheduler", "BasicScheduler", "model/sampling/schedulers", outputs=["SIGMAS"])
def basic_scheduler(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    scheduler: str = SCHEDULER,
    steps: int = _STEPS,
    denoise: float = _DENOISE,
) -> tuple[Tensor]:
    """The sigmas of a scheduler for a model."""
    return (sigmas_for(model.diffusion.schedule, scheduler, steps, denoise=denoise)[-(steps + 1) :],)


@node("Flux2Scheduler", "Flux2Scheduler", "model/sampling/schedulers", outputs=["SIGMAS"])
def flux2_scheduler(
    context: NodeContext,
    *,
    steps: int = socket("INT", default=20, min=1, max=4096),
    width: int = socket("INT", default=1024, min=16, max=16384, step=1, tooltip="Of the picture in pixels."),
    height: int = socket("INT", default=1024, min=16, max=16384, step=1, tooltip="Of the picture in pixels."),
) -> tuple[Tensor]:
    """The sigmas of Flux.2 for a size and a number of steps."""
    return (flux2_sigmas(steps, round(width * height / _PATCH**2)),)


_TIMESTEPS = 1000  # timesteps of networks with discrete ones
_PREDICTIONS = {"eps": "epsilon", "v_prediction": "v", "lcm": "epsilon"}
_DISTILLED_STEPS = 50  # timesteps of latent consistency models
_SIDE = socket("INT", default=1024, min=16, max=16384, step=8, tooltip="Of the picture in pixels.")


def _shift(default: float) -> Any:
    tooltip = "Larger values spend more steps, and more of training, on noisy latents; 1 is none."
    return socket("FLOAT", default=default, min=0.0, max=100.0, step=0.01, tooltip=tooltip)


@node("ModelSamplingSD3", "ModelSamplingSD3", "model/patch/stable diffusion", outputs=["MODEL"])
def model_sampling_sd3(
    context: NodeContext, *, model: Denoiser = socket("MODEL"), shift: float = _shift(3.0)
) -> tuple[Denoiser]:
    """Train and sample as a flow with a shift. In ComfyUI it is for networks whose time goes to 1000."""
    _check_time(context, model, "ModelSamplingSD3", "ModelSamplingAuraFlow", time_scale=_TIMESTEPS)
    return (_as_flow(model, shift),)


@node("ModelSamplingAuraFlow", "ModelSamplingAuraFlow", "model/patch", outputs=["MODEL"])
def model_sampling_aura_flow(
    context: NodeContext, *, model: Denoiser = socket("MODEL"), shift: float = _shift(1.73)
) -> tuple[Denoiser]:
    """Train and sample as a flow with a shift. In ComfyUI it is for networks whose time goes to 1."""
    _check_time(context, model, "ModelSamplingAuraFlow", "ModelSamplingSD3", time_scale=1)
    return (_as_flow(model, shift),)


@node("ModelSamplingFlux", "ModelSamplingFlux", "model/patch/flux", outputs=["MODEL"])
def model_sampling_flux(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    max_shift: float = socket(
        "FLOAT", default=1.15, min=0.0, max=100.0, step=0.01, tooltip="Exponent of 1024×1024 px."
    ),
    base_shift: float = socket("FLOAT", default=0.5, min=0.0, max=100.0, step=0.01, tooltip="Exponent of 256×256 px."),
    width: int = _SIDE,
    height: int = _SIDE,
) -> tuple[Denoiser]:
    """Train and sample as a flow with the shift of a picture's size."""
    _check_time(context, model, "ModelSamplingFlux", "ModelSamplingSD3", time_scale=1)
    by_size = ResolutionShift(mu=(base_shift, max_shift))
    shift = by_size.of_patches(width * height / 16**2)
    return (_as_flow(model, shift, table=EXPONENTIAL_STEPS, resolution_shift=by_size),)


@node("ModelSamplingDiscrete", "ModelSamplingDiscrete", "model/patch", outputs=["MODEL"])
def model_sampling_discrete(
    context: NodeContext,
    *,
    model: Denoiser = socket("MODEL"),
    sampling: str = socket(
        "COMBO",
        options=("eps", "v_prediction", "lcm", "x0", "img_to_img", "img_to_img_flow"),
        tooltip="What the network predicts; lcm is eps at 50 of the 1000 timesteps.",
    ),
    zsnr: bool = socket("BOOLEAN", default=False, tooltip="Rescale the schedule to end in pure noise."),
) -> tuple[Denoiser]:
    """Train and sample with another kind of prediction, or with zero terminal SNR."""
    schedule = model.base.components.schedule
    if sampling not in _PREDICTIONS:
        raise OptionError(
            f"sampling must be one of {', '.join(_PREDICTIONS)} here, got {sampling!r}; choose one of these"
        )
    if not isinstance(schedule, DiscreteSchedule):
        raise ModelError(
            f"ModelSamplingDiscrete is for models with discrete timesteps, but {model.base.title} is a flow; "
            "remove the node, or use ModelSamplingAuraFlow"
        )
    if zsnr:
        schedule = schedule.zero_terminal()
    if sampling == "lcm":
        schedule = schedule.every(len(schedule.sigmas) // _DISTILLED_STEPS)
    return (replace(model, noising=Diffusion(_PREDICTIONS[sampling], schedule)),)


def _time_scale(model: Denoiser) -> float:
    """The network's unit of time: its number of discrete steps, or the scale of its own flow."""
    own = model.base.components.schedule
    return own.time_scale if isinstance(own, FlowSchedule) else float(_TIMESTEPS)


def _check_time(context: NodeContext, model: Denoiser, name: str, other: str, *, time_scale: float) -> None:
    """Warn if ComfyUI's node `name` would pass the network a time of another scale, and name `other` instead."""
    if (needed := _time_scale(model)) != time_scale:
        context.warn(
            f"{name} counts time up to {time_scale:g} in ComfyUI, but the network of {model.base.title} up to "
            f"{needed:g}, so that its pictures there are noise; here only the shift is taken; use {other} instead"
        )


def _as_flow(
    model: Denoiser, shift: float, *, table: int = _TIMESTEPS, resolution_shift: ResolutionShift | None = None
) -> Denoiser:
    """The model as a flow in the network's own unit of time, `table` sigmas long. OptionError for a shift of 0."""
    if shift <= 0:
        raise OptionError(f"shift must be greater than 0, got {shift:g}; 1 is none")
    by_size = resolution_shift or model.base.components.schedule.resolution_shift
    schedule = FlowSchedule(shift, table, by_size, _time_scale(model))
    return replace(model, noising=Diffusion("flow", schedule))
