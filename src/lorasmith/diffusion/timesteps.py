"""Diffusion time in training: pure maps from uniform numbers to quantiles of the schedule.

Every distribution is thus keyed (one number per draw), can be stratified and does not depend on the device. A quantile
of 0 is the cleanest end of the schedule, 1 the noisiest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorasmith.core.choices import TimestepDistribution
from lorasmith.core.random import keyed_generator, keyed_uniform
from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseSchedule, shifted

QuantileMap = Callable[[Tensor, tuple[int, int]], Tensor]
"""Uniform numbers (batch,) and (height, width) of the latents → quantiles (batch,)."""

TIMESTEP_DISTRIBUTIONS: Registry[Callable[[Tensor], Tensor]] = Registry("timestep distribution")

_INSIDE = 1e-6  # keeps the normal quantile function finite at both ends
_LEVELS = 10  # 1024 strata; a finer division makes no difference to a model


@TIMESTEP_DISTRIBUTIONS.register("uniform", "shifted")
def _uniform(u: Tensor) -> Tensor:
    """Uniform over the schedule (Ho et al. 2020); `shifted` is this with a shift by the size of the picture."""
    return u


@TIMESTEP_DISTRIBUTIONS.register("logit_normal", "sigmoid")
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


def quantile_map(distribution: TimestepDistribution, shift: float | None, schedule: NoiseSchedule) -> QuantileMap:
    """The map from uniform numbers to quantiles of a schedule.

    `shift` is the total shift of diffusion time: a flow's levels are `shifted(distribution(u), shift)`, without its own
    shift in addition (kohya's `discrete_flow_shift`, diffusers' `shift`); on discrete schedules it shifts the step
    index. None is the shift by picture size for `shifted`, the schedule's own for other distributions.
    """
    time = TIMESTEP_DISTRIBUTIONS[distribution]
    by_size = shift is None and distribution == "shifted"
    whole = schedule.shift if shift is None else shift

    def quantiles(u: Tensor, size: tuple[int, int]) -> Tensor:
        # Consecutive shifts multiply, so the shift that the schedule applies itself is divided out.
        return shifted(time(u), (schedule.resolution_shift(*size) if by_size else whole) / schedule.shift)

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
