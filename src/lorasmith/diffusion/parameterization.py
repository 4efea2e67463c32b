"""Parameterizations: what a network predicts, and its relation to the clean sample.

    epsilon   the noise                                        (Ho et al. 2020)
    v         alpha · noise − sigma · x0                       (Salimans & Ho 2022, arXiv:2202.00512)
    flow      noise − x0                                       (Liu et al. 2022, arXiv:2209.03003)

All tensors are (batch, ...) in fp32; levels are those of the noised sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lorasmith.core.registry import Registry
from lorasmith.diffusion.schedule import NoiseLevel, per_sample


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
