"""Registries: names in any case, aliases, and hints for near misses."""

from __future__ import annotations

import pytest

from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.registry import Registry, nearest


@pytest.fixture
def registry() -> Registry[int]:
    registry: Registry[int] = Registry("number")
    registry.register("One", "uno", "Eins")(1)
    registry.register("Seven")(7)
    return registry


@pytest.mark.parametrize("name", ["One", "one", "ONE", "uno", "UNO", "eins"])
def test_names_and_aliases_are_found_whatever_their_case(registry: Registry[int], name: str) -> None:
    assert registry[name] == 1
    assert name in registry
    assert registry.canonical(name) == "One"


def test_only_registered_names_are_listed_in_order(registry: Registry[int]) -> None:
    assert list(registry) == ["One", "Seven"]
    assert list(registry.items()) == [("One", 1), ("Seven", 7)]
    assert len(registry) == 2


def test_an_unknown_name_is_answered_with_hint_and_list(registry: Registry[int]) -> None:
    with pytest.raises(OptionError) as caught:
        registry["sevn"]

    assert str(caught.value) == "unknown number 'sevn' (did you mean 'Seven'?); known are One, Seven"
    assert "sevn" not in registry
    assert 7 not in registry


def test_a_registry_raises_the_error_it_was_given() -> None:
    with pytest.raises(LoraError, match=r"^unknown layout 'x'; known are $"):
        Registry("layout", LoraError)["x"]


@pytest.mark.parametrize("name", ["one", "UNO", "seven"])
def test_names_are_taken_once(registry: Registry[int], name: str) -> None:
    with pytest.raises(OptionError, match=f"^number '{name}' is registered twice, by "):
        registry.register(name)(2)


def test_register_returns_what_it_registers(registry: Registry[int]) -> None:
    assert registry.register("Nine")(9) == 9


def test_nearest_keeps_silent_when_nothing_is_near() -> None:
    assert nearest("zebra", ["AdamW", "SGD"]) == ""
    assert nearest("adamv", ["AdamW", "SGD"]) == " (did you mean 'AdamW'?)"
