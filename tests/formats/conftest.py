"""Models for the layout tests: a real, tiny UNet with a table written for it here, and the table of an invented
transformer whose original checkpoint fuses q, k, v."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.families.parts.unet_layout import UNET_LIMITS
from lorasmith.formats.names import EncoderNames, ModelNames, OriginalName

WIDTH = 24
"""Hidden width of the invented transformer."""


@pytest.fixture(scope="session")
def make_unet() -> Callable[[], nn.Module]:
    from diffusers import UNet2DConditionModel

    def make() -> nn.Module:
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=48,
            attention_head_dim=4,
        ).eval()

    return make


@pytest.fixture(scope="session")
def unet_names(make_unet: Callable[[], nn.Module]) -> ModelNames:
    shapes = {
        path: tuple(module.weight.shape)
        for path, module in make_unet().named_modules()
        if isinstance(getattr(module, "weight", None), Tensor)
    }
    encoder = "text_model.encoder.layers.{}.{}"
    parts = (*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    paths = tuple(encoder.format(layer, part) for layer in range(2) for part in parts)
    return ModelNames(
        family="sd1",
        denoiser={path: OriginalName(original_unet_path(path)) for path in shapes},
        weight_shapes=shapes,
        text_encoders={"text_encoder": EncoderNames(paths, ("lora_te_", "lora_te1_"), ("clip_l", "clip_h"), True)},
        peft_prefix="unet",
        limits=UNET_LIMITS,
    )


@pytest.fixture(scope="session")
def sdxl_names(unet_names: ModelNames) -> ModelNames:
    """The same UNet under SDXL's conventions: original names, two text encoders."""
    encoder = unet_names.text_encoders["text_encoder"]
    return replace(
        unet_names,
        family="sdxl",
        text_encoders={
            "text_encoder": replace(encoder, kohya=("lora_te1_", "lora_te_")),
            "text_encoder_2": EncoderNames(encoder.paths, ("lora_te2_",), ("clip_g",)),
        },
        kohya_naming="original",
    )


@pytest.fixture(scope="session")
def flux_names() -> ModelNames:
    return flux_table(WIDTH)


@pytest.fixture(scope="session")
def wide_flux_names() -> ModelNames:
    """The same table at Flux.1's real width, which diffusers' converter takes for granted."""
    return flux_table(3072)


def flux_table(width: int) -> ModelNames:
    table: dict[str, OriginalName] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def add(path: str, original: str, shape: tuple[int, ...], start: int | None = None, swap: bool = False) -> None:
        table[path] = OriginalName(original, None if start is None else (start, start + shape[0]), swap)
        shapes[path] = shape

    square = (width, width)
    for i in range(2):
        for place, part in enumerate("qkv"):
            add(f"transformer_blocks.{i}.attn.to_{part}", f"double_blocks.{i}.img_attn.qkv", square, place * width)
            add(f"single_transformer_blocks.{i}.attn.to_{part}", f"single_blocks.{i}.linear1", square, place * width)
        add(f"transformer_blocks.{i}.attn.to_out.0", f"double_blocks.{i}.img_attn.proj", square)
        add(f"single_transformer_blocks.{i}.proj_mlp", f"single_blocks.{i}.linear1", (4 * width, width), 3 * width)
        add(f"single_transformer_blocks.{i}.proj_out", f"single_blocks.{i}.linear2", (width, 5 * width))
    add("norm_out.linear", "final_layer.adaLN_modulation.1", (2 * width, width), swap=True)
    return ModelNames(
        family="flux",
        denoiser=table,
        weight_shapes=shapes,
        kohya_naming="original",
        peft_prefix="transformer",
    )


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., AdapterWeights]:
    """Random adapters for a weight of a given shape; no tensor has a zero entry."""
    return random_adapter


