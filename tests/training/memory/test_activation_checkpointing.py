"""Which modules are a model's blocks at a depth."""

from __future__ import annotations

from lorasmith.families.model import Model
from lorasmith.training.memory.activations import blocks_at_depth


def test_blocks_by_depth(tiny: Model) -> None:
    unet = tiny.components.denoiser
    names = {id(module): path for path, module in unet.named_modules()}
    depth = {d: [names[id(block)] for block in blocks_at_depth(unet, d)] for d in (1, 2, 3, 5)}
    assert depth[1] == [*(f"down_blocks.{i}" for i in range(3)), *(f"up_blocks.{i}" for i in range(3)), "mid_block"]
    assert "down_blocks.0.resnets.0" in depth[2]
    assert "mid_block.attentions.0" in depth[2]
    assert "down_blocks.0.attentions.0.transformer_blocks.0" in depth[3]
    assert depth[5]  # past the nesting there are still blocks
    assert all(list(unet.get_submodule(path).children()) for paths in depth.values() for path in paths)
