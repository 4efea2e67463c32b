"""The curves of a run's report as inline SVG, with colours from the page and deterministic output.

Each figure is drawn twice, for wide and for narrow screens, as the text size of one does not fit the other; the page's
style shows one of them.
"""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorasmith.report.loss_plot import GRID, HELD_OUT, RAW, SMOOTH, TEXT, draw_losses, smoothed, style_axes
from lorasmith.report.markup import Html, tag

_FAULT = "#b4232f"
_FEW = 20  # maximum number of points drawn as dots
_VARIABLES = {
    RAW: "--raw",
    SMOOTH: "--smooth",
    HELD_OUT: "--held-out",
    GRID: "--grid",
    TEXT: "--faint",
    _FAULT: "--bad",
}
_RAMP = ("#3b82c4", "#1a9e8f", "#7a9a1f", "#d08a1d", "#d0524a")  # clean to noisy; readable on white and on black
_DISTINCT = (*_RAMP, "#9467bd", "#8c6d4f", "#d1689e")


@dataclass(frozen=True)
class Curves:
    """Measurements of a run's steps."""

    losses: Sequence[float]  # of every step, or of each `every` steps the last; NaN if unknown
    rates: Sequence[float] = ()  # as `losses`
    validations: Sequence[tuple[int, float]] = ()  # step and loss
    base_loss: float | None = None  # of the held-out images without the LoRA
    faults: Sequence[int] = ()  # steps that diverged and were rolled back
    likenesses: Sequence[tuple[int, float, float | None]] = ()  # step, of previews to the images, prompts followed
    own_likeness: float | None = None  # of the images to one another
    every: int = 1

    @property
    def rate_varies(self) -> bool:
        return len({rate for rate in self.rates if math.isfinite(rate)}) > 1


class QuantileLosses(Protocol):
    """Training loss by noise level over time.

    `bins` are edges in quantiles of the noise level, 0 for clean to 1 for noise, one more than there are bins. `losses`
    has the mean of each averaged interval and bin, None without draws; `steps` has a step of each interval.
    """

    @property
    def bins(self) -> Sequence[float]: ...
    @property
    def steps(self) -> Sequence[int]: ...
    @property
    def losses(self) -> Sequence[Sequence[float | None]]: ...


def loss_figure(curves: Curves, *, label: str) -> Html:
    """Loss over the steps, with validations and rollbacks, and the learning rate below if it is not constant.

    At least one loss must be finite. `label` is the text alternative.
    """

    def draw(figure: Any) -> None:
        if curves.rate_varies:
            top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
            _draw_rates(bottom, curves.rates, curves.every)
        else:
            top = bottom = figure.add_subplot()
        draw_losses(top, curves.losses, every=curves.every, validations=curves.validations, base_loss=curves.base_loss)
        for index, step in enumerate(curves.faults):
            text = None if index else "diverged, rolled back"
            top.axvline(step, color=_FAULT, linewidth=1.2, linestyle=(0, (1, 2)), label=text, zorder=3)
        style_axes(top)
        bottom.set_xlabel("step", color=TEXT)
        _legend(top)

    return _figure("loss", draw, label=label, shows=curves)


def quantile_figure(curve: QuantileLosses) -> Html:
    """Smoothed training loss of each range of noise levels."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("noise", _RAMP)
    bins = list(zip(curve.bins, curve.bins[1:], strict=False))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        drawn: list[float] = []
        for index, (low, high) in enumerate(bins):
            column = [row[index] for row in curve.losses]
            known = [(step, loss) for step, loss in zip(curve.steps, column, strict=True) if loss is not None]
            if known:
                trend = smoothed([loss for _, loss in known], span=3)
                drawn += trend
                colour = to_hex(ramp(index / max(1, len(bins) - 1)))
                steps = [step for step, _ in known]
                look = ".-" if len(steps) < _FEW else "-"
                axes.plot(steps, trend, look, color=colour, linewidth=1.8, label=f"{low * 100:.0f}–{high * 100:.0f} %")
        style_axes(axes)
        if min(drawn) > 0:  # losses at the clean end are often a hundred times those at the noisy end
            axes.set_yscale("log")
            _plain_ticks(axes)
        axes.set_xlabel("step", color=TEXT)
        _legend(axes)

    label = "Training loss over the steps, for each range of noise levels"
    return _figure("quantiles", draw, label=label, shows=curve)


def comparison_figure(curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], *, label: str) -> Html:
    """Held-out losses of several runs, in percent of the base model's.

    `curves` has name, and step and value of each validation, the best run first; only the first eight have a colour and
    a name.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for index, (name, points) in enumerate(curves):
            steps, values = zip(*points, strict=True)
            look: dict[str, Any] = {"color": RAW, "linewidth": 0.9}
            if index < len(_DISTINCT):
                look = {"color": _DISTINCT[index], "linewidth": 1.8, "marker": "."}
            text = name if index < len(_DISTINCT) else "others" if index == len(_DISTINCT) else None
            axes.plot(steps, values, **look, label=text, zorder=3 - index / len(curves))  # the best is on top
        axes.axhline(0, color=HELD_OUT, linewidth=1.1, linestyle=(0, (4, 3)), label="without a LoRA")
        style_axes(axes)
        axes.set_ylabel("change of the held-out loss, %", color=TEXT)
        axes.set_xlabel("step", color=TEXT)
        longest = max(len(name) for name, _ in curves[: len(_DISTINCT)])
        _legend(axes, columns=max(1, int(11 * figure.get_figwidth() / (longest + 5))))

    return _figure("comparison", draw, label=label, shows=curves)


