"""Amounts of memory, and counts of things, in words."""

from __future__ import annotations

from lorasmith.core.printable import count_text, memory_text


def test_memory_in_words() -> None:
    for size, text in [
        (0, "0 MiB"),
        (2**20, "1 MiB"),
        (2**30 - 2**20, "1023 MiB"),
        (2**30, "1.0 GiB"),
        (25 * 2**29, "12.5 GiB"),
    ]:
        assert memory_text(size) == text


def test_counts_in_words() -> None:
    for count, text in [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (2000, "2,000 steps")]:
        assert count_text(count, "step") == text
