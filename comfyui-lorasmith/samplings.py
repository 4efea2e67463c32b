"""What a MODEL predicts and how it is noised, from its `model_sampling`, and that in a form for training."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling as sampling
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import DiscreteSchedule, FlowSchedule
from lorasmith.families.base import Diffusion

_COSMOS = "ModelSamplingCosmosRFlow"
"""A flow whose samplers count noise per signal."""

_FLOWS = ("ModelSamplingDiscreteFlow", "ModelSamplingFlux")


def diffusion_of(model_sampling: Any) -> Diffusion:
    """Raises OptionError for a kind that training does not cover."""
    kinds = {kind.__name__: kind for kind in type(model_sampling).__mro__}
    own = [name for name, kind in kinds.items() if kind.__module__ == sampling.__name__]
    others = [name for name, kind in kinds.items() if _adds_something(kind)]  # such as those of LCM and of other packs
    predicted = next((name for name in own if name.isupper()), "")
    schedule = next((name for name in own if not name.isupper()), "")
    scaled = getattr(model_sampling, "noise_scale", 1.0) != 1.0
    if predicted == "CONST" and schedule in _FLOWS and not scaled and not others:
        return Diffusion("flow", _flow(model_sampling, schedule))
    if predicted == "COSMOS_RFLOW" and schedule == _COSMOS and not others:
        return Diffusion("flow", FlowSchedule())
    if predicted in ("EPS", "V_PREDICTION") and schedule == "ModelSamplingDiscrete" and not others:
        alphas = 1 / (1 + model_sampling.sigmas.double().cpu() ** 2)
        return Diffusion("v" if predicted == "V_PREDICTION" else "epsilon", DiscreteSchedule(alphas))
    found = " with ".join([*others, *filter(None, (predicted, schedule)), *(["scaled noise"] if scaled else [])])
    covered = f"EPS or V_PREDICTION with ModelSamplingDiscrete, CONST with {' or '.join(_FLOWS)}, or COSMOS_RFLOW"
    raise OptionError(
        f"the sampling of a MODEL to train on must be {covered}, got {found}; leave out nodes that change its "
        "sampling, or use ComfyUI's own Train LoRA"
    )


def _adds_something(kind: type) -> bool:
    if kind.__module__ == sampling.__name__ or kind.__module__.startswith(("torch", "builtins")):
        return False
    return any(callable(value) for name, value in vars(kind).items() if not name.startswith("__"))


def _flow(model_sampling: Any, schedule: str) -> FlowSchedule:
    if schedule == "ModelSamplingFlux":
        return FlowSchedule.exponential(model_sampling.shift)
    return FlowSchedule(model_sampling.shift, len(model_sampling.sigmas), time_scale=model_sampling.multiplier)


def sigma_of(model_sampling: Any, diffusion: Diffusion, time: Tensor) -> Tensor:
    """What a sampler calls sigma at a time of `diffusion`, (batch,) fp32, for patches that ask for it."""
    if any(kind.__name__ == _COSMOS for kind in type(model_sampling).__mro__):
        return time / (1 - time)
    if isinstance(diffusion.schedule, FlowSchedule):
        return time / diffusion.schedule.time_scale
    sigma: Tensor = model_sampling.sigma(time)
    return sigma


class RawSampling:
    """In place of a `model_sampling`: the network gets its noised input and time, and its output is returned as it is.

    Everything else is that of the original.
    """

    def __init__(self, original: Any, time: Tensor) -> None:
        self._original = original
        self._time = time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        return noise

    def timestep(self, sigma: Tensor) -> Tensor:
        return self._time

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output