def measure_figure(
    steps: Sequence[int],
    lines: Sequence[tuple[str, Sequence[float | None]]],
    *,
    levels: Sequence[tuple[str, float]] = (),
    best: int | None = None,
    label: str,
) -> Html:
    """Measures from 0 to 1 over the steps, by name; `levels` are horizontal lines, `best` is the recommended step."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for (name, values), colour in zip(lines, (SMOOTH, HELD_OUT), strict=False):
            known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            if known:
                axes.plot(*zip(*known, strict=True), color=colour, linewidth=1.8, marker=".", label=name)
        for (name, level), look in zip(levels, ((0, (4, 3)), (0, (1, 2))), strict=False):
            axes.axhline(level, color=RAW, linewidth=1.2, linestyle=look, label=name)
        if best is not None:
            axes.axvline(best, color=TEXT, linewidth=1.2, label="recommended", zorder=1)
        style_axes(axes)
        axes.set_ylabel("")
        axes.set_ylim(bottom=min(0.0, *(level for _, level in levels)) if levels else 0.0)
        axes.set_xlabel("step", color=TEXT)
        _legend(axes, columns=3 if figure.get_figwidth() > 6 else 1)

    return _figure("measures", draw, label=label, shows=(steps, lines, levels, best))


def _draw_rates(axes: Any, rates: Sequence[float], every: int) -> None:
    axes.plot(range(every, every * len(rates) + 1, every), rates, color=TEXT, linewidth=1.4)
    axes.set_ylim(bottom=0)
    style_axes(axes)
    axes.set_ylabel("rate", color=TEXT)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.yaxis.get_offset_text().set_color(TEXT)


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Any, columns: int | None = None) -> None:
    columns = columns or (5 if axes.figure.get_figwidth() > 6 else 2)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0}
    axes.legend(ncols=columns, fontsize=9, frameon=False, labelcolor=TEXT, **place)


_MOST_KEPT = 16
_kept: dict[bytes, Html] = {}


def _figure(name: str, draw: Callable[[Any], None], *, label: str, shows: object) -> Html:
    """A figure, which takes a quarter of a second: it is kept until what it shows has changed."""
    key = hashlib.sha256(pickle.dumps((name, label, shows))).digest()
    if (figure := _kept.get(key)) is None:
        shapes = {"wide": (9.0, 4.4), "narrow": (4.6, 4.4)}
        drawn = [tag("div", _svg(draw, f"{name}-{kind}", size, label), class_=kind) for kind, size in shapes.items()]
        figure = _kept[key] = tag("div", drawn)
        for old in list(_kept)[:-_MOST_KEPT]:
            _kept.pop(old, None)
    return figure


def _svg(draw: Callable[[Any], None], prefix: str, size: tuple[float, float], label: str) -> Html:
    """An `svg` element whose ids start with `prefix`, so that one page can have several."""
    # The object API, without pyplot: no global state, so that a server's threads can draw at the same time.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.05))
    draw(figure)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", buffer.getvalue(), flags=re.DOTALL)
    opening = re.search(r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", drawn)
    assert opening is not None
    body = _renamed(drawn[opening.end() : drawn.rindex("</svg>")], prefix)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    return tag("svg", Html(re.sub(r"\n\s*", "\n", body)), viewBox=opening[1], role="img", aria_label=label)


def _renamed(svg: str, prefix: str) -> str:
    """Replace ids by numbered ones: matplotlib's are random, or equal in every figure."""
    used = dict.fromkeys(re.findall(r"(?:href=\"|url\()#([^\")]+)", svg))
    names = {old: f"{prefix}-{number}" for number, old in enumerate(used)}
    svg = re.sub(r" id=\"([^\"]*)\"", lambda match: f' id="{names[match[1]]}"' if match[1] in names else "", svg)
    return re.sub(r"(href=\"|url\()#([^\")]+)", lambda match: f"{match[1]}#{names[match[2]]}", svg)
