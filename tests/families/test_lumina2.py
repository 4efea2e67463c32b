"""Lumina 2: its encoder's attention, its vocabulary, its time, and what tells it from Z-Image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from spiece_models import spiece_model
from tiny_lumina2 import LUMINA2

from lorasmith.core.errors import ModelError
from lorasmith.families.loading import load_model
from lorasmith.families.model import Model
from lorasmith.families.slots import Encoding


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return LUMINA2.saved(tmp_path_factory.mktemp("lumina2"))


@pytest.fixture(scope="module")
def model(files: dict[str, Path]) -> Model:
    return LUMINA2.loaded(files)


def test_attention_is_capped_for_diffusers_alone(model: Model) -> None:
    encoder = model.components.text_encoders["text_encoder"]
    with torch.no_grad():  # scores large enough for the cap to show
        for layer in encoder.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    own = [layer.self_attn.attn_logit_softcapping for layer in encoder.layers]
    states = [
        replace(model.text_encoder, encoding=Encoding(lengths=lengths)).encode("a photo of a cat").tensors["context"]
        for lengths in ("comfyui", "diffusers")
    ]
    assert (states[0] - states[1]).norm() > 1e-3 * states[0].norm()
    assert [layer.self_attn.attn_logit_softcapping for layer in encoder.layers] == own


def test_the_vocabulary_may_lie_beside_the_encoder(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["text_encoder"])
    del tensors["spiece_model"]
    bare = save(tmp_path / "gemma_2_2b_fp16.safetensors", tensors)
    with pytest.raises(ModelError, match=r"gemma_2_2b_fp16\.safetensors needs a vocabulary, .* put tokenizer\.model"):
        load_model(files["transformer"], text_encoders=[bare])
    (tmp_path / "tokenizer.model").write_bytes(spiece_model("bpe"))
    found = load_model(files["transformer"], text_encoders=[bare]).text_encoder.encode("a cat")
    assert found.tensors["context"].shape == LUMINA2.loaded(files).text_encoder.encode("a cat").tensors["context"].shape


def test_time_runs_the_other_way(model: Model) -> None:
    level = model.components.schedule.at_sigma(torch.tensor([0.25]))
    assert level.time.item() == 0.25
    assert model.components.schedule.shift == 6.0


@pytest.mark.slow
def test_diffusers_reads_a_file_of_the_released_width(tmp_path: Path) -> None:
    wide = {"num_layers": 1, "num_attention_heads": 24, "num_kv_heads": 8, "hidden_size": 24 * 96}
    part = LUMINA2.denoiser(**wide, axes_dim_rope=(32, 32, 32))
    part.save_config(tmp_path)
    theirs = type(part).from_single_file(LUMINA2.original(part), config=str(tmp_path), local_files_only=True)
    state = part.state_dict()
    assert theirs.state_dict().keys() == state.keys()
    assert [name for name, tensor in theirs.state_dict().items() if not torch.equal(state[name], tensor)] == []
