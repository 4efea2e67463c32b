"""How a MODEL is noised and what it predicts, from its `model_sampling`, in a form for training.

ComfyUI's states are x = x0 + sigma · noise, those of flows (1 − sigma) · x0 + sigma · noise_scale · noise. Both are,
times a number, noised latents z = alpha · x0 / scale + s · noise of a schedule here, with a scale of `sigma_data` or
`noise_scale`. With c = (sigma² + sigma_data²)^½, alpha = sigma_data / c and s = sigma / c, networks get x / c = z, and
from their output F clean latents follow:

    EPS     x0 = x − sigma · F                                 F is a prediction of epsilon
    V       x0 = sigma_data² / c² · x − sigma_data · s · F     F is a prediction of v
    EDM     x0 = sigma_data² / c² · x + sigma_data · s · F     −F is a prediction of v
    CONST   x0 = x − sigma · F                                 the network gets x = scale · z; F / scale is a flow

Of other kinds (X0, the v of CogVideoX, LCM) the prediction is what the clean latents imply that ComfyUI makes of F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.model_sampling as sampling
import torch
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.diffusion.schedule import (
    PARAMETERIZATIONS,
    DiscreteSchedule,
    FlowSchedule,
    NoiseLevel,
    NoiseSchedule,
    per_sample,
)
from lorasmith.families.forms import Diffusion

_PREDICTED = {
    "EPS": "epsilon",
    "V_PREDICTION": "v",
    "EDM": "v",
    "V_PREDICTION_DDPM": "v",
    "X0": "v",
    "CONST": "flow",
    "COSMOS_RFLOW": "flow",
}
"""What is predicted in training, by kind; image-to-image kinds have no noise to train on."""

_SIGNS = {"EPS": 1, "V_PREDICTION": 1, "EDM": -1, "CONST": 1, "COSMOS_RFLOW": 1}
"""Of kinds whose networks' outputs are that prediction, up to a factor."""

_DISCRETE = "ModelSamplingDiscrete"
_FLOWS = (_FLOW, _FLUX) = ("ModelSamplingDiscreteFlow", "ModelSamplingFlux")


@dataclass(frozen=True)
class Sampling:
    """A `model_sampling` for training: its schedule, and predictions of a network in its place.

    Attributes:
        scale: by which latents are divided to be trained on.
        factors: of the network's input and output; None if the prediction follows from the clean latents.
        counts_signal: whether a flow's samplers count noise per signal (Cosmos).
    """

    original: Any
    diffusion: Diffusion
    scale: float
    factors: tuple[float, float] | None
    counts_signal: bool

    def sigma(self, time: Tensor) -> Tensor:
        """What a sampler calls sigma at a time of `diffusion`, (batch,) fp32."""
        if self.counts_signal:
            return time / (1 - time)
        if isinstance(self.diffusion.schedule, FlowSchedule):
            return time / self.diffusion.schedule.time_scale
        if isinstance(self.diffusion.schedule, SignalSchedule):
            return time
        sigma: Tensor = self.original.sigma(time)
        return sigma

    def state(self, noised: Tensor, sigma: Tensor) -> Tensor:
        """A sampler's state at its sigma (batch,) for noised latents of `diffusion`."""
        if self.counts_signal:
            return noised * per_sample(1 + sigma, noised)
        if isinstance(self.diffusion.schedule, FlowSchedule):
            return noised * self.scale
        return noised * per_sample((self.scale**2 + sigma**2).sqrt(), noised)

    def network_time(self, time: Tensor) -> Tensor:
        """What the network gets as its time, (batch,)."""
        is_sigma = isinstance(self.diffusion.schedule, SignalSchedule)
        found: Tensor = self.original.timestep(time) if is_sigma else time
        return found


def sampling_of(model_sampling: Any) -> Sampling:
    """Raises OptionError for a kind that training does not cover."""
    kinds = type(model_sampling).__mro__
    own = [kind.__name__ for kind in kinds if kind.__module__ == sampling.__name__]
    others = [kind.__name__ for kind in kinds if _adds_something(kind)]  # such as those of LCM and of other packs
    kind = next((name for name in own if name.isupper()), "")
    schedule = next((name for name in own if not name.isupper()), "")
    found = _schedule(model_sampling, kind, schedule, others)
    if found is None:
        raise OptionError(
            f"the sampling of a MODEL to train on must be noise, v, x0 or flow prediction over ComfyUI's usual levels, "
            f"got {' with '.join([*others, *filter(None, (kind, schedule))])}; leave out nodes that change its "
            "sampling, or use ComfyUI's own Train LoRA"
        )
    scale = _scale(model_sampling, kind)
    factor = scale if kind == "CONST" else 1.0
    return Sampling(
        model_sampling,
        Diffusion(_PREDICTED[kind], found),
        scale,
        (factor, _SIGNS[kind] / factor) if kind in _SIGNS and not others else None,
        kind == "COSMOS_RFLOW",
    )


