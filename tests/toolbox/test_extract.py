"""What was folded into a model comes out of it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError, ModelError, OptionError, OutputError
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors, read_safetensors
from lorasmith.formats.lora_file import load_lora
from lorasmith.toolbox.extract import extract
from lorasmith.toolbox.merge import fold_into
from lorasmith.toolbox.model_files import open_model

Folded = Callable[..., Path]


@pytest.fixture
def folded(tmp_path: Path) -> Folded:
    """A copy of a model with a LoRA folded in."""

    def fold(source: Path, model: Model, state: AdapterState, name: str = "tuned.safetensors") -> Path:
        lora = cases.saved(tmp_path / f"{name}.lora.safetensors", state, model.names)
        return fold_into(open_model(source), [(lora, 1.0)], tmp_path / name).output

    return fold


def assert_recovered(found: AdapterState, state: AdapterState, *, within: float = 1e-4) -> None:
    assert found.adapters.keys() == state.adapters.keys()
    for ref, weights in state.adapters.items():
        expected, change = cases.weight_change(weights), cases.weight_change(found.adapters[ref])
        assert float((expected - change).norm()) < within * float(expected.norm()), ref
        assert found.adapters[ref].tensors["down"].shape[1:] == weights.tensors["down"].shape[1:]


def test_a_lora_is_recovered(tiny_file: Path, tiny: Model, folded: Folded, tmp_path: Path) -> None:
    state = cases.lora_state(cases.shapes_of(tiny), rank=3)
    tuned = folded(tiny_file, tiny, state)
    report = extract(open_model(tiny_file), open_model(tuned), tmp_path / "out.safetensors", rank=3)

    assert_recovered(load_lora(report.output, tiny.names), state)
    assert report.captured == pytest.approx(1.0, abs=1e-6)
    assert set(report.ranks.values()) == {3}
    assert len(report.ranks) == len(state.adapters)
    assert report.unchanged > 100
    assert report.left_out == 0


def test_fused_projections_are_one_matrix_of_the_rank(
    flux_file: Path, flux: Model, folded: Folded, tmp_path: Path
) -> None:
    ends = ("0.attn.to_q", "0.attn.to_k", "0.attn.to_v", "0.proj_mlp", "norm_out.linear")
    state = cases.lora_state(cases.shapes_of(flux, ends), rank=2)
    tuned = folded(flux_file, flux, state)
    report = extract(open_model(flux_file), open_model(tuned), tmp_path / "out.safetensors", rank=8)

    assert_recovered(load_lora(report.output, flux.names), state)
    ranks = {key: t.shape[0] for key, t in load_file(report.output).items() if key.endswith("down.weight")}
    assert ranks["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] == 8
    assert report.ranks["single_blocks.0.linear1"] == 8


def with_changes(source: Path, target: Path, changes: dict[str, Tensor]) -> Path:
    tensors, metadata = read_safetensors(source)
    save_file({name: t + changes[name] if name in changes else t for name, t in tensors.items()}, target, metadata)
    return target


@pytest.mark.slow
def test_norms_and_biases_are_taken_along_on_request(tiny_file: Path, tiny: Model, tmp_path: Path) -> None:
    names = {
        "model.diffusion_model.middle_block.0.in_layers.0.weight": ("mid_block.resnets.0.norm1", "weight"),
        "model.diffusion_model.middle_block.0.in_layers.2.bias": ("mid_block.resnets.0.conv1", "bias"),
    }
    shapes = check_safetensors(tiny_file).tensors
    embedding = next(name for name in shapes if name.endswith("token_embedding.weight"))
    changes = {name: torch.randn(shapes[name].shape) for name in (*names, embedding)}
    tuned = open_model(with_changes(tiny_file, tmp_path / "tuned.safetensors", changes))
    base = open_model(tiny_file)
    with pytest.raises(LoraError, match="no LoRA to extract"):
        extract(base, tuned, tmp_path / "out.safetensors", rank=2)
    report = extract(base, tuned, tmp_path / "out.safetensors", rank=2, differences=True)
    found = load_lora(report.output, tiny.names)

    for name, (path, parameter) in names.items():
        assert torch.allclose(found.differences[ModuleRef(DENOISER, path)][parameter], changes[name], atol=1e-5)
    assert report.left_out == 1
    squares = {name: float(change.square().sum()) for name, change in changes.items()}
    assert report.captured == pytest.approx(1 - squares[embedding] / sum(squares.values()), rel=1e-3)


def test_a_model_without_text_encoder_is_compared_in_what_it_has(tiny_file: Path, tiny: Model, tmp_path: Path) -> None:
    tensors, metadata = read_safetensors(tiny_file)
    unet = {name: t for name, t in tensors.items() if name.startswith("model.diffusion_model.")}
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({**unet, name: unet[name] + 1}, tmp_path / "unet.safetensors", metadata)
    report = extract(
        open_model(tiny_file), open_model(tmp_path / "unet.safetensors"), tmp_path / "out.safetensors", rank=1
    )

    assert list(report.ranks) == ["input_blocks.0.0"]
    assert report.captured == pytest.approx(1.0)


@pytest.mark.slow
def test_dtype_and_header(tiny_file: Path, tiny: Model, folded: Folded, tmp_path: Path) -> None:
    tuned = folded(tiny_file, tiny, cases.lora_state(cases.shapes_of(tiny, ("attn1.to_q",)), rank=3))
    models = open_model(tiny_file), open_model(tuned)
    report = extract(*models, tmp_path / "out.safetensors", rank=3, dtype=torch.float16)
    header = check_safetensors(report.output)

    assert {info.dtype for name, info in header.tensors.items() if not name.endswith("alpha")} == {"F16"}
    expected = {
        "ss_base_model_version": tiny.family.kohya_version(tiny.components.parameterization),
        "ss_network_dim": "3",
        "ss_network_alpha": "3.0",
        "modelspec.title": "tuned",
        "lorasmith.history": "extracted from tuned.safetensors against tiny.safetensors at rank 3",
    }
    assert header.metadata.items() >= expected.items()
    assert "sshs_model_hash" in header.metadata


@pytest.mark.slow
def test_progress_counts_layers(tiny_file: Path, tiny: Model, folded: Folded, tmp_path: Path) -> None:
    tuned = folded(tiny_file, tiny, cases.lora_state(cases.shapes_of(tiny, ("conv1",)), rank=1))
    seen: list[tuple[int, int]] = []
    models = open_model(tiny_file), open_model(tuned)
    extract(*models, tmp_path / "out.safetensors", rank=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(seen)) for n in range(len(seen))]
    assert len(seen) > 100


def test_what_is_wrong_is_a_sentence(
    tiny_file: Path, folder: Path, flux_file: Path, sd2_file: Path, tmp_path: Path
) -> None:
    base, output = open_model(tiny_file), tmp_path / "out.safetensors"
    with pytest.raises(LoraError, match="does not differ from"):
        extract(base, open_model(folder), output, rank=4)
    with pytest.raises(ModelError, match=r"must be of one family.*Stable Diffusion 1\.x.*Flux\.1"):
        extract(base, open_model(flux_file), output, rank=4)
    with pytest.raises(ModelError, match=r"must be of one family"):
        extract(base, open_model(sd2_file), output, rank=4)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        extract(base, base, output, rank=0)
    with pytest.raises(OutputError, match="exists already"):
        extract(base, base, tiny_file, rank=4)
    assert not output.exists()


def test_models_of_one_family_and_different_sizes_are_refused(flux_file: Path, tmp_path: Path) -> None:
    import models

    save_file(models.checkpoint(models.FluxShape(256, 1, 2, 64, 32), 0), tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="must have the same layers"):
        extract(open_model(flux_file), open_model(tmp_path / "other.safetensors"), tmp_path / "out.safetensors", rank=4)
