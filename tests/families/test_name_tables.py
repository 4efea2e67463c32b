"""Name tables are two-way: every tensor of the original layout once, every module of diffusers' model once."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorasmith.adapters.inject import Rule, plan_adapters
from lorasmith.families.base import FAMILIES
from lorasmith.families.files.original_weights import module_paths, weight_shapes
from lorasmith.families.loading import original_shapes
from lorasmith.families.parts.clip import released_paths, written_paths
from lorasmith.families.parts.unet_layout import original_unet_path, unet_config
from lorasmith.formats.names import ModelNames, OriginalName
from tests.covering import slow_except

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def unet(shape: models.UNetShape, linear: bool = False) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model: nn.Module = UNet2DConditionModel(**models.diffusers_config(shape), use_linear_projection=linear)
    return model


@cache
def flux(shape: models.FluxShape, guidance: bool = True) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model: nn.Module = FluxTransformer2DModel(
            in_channels=4 * shape.latent_channels,
            num_layers=shape.double,
            num_single_layers=shape.single,
            attention_head_dim=128,
            num_attention_heads=shape.hidden // 128,
            joint_attention_dim=shape.context,
            pooled_projection_dim=shape.pooled,
            guidance_embeds=guidance,
        )
    return model


@st.composite
def unet_shapes(draw: st.DrawFn) -> models.UNetShape:
    levels = draw(st.integers(1, 4))
    return models.UNetShape(
        channels=32,
        # Both layouts begin as wide as the first level.
        multipliers=(1, *draw(st.lists(st.integers(1, 3), min_size=levels - 1, max_size=levels - 1))),
        resnets=draw(st.integers(1, 3)),
        attention=tuple(draw(st.lists(st.booleans(), min_size=levels, max_size=levels))),
        context=draw(st.sampled_from([16, 768])),
    )


def originals(table: Mapping[str, OriginalName], model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Original tensor name → the rows of it that diffusers' parameters take, one entry for each."""
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        place = table[path]
        found[f"{place.path}.{leaf}"].append(place.rows or (0, parameter.shape[0]))
    return found


@pytest.mark.slow
@given(unet_shapes(), st.booleans())
def test_the_table_of_a_unet_is_a_bijection(shape: models.UNetShape, linear: bool) -> None:
    model = unet(shape, linear)
    table = FAMILIES["sd2" if linear else "sd1"].names(model, {}).denoiser
    sizes = dict(shape.tensors())

    assert list(table) == module_paths(model)
    assert originals(table, model) == {name: [(0, size[0])] for name, size in sizes.items()}


@given(unet_shapes())
def test_the_configuration_of_a_unet_is_read_off_its_shapes(shape: models.UNetShape) -> None:
    expected = models.diffusers_config(shape)
    sizes = dict(shape.tensors())
    found = unet_config(sizes, head_dim=None)

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    assert {key: plain(value) for key, value in found.items()} == {
        **expected,
        "use_linear_projection": False,
        "transformer_layers_per_block": [1] * len(expected["block_out_channels"]),
    }


def test_heads_of_version_2_are_64_wide() -> None:
    shape = models.UNetShape(320, (1, 2, 4, 4), 2, (True, True, True, False), context=1024)

    assert unet_config(dict(shape.tensors()), head_dim=64)["attention_head_dim"] == (5, 10, 20, 20)
    assert unet_config(dict(models.SD1_TINY.tensors()), head_dim=None)["attention_head_dim"] == 8


def test_a_path_of_no_unet_is_a_key_error() -> None:
    for path in ["up_blocks.0.resnets.0.norm3", "down_blocks.x.resnets.0.norm1", "conv_mid", ""]:
        with pytest.raises(KeyError):
            original_unet_path(path, layers_per_block=2, up_attention=(True, True))


@given(
    st.builds(
        models.FluxShape,
        hidden=st.sampled_from([128, 256]),
        double=st.integers(1, 3),
        single=st.integers(1, 3),
        context=st.just(16),
        pooled=st.just(8),
    )
)
def test_the_table_of_flux_covers_each_original_row_once(shape: models.FluxShape) -> None:
    model = flux(shape)
    table = FAMILIES["flux1"].names(model, {}).denoiser
    sizes = {name.replace(".scale", ".weight"): size for name, size in shape.tensors()}
    found = originals(table, model)

    assert list(table) == module_paths(model)
    assert found.keys() == sizes.keys()
    for name, rows in found.items():
        ends = [0, *(stop for _, stop in sorted(rows))]
        assert sorted(rows) == list(pairwise(ends)), name  # one after the other
        assert ends[-1] == sizes[name][0], name