@pytest.fixture(scope="session")
def make_state() -> Callable[..., AdapterState]:
    """A LoRA with random adapters on the given modules, all with a weight, by default."""

    def make(
        names: ModelNames,
        paths: Sequence[str] | None = None,
        *,
        algorithm: str = "lora",
        rank: int = 4,
        alpha: float | None = 2.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> AdapterState:
        generator = torch.Generator().manual_seed(seed)
        wanted = [p for p, shape in names.weight_shapes.items() if len(shape) > 1] if paths is None else paths
        return AdapterState(
            {
                ModuleRef(DENOISER, path): random_adapter(
                    names.weight_shapes[path], algorithm, rank, alpha, generator, dtype=dtype
                )
                for path in wanted
            }
        )

    return make


@pytest.fixture(scope="session")
def delta() -> Callable[[AdapterWeights], Tensor]:
    """ΔW of a LoRA or LoHa, by definition, as (out, in·kh·kw)."""
    return weight_change


@pytest.fixture(scope="session")
def merged() -> Callable[[AdapterWeights, Tensor], Tensor]:
    """A weight (out, in) with an adapter folded in, by definition, in double precision."""
    return changed_weight


def random_adapter(
    shape: tuple[int, ...],
    algorithm: str,
    rank: int,
    alpha: float | None,
    generator: torch.Generator,
    *,
    variant: str = "",
    dtype: torch.dtype = torch.float32,
) -> AdapterWeights:
    out, inside, kernel = shape[0], shape[1], shape[2:]
    flat = inside * (kernel[0] * kernel[1] if kernel else 1)
    ones = (1,) * len(kernel)

    def values(*size: int) -> Tensor:
        return (torch.rand(size, generator=generator) * 0.2 + 0.05).to(dtype)

    match algorithm:
        case "lora" if variant == "tucker" and kernel:
            tensors = {
                "down": values(rank, inside, *ones),
                "up": values(out, rank, *ones),
                "mid": values(rank, rank, *kernel),
            }
        case "lora":
            tensors = {"down": values(rank, inside, *kernel), "up": values(out, rank, *ones)}
            if variant == "dora_out":
                tensors["dora_scale"] = values(out, 1, *ones)
            if variant == "dora_in":
                tensors["dora_scale"] = values(1, inside, *ones)
        case "loha":
            sizes = {"hada_w1_a": (out, rank), "hada_w1_b": (rank, flat), "hada_w2_a": (out, rank)}
            tensors = {name: values(*size) for name, size in {**sizes, "hada_w2_b": (rank, flat)}.items()}
        case "lokr":
            factor = 2 if out % 3 or inside % 2 else 6  # so that a fused q, k, v can be cut
            tensors = {
                "lokr_w1": values(factor, 2),
                "lokr_w2_a": values(out // factor, rank),
                "lokr_w2_b": values(rank, flat // 2),
            }
        case "oft":
            block = rank if out % rank == 0 else 1
            tensors = {"oft_blocks": values(out // block, block, block)}
        case "boft":
            count = 4 if out % 8 == 0 else 2
            tensors = {"oft_blocks": values(2, count, out // count, out // count), "rescale": values(out, 1, *ones)}
        case "glora":
            sizes = {"a1": (flat, rank), "a2": (rank, flat), "b1": (out, rank), "b2": (rank, flat)}
            tensors = {name: values(*size) for name, size in sizes.items()}
        case _:
            raise AssertionError(algorithm)
    return AdapterWeights(algorithm, tensors, alpha)


def weight_change(weights: AdapterWeights) -> Tensor:
    tensors = {name: tensor.double() for name, tensor in weights.tensors.items()}
    if weights.algorithm == "lora":
        rank = tensors["down"].shape[0]
        if "mid" in tensors:
            product = torch.einsum(
                "om,mnij,nc->ocij", tensors["up"].flatten(1), tensors["mid"], tensors["down"].flatten(1)
            ).flatten(1)
        else:
            product = tensors["up"].flatten(1) @ tensors["down"].flatten(1)
    else:
        rank = tensors["hada_w1_b"].shape[0]
        product = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    return product * (1.0 if weights.alpha is None else weights.alpha / rank)


def changed_weight(weights: AdapterWeights, weight: Tensor) -> Tensor:
    weight = weight.double()
    tensors = {name: tensor.double() for name, tensor in weights.tensors.items()}
    match weights.algorithm:
        case "lokr":
            second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
            scale = 1.0 if weights.alpha is None else weights.alpha / tensors["lokr_w2_b"].shape[0]
            return weight + scale * torch.kron(tensors["lokr_w1"], second)
        case "oft":
            skew = tensors["oft_blocks"] - tensors["oft_blocks"].mT
            one = torch.eye(skew.shape[-1], dtype=torch.float64)
            rotation = torch.block_diag(*((one + skew) @ torch.linalg.inv(one - skew)))
            return rotation.T @ weight
        case "glora":
            scale = 1.0 if weights.alpha is None else weights.alpha / tensors["b2"].shape[0]
            inputs, outputs = tensors["a1"] @ tensors["a2"], tensors["b1"] @ tensors["b2"]
            return weight + scale * (weight @ inputs + outputs)
        case _:
            return weight + weight_change(weights)


def original_unet_path(path: str) -> str:
    """The original name of a module in a two-level UNet with one resnet a level (two in the way up)."""
    inner = (
        ("norm1", "in_layers.0"),
        ("conv1", "in_layers.2"),
        ("time_emb_proj", "emb_layers.1"),
        ("norm2", "out_layers.0"),
        ("conv2", "out_layers.3"),
        ("conv_shortcut", "skip_connection"),
    )
    outer = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    }
    if path in outer:
        return outer[path]
    blocks = {
        "down_blocks.0.resnets.0": "input_blocks.1.0",
        "down_blocks.0.attentions.0": "input_blocks.1.1",
        "down_blocks.1.resnets.0": "input_blocks.3.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "up_blocks.0.resnets.0": "output_blocks.0.0",
        "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.1.resnets.0": "output_blocks.2.0",
        "up_blocks.1.resnets.1": "output_blocks.3.0",
        "up_blocks.1.attentions.0": "output_blocks.2.1",
        "up_blocks.1.attentions.1": "output_blocks.3.1",
    }
    block = re.match(r"(\w+_block)(s\.\d+)?\.\w+\.\d+", path)
    assert block is not None, path
    rest = path[block.end() :]
    if ".resnets." in path:
        rest = f".{dict(inner)[rest[1:]]}"
    return blocks[block.group()] + rest
