"""Small random models in the original checkpoint layouts, made without any of the programs that are compared.

A tensor is a function of its name, its shape and a seed alone, so that a golden file records what another program
computed on a model, and the test that reads it rebuilds the very same model. Values are uniform, because their bits
come straight from the Mersenne Twister: no vectorised logarithm can differ between processors.

Key names and shapes are those of the published checkpoints: the latent diffusion UNet of Stable Diffusion 1.x
(Rombach et al. 2022, arXiv:2112.10752) and XL (Podell et al. 2023, arXiv:2307.01952), and Flux.1 (Black Forest Labs
2024).
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CheckpointShapes = Iterator[tuple[str, tuple[int, ...]]]

SIZE_WIDTH = 256
"""In how many numbers SDXL embeds each of its sizes."""


@dataclass(frozen=True)
class UNetShape:
    """What fixes the tensors of a Stable Diffusion UNet.

    Attributes:
        channels: width of the first level; GroupNorm has 32 groups, so a multiple of 32.
        multipliers: width of each level in units of `channels`.
        resnets: residual blocks per level on the way down (one more on the way up).
        attention: transformer layers in each attention of a level; True is one, False none.
        context: width of the text conditioning.
        latent_channels: channels in and out.
        linear: whether projections around transformers are matrices, as from version 2 on, and no convolutions.
        pooled: width of the pooled text that is a condition beside six sizes, as in SDXL; 0 for neither.
    """

    channels: int
    multipliers: tuple[int, ...]
    resnets: int
    attention: tuple[int, ...]
    context: int = 768
    latent_channels: int = 4
    linear: bool = False
    pooled: int = 0

    prefix = "model.diffusion_model."

    def tensors(self) -> CheckpointShapes:
        """(key without prefix, shape) of every tensor, in the order of the forward pass."""
        width, embed = self.channels, 4 * self.channels
        yield from _layer("time_embed.0", width, embed)
        yield from _layer("time_embed.2", embed, embed)
        if self.pooled:
            yield from _layer("label_emb.0.0", self.pooled + 6 * SIZE_WIDTH, embed)
            yield from _layer("label_emb.0.2", embed, embed)
        yield from _layer("input_blocks.0.0", self.latent_channels, width, 3)
        skips, block = [width], 1
        for level, multiplier in enumerate(self.multipliers):
            for _ in range(self.resnets):
                yield from self._block(f"input_blocks.{block}", width, multiplier * self.channels, level)
                width = multiplier * self.channels
                skips.append(width)
                block += 1
            if level + 1 < len(self.multipliers):
                yield from _layer(f"input_blocks.{block}.0.op", width, width, 3)
                skips.append(width)
                block += 1
        yield from _resnet("middle_block.0", width, width, embed)
        yield from _transformer("middle_block.1", width, self.context, self.attention[-1] or 1, linear=self.linear)
        yield from _resnet("middle_block.2", width, width, embed)
        yield from self._up(width, skips)
        yield from _norm("out.0", self.channels)
        yield from _layer("out.2", self.channels, self.latent_channels, 3)

    def _up(self, width: int, skips: list[int]) -> CheckpointShapes:
        block = 0
        for level in reversed(range(len(self.multipliers))):
            out = self.multipliers[level] * self.channels
            for index in range(self.resnets + 1):
                yield from self._block(f"output_blocks.{block}", width + skips.pop(), out, level)
                width = out
                if level and index == self.resnets:
                    slot = 2 if self.attention[level] else 1
                    yield from _layer(f"output_blocks.{block}.{slot}.conv", width, width, 3)
                block += 1

    def _block(self, name: str, width: int, out: int, level: int) -> CheckpointShapes:
        yield from _resnet(f"{name}.0", width, out, 4 * self.channels)
        if depth := self.attention[level]:
            yield from _transformer(f"{name}.1", out, self.context, depth, linear=self.linear)


@dataclass(frozen=True)
class FluxShape:
    """What fixes the tensors of a Flux.1 transformer with guidance embedding.

    Attributes:
        hidden: width; 128 per attention head, which the axes of the rotary embedding add up to.
        double, single: how many blocks of either kind.
        context: width of the text conditioning (T5).
        pooled: width of the pooled text conditioning (CLIP).
        latent_channels: channels of the latents, of which 2×2 patches become tokens.
    """

    hidden: int
    double: int
    single: int
    context: int
    pooled: int
    latent_channels: int = 16

    prefix = ""

    def tensors(self) -> CheckpointShapes:
        """(key, shape) of every tensor, in the order of the forward pass."""
        hidden, patch = self.hidden, 4 * self.latent_channels
        yield from _layer("img_in", patch, hidden)
        yield from _layer("txt_in", self.context, hidden)
        for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", self.pooled)):
            yield from _layer(f"{name}.in_layer", width, hidden)
            yield from _layer(f"{name}.out_layer", hidden, hidden)
        for index in range(self.double):
            for stream in ("img", "txt"):
                yield from self._stream(f"double_blocks.{index}.{stream}")
        for index in range(self.single):
            name = f"single_blocks.{index}"
            yield from _layer(f"{name}.modulation.lin", hidden, 3 * hidden)
            yield from _layer(f"{name}.linear1", hidden, 7 * hidden)
            yield from self._query_key_norms(name)
            yield from _layer(f"{name}.linear2", 5 * hidden, hidden)
        yield from _layer("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
        yield from _layer("final_layer.linear", hidden, patch)

    def _stream(self, name: str) -> CheckpointShapes:
        hidden = self.hidden
        yield from _layer(f"{name}_mod.lin", hidden, 6 * hidden)
        yield from _layer(f"{name}_attn.qkv", hidden, 3 * hidden)
        yield from self._query_key_norms(f"{name}_attn")
        yield from _layer(f"{name}_attn.proj", hidden, hidden)
        yield from _layer(f"{name}_mlp.0", hidden, 4 * hidden)
        yield from _layer(f"{name}_mlp.2", 4 * hidden, hidden)

    @staticmethod
    def _query_key_norms(name: str) -> CheckpointShapes:
        for kind in ("query_norm", "key_norm"):
            yield f"{name}.norm.{kind}.scale", (128,)


SD1_FULL = UNetShape(320, (1, 2, 4, 4), 2, (True, True, True, False))
"""The UNet of Stable Diffusion 1.x, 860 million parameters."""

SD1_TINY = UNetShape(64, (1, 2, 2), 1, (True, True, False))
"""Three levels of it, the last one without attention as in the original."""

SDXL_FULL = UNetShape(320, (1, 2, 4), 2, (0, 2, 10), context=2048, linear=True, pooled=1280)
"""The UNet of Stable Diffusion XL, 2.6 billion parameters."""

SDXL_NARROW = UNetShape(32, (1, 2, 4), 2, (0, 2, 10), context=2048, linear=True, pooled=1280)
"""Every layer of it at a tenth of the width, with conditions of the published width."""

SDXL_SMALL = UNetShape(64, (1, 1, 2), 1, (0, 2, 1), context=64, linear=True, pooled=1280)
"""Three levels of it with one and two heads, and pooled text of the published width.

