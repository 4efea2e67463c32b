"""Rules of shapes. What algorithms declare is tested in tests/formats/names/test_spelling.py."""

from __future__ import annotations

from lorasmith.core.adapter_state import first_misfit

RULES = {
    "one": "1",
    "down": "rank in kernel...",
    "up": "out rank 1...",
    "core": "rank rank kernel...",
    "scale": "out*rank 1...",
}


def shapes(**changed: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"one": (1,), "down": (2, 5, 3, 1), "up": (7, 2, 1), "core": (2, 2, 3, 1), "scale": (14,), **changed}


def test_shapes_that_follow_their_rules() -> None:
    assert first_misfit(shapes(), RULES) is None
    assert first_misfit(shapes(down=(2, 5), core=(2, 2)), RULES) is None


def test_the_first_tensor_that_breaks_its_rule_is_named() -> None:
    for name, shape, rule in [
        ("one", (2,), "(1)"),
        ("down", (), "(rank, in, kernel...)"),
        ("down", (2, 0, 3, 1), "(rank, in, kernel...)"),
        ("down", (2, 5, 3, 1, 1, 1), "(rank, in, kernel...)"),
        ("up", (7, 3, 1), "(out, rank, 1...) with rank 2"),
        ("up", (7, 2, 4), "(out, rank, 1...) with rank 2"),
        ("core", (2, 2, 1, 3), "(rank, rank, kernel...) with rank 2 and kernel 3 × 1"),
        ("scale", (15,), "(out*rank, 1...) with out 7 and rank 2"),
    ]:
        assert first_misfit(shapes(**{name: shape}), RULES) == (name, rule)