def test_rows_of_flux_are_in_the_order_of_the_original() -> None:
    table = FAMILIES["flux1"].names(flux(models.FLUX_TINY), {}).denoiser
    block = "single_transformer_blocks.0"

    assert [table[f"{block}.{name}"].rows for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")] == [
        (0, 256),
        (256, 512),
        (512, 768),
        (768, 768 + 1024),
    ]
    assert [table[f"transformer_blocks.1.attn.add_{part}_proj"].rows for part in "qkv"] == [
        (0, 256),
        (256, 512),
        (512, 768),
    ]
    assert [path for path, place in table.items() if place.swap_halves] == ["norm_out.linear"]


def kohya(names: ModelNames) -> list[str]:
    """The names of a model's modules in kohya's files."""
    naming = {path: place.path for path, place in names.denoiser.items()}
    paths = (path if names.kohya_naming == "diffusers" else naming[path] for path in names.denoiser)
    return [f"lora_unet_{path.replace('.', '_')}" for path in paths]


@cache
def sd15() -> tuple[nn.Module, ModelNames]:
    model = unet(models.SD1_FULL)
    return model, FAMILIES["sd1"].names(model, {})


def targeted(preset: str) -> set[str]:
    """Names in kohya's files of what a preset targets in Stable Diffusion 1.5."""
    model, names = sd15()
    chosen = FAMILIES["sd1"].presets[preset]
    plan = plan_adapters(model, [Rule(chosen.include, chosen.exclude, chosen.linear_only)], rank=4)
    by_path = dict(zip(names.denoiser, kohya(names), strict=True))
    return {by_path[one.path] for one in plan.adapters}


def test_the_transformer_preset_is_what_sd_scripts_trains() -> None:
    record = json.loads((GOLDEN / "kohya_sd15_modules.json").read_text())

    assert len(record["unet"]) == 192
    assert sorted(targeted("transformer")) == record["unet"]


def test_the_convolutions_that_sd_scripts_adds_are_in_the_preset_of_everything() -> None:
    record = json.loads((GOLDEN / "kohya_sd15_modules.json").read_text())

    assert set(record["unet"]) | set(record["unet_conv"]) <= targeted("all")


@pytest.mark.parametrize(
    ("preset", "count"), [("attention", 128), ("attention+ff", 160), ("transformer", 192), ("all-linear", 184)]
)
def test_presets_of_sd15_target_what_they_say(preset: str, count: int) -> None:
    # 16 transformers of 8 attention and 2 feed-forward matrices and 2 projections (convolutions);
    # 22 resnets and the time embedding have 24 matrices more.
    assert len(targeted(preset)) == count


def test_text_encoder_names_are_those_of_sd_scripts() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    record = json.loads((GOLDEN / "kohya_sd15_modules.json").read_text())
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    model, _ = sd15()
    paths = FAMILIES["sd1"].names(model, {"text_encoder": encoder}).paths("text_encoder")

    assert sorted(f"lora_te_{path.replace('.', '_')}" for path in paths) == record["text_encoder"]


def test_models_without_text_encoders_know_the_released_ones() -> None:
    record = json.loads((GOLDEN / "kohya_sd15_modules.json").read_text())
    paths = sd15()[1].paths("text_encoder")
    assert sorted(f"lora_te_{path.replace('.', '_')}" for path in paths) == record["text_encoder"]
    assert len(FAMILIES["sd2"].names(sd15()[0], {}).paths("text_encoder")) == 23 * 6


def test_the_projection_of_the_pooled_text_stands_outside_the_text_model() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=3))
    assert set(written_paths(encoder)) == {*released_paths(3), "text_projection"}
    assert set(written_paths(encoder)) == set(released_paths(3, is_projected=True))


