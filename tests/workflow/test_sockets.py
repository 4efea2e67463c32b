from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.core.errors import OptionError
from lorasmith.core.folders import Folders
from lorasmith.core.options import Option
from lorasmith.workflow.sockets import MATCH, Grow, Input, types_match

HERE = Folders(Path())


@pytest.mark.parametrize(
    ("received", "wanted", "matches"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "LATENT", False),
        ("INT", "INT,FLOAT", True),
        ("INT, STRING", "FLOAT,STRING", True),
        ("INT", "FLOAT", False),
        ("*", "MODEL", True),
        ("MODEL", "*", True),
        ("MODEL", "INT,*", True),
        ("MODEL", MATCH, True),
        ("STRING", "COMBO", False),
    ],
)
def test_types_match(received: str, wanted: str, matches: bool) -> None:
    assert types_match(received, wanted) is matches


@pytest.mark.parametrize(
    ("declared", "given_value", "seen"),
    [
        (Input("n", "INT", min=1, max=8), 8.0, 8),
        (Input("n", "INT", max=2**64 - 1), 2**64 - 1, 2**64 - 1),
        (Input("x", "FLOAT"), 3, 3.0),
        (Input("s", "STRING"), "", ""),
        (Input("b", "BOOLEAN"), False, False),
        (Input("c", "COMBO", options=("LoRA", "LoKr")), "lora", "LoRA"),
        (Input("c", "COMBO", options=("a", "A")), "a", "a"),
        (Input("c", "COMBO", options=("sub/x.safetensors",)), "Sub\\x.safetensors", "sub/x.safetensors"),
        (Input("u", "INT,STRING"), "text", "text"),
        (Input("u", "INT,STRING"), 5, 5),
        (Input("any", "*"), {"a": 1}, {"a": 1}),
        (Input("m", MATCH), 1.5, 1.5),
    ],
)
def test_accepted_values(declared: Input, given_value: Any, seen: Any) -> None:
    result = declared.check(given_value, HERE)
    assert result == seen
    assert type(result) is type(seen)


@pytest.mark.parametrize(
    ("declared", "value", "sentence"),
    [
        (Input("rank", "INT", min=1, max=128), 500, "rank must be between 1 and 128, got 500"),
        (Input("rank", "INT"), 1.5, "rank must be an integer, got 1.5"),
        (Input("rank", "INT"), "1.5", r"rank must be an integer, got 1\.5"),
        (Input("rank", "INT", max=128), "500", "rank must be at most 128, got 500"),
        (Input("rank", "INT"), "9" * 41, "rank must be an integer, got '9"),
        (Input("rate", "FLOAT"), "nan", "rate must be a number, got 'nan'"),
        (Input("rate", "FLOAT"), "1e999", "rate must be a number, got inf"),
        (Input("rank", "INT"), True, "rank must be an integer, got True"),
        (Input("rank", "INT"), None, "rank must be an integer, got None"),
        (Input("rate", "FLOAT"), float("nan"), "rate must be a number, got nan"),
        (Input("rate", "FLOAT"), 10**400, "rate must be a number, got 1"),
        (Input("text", "STRING"), 3, "text must be a text, got 3"),
        (Input("flag", "BOOLEAN"), 1, "flag must be a true or false value, got 1"),
        (Input("c", "COMBO", options=("MSE", "Huber")), "Hubber", r"one of MSE, Huber, got .* \(did you mean 'Huber'"),
        (Input("c", "COMBO"), "x", "c has nothing to choose from, got 'x'"),
        (Input("model", "MODEL"), 5, "model must be linked to an output of type MODEL, got 5"),
        (Input("u", "INT,FLOAT", max=4), "x", "u must be a number, got 'x'"),
    ],
)
def test_refused_values(declared: Input, value: Any, sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence):
        declared.check(value, HERE)


def test_long_lists_of_choices_are_cut_short_in_messages() -> None:
    declared = Input("file", "COMBO", options=tuple(f"file{i}" for i in range(500)))
    with pytest.raises(OptionError) as caught:
        declared.check("nothing", HERE)
    assert len(str(caught.value)) < 200


def test_choices_are_asked_for_when_they_are_needed() -> None:
    names: list[str] = []
    declared = Input("file", "COMBO", options=lambda folders: names)
    names.append("new.png")
    assert declared.check("NEW.png", HERE) == "new.png"
    with pytest.raises(
        OptionError, match=r"got 'old\.jpg'; add it to the base folder, or name the folder .* --base-dir"
    ):
        declared.check("old.jpg", HERE)


def test_accept_decides_instead_of_the_list() -> None:
    declared = Input("file", "COMBO", options=("a.png",), accept=lambda name, folders: name.upper())
    assert declared.check("b.png", HERE) == "B.PNG"


def test_linked_scalars_are_checked_and_objects_pass() -> None:
    assert Input("n", "INT", max=3).check_linked(2.0, HERE) == 2
    with pytest.raises(OptionError, match="n must be at most 3, got 4"):
        Input("n", "INT", max=3).check_linked(4, HERE)
    thing = object()
    assert Input("m", "MODEL").check_linked(thing, HERE) is thing
    assert Input("m", "MODEL,INT").check_linked(thing, HERE) is thing


@given(st.integers(0, 4), st.integers(1, 6), st.booleans())
def test_growing_inputs_spell_out_their_repetitions(least: int, most: int, optional: bool) -> None:
    names = Input("inputs", "IMAGE", optional=optional, grow=Grow("input", min=least, max=most)).expanded()
    assert [one.name for one in names] == [f"inputs.input{i}" for i in range(most)]
    assert [one.optional for one in names] == [optional or i >= least for i in range(most)]


def test_from_option_takes_over_the_declaration() -> None:
    rank = Input.from_option(Option("rank", int, 16, "Size of the LoRA.", min=1, max=128), default=8)
    assert (rank.name, rank.type, rank.default, rank.min, rank.max) == ("rank", "INT", 8, 1, 128)
    assert rank.tooltip == "Size of the LoRA."
    assert not rank.optional
    choice = Input.from_option(Option("loss", str, "MSE", "Loss.", choices=("MSE", "L1")))
    assert (choice.type, choice.options) == ("COMBO", ("MSE", "L1"))
    alpha = Input.from_option(Option("alpha", float, None, "Scale."))
    assert (alpha.type, alpha.optional, alpha.default) == ("FLOAT", True, None)
    assert Input.from_option(Option("flag", bool, False, "Flag."), optional=True).type == "BOOLEAN"


def test_repetitions_may_have_names_of_their_own() -> None:
    slots = Input("values", "*", grow=Grow("value", min=1, names=("a", "b", "c"))).expanded()
    assert [(one.name, one.optional) for one in slots] == [("values.a", False), ("values.b", True), ("values.c", True)]
