"""ERNIE-Image: its released size, its schedule and time, and the encoder that two programs rotate differently."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from tiny_ernie_image import ERNIE_IMAGE, WIDTH
from torch import nn

from lorasmith.core.folders import Folders
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import PipelineConfigs
from lorasmith.families.loading import load_model
from lorasmith.families.locating import ModelFiles
from lorasmith.families.model_search import load_completed
from lorasmith.families.part_loading import load_text_encoder
from lorasmith.families.parts.language_models import hidden_states

FAMILY = FAMILIES["ernie-image"]
IDS = tuple(range(32, 32 + 258))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Rotary positions in the configuration of Ministral 3 3B."""


@pytest.mark.parametrize(("scheduler", "shift"), [({"shift": 4.0}, 4.0), ({"shift": 1.0}, 1.0), ({}, 3.0)])
def test_a_folder_has_the_shift_of_its_scheduler(scheduler: Mapping[str, Any], shift: float) -> None:
    schedule = FAMILY.diffusion_of_pipeline(PipelineConfigs("it", (), lambda part: scheduler)).schedule
    assert schedule.at(torch.tensor([0.5])).sigma.item() == pytest.approx(shift / (shift + 1))
    assert schedule.at_sigma(torch.tensor([0.25])).time.item() == 250


def test_times_keep_their_precision_beside_latents_in_bf16() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, **given: Any) -> tuple[torch.Tensor]:
            seen.append(given)
            return (given["hidden_states"],)

    latents = torch.zeros(2, 128, 2, 2, dtype=torch.bfloat16)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    FAMILY.predict(
        Watching(), latents, torch.tensor([601.0, 3.0]), Conditioning({"context": torch.zeros(2, 3, WIDTH)}, mask=mask)
    )
    assert seen[0]["timestep"].tolist() == [601.0, 3.0]
    assert seen[0]["text_lens"].tolist() == [2, 3]


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The encoder as the release has it, a Mistral 3 that sees pictures too, and its folder."""
    from transformers import Mistral3Config, Mistral3Model

    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 16}  # fmt: skip
    text = {"model_type": "ministral3", "vocab_size": 290, "hidden_size": WIDTH, "intermediate_size": 48,
            "num_hidden_layers": 3, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128,
            "rms_norm_eps": 1e-5, "sliding_window": None, "rope_parameters": YARN}  # fmt: skip
    model = Mistral3Model(Mistral3Config(vision_config=vision, text_config=text)).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        tensor.copy_(models.weight(name, tuple(tensor.shape), seed=0))
    folder = tmp_path_factory.mktemp("ernie") / "folder"
    pipeline = ERNIE_IMAGE.made()
    pipeline.text_encoder = model
    pipeline.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
def test_an_encoder_in_a_folder_follows_its_configuration(multimodal: tuple[Any, Path]) -> None:
    whole, folder = multimodal
    encoder = load_model(folder).components.text_encoders["text_encoder"]
    ours = hidden_states(encoder, IDS, (-2,))
    with torch.no_grad():
        expected = whole(input_ids=torch.tensor([IDS]), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(ours[:, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_encoder_in_a_file_has_plain_positions_as_in_comfyui(multimodal: tuple[Any, Path], tmp_path: Path) -> None:
    """Files have no configuration; the longer the prompt, the more its last words differ."""
    _, folder = multimodal
    in_folder = load_model(folder).components.text_encoders["text_encoder"]
    tensors = {f"model.{name}": one.contiguous() for name, one in in_folder.state_dict().items()}
    vocabulary = {name: one for name, one in load_file(_encoder_file(tmp_path)).items() if name == "tekken_model"}
    loaded = load_text_encoder([save(tmp_path / "plain.safetensors", {**tensors, **vocabulary})], "flux2")
    assert loaded.family is FAMILY
    plain, turned = (hidden_states(one, IDS, (-2,)) for one in (loaded.encoders.modules["text_encoder"], in_folder))
    torch.testing.assert_close(plain[:, :1], turned[:, :1])
    assert (plain[:, -1] - turned[:, -1]).norm() > 1e-3 * turned[:, -1].norm()


def _encoder_file(folder: Path) -> Path:
    return ERNIE_IMAGE.saved(folder)["text_encoder"]


@pytest.mark.slow
def test_the_prompt_enhancer_is_not_taken_for_the_encoder(tmp_path: Path) -> None:
    """It has the same tensors, lies in the same folder and comes first by name."""
    files = ERNIE_IMAGE.saved(tmp_path)
    usual = files["text_encoder"]
    shutil.copy(usual, usual.with_name("ernie-image-prompt-enhancer.safetensors"))
    completed = load_completed(ModelFiles(str(files["transformer"])), Folders(tmp_path))
    assert completed.files.text_encoders == (str(usual),)
    assert [one.choices for one in completed.found] == [2, 1]
