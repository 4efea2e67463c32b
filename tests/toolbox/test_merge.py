"""A merged LoRA does what its parts do together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorasmith.core.adapter_state import DENOISER, AdapterState, ModuleRef
from lorasmith.core.errors import LoraError, OptionError, OutputError
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.lora_file import load_lora
from lorasmith.formats.metadata import sha256_body
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.changes import added_by
from lorasmith.toolbox.merge import merge_loras
from lorasmith.toolbox.model_files import open_model
from lorasmith.training.lora_handle import Lora

LAYOUTS = ("kohya", "comfy", "diffusers")
STRENGTHS = (0.8, -0.5)


def predicted(model: Model, loras: Sequence[tuple[Path, float]]) -> Tensor:
    """What the denoiser says with LoRAs applied one after the other, on a prompt encoded with them."""
    denoiser, encoder = model.denoiser, model.text_encoder
    for path, strength in loras:
        lora = Lora.load(path, model)
        denoiser = lora.applied_to(denoiser, strength=strength)
        encoder = lora.applied_to_text(encoder, strength=strength)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with encoder.active(torch.device("cpu")):
        conditioning = encoder.encode("a red apple")
    with denoiser.active(), torch.no_grad():
        return denoiser.predict(latents, torch.tensor([400.0]), conditioning)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def two(tiny: Model, folder: Path, layouts: Sequence[str] = ("kohya", "kohya"), **settings: object) -> list[Path]:
    """Two LoRAs on overlapping modules, of different rank and scale."""
    shapes = cases.shapes_of(tiny)
    some = {ref: shape for ref, shape in shapes.items() if not ref.path.endswith("conv1")}
    others = {ref: shape for ref, shape in shapes.items() if not ref.path.endswith("proj_in")}
    states = [
        cases.lora_state(some, seed=1, rank=3, alpha=2.0, **settings),
        cases.lora_state(others, seed=2, rank=5, alpha=5.0, **settings),
    ]
    return [
        cases.saved(folder / f"{name}.safetensors", state, tiny.names, layout)
        for name, state, layout in zip("ab", states, layouts, strict=True)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merge_is_both_applied(tiny: Model, tmp_path: Path, layout: str) -> None:
    paths = two(tiny, tmp_path, (layout, layout))
    parts = list(zip(paths, STRENGTHS, strict=True))
    report = merge_loras(parts, tmp_path / "out.safetensors")

    expected = predicted(tiny, parts)
    assert distance(expected, predicted(tiny, [(report.output, 1.0)])) < 1e-5
    assert distance(expected, predicted(tiny, [])) > 1e-3
    assert report.energy is None
    assert report.ranks.keys() == {3, 5, 8}
    assert report.modules == len(cases.shapes_of(tiny))


def test_layouts_mix_where_the_model_is_named(tiny: Model, tmp_path: Path) -> None:
    parts = list(zip(two(tiny, tmp_path, ("comfy", "diffusers")), STRENGTHS, strict=True))
    report = merge_loras(parts, tmp_path / "out.safetensors", model=open_model("lorasmith-tiny"))

    assert distance(predicted(tiny, parts), predicted(tiny, [(report.output, 1.0)])) < 1e-5


def test_a_fused_and_a_split_lora_of_a_transformer(flux: Model, flux_file: Path, tmp_path: Path) -> None:
    shapes = cases.shapes_of(flux, ("attn.to_q", "attn.to_k", "proj_mlp"))
    states = [cases.lora_state(shapes, seed=seed, rank=2) for seed in (1, 2)]
    parts = [
        (cases.saved(tmp_path / "a.safetensors", states[0], flux.names, "kohya"), 1.0),
        (cases.saved(tmp_path / "b.safetensors", states[1], flux.names, "diffusers"), 0.5),
    ]
    report = merge_loras(parts, tmp_path / "out.safetensors", model=open_model(flux_file))
    merged = load_lora(report.output, flux.names)

    for ref, weights in merged.adapters.items():
        expected = cases.weight_change(states[0].adapters[ref]) + 0.5 * cases.weight_change(states[1].adapters[ref])
        assert torch.allclose(cases.weight_change(weights), expected, atol=1e-6), ref
    assert merged.adapters.keys() == shapes.keys()


@settings(max_examples=15)
@given(
    ranks=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    alphas=st.tuples(*(st.one_of(st.none(), st.floats(0.01, 64)),) * 3),
    strengths=st.tuples(*(st.integers(-200, 200).map(lambda n: n / 100),) * 3),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    variant=st.sampled_from(["", "tucker"]),
)
def test_any_number_of_loras_of_any_shape_add_up(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: tuple[int, ...],
    alphas: tuple[float | None, ...],
    strengths: tuple[float, ...],
    kernel: tuple[int, ...],
    dtype: torch.dtype,
    variant: str,
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    shape, base = (12, 7, *kernel), "lora_unet_mid_block_conv"
    adapters = [
        cases.random_weights(shape, rank=rank, alpha=alpha, seed=seed, variant=variant if kernel else "")
        for seed, (rank, alpha) in enumerate(zip(ranks, alphas, strict=True))
    ]
    parts, expected = [], torch.zeros(12, 7 * int(torch.tensor(kernel).prod() if kernel else 1), dtype=torch.float64)
    for index, (weights, strength) in enumerate(zip(adapters, strengths, strict=True)):
        rounded = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
        path = folder / f"{index}.safetensors"
        write_one(path, base, ModuleTensors(type(weights)("lora", rounded, weights.alpha)))
        parts.append((path, strength))
        expected += strength * cases.weight_change(type(weights)("lora", rounded, weights.alpha))
    if not any(strengths):
        with pytest.raises(LoraError, match="all of these are 0"):
            merge_loras(parts, folder / "out.safetensors")
        return
    merged = only_module(merge_loras(parts, folder / "out.safetensors").output)

    size = sum(abs(s) * float(cases.weight_change(w).norm()) for s, w in zip(strengths, adapters, strict=True))
    assert float((added_by(merged).matrix().double() - expected).norm()) <= 1e-5 * size


def write_one(path: Path, base: str, module: ModuleTensors) -> None:
    from safetensors.torch import save_file

    from lorasmith.toolbox.lora_files import spelled_like

    save_file(spelled_like("kohya", base, module), path)


def only_module(path: Path) -> ModuleTensors:
    from lorasmith.toolbox.lora_files import read_lora

    (module,) = read_lora(path).modules.values()
    return module


def test_one_lora_at_a_strength_keeps_every_number(tiny: Model, tmp_path: Path) -> None:
    path, _ = two(tiny, tmp_path)
    merge_loras([(path, 0.25)], tmp_path / "out.safetensors")
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")

    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor * 0.25 if key.endswith(".alpha") else tensor), key


def test_a_number_format_is_kept_where_it_holds_the_numbers(tiny: Model, tmp_path: Path) -> None:
    state = cases.lora_state(cases.shapes_of(tiny))
    paths = [cases.saved(tmp_path / f"{n}.safetensors", state, tiny.names, dtype=torch.bfloat16) for n in ("a", "b")]
    dtypes = {}
    for name, strengths, dtype in (
        ("same", (0.7, 0.7), None),
        ("not", (0.7, 0.3), None),
        ("asked", (0.7, 0.3), torch.float16),
    ):
        output = tmp_path / f"{name}.safetensors"
        merge_loras(list(zip(paths, strengths, strict=True)), output, dtype=dtype)
        dtypes[name] = {t.dtype for key, t in load_file(output).items() if key.endswith("up.weight")}

    assert dtypes == {"same": {torch.bfloat16}, "not": {torch.float32}, "asked": {torch.float16}}


def test_norms_and_biases_add_up(tiny: Model, tmp_path: Path) -> None:
    norm, layer = ModuleRef(DENOISER, "mid_block.resnets.0.norm1"), ModuleRef(DENOISER, "mid_block.resnets.0.conv1")
    width = tiny.names.weight_shapes[norm.path][0]
    differences = [torch.randn(width, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    states = [
        AdapterState({}, {norm: {"weight": differences[0], "bias": differences[1]}}),
        AdapterState({}, {norm: {"weight": differences[1]}, layer: {"bias": differences[0]}}),
    ]
    parts = [
        (cases.saved(tmp_path / f"{n}.safetensors", state, tiny.names), s)
        for n, state, s in zip("ab", states, STRENGTHS, strict=True)
    ]
    merged = load_lora(merge_loras(parts, tmp_path / "out.safetensors", rank=2).output, tiny.names)

    assert torch.allclose(merged.differences[norm]["weight"], 0.8 * differences[0] - 0.5 * differences[1])
    assert torch.allclose(merged.differences[norm]["bias"], 0.8 * differences[1])
    assert torch.allclose(merged.differences[layer]["bias"], -0.5 * differences[0])


@pytest.mark.parametrize(("algorithm", "variant"), [("lora", "dora"), ("oft", "")])
def test_what_depends_on_the_weight_needs_the_model(tiny: Model, tmp_path: Path, algorithm: str, variant: str) -> None:
    shapes = cases.shapes_of(tiny, ("attn1.to_q",))
    parts = [
        (
            cases.saved(tmp_path / "a.safetensors", cases.lora_state(shapes, algorithm, variant=variant), tiny.names),
            0.7,
        ),
        (cases.saved(tmp_path / "b.safetensors", cases.lora_state(shapes, seed=3), tiny.names), 1.0),
    ]
    with pytest.raises(LoraError, match="add --rank and --model to approximate"):
        merge_loras(parts, tmp_path / "out.safetensors")
    with pytest.raises(LoraError, match="depends on the model's weights"):
        merge_loras(parts, tmp_path / "out.safetensors", rank=4)
    most = max(min(shape) for shape in shapes.values())
    report = merge_loras(parts, tmp_path / "out.safetensors", rank=most, model=open_model("lorasmith-tiny"))

    assert distance(predicted(tiny, parts), predicted(tiny, [(report.output, 1.0)])) < 1e-4


def test_other_algorithms_pass_through_where_they_are_alone(tiny: Model, tmp_path: Path) -> None:
    shapes = list(cases.shapes_of(tiny).items())
    states = [cases.lora_state(dict(shapes[:4]), "oft"), cases.lora_state(dict(shapes[4:]))]
    parts = [
        (cases.saved(tmp_path / f"{n}.safetensors", s, tiny.names), 1.0) for n, s in zip("ab", states, strict=True)
    ]
    report = merge_loras(parts, tmp_path / "out.safetensors")

    assert distance(predicted(tiny, parts), predicted(tiny, [(report.output, 1.0)])) < 1e-6


def test_the_header_says_what_was_done(tiny: Model, tmp_path: Path) -> None:
    state = cases.lora_state(cases.shapes_of(tiny))
    common = {"ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    for name, trigger in (("a", "sks dog"), ("b", "zwx hat")):
        lora = Lora(state.with_metadata(common), tiny.names)
        lora.save(tmp_path / f"{name}.safetensors", metadata={"modelspec.trigger_phrase": trigger, "ss_steps": name})
    output = tmp_path / "out.safetensors"
    merge_loras([(tmp_path / "a.safetensors", 0.8), (tmp_path / "b.safetensors", 1.0)], output)
    metadata = check_safetensors(output).metadata

    assert metadata.items() >= common.items()
    assert metadata["modelspec.trigger_phrase"] == "sks dog, zwx hat"
    assert metadata["modelspec.merged_from"] == "a.safetensors:0.8, b.safetensors:1"
    assert "ss_steps" not in metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("8", "8.0")
    assert metadata["lorasmith.history"] == "merged a.safetensors:0.8, b.safetensors:1"
    assert metadata["sshs_model_hash"] == sha256_body(output)


def test_differences_of_other_sizes_are_refused_and_never_broadcast(tiny: Model, tmp_path: Path) -> None:
    norm = ModuleRef(DENOISER, "conv_norm_out")
    width = tiny.names.weight_shapes[norm.path][0]
    for name, size in (("a", width), ("b", 1)):
        save_file({"lora_unet_conv_norm_out.w_norm": torch.ones(size)}, tmp_path / f"{name}.safetensors")

    with pytest.raises(LoraError, match="must be for the same model"):
        merge_loras([(tmp_path / f"{name}.safetensors", 1.0) for name in "ab"], tmp_path / "out.safetensors")


def test_what_is_wrong_is_a_sentence(tiny: Model, tmp_path: Path) -> None:
    path, other = two(tiny, tmp_path)
    with pytest.raises(OptionError, match="a rank must be at least 1, got 0"):
        merge_loras([(path, 1.0)], tmp_path / "out.safetensors", rank=0)
    with pytest.raises(OutputError, match="exists already"):
        merge_loras([(path, 1.0)], other)
    merge_loras([(path, 1.0)], other, overwrite=True)
    shapes = {ref: (shape[0], shape[1] + 1, *shape[2:]) for ref, shape in cases.shapes_of(tiny).items()}
    wider = cases.saved(tmp_path / "wider.safetensors", cases.lora_state(shapes), tiny.names)
    for rank in (None, 2):
        with pytest.raises(LoraError, match="must be for the same model"):
            merge_loras([(path, 1.0), (wider, 1.0)], tmp_path / "out.safetensors", rank=rank)
    assert not (tmp_path / "out.safetensors").exists()
