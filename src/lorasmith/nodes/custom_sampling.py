"""Sampling from parts: noise, guider, sampler and sigmas."""

from __future__ import annotations

from torch import Tensor

from lorasmith.families.base import Conditioning
from lorasmith.families.model import Denoiser
from lorasmith.nodes.sampled_latents import Guider, Noise, sampled
from lorasmith.nodes.sampler_choices import CFG, DENOISE, SAMPLER_NAME, SCHEDULER, STEPS, seed_input
from lorasmith.nodes.values import Latent
from lorasmith.sampling.samplers import flux2_sigmas, sigmas_for
from lorasmith.workflow import Input, NodeContext, Output, node

_RESULTS = (
    Output("LATENT", "output"),
    Output("LATENT", "denoised_output", tooltip="The clean latents that the last step predicted."),
)
_PATCH = 16  # pixels of a Flux.2 patch in each direction


@node(
    "SamplerCustom",
    display_name="SamplerCustom",
    category="model/sampling/custom",
    inputs=[
        Input("model", "MODEL"),
        Input("add_noise", "BOOLEAN", default=True, tooltip="Disable it to continue another sampler."),
        seed_input("noise_seed"),
        CFG,
        Input("positive", "CONDITIONING"),
        Input("negative", "CONDITIONING"),
        Input("sampler", "SAMPLER"),
        Input("sigmas", "SIGMAS"),
        Input("latent_image", "LATENT"),
    ],
    outputs=_RESULTS,
)
def sampler_custom(
    context: NodeContext,
    *,
    model: Denoiser,
    add_noise: bool,
    noise_seed: int,
    cfg: float,
    positive: list[Conditioning],
    negative: list[Conditioning],
    sampler: str,
    sigmas: Tensor,
    latent_image: Latent,
) -> tuple[Latent, Latent]:
    """Sample latents with a sampler and sigmas of other nodes."""
    guider, noise = Guider(model, positive, negative, cfg), Noise(noise_seed, is_empty=not add_noise)
    return sampled(context, guider, latent_image, noise, sampler=sampler, sigmas=sigmas)


@node(
    "SamplerCustomAdvanced",
    display_name="SamplerCustomAdvanced",
    category="model/sampling/custom",
    inputs=[
        Input("noise", "NOISE"),
        Input("guider", "GUIDER"),
        Input("sampler", "SAMPLER"),
        Input("sigmas", "SIGMAS"),
        Input("latent_image", "LATENT"),
    ],
    outputs=_RESULTS,
)
def sampler_custom_advanced(
    context: NodeContext, *, noise: Noise, guider: Guider, sampler: str, sigmas: Tensor, latent_image: Latent
) -> tuple[Latent, Latent]:
    """Sample latents with all parts from other nodes."""
    return sampled(context, guider, latent_image, noise, sampler=sampler, sigmas=sigmas)


@node(
    "BasicGuider",
    display_name="Basic Guider",
    category="model/sampling/guiders",
    inputs=[Input("model", "MODEL"), Input("conditioning", "CONDITIONING")],
    outputs=[Output("GUIDER")],
)
def basic_guider(context: NodeContext, *, model: Denoiser, conditioning: list[Conditioning]) -> tuple[Guider]:
    """Follow a prompt without a negative one."""
    return (Guider(model, conditioning),)


@node(
    "CFGGuider",
    display_name="CFG Guider",
    category="model/sampling/guiders",
    inputs=[Input("model", "MODEL"), Input("positive", "CONDITIONING"), Input("negative", "CONDITIONING"), CFG],
    outputs=[Output("GUIDER")],
)
def cfg_guider(
    context: NodeContext,
    *,
    model: Denoiser,
    positive: list[Conditioning],
    negative: list[Conditioning],
    cfg: float,
) -> tuple[Guider]:
    """Follow a prompt and avoid a negative one."""
    return (Guider(model, positive, negative, cfg),)


@node(
    "KSamplerSelect",
    display_name="KSamplerSelect",
    category="model/sampling/samplers",
    inputs=[SAMPLER_NAME],
    outputs=[Output("SAMPLER")],
)
def ksampler_select(context: NodeContext, *, sampler_name: str) -> tuple[str]:
    """Choose a sampler."""
    return (sampler_name,)


@node(
    "RandomNoise",
    display_name="RandomNoise",
    category="model/sampling/noise",
    inputs=[seed_input("noise_seed")],
    outputs=[Output("NOISE")],
)
def random_noise(context: NodeContext, *, noise_seed: int) -> tuple[Noise]:
    """Noise of a seed."""
    return (Noise(noise_seed),)


@node(
    "DisableNoise",
    display_name="DisableNoise",
    category="model/sampling/noise",
    outputs=[Output("NOISE")],
    search_aliases=["zero noise"],
)
def disable_noise(context: NodeContext) -> tuple[Noise]:
    """No noise, to continue another sampler."""
    return (Noise(0, is_empty=True),)


@node(
    "BasicScheduler",
    display_name="BasicScheduler",
    category="model/sampling/schedulers",
    inputs=[Input("model", "MODEL"), SCHEDULER, STEPS, DENOISE],
    outputs=[Output("SIGMAS")],
)
def basic_scheduler(
    context: NodeContext, *, model: Denoiser, scheduler: str, steps: int, denoise: float
) -> tuple[Tensor]:
    """The sigmas of a scheduler for a model."""
    return (sigmas_for(model.diffusion.schedule, scheduler, steps, denoise=denoise)[-(steps + 1) :],)


@node(
    "Flux2Scheduler",
    display_name="Flux2Scheduler",
    category="model/sampling/schedulers",
    inputs=[
        Input("steps", "INT", default=20, min=1, max=4096),
        Input("width", "INT", default=1024, min=16, max=16384, step=1, tooltip="Of the picture in pixels."),
        Input("height", "INT", default=1024, min=16, max=16384, step=1, tooltip="Of the picture in pixels."),
    ],
    outputs=[Output("SIGMAS")],
)
def flux2_scheduler(context: NodeContext, *, steps: int, width: int, height: int) -> tuple[Tensor]:
    """The sigmas of Flux.2 for a size and a number of steps."""
    return (flux2_sigmas(steps, round(width * height / _PATCH**2)),)
