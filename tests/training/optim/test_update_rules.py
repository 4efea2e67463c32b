"""Optimizers are found, their arguments read, and what cannot be used is refused in a sentence."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.training.optim.flat import ParameterGroup
from lorasmith.training.optim.update_rules import OPTIMIZERS, build_optimizer, rule_of


def build(name: str, arguments: str | None = None, weight_decay: float = 0.01) -> torch.optim.Optimizer:
    flat = torch.ones(32)
    flat.grad = torch.ones(32)
    return build_optimizer(name, [ParameterGroup(flat, (flat,), 0.1)], weight_decay=weight_decay, arguments=arguments)


def test_arguments_reach_the_optimizer() -> None:
    group = build("adamw", "betas=(0.8, 0.95) eps=1e-7, amsgrad=True").param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.8, 0.95), 1e-7, True)
    assert build("AdamW", "fused=False").param_groups[0]["fused"] is False
    assert build("torch.optim.SGD", "momentum=0.9").param_groups[0]["momentum"] == 0.9


SCALARS = st.floats(1e-9, 0.9) | st.integers(1, 9).map(lambda n: n / 10)


@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "betas": st.tuples(SCALARS, SCALARS),
            "eps": SCALARS,
            "amsgrad": st.booleans(),
            "fused": st.booleans(),
            "maximize": st.booleans(),
        },
    ),
    separator=st.sampled_from([" ", ", ", "  ", ",", "\n"]),
)
def test_what_is_written_is_read(values: dict[str, Any], separator: str) -> None:
    group = build("AdamW", separator.join(f"{key}={value!r}" for key, value in values.items())).param_groups[0]
    assert {key: group[key] for key in values} == values


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("beta=(0.9,0.99)", r"AdamW has no argument 'beta' \(did you mean 'betas'\?\); it has amsgrad, betas"),
        ("lr=1e-3", "must not have lr, which is for the setting learning_rate"),
        ("weight_decay=0.1", "must not have weight_decay, which is for the setting weight_decay"),
        ("params=3", "must not have params, which is for the setting targets"),
        ("eps=1e-7 eps=1e-8", "each argument once, got eps twice"),
        ("eps=__import__('os')", 'eps of optimizer_args must be a number, .* got "__import__'),
        ("eps=", "eps of optimizer_args must be a number, .* got ''"),
        ("fast", "must be name=value, separated by blanks, .* got 'fast'"),
        ("fast eps=1e-7", "must be name=value, separated by blanks, .* got 'fast'"),
        ("betas=(2.0,0.9)", "AdamW cannot be used with its settings: Invalid beta parameter at index 0: 2.0"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(arguments: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        build("AdamW", arguments)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("AdamWW", r"unknown optimizer 'AdamWW' \(did you mean 'AdamW'\?\)"),
        ("torch.optim.NAdm", r"torch.optim has no optimizer 'NAdm' \(did you mean 'NAdam'\?\)"),
        ("no_such_package.Adam", "import path of something installed, got 'no_such_package.Adam': No module named"),
        (
            "torch.nn.Linear",
            "must be a class of torch optimizers or a function that makes one, which torch.nn.Linear is not",
        ),
        ("torch.optim.Optimizer", "must be a class of torch optimizers"),
        ("torch.optim.LBFGS", "step from one gradient, but torch.optim.LBFGS asks for several"),
        (f"{__name__}.Unhurried", "must take a learning rate"),
    ],
)
def test_what_is_no_optimizer_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        build(name)


class Unhurried(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "Prodigy", "ScheduleFree"])
def test_a_missing_package_is_named_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    package = OPTIMIZERS[name].package
    with pytest.raises(OptionError, match=f"needs the package {package}, .*: pip install {package}$"):
        build(name)


def test_decay_goes_to_those_that_take_it() -> None:
    takers = [name for name in OPTIMIZERS if rule_of(name).decays]
    assert [name for name in OPTIMIZERS if name not in takers] == ["Adam", "SGD", "RMSprop"]
    assert build("AdamW", weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
    assert build("Adam", weight_decay=0.3).param_groups[0]["weight_decay"] == 0
    assert build("torch.optim.Adam", weight_decay=0.3).param_groups[0]["weight_decay"] == 0.3
    assert not rule_of(f"{__name__}.Plain").decays


class Plain(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})


def test_only_prodigy_has_a_rate_of_its_own() -> None:
    assert {name: rule_of(name).own_rate for name in OPTIMIZERS if rule_of(name).own_rate is not None} == {
        "Prodigy": 1.0
    }
    assert rule_of("torch.optim.NAdam").own_rate is None
