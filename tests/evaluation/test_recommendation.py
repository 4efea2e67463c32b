"""Which LoRA is recommended, and when none is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorasmith.evaluation.evaluation_record import Measures, Training
from lorasmith.evaluation.recognition import WishScores
from lorasmith.evaluation.verdict import Drawn, measured, scores, training_facts, verdict

TRAINING = Training(count=4, self_likeness=0.7, base_likeness=0.4)


def found(likeness: float = 0.6, follows: float | None = 0.5, change: float = 0.2, copies: float = -0.1) -> Measures:
    return Measures(
        likeness=likeness,
        adherence=follows,
        diversity=0.2,
        memorisation=copies,
        drift=0.1,
        bleed=0.1,
        change=change,
    )


def rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


def drawn(seed: int, wishes: int = 5) -> Drawn:
    return Drawn(
        plain=rows(2, seed),
        wishes=WishScores(
            features=rows(2 * wishes, seed + 1).unflatten(0, (2, wishes)),
            colours=rows(2 * wishes, seed + 4).unflatten(0, (2, wishes)),
            followed=None,
        ),
        others=rows(3, seed + 2),
        of_class=rows(1, seed + 3),
    )


numbers = st.floats(0, 1)
several = st.lists(st.builds(found, numbers, numbers, st.floats(0.01, 1)), min_size=1, max_size=8)


@given(several)
def test_what_is_recommended_has_the_highest_score(loras: list[Measures]) -> None:
    chosen = verdict(loras, TRAINING)
    if chosen.outcome == "use":
        assert chosen.best is not None
        values = scores(loras, TRAINING)
        assert values[chosen.best] == max(values)
        if chosen.ignored_from is not None:
            assert chosen.ignored_from > chosen.best
            after = [one.adherence or 0 for one in loras[chosen.ignored_from :]]
            assert max(after) < (loras[chosen.best].adherence or 0)
    else:
        assert chosen.best is None


@given(several)
def test_the_score_is_likeness_times_adherence(loras: list[Measures]) -> None:
    learnt = [min(1.0, max(0.0, ((one.likeness or 0) - 0.4) / 0.3)) for one in loras]
    assert scores(loras, TRAINING) == pytest.approx(
        [share * (one.adherence or 0) for share, one in zip(learnt, loras, strict=True)]
    )
    blind = [replace(one, adherence=None) for one in loras]
    assert scores(blind, TRAINING) == pytest.approx(learnt), "likeness alone where adherence is unknown"


@given(several)
def test_the_order_decides_nothing_but_ties(loras: list[Measures]) -> None:
    there, back = verdict(loras, TRAINING), verdict(loras[::-1], TRAINING)
    assert there.outcome == back.outcome
    if there.best is not None and back.best is not None:
        values = scores(loras, TRAINING)
        assert values[there.best] == pytest.approx(values[::-1][back.best])


def test_why_none_is_recommended() -> None:
    good = [found()]
    assert verdict(good, TRAINING).outcome == "use"
    assert verdict([found(change=0.0)], TRAINING).outcome == "changes nothing"
    assert verdict([found(likeness=0.41)], TRAINING).outcome == "nothing learnt", "as alike as the base model's"
    assert verdict([found(likeness=0.2)], TRAINING).outcome == "nothing learnt", "nothing is alike"
    assert verdict([found(follows=0.0)], TRAINING).outcome == "ignores prompts"
    assert verdict([found(likeness=0.0), found(follows=0.0)], TRAINING).outcome == "ignores prompts"
    assert verdict(good, replace(TRAINING, self_likeness=0.3)).outcome == "not comparable"
    assert verdict(good, Training(count=1, self_likeness=None, base_likeness=0.4)).outcome == "not comparable"
    assert verdict(good, Training(count=0, self_likeness=None, base_likeness=None)).outcome == "no pictures"


def test_from_where_on_prompts_are_ignored() -> None:
    chosen = verdict([found(0.65, 0.6), found(0.66, 0.2), found(0.66, 0.5), found(0.66, 0.1)], TRAINING)
    assert (chosen.best, chosen.ignored_from) == (0, 3), "not where a later one follows them again"
    assert verdict([found(0.65, 0.6), found(0.7, 0.5)], TRAINING).ignored_from is None
    assert not verdict([found()], TRAINING).copied
    assert verdict([found(copies=0.2)], TRAINING).copied


@given(st.integers(0, 1000))
def test_the_base_model_itself_follows_prompts_and_changes_nothing(seed: int) -> None:
    base, pictures = drawn(seed), rows(4, seed + 9)
    same = measured(base, base, pictures)
    assert same.change == pytest.approx(0, abs=1e-6) and same.drift == pytest.approx(0, abs=1e-6)
    assert same.likeness == pytest.approx(training_facts(pictures, base).base_likeness)
    other = measured(drawn(seed + 500), base, pictures)
    assert same.adherence is not None and other.adherence is not None
    assert same.adherence >= other.adherence


def adherence(drawn: Drawn, base: Drawn) -> float | None:
    return measured(drawn, base, None).adherence


def test_a_lora_that_ignores_wishes_has_no_adherence() -> None:
    base = drawn(3)
    assert adherence(base, base) == pytest.approx(1)
    stuck = WishScores(base.plain[:, None].repeat(1, 5, 1), base.wishes.colours[:, :1].repeat(1, 5, 1), None)
    assert stuck.adherence(base.wishes) == pytest.approx(0, abs=1e-3)
    others = WishScores(base.wishes.features.roll(1, 1), base.wishes.colours.roll(1, 1), None)
    assert others.adherence(base.wishes) == pytest.approx(0, abs=1e-3), "it draws other wishes than it is asked for"
    assert adherence(drawn(3, wishes=1), drawn(3, wishes=1)) is None, "one wish cannot be told from another"


def test_wishes_count_that_the_base_model_fulfils() -> None:
    asked = drawn(3).wishes
    sure = torch.tensor([[0.9, 0.6, 0.4, 0.1, 0.0], [0.1, 0.5, 0.2, 0.0, 0.3]])
    base = replace(asked, followed=sure)
    found = replace(asked, followed=1 - sure)
    assert found.adherence(base) == pytest.approx((0.1 + 0.4 + 0.5) / 3)
    assert found.adherence(replace(asked, followed=0 * sure)) is None, "the base model fulfils none"


def test_what_is_not_known_is_left_out() -> None:
    base = replace(drawn(1), others=rows(0, 0), of_class=rows(0, 0))
    left = measured(drawn(2), base, None)
    assert (left.likeness, left.memorisation, left.drift, left.bleed) == (None, None, None, None)
    assert measured(drawn(2), base, rows(1, 5)).memorisation is None
    assert training_facts(None, base).count == 0
