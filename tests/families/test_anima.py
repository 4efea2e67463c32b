"""Anima: its text adapter, which is a part of its own in diffusers' pipeline and inside the denoiser here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
from original_models import save
from safetensors.torch import load_file
from test_parts_of_models import qwen3
from tiny_anima import diffusers_parts
from torch import Tensor
from torch.nn import functional as F
from transformer_models import Case

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import ModelError
from lorasmith.families.base import FAMILIES
from lorasmith.families.conditionings import Conditioning
from lorasmith.families.files.checkpoint import CheckpointShapes
from lorasmith.families.loading import load_model
from lorasmith.families.part_loading import load_text_encoder
from lorasmith.families.slots import Encoding
from lorasmith.formats.lora_file import save_lora
from lorasmith.formats.names import matches
from lorasmith.formats.spelling import guessed_family
from lorasmith.toolbox.model_files import open_model
from lorasmith.training.lora_handle import Lora
from tests.families.test_transformer_loras import assert_applied

ANIMA = FAMILIES["anima"]
LONG = "a penguin on a pink background " * 90  # more tokens than the conditioning has at least


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case.of("anima", tmp_path_factory.mktemp("anima"))


def noisy(case: Case, count: int = 1) -> Tensor:
    return models.seeded("latents", (count, *case.ours.components.latent.shape(64, 96)), seed=0)


@torch.no_grad()
def predicted(case: Case, *prompts: Conditioning) -> Tensor:
    family, denoiser = case.ours.family, case.ours.components.denoiser
    return family.predict(denoiser, noisy(case, len(prompts)), torch.full((len(prompts),), 0.6), family.join(prompts))


@torch.no_grad()
def test_the_adapter_is_diffusers_own_and_weights_are_factors_of_its_rows(case: Case) -> None:
    given = case.ours.text_encoder.encode("a (red:1.5) fox").tensors
    parts = diffusers_parts()
    rows = parts["text_conditioner"](given["context"], given["t5xxl_ids"])
    weights = F.pad(given["t5xxl_weights"], (0, rows.shape[1] - given["t5xxl_weights"].shape[1]))
    assert rows.shape[1] == 512 and set(given["t5xxl_weights"].flatten().tolist()) == {1.0, 1.5}
    bare = Conditioning({"context": rows * weights.unsqueeze(-1)})
    torch.testing.assert_close(predicted(case, Conditioning(given)), predicted(case, bare), rtol=1e-4, atol=1e-5)


def test_weights_are_syntax_and_change_no_state_of_qwen3(case: Case) -> None:
    less, more = (case.ours.text_encoder.encode(f"a (red:{weight}) fox").tensors for weight in (0.5, 1.5))
    assert torch.equal(less["t5xxl_ids"], more["t5xxl_ids"])
    assert torch.equal(less["context"], more["context"])
    assert less["t5xxl_weights"].tolist() != more["t5xxl_weights"].tolist()


def test_an_empty_prompt_is_a_token_in_comfyui_and_nothing_in_diffusers(case: Case) -> None:
    encoder = case.ours.text_encoder
    ours = encoder.encode("").tensors["context"]
    assert torch.equal(ours, encoder.encode("<|endoftext|>").tensors["context"])
    theirs = replace(encoder, encoding=Encoding(lengths="diffusers")).encode("").tensors
    assert not theirs["context"].any() and theirs["context"].shape == ours.shape
    assert theirs["t5xxl_ids"].tolist() == [[1]]


def test_a_nodes_padding_of_t5_counts(case: Case) -> None:
    encoding = Encoding(min_tokens={"t5xxl": 9})
    ids = replace(case.ours.text_encoder, encoding=encoding).encode("a fox").tensors["t5xxl_ids"]
    assert ids.shape == (1, 9) and ids[0, -1] == 0


@pytest.mark.parametrize("texts", [("a fox", LONG, ""), ("a fox", "a (fox:0)", "the red bus")])
def test_prompts_of_any_length_share_a_batch(case: Case, texts: tuple[str, ...]) -> None:
    prompts = [case.ours.text_encoder.encode(text) for text in texts]
    together = predicted(case, *prompts)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = case.ours.family.predict(
                case.ours.components.denoiser, noisy(case, 3)[index : index + 1], torch.tensor([0.6]), prompt
            )
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


def test_released_files_have_a_prefix_and_leftovers_of_cosmos(case: Case, tmp_path: Path) -> None:
    leftovers = ("pos_embedder.seq", "accum_iteration", "blocks.0.self_attn.q_norm._extra_state")
    tensors = {**load_file(case.files["transformer"]), **{name: torch.zeros(1) for name in leftovers}}
    model = load_model(save(tmp_path / "anima.safetensors", {f"net.{name}": one for name, one in tensors.items()}))
    expected = case.ours.components.denoiser.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in model.components.denoiser.state_dict().items())


@pytest.mark.slow
def test_diffusers_reads_the_transformer_of_the_same_file(case: Case, tmp_path: Path) -> None:
    part = diffusers_parts()["transformer"]
    part.save_config(tmp_path)
    tensors = load_file(case.files["transformer"])
    own = {name: one for name, one in tensors.items() if not name.startswith("llm_adapter.")}
    theirs = type(part).from_single_file(own, config=str(tmp_path), local_files_only=True).state_dict()
    ours = case.ours.components.denoiser.state_dict()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


def test_the_released_model_has_the_published_sizes() -> None:
    """Those of ComfyUI's own modules at full size."""
    denoiser = ANIMA.released_denoiser()
    sizes = {name: one.numel() for name, one in denoiser.named_parameters()}
    adapter = sum(size for name, size in sizes.items() if name.startswith("text_conditioner."))
    assert (sum(sizes.values()) - adapter, adapter) == (1_956_405_248, 134_663_680)

    names, preset = ANIMA.table(denoiser), ANIMA.presets["attention+ff"]
    trained = {place.path for path, place in names.items() if matches(path, preset.include)}
    layers = [f"{attention}_attn.{one}_proj" for attention in ("self", "cross") for one in ("q", "k", "v", "output")]
    expected = [f"blocks.{block}.{layer}" for block in range(28) for layer in (*layers, "mlp.layer1", "mlp.layer2")]
    assert trained == set(expected), "those of sd-scripts' networks.lora_anima"


