"""Extensions: names are known without an import, order and conflicts are stated, a broken one hinders nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from lorasmith.core import extensions
from lorasmith.core.errors import LoraError, OptionError
from lorasmith.core.extensions import HEADER_ENTRY, Extension, recorded_extensions, remedy_for
from lorasmith.core.registry import REGISTRIES, Registry, instance_of, missing
from tests.installed import Things, install

MODULE = f"""
from {__name__} import Drink

tea, milk = Drink("tea"), Drink("milk", before=("water",))
ales = object()
"""


class Drink:
    def __init__(self, name: str, before: tuple[str, ...] = ()) -> None:
        self.name, self.before = name, before


Made = Callable[..., "Registry[Drink]"]


@pytest.fixture
def drinks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Made:
    """A registry of water and wine, beside installed packages with a module `own_drinks`, not imported yet."""
    (tmp_path / "own_drinks.py").write_text(MODULE)
    (tmp_path / "broken_drinks.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_drinks", raising=False)
    monkeypatch.delitem(REGISTRIES, "samplers", raising=False)

    def make(**packages: Things) -> Registry[Drink]:
        made: Registry[Drink] = Registry("drink", LoraError, group="samplers", checked=instance_of(Drink))
        install(monkeypatch, tmp_path / "packages", packages)
        for name in ("water", "wine"):
            made.register(name, module="lorasmith.drinks")(Drink(name))
        return made

    return make


OWN = {"samplers": {"tea": "own_drinks:tea", "milk": "own_drinks:milk"}}


def test_names_are_known_before_anything_is_imported(drinks: Made) -> None:
    registry = drinks(own=OWN)
    assert list(registry) == ["water", "wine", "tea", "milk"]
    assert "TEA" in registry and registry.canonical("Tea") == "tea" and not registry.imported("tea")
    assert "own_drinks" not in sys.modules
    assert registry["tea"].name == "tea" and registry.imported("tea")


def test_things_follow_the_built_in_ones_or_precede_those_that_they_name(drinks: Made) -> None:
    registry = drinks(own=OWN)
    assert [name for name, _ in registry.items()] == ["milk", "water", "wine", "tea"]
    registry.register("cocoa", before=("wine",))(Drink("cocoa"))
    assert [name for name, _ in registry.items()] == ["milk", "water", "cocoa", "wine", "tea"]
    with pytest.raises(LoraError, match=r"unknown drink 'wien' \(did you mean 'wine'\?\)"):
        registry.register("juice", before=("wien",))(Drink("juice"))


def test_who_brings_a_thing_is_known(drinks: Made) -> None:
    registry = drinks(own=OWN)
    registry.register("cocoa")(Drink("cocoa"))
    assert registry.extension("water") is None
    assert registry.extension("MILK") == Extension(kind="samplers", name="milk", package="own", version="0.1")
    assert registry.extension("cocoa") == Extension(kind="samplers", name="cocoa")


def test_a_broken_package_is_named_where_its_thing_is_asked_for_and_nowhere_else(drinks: Made) -> None:
    registry = drinks(bad={"samplers": {"rum": "broken_drinks:rum", "gin": "own_drinks:gin", "ale": "own_drinks:tea"}})
    assert [name for name, _ in registry.items()] == ["water", "wine"]
    why = {"rum": "No module named 'no_such_module'", "gin": "no attribute 'gin'", "ale": "whose name is 'ale'"}
    for name, reason in why.items():
        with pytest.raises(LoraError, match=rf"^the drink '{name}' of bad 0\.1 cannot be used \(.*{reason}.*update or"):
            registry[name]


def test_a_name_that_two_bring_is_refused_with_both(drinks: Made) -> None:
    registry = drinks(one=OWN, two={"samplers": {"Tea": "own_drinks:milk", "wine": "own_drinks:tea"}})
    with pytest.raises(LoraError, match=r"^drink 'tea' is registered twice, by one 0\.1 and by two 0\.1; uninstall"):
        registry["tea"]
    assert registry["wine"].name == "wine", "a built-in thing keeps its name"
    with pytest.raises(OptionError, match=r"'milk' is registered twice, by one 0\.1 and by the module "):
        registry.register("milk")(Drink("milk"))
    with pytest.raises(OptionError, match=r"'Water' is registered twice, by lorasmith and by the module "):
        registry.register("Water")(Drink("Water"))


def test_a_cell_of_a_notebook_may_be_run_again(drinks: Made) -> None:
    registry = drinks()
    for _ in range(2):
        cocoa = Drink("cocoa")
        registry.register("cocoa", module="__main__")(cocoa)
        assert registry["cocoa"] is cocoa
    with pytest.raises(OptionError, match=r"'Cocoa' is registered twice, by the module __main__ and by the module own"):
        registry.register("Cocoa", module="own_drinks")(Drink("cocoa"))


def test_threads_have_the_same_things(drinks: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"ale {number}" for number in range(20)]
    registry = drinks(own={"samplers": dict.fromkeys(names, "own_drinks:ales")})
    ready, found, scan = threading.Barrier(6), list[list[Drink]](), extensions.distributions

    def slow() -> Iterator[Distribution]:
        time.sleep(0.02)  # others begin meanwhile
        yield from scan()

    def made(name: str, thing: object) -> Drink:
        time.sleep(0.001)
        return Drink(name)

    def ask() -> None:
        ready.wait()
        found.append([*(registry[name] for name in names), *registry.usable().values()])

    monkeypatch.setattr(extensions, "distributions", slow)
    monkeypatch.setattr(registry, "_checked", made)
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [list(map(id, one)) for one in found] == [list(map(id, found[0]))] * 6
    assert list(registry.usable()) == ["water", "wine", *names]


@pytest.mark.filterwarnings("ignore:Implicit None on return values:DeprecationWarning")  # Python 3.13's
def test_a_package_with_damaged_metadata_is_left_out(drinks: Made, tmp_path: Path) -> None:
    registry = drinks(own=OWN, other={"samplers": {"rum": "not an object"}}, third={"samplers": {"ale": "own:ale"}})
    (tmp_path / "packages" / "third-0.1.dist-info" / "METADATA").unlink()
    with pytest.warns(match="extensions of .* are left out") as warned:
        assert list(registry) == ["water", "wine", "tea", "milk"]
    assert sum("are left out" in str(one.message) for one in warned) == 2


def test_a_module_may_register_what_its_package_announces(drinks: Made) -> None:
    registry = drinks(own=OWN)
    tea = Drink("tea")
    registry.register("tea", module="own_drinks.register")(tea)
    assert registry["tea"] is tea
    assert registry.extension("tea") == Extension(kind="samplers", name="tea", package="own", version="0.1")


def test_a_module_may_register_a_thing_again(drinks: Made) -> None:
    registry, first, second = drinks(), Drink("cocoa"), Drink("cocoa")
    registry.register("cocoa")(first)
    assert registry.usable()["cocoa"] is first
    registry.register("cocoa")(second)
    assert registry["cocoa"] is second and registry.usable()["cocoa"] is second
    with pytest.raises(OptionError, match=r"'cocoa' is registered twice, by the module .* and by the module other"):
        registry.register("cocoa", module="other")(Drink("cocoa"))


def test_what_does_not_fulfil_the_contract_is_refused(drinks: Made) -> None:
    with pytest.raises(
        LoraError, match=r"^drink 'cola' cannot be registered: it must be a .*Drink whose name is 'cola'"
    ):
        drinks().register("cola")("cola")  # type: ignore[arg-type]


def test_missing_extensions_are_those_that_no_package_and_no_program_brings(drinks: Made) -> None:
    drinks(own=OWN)
    there = Extension(kind="samplers", name="Tea", package="own", version="0.3")
    gone = Extension(kind="samplers", name="beer", package="brewery", version="2.0")
    assert missing([there, gone, Extension(kind="brews", name="x")]) == [gone, Extension(kind="brews", name="x")]


def test_a_strangers_record_becomes_a_sentence_and_never_a_command_of_its_own() -> None:
    for needed, text in [
        (
            {"package": "brewery", "version": "2.0"},
            "the sampler 'beer' of the package brewery 2.0, which is not installed; if you trust it, run: pip install "
            "brewery",
        ),
        ({}, "the sampler 'beer', which the program that trained it registered; load it from that program"),
        ({"package": "x; rm -rf /"}, "the sampler 'beer' of a package without a valid name; ask for its name"),
        ({"package": "--index-url=http"}, "the sampler 'beer' of a package without a valid name; ask for its name"),
        (
            {"package": "brewery", "version": "1; reboot"},
            "the sampler 'beer' of the package brewery, which is not installed; if you trust it, run: pip install "
            "brewery",
        ),
    ]:
        assert remedy_for([Extension(kind="samplers", name="beer", **needed)]) == text


def test_a_damaged_entry_of_a_file_is_none() -> None:
    for text in ("", "{", "[1]", '[{"kind": 1}]', "[" * 500):
        assert recorded_extensions({HEADER_ENTRY: text}) == ()
    assert recorded_extensions({}) == ()
    (found,) = recorded_extensions({HEADER_ENTRY: '[{"kind": "nodes", "name": "x", "later": 1}]'})
    assert found == Extension(kind="nodes", name="x")
