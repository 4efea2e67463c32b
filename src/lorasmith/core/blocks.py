"""The repeated blocks of a network, by nesting depth."""

from __future__ import annotations

from torch import nn


def blocks_at_depth(model: nn.Module, depth: int) -> list[nn.Module]:
    """The blocks at a depth from 1, the outermost; where they hold none, they stand for the deeper ones."""
    blocks = _inner_blocks(model)
    for _ in range(depth - 1):
        blocks = [inner for block in blocks for inner in _inner_blocks(block) or [block]]
    return blocks


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks that are compiled and offloaded one by one.

    These are the outermost repeated blocks or, if those differ from each other and hold lists of blocks themselves (the
    stages of a UNet), the blocks inside.
    """
    modules: list[nn.Module] = []
    for block in blocks_at_depth(model, 1):
        modules += blocks_at_depth(block, 1) if _is_stage(block) else [block]
    return modules


def _is_stage(block: nn.Module) -> bool:
    lists = (child for child in block.children() if isinstance(child, nn.ModuleList))
    return any(next(element.children(), None) is not None for blocks in lists for element in blocks)


def _inner_blocks(module: nn.Module) -> list[nn.Module]:
    """The next level of blocks: elements of lists, and children that hold such lists deeper down."""
    blocks: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            blocks += [element for element in child if next(element.children(), None) is not None]
        elif _inner_blocks(child):
            blocks.append(child)
    return blocks