@pytest.mark.parametrize("clip_type", ["stable_diffusion", "lumina2", "flux2", "any"])
def test_the_encoder_is_known_by_its_width(clip_type: str, tmp_path: Path) -> None:
    file = save(tmp_path / "qwen_3_06b_base.safetensors", qwen3(1024))
    assert load_text_encoder([file], clip_type).family is ANIMA


@pytest.mark.slow
def test_variants_and_encoders_of_other_sizes_are_refused(case: Case, tmp_path: Path) -> None:
    tensors = load_file(case.files["transformer"])
    bare = {name: one for name, one in tensors.items() if not name.startswith("llm_adapter.")}
    with pytest.raises(ModelError, match="looks like Cosmos-Predict2, which is not supported"):
        load_model(save(tmp_path / "cosmos.safetensors", bare))
    wide = {**tensors, "x_embedder.proj.1.weight": torch.zeros(64, 72)}
    with pytest.raises(ModelError, match="takes 17 input channels, but only text-to-image models with 16"):
        load_model(save(tmp_path / "video.safetensors", wide))
    other = save(tmp_path / "qwen.safetensors", qwen3(48))
    with pytest.raises(ModelError, match=r"of width 48, but .* needs one of width 32 .*qwen_3_06b_base"):
        load_model(case.files["transformer"], text_encoders=[other])
    state = {name: one for name, one in case.ours.components.denoiser.state_dict().items() if "conditioner" not in name}
    with pytest.raises(ModelError, match="one part of a diffusers model"):
        load_model(save(tmp_path / "diffusion_pytorch_model.safetensors", state))


@pytest.mark.slow
def test_tools_find_the_parameters_of_both_parts_in_a_file_and_in_a_folder(case: Case, tmp_path: Path) -> None:
    for name in ("transformer", "text_conditioner"):
        diffusers_parts()[name].save_pretrained(tmp_path / name)
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "AnimaModularPipeline"}')
    file, folder = open_model(case.files["transformer"]), open_model(tmp_path)
    assert folder.family is ANIMA
    assert folder.places.keys() == file.places.keys()
    assert len(file.places) == len(list(case.ours.components.denoiser.parameters()))
    assert all(torch.equal(folder.read(one), file.read(one)) for one in file.places)


@pytest.mark.slow
def test_a_folder_without_the_adapter_is_refused(case: Case, tmp_path: Path) -> None:
    for name in ("transformer", "vae"):
        diffusers_parts()[name].save_pretrained(tmp_path / name)
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "AnimaModularPipeline"}')
    with pytest.raises(ModelError, match="must have a text_conditioner but has none"):
        load_model(tmp_path)


def lora(case: Case, *patterns: str) -> AdapterState:
    shapes = case.ours.names.weight_shapes
    return AdapterState(
        {
            ModuleRef(DENOISER, path): AdapterWeights(
                "lora",
                {
                    "down": models.seeded(f"{path} down", (2, shape[1]), seed=0, std=0.1),
                    "up": models.seeded(f"{path} up", (shape[0], 2), seed=0, std=0.1),
                },
                alpha=1.0,
            )
            for path, shape in shapes.items()
            if matches(path, patterns) and len(shape) == 2
        }
    )


def test_a_lora_on_both_parts_is_applied_by_diffusers(case: Case, tmp_path: Path) -> None:
    state = lora(case, *ANIMA.presets["attention+ff+adapter"].include)
    for layout, adapter in (("portable", "diffusion_model.llm_adapter."), ("diffusers", "text_conditioner.")):
        file = tmp_path / f"{layout}.safetensors"
        save_lora(file, state, case.ours.names, layout=layout)
        assert any(key.startswith(f"{adapter}blocks.0.cross_attn.q_proj.lora_A") for key in load_file(file))
        assert assert_applied(case, file).state.adapters.keys() == state.adapters.keys()


def test_names_of_the_adapters_layers_are_those_of_sd_scripts(case: Case, tmp_path: Path) -> None:
    state = lora(case, "text_conditioner.blocks.0.*", "transformer_blocks.0.ff.*")
    file = tmp_path / "kohya.safetensors"
    save_lora(file, state, case.ours.names, layout="kohya")
    names = {key.split(".")[0] for key in load_file(file)}
    assert {"lora_unet_llm_adapter_blocks_0_self_attn_o_proj", "lora_unet_blocks_0_mlp_layer1"} <= names
    assert Lora.load(file, case.ours).state.adapters.keys() == state.adapters.keys()


@pytest.mark.parametrize("key", ["text_conditioner.blocks.0.mlp.0", "diffusion_model.llm_adapter.embed"])
def test_a_lora_of_the_adapter_alone_is_recognised(key: str) -> None:
    assert guessed_family({f"{key}.lora_A.weight": (4, 1024)}) == "Anima"


def test_wans_blocks_are_not_taken_for_its_own() -> None:
    assert guessed_family({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 1024)}) == "Wan"
    assert not ANIMA.recognises(CheckpointShapes({"blocks.0.self_attn.q.weight": (8, 8)}))
