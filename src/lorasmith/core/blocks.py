"""The repeated blocks of a network, by nesting depth."""

from __future__ import annotations

from torch import nn


def blocks_at_depth(model: nn.Module, depth: int) -> list[nn.Module]:
    """The blocks at a depth from 1, the outermost; where they hold none, they stand for the deeper ones."""
    blocks = _inner_blocks(model)
    for _ in range(depth - 1):
        blocks = [inner for block in blocks for inner in _inner_blocks(block) or [block]]
    return blocks


def _inner_blocks(module: nn.Module) -> list[nn.Module]:
    """The next level of blocks: elements of lists, and children that hold such lists deeper down."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            blocks += [element for element in child if next(element.children(), None) is not None]
        elif _inner_blocks(child):
            blocks.append(child)
    return blocks
