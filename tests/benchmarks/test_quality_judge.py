"""The judge of the benchmark: what it was trained on, and what it sees in drawings that it was not trained on."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.identity import CANDIDATES, Identity
from benchmarks.quality.sights import JudgeSight
from benchmarks.quality.subjects import BUILT_IN, DEVELOPMENT, TEST, TEST_STYLES, TRAINED_SETS, Prompt, drawing
from lorasmith.evaluation.judge import tensors
from tools.pretrain.data import UNTAUGHT, Icon
from tools.pretrain.identity_training import is_taught


@pytest.fixture(scope="module")
def judge() -> Identity:
    return Identity.load()


def test_no_subject_is_among_what_the_judge_is_trained_on() -> None:
    assert not any(is_taught(Icon("noto", one, "animals-nature")) for one in (*DEVELOPMENT, *TEST, *UNTAUGHT))
    assert is_taught(Icon("noto", "dog face", "animals-nature"))


def test_prototypes_are_of_what_the_held_out_designers_draw(judge: Identity) -> None:
    expected = judge.prototype(tensors(BUILT_IN["wolf"].held_out))
    torch.testing.assert_close(judge.prototypes[CANDIDATES.index("wolf")], expected, atol=2e-3, rtol=0)


def test_subjects_and_styles_that_it_was_not_trained_on_are_recognised(judge: Identity) -> None:
    drawn = [(one, TRAINED_SETS[place % 4]) for place, one in enumerate(TEST)]
    pictures = [drawing(one, icon_set, "blue") for one, icon_set in drawn]
    right = [seen == one for seen, (one, _) in zip(judge.subjects(pictures), drawn, strict=True)]
    assert sum(right) / len(right) > 0.7
    styled = [(one, icon_set) for one in TEST[::3] for icon_set in TRAINED_SETS]
    styles = judge.styles([drawing(*one, "blue") for one in styled])
    assert sum(seen == one for seen, (_, one) in zip(styles, styled, strict=True)) / len(styled) > 0.6


def test_the_sight_sees_the_subject_the_wish_and_what_is_left_of_the_class(judge: Identity) -> None:
    sight, task = JudgeSight(judge), BUILT_IN["wolf"]
    subject, other = task.training[4], BUILT_IN["tractor"].training[4]
    assert sight.fidelity(task, subject) > 0.5 > 0.1 > sight.fidelity(task, other)
    on_blue = drawing("wolf", "noto", "blue")
    assert sight.shows(Prompt("sks dog, on a blue background", "", background="blue"), on_blue)
    assert not sight.shows(Prompt("sks dog, on a green background", "", background="green"), on_blue)
    blue, green = (Prompt("", "", background=one) for one in ("blue", "green"))
    assert sight.adherence([blue, green], [on_blue] * 2) == 0.5
    assert sight.bleed(task, [], [on_blue]) == 1.0
    for style, icon_set in TEST_STYLES.items():
        drawn, others = ([drawing(one, which, "white") for one in TEST] for which in (icon_set, "noto"))
        assert sight.fidelity(BUILT_IN[style], drawn) > 1.5 * sight.fidelity(BUILT_IN[style], others)
