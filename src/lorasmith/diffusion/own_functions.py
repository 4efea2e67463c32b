"""Functions of noise levels that users pass or register, tried before a run: timesteps and weights of the loss.

A run that continues calls them again, so that they must be functions of their arguments alone, sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lorasmith.core.choices import TIMESTEP_DISTRIBUTIONS, WEIGHTINGS, Objective
from lorasmith.core.errors import OptionError
from lorasmith.core.named_code import code_of
from lorasmith.core.printable import described, one_line_of
from lorasmith.diffusion.losses import level_scale
from lorasmith.diffusion.schedule import NoiseLevel, NoiseSchedule

_COUNT = 257
_TOLERANCE = 1e-5  # of functions that are computed in other orders for other numbers of samples


def check_timesteps(name: str) -> None:
    """Raise OptionError unless a setting names a distribution: ascending, from numbers in [0, 1] to numbers in it."""
    time, numbers = code_of(name, TIMESTEP_DISTRIBUTIONS), torch.linspace(0, 1, _COUNT)
    rule = "timesteps must be a function of uniform numbers (n,) that returns quantiles (n,), each from 0 to 1"
    remedy = "pass one such as lambda u: u**2"
    quantiles = _tried(lambda part: time(numbers[part].clone()), rule, name, remedy, most=1.0)
    if bool((quantiles.diff() < -_TOLERANCE).any()):
        raise OptionError(f"timesteps must ascend with the uniform numbers, but {name} does not; sort its quantiles")


def check_weighting(
    name: str, *, gamma: float, schedule: NoiseSchedule, parameterization: str, objective: Objective
) -> None:
    """Raise OptionError unless a setting names weights of noise levels; ours are not tried."""
    if WEIGHTINGS.extension(name) is None:
        return
    level = schedule.at((torch.arange(_COUNT) + 0.5) / _COUNT)
    scale, weigh = level_scale(level, parameterization, objective), WEIGHTINGS[name]

    def weights(part: slice) -> object:
        return weigh(NoiseLevel(level.alpha[part], level.sigma[part], level.time[part]), scale[part], gamma)

    rule = "loss_weighting must be a function of level, scale and gamma that returns weights (n,), each at least 0"
    _tried(weights, rule, name, "return one such as scale / (1 + level.sigma**2)")


def _tried(compute: Callable[[slice], object], rule: str, name: str, remedy: str, *, most: float = math.inf) -> Tensor:
    """The values for all samples, after trying some samples alone and all of them again."""
    try:
        whole, again = compute(slice(None)), compute(slice(None))
        first, others = compute(slice(1)), compute(slice(1, None))
    except Exception as error:  # of any kind
        raise OptionError(f"{rule}, but {name} fails: {one_line_of(error)}; {remedy}") from error
    for found, count in ((whole, _COUNT), (again, _COUNT), (first, 1), (others, _COUNT - 1)):
        if wrong := _wrong(found, count, most):
            raise OptionError(f"{rule}, but {name} returns {wrong} for {count}; {remedy}")
    assert isinstance(whole, Tensor) and isinstance(again, Tensor)
    assert isinstance(first, Tensor) and isinstance(others, Tensor)
    if not torch.equal(whole, again):
        raise OptionError(
            f"{rule}, the same in every call, but {name} returns others in a second call; take no random numbers in it"
        )
    if not torch.allclose(whole, torch.cat((first, others)), atol=_TOLERANCE, rtol=_TOLERANCE):
        raise OptionError(f"{rule}, each of one number alone, but those of {name} depend on the others; {remedy}")
    return whole


def _wrong(found: object, count: int, most: float) -> str:
    """What a function returned, in words, if it is not a value for each sample; empty if it is."""
    if not isinstance(found, Tensor):
        return described(found)
    if found.shape != (count,) or not found.is_floating_point():
        return f"a tensor of shape {tuple(found.shape)} in {str(found.dtype).removeprefix('torch.')}"
    least, greatest = found.min().item(), found.max().item()
    if not found.isfinite().all() or least < -_TOLERANCE or greatest > most + _TOLERANCE:
        return f"values from {least:.4g} to {greatest:.4g}"
    return ""
