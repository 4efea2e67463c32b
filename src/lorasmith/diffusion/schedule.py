"""Noise schedules: weights of signal and noise over diffusion time; what a network predicts; and time in training.

Every schedule noises as `x_t = alpha · x0 + sigma · noise`. Two kinds exist:

- `DiscreteSchedule` (Ho et al. 2020, arXiv:2006.11239): 1000 variance-preserving steps, `alpha² + sigma² = 1`.
- `FlowSchedule` (rectified flow, Esser et al. 2024, arXiv:2403.03206): `alpha = 1 − sigma`.

Samplers use one number per step, sigma in k-diffusion (Karras et al. 2022, arXiv:2206.00364): for a discrete schedule
the noise-to-signal ratio `sigma/alpha` of the variance-exploding form `x = x0 + sigma · noise`, for a flow its sigma.

Predictions, and their relation to the clean sample; tensors are (batch, ...) in fp32, levels those of the noised one:

    epsilon   the noise                                        (Ho et al. 2020)
    v         alpha · noise − sigma · x0                       (Salimans & Ho 2022, arXiv:2202.00512)
    flow      noise − x0                                       (Liu et al. 2022, arXiv:2209.03003)

Distributions of time are pure maps from uniform numbers to quantiles of the schedule, so each is keyed (one number per
draw), can be stratified and does not depend on the device. A quantile of 0 is the cleanest end, 1 the noisiest.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.core.choices import TIMESTEP_DISTRIBUTIONS
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import Code, code_of
from lorasmith.core.random import keyed_generator, keyed_uniform
from lorasmith.core.registry import Registry


@dataclass(frozen=True)
class ResolutionShift:
    """A shift by picture size: exp(mu), with mu linear in the number of patches of the latents, or in its logarithm.

    Larger pictures need more noise for the same uncertainty (Esser et al. 2024, section 5.3.2).
    """

    mu: tuple[float, float] = (0.5, 1.15)  # at each of `patches`
    patches: tuple[int, int] = (256, 4096)  # two numbers of patches
    patch: int = 2  # side of a patch in latents
    is_power: bool = False  # whether mu is linear in the logarithm, the shift being a power of the number

    def __call__(self, height: int, width: int) -> float:
        """The shift for latents of a height and width."""
        return self.of_patches((height // self.patch) * (width // self.patch))

    def of_patches(self, count: float) -> float:
        low, high = self.mu
        few, many, here = (math.log(patches) if self.is_power else patches for patches in (*self.patches, count))
        return math.exp(low + (high - low) * (here - few) / (many - few))


EXPONENTIAL_STEPS = 10_000
"""Entries of ComfyUI's sigma table for shifts of exp(mu) (`ModelSamplingFlux`); some schedulers take every n-th."""

_FAINTEST = 2.0**-24  # replaces a signal power of zero in ratios


@dataclass(frozen=True)
class NoiseLevel:
    """Noise levels of samples; every field has shape (batch,) and dtype fp32."""

    alpha: Tensor  # weight of the clean sample
    sigma: Tensor  # weight of the noise
    # input of the family's `predict`: step index 0..999 of a discrete schedule, sigma · `time_scale` of a flow
    time: Tensor

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """`alpha · clean + sigma · noise`, broadcast over (batch, ...)."""
        return per_sample(self.alpha, clean) * clean + per_sample(self.sigma, clean) * noise

    def to(self, device: torch.device | str) -> NoiseLevel:
        """The levels on `device`, copied asynchronously."""
        return NoiseLevel(*(t.to(device, non_blocking=True) for t in (self.alpha, self.sigma, self.time)))


