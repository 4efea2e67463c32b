from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sdxl_models
import torch
from flux_files import save_flux_files
from safetensors.torch import save_file

from lorasmith.core.errors import ModelError
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model, TextEncoder
from lorasmith.families.part_loading import load_text_encoder


@pytest.fixture(scope="module")
def flux_clip(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    files = save_flux_files(tmp_path_factory.mktemp("flux"))
    return load_text_encoder([files["clip_l"], files["t5xxl"]], "flux")


@pytest.fixture(scope="module")
def sdxl_clip(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    file = tmp_path_factory.mktemp("sdxl") / "tiny-sdxl.safetensors"
    return load_model(sdxl_models.saved_checkpoint(file)).text_encoder


def test_a_prompt_becomes_one_conditioning_with_its_text(bench: Any, tiny: Model) -> None:
    (plain,) = bench.one("CLIPTextEncode", text="a fox", clip=tiny.text_encoder)
    (weighted,) = bench.one("CLIPTextEncode", text="a (fox:1.4)", clip=tiny.text_encoder)
    assert plain.text == "a fox"
    assert plain.tensors["context"].shape == weighted.tensors["context"].shape
    assert not torch.equal(plain.tensors["context"], weighted.tensors["context"])


def test_embeddings_are_read_from_their_folder(bench: Any, tiny: Model) -> None:
    folder = bench.folders.base / "models" / "embeddings"
    folder.mkdir(parents=True)
    width = tiny.text_encoder.place_of("text_encoder").width  # type: ignore[union-attr]
    save_file({"clip_l": torch.ones(2, width)}, folder / "word.safetensors")

    def context(text: str) -> torch.Tensor:
        (found,) = bench.one("CLIPTextEncode", text=text, clip=tiny.text_encoder)
        assert found.text == text
        tensor: torch.Tensor = found.tensors["context"]
        return tensor

    assert not torch.equal(context("a embedding:word cat"), context("a cat"))
    assert bench.messages("warning") == []
    assert torch.equal(context("a embedding:none cat"), context("a cat"))
    (warning,) = bench.messages("warning")
    assert warning.startswith("no 'none' among the embeddings; put its file into")


def test_stopping_a_layer_earlier_skips_one(bench: Any, tiny: Model) -> None:
    last = bench.one("CLIPSetLastLayer", clip=tiny.text_encoder, stop_at_clip_layer=-1)
    skipped = bench.one("CLIPSetLastLayer", clip=tiny.text_encoder, stop_at_clip_layer=-2)
    assert [clip.encoding.skip_layers for clip in (last, skipped, tiny.text_encoder)] == [0, 1, 0]
    contexts = [
        bench.one("CLIPTextEncode", text="a fox", clip=clip)[0].tensors["context"]
        for clip in (tiny.text_encoder, skipped)
    ]
    assert not torch.allclose(*contexts)


def test_a_model_without_text_encoder_is_refused(bench: Any, tiny: Model) -> None:
    bare = replace(tiny, components=replace(tiny.components, text_encoders={}))
    with pytest.raises(ModelError, match="needs the text encoder clip_l"):
        bench.call("CLIPTextEncode", text="a fox", clip=bare.text_encoder)


def test_flux_has_a_prompt_for_each_encoder_and_its_guidance(bench: Any, flux_clip: TextEncoder) -> None:
    def encoded(clip_l: str, t5xxl: str) -> Conditioning:
        (one,) = bench.one("CLIPTextEncodeFlux", clip=flux_clip, clip_l=clip_l, t5xxl=t5xxl, guidance=2.5)
        return one

    both = encoded("a fox", "a red bus")
    assert both.tensors["guidance"].tolist() == [2.5]
    assert torch.equal(both.tensors["pooled"], encoded("a fox", "").tensors["pooled"])
    assert torch.equal(both.tensors["context"], encoded("", "a red bus").tensors["context"])
    assert not torch.equal(both.tensors["context"], encoded("", "a fox").tensors["context"])
    (same,) = bench.one("CLIPTextEncode", clip=flux_clip, text="a fox")
    assert torch.equal(same.tensors["context"], encoded("a fox", "a fox").tensors["context"])


@pytest.mark.slow
def test_sdxl_has_a_prompt_for_each_encoder_and_its_sizes(bench: Any, sdxl_clip: TextEncoder) -> None:
    sizes = {"width": 640, "height": 480, "crop_w": 8, "crop_h": 16, "target_width": 1024, "target_height": 768}
    (one,) = bench.one("CLIPTextEncodeSDXL", clip=sdxl_clip, **sizes, text_g="a fox", text_l="a red bus")
    assert one.tensors["time_ids"].tolist() == [[480, 640, 16, 8, 768, 1024]]
    (large,) = bench.one("CLIPTextEncode", clip=sdxl_clip, text="a fox")
    (small,) = bench.one("CLIPTextEncode", clip=sdxl_clip, text="a red bus")
    assert torch.equal(one.tensors["pooled"], large.tensors["pooled"])
    assert torch.equal(one.tensors["context"][..., 64:], large.tensors["context"][..., 64:])
    assert torch.equal(one.tensors["context"][..., :64], small.tensors["context"][..., :64])


def test_prompts_of_encoders_that_the_model_lacks_are_ignored_or_refused(
    bench: Any, tiny: Model, sdxl_clip: TextEncoder
) -> None:
    prompts = {"clip_l": "a red bus", "clip_g": "a fox", "t5xxl": "a tree"}
    (one,) = bench.one("CLIPTextEncodeSD3", clip=sdxl_clip, **prompts, empty_padding="none")
    (large,) = bench.one("CLIPTextEncode", clip=sdxl_clip, text="a fox")
    assert torch.equal(one.tensors["pooled"], large.tensors["pooled"])
    with pytest.raises(ModelError, match=r"for models with the text encoder t5xxl, but lorasmith-tiny encodes for St"):
        bench.call("CLIPTextEncodeFlux", clip=tiny.text_encoder, clip_l="", t5xxl="")
    with pytest.raises(ModelError, match=r"the text encoder clip_g, but .* use CLIP Text Encode \(Prompt\)"):
        bench.call("CLIPTextEncodeSDXL", clip=tiny.text_encoder, text_g="", text_l="")


@pytest.mark.parametrize("system", ["superior", "alignment"])
def test_lumina_reads_an_instruction_first(bench: Any, tiny: Model, system: str) -> None:
    (one,) = bench.one("CLIPTextEncodeLumina2", clip=tiny.text_encoder, system_prompt=system, user_prompt="a fox")
    assert one.text is not None
    assert one.text.startswith("You are an assistant designed to generate ")
    assert one.text.endswith("prompts. <Prompt Start> a fox")
    assert ("superior images" in one.text) == (system == "superior")


def test_padding_of_t5_is_set_by_length_or_by_padding(bench: Any, flux_clip: TextEncoder) -> None:
    def tokens(**options: int) -> int:
        clip = bench.one("T5TokenizerOptions", clip=flux_clip, **options)
        return int(bench.one("CLIPTextEncode", clip=clip, text="a fox")[0].tensors["context"].shape[1])

    alone = tokens(min_padding=0, min_length=0)
    assert alone < 10
    assert tokens(min_padding=3, min_length=0) == alone + 3
    assert tokens(min_padding=3, min_length=40) == 40
    assert bench.one("CLIPTextEncode", clip=flux_clip, text="a fox")[0].tensors["context"].shape[1] == 256
