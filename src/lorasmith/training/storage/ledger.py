"""Statistics of training losses by noise level over time, and by image; pure functions.

The loss of a draw depends on its noise level by orders of magnitude. Draws are therefore compared within a bin of
diffusion time, in logarithms: an image's level is the geometric mean over its draws of loss / (usual loss in that bin),
which is a geometric mean over all draws of the run in which each image counts once, however often it is drawn. A level
of 0.8 is a fifth below the usual loss at these noise levels.

The input is `StepDone.draws`, live or from `events.jsonl`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_LOOKS = 12
"""Draws of an image, four in each third, below which it is not judged."""

FEW_IMAGES = 4
"""Images below which none is compared with the others."""

_CLEAR = 2.0  # standard errors from which a difference is significant
_SURE = 2.5  # those from which an image stands out, as each of many is looked at
_FAR = 1.5  # factor from which a level is far from that of others

Standing = Literal["too few looks", "memorised", "never fit", "still learning", "learnt", "unchanged"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageLevels:
    """Training losses of one image, its repeats and mirrored copies included."""

    name: str
    looks: int  # number of its draws
    # Levels in the first and last third of its draws, relative to the mean over images in the first; may be NaN.
    first: float
    last: float
    # Level in the last third, relative to the mean over the other images; NaN if there are few.
    relative: float
    standing: Standing  # see `Ledger.images`


@dataclass(frozen=True)
class QuantileCurve:
    """Training loss by noise level over time."""

    bins: tuple[float, ...]  # edges in quantiles of diffusion time, one more than bins: 0 is clean, 1 is noise
    steps: tuple[int, ...]  # last step of each averaged interval
    losses: tuple[tuple[float | None, ...], ...]  # mean by interval and bin, None without draws


class Ledger:
    """Every draw of a run, by image name and in `bins` equal parts of diffusion time."""

    def __init__(self, names: Sequence[str], *, bins: int = 10) -> None:
        self._images = list(dict.fromkeys(names))
        place = {name: index for index, name in enumerate(self._images)}
        self._image_of = [place[name] for name in names]
        self._bins = bins
        self._step, self._image = array("q"), array("q")
        self._quantile, self._loss = array("d"), array("d")

    def add(self, step: int, draws: Iterable[Sequence[float]]) -> None:
        """Add a step's draws (dataset index, quantile, loss), replacing all from that step on."""
        while self._step and self._step[-1] >= step:
            for column in (self._step, self._image, self._quantile, self._loss):
                column.pop()
        for index, quantile, loss in draws:
            if math.isfinite(loss):
                self._step.append(step)
                self._image.append(self._image_of[int(index)])
                self._quantile.append(quantile)
                self._loss.append(loss)

    def curve(self, points: int = 40) -> QuantileCurve:
        """Mean loss by bin in at most `points` intervals of equally many steps."""
        edges = tuple(float(edge) for edge in np.linspace(0, 1, self._bins + 1))
        if not self._step:
            return QuantileCurve(edges, (), ())
        step, first, last = np.array(self._step), self._step[0], self._step[-1]
        length = -(-(last - first + 1) // points)
        stretch = (step - first) // length
        count = int(stretch[-1]) + 1
        cell = stretch * self._bins + self._bin()
        looks = np.bincount(cell, minlength=count * self._bins)
        sums = np.bincount(cell, np.array(self._loss), minlength=count * self._bins)
        means = [float(total / n) if n else None for total, n in zip(sums, looks, strict=True)]
        return QuantileCurve(
            edges,
            tuple(min(first + (index + 1) * length - 1, last) for index in range(count)),
            tuple(tuple(means[row * self._bins : (row + 1) * self._bins]) for row in range(count)),
        )

    def images(self, *, held_out_fall: float | None = None) -> list[ImageLevels]:
        """Each image's record, in the dataset's order.

        Thirds of its draws are compared. An image stands out from `_SURE` standard errors on, of the standard deviation
        of all images, and other differences are significant from `_CLEAR` on, of its own. The standing is the first of
        these that holds:

        - *too few looks*: fewer than `MIN_LOOKS`.
        - *memorised*: its late level is below that of the other images by a factor of `_FAR` (1.5), and fell more than
          theirs, and than that of the held-out images, whose loss late in the run divided by that early is
          `held_out_fall`. Or it fell by that factor more than that of the held-out images, as that of all may.
        - *never fit*: its late level is above that of the others by that factor, and did not fall more. It is harder,
          or the caption does not match.
        - *still learning*: its level fell from the second to the last third of its draws.
        - *learnt*: it fell from the first third to the last, and no longer falls.
        - *unchanged*: none of these; few draws at a low learning rate cannot show a change.
        """
        image = np.array(self._image, dtype=np.int64)
        looks = np.bincount(image, minlength=len(self._images))
        judged = [index for index, count in enumerate(looks) if count >= MIN_LOOKS]
        if not judged:
            return [_unjudged(name, int(count)) for name, count in zip(self._images, looks, strict=True)]
        logs, bins = np.log(np.maximum(np.array(self._loss), _TINY)), self._bin()
        levels = logs - _expected(logs, bins, 1 / looks[image], self._bins)[bins]
        thirds = {index: _Thirds.of(levels[image == index]) for index in judged}
        early, late = (float(np.mean([one[part].mean() for one in thirds.values()])) for part in (0, 2))
        # An image counts in the means, too: that of the others is farther from it by this factor.
        apart = len(judged) / (len(judged) - 1) if len(judged) >= FEW_IMAGES else math.nan
        deviation = math.sqrt(sum(one.squares for one in thirds.values()) / sum(one.freedom for one in thirds.values()))
        held_out = None if held_out_fall is None else math.log(max(held_out_fall, _TINY))
        found = []
        for index, name in enumerate(self._images):
            if (own := thirds.get(index)) is None:
                found.append(_unjudged(name, int(looks[index])))
                continue
            first, last = float(own.first.mean()), float(own.last.mean())
            relative, further = apart * (last - late), apart * (last - first - late + early)
            error = deviation / math.sqrt(len(own.last))
            standing = own.standing
            fell_further = further < -_SURE * math.sqrt(2) * error
            if (
                relative < -math.log(_FAR) - _SURE * error
                and fell_further
                and (held_out is None or last - first < held_out)
            ) or (held_out is not None and last - first < held_out - math.log(_FAR) - _SURE * math.sqrt(2) * error):
                standing = "memorised"
            elif relative > math.log(_FAR) + _SURE * error and not fell_further:
                standing = "never fit"
            levels_of_it = (math.exp(one) for one in (first - early, last - early, relative))
            found.append(ImageLevels(name, int(looks[index]), *levels_of_it, standing))
        return found

    def _bin(self) -> NDArray[np.int64]:
        return np.minimum((np.array(self._quantile) * self._bins).astype(np.int64), self._bins - 1)


_TINY = 1e-12  # keeps logarithms finite


def _expected(logs: Array, bins: NDArray[np.int64], weights: Array, count: int) -> Array:
    """Weighted mean logarithm by bin, (bins,), linearly interpolated in bins without draws."""
    total = np.bincount(bins, weights, minlength=count)
    there = np.flatnonzero(total)
    means = np.bincount(bins, weights * logs, minlength=count)[there] / total[there]
    return np.interp(np.arange(count), there, means)


class _Thirds(NamedTuple):
    """Log levels of an image's draws, in order."""

    first: Array
    middle: Array
    last: Array

    @classmethod
    def of(cls, levels: Array) -> _Thirds:
        third = len(levels) // 3
        return cls(levels[:third], levels[third:-third], levels[-third:])

    @property
    def squares(self) -> float:
        """Sum of squared deviations from the means of the thirds."""
        return float(sum(((one - one.mean()) ** 2).sum() for one in self))

    @property
    def freedom(self) -> int:
        return sum(len(one) - 1 for one in self)

    @property
    def standing(self) -> Standing:
        """That of an image which does not stand out."""
        if _below(self.last, self.middle):
            return "still learning"
        return "learnt" if _below(self.last, self.first) else "unchanged"


def _unjudged(name: str, looks: int) -> ImageLevels:
    return ImageLevels(name, looks, math.nan, math.nan, math.nan, "too few looks")


def _below(values: Array, others: Array) -> bool:
    error = math.hypot(
        values.std(ddof=1) / math.sqrt(len(values)),
        others.std(ddof=1) / math.sqrt(len(others)),
    )
    return bool(others.mean() - values.mean() > _CLEAR * error)