class NoiseSchedule(ABC):
    """A noise schedule.

    Attributes:
        sigmas: (N,) the table of sampler sigmas, ascending.
        shift: by which `at` moves quantiles towards the noisy end; 1 is none.
        resolution_shift: the shift by picture size, for runs that use one.
    """

    sigmas: Tensor
    shift: float = 1.0
    resolution_shift: ResolutionShift = ResolutionShift()

    @abstractmethod
    def at(self, quantile: Tensor) -> NoiseLevel:
        """Levels for quantiles (batch,) in [0, 1) of diffusion time; 0 is the cleanest."""

    @abstractmethod
    def quantile(self, time: float) -> float:
        """The inverse of `at`: the quantile at a share of diffusion time, 0 for clean to 1 for noise."""

    def share(self, time: Tensor) -> Tensor:
        """The share of diffusion time, 0 for clean to 1 for noise, of `NoiseLevel.time` (batch,).

        Of a schedule that does not say it, its place in the table.
        """
        table = self.timestep(self.sigmas)
        return torch.searchsorted(table, time.to(table)) / len(table)

    @abstractmethod
    def zero_terminal(self) -> NoiseSchedule:
        """The schedule rescaled to pure noise at its noisiest point."""

    @abstractmethod
    def at_sigma(self, sigma: Tensor) -> NoiseLevel:
        """Levels for sampler sigmas (batch,)."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """Sampler sigmas of (fractional) timesteps, which are in the schedule's own units."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps of sampler sigmas, in the schedule's own units."""

    @abstractmethod
    def sigma_at(self, progress: float) -> float:
        """Sampler sigma at a part of sampling in [0, 1]: infinite at 0, 0 at 1."""

    @abstractmethod
    def model_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """The network's input for a sampler's state `x` at `level`."""

    @abstractmethod
    def signal(self, sigma: float) -> float:
        """Weight of the clean sample in a sampler's state `signal · x0 + sigma · noise`."""

    @abstractmethod
    def initial(self, noise: Tensor, latents: Tensor, sigma: float) -> Tensor:
        """A sampler's first state: `latents` noised to sampler sigma."""