def _schedule(model_sampling: Any, kind: str, schedule: str, others: list[str]) -> NoiseSchedule | None:
    if kind == "CONST" and schedule in _FLOWS and not others:
        if schedule == _FLUX:
            return FlowSchedule.exponential(model_sampling.shift)
        return FlowSchedule(model_sampling.shift, len(model_sampling.sigmas), time_scale=model_sampling.multiplier)
    if kind == "COSMOS_RFLOW" and schedule == "ModelSamplingCosmosRFlow" and not others:
        return FlowSchedule()
    if _PREDICTED.get(kind, "flow") == "flow" or not schedule or schedule in _FLOWS:
        return None
    noised = next(kind for kind in type(model_sampling).__mro__ if "noise_scaling" in vars(kind))
    if noised.__module__ != sampling.__name__:  # in a way of its own
        return None
    if schedule == _DISCRETE and not others:
        return DiscreteSchedule(1 / (1 + model_sampling.sigmas.double().cpu() ** 2))
    return SignalSchedule(model_sampling.sigmas, _scale(model_sampling, kind))


def _scale(model_sampling: Any, kind: str) -> float:
    return float(getattr(model_sampling, "noise_scale" if kind == "CONST" else "sigma_data", 1.0))


def _adds_something(kind: type) -> bool:
    if kind.__module__ == sampling.__name__ or kind.__module__.startswith(("torch", "builtins")):
        return False
    return any(callable(value) for name, value in vars(kind).items() if not name.startswith("__"))


class SignalSchedule(NoiseSchedule):
    """A table of levels whose time is what ComfyUI's samplers call sigma.

    Args:
        sigmas: (N,) ascending, noise per signal.
        scale: by which latents are divided to be trained on, and sigmas here with them.
    """

    def __init__(self, sigmas: Tensor, scale: float) -> None:
        self._scale = scale
        self.sigmas = sigmas.to("cpu", torch.float32) / scale

    def at(self, quantile: Tensor) -> NoiseLevel:
        index = (quantile * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        return self.at_sigma(self.sigmas[index])

    def quantile(self, time: float) -> float:
        return time

    def zero_terminal(self) -> NoiseSchedule:
        return self

    def at_sigma(self, sigma: Tensor) -> NoiseLevel:
        sigma = sigma.to("cpu", torch.float32)
        alpha = (1 + sigma**2).rsqrt()
        return NoiseLevel(alpha, sigma * alpha, self.timestep(sigma))

    def sigma(self, timestep: Tensor) -> Tensor:
        return timestep / self._scale

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self._scale

    def sigma_at(self, progress: float) -> float:
        if progress <= 0:
            return math.inf
        return 0.0 if progress >= 1 else float(self.sigmas[round((1 - progress) * (len(self.sigmas) - 1))])

    def model_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x * per_sample(level.alpha, x)

    def signal(self, sigma: float) -> float:
        return 1.0

    def initial(self, noise: Tensor, latents: Tensor, sigma: float) -> Tensor:
        return latents + noise * sigma


class RawSampling:
    """In place of a `model_sampling`: `apply_model` takes noised latents and returns the prediction of `diffusion`.

    Everything else is that of the original.
    """

    def __init__(self, sampling: Sampling, time: Tensor) -> None:
        self._sampling = sampling
        self._time = time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampling.original, name)

    def calculate_input(self, sigma: Tensor, noise: Tensor) -> Tensor:
        one = self._sampling
        if one.factors is not None:
            return one.factors[0] * noise
        found: Tensor = one.original.calculate_input(sigma, one.state(noise.float(), sigma))
        return found

    def timestep(self, sigma: Tensor) -> Tensor:
        return self._sampling.network_time(self._time)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        one = self._sampling
        if one.factors is not None:
            return one.factors[1] * model_output
        noised, relative = model_input.float(), sigma / one.scale
        clean = one.original.calculate_denoised(sigma, model_output, one.state(noised, sigma)) / one.scale
        alpha = (1 + relative**2).rsqrt()
        noise = (noised - per_sample(alpha, clean) * clean) / per_sample(relative * alpha, clean)
        kind = PARAMETERIZATIONS[one.diffusion.parameterization]
        return kind.target(clean, noise, NoiseLevel(alpha, relative * alpha, self._time))
