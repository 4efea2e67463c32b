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
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_DRAWS = 12
"""Draws of an image, four in each third, below which it is not judged."""

FEW_IMAGES = 4
"""Images below which none is compared with the others."""

MOST_DRAWS = 5_000_000
"""Draws that are kept of a run, 24 bytes each; a run of 100,000 steps of 16 images has fewer."""

FAR = 1.5
"""Factor from which a level is far from that of others."""

_CLEAR = 2.0  # standard errors from which a difference is significant
_SURE = 3.0  # those from which an image stands out, as each of many is looked at

Standing = Literal["too few draws", "memorised", "never fit", "still learning", "learnt", "unchanged"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ImageLevels:
    """Training losses of one image, its repeats and mirrored copies included."""

    name: str
    draws: int  # number of its draws
    # Levels in the first and last third of its draws, relative to the median of all images in the first; may be NaN.
    first: float
    last: float
    # Level in the last third, relative to the median of all images; NaN if there are few.
    relative: float
    standing: Standing  # see `Ledger.images`
    stands_out: bool = False  # whether it is memorised or never fit compared with the other images


@dataclass(frozen=True)
class QuantileCurve:
    """Training loss by noise level over time."""

    bins: tuple[float, ...]  # edges in quantiles of diffusion time, one more than bins: 0 is clean, 1 is noise
    steps: tuple[int, ...]  # last step of each averaged interval
    losses: tuple[tuple[float | None, ...], ...]  # mean by interval and bin, None without draws


class Ledger:
    """The draws of a run, of the first `MOST_DRAWS`, by image name."""

    def __init__(self, names: Sequence[str]) -> None:
        self._images = list(dict.fromkeys(names))
        place = {name: index for index, name in enumerate(self._images)}
        self._image_of = [place[name] for name in names]
        self._step, self._image = array("i"), array("i")
        self._quantile, self._loss = array("d"), array("d")

    def add(self, step: int, draws: Iterable[tuple[int, float, float]]) -> None:
        """Add a step's draws (dataset index, quantile, loss), replacing all from that step on; those out of range, as
        in a log of somebody else, are left out.
        """
        while self._step and self._step[-1] >= step:
            for column in (self._step, self._image, self._quantile, self._loss):
                column.pop()
        count = len(self._image_of)
        for index, quantile, loss in draws if len(self._step) < MOST_DRAWS else ():
            if 0 <= index < count and 0 <= quantile <= 1 and math.isfinite(loss):
                self._step.append(step)
                self._image.append(self._image_of[index])
                self._quantile.append(quantile)
                self._loss.append(loss)

    def __bool__(self) -> bool:
        return bool(self._step)

    def curve(self, points: int = 40, *, bins: int = 5) -> QuantileCurve:
        """Mean loss in `bins` equal parts of diffusion time (more lines cannot be distinguished), in at most `points`
        intervals of equally many steps.
        """
        edges = tuple(float(edge) for edge in np.linspace(0, 1, bins + 1))
        if not self._step:
            return QuantileCurve(edges, (), ())
        step, first, last = np.array(self._step), self._step[0], self._step[-1]
        length = -(-(last - first + 1) // points)
        stretch = (step - first) // length
        count = int(stretch[-1]) + 1
        cell = stretch * bins + _bins_of(np.array(self._quantile), bins)
        draws = np.bincount(cell, minlength=count * bins)
        sums = np.bincount(cell, np.array(self._loss), minlength=count * bins)
        means = [float(total / n) if n else None for total, n in zip(sums, draws, strict=True)]
        return QuantileCurve(
            edges,
            tuple(min(first + (index + 1) * length - 1, last) for index in range(count)),
            tuple(tuple(means[row * bins : (row + 1) * bins]) for row in range(count)),
        )

    def images(self, *, without: Container[str] = (), held_out_fall: float | None = None) -> list[ImageLevels]:
        """Each image's record but for those `without`, whose draws do not count, in the dataset's order.

        Thirds of its draws are compared. An image stands out where its level after the first third is far from the
        median, by a factor of `FAR` (1.5), from `_SURE` standard errors on, and in the last third as well; of its own
        standard deviation or that of all images, whichever is greater. Other differences are significant from `_CLEAR`
        standard errors on. The standing is the first of these that holds:

        - *too few draws*: fewer than `MIN_DRAWS`.
        - *memorised*: it is far below, and fell more than the median, and than the held-out images, whose loss late in
          the run divided by that early is `held_out_fall`. Or it fell by `FAR` more than those, as all images may.
        - *never fit*: it is far above, and did not fall more. It is harder, or the caption does not match.
        - *still learning*: its level fell from the second to the last third of its draws.
        - *learnt*: it fell from the first third to the last, and no longer falls.
        - *unchanged*: none of these; few draws at a low learning rate cannot show a change.
        """
        shown = np.array([name not in without for name in self._images], dtype=bool)
        image, quantile, loss = np.array(self._image, dtype=np.int64), np.array(self._quantile), np.array(self._loss)
        if not shown.all():
            counted = shown[image]
            image, quantile, loss = image[counted], quantile[counted], loss[counted]
        draws = np.bincount(image, minlength=len(self._images))
        judged = draws >= MIN_DRAWS
        thirds: dict[int, _Thirds] = {}
        if judged.any():
            logs, bins = np.log(np.maximum(loss, _TINY)), _bins_of(quantile, _TIME_BINS)
            levels = logs - _expected(logs, bins, (judged / np.maximum(draws, 1))[image], _TIME_BINS)[bins]
            few = image.astype(np.uint16) if len(draws) <= 2**16 else image  # of which numpy sorts in linear time
            levels, ends = levels[np.argsort(few, kind="stable")], np.cumsum(draws)  # image by image
            thirds = {
                index: _Thirds.of(levels[ends[index] - draws[index] : ends[index]])
                for index in map(int, np.flatnonzero(judged))
            }
            fall = None if held_out_fall is None else math.log(max(held_out_fall, _TINY))
            usual = _Usual.of(list(thirds.values()), fall)
        return [
            usual.record(name, int(count), thirds[index]) if index in thirds else _unjudged(name, int(count))
            for index, (name, count) in enumerate(zip(self._images, draws, strict=True))
            if shown[index]
        ]


_TINY = 1e-12  # keeps logarithms finite
_TIME_BINS = 10  # equal parts of diffusion time, within which draws are compared


def _bins_of(quantiles: Array, bins: int) -> NDArray[np.int64]:
    return np.minimum((quantiles * bins).astype(np.int64), bins - 1)


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
    def since(self) -> Array:
        """Those after the first third."""
        return np.concatenate([self.middle, self.last])

    @property
    def squares(self) -> float:
        """Sum of squared deviations from the means of the thirds."""
        return float(sum(((third - third.mean()) ** 2).sum() for third in self))

    @property
    def freedom(self) -> int:
        return sum(len(third) - 1 for third in self)

    @property
    def standing(self) -> Standing:
        """That of an image which does not differ from the others."""
        if _below(self.last, self.middle):
            return "still learning"
        return "learnt" if _below(self.last, self.first) else "unchanged"


@dataclass(frozen=True)
class _Usual:
    """What is usual of the judged images, in logarithms."""

    # Medians of their levels in the first third, after it, and in the last, and of the falls of each.
    early: float
    since: float  # NaN for few images
    late: float
    fall: float
    deviation: float  # standard deviation of single draws
    held_out_fall: float | None

    @classmethod
    def of(cls, images: Sequence[_Thirds], held_out_fall: float | None) -> _Usual:
        early, late = (np.array([image[part].mean() for image in images]) for part in (0, 2))
        return cls(
            early=float(np.median(early)),
            since=float(np.median([image.since.mean() for image in images])) if len(images) >= FEW_IMAGES else math.nan,
            late=float(np.median(late)) if len(images) >= FEW_IMAGES else math.nan,
            fall=float(np.median(late - early)),
            deviation=math.sqrt(sum(image.squares for image in images) / sum(image.freedom for image in images)),
            held_out_fall=held_out_fall,
        )

    def record(self, name: str, draws: int, own: _Thirds) -> ImageLevels:
        first, last = float(own.first.mean()), float(own.last.mean())
        fall, relative, since = last - first, last - self.late, float(own.since.mean()) - self.since
        deviation = max(self.deviation, math.sqrt(own.squares / own.freedom))
        margin, error_of_fall = _SURE * deviation / math.sqrt(len(own.since)), deviation * math.sqrt(2 / len(own.last))
        fell_more = fall < self.fall - _CLEAR * error_of_fall
        held_out, far = self.held_out_fall, math.log(FAR)
        is_below = max(since + margin, relative) < -far and fell_more and (held_out is None or fall < held_out)
        is_above = min(since - margin, relative) > far and not fell_more
        standing = own.standing
        if is_below or (held_out is not None and fall < held_out - far - _SURE * error_of_fall):
            standing = "memorised"
        elif is_above:
            standing = "never fit"
        return ImageLevels(
            name,
            draws,
            first=math.exp(first - self.early),
            last=math.exp(last - self.early),
            relative=math.exp(relative),
            standing=standing,
            stands_out=is_below or is_above,
        )


def _unjudged(name: str, draws: int) -> ImageLevels:
    return ImageLevels(name, draws, math.nan, math.nan, math.nan, "too few draws")


def _below(values: Array, others: Array) -> bool:
    error = math.hypot(
        values.std(ddof=1) / math.sqrt(len(values)),
        others.std(ddof=1) / math.sqrt(len(others)),
    )
    return bool(others.mean() - values.mean() > _CLEAR * error)