def test_flux_knows_its_encoders_by_the_paths_that_transformers_has() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    names = FAMILIES["flux1"].names(flux(models.FLUX_TINY), {})
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
        t5 = T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))
    assert set(names.paths("text_encoder")) == set(written_paths(clip))
    linear = {path for path, module in t5.named_modules() if isinstance(module, nn.Linear)}
    assert set(names.paths("text_encoder_2")) == linear
    assert names.text_encoders["text_encoder_2"].comfyui == ("t5xxl",)


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("attention", 19 * 8 + 38 * 3),
        ("attention+ff", 19 * 12 + 38 * 5),
        ("transformer", 19 * 14 + 38 * 6),
        ("all-linear", 19 * 14 + 38 * 6 + 10),
        ("all", 19 * 14 + 38 * 6 + 10),
    ],
)
def test_presets_of_flux_target_what_they_say(preset: str, count: int) -> None:
    # A double block has 8 attention, 4 feed-forward and 2 modulation matrices; a single block 3, 2 and 1;
    # around them are two input layers, three embedders of two matrices, and two of the output.
    chosen = FAMILIES["flux1"].presets[preset]
    model = flux(models.FluxShape(128, 19, 38, 16, 8))
    plan = plan_adapters(model, [Rule(chosen.include, linear_only=chosen.linear_only)], rank=4)

    assert len(plan.adapters) == count


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("attention", 28 * 5),
        ("attention+ff", 28 * 8),
        ("transformer", 28 * 8 + 4 * 8 + 1 + 2),
        ("all-linear", 264),  # the layers that the model's authors recommend
        (None, 264),
    ],
)
def test_presets_of_krea_2_target_what_they_say(preset: str | None, count: int) -> None:
    # A block of the model, as one of the text fusion, has 5 attention and 3 feed-forward matrices; the fusion has a
    # projector, the text input two matrices; around them are the picture's input, three of time, and the output.
    family = FAMILIES["krea2"]
    with torch.device("meta"):
        model = family.denoiser_class()()
    chosen = family.presets[preset or family.own_defaults.targets]
    assert len(plan_adapters(model, [chosen], rank=4).adapters) == count


@pytest.mark.parametrize(("name", "model"), [("sd1", unet(models.SD1_TINY)), ("flux1", flux(models.FLUX_TINY))])
def test_tables_list_shapes_for_every_module(name: str, model: nn.Module) -> None:
    names = FAMILIES[name].names(model, {})

    assert names.family == name
    assert names.weight_shapes == weight_shapes(model)
    assert names.weight_shapes.keys() == names.denoiser.keys()


RELEASED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "wan2.1 1.3B": ("wan", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 825, "1.42"),
    "wan2.1 14B": ("wan", {}, 1095, "14.29"),
    "wan2.2 5B": ("wan22-5b", {}, 825, "5.00"),
    "wan2.1 I2V 14B": ("wan-i2v", {}, 1303, "16.39"),
    "wan2.1 FLF2V 14B": ("wan-i2v", {"pos_embed_seq_len": 514}, 1304, "16.40"),
    "wan2.2 I2V A14B": ("wan-i2v", {"image_dim": None, "added_kv_proj_dim": None}, 1095, "14.29"),
    "hunyuanvideo 1.5": ("hunyuan-video15", {}, 1361, "8.33"),
    "ernie-image": ("ernie-image", {}, 409, "8.033490048"),  # its file has 14.96 GiB in bf16
    "qwen-image": ("qwen-image", {}, 1933, "20.430401088"),  # its folder's index says 40,860,802,176 bytes in bf16
    "qwen-image-2.1": ("qwen-image-2.1", {}, 297, "7.115124736"),  # its file has 14.2 GB in bf16
    "ideogram4": ("ideogram4", {}, 458, "9.3"),  # 9.3 billion by its authors
    # lumina_2_model_bf16.safetensors is 5,219,585,680 bytes: these, an unused norm of 2304 numbers, 42 KB of header.
    "lumina2": ("lumina2", {"axes_lens": (1536, 512, 512)}, 399, "2.609769152"),
    "chroma": ("chroma", {}, 643, "8.899983424"),  # 8.9 billion by its authors
}
"""Family, changes of its sizes, number of tensors in the original layout, and of parameters (10⁹)."""


@pytest.mark.parametrize("size", slow_except(RELEASED, "wan2.1 1.3B", "hunyuanvideo 1.5", "lumina2", "chroma"))
def test_released_sizes_are_those_that_were_published(size: str) -> None:
    """And the configuration is read from their shapes, which no other family takes for its own."""
    name, changes, count, billions = RELEASED[size]
    family = FAMILIES[name]
    denoiser = family.released_denoiser(**changes)
    shapes = original_shapes(family.table(denoiser), {k: tuple(t.shape) for k, t in denoiser.state_dict().items()})
    assert shapes is not None
    assert len(shapes) == count
    assert f"{sum(map(math.prod, shapes.values())) / 1e9:.{len(billions.partition('.')[2])}f}" == billions
    assert [one for one, known in FAMILIES.items() if known.recognises(shapes)] == [name]
    config = family.denoiser_config(shapes)
    assert {key: denoiser.config[key] for key in config} == config  # type: ignore[index, union-attr]
