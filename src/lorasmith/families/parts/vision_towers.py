"""The parts of Qwen2.5-VL and Qwen3-VL that see pictures: their networks, and prompts with pictures.

A picture is cut into patches, from which the tower makes one token for each square of 2×2 patches. These stand in the
prompt in place of `<|image_pad|>`; their rotary positions have three axes, of which the language model's own network
has one. Qwen3-VL adds features of some layers of the tower to the states after its first layers (DeepStack, Meng et
al. 2024, arXiv:2406.04334), before they are read, as in ComfyUI; transformers reads them before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lorasmith.core.placement import device_of
from lorasmith.families.files.original_weights import PartSource, block_count, build
from lorasmith.families.parts.clip import CLIP_MEAN, CLIP_STD

PICTURE = 151655
"""Token `<|image_pad|>`."""

_PREFIXES = ("visual.", "model.visual.")


@dataclass(frozen=True, kw_only=True)
class TowerKind:
    """A vision tower of files and folders."""

    architecture: str  # of the whole model, in transformers
    classes: tuple[str, str]  # of its configuration and of the network, in transformers
    mean: tuple[float, float, float]  # of the colours of pixels in [0, 1], as is `std`
    std: tuple[float, float, float]
    axes: tuple[int, ...]  # of 64 frequencies of the language model's positions: 0 for time, 1 for y, 2 for x
    inner: str  # matrix that gives the inner width of a block
    width: str  # matrix that gives the width of the result
    settings: Mapping[str, Any]  # of its configuration, for towers from files
    # Blocks of DeepStack by the number of all, where they vary.
    deep: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def found_in(self, source: PartSource) -> VisionTower | None:
        """The tower in an encoder's tensors; None if it is not there."""
        prefix = next((prefix for prefix in _PREFIXES if f"{prefix}patch_embed.proj.weight" in source.tensors), None)
        if prefix is None:
            return None
        own = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items() if name.startswith(prefix)}
        return VisionTower(self, replace(source, tensors=own))

    def build(self, source: PartSource) -> nn.Module:
        """The network of a tower's tensors. Raises ModelError if some are missing or of wrong shape."""
        place = f"transformers.models.{self.architecture}"  # releases before 5.24 export not all of it
        modules = (f"{place}.configuration_{self.architecture}", f"{place}.modeling_{self.architecture}")
        config_class, network = (
            getattr(import_module(module), name) for module, name in zip(modules, self.classes, strict=True)
        )

        def make() -> nn.Module:
            settings = (source.config or {}).get("vision_config") or self._config(source.tensors)
            module: nn.Module = network(
                config_class(**{key: setting for key, setting in settings.items() if key != "model_type"})
            )
            return module

        return build(make, lambda _: source.tensors, where=source.where)

    def _config(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            "hidden_size": tensors["patch_embed.proj.weight"].shape[0],
            "depth": block_count(tensors, "blocks."),
            "intermediate_size": tensors[self.inner].shape[0],
            "out_hidden_size": tensors[self.width].shape[0],
        }
        if "pos_embed.weight" in tensors:
            found["num_position_embeddings"] = tensors["pos_embed.weight"].shape[0]
        deep = self.deep.get(found["depth"])
        return {**found, **self.settings, **({} if deep is None else {"deepstack_visual_indexes": list(deep)})}


