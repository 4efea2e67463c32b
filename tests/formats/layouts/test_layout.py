"""What every registered layout promises."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.core.adapter_state import DENOISER, AdapterState, AdapterWeights, ModuleRef
from lorasmith.core.errors import LoraError
from lorasmith.formats import lora_file  # registers the layouts
from lorasmith.formats.layouts.layout import LAYOUTS

MODELS = ("unet_names", "sdxl_names", "flux_names")
ALGORITHMS = (
    ("lora", ""),
    ("lora", "tucker"),
    ("lora", "dora_out"),
    ("lora", "dora_in"),
    ("loha", ""),
    ("lokr", ""),
    ("oft", ""),
    ("boft", ""),
    ("glora", ""),
)
# What one file of a layout can hold together; the others hold anything.
TOGETHER = {
    "diffusers": ((("lora", ""), ("lora", "tucker")), (("lora", "dora_out"),)),
    "peft": ((("lora", ""), ("lora", "tucker")), (("lora", "dora_out"),), (("loha", ""),)),
}


def test_the_layouts_are_registered() -> None:
    assert list(LAYOUTS) == ["kohya", "comfy", "diffusers", "peft", "ai-toolkit"]
    with pytest.raises(LoraError, match="unknown LoRA layout 'kohia' \\(did you mean 'kohya'"):
        LAYOUTS["kohia"]


@pytest.mark.parametrize("layout", list(LAYOUTS))
@settings(max_examples=18)
@given(data=st.data())
def test_any_state_survives_a_file(request, tmp_path, make_adapter, delta, layout: str, data) -> None:
    names = request.getfixturevalue(data.draw(st.sampled_from(MODELS)))
    algorithms = data.draw(st.sampled_from(TOGETHER.get(layout, (ALGORITHMS,))))
    state = draw_state(data, names, make_adapter, algorithms, differences=layout not in TOGETHER)
    path = tmp_path / "x"
    lora_file.save_lora(path, state, names, layout=layout)
    again = lora_file.load_lora(path, names)
    assert again.unknown.keys() == ({} if layout == "peft" else state.unknown).keys()
    assert again.adapters.keys() == state.adapters.keys()
    assert_differences_equal(again, state)
    for ref, weights in state.adapters.items():
        read = again.adapters[ref]
        assert read.algorithm == weights.algorithm
        if weights.algorithm in ("lora", "loha"):
            torch.testing.assert_close(delta(read), delta(weights), rtol=1e-5, atol=1e-8)
            dropped = {"mid"} if layout in (*TOGETHER, "ai-toolkit") and weights.algorithm == "lora" else set()
            assert read.tensors.keys() == weights.tensors.keys() - dropped
            if "dora_scale" in weights.tensors:
                assert torch.equal(read.tensors["dora_scale"], weights.tensors["dora_scale"])
        else:
            assert_same(read, in_layout(weights, layout))
    first = contents(path)
    lora_file.save_lora(path, again, names, layout=layout)
    assert contents(path) == first
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.pairwise(
    model=MODELS, layout=["kohya", "comfy", "peft"], dtype=[torch.float32, torch.bfloat16, torch.float16]
)
def test_a_lora_of_one_rank_is_read_back_bit_for_bit(request, tmp_path, make_state, layout, model, dtype) -> None:
    names = request.getfixturevalue(model)
    state = make_state(names, dtype=dtype, alpha=2.0)
    lora_file.save_lora(tmp_path / "x", state, names, layout=layout)
    again = lora_file.load_lora(tmp_path / "x", names)
    assert again.adapters.keys() == state.adapters.keys()
    for ref, weights in state.adapters.items():
        assert_same(again.adapters[ref], weights)


@pytest.mark.parametrize("model", MODELS)
def test_no_two_layouts_and_no_two_modules_share_a_name(request, model) -> None:
    names = request.getfixturevalue(model)
    one_prefix = {"comfy", "ai-toolkit"}  # which differ in what follows the module's name
    for name, layout in LAYOUTS.items():
        bases = layout.bases(names)
        same = one_prefix if name in one_prefix else {name}
        others = {base for other, one in LAYOUTS.items() if other not in same for base in one.bases(names)}
        assert not bases.keys() & others
        reached = {part.module for parts in bases.values() for part in parts}
        assert {ref.path for ref in reached if ref.component == DENOISER} == set(names.denoiser)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_layout_detects_what_it_wrote_and_nothing_else(layout, unet_names, make_state) -> None:
    written = LAYOUTS[layout].write(make_state(unet_names), unet_names)
    counts = {name: one.detects(written) for name, one in LAYOUTS.items()}
    assert counts == {name: len(written) if name == layout else 0 for name in LAYOUTS}


def in_layout(weights: AdapterWeights, layout: str) -> AdapterWeights:
    """Rotations as kohya's layout keeps them: shortened to their bound, which is in the metadata."""
    if layout != "kohya" or weights.algorithm not in ("oft", "boft"):
        return weights
    blocks = weights.tensors["oft_blocks"]
    shortened = blocks * (weights.alpha / max(float((blocks - blocks.mT).norm()), weights.alpha))
    return replace(weights, tensors={**weights.tensors, "oft_blocks": shortened})


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def draw_state(data, names, make_adapter, algorithms=ALGORITHMS, *, differences: bool = True) -> AdapterState:
    state = AdapterState(
        metadata=data.draw(st.dictionaries(st.sampled_from(["a", "ss_x"]), st.text("xyß", max_size=3)))
    )
    matrices = [path for path, shape in names.weight_shapes.items() if len(shape) > 1]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for path in data.draw(st.lists(st.sampled_from(matrices), unique=True, min_size=1, max_size=6)):
        algorithm, variant = data.draw(st.sampled_from(algorithms))
        state.adapters[ModuleRef(DENOISER, path)] = make_adapter(
            names.weight_shapes[path],
            algorithm,
            data.draw(st.integers(1, 3)),
            data.draw(st.sampled_from([0.5, 1.0, 3.0, 4.0])),
            generator,
            variant=variant,
        )
    for component in names.text_encoders:
        path = data.draw(st.sampled_from(names.paths(component)))
        algorithm, variant = data.draw(st.sampled_from(algorithms))
        encoder = make_adapter((8, 4), algorithm, 2, 1.0, generator, variant=variant)
        state.adapters[ModuleRef(component, path)] = encoder
    if differences:
        draw_differences(data, state, names, matrices, generator)
    if data.draw(st.booleans()):
        state.unknown["of.another.program"] = torch.arange(3)
        state.unknown["lora_unet_not_in_this_model.lora_down.weight"] = torch.ones(2, 2)
    return state


