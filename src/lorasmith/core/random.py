"""Keyed random numbers: every value is a function of (seed, purpose, index), never of what was drawn before.

So a run on a CPU and one on a GPU see the same noise, batch 4 the same as four accumulated batches of 1, two processes
the same as one, and a resumed run the same as one that never stopped.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["keyed_generator", "keyed_normal", "keyed_permutation", "keyed_uniform"]


def keyed_generator(seed: int, purpose: str, index: int | str = 0) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose, index).

    Args:
        seed: the run's seed, any integer in [0, 2^64).
        purpose: what the numbers are for ("noise", "timestep", "order", "init", ...): streams never overlap.
        index: the global draw index, or a module path.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    # torch takes 64-bit seeds but treats the top bit as a sign.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(shape: tuple[int, ...], seed: int, purpose: str, index: int | str = 0) -> Tensor:
    """Standard normal fp32 values of `shape` on the CPU."""
    return torch.randn(shape, generator=keyed_generator(seed, purpose, index))


def keyed_uniform(seed: int, purpose: str, index: int | str = 0) -> float:
    """One value in [0, 1)."""
    return torch.rand((), generator=keyed_generator(seed, purpose, index), dtype=torch.float64).item()


def keyed_permutation(n: int, seed: int, purpose: str, index: int | str = 0) -> list[int]:
    """A permutation of range(n)."""
    order: list[int] = torch.randperm(n, generator=keyed_generator(seed, purpose, index)).tolist()
    return order
