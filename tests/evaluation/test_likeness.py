"""Features of pictures and measures by them."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lorasmith.core.errors import OptionError
from lorasmith.evaluation import likeness, measures


def noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_features_are_of_length_one_and_of_a_picture_alone() -> None:
    pictures = [noise(1), Image.new("L", (10, 300), 90), noise(2).convert("RGBA"), noise(1)]
    found = likeness.features(pictures)
    assert found.shape == (4, 1280)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(found[0], found[3])
    torch.testing.assert_close(likeness.features(pictures[1:2])[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_network_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    likeness._network.cache_clear()
    with pytest.raises(OptionError, match=r'pip install "lorasmith\[likeness\]"'):
        likeness.features([noise(1)])
    likeness._network.cache_clear()


def test_measures_are_those_of_loops() -> None:
    drawn, others = (torch.nn.functional.normalize(torch.randn(count, 8), dim=1) for count in (5, 3))
    cosines = [[float(one @ other) for other in others] for one in drawn]
    assert measures.likeness(drawn, others) == pytest.approx(np.mean(cosines), abs=1e-6)
    assert measures.nearest(drawn, others) == pytest.approx(np.mean([max(row) for row in cosines]), abs=1e-6)
    pairs = [float(drawn[one] @ drawn[other]) for one in range(5) for other in range(one)]
    assert measures.self_likeness(drawn) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert measures.diversity(drawn) == pytest.approx(1 - np.mean(pairs), abs=1e-6)
    assert measures.drift(drawn, drawn) == pytest.approx(0, abs=1e-6)
    assert measures.diversity(drawn[:1]) is None


def test_adherence_is_how_surely_wishes_are_recognised() -> None:
    """Against a loop: features and colours count alike, and the base model's own certainty is 1."""
    drawn, base = ([torch.randn(4, width) for width in (8, 3)] for _ in range(2))

    def certainty(side: list[Tensor]) -> float:
        sure = []
        for wish in range(4):
            alike = [0.0] * 4
            for one, other in zip(side, base, strict=True):
                for place in range(4):
                    changes = one[wish] - one.mean(0), other[place] - other.mean(0)
                    alike[place] += float(torch.cosine_similarity(*changes, dim=0)) / 2
            sure.append(math.exp(5 * alike[wish]) / sum(math.exp(5 * one) for one in alike))
        return sum(sure) / 4 - 1 / 4

    expected = min(1.0, max(0.0, certainty(drawn) / certainty(base)))
    assert measures.adherence(drawn, base) == pytest.approx(expected, abs=1e-5)
    assert measures.adherence(base, base) == pytest.approx(1.0)
    assert measures.adherence([one[:1] for one in base], [one[:1] for one in base]) is None


def test_what_is_learnt_is_a_share_of_the_way_to_the_training_pictures() -> None:
    assert measures.learnt(0.5, 0.4, 0.6) == pytest.approx(0.5)
    assert (measures.learnt(0.3, 0.4, 0.6), measures.learnt(0.9, 0.4, None)) == (0.0, pytest.approx(5 / 6))
