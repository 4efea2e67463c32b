"""Sizes and counts as text."""

from __future__ import annotations


def memory_text(size_bytes: int) -> str:
    """`512 MiB` or `1.5 GiB`."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"


def count_text(count: int, noun: str) -> str:
    """`1 step` or `2,000 steps`, for nouns with a regular plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
