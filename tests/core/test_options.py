"""Options: what they accept, what they make of it, and the sentences for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.core.options import Option, check_options, config_from, option, options_of


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = option(500, min=1, max=1000, step=10, help="Number of updates.", group="Length")
    rate: float = option(1e-4, min=0.0, help="Learning rate.")
    seed: int = option(0, min=0, max=2**64 - 1, help="Seed.")
    optimizer: str = option("AdamW", choices=("AdamW", "Adam", "SGD"), help="Optimizer.")
    trigger: str = option("", help="Trigger word.")
    quiet: bool = option(False, help="No output.")
    alpha: float | None = option(None, min=0.0, help="Scale.")
    undeclared: int = 7

    def __post_init__(self) -> None:
        check_options(self)


def test_a_declaration_carries_name_type_default_and_bounds() -> None:
    declared = options_of(Settings)

    assert list(declared) == ["steps", "rate", "seed", "optimizer", "trigger", "quiet", "alpha"]
    assert declared["steps"] == Option(
        name="steps", type=int, default=500, help="Number of updates.", min=1, max=1000, step=10, group="Length"
    )
    assert declared["alpha"].type is float
    assert declared["optimizer"].choices == ("AdamW", "Adam", "SGD")


def test_what_fits_comes_back_in_the_options_own_type() -> None:
    for name, value, expected in [
        ("steps", 1, 1),
        ("steps", 1000, 1000),
        ("steps", 15, 15),  # between steps
        ("steps", 20.0, 20),
        ("rate", 1, 1.0),
        ("rate", 0, 0.0),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("optimizer", "adamw", "AdamW"),
        ("optimizer", "SGD", "SGD"),
        ("quiet", True, True),
        ("alpha", None, None),
        ("alpha", 3, 3.0),
        ("alpha", np.float32(0.5), 0.5),
        ("steps", np.int64(15), 15),
    ]:
        settings = Settings(**{name: value})

        assert getattr(settings, name) == expected
        assert type(getattr(settings, name)) is type(expected)


def test_what_does_not_fit_is_refused_with_rule_and_value() -> None:
    for name, value, sentence in [
        ("steps", 0, "steps must be between 1 and 1000, got 0"),
        ("steps", 1001, "steps must be between 1 and 1000, got 1001"),
        ("steps", 1.5, "steps must be an integer, got 1.5"),
        ("steps", True, "steps must be an integer, got True"),
        ("steps", "10", "steps must be an integer, got '10'"),
        ("steps", None, "steps must be an integer, got None"),
        ("steps", math.inf, "steps must be an integer, got inf"),
        ("rate", -0.1, "rate must be at least 0.0, got -0.1"),
        ("rate", math.nan, "rate must be a number, got nan"),
        ("rate", math.inf, "rate must be a number, got inf"),
        ("rate", 10**400, "rate must be a number, got 1000"),
        ("rate", False, "rate must be a number, got False"),
        ("seed", 2**64, "seed must be between 0 and 18446744073709551615, got 18446744073709551616"),
        ("seed", -1, "seed must be between 0 and"),
        ("optimizer", "AdanW", "optimizer must be one of AdamW, Adam, SGD, got 'AdanW' (did you mean 'AdamW'?)"),
        ("optimizer", 3, "optimizer must be a text, got 3"),
        ("trigger", None, "trigger must be a text, got None"),
        ("quiet", 1, "quiet must be a true or false value, got 1"),
        ("alpha", -1, "alpha must be at least 0.0, got -1.0"),
    ]:
        with pytest.raises(OptionError) as caught:
            Settings(**{name: value})

        assert str(caught.value).startswith(sentence)


def test_an_upper_bound_alone_is_named() -> None:
    with pytest.raises(OptionError, match=r"^noise must be at most 2, got 3$"):
        Option(name="noise", type=int, default=0, help="", max=2).check(3)


def test_a_mapping_becomes_a_configuration() -> None:
    assert config_from(Settings, {"steps": 20, "optimizer": "sgd"}) == Settings(steps=20, optimizer="SGD")


def test_unknown_keys_are_refused() -> None:
    for key in ["stepz", "undeclared", "Steps"]:
        with pytest.raises(OptionError, match=f"^unknown option '{key}'"):
            config_from(Settings, {key: 1})


def test_an_unknown_key_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(OptionError, match=r"\(did you mean 'optimizer'\?\); known are steps, rate, "):
        config_from(Settings, {"optimiser": "AdamW"})


@given(st.one_of(st.integers(), st.floats(allow_nan=True), st.text(max_size=5), st.booleans(), st.none()))
def test_nothing_but_an_option_error_comes_out_of_a_check(value: Any) -> None:
    for declared in options_of(Settings).values():
        try:
            accepted = declared.check(value)
        except OptionError:
            continue
        assert declared.check(accepted) == accepted
