"""Which layers rules choose, and with what settings."""

from __future__ import annotations

import pytest
from test_inject import Block
from torch import nn

from lorasmith.adapters.inject import Rule, plan_adapters
from lorasmith.core.errors import OptionError


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"first": Block(), "second": Block()}).requires_grad_(False)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule(("*",)), ["first.to_q", "first.conv", "first.out.0", "second.to_q", "second.conv", "second.out.0"]),
        (Rule(("*",), linear_only=True), ["first.to_q", "first.out.0", "second.to_q", "second.out.0"]),
        (Rule(("*.to_q", "first.conv")), ["first.to_q", "first.conv", "second.to_q"]),
        (Rule(("*",), ("first.*", "*.out.?")), ["second.to_q", "second.conv"]),
        (Rule(("f*0",)), ["first.out.0"]),  # a star crosses dots
    ],
)
def test_patterns_choose_whole_paths(model: nn.Module, rule: Rule, expected: list[str]) -> None:
    assert [one.path for one in plan_adapters(model, [rule], rank=4).adapters] == expected


@pytest.mark.parametrize("include", [("to_q",), ("*.TO_Q",), (), ("*.norm",), ("*.circular",)])
def test_a_rule_that_matches_no_layer_is_refused(model: nn.Module, include: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as caught:
        plan_adapters(model, [Rule(("*",)), Rule(include)], rank=4)

    assert str(caught.value) == (
        f"targets must match at least one Linear or convolution, but {', '.join(include) or 'nothing'} matches none"
    )


def test_a_rule_whose_layers_are_all_excluded_is_refused(model: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"but \*\.conv matches none$"):
        plan_adapters(model, [Rule(("*.to_q",)), Rule(("*.conv",))], exclude=[Rule(("*.c*",))], rank=4)


def test_later_rules_refine_earlier_ones(model: nn.Module) -> None:
    rules = [
        Rule(("*",), rank=2, learning_rate=1e-3),
        Rule(("first.*",), rank=3, alpha=1.5),
        Rule(("*.to_q",), alpha=0.5),
    ]
    plan = {one.path: (one.rank, one.alpha, one.learning_rate) for one in plan_adapters(model, rules, rank=1).adapters}

    assert plan["second.conv"] == (2, None, 1e-3)
    assert plan["first.conv"] == (3, 1.5, 1e-3)
    assert plan["first.to_q"] == (3, 0.5, 1e-3)
    assert plan["second.to_q"] == (2, 0.5, 1e-3)


def test_exclusions_win_and_those_that_leave_nothing_out_are_named(model: nn.Module) -> None:
    exclude = [Rule(("*.out.*",), name="*.out.*"), Rule(("*.ff.*",), name="*.ff.*"), Rule(("third.*",), name="third.*")]
    plan = plan_adapters(model, [Rule(("*",), linear_only=True)], exclude=exclude, rank=4)

    assert [one.path for one in plan.adapters] == ["first.to_q", "second.to_q"]
    assert plan.idle == ("*.ff.*", "third.*")


def test_the_rank_is_capped_at_the_smaller_side(model: nn.Module) -> None:
    plan = plan_adapters(model, [Rule(("first.*",))], rank=16)

    assert {one.path: one.rank for one in plan.adapters} == {"first.to_q": 8, "first.conv": 6, "first.out.0": 2}
    assert all(one.asked == 16 for one in plan.adapters)
    assert len(plan.capped) == 3
    assert plan_adapters(model, [Rule(("first.*",))], rank=2).capped == ()
    factors = plan_adapters(model, [Rule(("*",))], rank=16, capped=False)  # or block sizes
    assert {one.rank for one in factors.adapters} == {16}
