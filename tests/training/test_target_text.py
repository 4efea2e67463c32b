"""What people write to choose layers."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.adapters.inject import AdapterPlan, Rule
from lorasmith.core.errors import OptionError
from lorasmith.families.model import Model
from lorasmith.training.config import TrainConfig
from lorasmith.training.job import parse_targets, resolve_targets
from lorasmith.training.trainable import trainable

PRESETS = {"attention": Rule(("*.to_*",)), "linear": Rule(("*",), ("*.x",), linear_only=True)}
ATTENTION = Rule(("*.to_*",), name="attention")


@pytest.mark.parametrize("text", ["*," * 501, "[" * 9000, "!" + "*a" * 400])
def test_what_would_take_long_to_match_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"^targets must be at most 500 entries of 500 characters, got"):
        parse_targets(text, PRESETS)


@pytest.mark.parametrize(
    ("text", "rules", "exclusions"),
    [
        ("attention", [ATTENTION], []),
        ("Attention", [Rule(("*.to_*",), name="Attention")], []),
        ("linear rank=8", [Rule(("*",), ("*.x",), linear_only=True, rank=8, name="linear")], []),
        ("*.a,*.b", [Rule(("*.a",), name="*.a"), Rule(("*.b",), name="*.b")], []),
        ("*.a ; *.b\n*.c", [Rule((f"*.{c}",), name=f"*.{c}") for c in "abc"], []),
        ("*.a rank=32 alpha=16 lr=2e-4", [Rule(("*.a",), (), False, 32, 16.0, 2e-4, "*.a")], []),
        ("attention, !*.b", [ATTENTION], [Rule(("*.b",), name="*.b")]),
        ("!*.b", [Rule(("*",), name="*")], [Rule(("*.b",), name="*.b")]),
        ("!attention,", [Rule(("*",), name="*")], [ATTENTION]),
    ],
)
def test_text_becomes_rules(text: str, rules: list[Rule], exclusions: list[Rule]) -> None:
    assert parse_targets(text, PRESETS) == (rules, exclusions)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("*.a rank=0", "rank must be between 1 and 128, got 0"),
        ("*.a rank=8.5", "rank must be an integer, got 8.5"),
        ("*.a rank=big", "rank must be an integer, got 'big'"),
        ("*.a lr=2", "learning_rate must be between 1e-07 and 1.0, got 2.0"),
        ("*.a alpha=-1", "alpha must be between 0.0 and 100000.0, got -1.0"),
        ("*.a alpha=nan", "alpha must be a number, got nan"),
        (
            "*.a ranks=8",
            "settings of targets must be rank=..., alpha=..., lr=..., got 'ranks=8' (did you mean 'rank'?)",
        ),
        ("*.a *.b", "settings of targets must be rank=..., alpha=..., lr=..., got '*.b'"),
        ("*.a rank 8", "settings of targets must be rank=..., alpha=..., lr=..., got 'rank'"),
        ("rank=8, *.a", "settings of targets must follow a preset or pattern, got 'rank=8' alone"),
        ("*.a, !*.b rank=8", "an exclusion takes no settings, got '!*.b rank=8'"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_targets(text, PRESETS)
    assert str(caught.value).startswith(sentence)


@given(st.text(alphabet=st.sampled_from("ab.*!=,; \n1e-"), max_size=30))
def test_any_text_gives_rules_or_a_sentence(text: str) -> None:
    try:
        rules, exclusions = parse_targets(text, PRESETS)
    except OptionError as error:
        assert "\n" not in str(error).replace(repr(text), "")
    else:
        assert rules
        assert all(rule.include for rule in (*rules, *exclusions))


def paths(plan: AdapterPlan) -> set[str]:
    return {one.path for one in plan.adapters}


def test_presets_grow(tiny: Model) -> None:
    names = ["attention", "attention+ff", "transformer", "all"]
    chosen = [paths(resolve_targets(trainable(tiny), TrainConfig(targets=name))) for name in names]
    linear = paths(resolve_targets(trainable(tiny), TrainConfig(targets="all-linear")))

    assert all(one < other for one, other in itertools.pairwise(chosen))
    assert chosen[0] < linear < chosen[-1]
    assert not any("conv" in path for path in linear)


def test_commas_choose_what_they_chose_before(tiny: Model) -> None:
    chosen = paths(resolve_targets(trainable(tiny), TrainConfig(targets="*.attn2.*, !*.to_out.0")))
    assert chosen
    assert all(".attn2." in path and not path.endswith("to_out.0") for path in chosen)


def test_ranks_are_capped_where_they_are_ranks(tiny: Model) -> None:
    config = {"targets": "conv_out, *.attn2.to_q rank=64"}
    low_rank = resolve_targets(trainable(tiny), TrainConfig(**config))
    factors = resolve_targets(trainable(tiny), TrainConfig(**config, algorithm="LoKr"))

    assert {one.path: one.rank for one in low_rank.adapters}["conv_out"] == 4
    assert {one.rank for one in factors.adapters} == {16, 64}


def test_a_preset_that_is_nearly_right_is_suggested(tiny: Model) -> None:
    with pytest.raises(OptionError) as caught:
        resolve_targets(trainable(tiny), TrainConfig(targets="all-linear, attenton"))
    assert str(caught.value) == (
        "targets must match at least one Linear or convolution, but attenton matches none (did you mean 'attention'?); "
        "use one of attention, attention+ff, transformer, all-linear, all, or patterns such as *.attn2.*"
    )