class DiscreteSchedule(NoiseSchedule):
    """Variance-preserving steps given by the running product of their signal powers.

    Args:
        alphas_cumprod: (N,) descending, as in diffusers' schedulers; for a last value of 0 the sampler sigma is 4096
            instead of infinite.
        stride: steps of the network's time per entry; entry i is at time `stride · (i + 1) − 1`.
    """

    def __init__(self, alphas_cumprod: Tensor, stride: int = 1) -> None:
        self.stride = stride
        # In double precision: 1 − alphas_cumprod loses half of its digits in fp32 at low noise.
        self._alphas_cumprod = exact = alphas_cumprod.to(torch.float64)
        sigmas = ((1 - exact) / exact.clamp(min=_FAINTEST)).sqrt()
        self._signal = exact.sqrt().to(torch.float32)
        self._noise = (1 - exact).sqrt().to(torch.float32)
        self._log_sigmas = sigmas.log().to(torch.float32)
        self.sigmas = sigmas.to(torch.float32)

    @classmethod
    def scaled_linear(cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> DiscreteSchedule:
        """Stable Diffusion's schedule: betas linear in their square root."""
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
        return cls((1 - betas).cumprod(0))

    def zero_terminal(self) -> DiscreteSchedule:
        """Signal weights shifted and scaled: the last is 0, the first unchanged (Lin et al. 2023, arXiv:2305.08891)."""
        first, last = self._alphas_cumprod[0].sqrt(), self._alphas_cumprod[-1].sqrt()
        signal = (self._alphas_cumprod.sqrt() - last) * (first / (first - last))
        return DiscreteSchedule(signal**2, self.stride)

    def every(self, stride: int) -> DiscreteSchedule:
        """The last of each `stride` steps: the schedule of a model distilled to these."""
        return DiscreteSchedule(self._alphas_cumprod[stride - 1 :: stride], self.stride * stride)

    def at(self, quantile: Tensor) -> NoiseLevel:
        index = (quantile * len(self.sigmas)).long().clamp(0, len(self.sigmas) - 1)
        return NoiseLevel(self._signal[index], self._noise[index], self._time(index.to(torch.float32)))

    def quantile(self, time: float) -> float:
        return time

    def share(self, time: Tensor) -> Tensor:
        return time.to("cpu", torch.float64) / (self.stride * len(self.sigmas))

    def at_sigma(self, sigma: Tensor) -> NoiseLevel:
        sigma = sigma.to("cpu", torch.float32)
        alpha = (1 + sigma**2).rsqrt()
        return NoiseLevel(alpha, sigma * alpha, self.timestep(sigma))

    def sigma(self, timestep: Tensor) -> Tensor:
        """Interpolated log-linearly between the table's entries."""
        timestep = ((timestep.to(torch.float32) + 1) / self.stride - 1).clamp(0, len(self.sigmas) - 1)
        low, high = timestep.floor().long(), timestep.ceil().long()
        weight = timestep.frac()
        return ((1 - weight) * self._log_sigmas[low] + weight * self._log_sigmas[high]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Time of the table's entry nearest in log sigma, as a float."""
        distance = sigma.to("cpu", torch.float32).log()[..., None] - self._log_sigmas
        return self._time(distance.abs().argmin(-1).to(torch.float32))

    def sigma_at(self, progress: float) -> float:
        if progress <= 0:
            return math.inf
        last = self.stride * len(self.sigmas) - 1
        return 0.0 if progress >= 1 else self.sigma(torch.tensor((1 - progress) * last)).item()

    def _time(self, index: Tensor) -> Tensor:
        return (index + 1) * self.stride - 1

    def model_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x * per_sample(level.alpha, x)

    def signal(self, sigma: float) -> float:
        """1: samplers use the variance-exploding form."""
        return 1.0

    def initial(self, noise: Tensor, latents: Tensor, sigma: float) -> Tensor:
        """At the top of the table noise is scaled to `sqrt(1 + sigma²)`: unit noise for the network, as in ComfyUI."""
        if sigma >= self.sigmas[-1].item() * (1 - 1e-5):
            sigma = math.sqrt(1 + sigma**2)
        return latents + noise * sigma


class FlowSchedule(NoiseSchedule):
    """Rectified flow with sigma shifted towards the noisy end: `sigma = shift·u / (1 + (shift − 1)·u)`.

    Args:
        shift: 1 for none; exp(mu) for the exponential form.
        steps: entries of the sigma table.
        resolution_shift: the family's own, if it differs from that of Flux.1.
        time_scale: the network's time is sigma times this, 1000 for networks made for discrete steps.
    """

    def __init__(
        self,
        shift: float = 1.0,
        steps: int = 1000,
        resolution_shift: ResolutionShift = ResolutionShift(),
        time_scale: float = 1.0,
    ) -> None:
        self.shift = shift
        self.time_scale = time_scale
        self.resolution_shift = resolution_shift
        self.sigmas = shifted(torch.arange(1, steps + 1, dtype=torch.float32) / steps, shift)

    @classmethod
    def exponential(cls, mu: float, *, resolution_shift: ResolutionShift = ResolutionShift()) -> FlowSchedule:
        """The schedule with a shift of exp(mu), and a table as long as ComfyUI's for it."""
        return cls(math.exp(mu), EXPONENTIAL_STEPS, resolution_shift)

    def zero_terminal(self) -> FlowSchedule:
        """The schedule itself: a flow ends in pure noise."""
        return self

    def at(self, quantile: Tensor) -> NoiseLevel:
        return self.at_sigma(shifted(quantile.to(torch.float32), self.shift))

    def quantile(self, time: float) -> float:
        return time / (self.shift - (self.shift - 1) * time)

    def share(self, time: Tensor) -> Tensor:
        return time.to("cpu", torch.float64) / self.time_scale

    def at_sigma(self, sigma: Tensor) -> NoiseLevel:
        sigma = sigma.to("cpu", torch.float32)
        return NoiseLevel(1 - sigma, sigma, sigma * self.time_scale)

    def sigma(self, timestep: Tensor) -> Tensor:
        """Sigma of unshifted time in [0, 1]."""
        return shifted(timestep.to(torch.float32), self.shift)

    def timestep(self, sigma: Tensor) -> Tensor:
        """Sigma itself: samplers step through shifted time, as in ComfyUI's flow models."""
        return sigma.to("cpu", torch.float32)

    def sigma_at(self, progress: float) -> float:
        if progress <= 0:
            return math.inf
        return 0.0 if progress >= 1 else self.sigma(torch.tensor(1 - progress)).item()

    def model_input(self, x: Tensor, level: NoiseLevel) -> Tensor:
        return x

    def signal(self, sigma: float) -> float:
        return 1 - sigma

    def initial(self, noise: Tensor, latents: Tensor, sigma: float) -> Tensor:
        return (1 - sigma) * latents + sigma * noise


def check_noising(schedule: NoiseSchedule, parameterization: str, *, zero_terminal_snr: bool) -> None:
    """Raise OptionError if zero_terminal_snr does not apply to a model."""
    if not zero_terminal_snr:
        return
    rule = "zero_terminal_snr is for v-prediction models with discrete timesteps"
    if not isinstance(schedule, DiscreteSchedule):
        what = "is a flow, which ends in pure noise already" if isinstance(schedule, FlowSchedule) else "has other ones"
        raise OptionError(f"{rule}, but this model {what}; leave it out")
    if parameterization != "v":
        raise OptionError(
            f"{rule}, but this model predicts {parameterization}, which does not depend on the picture in pure noise; "
            "leave it out or train a v-prediction model"
        )


def shifted(time: Tensor, shift: float) -> Tensor:
    """Time in [0, 1] shifted towards 1 (Esser et al. 2024, eq. 23)."""
    return shift * time / (1 + (shift - 1) * time)


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """`values` (batch,) on x's device, reshaped to broadcast over x."""
    return values.to(x.device).reshape(-1, *(1,) * (x.ndim - 1))


class Parameterization(ABC):
    """One kind of prediction."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """The target of the prediction."""

    @abstractmethod
    def clean(self, prediction: Tensor, noised: Tensor, level: NoiseLevel) -> Tensor:
        """The clean sample that a prediction implies for `noised = alpha·x0 + sigma·noise`."""

    @abstractmethod
    def clean_scale(self, level: NoiseLevel) -> Tensor:
        """(batch,) squared error of the clean sample per squared error of the prediction."""


PARAMETERIZATIONS: Registry[Parameterization] = Registry("parameterization")


class _Epsilon(Parameterization):
    def target(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise

    def clean(self, prediction: Tensor, noised: Tensor, level: NoiseLevel) -> Tensor:
        return (noised - per_sample(level.sigma, noised) * prediction) / per_sample(level.alpha, noised)

    def clean_scale(self, level: NoiseLevel) -> Tensor:
        return (level.sigma / level.alpha) ** 2


class _V(Parameterization):
    def target(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return per_sample(level.alpha, clean) * noise - per_sample(level.sigma, clean) * clean

    def clean(self, prediction: Tensor, noised: Tensor, level: NoiseLevel) -> Tensor:
        return per_sample(level.alpha, noised) * noised - per_sample(level.sigma, noised) * prediction

    def clean_scale(self, level: NoiseLevel) -> Tensor:
        return level.sigma**2


class _Flow(Parameterization):
    def target(self, clean: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        return noise - clean

    def clean(self, prediction: Tensor, noised: Tensor, level: NoiseLevel) -> Tensor:
        return noised - per_sample(level.sigma, noised) * prediction

    def clean_scale(self, level: NoiseLevel) -> Tensor:
        return level.sigma**2


PARAMETERIZATIONS.register("epsilon", "eps")(_Epsilon())
PARAMETERIZATIONS.register("v", "v_prediction")(_V())
PARAMETERIZATIONS.register("flow")(_Flow())


QuantileMap = Callable[[Tensor, tuple[int, int]], Tensor]
"""Uniform numbers (batch,) and (height, width) of the latents → quantiles (batch,)."""

_INSIDE = 1e-6  # keeps the normal quantile function finite at both ends
_LEVELS = 10  # 1024 strata; a finer division makes no difference to a model


@TIMESTEP_DISTRIBUTIONS.register("uniform")
@TIMESTEP_DISTRIBUTIONS.register("shifted")
def _uniform(u: Tensor) -> Tensor:
    """Uniform over the schedule (Ho et al. 2020); `shifted` is this with a shift by the size of the picture."""
    return u


@TIMESTEP_DISTRIBUTIONS.register("logit_normal")
@TIMESTEP_DISTRIBUTIONS.register("sigmoid")
def _logit_normal(u: Tensor) -> Tensor:
    """`sigmoid(N(0, 1))`: denser in the middle, where flows are hardest to learn (Esser et al. 2024, section 3.1)."""
    normal: Tensor = torch.special.ndtri(u.clamp(_INSIDE, 1 - _INSIDE))
    return normal.sigmoid()


def uniform_numbers(draws: Sequence[int], *, seed: int, stratified: bool) -> Tensor:
    """Numbers in [0, 1] of global draw indices, (len(draws),) fp32, independent unless `stratified`.

    Stratified ones are a scrambled van der Corput sequence (Owen 1995): of 2^k consecutive draws from a multiple of
    2^k, one falls into each of 2^k equal parts of the range, uniformly (k up to 10). Each number is uniform over seeds,
    and steps of any size cover the range. The order of images is random in each epoch, so no image stays in a part of
    the range.
    """
    numbers = [keyed_uniform(seed, "timestep", draw) for draw in draws]
    if stratified:
        numbers = [(_stratum(draw, seed) + inside) / 2**_LEVELS for draw, inside in zip(draws, numbers, strict=True)]
    return torch.tensor(numbers)


def quantile_map(distribution: Code, shift: float | None, schedule: NoiseSchedule) -> QuantileMap:
    """The map from uniform numbers to quantiles of a schedule.

    `shift` is the total shift of diffusion time: a flow's levels are `shifted(distribution(u), shift)`, without its own
    shift in addition (kohya's `discrete_flow_shift`, diffusers' `shift`); on discrete schedules it shifts the step
    index. None is the shift by picture size for `shifted`, the schedule's own for other distributions.
    """
    time = code_of(distribution, TIMESTEP_DISTRIBUTIONS)
    by_size = shift is None and distribution == "shifted"
    whole = schedule.shift if shift is None else shift

    def quantiles(u: Tensor, size: tuple[int, int]) -> Tensor:
        # Consecutive shifts multiply, so the shift that the schedule applies itself is divided out.
        return shifted(time(u).clamp(0, 1), (schedule.resolution_shift(*size) if by_size else whole) / schedule.shift)

    return quantiles


def quantile_range(schedule: NoiseSchedule, low: float, high: float) -> tuple[float, float]:
    """The quantiles of a range of diffusion time, 0 for clean to 1 for noise."""
    return schedule.quantile(low), schedule.quantile(high)


def range_limited(quantiles: QuantileMap, low: float, high: float) -> QuantileMap:
    """The same distribution under the condition that quantiles lie between `low` and `high`.

    Two ranges that share a schedule are thus trained with the same density as by one run on the whole. `quantiles` must
    ascend in its uniform number.
    """

    @functools.lru_cache(maxsize=4096)
    def limits(size: tuple[int, int]) -> tuple[float, float]:
        return _inverse(quantiles, low, size), _inverse(quantiles, high, size)

    def limited(u: Tensor, size: tuple[int, int]) -> Tensor:
        start, end = limits(size)
        return quantiles(start + (end - start) * u, size).clamp(low, high)

    return limited


def _inverse(quantiles: QuantileMap, wanted: float, size: tuple[int, int]) -> float:
    """The uniform number of a quantile, by bisection."""
    start, end = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (start + end) / 2
        below = quantiles(torch.tensor([middle]), size).item() < wanted
        start, end = (middle, end) if below else (start, middle)
    return end


_HALVINGS = 30  # fp32 has 24 bits


def _stratum(draw: int, seed: int) -> int:
    """The stratum of a draw: each block of draws visits all strata once, in an order of its own.

    The order is that of a binary tree: consecutive draws separate at its root, draws of equal parity one level below,
    and so on, with a random bit at each node for the order of its two children.
    """
    block, position = divmod(draw, 2**_LEVELS)
    coins = torch.randint(2, (2**_LEVELS,), generator=keyed_generator(seed, "strata", block)).tolist()
    stratum, node = 0, 1
    for _ in range(_LEVELS):
        position, digit = divmod(position, 2)
        stratum = 2 * stratum + (digit ^ coins[node])
        node = 2 * node + digit
    return stratum
