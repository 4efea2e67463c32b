"""The KSampler node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasmith.core.errors import CancelledError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.placement import best_device, placed, sampling_dtype
from lorasmith.core.registry import Registry, nearest
from lorasmith.families.base import Conditioning, LatentFormat
from lorasmith.families.model import Denoiser
from lorasmith.nodes.values import Latent, check_latents
from lorasmith.sampling.sample import SamplingCancelledError, prepare_noise, sample_latents
from lorasmith.sampling.samplers import SAMPLERS
from lorasmith.sampling.sigmas import SIGMA_SCHEDULES, sigmas_for
from lorasmith.workflow import Input, NodeContext, Output, node

__all__: list[str] = []

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


@node(
    "KSampler",
    display_name="KSampler",
    category="model/sampling",
    inputs=[
        Input("model", "MODEL"),
        Input("seed", "INT", default=0, min=0, max=2**64 - 1, extras={"control_after_generate": True}),
        Input("steps", "INT", default=20, min=1, max=10000),
        Input("cfg", "FLOAT", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 is none."),
        Input("sampler_name", "COMBO", options=_SAMPLERS, accept=_available(SAMPLERS, _SAMPLERS)),
        Input("scheduler", "COMBO", options=_SCHEDULERS, accept=_available(SIGMA_SCHEDULES, _SCHEDULERS)),
        Input("positive", "CONDITIONING"),
        Input("negative", "CONDITIONING"),
        Input("latent_image", "LATENT"),
        Input(
            "denoise",
            "FLOAT",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the schedule to sample; below 1 the result keeps features of the latents.",
        ),
    ],
    outputs=[Output("LATENT")],
)
def ksampler(
    context: NodeContext,
    *,
    model: Denoiser,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Conditioning],
    negative: list[Conditioning],
    latent_image: Latent,
    denoise: float,
) -> tuple[Latent]:
    """Sample latents for the prompts, from noise or from noised latents."""
    components = model.base.components
    latents = _model_latents(latent_image, components.latent)
    sigmas = sigmas_for(model.diffusion.schedule, scheduler, steps, denoise=denoise, sampler=sampler_name)
    device = best_device()
    dtype = sampling_dtype(model.module, device)
    try:
        # Placed first and patched second: adapters are created on their layers' device.
        with placed(model.module, device=device, dtype=dtype), model.active():
            sampled = sample_latents(
                model.predict,
                schedule=model.diffusion.schedule,
                parameterization=model.diffusion.parameterization,
                positive=positive,
                negative=negative,
                latents=latents.to(device),
                noise=prepare_noise(seed, latents.shape),
                sigmas=sigmas,
                sampler=sampler_name,
                cfg=cfg,
                seed=seed,
                dtype=dtype,
                callback=lambda step, total, _: context.progress(step + 1, total),
                cancelled=context.cancelled,
            )
    except SamplingCancelledError as error:
        raise CancelledError(str(error)) from error
    return ({"samples": components.latent.from_model(sampled.cpu())},)


def _model_latents(latent: Latent, form: LatentFormat) -> Tensor:
    """Latents scaled for the denoiser; empty ones get the channels and size of its latents.

    Raises:
        DataError: the latents are from another model.
    """
    samples = latent["samples"].float()
    if samples.count_nonzero():
        check_latents(samples, form)
        return form.to_model(samples)
    scale = latent.get("downscale_ratio_spacial", form.downscale) / form.downscale
    height, width = (round(side * scale) * form.downscale for side in samples.shape[-2:])
    return torch.zeros(len(samples), *form.shape(height, width))