@dataclass(frozen=True, eq=False)
class VisionTower:
    """A vision tower beside its language model, built when it is used."""

    kind: TowerKind
    source: PartSource

    @cached_property
    def module(self) -> Any:
        """Its network. Raises ModelError as `TowerKind.build`."""
        return self.kind.build(self.source)

    @contextlib.contextmanager
    def seen(self, model: Any, ids: Sequence[int], pictures: Sequence[Tensor]) -> Iterator[Tensor]:
        """Inside the context, `model` has the positions and features of a prompt with pictures.

        Yields the embeddings of its tokens, (1, tokens, width).
        """
        device, merge = device_of(model), self.module.config.spatial_merge_size
        patches = [self._patches(picture) for picture in pictures]
        grids = torch.tensor([grid for _, grid in patches], device=device)
        seen = self.module(torch.cat([patch for patch, _ in patches]).to(device), grid_thw=grids)
        counts = (grids.prod(1) // merge**2).tolist()
        sizes = iter(counts)
        tokens = [token for token_id in ids for token in [token_id] * (next(sizes) if token_id == PICTURE else 1)]
        is_picture = torch.tensor([tokens], device=device) == PICTURE
        embedded: Tensor = model.embed_tokens(torch.tensor([tokens], device=device))
        embedded = embedded.masked_scatter(is_picture[..., None], seen.pooler_output.to(embedded))
        positions = token_positions(ids, [(h // merge, w // merge) for _, h, w in grids.tolist()]).to(device)
        hooks = [model.rotary_emb.register_forward_hook(self._rotated(positions))]
        for layer, features in enumerate(getattr(seen, "deepstack_features", None) or ()):
            # Before those by which transformers reads the states.
            hooks.append(model.layers[layer].register_forward_hook(_added(is_picture, features), prepend=True))
        try:
            yield embedded
        finally:
            for hook in hooks:
                hook.remove()

    def _patches(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches (rows · columns, 3 · 2 · patch²) of pixels (1, 3, height, width) in [−1, 1], and (1, rows, columns).

        Four that become a token follow each other. Frames are taken by two; a picture is both of them.
        """
        side, merge = self.module.config.patch_size, self.module.config.spatial_merge_size
        mean, std = (
            torch.tensor(constants, device=pixels.device)[:, None, None]
            for constants in (self.kind.mean, self.kind.std)
        )
        scaled = (pixels[0] / 2 + 0.5 - mean) / std
        rows, columns = (length // side for length in pixels.shape[-2:])
        cut = scaled.reshape(3, rows // merge, merge, side, columns // merge, merge, side).permute(1, 4, 2, 5, 0, 3, 6)
        both = cut.reshape(rows * columns, 3, 1, side, side).expand(-1, -1, 2, -1, -1)
        return both.reshape(rows * columns, -1), (1, rows, columns)

    def _rotated(self, positions: Tensor) -> Any:
        """A hook on a rotary embedding, which gives it three axes of positions."""

        def hook(rotary: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            half = output[0].shape[-1] // 2
            axes = torch.tensor(self.kind.axes[:half], device=positions.device).repeat(2)
            # (1, tokens, width) of each axis, of which each frequency takes its own
            each = [rotary.forward(inputs[0], axis[None]) for axis in positions]
            cos, sin = (torch.stack(parts, dim=-1) for parts in zip(*each, strict=True))
            chosen = axes.expand(*cos.shape[:-1])[..., None]
            return cos.gather(-1, chosen)[..., 0], sin.gather(-1, chosen)[..., 0]

        return hook


def _added(is_picture: Tensor, features: Tensor) -> Any:
    """A hook on a layer, which adds features (pictures' tokens, width) to its states."""

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.masked_scatter(is_picture[..., None], output[is_picture] + features.to(output))

    return hook


def token_positions(ids: Sequence[int], grids: Sequence[tuple[int, int]]) -> Tensor:
    """(3, tokens) positions (time, y, x) of a prompt whose pictures have `grids` (rows, columns) of tokens.

    A word has one number on all axes. A picture's count from the number after the words before it, and words after it
    from the largest of them.
    """
    rest, start, parts = iter(grids), 0, list[Tensor]()
    for token in ids:
        if token != PICTURE:
            parts.append(torch.full((3, 1), start))
            start += 1
            continue
        rows, columns = next(rest)
        parts.append(torch.cartesian_prod(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns)).T + start)
        start += max(rows, columns)
    return torch.cat(parts, dim=1)


QWEN25_TOWER = TowerKind(
    architecture="qwen2_5_vl",
    classes=("Qwen2_5_VLVisionConfig", "Qwen2_5_VisionTransformerPretrainedModel"),
    mean=CLIP_MEAN,
    std=CLIP_STD,
    axes=(0,) * 16 + (1,) * 24 + (2,) * 24,
    inner="blocks.0.mlp.gate_proj.weight",
    width="merger.mlp.2.weight",
    settings={"num_heads": 16, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
)

QWEN3_TOWER = TowerKind(
    architecture="qwen3_vl",
    classes=("Qwen3VLVisionConfig", "Qwen3VLVisionModel"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    axes=(*(0, 1, 2) * 20, 0, 0, 0, 0),
    inner="blocks.0.mlp.linear_fc1.weight",
    width="merger.linear_fc2.weight",
    settings={"num_heads": 16, "deepstack_visual_indexes": [5, 11, 17]},  # of the 4B model
    deep={27: (8, 16, 24)},  # of the 8B model
)
