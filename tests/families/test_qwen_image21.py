"""Qwen-Image 2.1: references in its text, captions of different length, ComfyUI's fused layer, refused variants."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from tiny_qwen_image21 import SYSTEM, called
from torch import Tensor
from transformer_models import Case

from lorasmith.core.errors import DataError, LoraError, ModelError
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.loading import load_model
from lorasmith.families.parts.encoders import qwen_tokenizer
from lorasmith.families.parts.vision_towers import PICTURE, QWEN3_TOWER
from lorasmith.formats.lora_file import load_lora

FAMILY = FAMILIES["qwen-image-2.1"]
REFERENCES = [(4, 6), (6, 2), (2, 2)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of("qwen-image-2.1", tmp_path_factory.mktemp("qwen21"))


def given(tokens: int, references: int, batch: int = 1) -> tuple[Tensor, list[Tensor], Conditioning]:
    context = models.seeded("context", (batch, tokens, 32), seed=0)
    controls = [models.seeded(f"{i}", (batch, 64, *REFERENCES[i]), seed=0) for i in range(references)]
    return context, controls, Conditioning({"context": context}).with_controls(controls)


@torch.no_grad()
@pytest.mark.parametrize("references", [0, 1, 2, 3])
def test_predictions_with_references_are_those_of_diffusers_own_call(case: Case, references: int) -> None:
    context, controls, conditioning = given(40, references, batch=2)
    latents, time = models.seeded("latents", (2, 64, 4, 6), seed=0), torch.tensor([0.6, 0.3])
    ours = case.ours.denoiser.predict(latents, time, conditioning)
    places = [8, 14, 20][:references]
    expected = called(case.tiny.parts()["transformer"], latents, context, time, controls, places)
    assert (ours - expected).norm() / expected.norm() <= 1e-6


@torch.no_grad()
def test_a_shorter_caption_of_a_batch_is_predicted_as_alone(case: Case) -> None:
    controls = given(40, 1)[2].pictures
    captions = [
        Conditioning({"context": models.seeded("c", (1, tokens, 32), seed=tokens)}).with_pictures(controls)
        for tokens in (40, 12)
    ]
    latents, time = models.seeded("latents", (2, 64, 4, 6), seed=0), torch.tensor([0.6, 0.3])
    together = case.ours.denoiser.predict(latents, time, FAMILY.join(captions))
    alone = [case.ours.denoiser.predict(latents[i : i + 1], time[i : i + 1], one) for i, one in enumerate(captions)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_references_stand_where_the_prompt_has_them() -> None:
    tokenizer, sight = qwen_tokenizer(), FAMILY.controls[0].sight
    assert sight is not None
    ids = tokenizer(sight.prompt("a fox", range(1, 11))).input_ids[len(tokenizer(SYSTEM).input_ids) :]
    words = [index - before for before, index in enumerate(i for i, token in enumerate(ids) if token == PICTURE)]
    assert words == FAMILY.places(10)  # type: ignore[attr-defined]


def test_prompts_with_pictures_are_seen_and_leave_their_tokens_to_the_references(case: Case) -> None:
    pictures = [torch.zeros(1, 3, 32, 64), torch.ones(1, 3, 64, 32)]
    sight = FAMILY.controls[0].sight
    seen = case.ours.text_encoder.encode("a fox", pictures, sight=sight).tensors["context"]
    other = case.ours.text_encoder.encode("a fox", [-one for one in pictures], sight=sight).tensors["context"]
    tokenizer = qwen_tokenizer()
    assert sight is not None
    expected = len(tokenizer(sight.prompt("a fox", (1, 2))).input_ids) - len(tokenizer(SYSTEM).input_ids) - 2
    assert seen.shape == other.shape == (1, expected, 32)
    assert torch.equal(seen[:, :8], other[:, :8]) and not torch.equal(seen[:, 8:], other[:, 8:])


def test_a_file_of_comfyui_with_fused_gates_is_the_same_denoiser(case: Case, tmp_path: Path) -> None:
    tensors = load_file(case.files["transformer"])
    for block in range(2):
        stem = f"transformer_blocks.{block}.img_mlp."
        gate, up = (tensors.pop(f"{stem}{leaf}.weight") for leaf in ("gate_layer", "proj"))
        tensors[f"{stem}gate_up.weight"] = torch.cat((gate, up))
    model = load_model(save(tmp_path / "fused.safetensors", tensors))
    state = case.ours.components.denoiser.state_dict()
    assert all(torch.equal(state[name], one) for name, one in model.components.denoiser.state_dict().items())


def test_other_variants_and_too_many_references_are_refused_in_a_sentence(case: Case, tmp_path: Path) -> None:
    tensors = load_file(case.files["transformer"])
    tensors["img_in.weight"] = torch.zeros(64, 128)
    with pytest.raises(ModelError, match=r"has 64 input channels, but this model has 128: it is another"):
        load_model(save(tmp_path / "other.safetensors", tensors))
    with pytest.raises(DataError, match=r"takes at most 10 controls, got 11"):
        case.ours.denoiser.check_conditionings([given(40, 0)[2].with_controls([torch.zeros(1, 64, 2, 2)] * 11)])
    _, _, conditioning = given(5, 1)
    with pytest.raises(DataError, match=r"has references in the text, which has 5 tokens, fewer than 8; encode"):
        case.ours.denoiser.predict(torch.zeros(1, 64, 4, 4), torch.tensor([0.5]), conditioning)


@pytest.mark.parametrize(("trained", "loaded", "title"), [
    ("qwen-image", "qwen-image-2.1", "Qwen-Image"), ("qwen-image-2.1", "qwen-image", "Qwen-Image 2.1"),
])  # fmt: skip
def test_a_lora_of_the_other_version_is_refused_where_their_widths_are_the_same_too(
    tmp_path: Path, trained: str, loaded: str, title: str
) -> None:
    its, ours = (Case.of(name, tmp_path).ours.names for name in (trained, loaded))
    assert its.weight_shapes["transformer_blocks.0.attn.to_q"] == ours.weight_shapes["transformer_blocks.0.attn.to_q"]
    blocks = {path: shape for path, shape in its.weight_shapes.items() if path.startswith("transformer_blocks.")}
    tensors = {}
    for path, shape in blocks.items():
        if len(shape) == 2:
            stem = f"diffusion_model.{path}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = (
                torch.ones(2, shape[1]), torch.ones(shape[0], 2)
            )  # fmt: skip
    file = save(tmp_path / "dog.safetensors", tensors)
    assert load_lora(file, its).unknown == {}
    with pytest.raises(
        LoraError, match=rf"looks like a LoRA for {title}: .* are not in the loaded {loaded} model; load"
    ):
        load_lora(file, ours)


def test_the_tower_of_8b_has_its_layers() -> None:
    shapes = {"patch_embed.proj.weight": (1152, 3, 2, 16, 16), QWEN3_TOWER.inner: (4304, 1152)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors[QWEN3_TOWER.width] = torch.empty(4096, 4608, device="meta")
    tensors["blocks.26.norm1.weight"] = torch.empty(1152, device="meta")
    assert QWEN3_TOWER._config(tensors)["deepstack_visual_indexes"] == [8, 16, 24]
