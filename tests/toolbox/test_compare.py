"""Differences are found where they are, of the size they have, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError, ModelError
from lorasmith.families.model import Model
from lorasmith.formats.container import read_safetensors
from lorasmith.toolbox.compare import Pair, compare
from lorasmith.toolbox.merge import merge_loras
from lorasmith.toolbox.model_files import open_model

LAYOUTS = ("kohya", "comfy", "diffusers")


@pytest.fixture
def state(tiny: Model) -> AdapterState:
    return cases.lora_state(cases.shapes_of(tiny))


@pytest.fixture
def path(tiny: Model, state: AdapterState, tmp_path: Path) -> Path:
    return cases.saved(tmp_path / "a.safetensors", state, tiny.names)


def test_a_file_is_the_same_as_itself(path: Path) -> None:
    found = compare(path, path)
    assert found.is_same()
    assert found.overall().distance == 0
    assert found.overall().cosine == pytest.approx(1.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_count(tiny: Model, state: AdapterState, path: Path, tmp_path: Path, layout: str) -> None:
    other = cases.saved(tmp_path / "b.safetensors", state, tiny.names, layout)
    found = compare(path, other, model=open_model("lorasmith-tiny"))

    assert found.is_same(tolerance=1e-6, weights_only=True)
    assert len(found.pairs) == len(state.adapters)
    assert not (found.only_first or found.only_second)
    # diffusers' layout multiplies alpha in, so that 2 became the rank.
    assert set(found.settings.values()) == (
        {("LoRA, rank 4, alpha 2", "LoRA, rank 4, alpha 4")} if layout == "diffusers" else set()
    )


def test_a_peft_folder_is_compared_too(tiny: Model, state: AdapterState, path: Path, tmp_path: Path) -> None:
    cases.saved(tmp_path / "peft", state, tiny.names, "peft")
    assert compare(path, tmp_path / "peft").is_same(tolerance=1e-6, weights_only=True)


def test_distance_and_cosine_by_module_and_block(tiny: Model, state: AdapterState, path: Path, tmp_path: Path) -> None:
    changed = next(ref for ref in state.adapters if ref.path.startswith("up_blocks.1"))
    other_state = AdapterState(dict(state.adapters))
    other_state.adapters[changed] = cases.random_weights(cases.shapes_of(tiny)[changed], rank=2, alpha=8.0, seed=77)
    found = compare(path, cases.saved(tmp_path / "b.safetensors", other_state, tiny.names))
    first, second = (cases.weight_change(s.adapters[changed]) for s in (state, other_state))

    assert not found.is_same(tolerance=0.1, weights_only=True)
    (different,) = [pair for pair in found.pairs if pair.distance]
    assert different.distance == pytest.approx(float((first - second).norm() / first.norm()), rel=1e-5)
    assert different.cosine == pytest.approx(float((first * second).sum() / first.norm() / second.norm()), abs=1e-5)
    blocks = {pair.name: pair.distance for pair in found.blocks() if pair.distance}
    inside = [w for ref, w in state.adapters.items() if ref.path.startswith("up_blocks.1")]
    norm = math.sqrt(sum(float(cases.weight_change(w).square().sum()) for w in inside))
    assert blocks == {"denoiser.up_blocks.1": pytest.approx(float((first - second).norm()) / norm, rel=1e-5)}
    assert list(found.settings.values()) == [("LoRA, rank 4, alpha 2", "LoRA, rank 2, alpha 8")]


def test_modules_that_one_lacks(tiny: Model, state: AdapterState, path: Path, tmp_path: Path) -> None:
    left = dict(list(state.adapters.items())[:-3])
    other = cases.saved(tmp_path / "b.safetensors", AdapterState(left), tiny.names)
    assert len(compare(path, other).only_first) == 3
    assert len(compare(other, path).only_second) == 3
    for pair in ((path, other), (other, path)):
        assert not compare(*pair).is_same(tolerance=1e9, weights_only=True)


def test_metadata(tiny: Model, path: Path, tmp_path: Path) -> None:
    tensors, metadata = read_safetensors(path)
    save_file(dict(tensors), tmp_path / "b.safetensors", {**metadata, "ss_output_name": "other", "new": "x"})
    found = compare(path, tmp_path / "b.safetensors")
    assert found.metadata == {"new": (None, "x"), "ss_output_name": ("a", "other")}
    assert not found.is_same()
    assert found.is_same(weights_only=True)


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
def test_algorithms_are_compared_by_what_they_add(tiny: Model, tmp_path: Path, algorithm: str) -> None:
    shapes = cases.shapes_of(tiny, ("attn1.to_q",))
    first = cases.saved(tmp_path / "a.safetensors", cases.lora_state(shapes, algorithm), tiny.names)
    rank = max(min(shape) for shape in shapes.values())
    second = merge_loras(
        [(first, 0.5)], tmp_path / "b.safetensors", rank=rank, model=open_model("lorasmith-tiny")
    ).output
    found = compare(first, second)

    assert found.by_tensors == 0
    assert found.overall().distance == pytest.approx(0.5, rel=1e-3)
    assert found.overall().cosine == pytest.approx(1.0, rel=1e-4)


def test_what_depends_on_the_weight_is_compared_by_tensors_or_with_the_model(tiny: Model, tmp_path: Path) -> None:
    shapes = cases.shapes_of(tiny, ("attn1.to_q",))
    paths = [
        cases.saved(tmp_path / f"{n}.safetensors", cases.lora_state(shapes, "oft", seed=n), tiny.names) for n in (1, 2)
    ]
    by_tensors = compare(*paths)
    assert by_tensors.by_tensors == len(shapes)
    assert by_tensors.overall().distance == pytest.approx(math.sqrt(2), rel=0.2)
    with_model = compare(*paths, model=open_model("lorasmith-tiny"))
    assert with_model.by_tensors == 0
    assert with_model.overall().distance > 0.5
    assert compare(paths[0], paths[0]).is_same()


def test_differences_of_norms_and_biases_count(tiny: Model, tmp_path: Path) -> None:
    ref = ModuleRef(DENOISER, "mid_block.resnets.0.norm1")
    width = tiny.names.weight_shapes[ref.path][0]
    states = [AdapterState({}, {ref: {"weight": torch.full((width,), value)}}) for value in (1.0, 1.5)]
    paths = [cases.saved(tmp_path / f"{n}.safetensors", s, tiny.names) for n, s in zip("ab", states, strict=True)]
    found = compare(*paths)
    assert found.overall().distance == pytest.approx(0.5)
    assert found.overall().cosine == pytest.approx(1.0)


def test_a_module_of_another_shape_has_nothing_in_common(tiny: Model, path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("to_q.lora_down.weight"))
    save_file({**tensors, key: torch.randn(4, tensors[key].shape[1] + 3)}, tmp_path / "b.safetensors")
    (pair,) = [pair for pair in compare(path, tmp_path / "b.safetensors").pairs if pair.distance]
    assert pair.cosine == 0
    assert pair.distance > 1


def test_numbers_of_a_pair() -> None:
    assert Pair("x", 0.0, 0.0, 0.0, 0.0).distance == 0
    assert Pair("x", 0.0, 4.0, 4.0, 0.0).distance == math.inf
    assert Pair("x", 0.0, 4.0, 4.0, 0.0).cosine is None
    assert Pair("x", 4.0, 4.0, 16.0, -4.0).distance == 2
    assert Pair("x", 4.0, 4.0, 16.0, -4.0).cosine == -1


def test_nan_is_not_compared(tiny: Model, state: AdapterState, path: Path, tmp_path: Path) -> None:
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("up.weight"))
    save_file({**tensors, key: torch.full_like(tensors[key], math.nan)}, tmp_path / "b.safetensors")
    with pytest.raises(LoraError, match="holds NaN or infinity"):
        compare(path, tmp_path / "b.safetensors")


def test_two_checkpoints_by_tensor(tiny_file: Path, tmp_path: Path) -> None:
    tensors, metadata = read_safetensors(tiny_file)
    names = list(tensors)
    changed = {**tensors, names[0]: tensors[names[0]] * 1.5, "extra": torch.zeros(1)}
    changed[names[1]] = tensors[names[1]].half()
    del changed[names[2]]
    save_file(changed, tmp_path / "b.safetensors", metadata)
    found = compare(tiny_file, tmp_path / "b.safetensors")

    assert found.kind == "checkpoint"
    assert (found.only_first, found.only_second) == ([names[2]], ["extra"])
    assert {pair.name for pair in found.pairs if pair.distance > 0.01} == {names[0]}
    assert next(pair for pair in found.pairs if pair.name == names[0]).distance == pytest.approx(0.5)
    assert list(found.settings) == [names[1]]
    assert not found.is_same(tolerance=1.0)


def test_the_built_in_model_is_found_by_name() -> None:
    assert compare(Path("lorasmith-tiny"), Path("lorasmith-tiny")).is_same()


def test_what_cannot_be_compared_is_a_sentence(path: Path, tiny_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"a\.safetensors is a LoRA and .*tiny\.safetensors is a checkpoint"):
        compare(tiny_file, path)
    with pytest.raises(LoraError, match="does not exist"):
        compare(path, tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraError, match="must hold"):
        compare(path, tmp_path / "empty")
    other = {f"lora_unet_double_blocks_0_img_attn_proj.lora_{n}.weight": torch.zeros(2, 2) for n in ("down", "up")}
    save_file(other, tmp_path / "flux.safetensors")
    with pytest.raises(LoraError, match="same family"):
        compare(path, tmp_path / "flux.safetensors")
    with pytest.raises((LoraError, ModelError), match="depends on the model"):
        comfy = {f"diffusion_model.input_blocks.1.1.proj_in.lora_{n}.weight": torch.ones(2, 2) for n in ("down", "up")}
        save_file(comfy, tmp_path / "comfy.safetensors")
        compare(path, tmp_path / "comfy.safetensors")


def test_a_lora_without_alpha_is_one_whose_alpha_is_its_rank(tmp_path: Path) -> None:
    weights = cases.random_weights((8, 8), rank=4, alpha=None)
    tensors = {f"lora_unet_x.lora_{name}.weight": tensor for name, tensor in weights.tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({**tensors, "lora_unet_x.alpha": torch.tensor(4.0)}, tmp_path / "b.safetensors")
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").is_same()
