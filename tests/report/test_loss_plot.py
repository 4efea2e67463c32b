from __future__ import annotations

import io
import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from lorasmith.core.errors import OutputError
from lorasmith.report.loss_plot import RecentLosses, plot_losses, recent_loss, smoothed

pytestmark = pytest.mark.usefixtures("figures_drawn")

NAN, INF = math.nan, math.inf


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch):
    """Plots and returns the axes that were drawn, with the texts on them."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def remembered(figure: Figure, *args, **kwargs) -> None:
        figures.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remembered)

    def plot(losses, **options):
        plot_losses(losses, **options)
        return figures[-1].axes[0]

    return plot


@pytest.mark.slow_after(2)
@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ([NAN, INF, 0.2, -INF], {"metadata": {"workflow": '"ü 猫"'}}),
        ([0.3], {"validations": [(1, NAN), (2, INF)], "base_loss": NAN}),
        ([0.0] * 16, {"base_loss": 0.5}),
        ([1e-9, 1e9, -1.0], {"validations": [(0, 0.3)]}),
    ],
)
def test_draws_whatever_comes(losses: list[float], options: dict[str, Any]) -> None:
    image = Image.open(io.BytesIO(plot_losses(losses, **options)))
    assert (image.format, image.size) == ("PNG", (1080, 600))
    assert options.get("metadata", {}).items() <= image.text.items()


@pytest.mark.parametrize("losses", [[], [NAN, INF]])
def test_nothing_to_plot(losses: list[float]) -> None:
    with pytest.raises(OutputError, match=f"^a loss plot needs a finite loss, got none among {len(losses)}; train at"):
        plot_losses(losses)


def test_what_is_on_it(axes) -> None:
    before = dict(plt.rcParams)
    drawn = axes([0.5, 0.4, 0.3])
    raw = drawn.lines[0]
    assert raw.get_xdata().tolist() == [1, 2, 3] and raw.get_ydata().tolist() == [0.5, 0.4, 0.3]
    assert (drawn.get_xlabel(), drawn.get_ylabel(), drawn.get_title("left")) == ("step", "loss", "Training loss")
    assert [text.get_text() for text in drawn.texts] == ["0.4"]
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["each step", "mean of 3 steps"]
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before, "no global state is left"


@pytest.mark.parametrize(
    ("losses", "mean", "steps"),
    [
        ([0.5], 0.5, 1),
        ([1.0, NAN, 3.0], 2.0, 2),
        ([9.0] * 90 + [1.0] * 10, 1.0, 10),
        ([9.0] * 270 + [1.0] * 30, 1.0, 30),
    ],
)
def test_one_number_is_the_training_loss(axes, losses: list[float], mean: float, steps: int) -> None:
    recent = recent_loss(losses)
    assert (recent.mean, recent.steps) == (mean, steps)
    assert (f"the last {steps} steps" in recent.label) == (steps > 1)
    assert axes(losses).texts[0].get_text() == f"{mean:.4g}", "the end of the line in the chart is the same number"


def test_gaps_stay_open_in_the_raw_line_and_lonely_steps_are_dots(axes) -> None:
    losses = [1.0, 1.0, NAN, 2.0, INF] + [1.0] * 100
    raw, dots, trend = axes(losses).lines[:3]
    assert np.isnan(raw.get_ydata()).nonzero()[0].tolist() == [2, 4]
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([4], [2.0])
    assert np.isfinite(trend.get_ydata()).all() and len(trend.get_xdata()) == 103


@pytest.mark.slow
def test_axis_is_logarithmic_only_over_orders_of_magnitude(axes) -> None:
    falling = np.exp(-np.arange(200) / 20)
    assert axes(falling.tolist()).get_yscale() == "log"
    assert axes((falling + 0.2).tolist()).get_yscale() == "linear"
    assert axes((falling - 0.001).tolist()).get_yscale() == "linear", "a logarithm has no place for a negative loss"


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(1, 50))
def test_smoothing_is_the_weighted_mean(losses: list[float], span: float) -> None:
    result = smoothed(losses, span=span)
    weights = (1 - 1 / span) ** np.arange(len(losses))[::-1]
    assert result[-1] == pytest.approx(np.average(losses, weights=weights), abs=1e-9)
    assert result[0] == losses[0]
    assert all(min(losses) - 1e-9 <= value <= max(losses) + 1e-9 for value in result)


def test_held_out_losses_are_drawn_with_the_best_of_them(axes) -> None:
    drawn = axes([0.5] * 9, validations=[(3, 0.45), (6, 0.4), (9, 0.42), (12, NAN)], base_loss=0.6)
    by_label = {line.get_label(): line for line in drawn.lines}
    assert by_label["held out"].get_xdata().tolist() == [3, 6, 9]
    assert set(by_label["held out, without the LoRA"].get_ydata()) == {0.6}
    [star] = [line for line in drawn.lines if line.get_marker() == "*"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([6], [0.4])
    assert [text.get_text() for text in drawn.texts] == ["0.5", "0.4"]


def test_losses_that_come_in_one_by_one_have_the_same_mean() -> None:
    losses = [1e300, math.nan, *(1 / number for number in range(1, 300)), math.inf, -1e-300]
    coming = RecentLosses()
    for count, loss in enumerate(losses, 1):
        coming.add(count, loss)
        assert coming.recent == recent_loss(losses[:count])
    assert math.isnan(RecentLosses().recent.mean)
