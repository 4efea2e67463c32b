"""Amounts of memory in words."""

from __future__ import annotations

__all__ = ["memory_text"]


def memory_text(size_bytes: int) -> str:
    """`512 MiB` or `1.5 GiB`."""
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.0f} MiB"
