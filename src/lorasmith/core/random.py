"""Keyed random numbers: every value is a function of (seed, purpose, index), independent of earlier draws.

Noise is thus the same on a CPU and a GPU, for batch 4 and four accumulated batches of 1, for any number of processes,
and in a resumed run.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed_generator(seed: int, purpose: str, index: int | str = 0) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose, index): seed in [0, 2^64), index a global draw index or a module path.

    Purposes ("noise", "timestep", "order", "init", ...) name independent streams.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    # torch takes 64-bit seeds but treats the top bit as a sign.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def keyed_normal(shape: tuple[int, ...], seed: int, purpose: str, index: int | str = 0) -> Tensor:
    """Standard normal fp32 values on the CPU, keyed as in `keyed_generator`."""
    return torch.randn(shape, generator=keyed_generator(seed, purpose, index))


def keyed_uniform(seed: int, purpose: str, index: int | str = 0) -> float:
    """One value in [0, 1), keyed as in `keyed_generator`."""
    return torch.rand((), generator=keyed_generator(seed, purpose, index), dtype=torch.float64).item()


def keyed_permutation(n: int, seed: int, purpose: str, index: int | str = 0) -> list[int]:
    """A permutation of range(n), keyed as in `keyed_generator`."""
    order: list[int] = torch.randperm(n, generator=keyed_generator(seed, purpose, index)).tolist()
    return order
