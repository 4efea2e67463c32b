"""The gradient noise scale: the batch size above which larger batches bring diminishing returns; pure functions.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, appendix A.1. The squared norm
of a gradient averaged over b samples is expected to be |G|² + tr(Σ) / b, where G is the true gradient and Σ the
covariance of a single sample's. Two batch sizes give two equations, and the simple noise scale is tr(Σ) / |G|².

Both sizes are available only if a step accumulates over at least two micro-batches: the first of them is the small one,
the step the big one. Stratified noise levels reduce the noise; the estimate is of the remaining noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def noise_terms(small_sq: float, big_sq: float, *, small: float, big: float) -> tuple[float, float]:
    """Unbiased estimates of |G|² and tr(Σ); single ones are very noisy, and either may be negative.

    `small_sq` and `big_sq` are squared norms of the mean gradient over `small` and over `big` samples, `small` < `big`.
    """
    true_sq = (big * big_sq - small * small_sq) / (big - small)
    variance = (small_sq - big_sq) / (1 / small - 1 / big)
    return true_sq, variance


class NoiseScale:
    """The noise scale: the ratio of moving averages of both terms, as an average of ratios would be biased (A.1)."""

    def __init__(self, decay: float = 0.99) -> None:
        self._decay = decay
        self._true_sq = 0.0
        self._variance = 0.0

    def update(self, small_sq: float, big_sq: float, *, small: int, big: int) -> None:
        """Add a step; arguments as for `noise_terms`. A step with a single micro-batch is ignored."""
        if small >= big:
            return
        true_sq, variance = noise_terms(small_sq, big_sq, small=small, big=big)
        # Both start at 0, so both averages are too small by the same factor, which the ratio does not see.
        self._true_sq = self._decay * self._true_sq + (1 - self._decay) * true_sq
        self._variance = self._decay * self._variance + (1 - self._decay) * variance

    @property
    def value(self) -> float | None:
        """The noise scale in samples; None while the estimates are not positive (at first, or by chance)."""
        if self._true_sq <= 0 or self._variance < 0:
            return None
        return self._variance / self._true_sq

    def to_json(self) -> dict[str, Any]:
        return {"decay": self._decay, "true_sq": self._true_sq, "variance": self._variance}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> NoiseScale:
        scale = cls(state["decay"])
        scale._true_sq, scale._variance = state["true_sq"], state["variance"]
        return scale
