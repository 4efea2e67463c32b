"""A resized LoRA is the best of its size, and the same file otherwise."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError, OptionError, OutputError
from lorasmith.families.model import Model
from lorasmith.formats.container import check_safetensors
from lorasmith.formats.lora_file import load_lora
from lorasmith.formats.metadata import sha256_body
from lorasmith.formats.spelling import ModuleTensors
from lorasmith.toolbox.lora_files import read_lora, spelled_like
from lorasmith.toolbox.resize import resize
from tests.covering import slow_except

LAYOUTS = ("kohya", "comfy", "diffusers")
BASE = "lora_unet_mid_block_conv"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_module_is_the_best_of_its_rank(tiny: Model, tmp_path: Path, layout: str) -> None:
    state = cases.lora_state(cases.shapes_of(tiny), rank=6, alpha=3.0)
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names, layout)
    report = resize(path, tmp_path / "b.safetensors", rank=2)
    resized = load_lora(report.output, tiny.names)

    kept = total = 0.0
    assert not resized.unknown
    assert resized.adapters.keys() == state.adapters.keys()
    for ref, weights in state.adapters.items():
        change, small = cases.weight_change(weights), resized.adapters[ref]
        singular = torch.linalg.svdvals(change)
        error = torch.linalg.matrix_norm(change - cases.weight_change(small))
        assert float(error) == pytest.approx(float(singular[2:].norm()), abs=1e-5 * float(singular.norm()))
        assert {name: t.ndim for name, t in small.tensors.items()} == {n: t.ndim for n, t in weights.tensors.items()}
        kept, total = kept + float(singular[:2].square().sum()), total + float(singular.square().sum())
    assert report.energy == pytest.approx(kept / total, rel=1e-5)
    assert {(one.before, one.after) for one in report.modules} == {(6, 2)}
    assert not report.warnings


@settings(max_examples=20)
@given(
    rank=st.integers(2, 8),
    smaller=st.integers(1, 7),
    alpha=st.floats(0.1, 64),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    variant=st.sampled_from(["", "tucker"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_scale_stays_for_every_shape(
    tmp_path_factory: pytest.TempPathFactory,
    rank: int,
    smaller: int,
    alpha: float,
    kernel: tuple[int, ...],
    variant: str,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.mktemp("resize")
    weights = cases.random_weights((12, 9, *kernel), rank=rank, alpha=alpha, variant=variant if kernel else "")
    write(folder / "a.safetensors", weights, dtype)
    if smaller >= rank:
        with pytest.raises(LoraError, match="must have a rank above the new one"):
            resize(folder / "a.safetensors", folder / "b.safetensors", rank=smaller)
        return
    resize(folder / "a.safetensors", folder / "b.safetensors", rank=smaller)
    small = only_adapter(folder / "b.safetensors")

    assert small.tensors["down"].shape == (smaller, 9, *kernel)
    assert small.tensors["up"].shape == (12, smaller, *(1,) * len(kernel))
    assert small.alpha is not None
    assert small.alpha / smaller == pytest.approx(alpha / rank, rel=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert all(tensor.dtype == dtype for tensor in small.tensors.values())


def write(path: Path, weights: AdapterWeights, dtype: torch.dtype = torch.float32, layout: str = "kohya") -> Path:
    save_file(spelled_like(layout, BASE, ModuleTensors(weights), dtype), path)
    return path


def only_adapter(path: Path) -> AdapterWeights:
    (module,) = read_lora(path).modules.values()
    assert module.adapter is not None
    return module.adapter


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_energy_gives_each_module_its_own_rank(tmp_path: Path, energy: float) -> None:
    tensors, expected = {}, {}
    for index, decay in enumerate((0.1, 0.5, 0.9)):
        up = torch.linalg.qr(torch.randn(20, 8, generator=torch.Generator().manual_seed(index))).Q
        down = torch.linalg.qr(torch.randn(16, 8, generator=torch.Generator().manual_seed(index + 9))).Q.T
        singular = decay ** torch.arange(8.0)
        share = singular.square().double().cumsum(0) / singular.square().double().sum()
        expected[f"{BASE}_{index}"] = int((share < energy - 1e-9).sum()) + 1
        tensors |= spelled_like(
            "kohya", f"{BASE}_{index}", ModuleTensors(AdapterWeights("lora", {"down": down, "up": up * singular}, 8.0))
        )
    save_file(tensors, tmp_path / "a.safetensors")
    if all(rank == 8 for rank in expected.values()):
        with pytest.raises(LoraError, match="ask for less"):
            resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", energy=energy)
        return
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", energy=energy)

    assert {one.name: one.after for one in report.modules} == expected
    assert all(one.energy >= energy - 1e-6 for one in report.modules)
    both = resize(tmp_path / "a.safetensors", tmp_path / "c.safetensors", energy=energy, rank=2)
    assert {one.name: one.after for one in both.modules} == {name: min(rank, 2) for name, rank in expected.items()}


def test_modules_that_are_small_enough_keep_every_bit(tiny: Model, tmp_path: Path) -> None:
    first, *others = cases.shapes_of(tiny).items()
    state = cases.lora_state(dict(others), rank=2)
    state.adapters[first[0]] = cases.random_weights(first[1], rank=5)
    state.unknown["lora_unet_other.lora_down.weight"] = torch.ones(2, 3)
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names)
    report = resize(path, tmp_path / "b.safetensors", rank=2)
    before, after = load_file(path), load_file(report.output)

    assert before.keys() == after.keys()
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {one.name for one in report.modules if one.before == 5}


def test_one_alpha_for_all_leaves_every_change_as_it_is(tmp_path: Path) -> None:
    """Also where a module is small enough, and its Tucker core with it."""
    adapters = [
        cases.random_weights((12, 9, 3, 3), rank=2, alpha=3.0, variant="tucker"),
        *(cases.random_weights((12, 9), rank=4, alpha=8.0, seed=n) for n in (1, 2)),
    ]
    tensors: dict[str, torch.Tensor] = {}
    for index, weights in enumerate(adapters):
        tensors |= spelled_like("kohya", f"{BASE}_{index}", ModuleTensors(weights))
    save_file(tensors, tmp_path / "a.safetensors")
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2)
    after = [module.adapter for module in read_lora(report.output).modules.values()]

    assert [weights.alpha for weights in after if weights is not None] == [4.0, 4.0, 4.0]
    assert after[0] is not None
    assert after[0].tensors.keys() == {"down", "up", "mid"}
    assert torch.allclose(cases.weight_change(after[0]), cases.weight_change(adapters[0]), rtol=1e-5)


def test_a_dora_keeps_its_magnitudes(tmp_path: Path) -> None:
    weights = cases.random_weights((12, 9), rank=4, variant="dora")
    path = write(tmp_path / "a.safetensors", weights)
    report = resize(path, tmp_path / "b.safetensors", rank=1)
    small = only_adapter(report.output)

    assert torch.equal(small.tensors["dora_scale"], weights.tensors["dora_scale"])
    assert small.tensors["down"].shape[0] == 1
    assert report.modules[0].algorithm == "DoRA"


@pytest.mark.parametrize("algorithm", slow_except(["loha", "lokr"], "lokr"))
def test_other_algorithms_become_loras_with_a_warning(tiny: Model, tmp_path: Path, algorithm: str) -> None:
    state = cases.lora_state(cases.shapes_of(tiny), algorithm, rank=2)
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names)
    report = resize(path, tmp_path / "b.safetensors", rank=4, names=tiny.names)
    resized = load_lora(report.output, tiny.names)

    name = {"loha": "LoHa", "lokr": "LoKr"}[algorithm]
    assert any(f"modules were {name} and are LoRA now" in warning for warning in report.warnings)
    for ref, weights in state.adapters.items():
        small = resized.adapters[ref]
        assert small.algorithm == "lora"
        assert small.tensors["down"].ndim == len(cases.shapes_of(tiny)[ref])
        change = cases.weight_change(weights)
        singular = torch.linalg.svdvals(change)
        error = torch.linalg.matrix_norm(change - cases.weight_change(small))
        assert float(error) == pytest.approx(float(singular[4:].norm()), abs=1e-4 * float(singular.norm()))


def test_kernels_that_nothing_tells_are_warned_about(tiny: Model, tmp_path: Path) -> None:
    state = cases.lora_state(cases.shapes_of(tiny, ("conv1",)), "loha")
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names)
    report = resize(path, tmp_path / "b.safetensors", rank=2)
    assert any("were taken for Linear layers" in warning and "--model" in warning for warning in report.warnings)


def test_a_full_difference_becomes_a_lora_and_a_bias_stays(tiny: Model, tmp_path: Path) -> None:
    ref = ModuleRef(DENOISER, "mid_block.resnets.0.conv1")
    norm = ModuleRef(DENOISER, "mid_block.resnets.0.norm1")
    shape = tiny.names.weight_shapes[ref.path]
    low = cases.weight_change(cases.random_weights(shape, rank=3)).float().reshape(shape)
    bias = torch.randn(shape[0])
    state = AdapterState({}, {ref: {"weight": low, "bias": bias}, norm: {"weight": bias}})
    path = cases.saved(tmp_path / "a.safetensors", state, tiny.names)
    report = resize(path, tmp_path / "b.safetensors", rank=3)
    resized = load_lora(report.output, tiny.names)

    assert report.energy == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(cases.weight_change(resized.adapters[ref]).float(), low.flatten(1), atol=1e-6)
    assert torch.equal(resized.differences[ref]["bias"], bias)
    assert torch.equal(resized.differences[norm]["weight"], bias)
    assert "weight" not in resized.differences[ref]


def test_alphas_in_the_header_are_multiplied_in(tiny: Model, tmp_path: Path) -> None:
    base = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{base}.lora_A.weight": torch.randn(4, 3), f"{base}.lora_B.weight": torch.randn(5, 4)}
    small = {f"{base}_2.lora_A.weight": torch.randn(1, 3), f"{base}_2.lora_B.weight": torch.randn(5, 1)}
    metadata = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'}
    save_file({**tensors, **small}, tmp_path / "a.safetensors", metadata)
    report = resize(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=2)
    before, after = (read_lora(tmp_path / f"{name}.safetensors").modules for name in "ab")

    assert load_file(report.output).keys() == {*tensors, *small}
    assert "lora_adapter_metadata" not in check_safetensors(report.output).metadata
    for ref, module in after.items():
        assert module.adapter is not None
        assert module.adapter.alpha is None
        original = before[ref].adapter
        assert original is not None
        u, s, vh = torch.linalg.svd(cases.weight_change(original), full_matrices=False)
        assert torch.allclose(cases.weight_change(module.adapter), (u[:, :2] * s[:2]) @ vh[:2], atol=1e-5)


def test_the_header_is_brought_up_to_date(tiny: Model, tmp_path: Path) -> None:
    path = cases.saved(tmp_path / "a.safetensors", cases.lora_state(cases.shapes_of(tiny), rank=4), tiny.names)
    resize(path, tmp_path / "b.safetensors", rank=3)
    resize(tmp_path / "b.safetensors", tmp_path / "c.safetensors", energy=0.6)
    metadata = check_safetensors(tmp_path / "c.safetensors").metadata

    assert metadata["ss_output_name"] == "a"
    assert check_safetensors(tmp_path / "b.safetensors").metadata["ss_network_dim"] == "3"
    assert metadata["ss_network_dim"] in ("1", "2", "3", "Dynamic")
    assert metadata["lorasmith.history"].splitlines() == [
        "resized a.safetensors to rank 3",
        "resized b.safetensors to energy 0.6",
    ]
    assert metadata["sshs_model_hash"] == sha256_body(tmp_path / "c.safetensors")


def test_what_is_wrong_is_a_sentence(tiny: Model, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", cases.random_weights((8, 8)))
    output = tmp_path / "b.safetensors"
    with pytest.raises(OptionError, match="give --rank"):
        resize(path, output)
    with pytest.raises(OptionError, match="a rank must be at least 1, got 0"):
        resize(path, output, rank=0)
    with pytest.raises(OptionError, match=r"a share above 0 and at most 1, such as 0.95, got 1.5"):
        resize(path, output, energy=1.5)
    with pytest.raises(OutputError, match="exists already"):
        resize(path, path, rank=1)
    with pytest.raises(LoraError, match="largest is 4"):
        resize(path, output, rank=8)
    oft = write(tmp_path / "oft.safetensors", cases.random_weights((8, 8), "oft"))
    with pytest.raises(LoraError, match="by OFT, which has no rank"):
        resize(oft, output, rank=1)
    state = cases.lora_state(cases.shapes_of(tiny))
    cases.saved(tmp_path / "peft", state, tiny.names, "peft")
    with pytest.raises(LoraError, match="convert it first"):
        resize(tmp_path / "peft", output, rank=1)
    assert not output.exists()
