"""Inputs of sampling nodes: ComfyUI's lists of samplers and schedulers, of which registered ones are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.registry import Registry, nearest
from lorasmith.sampling.samplers import SAMPLERS, SIGMA_SCHEDULES
from lorasmith.workflow import Input

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


def seed_input(name: str) -> Input:
    """The input of a seed."""
    return Input(name, "INT", default=0, min=0, max=2**64 - 1, extras={"control_after_generate": True})


SAMPLER_NAME = Input("sampler_name", "COMBO", options=_SAMPLERS, accept=_available(SAMPLERS, _SAMPLERS))
SCHEDULER = Input("scheduler", "COMBO", options=_SCHEDULERS, accept=_available(SIGMA_SCHEDULES, _SCHEDULERS))
STEPS = Input("steps", "INT", default=20, min=1, max=10000)
CFG = Input("cfg", "FLOAT", default=8.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale; 1 is none.")
DENOISE = Input(
    "denoise",
    "FLOAT",
    default=1.0,
    min=0.0,
    max=1.0,
    step=0.01,
    tooltip="Part of the schedule to sample; below 1 the result keeps features of the latents.",
)