Its first level is 64 wide: of 32 channels GroupNorm would make groups of one, whose mean it subtracts and the time
embedding with it, so that these layers would have no gradient.
"""

SDXL_TINY = UNetShape(32, (1, 2, 2), 1, (0, 1, 2), context=192, linear=True, pooled=128)
"""Three levels of it, with texts of 64 and 128 channels."""

FLUX_SMALL = FluxShape(384, 2, 4, 768, 256)
"""20 million parameters: small enough to time, large enough that layers rather than overhead are timed."""

FLUX_TINY = FluxShape(256, 2, 2, 64, 32)
"""Two heads, two blocks of either kind."""


def tiny_flux_checkpoint(seed: int) -> dict[str, Tensor]:
    """`FLUX_TINY` with random fp32 weights, keys as in the published file (no prefix)."""
    return checkpoint(FLUX_TINY, seed)


def checkpoint(shape: UNetShape | FluxShape, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights: key with prefix → tensor."""
    return {
        shape.prefix + name: weight(name, size, seed=seed).to(dtype, copy=True).contiguous()
        for name, size in shape.tensors()
    }


def diffusers_config(shape: UNetShape) -> dict[str, Any]:
    """Config of the diffusers `UNet2DConditionModel` that this UNet is.

    It has eight heads at every level, or, where its projections are matrices, heads of 64 channels.
    """
    attention = shape.attention
    widths = [multiplier * shape.channels for multiplier in shape.multipliers]
    config = {
        "in_channels": shape.latent_channels,
        "out_channels": shape.latent_channels,
        "block_out_channels": widths,
        "layers_per_block": shape.resnets,
        "cross_attention_dim": shape.context,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "transformer_layers_per_block": [depth or 1 for depth in attention],
    }
    if shape.linear:
        heads = [max(1, width // 64) for width in widths]
        config |= {"use_linear_projection": True, "attention_head_dim": heads}
    if shape.pooled:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": shape.pooled + 6 * SIZE_WIDTH,
        }
    return config


def seeded(name: str, shape: tuple[int, ...], *, seed: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
    """fp32 values, uniform with the given mean and standard deviation, that depend on (seed, name) alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return (torch.rand(shape, generator=generator) * 2 - 1) * (math.sqrt(3) * std) + mean


def weight(name: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """fp32 values for a tensor of such a name and shape that keep activations near unit size."""
    if len(shape) >= 2:
        return seeded(name, shape, seed=seed, std=0.7 / math.sqrt(math.prod(shape[1:])))
    if name.endswith(".bias"):
        return seeded(name, shape, seed=seed, std=0.05)
    return seeded(name, shape, seed=seed, std=0.1, mean=1.0)


def fresh_start(key: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """A LoRA tensor as ComfyUI starts it: up uniform within ±1/√rank, down and differences zero, alpha one."""
    if key.endswith(".lora_up.weight"):
        return seeded(f"fresh.{key}", shape, seed=seed, std=1 / math.sqrt(3 * shape[1]))
    return torch.full(shape, 1.0 if key.endswith(".alpha") else 0.0)


def random_start(key: str, shape: tuple[int, ...], *, seed: int) -> Tensor:
    """A LoRA tensor as if trained already: nothing is zero, so every factor receives a gradient; alpha two."""
    if key.endswith(".alpha"):
        return torch.full(shape, 2.0)
    return seeded(f"random.{key}", shape, seed=seed, std=0.05 if ".diff" in key else 0.2)


def fingerprint(key: str, tensor: Tensor) -> Tensor:
    """(5,) fp32: the norm of a tensor and its dot products with four fixed random vectors of unit variance."""
    values = tensor.detach().double().flatten()
    vectors = [seeded(f"fingerprint.{i}.{key}", (values.numel(),), seed=0).double() for i in range(4)]
    return torch.stack([values.norm(), *(values @ vector for vector in vectors)]).float()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes in order of the names, to tell whether two sets of tensors are the same."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def _layer(name: str, width: int, out: int, kernel: int | None = None) -> CheckpointShapes:
    """Weight and bias of a Linear, or of a convolution with a square kernel."""
    yield f"{name}.weight", (out, width) if kernel is None else (out, width, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> CheckpointShapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _resnet(name: str, width: int, out: int, embed: int) -> CheckpointShapes:
    yield from _norm(f"{name}.in_layers.0", width)
    yield from _layer(f"{name}.in_layers.2", width, out, 3)
    yield from _layer(f"{name}.emb_layers.1", embed, out)
    yield from _norm(f"{name}.out_layers.0", out)
    yield from _layer(f"{name}.out_layers.3", out, out, 3)
    if width != out:
        yield from _layer(f"{name}.skip_connection", width, out, 1)


def _transformer(name: str, width: int, context: int, depth: int, *, linear: bool) -> CheckpointShapes:
    yield from _norm(f"{name}.norm", width)
    yield from _layer(f"{name}.proj_in", width, width, None if linear else 1)
    for index in range(depth):
        yield from _transformer_layer(f"{name}.transformer_blocks.{index}", width, context)
    yield from _layer(f"{name}.proj_out", width, width, None if linear else 1)


def _transformer_layer(block: str, width: int, context: int) -> CheckpointShapes:
    for attention, keys in (("attn1", width), ("attn2", context)):
        yield f"{block}.{attention}.to_q.weight", (width, width)
        yield f"{block}.{attention}.to_k.weight", (width, keys)
        yield f"{block}.{attention}.to_v.weight", (width, keys)
        yield from _layer(f"{block}.{attention}.to_out.0", width, width)
    yield from _layer(f"{block}.ff.net.0.proj", width, 8 * width)
    yield from _layer(f"{block}.ff.net.2", 4 * width, width)
    for index in (1, 2, 3):
        yield from _norm(f"{block}.norm{index}", width)
