"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174) of the repeated blocks of a model, by depth.

Depth 1 recomputes the outermost repeated blocks, which needs least memory. Each further depth is one nesting level
inside, down to the innermost blocks. Recomputation is non-reentrant, so blocks whose inputs need no gradient are
covered too; loss and gradients do not change.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch.utils.checkpoint
from torch import nn


def blocks_at_depth(model: nn.Module, depth: int) -> list[nn.Module]:
    """The blocks that are recomputed at a depth (1 is outermost)."""
    blocks = _inner_blocks(model)
    for _ in range(depth - 1):
        blocks = [inner for block in blocks for inner in _inner_blocks(block) or [block]]
    return blocks


@contextlib.contextmanager
def blocks_checkpointed(model: nn.Module, depth: int) -> Iterator[None]:
    """Inside the context, blocks at `depth` are recomputed in the backward pass; depth 0 does nothing."""
    blocks = blocks_at_depth(model, depth) if depth else []
    previous = [block.forward for block in blocks]
    own = ["forward" in block.__dict__ for block in blocks]
    try:
        for block in blocks:
            block.forward = types.MethodType(_recomputed, block.forward)
        yield
    finally:
        for block, forward, was_own in zip(blocks, previous, own, strict=True):
            if was_own:
                block.forward = forward
            else:
                del block.forward


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # Random numbers of adapters are keyed, so no generator state has to be restored for the second pass.
    return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _inner_blocks(module: nn.Module) -> list[nn.Module]:
    """The next level of blocks: elements of lists, and children that hold such lists deeper down."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            blocks += [element for element in child if _has_children(element)]
        elif _inner_blocks(child):
            blocks.append(child)
    return blocks


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None
