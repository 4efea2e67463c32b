"""BOFT: butterfly orthogonal fine-tuning (Liu et al. 2023, arXiv:2311.06243), in LyCORIS' form.

    W' = P_mᵀ R_m P_m · … · P_1ᵀ R_1 P_1 W

Each stage is an OFT (see `oft`) of shuffled rows: stage i makes blocks of two half blocks that are 2^i half blocks
apart, so that after all stages each output depends on every other (of its group, in a convolution with groups). Blocks
are of even size and their number is a power of two; `oft_blocks` is (stages, blocks, block size, block size). `rank` is
the upper bound of the block size; where the outputs allow none that small, the smallest possible size is used.
Constraint, `rescale` and strength are OFT's, strength in each stage. Parameters: stages · out · block size, of which
half are used.

In activation space the stages run one after the other on the outputs. The backward pass recomputes them, so that no
activation is kept for each.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lorasmith.adapters.adapter import ADAPTERS, misfit, taken
from lorasmith.adapters.frozen_layer import FrozenLayer
from lorasmith.adapters.oft import OftAdapter, Rotation, rotated
from lorasmith.core.adapter_state import AdapterWeights, Shapes
from lorasmith.core.errors import OptionError
from lorasmith.core.recomputation import recomputed


@ADAPTERS.register("BOFT")
class BoftAdapter(Rotation):
    """Butterfly of block-diagonal rotations of the outputs, by blocks (stages, blocks, block size, block size)."""

    algorithm = "boft"

    @classmethod
    def create(cls, layer: FrozenLayer, *, rank: int, alpha: float, seed: int, path: str, zero: str) -> BoftAdapter:
        together = layer.out_features // layer.groups
        size = layer.out_features
        while size % 4 == 0 and (size > rank or together % size):
            size //= 2
        if size % 2 or together % size:
            raise OptionError(
                f"BOFT needs an even number of outputs that can be mixed, and {path} has {together}; "
                "exclude this layer or use OFT"
            )
        count = layer.out_features // size
        stages = max(n for n in range(1, count.bit_length() + 1) if together % (size << (n - 1)) == 0)
        return cls(torch.zeros(stages, count, size, size), alpha=alpha)

    @classmethod
    def from_weights(cls, weights: AdapterWeights, layer: FrozenLayer) -> BoftAdapter:
        tensors = taken(weights, ["oft_blocks"], ("rescale",))
        blocks, rescale = tensors["oft_blocks"], tensors.get("rescale")
        out = layer.out_features
        if not _is_butterfly(blocks.shape, layer) or (rescale is not None and rescale.numel() != out):
            raise misfit(weights, layer)
        return cls(blocks, alpha=weights.alpha or 0.0, rescale=rescale)

    def turned(self, rows: Tensor, blocks: Tensor, strength: float) -> Tensor:
        turned: Tensor = recomputed(_butterfly, rows, blocks, strength)
        return turned


def _butterfly(y: Tensor, blocks: Tensor, strength: float) -> Tensor:
    """All stages on y (..., channels), for blocks (stages, blocks, block size, block size)."""
    stages, count, size, _ = blocks.shape
    half = size // 2
    # Files number a block's rows across its two halves; here each half is contiguous. And their Rᵀ is OFT's R.
    blocks = blocks.reshape(stages, count, half, 2, half, 2).permute(0, 1, 5, 4, 3, 2).reshape(blocks.shape)
    for stage, turn in enumerate(blocks):
        shuffled = y.reshape(*y.shape[:-1], -1, 2, 2**stage, half).transpose(-3, -2)
        turned = rotated(shuffled.reshape(y.shape), turn, strength)
        y = turned.view(shuffled.shape).transpose(-3, -2).reshape(y.shape)
    return y


def _is_butterfly(shape: torch.Size, layer: FrozenLayer) -> bool:
    """Whether blocks of this shape make a butterfly on a layer's outputs, or on those of each of its groups."""
    if len(shape) != 4:
        return False
    stages, count, size, columns = shape
    whole = size == columns and size % 2 == 0 and count & (count - 1) == 0 and count * size == layer.out_features
    widest = size << (stages - 1)
    return whole and layer.out_features // layer.groups % widest == 0


def _further_rule(shapes: Shapes) -> str:
    stages, count, size, _ = shapes["oft_blocks"]
    whole = size % 2 == 0 and count & (count - 1) == 0 and stages <= count.bit_length()
    return "" if whole else "be 2^n blocks of even size, in at most n + 1 stages"


_BLOCKS = {"oft_blocks": "stages blocks size size"}

BoftAdapter.format = replace(
    OftAdapter.format,
    rules=(_BLOCKS, {**_BLOCKS, "rescale": "blocks*size 1..."}),
    further_rule=_further_rule,
    rows=lambda weights: None,
    comfyui_needs_alpha=True,
    peft=None,
)
