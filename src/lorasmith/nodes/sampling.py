"""KSampler and its advanced form."""

from __future__ import annotations

from lorasmith.families.base import Conditioning
from lorasmith.families.model import Denoiser
from lorasmith.nodes.sampled_latents import Guider, Noise, sampled
from lorasmith.nodes.sampler_choices import CFG, DENOISE, SAMPLER_NAME, SCHEDULER, STEPS, seed_input
from lorasmith.nodes.values import Latent
from lorasmith.sampling.samplers import sigmas_for
from lorasmith.workflow import Input, NodeContext, Output, node


@node(
    "KSampler",
    display_name="KSampler",
    category="model/sampling",
    inputs=[
        Input("model", "MODEL"),
        seed_input("seed"),
        STEPS,
        CFG,
        SAMPLER_NAME,
        SCHEDULER,
        Input("positive", "CONDITIONING"),
        Input("negative", "CONDITIONING"),
        Input("latent_image", "LATENT"),
        DENOISE,
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
    sigmas = sigmas_for(model.diffusion.schedule, scheduler, steps, denoise=denoise, sampler=sampler_name)
    guider = Guider(model, positive, negative, cfg)
    result, _ = sampled(context, guider, latent_image, Noise(seed), sampler=sampler_name, sigmas=sigmas)
    return (result,)


@node(
    "KSamplerAdvanced",
    display_name="KSampler (Advanced)",
    category="model/sampling",
    inputs=[
        Input("model", "MODEL"),
        Input("add_noise", "COMBO", options=("enable", "disable"), tooltip="Disable it to continue another sampler."),
        seed_input("noise_seed"),
        STEPS,
        CFG,
        SAMPLER_NAME,
        SCHEDULER,
        Input("positive", "CONDITIONING"),
        Input("negative", "CONDITIONING"),
        Input("latent_image", "LATENT"),
        Input("start_at_step", "INT", default=0, min=0, max=10000, tooltip="First step, counted from 0."),
        Input("end_at_step", "INT", default=10000, min=0, max=10000, tooltip="Step before which to stop."),
        Input(
            "return_with_leftover_noise",
            "COMBO",
            options=("disable", "enable"),
            tooltip="Return noisy latents where sampling stops early, for another sampler to continue.",
        ),
    ],
    outputs=[Output("LATENT")],
)
def ksampler_advanced(
    context: NodeContext,
    *,
    model: Denoiser,
    add_noise: str,
    noise_seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: list[Conditioning],
    negative: list[Conditioning],
    latent_image: Latent,
    start_at_step: int,
    end_at_step: int,
    return_with_leftover_noise: str,
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