def draw_differences(data, state: AdapterState, names, matrices: list[str], generator: torch.Generator) -> None:
    norms = [path for path, shape in names.weight_shapes.items() if len(shape) == 1]
    for path in data.draw(st.lists(st.sampled_from(norms), unique=True, max_size=2)) if norms else []:
        size = names.weight_shapes[path]
        state.differences[ModuleRef(DENOISER, path)] = {"weight": torch.ones(size), "bias": torch.ones(size)}
    plain = [path for path in matrices if names.denoiser[path].rows is None]
    for path in data.draw(st.lists(st.sampled_from(plain), unique=True, max_size=2)):
        values = torch.rand(names.weight_shapes[path][0], generator=generator)
        state.differences[ModuleRef(DENOISER, path)] = {"bias": values}


def assert_same(one, other) -> None:
    assert one.algorithm == other.algorithm
    assert one.alpha == pytest.approx(other.alpha)
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in other.tensors.items():
        assert one.tensors[name].dtype == tensor.dtype
        assert torch.equal(one.tensors[name], tensor), name


def assert_differences_equal(one: AdapterState, other: AdapterState) -> None:
    assert one.differences.keys() == other.differences.keys()
    for ref, parameters in other.differences.items():
        assert one.differences[ref].keys() == parameters.keys()
        assert all(torch.equal(one.differences[ref][name], tensor) for name, tensor in parameters.items())


def test_equal_states_give_equal_files_whatever_their_order(tmp_path: Path, unet_names, make_state) -> None:
    state = make_state(unet_names).with_metadata({"b": "1", "a": "2"})
    turned = AdapterState(dict(reversed(state.adapters.items())), metadata={"a": "2", "b": "1"})
    digests = set()
    for i, one in enumerate((state, turned)):
        lora_file.save_lora(tmp_path / f"{i}", one, unet_names)
        digests.add(hashlib.sha256((tmp_path / f"{i}").read_bytes()).digest())
    assert len(digests) == 1
